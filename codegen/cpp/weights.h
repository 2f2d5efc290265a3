// The formats of weights [features, size], and for each: out[r * kRows + c] = sum over k of y[m + c, k] W[n[r], k].

namespace {

constexpr int kBlock = 4;                        // weight rows at a time
constexpr int64_t kAhead = 16384;                // bytes
constexpr int kRows = kRegisters >= 32 ? 4 : 2;  // input rows at a time: accumulators must fit the registers

struct Floats {
  const float* values;  // [rows, size]
  int64_t stride;
  const float* row(int64_t m) const { return values + m * stride; }
};

// Which rows of weights are read side by side: `count` from n on. What comes after them is asked for in its own order,
// far enough ahead: prefetchers like one long stream, and not several short ones.
struct Following {
  int64_t n;
  int64_t operator[](int r) const { return n + r; }
  Following after(int64_t rows) const { return {n + rows}; }

  template <int count>
  struct Ahead {
    const char* from;
    template <int step>
    inline void ask(int64_t at, int r) const {
      if constexpr (count > 1) __builtin_prefetch(from + count * at + r * step, 0, 2);
    }
  };
  template <int count>
  inline Ahead<count> ahead(const void* values, int64_t row_bytes) const {
    return {static_cast<const char*>(values) + n * row_bytes + std::max<int64_t>(count * row_bytes, kAhead)};
  }
  template <int count>
  inline void ask_all(const void*, int64_t) const {}  // short rows beside them: prefetchers see them coming
};

constexpr int64_t kMostAhead = 32;  // rows

inline void ask_bytes(const void* from, int64_t count) {
  for (int64_t at = 0; at < count; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

inline int64_t rows_ahead(int64_t row_bytes) {
  return std::clamp<int64_t>(kAhead / std::max<int64_t>(row_bytes, 1), kBlock, kMostAhead);
}

// Rows by number. No prefetcher knows those after them, so these are asked for; `rows` goes on for kMostAhead + kBlock
// numbers behind the last one.
struct Gathered {
  const int64_t* rows;
  int64_t operator[](int r) const { return rows[r]; }
  Gathered after(int64_t count) const { return {rows + count}; }

  template <int count>
  struct Ahead {
    const char* from[count];
    template <int step>
    inline void ask(int64_t at, int r) const { __builtin_prefetch(from[r] + at, 0, 2); }
  };
  template <int count>
  inline Ahead<count> ahead(const void* values, int64_t row_bytes) const {
    const int64_t* next = rows + rows_ahead(row_bytes);
    Ahead<count> found;
    for (int r = 0; r < count; ++r) found.from[r] = static_cast<const char*>(values) + next[r] * row_bytes;
    return found;
  }
  template <int count>
  inline void ask_all(const void* values, int64_t row_bytes) const {
    const int64_t* next = rows + kMostAhead / 4;
    for (int r = 0; r < count; ++r) ask_bytes(static_cast<const char*>(values) + next[r] * row_bytes, row_bytes);
  }
};

template <class T>
struct Dense {
  using Input = Floats;
  const T* values;
  int64_t size;
  int64_t row_bytes() const { return sizeof(T) * size; }
  void ask(int64_t n) const { ask_bytes(values + n * size, row_bytes()); }

  template <int rows, int count, class Which>
  inline void dots(const Floats& y, int64_t m, const Which& n, float* out) const {
    constexpr int unroll = count == 1 ? (rows == 1 ? 4 : 2) : 1;  // sums in flight hide the latency of one
    const float* x = y.row(m);
    const auto ahead = n.template ahead<count>(values, sizeof(T) * size);
    const T* w[count];
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) w[r] = values + n[r] * size;
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
          const Vector row = load(w[r] + k + u * kLanes);
          ahead.template ask<sizeof(T) * kLanes>(sizeof(T) * (k + u * kLanes), r);
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
#pragma GCC unroll 8
        for (int u = 1; u < unroll; ++u) all += sums[r][c][u];
        float total = sum(all);
        for (int64_t rest = k; rest < size; ++rest) total += x[c * size + rest] * widen(w[r][rest]);
        out[r * kRows + c] = total;
      }
  }
};

struct Int8 {
  using Input = Quantized;
  const int8_t* values;
  const float* scale;  // [features]
  int64_t size;
  int64_t row_bytes() const { return size; }
  void ask(int64_t n) const {
    ask_bytes(values + n * size, size);
    ask_bytes(scale + n, 1);
  }

