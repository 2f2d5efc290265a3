// Elements as they lie in memory, read into and written from a vector of floats, whole or in part.

namespace sparsecc {
namespace {

typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

struct Float32 { float value; };
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Int8 { int8_t value; };
struct Float8E4M3 { uint8_t bits; };

// How many of a vector's lanes are meant: all, or the last few of a row.
struct All {};
struct First { int count; };

inline size_t bytes(All, size_t each) { return kLanes * each; }
inline size_t bytes(First lanes, size_t each) { return lanes.count * each; }

template <class V, class Lanes>
inline V read(const void* address, Lanes lanes, size_t each) {
  V vector = {};
  std::memcpy(&vector, address, bytes(lanes, each));
  return vector;
}

inline Vector only(Vector x, All, float) { return x; }
inline Vector only(Vector x, First lanes, float otherwise) {
  Integers lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < lanes.count ? x : splat(otherwise);
}

inline Bits choose(Integers which, Bits a, Bits b) { return ((Bits)which & a) | (~(Bits)which & b); }
inline Bits even(Bits x, int drop) { return x + ((1u << (drop - 1)) - 1) + ((x >> drop) & 1u); }

template <class Lanes>
inline Vector load(const float* address, Lanes lanes) { return read<Vector>(address, lanes, 4); }
template <class Lanes>
inline Vector load(const Float32* address, Lanes lanes) { return read<Vector>(address, lanes, 4); }

template <class Lanes>
inline Vector load(const BFloat16* address, Lanes lanes) {
  return (Vector)(__builtin_convertvector(read<Halves>(address, lanes, 2), Bits) << 16);
}

template <class Lanes>
inline Vector load(const Float16* address, Lanes lanes) {
  const Bits half = __builtin_convertvector(read<Halves>(address, lanes, 2), Bits);
  const Bits size = (half & 0x7fffu) << 13;
  const Bits finite = (Bits)((Vector)size * 0x1p112f);  // the exponents' biases differ by 112
  return (Vector)(choose((Integers)(size >= 0x0f800000u), size | 0x7f800000u, finite) | ((half & 0x8000u) << 16));
}

template <class Lanes>
inline void store(float* address, Vector x, Lanes lanes) { std::memcpy(address, &x, bytes(lanes, 4)); }
template <class Lanes>
inline void store(Float32* address, Vector x, Lanes lanes) { std::memcpy(address, &x, bytes(lanes, 4)); }

template <class Lanes>
inline void store(BFloat16* address, Vector x, Lanes lanes) {
  const Bits rounded = even((Bits)x, 16) >> 16;
  const Halves half = __builtin_convertvector(choose((Integers)(x != x), Bits{} + 0x7fc0u, rounded), Halves);
  std::memcpy(address, &half, bytes(lanes, 2));
}

// A float of `mantissa` bits and exponents from `least` on, without its sign; at `beyond` (the bits of a float)
// and above it is `large`. Numbers below 2^least are multiples of the smallest one: adding a power of two
// rounds them to such.
template <int mantissa, int least>
inline Bits narrow(Bits size, uint32_t beyond, uint32_t large) {
  constexpr int drop = 23 - mantissa;
  constexpr uint32_t magic = (127 + least + drop) << 23;
  const Bits small = (Bits)((Vector)size + (Vector)(Bits{} + magic)) - magic;
  const Bits normal = (even(size, drop) - (static_cast<uint32_t>(126 + least) << 23)) >> drop;
  const Bits finite = choose((Integers)(size < static_cast<uint32_t>(127 + least) << 23), small, normal);
  return choose((Integers)(size >= beyond), Bits{} + large, finite);
}

template <class Lanes>
inline void store(Float16* address, Vector x, Lanes lanes) {
  const Bits size = (Bits)x & 0x7fffffffu, sign = ((Bits)x >> 16) & 0x8000u;
  const Bits number = narrow<10, -14>(size, 0x477ff000u, 0x7c00u);  // 65520 and above round to infinity
  const Halves half = __builtin_convertvector(sign | choose((Integers)(x != x), Bits{} + 0x7e00u, number), Halves);
  std::memcpy(address, &half, bytes(lanes, 2));
}

template <class Lanes>
inline void store(Float8E4M3* address, Vector x, Lanes lanes) {
  const Bits size = (Bits)x & 0x7fffffffu, sign = ((Bits)x >> 24) & 0x80u;
  const Bits number = narrow<3, -6>(size, 0x43e00000u, 0x7eu);  // from 448 on: it has no infinity
  const Bytes byte = __builtin_convertvector(sign | choose((Integers)(x != x), Bits{} + 0x7fu, number), Bytes);
  std::memcpy(address, &byte, bytes(lanes, 1));
}

template <class Lanes>
inline void store(Int8* address, Vector x, Lanes lanes) {
  const Bytes byte = __builtin_convertvector((Bits)__builtin_convertvector(x, Integers), Bytes);
  std::memcpy(address, &byte, bytes(lanes, 1));
}

template <class Element>
inline void store_one(Element* address, float x) { store(address, splat(x), First{1}); }

}  // namespace
}  // namespace sparsecc

namespace {

// body(r, lanes) for each vector of `count` features, whole or in part.
template <class Body>
inline void over_lanes(int count, Body body) {
  int r = 0;
  for (; r + kLanes <= count; r += kLanes) body(r, sparsecc::All{});
  if (r < count) body(r, sparsecc::First{count - r});
}

}  // namespace
