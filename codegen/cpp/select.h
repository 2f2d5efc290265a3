// Selections over all neurons of a row. NaN is the largest of all, as PyTorch sorts it.

namespace {

// Integers in the order of floats; both zeros are one.
inline uint32_t key_of(float x) {
  if (x != x) return ~uint32_t{0};
  const uint32_t bits = bits_of<uint32_t>(x + 0.0f);  // -0 + 0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The k largest stay, of equal ones the first; the others become 0.
inline void select_top(float* a, int64_t count, int64_t k) {
  if (k >= count) return;
  std::vector<uint32_t> keys(count), some;
  const uint32_t zero = key_of(0);
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(a[i]);
  some.reserve(count);
  for (const uint32_t key : keys)
    if (key > zero) some.push_back(key);
  if (int64_t(some.size()) < k) some = keys;  // zeros and negative ones stay, too
  std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), std::greater<uint32_t>());
  const uint32_t least = some[k - 1];
  int64_t equal = k;
  for (const uint32_t key : keys) equal -= key > least;
  for (int64_t i = 0; i < count; ++i)
    if (keys[i] < least || (keys[i] == least && equal-- <= 0)) a[i] = 0;
}

// relu(a - mean - c std), with the population's std, in two passes in fp64.
inline void select_gaussian(float* a, int64_t count, double c) {
  typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));
  const auto total = [&](auto term) {
    Wide sums = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) sums += term(__builtin_convertvector(load(a + i), Wide));
    double all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all += sums[lane];
    for (; i < count; ++i) all += term(Wide{} + double(a[i]))[0];
    return all;
  };
  const double mean = total([](Wide x) { return x; }) / double(count);
  const double variance = total([&](Wide x) { return (x - mean) * (x - mean); }) / double(count);
  const float least = float(mean + std::sqrt(variance) * c);
  for (int64_t i = 0; i < count; ++i) a[i] = relu(a[i] - least);
}

}  // namespace