  template <int rows, int count, class Which>
  inline void dots(const Quantized& y, int64_t m, const Which& n, float* out) const {
    constexpr int unroll = count == 1 ? (rows == 1 ? 4 : 2) : 1;
    const int8_t* x = y.row(m);
    const auto ahead = n.template ahead<count>(values, size);
    n.template ask_all<count>(scale, sizeof(float));
    Ints sums[count][rows][unroll] = {};
    const auto step = [&](int64_t k, int u, int64_t left) {
      Bytes column[rows];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) column[c] = load_bytes<Bytes>(x + c * y.stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const Bytes row = load_bytes<Bytes>(values + n[r] * size + k, left);
        ahead.template ask<kBytes>(k, r);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) sums[r][c][u] = dot_signed(sums[r][c][u], row, column[c]);
      }
    };
    int64_t k = 0;
    for (; k + unroll * kBytes <= size; k += unroll * kBytes)
#pragma GCC unroll 8
      for (int u = 0; u < unroll; ++u) step(k + u * kBytes, u, kBytes);
    for (; k < size; k += kBytes) step(k, 0, size - k);
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) {
        Ints all = sums[r][c][0];
        for (int u = 1; u < unroll; ++u) all += sums[r][c][u];
        const int32_t total = sum(all) - kOffset * y.sums[m + c];
        out[r * kRows + c] = float(total) * (y.scale[m + c] * scale[n[r]]);
      }
  }
};

// The same weights; activations have a scale for each group of a row.
template <int group>
struct Int8Groups : Int8 {
  using Input = InGroups<group>;

  template <int rows, int count, class Which>
  inline void dots(const InGroups<group>& y, int64_t m, const Which& n, float* out) const {
    const auto ahead = n.template ahead<count>(values, size);
    n.template ask_all<count>(scale, sizeof(float));
    Vector sums[count][rows] = {};
    const auto step = [&](int64_t k, int64_t left) {
      Bytes column[rows];
      Ints start[rows];
      Vector by[rows];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) {
        column[c] = load_bytes<Bytes>(y.from.row(m + c) + k);
        start[c] = kOffset ? y.lanes.row_sums(m + c, k / kBytes) * -kOffset : Ints{};
        by[c] = y.lanes.row_scale(m + c, k / kBytes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const Bytes row = load_bytes<Bytes>(values + n[r] * size + k, left);
        ahead.template ask<kBytes>(k, r);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c)
          sums[r][c] += __builtin_convertvector(dot_signed(start[c], row, column[c]), Vector) * by[c];
      }
    };
    int64_t k = 0;
    for (; k + kBytes <= size; k += kBytes) step(k, kBytes);
    if (k < size) step(k, size - k);
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) out[r * kRows + c] = sum(sums[r][c]) * scale[n[r]];
  }
};

// Nibbles of one vector: the weights of the low and of the high halves.
inline void halves(Unsigned packed, Unsigned* low, Unsigned* high) {
  *low = packed & uint8_t(15);
  *high = (packed >> 4) & uint8_t(15);
}

// The lanes of the vector that starts with group g, each with its own group's number; zeros behind the last group.
template <int group, bool whole>
inline Vector by_group(const Half* values, int64_t g, int64_t groups) {
  constexpr int each = group / 2 / 4;  // lanes of a group
  if constexpr (each >= kLanes) {
    return widen(values[g]) - Vector{};
  } else {
    constexpr int count = kLanes / each;
    uint64_t some = 0;
    std::memcpy(&some, values + g, sizeof(Half) * (whole ? count : groups - g));
#if defined(__AVX512F__)
    const __m512 few = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128(some)));
    const __m512i lanes = _mm512_set_epi32(15 / each, 14 / each, 13 / each, 12 / each, 11 / each, 10 / each, 9 / each,
                                           8 / each, 7 / each, 6 / each, 5 / each, 4 / each, 3 / each, 2 / each,
                                           1 / each, 0);
    return (Vector)_mm512_permutexvar_ps(lanes, few);
