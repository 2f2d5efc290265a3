// Parts of every kernel of sparsecc::rows.

namespace sparsecc {
namespace {

constexpr int kUnroll = 4;                         // enough sums in flight to hide the latency of one
constexpr int64_t kStep = kUnroll * kLanes;
constexpr int64_t kChunk = 16 * kStep;             // elements after which partial sums are put away
constexpr int64_t kGrain = 1 << 14;                // elements that are worth a thread
constexpr int64_t kBlocks = 32, kSummedRows = 64;  // of sums over rows: parts, and rows added up at a time
constexpr int kTogether = 8;                       // rows whose sums stay in registers

template <class Element>
inline Element* row(const RowsOperand& operand, int64_t m) {
  return (Element*)operand.data + (m % operand.period) * operand.stride;
}

template <class Element>
struct Several {
  Element* at[kTogether];
  Several(const RowsOperand& operand, int64_t from, int count) {
    for (int i = 0; i < count; ++i) at[i] = row<Element>(operand, from + i);
  }
};

// step(n, lanes, u) for every vector of a row from n on; u says which accumulators are its own.
template <class Step, class PutAway>
inline void each(int64_t size, Step step, PutAway put_away) {
  int64_t n = 0;
  while (n + kStep <= size) {
    const int64_t end = std::min(size - size % kStep, n + kChunk);
    for (; n < end; n += kStep)
      [&]<int... u>(std::integer_sequence<int, u...>) {
        (step(n + u * kLanes, All{}, std::integral_constant<int, u>{}), ...);
      }(std::make_integer_sequence<int, kUnroll>{});
    put_away();
  }
  for (; n + kLanes <= size; n += kLanes) step(n, All{}, std::integral_constant<int, 0>{});
  if (n < size) step(n, First{static_cast<int>(size - n)}, std::integral_constant<int, 0>{});
}

// Sums of parts of sums: the error grows with the length of the parts, not of the row.
struct Sum {
  Vector part[kUnroll] = {}, total = {};
  template <class Lanes>
  void add(Vector x, Lanes lanes, int u) { part[u] += only(x, lanes, 0); }
  void put_away() {
    Vector all = part[0];
    for (int u = 1; u < kUnroll; ++u) all += part[u];
    for (Vector& each : part) each = Vector{};
    total += all;
  }
  float value() { return put_away(), sum(total); }
};

struct Max {
  Vector part[kUnroll];
  Max() { for (Vector& each : part) each = splat(-INFINITY); }
  template <class Lanes>
  void add(Vector x, Lanes lanes, int u) { part[u] = vector_maximum(part[u], only(x, lanes, -INFINITY)); }
  void put_away() {}
  float value() const {
    Vector all = part[0];
    for (int u = 1; u < kUnroll; ++u) all = vector_maximum(all, part[u]);
    float found = all[0];
    for (int i = 1; i < kLanes; ++i) found = maximum(found, all[i]);
    return found;
  }
};

struct Min {
  Max negative;
  template <class Lanes>
  void add(Vector x, Lanes lanes, int u) { negative.add(-x, lanes, u); }
  void put_away() {}
  float value() const { return -negative.value(); }
};

// Lane i becomes x[i ^ width] + x[i], or x[i ^ width] - x[i] where i has the bit of width.
template <int width, int... i>
inline Vector butterfly(Vector x, std::integer_sequence<int, i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const Vector other = __builtin_shufflevector(x, x, (i ^ width)...);
#else
  const Vector other = __builtin_shuffle(x, Integers{(i ^ width)...});
#endif
  const Vector signs = {(i & width ? -1.0f : 1.0f)...};
  return x * signs + other;
}

template <int width>
inline Vector butterflies(Vector x) {
  if constexpr (width < kLanes) {
    x = butterfly<width>(x, std::make_integer_sequence<int, kLanes>{});
    x = butterflies<2 * width>(x);
  }
  return x;
}

// The Walsh–Hadamard transform of a row whose size is a power of two, in place.
inline void hadamard(float* x, int64_t size) {
  int64_t width = 1;
  if (size >= kLanes) {
    for (int64_t n = 0; n < size; n += kLanes) store(x + n, butterflies<1>(load(x + n, All{})), All{});
    width = kLanes;
  }
  for (; width < size; width *= 2)
    for (int64_t from = 0; from < size; from += 2 * width)
      if (width < kLanes) {
        for (int64_t n = from; n < from + width; ++n) {
          const float a = x[n], b = x[n + width];
          x[n] = a + b, x[n + width] = a - b;
        }
      } else {
        for (int64_t n = from; n < from + width; n += kLanes) {
          const Vector a = load(x + n, All{}), b = load(x + n + width, All{});
          store(x + n, a + b, All{}), store(x + n + width, a - b, All{});
        }
      }
}

inline void add_to(float* sums, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] += x[i];
}

}  // namespace
}  // namespace sparsecc
