// What sparsecc::rows and its generated kernels agree on.

#pragma once

#include <cstdint>

// Row m of an operand begins at data + (m % period) * stride elements.
struct RowsOperand {
  const void* data;
  int64_t stride, period;
};

struct Rows {
  int64_t rows, size;
  const RowsOperand* tensors;  // of the kernel's dtype
  const RowsOperand* vectors;  // float32
  const RowsOperand* scalars;  // float32
  void* const* out;            // contiguous
  void (*parallel)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                   void* context);
};

enum RowsDtype : int32_t { kAsTensors, kWide, kInt8, kFloat8E4m3fn };
enum RowsShape : int32_t { kElements, kScalars, kSummed };  // [..., N], [..., 1], [N]

struct RowsOutput {
  RowsDtype dtype;
  RowsShape shape;
};

struct RowsKernel {
  const char* (*run)(const Rows*);  // nullptr, or what is wrong with the arguments
  int64_t tensors, vectors, scalars, outputs;
  const RowsOutput* output;
};
