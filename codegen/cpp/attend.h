// Parts of every kernel of sparsecc::cached_attention; kSize, kValueSize, kGroups and kRotary stand before.

namespace {

constexpr int64_t kChunk = 64;  // keys of one task: its keys and values stay in the first cache
constexpr int kBlock = 4;       // keys at a time

struct Job {
  const CachedAttention* call;
  int64_t rows;    // queries for one head of the cache
  int64_t chunks;  // of the part of the cache that any query may see
  int64_t limit;   // its end
  std::vector<float> queries;  // [batch, heads, rows, kSize], rotated and scaled
  std::vector<float> partial;  // [batch, heads, chunks, rows, 2 + kValueSize]: maximum, sum, weighted values
};

inline void rotated(const float* x, const float* cos, const float* sin, float scale, float* out) {
  if constexpr (!kRotary) {
    for (int64_t i = 0; i < kSize; ++i) out[i] = x[i] * scale;
  } else {
    constexpr int64_t half = kSize / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      out[i] = (a * cos[i] - b * sin[i]) * scale;
      out[i + half] = (b * cos[i + half] + a * sin[i + half]) * scale;
    }
  }
}

// One sequence: its new keys and values into the cache, its queries into job.queries.
inline void prepare(Job& job, int64_t b) {
  const CachedAttention& call = *job.call;
  for (int64_t t = 0; t < call.tokens; ++t) {
    const float *cos = nullptr, *sin = nullptr;
    if constexpr (kRotary) cos = call.cos.at(b, 0, t), sin = call.sin.at(b, 0, t);
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t position = call.positions[t];
      rotated(call.k.at(b, h, t), cos, sin, 1, call.keys.at(b, h, position));
      std::memcpy(call.values.at(b, h, position), call.v.at(b, h, t), kValueSize * sizeof(float));
      float* queries = job.queries.data() + ((b * call.heads + h) * job.rows + t * kGroups) * kSize;
      for (int64_t g = 0; g < kGroups; ++g)
        rotated(call.q.at(b, h * kGroups + g, t), cos, sin, call.scale, queries + g * kSize);
    }
  }
}

inline int64_t mask_at(const CachedAttention& call, int64_t b, int64_t h, int64_t t) {
  return b * call.mask_strides[0] + h * call.mask_strides[1] + t * call.mask_strides[2];
}

inline bool seen(const CachedAttention& call, int64_t offset, int64_t s) {
  offset += s * call.mask_strides[3];
  if (call.allowed) return call.allowed[offset];
  return !call.added || call.added[offset] != -INFINITY;
}

// The end of what any query may see.
inline int64_t limit_of(const CachedAttention& call) {
  if (!call.allowed && !call.added) return call.length;
  int64_t end = 0;
  for (int64_t b = 0; b < (call.mask_strides[0] ? call.batch : 1); ++b)
    for (int64_t h = 0; h < (call.mask_strides[1] ? call.query_heads : 1); ++h)
      for (int64_t t = 0; t < (call.mask_strides[2] ? call.tokens : 1); ++t) {
        int64_t s = call.length;
        while (s > end && !seen(call, mask_at(call, b, h, t), s - 1)) --s;
        end = s;
      }
  return end;
}

template <int count>
inline void scores_of(const float* query, const float* keys, int64_t stride, const int64_t* index, float* out) {
  Vector sums[count] = {};
  int64_t i = 0;
#pragma GCC unroll 8
  for (; i + kLanes <= kSize; i += kLanes) {
    const Vector part = load(query + i);
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) sums[r] += part * load(keys + index[r] * stride + i);
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; ++r) {
    out[r] = sum(sums[r]);
    for (int64_t rest = i; rest < kSize; ++rest) out[r] += query[rest] * keys[index[r] * stride + rest];
  }
}

// out[i] = sum over live keys of weight * value[i], kTile features at a time in registers.
template <int vectors>
inline void weighted(const float* weights, const float* values, int64_t stride, const int64_t* index, int64_t live,
                     float* out) {
  Vector sums[vectors] = {};
  for (int64_t j = 0; j < live; ++j) {
    const float* value = values + index[j] * stride;
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sums[i] += weights[j] * load(value + i * kLanes);
  }
  std::memcpy(out, sums, sizeof sums);
}

