// What sparsecc::cached_attention and its generated kernels agree on.

#pragma once

#include <cstdint>

struct Rows {  // a tensor [batch, heads, tokens, features], the features beside one another
  float* data;
  int64_t batch, head, token;  // strides
  float* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

struct CachedAttention {
  Rows q, k, v, keys, values;
  Rows cos, sin;  // of one head, where it rotates
  bool rotates;
  const int64_t* positions;
  const bool* allowed;  // one of these or neither, [batch, query heads, tokens, length] by strides
  const float* added;
  int64_t mask_strides[4];
  int64_t size, value_size, batch, query_heads, heads, tokens, length;
  float scale;
  float* out;  // [batch, tokens, query heads, value_size]
  void (*parallel)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                   void* context);
};

struct CachedAttentionKernel {
  const char* (*run)(const CachedAttention*);  // nullptr, or what is wrong with the arguments
};
