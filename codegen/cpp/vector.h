// A vector of floats as wide as the CPU has, by the compiler's own vector types: AVX-512, AVX2 and NEON alike.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- floats of two bytes --------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
inline float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t rest = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  // The exponents' biases differ by 112; a product scales subnormal numbers, too.
  const float scaled = bits_of<float>(rest) * 0x1p112f;
  const bool special = (x.bits & 0x7c00) == 0x7c00;
  return bits_of<float>((special ? rest | 0x7f800000 : bits_of<uint32_t>(scaled)) | sign);
#endif
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {  // to nearest, ties to even
  const uint32_t bits = bits_of<uint32_t>(x);
  to->bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Vector load(const float* address) {
  Vector vector;
  std::memcpy(&vector, address, sizeof vector);
  return vector;
}

inline Vector load(const BFloat16* address) {
  typedef uint16_t Narrow __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Wide __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  Narrow narrow;
  std::memcpy(&narrow, address, sizeof narrow);
  return (Vector)(__builtin_convertvector(narrow, Wide) << 16);
}

// ---- sums and functions ---------------------------------------------------------------------------

inline float sum(Vector vector) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)vector);
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)vector), _mm256_extractf128_ps((__m256)vector, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) vector[i] += vector[i + half];
  return vector[0];
#endif
}

inline float relu(float x) { return x < 0 ? 0 : x; }  // NaN stays NaN
inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
inline float silu(float x) { return x / (1 + std::exp(-x)); }
inline float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678118654752f)); }
inline float gelu_tanh(float x) {
  return 0.5f * x * (1 + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// ---- memory ---------------------------------------------------------------------------------------

// Zeros at first, at an address that no vector's load crosses a cache line from.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : lines_((count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line)) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
};

}  // namespace
