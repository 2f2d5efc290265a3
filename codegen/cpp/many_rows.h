// Products for many rows: kTile features of a weight are laid out as vectors of features, once for all rows,
// and stay in the cache while these pass by: out[c * kTile + r] = sum over k of y[m + c, k] W[n + r, k].

namespace {

constexpr int64_t kManyRows = 16;                   // from here on it pays
constexpr int kTall = kRegisters >= 32 ? 6 : 4;     // rows at a time, at most: sums must fit the registers
constexpr int kVectors = kRegisters >= 32 ? 4 : 2;  // of features, beside each other
constexpr int kTile = kVectors * kLanes;
constexpr int kBands = 8;  // of up to kTall rows, for which a task computes its tile

// Where it pays if all weights are int8: few rows are multiplied as fast, but for adding up across vectors at
// the end of each row; and laying out long rows takes the longest.
inline int64_t many_rows_of_int8(int64_t size) { return size < 4096 ? 32 : 64; }

// The rows in bands of nearly the same height: kTall or one or two less where there are kManyRows.
struct Bands {
  int64_t rows, count;
  explicit Bands(int64_t rows) : rows(rows), count((rows + kTall - 1) / kTall) {}
  int64_t begin(int64_t band) const { return band * rows / count; }
  int64_t tasks() const { return (count + kBands - 1) / kBands; }
};

// ---- vectors of four bytes a lane -------------------------------------------------------------------

template <class T>
inline T load_lanes(const void* address) {
  T lanes;
  std::memcpy(&lanes, address, sizeof lanes);
  return lanes;
}

template <class T>
inline void store_lanes(void* address, T lanes) { std::memcpy(address, &lanes, sizeof lanes); }

inline Vector each_lane(const float* value) { return *value - Vector{}; }
inline Bytes each_lane(const int8_t* four) {
  int32_t lane;
  std::memcpy(&lane, four, sizeof lane);
  return (Bytes)(Ints{} + lane);
}

// a0 b0 a1 b1 ...
inline void zip(Ints a, Ints b, Ints* low, Ints* high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  *low = (Ints)_mm512_permutex2var_epi32((__m512i)a, first, (__m512i)b);
  *high = (Ints)_mm512_permutex2var_epi32((__m512i)a, second, (__m512i)b);
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  const __m256i odd = _mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  *low = (Ints)_mm256_permute2x128_si256(even, odd, 0x20);
  *high = (Ints)_mm256_permute2x128_si256(even, odd, 0x31);
#else
  for (int i = 0; i < kLanes; ++i) {
    (*low)[i] = i % 2 ? b[i / 2] : a[i / 2];
    (*high)[i] = i % 2 ? b[(kLanes + i) / 2] : a[(kLanes + i) / 2];
  }
#endif
}

inline void transpose(Ints (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Ints next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) zip(rows[i], rows[i + kLanes / 2], &next[2 * i], &next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// ---- weights as lanes: a float, or four bytes, of one feature ----------------------------------------

constexpr int64_t kPiece = 128;  // lanes at a time: whole groups of every format; the next piece is asked for

template <class T>
inline void lanes_of(const Dense<T>& w, int64_t n, int64_t from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(w.values[n * w.size + from + i]);
}

inline void lanes_of(const Int8& w, int64_t n, int64_t from, int64_t count, int8_t* to) {
  const int8_t* row = w.values + n * w.size;
  for (int64_t k = 4 * from; k < 4 * (from + count); k += kBytes, to += kBytes) {
    __builtin_prefetch(row + k + 4 * kPiece);
    store_lanes(to, prepared(load_bytes<Bytes>(row + k, w.size - k)));
  }
}

template <int group, bool zeros>
inline void lanes_of(const Int4A8<group, zeros>& w, int64_t n, int64_t from, int64_t count, uint8_t* to) {
  constexpr int half = group / 2, wide = half < kBytes ? half : kBytes;
  typedef uint8_t Packed __attribute__((vector_size(wide)));
  const uint8_t* packed = w.packed + n * (w.size / 2) + 2 * from;
  for (int64_t g = 0; g < 4 * count / group; ++g, packed += half, to += group)
    for (int j = 0; j < half; j += wide) {
      __builtin_prefetch(packed + 2 * kPiece + j);
      Packed both;
      std::memcpy(&both, packed + j, sizeof both);
      const Packed low = both & uint8_t(15), high = (both >> 4) & uint8_t(15);
      std::memcpy(to + j, &low, sizeof low);
      std::memcpy(to + half + j, &high, sizeof high);
    }
}

template <int group, bool zeros>
inline void lanes_of(const Int4<group, zeros>& w, int64_t n, int64_t from, int64_t count, float* to) {
  constexpr int half = group / 2;
  int64_t g = n * (w.size / group) + from / group;
  for (int64_t k = 0; k < count; k += group, ++g) {
    const Levels levels(zeros ? widen(w.zero[g]) : 8);
    const float by = widen(w.scale[g]);
    for (int j = 0; j < half; j += kLanes) {
      Vector low, high;
      __builtin_prefetch(w.packed + g * half + j + kPiece / 2);
      levels.unpack(w.packed + g * half + j, &low, &high);
      store_lanes<Vector>(to + k + j, low * by);
      store_lanes<Vector>(to + k + half + j, high * by);
    }
  }
}

// ---- how each format is multiplied -------------------------------------------------------------------

template <class Weight>
struct Many {  // Dense, Int4: as floats
  using Rows = Floats;
  using Lane = float;
  using Sum = Vector;
  static constexpr int64_t chunk = 128;  // lanes that are added up by themselves: errors grow with their number
  static constexpr int per = 1, group = 0, beside = kVectors;
  static constexpr bool zeros = false;
  static Vector add(Vector sum, Vector w, Vector y) { return sum + w * y; }
};

template <>
struct Many<Int8> {
  using Rows = Quantized;
  using Lane = int8_t;
  using Sum = Ints;
  static constexpr int64_t chunk = 1024;  // what is in the second cache while the rows pass by
  static constexpr int per = 4, group = 0, beside = kVectors;
  static constexpr bool zeros = false;
  static Ints add(Ints sum, Bytes w, Bytes y) { return dot_prepared(sum, w, y); }
};

// Activations in groups.
template <int group>
struct Grouped {
  const Quantized& from;

  const int8_t* row(int64_t m) const { return from.row(m); }
  const float* scale(int64_t m, int64_t g) const { return from.scale.data() + m * from.groups + g; }
  const int32_t* sums(int64_t m, int64_t g) const { return from.sums.data() + m * from.groups + g; }
};

template <int size>
struct Many<Int8Groups<size>> {
  using Rows = Grouped<size>;
  using Lane = int8_t;
  static constexpr int64_t chunk = 1024;
  static constexpr int per = 4, group = 0, beside = kVectors / 2;  // two sums of each are in registers
  static constexpr bool zeros = false;
  static constexpr int32_t offset = kOffset;
  static Ints add(Ints sum, Bytes w, Bytes y) { return dot_prepared(sum, w, y); }
};

template <int size, bool with_zeros>
struct Many<Int4A8<size, with_zeros>> {
  using Rows = Grouped<size>;
  using Lane = uint8_t;
  static constexpr int64_t chunk = 1024;
  static constexpr int per = 4, group = size, beside = kVectors / 2;
  static constexpr bool zeros = with_zeros;
  static constexpr int32_t offset = with_zeros ? 0 : 8;
  static Ints add(Ints sum, Bytes w, Bytes y) { return dot(sum, (Unsigned)w, y); }
};

// kTile features of a weight: for each `beside` vectors of them step after step, of one lane for each feature.
template <class Weight>
class Panel {
 public:
  using How = Many<Weight>;
  using Lane = typename How::Lane;

  explicit Panel(const Weight& w)
      : w_(w), steps_((w.size + How::per - 1) / How::per), padded_((steps_ + kPiece - 1) / kPiece * kPiece),
        lanes_(padded_ * kTile * How::per), scale_(scales() * kTile),
        zero_(How::zeros ? scales() * kTile : 0) {}

  int64_t steps() const { return steps_; }
  const Lane* lanes(int v, int64_t step) const {  // of vectors from v on
    return lanes_.data() + (v * padded_ + step * How::beside) * kLanes * How::per;
  }
  const float* scale(int64_t g) const { return scale_.data() + g * kTile; }
  const float* zero(int64_t g) const { return zero_.data() + g * kTile; }

  // Features n .. n + count; what is behind them is anything.
  void pack(int64_t n, int count) {
    for (int v = 0; v * kLanes < count; ++v)
      for (int64_t step = 0; step < steps_; step += kPiece)
        pack_piece(v, n + v * kLanes, count - v * kLanes, step);
    if constexpr (How::per > 1)
      for (int r = 0; r < count; ++r)
        for (int64_t g = 0; g < scales(); ++g) {
          scale_.data()[g * kTile + r] = widen(w_.scale[(n + r) * scales() + g]);
          if constexpr (How::zeros) zero_.data()[g * kTile + r] = widen(w_.zero[(n + r) * scales() + g]);
        }
  }

 private:
  int64_t scales() const { return How::per == 1 ? 0 : How::group ? w_.size / How::group : 1; }

  void pack_piece(int v, int64_t n, int count, int64_t step) {
    alignas(64) Lane piece[kLanes][kPiece * How::per];
    const int64_t some = std::min(kPiece, steps_ - step);
    for (int r = 0; r < kLanes; ++r) lanes_of(w_, n + std::min(r, count - 1), step, some, piece[r]);
    const int first = v / How::beside * How::beside;
    Lane* to = lanes_.data() + (first * padded_ + step * How::beside + v - first) * kLanes * How::per;
    for (int64_t i = 0; i < some; i += kLanes) {
      Ints rows[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) rows[r] = load_lanes<Ints>(&piece[r][i * How::per]);
      transpose(rows);
#pragma GCC unroll 16
      for (int s = 0; s < kLanes; ++s) store_lanes(to + (i + s) * How::beside * kLanes * How::per, rows[s]);
    }
  }

  Weight w_;
  int64_t steps_, padded_;
  Buffer<Lane> lanes_;
  Buffer<float> scale_, zero_;
};

// ---- rows m .. m + rows with a panel's steps from .. to ----------------------------------------------

template <int rows, class Weight>
inline void multiply(const Panel<Weight>& panel, const typename Many<Weight>::Rows& y, int64_t m, int64_t from,
                     int64_t to, float* out) {
  using How = Many<Weight>;
  using Sum = typename How::Sum;
  using Factor = decltype(each_lane(y.row(m)));
  const auto* x = y.row(m) + from * How::per;
  const auto* w = panel.lanes(0, from);
  Sum sums[rows][kVectors] = {};
  for (int64_t step = from; step < to; ++step, x += How::per, w += kTile * How::per) {
    Factor column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = load_lanes<Factor>(w + v * kLanes * How::per);
#pragma GCC unroll 8
    for (int c = 0; c < rows; ++c) {
      const Factor lane = each_lane(x + c * y.stride);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[c][v] = How::add(sums[c][v], column[v], lane);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < rows; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* place = out + c * kTile + v * kLanes;
      store_lanes(place, from ? load_lanes<Sum>(place) + sums[c][v] : sums[c][v]);
    }
}

template <int rows, class Weight, int group>
inline void multiply(const Panel<Weight>& panel, const Grouped<group>& y, int64_t m, int64_t from, int64_t to,
                     float* out) {
  using How = Many<Weight>;
  constexpr int beside = How::beside;
  const int64_t stride = y.from.stride, groups = y.from.groups;
  for (int first = 0; first < kVectors; first += beside) {
    const int8_t* x = y.row(m) + from * 4;
    const auto* w = panel.lanes(first, from);
    Vector sums[rows][beside] = {};
    for (int64_t g = from * 4 / group; g < to * 4 / group; ++g) {
      const int32_t* total = y.sums(m, g);
      const float* scale = y.scale(m, g);
      Ints exact[rows][beside];
#pragma GCC unroll 8
      for (int c = 0; c < rows; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < beside; ++v) exact[c][v] = Ints{} - How::offset * total[c * groups];
      for (int step = 0; step < group / 4; ++step, x += 4, w += beside * kBytes) {
        Bytes column[beside];
#pragma GCC unroll 8
        for (int v = 0; v < beside; ++v) column[v] = load_lanes<Bytes>(w + v * kBytes);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) {
          const Bytes lane = each_lane(x + c * stride);
#pragma GCC unroll 8
          for (int v = 0; v < beside; ++v) exact[c][v] = How::add(exact[c][v], column[v], lane);
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < beside; ++v) {
        Vector by = Vector{} + 1, zero = {};  // of the weights' own groups
        if constexpr (How::group != 0) by = load(panel.scale(g) + (first + v) * kLanes);
        if constexpr (How::zeros) zero = load(panel.zero(g) + (first + v) * kLanes);
#pragma GCC unroll 8
        for (int c = 0; c < rows; ++c) {
          Vector value = __builtin_convertvector(exact[c][v], Vector);
          if constexpr (How::zeros) value -= zero * float(total[c * groups]);
          sums[c][v] += value * (by * scale[c * groups]);
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < rows; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < beside; ++v) {
        float* place = out + c * kTile + (first + v) * kLanes;
        store_lanes(place, from ? load(place) + sums[c][v] : sums[c][v]);
      }
  }
}

// What remains after the sums: scales of rows and features.
template <class Weight>
inline void finish(const Panel<Weight>&, const Floats&, int64_t, int64_t, float*) {}

inline void finish(const Panel<Int8>& panel, const Quantized& y, int64_t m, int64_t rows, float* out) {
  for (int64_t c = 0; c < rows; ++c)
    for (int r = 0; r < kTile; r += kLanes, out += kLanes) {
      const Vector total = __builtin_convertvector(load_lanes<Ints>(out) - kOffset * y.sums[m + c], Vector);
      store_lanes<Vector>(out, total * (y.scale[m + c] * load(panel.scale(0) + r)));
    }
}

template <class Weight, int group>
inline void finish(const Panel<Weight>& panel, const Grouped<group>&, int64_t, int64_t rows, float* out) {
  if constexpr (Many<Weight>::group == 0)
    for (int64_t c = 0; c < rows; ++c)
      for (int r = 0; r < kTile; r += kLanes, out += kLanes)
        store_lanes<Vector>(out, load(out) * load(panel.scale(0) + r));
}

template <class Weight>
inline void products(const Panel<Weight>& panel, const typename Many<Weight>::Rows& y, const Bands& bands,
                     int64_t first, int64_t last, float* out) {
  const int64_t begin = bands.begin(first);
  int64_t from = 0, to = 0;
  do {  // once where there is no step: sums are zero
    to = std::min(from + Many<Weight>::chunk, panel.steps());
    for (int64_t band = first; band < last; ++band) {
      const int64_t m = bands.begin(band), rows = bands.begin(band + 1) - m;
      float* place = out + (m - begin) * kTile;
      switch (rows) {
        case kTall: multiply<kTall>(panel, y, m, from, to, place); break;
        case kTall - 1: multiply<kTall - 1>(panel, y, m, from, to, place); break;
        default: multiply<kTall - 2>(panel, y, m, from, to, place);
      }
    }
    from = to;
  } while (from < panel.steps());
  finish(panel, y, begin, bands.begin(last) - begin, out);
}

}  // namespace
