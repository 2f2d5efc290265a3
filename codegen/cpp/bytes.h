// Vectors of bytes, and sums of products of them in int32: exact, by whatever the CPU has for it.

namespace {

constexpr int kBytes = 4 * kLanes;  // each int32 lane sums the products of its own four bytes

typedef int8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint8_t Unsigned __attribute__((vector_size(kBytes)));
typedef int16_t Shorts __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));

template <class T>
inline T load_bytes(const void* address, int64_t count = kBytes) {  // zeros behind `count` bytes
#if defined(__AVX512BW__)  // the compiler would keep `bytes` in memory
  const __mmask64 some = count >= kBytes ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  return (T)_mm512_maskz_loadu_epi8(some, address);
#else
  T bytes = {};
  if (count >= kBytes)
    std::memcpy(&bytes, address, kBytes);
  else
    std::memcpy(&bytes, address, count);
  return bytes;
#endif
}

inline int32_t sum(Ints ints) {  // what overflows on the way comes back
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)ints);
#elif defined(__AVX2__)
  const __m256i all = (__m256i)ints;
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
#else
  uint32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += uint32_t(ints[i]);
  return int32_t(total);
#endif
}

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512F__))
#define SPARSECC_VNNI
#endif

// Pairs of int16 as sums in int32.
inline Ints lanes(Shorts pairs) { return ((Ints)pairs >> 16) + ((Ints)pairs << 16 >> 16); }

// sums + u * s, four products a lane; u at most 128 in each element, for pairs must fit int16.
inline Ints dot(Ints sums, Unsigned u, Bytes s) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)u, (__m512i)s);
#elif defined(SPARSECC_VNNI)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)u, (__m256i)s);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)u, (__m512i)s);
  return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const Shorts v = (Shorts)u, t = (Shorts)s;
  return sums + lanes((v & 255) * (t << 8 >> 8) + ((v >> 8) & 255) * (t >> 8));
#endif
}

// sums + u1 * s1 + u2 * s2 with u1, u2 at most 15.
inline Ints dot_nibbles(Ints sums, Unsigned u1, Bytes s1, Unsigned u2, Bytes s2) {
#if !defined(SPARSECC_VNNI) && defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)u1, (__m256i)s1),
                                         _mm256_maddubs_epi16((__m256i)u2, (__m256i)s2));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  return dot(dot(sums, u1, s1), u2, s2);
#endif
}

// sums + (w + kOffset) * a, with a of -127 .. 127.
#if defined(SPARSECC_VNNI)
constexpr int32_t kOffset = 128;  // its products take one unsigned side
#else
constexpr int32_t kOffset = 0;
#endif

// What `dot_prepared` wants of w.
inline Bytes prepared(Bytes w) {
#if defined(SPARSECC_VNNI)
  return (Bytes)((Unsigned)w ^ uint8_t(0x80));
#else
  return w;
#endif
}

inline Ints dot_prepared(Ints sums, Bytes w, Bytes a) {
#if defined(SPARSECC_VNNI)
  return dot(sums, (Unsigned)w, a);
#elif defined(__AVX512BW__)
  const __m512i v = (__m512i)a;
  const __m512i turned = _mm512_mask_sub_epi8(v, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), v);
  return dot(sums, (Unsigned)_mm512_abs_epi8((__m512i)w), (Bytes)turned);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const Bytes turned = (Bytes)_mm256_sign_epi8((__m256i)a, (__m256i)w);
  return dot(sums, (Unsigned)_mm256_abs_epi8((__m256i)w), turned);  // |-128| is 128 unsigned
#else
  const Shorts v = (Shorts)w, t = (Shorts)a;
  return sums + lanes((v << 8 >> 8) * (t << 8 >> 8) + (v >> 8) * (t >> 8));
#endif
}

inline Ints dot_signed(Ints sums, Bytes w, Bytes a) { return dot_prepared(sums, prepared(w), a); }

// ---- activations in int8 --------------------------------------------------------------------------

// y[m, k] = scale[m, g] q[m, k], q of -127 .. 127, with one scale for each `width` features of a row; zeros behind
// each row, up to whole vectors. Each row is set once.
struct Quantized {
  int64_t rows, size, width, groups, stride;
  Buffer<int8_t> values;
  std::vector<float> scale;
  std::vector<int32_t> sums;  // of each group

  Quantized(int64_t rows, int64_t size, int64_t width = 0)  // 0: all of the row
      : rows(rows), size(size), width(width ? width : size), groups(width ? size / width : 1),
        stride((size + kBytes - 1) / kBytes * kBytes), values(rows * stride), scale(rows * groups),
        sums(rows * groups) {}

  const int8_t* row(int64_t m) const { return values.data() + m * stride; }