inline void weighted_values(const float* weights, const float* values, int64_t stride, const int64_t* index,
                            int64_t live, float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= kValueSize; i += 4 * kLanes) weighted<4>(weights, values + i, stride, index, live, out + i);
  for (; i + kLanes <= kValueSize; i += kLanes) weighted<1>(weights, values + i, stride, index, live, out + i);
  for (; i < kValueSize; ++i) {
    out[i] = 0;
    for (int64_t j = 0; j < live; ++j) out[i] += weights[j] * values[index[j] * stride + i];
  }
}

// One query over the live keys of a chunk: the largest score, the sum of weights, the weighted values.
inline void attend(const CachedAttention& call, const float* query, const float* keys, const float* values,
                   const int64_t* index, int64_t live, int64_t mask, int64_t first, float* out) {
  float scores[kChunk];
  int64_t j = 0;
  for (; j + kBlock <= live; j += kBlock) scores_of<kBlock>(query, keys, call.keys.token, index + j, scores + j);
  for (; j < live; ++j) scores_of<1>(query, keys, call.keys.token, index + j, scores + j);
  if (call.added)
    for (j = 0; j < live; ++j) scores[j] += call.added[mask + (first + index[j]) * call.mask_strides[3]];
  float largest = -INFINITY;
  for (j = 0; j < live; ++j) largest = scores[j] > largest || scores[j] != scores[j] ? scores[j] : largest;
  out[0] = largest;
  if (largest == -INFINITY) {  // nothing to see here
    for (int64_t i = 0; i < 1 + kValueSize; ++i) out[1 + i] = 0;
    return;
  }
  Vector sums = {};
  for (j = 0; j + kLanes <= live; j += kLanes) {
    const Vector weights = sparsecc::exp(load(scores + j) - largest);
    std::memcpy(scores + j, &weights, sizeof weights);
    sums += weights;
  }
  out[1] = sum(sums);
  for (; j < live; ++j) out[1] += scores[j] = std::exp(scores[j] - largest);
  weighted_values(scores, values, call.values.token, index, live, out + 2);
}

inline void task(const Job& job, int64_t number) {
  const CachedAttention& call = *job.call;
  const int64_t chunk = number % job.chunks, h = number / job.chunks % call.heads;
  const int64_t b = number / job.chunks / call.heads;
  const int64_t first = chunk * kChunk, count = std::min(kChunk, job.limit - first);
  const float *keys = call.keys.at(b, h, first), *values = call.values.at(b, h, first);
  const float* queries = job.queries.data() + (b * call.heads + h) * job.rows * kSize;
  float* partial = const_cast<float*>(job.partial.data()) + number * job.rows * (2 + kValueSize);
  int64_t index[kChunk], live = 0, known = -1;
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t mask = mask_at(call, b, h * kGroups + r % kGroups, r / kGroups);
    if (mask != known) {
      live = 0;
      for (int64_t s = 0; s < count; ++s)
        if (seen(call, mask, first + s)) index[live++] = s;
      known = mask;
    }
    attend(call, queries + r * kSize, keys, values, index, live, mask, first, partial + r * (2 + kValueSize));
  }
}

// The chunks of one query put together.
inline void combine(const Job& job, int64_t b, int64_t h, int64_t r) {
  const CachedAttention& call = *job.call;
  const int64_t width = 2 + kValueSize, next = job.rows * width;
  const float* partial = job.partial.data() + (b * call.heads + h) * job.chunks * next + r * width;
  float* out = call.out + ((b * call.tokens + r / kGroups) * call.query_heads + h * kGroups + r % kGroups) * kValueSize;
  float largest = -INFINITY, total = 0;
  for (int64_t c = 0; c < job.chunks; ++c) {
    const float one = partial[c * next];
    largest = one > largest || one != one ? one : largest;
  }
  for (int64_t i = 0; i < kValueSize; ++i) out[i] = 0;
  if (largest == -INFINITY) return;  // a query that sees nothing gets zeros, as PyTorch's does
  for (int64_t c = 0; c < job.chunks; ++c) {
    if (partial[c * next] == -INFINITY) continue;
    const float share = std::exp(partial[c * next] - largest);
    total += share * partial[c * next + 1];
    for (int64_t i = 0; i < kValueSize; ++i) out[i] += share * partial[c * next + 2 + i];
  }
  for (int64_t i = 0; i < kValueSize; ++i) out[i] /= total;
}

}  // namespace