#elif defined(__AVX2__) && defined(__F16C__)
    const __m256 few = _mm256_castps128_ps256(_mm_cvtph_ps(_mm_cvtsi64_si128(some)));
    const __m256i lanes = _mm256_set_epi32(7 / each, 6 / each, 5 / each, 4 / each, 3 / each, 2 / each, 1 / each, 0);
    return (Vector)_mm256_permutevar8x32_ps(few, lanes);
#else
    Vector vector;
    for (int i = 0; i < kLanes; ++i) vector[i] = widen(Half{uint16_t(some >> 16 * (i / each))});
    return vector;
#endif
  }
}

// Nibbles with a scale for each group, and 8 or a zero of the group's own; activations in int8, in the same groups.
template <int group, bool zeros>
struct Int4A8 {
  using Input = Arranged<group>;
  const uint8_t* packed;
  const Half* scale;
  const Half* zero;
  int64_t size;
  int64_t row_bytes() const { return size / 2; }  // without its scales
  void ask(int64_t n) const {
    const int64_t groups = size / group;
    ask_bytes(packed + n * size / 2, size / 2);
    ask_bytes(scale + n * groups, sizeof(Half) * groups);
    if constexpr (zeros) ask_bytes(zero + n * groups, sizeof(Half) * groups);
  }

  template <int rows, int count, class Which>
  inline void dots(const Arranged<group>& y, int64_t m, const Which& n, float* out) const {
    const int64_t bytes = size / 2, groups = size / group;
    const auto ahead = n.template ahead<count>(packed, bytes);
    n.template ask_all<count>(scale, sizeof(Half) * groups);
    if constexpr (zeros) n.template ask_all<count>(zero, sizeof(Half) * groups);
    Vector sums[count][rows] = {};
    const auto step = [&](int64_t byte, auto whole) {
      const int64_t left = whole ? kBytes : bytes - byte;
      const int64_t g = byte / (group / 2), at = byte * 2;
      Bytes first[rows], second[rows];
      Ints total[rows];
      Vector own[rows];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) {
        first[c] = load_bytes<Bytes>(y.row(m + c) + at);
        second[c] = load_bytes<Bytes>(y.row(m + c) + at + kBytes);
        total[c] = y.lanes.row_sums(m + c, byte / kBytes);
        own[c] = y.lanes.row_scale(m + c, byte / kBytes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        Unsigned low, high;
        halves(load_bytes<Unsigned>(packed + n[r] * bytes + byte, left), &low, &high);
        ahead.template ask<kBytes>(byte, r);
        const Vector by = by_group<group, whole>(scale + n[r] * groups, g, groups);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) {
          const Ints start = zeros ? Ints{} : total[c] * -8;
          const Ints exact = dot_nibbles(start, low, first[c], high, second[c]);
          Vector value = __builtin_convertvector(exact, Vector);
          if constexpr (zeros) {
            const Vector origin = by_group<group, whole>(zero + n[r] * groups, g, groups);
            value -= origin * __builtin_convertvector(total[c], Vector);
          }
          sums[r][c] += value * (by * own[c]);
        }
      }
    };
    int64_t byte = 0;
    for (; byte + kBytes <= bytes; byte += kBytes) step(byte, std::true_type{});
    if (byte < bytes) step(byte, std::false_type{});
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) out[r * kRows + c] = sum(sums[r][c]);
  }
};

// The nibbles of kLanes bytes, minus a group's zero.
class Levels {
 public:
  explicit Levels(float zero) {
#if defined(__AVX512F__)
    const __m512 whole = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    table_ = (Vector)whole - zero;
#else
    zero_ = zero - Vector{};
#endif
  }

