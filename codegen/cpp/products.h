// NOTE TO HELPER A (from the one who gave you the task; delete this note when done): measured today on this machine, reading
// four ADJACENT weight rows at a time (each size*4 bytes, then jumping on) breaks the prefetchers where rows are short:
// K=192: 7 GB/s, K=576: 11 GB/s, K=1536: 15, while four rows that lie FAR APART (each thread's range of rows cut into four
// contiguous parts, row i of each part at a time: four long linear streams) read 20-22 GB/s at EVERY K (saturation), as good as
// a single linear stream at small K and as 8 adjacent rows at large K. So: give each thread's range [begin, end) of weight rows
// to the kernel whole, cut it in kBlock contiguous parts, and walk them together (all formats: fp32, bf16, int8, int4); the rest rows one at
// a time. Bits do not change with the split (each row is summed alone), so determinism stays. See /tmp/exp/a.cpp (dotsf/mf).
// ALSO: the boilerplate to build/load an operator and its kernels is now shared in /work/main (uncommitted): codegen/cpp/operators.py and
// runtime/ops/kernels.h (Kernels<>, in_parallel, require). I will move few_rows onto them at merge; you need not.
// Parts of every kernel of sparsecc::few_rows.

namespace {

// The blocks of [begin, end) that are output j's, counted from its first.
template <class Body>
inline void part(const int64_t* ends, int j, int64_t begin, int64_t end, Body body) {
  const int64_t first = j ? ends[j - 1] : 0;
  const int64_t from = std::max(begin, first), to = std::min(end, ends[j]);
  if (from < to) body(from - first, to - first);
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

template <class T>
inline void to_floats(const T* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(x[i]);
}

// Norms over rows; x and out may be the same.
inline void rms_norm(const float* x, int64_t rows, int64_t size, float eps, float* out) {
  for (int64_t m = 0; m < rows; ++m, x += size, out += size) {
    const float scale = 1 / std::sqrt(sum_of_squares(x, size, 0) / size + eps);
    for (int64_t k = 0; k < size; ++k) out[k] = x[k] * scale;
  }
}

inline void layer_norm(const float* x, int64_t rows, int64_t size, float eps, float* out) {
  for (int64_t m = 0; m < rows; ++m, x += size, out += size) {
    const float mean = sum_of(x, size) / size;
    const float scale = 1 / std::sqrt(sum_of_squares(x, size, mean) / size + eps);
    for (int64_t k = 0; k < size; ++k) out[k] = (x[k] - mean) * scale;
  }
}

}  // namespace
