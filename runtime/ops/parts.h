// The tensors of weights as operators and their generated kernels see them.

#pragma once

#include <cstdint>

enum ElementType : int32_t { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8 };

struct WeightPart {
  const char* name;
  ElementType type;
  int64_t per;    // weights of a row that share one element: [features, size / per]; 0: [features]
  int64_t first;  // the first part of the same weight
};
