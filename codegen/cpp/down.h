// Down projections [neurons, size] by neuron: out[c * apart + k] += sum over r of h[c * beside + r] D[n[r], k] for
// c < rows and r < count. The accumulators are read and written once for all `count` neurons.

namespace {

template <class T>
struct DenseDown : Dense<T> {
  float factor(int64_t) const { return 1; }

  template <int rows, int count>
  inline void add(const Gathered& n, const float* h, int64_t beside, float* out, int64_t apart) const {
    const int64_t size = this->size;
    const auto ahead = n.template ahead<count>(this->values, sizeof(T) * size);
    const T* w[count];
    for (int r = 0; r < count; ++r) w[r] = this->values + n[r] * size;
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) {
      Vector sums[rows];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) sums[c] = load(out + c * apart + k);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const Vector row = load(w[r] + k);
        ahead.template ask<sizeof(T) * kLanes>(sizeof(T) * k, r);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) sums[c] += row * h[c * beside + r];
      }
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) std::memcpy(out + c * apart + k, &sums[c], sizeof sums[c]);
    }
    for (; k < size; ++k)
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < rows; ++c) out[c * apart + k] += widen(w[r][k]) * h[c * beside + r];
  }
};

// Bytes; the scale of a neuron is a factor of its h.
struct Int8Down : Int8 {
  float factor(int64_t i) const { return scale[i]; }

  template <int rows, int count>
  inline void add(const Gathered& n, const float* h, int64_t beside, float* out, int64_t apart) const {
    typedef int8_t Narrow __attribute__((vector_size(kLanes)));
    const auto ahead = n.template ahead<count>(values, size);
    const int8_t* w[count];
    for (int r = 0; r < count; ++r) w[r] = values + n[r] * size;
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) {
      Vector sums[rows];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) sums[c] = load(out + c * apart + k);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        Narrow narrow;
        std::memcpy(&narrow, w[r] + k, sizeof narrow);
        const Vector row = __builtin_convertvector(__builtin_convertvector(narrow, Ints), Vector);
        ahead.template ask<kLanes>(k, r);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) sums[c] += row * h[c * beside + r];
      }
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) std::memcpy(out + c * apart + k, &sums[c], sizeof sums[c]);
    }
    for (; k < size; ++k)
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < rows; ++c) out[c * apart + k] += float(w[r][k]) * h[c * beside + r];
  }
};

// Nibbles, widened.
template <int group, bool zeros>
struct Int4Down : Int4<group, zeros> {
  static constexpr int half = group / 2;
  float factor(int64_t) const { return 1; }

  template <int rows, int count>
  inline void add(const Gathered& n, const float* h, int64_t beside, float* out, int64_t apart) const {
    const int64_t groups = this->size / group;
    const auto ahead = n.template ahead<count>(this->packed, groups * half);
    n.template ask_all<count>(this->scale, sizeof(Half) * groups);
    if constexpr (zeros) n.template ask_all<count>(this->zero, sizeof(Half) * groups);
    for (int64_t g = 0; g < groups; ++g) {
      float* to = out + g * group;
      float by[count], zero[count];
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        by[r] = widen(this->scale[n[r] * groups + g]);
        zero[r] = zeros ? widen(this->zero[n[r] * groups + g]) : 8;
      }
#pragma GCC unroll 8
      for (int j = 0; j < half; j += kLanes) {
        Vector first[rows], second[rows];
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) first[c] = load(to + c * apart + j), second[c] = load(to + c * apart + half + j);
#pragma GCC unroll 8
        for (int r = 0; r < count; ++r) {
          Vector low, high;
          Levels(zero[r]).unpack(this->packed + (n[r] * groups + g) * half + j, &low, &high);
          ahead.template ask<kLanes>(g * half + j, r);
#pragma GCC unroll 8
          for (int c = 0; c < rows; ++c) {
            const float times = h[c * beside + r] * by[r];
            first[c] += low * times;
            second[c] += high * times;
          }
        }
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) {
          std::memcpy(to + c * apart + j, &first[c], sizeof first[c]);
          std::memcpy(to + c * apart + half + j, &second[c], sizeof second[c]);
        }
      }
    }
  }
};

template <int count, class Down>
inline void add_some(const Down& down, const Gathered& n, const float* h, int64_t beside, int rows, float* out,
                     int64_t apart) {
  switch (rows) {
    case 1: return down.template add<1, count>(n, h, beside, out, apart);
    case 2: return down.template add<2, count>(n, h, beside, out, apart);
    default:
      if constexpr (kRows == 4)
        return rows == 3 ? down.template add<3, count>(n, h, beside, out, apart)
                         : down.template add<4, count>(n, h, beside, out, apart);
  }
}

// The same for any number of neurons and rows.
template <class Down>
inline void add(const Down& down, const Gathered& n, int64_t count, const float* h, int64_t beside, int64_t rows,
                float* out, int64_t apart) {
  const auto all = [&](auto together, int64_t i) {
    for (int64_t m = 0; m < rows; m += kRows)
      add_some<together>(down, n.after(i), h + m * beside + i, beside, int(std::min<int64_t>(rows - m, kRows)),
                         out + m * apart, apart);
  };
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) all(std::integral_constant<int, kBlock>{}, i);
  for (; i < count; ++i) all(std::integral_constant<int, 1>{}, i);
}

}  // namespace