  void unpack(const uint8_t* bytes, Vector* low, Vector* high) const {
#if defined(__AVX512F__)
    const __m512i each = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    *low = (Vector)_mm512_permutexvar_ps(each, (__m512)table_);  // looks at four bits
    *high = (Vector)_mm512_permutexvar_ps(_mm512_srli_epi32(each, 4), (__m512)table_);
#else
#if defined(__AVX2__)
    const Ints each = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
    typedef uint8_t Narrow __attribute__((vector_size(kLanes)));
    Narrow narrow;
    std::memcpy(&narrow, bytes, sizeof narrow);
    const Ints each = __builtin_convertvector(narrow, Ints);
#endif
    *low = __builtin_convertvector(each & 15, Vector) - zero_;
    *high = __builtin_convertvector(each >> 4, Vector) - zero_;
#endif
  }

 private:
#if defined(__AVX512F__)
  Vector table_;
#else
  Vector zero_;
#endif
};

// Nibbles, with activations as they are.
template <int group, bool zeros>
struct Int4 {
  using Input = Floats;
  static constexpr int half = group / 2;
  static_assert(half % kLanes == 0);
  const uint8_t* packed;
  const Half* scale;
  const Half* zero;
  int64_t size;
  int64_t row_bytes() const { return size / 2; }  // without its scales
  void ask(int64_t n) const {
    const int64_t groups = size / group;
    ask_bytes(packed + n * size / 2, size / 2);
    ask_bytes(scale + n * groups, sizeof(Half) * groups);
    if constexpr (zeros) ask_bytes(zero + n * groups, sizeof(Half) * groups);
  }

  template <int rows, int count, class Which>
  inline void dots(const Floats& y, int64_t m, const Which& n, float* out) const {
    const int64_t groups = size / group;
    const auto ahead = n.template ahead<count>(packed, groups * half);
    n.template ask_all<count>(scale, sizeof(Half) * groups);
    if constexpr (zeros) n.template ask_all<count>(zero, sizeof(Half) * groups);
    const float* x = y.row(m);
    Vector sums[count][rows] = {};
    for (int64_t g = 0; g < groups; ++g, x += group) {
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const int64_t at = n[r] * groups + g;
        const Levels levels(zeros ? widen(zero[at]) : 8);
        Vector some[rows] = {};  // of this group, without its scale
#pragma GCC unroll 8
        for (int j = 0; j < half; j += kLanes) {
          Vector low, high;
          levels.unpack(packed + at * half + j, &low, &high);
          ahead.template ask<kLanes>(g * half + j, r);
#pragma GCC unroll 8
          for (int c = 0; c < rows; ++c) {
            some[c] += low * load(x + c * size + j);
            some[c] += high * load(x + c * size + j + half);
          }
        }
        const float by = widen(scale[at]);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) sums[r][c] += some[c] * by;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c) out[r * kRows + c] = sum(sums[r][c]);
  }
};

// ---- any number of rows ---------------------------------------------------------------------------

template <int count, class Weight, class Which>
inline void dots_of(const Weight& w, const Which& n, const typename Weight::Input& y, int64_t m, int rows,
                    float* out) {
  switch (rows) {
    case 1: return w.template dots<1, count>(y, m, n, out);
    case 2: return w.template dots<2, count>(y, m, n, out);
    default:
      if constexpr (kRows == 4)
        return rows == 3 ? w.template dots<3, count>(y, m, n, out) : w.template dots<4, count>(y, m, n, out);
  }
}

template <class Weight, class Which>
inline void products(const Weight& w, const Which& n, int count, const typename Weight::Input& y, int64_t m, int rows,
                     float* out) {
  if (count == kBlock) return dots_of<kBlock>(w, n, y, m, rows, out);
  for (int r = 0; r < count; ++r) dots_of<1>(w, n.after(r), y, m, rows, out + r * kRows);
}

}  // namespace
