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

inline Vector load_levels(const int8_t* address) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)address)));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)address)));
#else
  typedef int8_t Narrow __attribute__((vector_size(kLanes)));
  Narrow narrow;
  std::memcpy(&narrow, address, sizeof narrow);
  return __builtin_convertvector(__builtin_convertvector(narrow, Ints), Vector);
#endif
}

// Bytes; the scale of a neuron is a factor of its h.
struct Int8Down : Int8 {
  float factor(int64_t i) const { return scale[i]; }

  template <int rows, int count>
  inline void add(const Gathered& n, const float* h, int64_t beside, float* out, int64_t apart) const {
    const auto ahead = n.template ahead<count>(values, size);
    const int8_t* w[count];
    for (int r = 0; r < count; ++r) w[r] = values + n[r] * size;
    const auto step = [&](int64_t k) {
      Vector sums[rows];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) sums[c] = load(out + c * apart + k);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const Vector row = load_levels(w[r] + k);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) sums[c] += row * h[c * beside + r];
      }
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) std::memcpy(out + c * apart + k, &sums[c], sizeof sums[c]);
    };
    int64_t k = 0;
    for (; k + 64 <= size; k += 64) {
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) ahead.template ask<64>(k, r);
#pragma GCC unroll 16
      for (int v = 0; v < 64; v += kLanes) step(k + v);
    }
    for (; k + kLanes <= size; k += kLanes) step(k);
    for (; k < size; ++k)
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < rows; ++c) out[c * apart + k] += float(w[r][k]) * h[c * beside + r];
  }
};

// Nibbles, widened to q - 8. What a zero differs from that by is one addend for each group, whatever the neurons.
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
    const uint8_t* w[count];
    for (int r = 0; r < count; ++r) w[r] = this->packed + n[r] * groups * half;
    alignas(64) float by[count][rows][kLanes], shift[rows][kLanes];
    const auto some = [&](int64_t first, int64_t last, auto lanes) {
      Vector addend[rows] = {};
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        for (int64_t at = first * half; at < last * half; at += 64) ahead.template ask<64>(at, r);
        const int64_t g = n[r] * groups + first;
        const Vector scales = sparsecc::load((const sparsecc::Float16*)this->scale + g, lanes);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) {
          const Vector times = scales * h[c * beside + r];
          std::memcpy(by[r][c], &times, sizeof times);
          if constexpr (zeros)
            addend[c] += times * (8 - sparsecc::load((const sparsecc::Float16*)this->zero + g, lanes));
        }
      }
      std::memcpy(shift, addend, sizeof addend);
      const Levels levels(8);
      for (int64_t g = first; g < last; ++g) {
        float* to = out + g * group;
#pragma GCC unroll 8
        for (int j = 0; j < half; j += kLanes) {
          Vector low_sums[rows], high_sums[rows];
#pragma GCC unroll 8
          for (int c = 0; c < rows; ++c) {
            const float addend = zeros ? shift[c][g - first] : 0;
            low_sums[c] = load(to + c * apart + j) + addend;
            high_sums[c] = load(to + c * apart + half + j) + addend;
          }
#pragma GCC unroll 8
          for (int r = 0; r < count; ++r) {
            Vector low, high;
            levels.unpack(w[r] + g * half + j, &low, &high);
#pragma GCC unroll 8
            for (int c = 0; c < rows; ++c) {
              low_sums[c] += low * by[r][c][g - first];
              high_sums[c] += high * by[r][c][g - first];
            }
          }
#pragma GCC unroll 8
          for (int c = 0; c < rows; ++c) {
            std::memcpy(to + c * apart + j, &low_sums[c], sizeof low_sums[c]);
            std::memcpy(to + c * apart + half + j, &high_sums[c], sizeof high_sums[c]);
          }
        }
      }
    };
    int64_t g = 0;
    for (; g + kLanes <= groups; g += kLanes) some(g, g + kLanes, sparsecc::All{});
    if (g < groups) some(g, groups, sparsecc::First{int(groups - g)});
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
