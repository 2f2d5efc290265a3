// Parts of every kernel of sparsecc::few_rows.

namespace {

constexpr int kBlock = 4;                        // weight rows at a time
constexpr int kRows = kRegisters >= 32 ? 4 : 2;  // input rows at a time: accumulators must fit the registers

// The blocks of [begin, end) that are output j's, counted from its first.
template <class Body>
inline void part(const int64_t* ends, int j, int64_t begin, int64_t end, Body body) {
  const int64_t first = j ? ends[j - 1] : 0;
  const int64_t from = std::max(begin, first), to = std::min(end, ends[j]);
  if (from < to) body(from - first, to - first);
}

// out[r * kRows + c] = sum over k of x[c, k] w[r, k]
template <int rows, int count>
inline void dots(const float* x, const float* w, int64_t size, float* out) {
  constexpr int unroll = rows == 1 ? 2 : 1;  // enough sums in flight to hide the latency of one
  Vector sums[count][rows][unroll] = {};
  int64_t k = 0;
  for (; k + unroll * kLanes <= size; k += unroll * kLanes) {
#pragma GCC unroll 8
    for (int u = 0; u < unroll; ++u) {
      Vector column[rows];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) column[c] = load(x + c * size + k + u * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const Vector row = load(w + r * size + k + u * kLanes);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) sums[r][c][u] += row * column[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < count; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < rows; ++c) {
      Vector all = sums[r][c][0];
      for (int u = 1; u < unroll; ++u) all += sums[r][c][u];
      float total = sum(all);
      for (int64_t rest = k; rest < size; ++rest) total += x[c * size + rest] * w[r * size + rest];
      out[r * kRows + c] = total;
    }
}

template <int count>
inline void dots_of(const float* x, int rows, const float* w, int64_t size, float* out) {
  switch (rows) {
    case 1: return dots<1, count>(x, w, size, out);
    case 2: return dots<2, count>(x, w, size, out);
#if defined(__AVX512F__) || !defined(__AVX__)
    case 3: return dots<3, count>(x, w, size, out);
    case 4: return dots<4, count>(x, w, size, out);
#endif
  }
}

inline void products(const float* x, int rows, const float* w, int count, int64_t size, float* out) {
  if (count == kBlock) return dots_of<kBlock>(x, rows, w, size, out);
  for (int r = 0; r < count; ++r) dots_of<1>(x, rows, w + r * size, size, out + r * kRows);
}

inline float sum_of_squares(const float* x, int64_t size, float mean) {
  Vector squares = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    const Vector centred = load(x + k) - mean;
    squares += centred * centred;
  }
  float total = sum(squares);
  for (; k < size; ++k) total += (x[k] - mean) * (x[k] - mean);
  return total;
}

inline float sum_of(const float* x, int64_t size) {
  Vector sums = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) sums += load(x + k);
  float total = sum(sums);
  for (; k < size; ++k) total += x[k];
  return total;
}

inline void rms_norm(const FewRows& call, float eps, float* out) {
  for (int64_t m = 0; m < call.rows; ++m) {
    const float* x = call.x + m * call.size;
    const float scale = 1 / std::sqrt(sum_of_squares(x, call.size, 0) / call.size + eps);
    for (int64_t k = 0; k < call.size; ++k) out[m * call.size + k] = x[k] * scale;
  }
}

inline void layer_norm(const FewRows& call, float eps, float* out) {
  for (int64_t m = 0; m < call.rows; ++m) {
    const float* x = call.x + m * call.size;
    const float mean = sum_of(x, call.size) / call.size;
    const float scale = 1 / std::sqrt(sum_of_squares(x, call.size, mean) / call.size + eps);
    for (int64_t k = 0; k < call.size; ++k) out[m * call.size + k] = (x[k] - mean) * scale;
  }
}

}  // namespace
