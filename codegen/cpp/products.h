// Parts of every kernel of sparsecc::few_rows.

namespace {

// The blocks of [begin, end) that are output j's, counted from its first.
template <class Body>
inline void part(const int64_t* ends, int j, int64_t begin, int64_t end, Body body) {
  const int64_t first = j ? ends[j - 1] : 0;
  const int64_t from = std::max(begin, first), to = std::min(end, ends[j]);
  if (from < to) body(from - first, to - first);
}

// body(begin, end) for all rows of x, by several threads where there is work for them.
template <class Call, class Body>
inline void over_rows(const Call& call, Body body) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(call.size, 1));
  const auto some = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<Body*>(context))(begin, end);
  };
  call.parallel(call.rows, grain, some, &body);
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

// Norms of a row; x and out may be the same.
inline void rms_norm(const float* x, int64_t size, float eps, float* out) {
  const float scale = 1 / std::sqrt(sum_of_squares(x, size, 0) / size + eps);
  for (int64_t k = 0; k < size; ++k) out[k] = x[k] * scale;
}

inline void layer_norm(const float* x, int64_t size, float eps, float* out) {
  const float mean = sum_of(x, size) / size;
  const float scale = 1 / std::sqrt(sum_of_squares(x, size, mean) / size + eps);
  for (int64_t k = 0; k < size; ++k) out[k] = (x[k] - mean) * scale;
}

}  // namespace