  // Row m, by scales of its own.
  void set(int64_t m, const float* y) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * width, end = begin + width;
      const int32_t most = greatest(y, begin, end);
      const bool finite = most < 0x7f800000;
      const float by = bits_of<float>(most) / 127;
      scale[m * groups + g] = finite ? by : std::numeric_limits<float>::quiet_NaN();
      if (finite && by != 0) round(m, g, begin, end, [&](int64_t k) { return load_some(y, k) / by; });
    }
  }

  // Row m that was divided by its scale before: 1 is left, or NaN where it has one.
  void set_divided(int64_t m, const float* y) {
    Ints bad = {};
    round(m, 0, 0, size, [&](int64_t k) {
      const Vector level = load_some(y, k);
      bad |= level != level;
      return level;
    });
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= bad[i] != 0;
    scale[m] = any ? std::numeric_limits<float>::quiet_NaN() : 1;
  }

 private:
  template <class Levels>
  void round(int64_t m, int64_t g, int64_t begin, int64_t end, Levels levels) {
    typedef int8_t Narrow __attribute__((vector_size(kLanes)));
    int8_t* q = values.data() + m * stride;
    Ints total = {};
    for (int64_t k = begin; k < end; k += kLanes) {
      constexpr float shift = 0x1.8p23f;  // a sum this large has no fraction: rounded to even
      const Vector rounded = (levels(k) + shift) - shift;
      const Vector low = rounded < -127 ? -127 - Vector{} : rounded;
      const Ints whole = __builtin_convertvector(low > 127 ? 127 - Vector{} : low, Ints);
      const Narrow narrow = __builtin_convertvector(whole, Narrow);
      std::memcpy(q + k, &narrow, sizeof narrow);  // within the row: its stride is in whole vectors of bytes
      total += whole;
    }
    sums[m * groups + g] = sum(total);
  }

  // The bits of max |y|: as integers, those of NaN are above infinity's, and these above the rest.
  int32_t greatest(const float* y, int64_t begin, int64_t end) const {
    Ints most = {};
    for (int64_t k = begin; k < end; k += kLanes) {
      const Ints bits = (Ints)load_some(y, k) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t all = 0;
    for (int i = 0; i < kLanes; ++i) all = std::max(all, most[i]);
    return all;
  }

  Vector load_some(const float* y, int64_t k) const {
    if (k + kLanes <= size) return load(y + k);
    Vector some = {};
    std::memcpy(&some, y + k, (size - k) * sizeof(float));
    return some;
  }
};

// Of vectors of activations in groups: the sum and the scale of each lane's four bytes.
struct Lanes {
  int64_t vectors;
  Buffer<int32_t> sums;
  Buffer<float> scale;

  Lanes(int64_t rows, int64_t vectors)
      : vectors(vectors), sums(rows * vectors * kLanes), scale(rows * vectors * kLanes) {}

  Ints row_sums(int64_t m, int64_t v) const {
    return load_bytes<Ints>(sums.data() + (m * vectors + v) * kLanes);
  }
  Vector row_scale(int64_t m, int64_t v) const { return load(scale.data() + (m * vectors + v) * kLanes); }

  // `bytes` are lane by lane of the groups 0, 1, ..., `each` bytes of one beside each other.
  void set(const Quantized& from, int64_t m, int64_t v, Ints total, int64_t each) {
    const int64_t at = (m * vectors + v) * kLanes;
    std::memcpy(sums.data() + at, &total, sizeof total);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t g = (v * kBytes + 4 * i) / each;
      scale.data()[at + i] = g < from.groups ? from.scale[m * from.groups + g] : 0;
    }
  }
};

inline Ints sums_of_lanes(Ints sums, const int8_t* bytes) {
  return dot(sums, Unsigned{} + uint8_t(1), load_bytes<Bytes>(bytes));
}

// Activations in groups, in their own order.
template <int group>
struct InGroups {
  const Quantized& from;
  Lanes lanes;

  explicit InGroups(const Quantized& from) : from(from), lanes(from.rows, from.stride / kBytes) {
    for (int64_t m = 0; m < from.rows; ++m)
      for (int64_t v = 0; v < lanes.vectors; ++v)
        lanes.set(from, m, v, sums_of_lanes(Ints{}, from.row(m) + v * kBytes), group);
  }
};

// The same in the order of packed nibbles: for each vector of them, the activations of the low halves, then of the
// high ones.
template <int group>
struct Arranged {
  static constexpr int half = group / 2;
  static constexpr int run = half < kBytes ? half : kBytes;

  const Quantized& from;
  Lanes lanes;
  Buffer<int8_t> values;

  explicit Arranged(const Quantized& from)
      : from(from), lanes(from.rows, (from.size / 2 + kBytes - 1) / kBytes),
        values(from.rows * lanes.vectors * 2 * kBytes) {
    for (int64_t m = 0; m < from.rows; ++m) set(m);
  }

  const int8_t* row(int64_t m) const { return values.data() + m * lanes.vectors * 2 * kBytes; }

 private:
  void set(int64_t m) {
    const int8_t* q = from.row(m);
    int8_t* to = values.data() + m * lanes.vectors * 2 * kBytes;
    for (int64_t byte = 0; byte < from.size / 2; byte += run) {
      const int64_t k = byte / half * group + byte % half;
      int8_t* place = to + byte / kBytes * 2 * kBytes + byte % kBytes;
      std::memcpy(place, q + k, run);
      std::memcpy(place + kBytes, q + k + half, run);
    }
    for (int64_t v = 0; v < lanes.vectors; ++v) {
      const Ints low = sums_of_lanes(Ints{}, to + v * 2 * kBytes);
      lanes.set(from, m, v, sums_of_lanes(low, to + v * 2 * kBytes + kBytes), half);
    }
  }
};

}  // namespace
