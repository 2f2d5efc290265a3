// The functions of expressions over a vector of floats. Each propagates NaN.

namespace sparsecc {  // whose names hide C's own
namespace {

typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

using ::gelu, ::gelu_tanh, ::relu, ::sigmoid, ::silu;

inline Vector splat(float x) { return x - Vector{}; }
inline Vector splat(Vector x) { return x; }

// By element, for what the compiler makes one instruction of, or what is rare.
template <class Function>
inline Vector map(Vector x, Function function) {
  float each[kLanes];
  std::memcpy(each, &x, sizeof each);
  for (int i = 0; i < kLanes; ++i) each[i] = function(each[i]);
  std::memcpy(&x, each, sizeof each);
  return x;
}

inline float maximum(float a, float b) { return (a > b) | (a != a) ? a : b; }
inline float minimum(float a, float b) { return (a < b) | (a != a) ? a : b; }
inline Vector vector_maximum(Vector a, Vector b) { return (a > b) | (a != a) ? a : b; }
inline Vector vector_minimum(Vector a, Vector b) { return (a < b) | (a != a) ? a : b; }
template <class A, class B>
inline Vector maximum(A a, B b) { return vector_maximum(splat(a), splat(b)); }
template <class A, class B>
inline Vector minimum(A a, B b) { return vector_minimum(splat(a), splat(b)); }
template <class X, class Low, class High>
inline auto clamp(X x, Low low, High high) { return minimum(maximum(x, low), high); }

inline float abs(float x) { return std::fabs(x); }
inline float keep(float x, float t) { return std::fabs(x) <= t ? 0 : x; }
inline float fatrelu(float x, float t) { return x < t ? 0 : x; }
inline float exp(float x) { return std::exp(x); }
inline float round(float x) { return std::nearbyint(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x != x ? x : 0.0f; }
inline float tanh(float x) { return std::tanh(x); }

inline Vector abs(Vector x) { return (Vector)((Bits)x & 0x7fffffffu); }
inline Vector vector_keep(Vector x, Vector t) { return abs(x) <= t ? splat(0) : x; }
inline Vector vector_fatrelu(Vector x, Vector t) { return x < t ? splat(0) : x; }
template <class X, class T>
inline Vector keep(X x, T t) { return vector_keep(splat(x), splat(t)); }
template <class X, class T>
inline Vector fatrelu(X x, T t) { return vector_fatrelu(splat(x), splat(t)); }
inline Vector round(Vector x) { return map(x, [](float y) { return std::nearbyint(y); }); }
inline Vector sqrt(Vector x) { return map(x, [](float y) { return std::sqrt(y); }); }
inline Vector rsqrt(Vector x) { return 1.0f / sqrt(x); }
inline Vector sign(Vector x) { return x > 0 ? splat(1) : x < 0 ? splat(-1) : x != x ? x : splat(0); }
inline Vector relu(Vector x) { return x < 0 ? splat(0) : x; }

// 2^n e^r with x = n ln 2 + r, |r| <= ln 2 / 2: the remainder of the Taylor polynomial is below 6e-9.
inline Vector exp(Vector x) {
  x = minimum(maximum(x, -105.0f), 89.0f);  // beyond them lie 0 and infinity
  const Vector n = round(x * 1.44269504088896341f);
  const Vector r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;  // ln 2 in two parts
  Vector p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Integers whole = __builtin_convertvector(n, Integers), half = whole >> 1;
  const Vector first = (Vector)((half + 127) << 23), second = (Vector)((whole - half + 127) << 23);
  return p * first * second;  // in two steps: 2^n alone may be no normal number
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp(-x)); }
inline Vector silu(Vector x) { return x / (1.0f + exp(-x)); }

// Near zero Lambert's continued fraction, where 1 - e^-2x would cancel.
inline Vector tanh(Vector x) {
  const Vector y = x * x, size = abs(x), e = exp(-2.0f * size);
  const Vector far = (1.0f - e) / (1.0f + e);
  const Vector near = x * (10395.0f + y * (1260.0f + 21.0f * y)) / (10395.0f + y * (4725.0f + y * (210.0f + y)));
  return size > 0.75f ? (x < 0 ? -far : far) : near;
}

inline Vector gelu_tanh(Vector x) {
  return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// x (1 + erf z) / 2 with z = x / sqrt 2: interpolations at Chebyshev nodes, of erf z / z in z^2 below 1 (to 2e-9),
// and beyond it of e^(z^2) erfc z in 1 / (1 + z / 2) (to 2e-8 up to z = 10, where e^-(z^2) is zero).
inline Vector gelu(Vector x) {
  const Vector z = abs(x) * 0.70710678118654752f, y = z * z, t = 1.0f / (1.0f + 0.5f * z);
  Vector p = y * 7.875874871388078e-05f - 0.000801686430349946f;
  p = p * y + 0.005189087241888046f;
  p = p * y - 0.02685421146452427f;
  p = p * y + 0.11283594369888306f;
  p = p * y - 0.3761262595653534f;
  p = p * y + 1.1283791065216064f;
  Vector q = t * 0.07406618446111679f - 0.16263774037361145f;
  q = q * t - 0.00626017339527607f;
  q = q * t + 0.12965188920497894f;
  q = q * t + 0.14660777151584625f;
  q = q * t + 0.2562982738018036f;
  q = q * t + 0.2804047167301178f;
  q = q * t + 0.28225627541542053f;
  q = q * t - 6.433822818507906e-06f;
  const Vector near = z * p, far = q * exp(-y);  // erf z, erfc z
  const Vector above = z < 1 ? 1.0f + near : 2.0f - far, below = z < 1 ? 1.0f - near : far;
  return 0.5f * x * (x < 0 ? below : above);
}

}  // namespace
}  // namespace sparsecc
