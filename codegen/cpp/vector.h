// A vector of floats as wide as the CPU has, by the compiler's own vector types: AVX-512, AVX2 and NEON alike.

#include <cmath>
#include <cstdint>
#include <cstring>

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

inline Vector load(const float* address) {
  Vector vector;
  std::memcpy(&vector, address, sizeof vector);
  return vector;
}

inline float sum(Vector vector) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) vector[i] += vector[i + half];
  return vector[0];
}

inline float relu(float x) { return x < 0 ? 0 : x; }  // NaN stays NaN
inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
inline float silu(float x) { return x / (1 + std::exp(-x)); }
inline float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678118654752f)); }
inline float gelu_tanh(float x) {
  return 0.5f * x * (1 + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

}  // namespace
