// What sparsecc::few_rows and its generated kernels agree on.

#pragma once

#include <cstdint>

enum FewRowsType : int32_t { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8 };

struct FewRows {
  const void* x;  // [rows, size]
  int64_t rows, size;
  const void* const* parts;   // the tensors of the weights, in a row
  const int64_t* features;    // of each part's weight
  const void* const* operands;  // [features] or [rows, features] each
  const int64_t* elements;      // of each operand
  void* const* out;             // [rows, features] each
  void (*parallel)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                   void* context);
};

struct FewRowsPart {
  const char* name;
  FewRowsType type;
  int64_t per;    // weights of a row that share one element: [features, size / per]; 0: [features]
  int64_t first;  // the first part of the same weight
};

struct FewRowsKernel {
  const char* (*run)(const FewRows*);  // nullptr, or what is wrong with the arguments
  FewRowsType type;                    // of x, the operands and the outputs
  int64_t parts;
  const FewRowsPart* part;
  int64_t outputs;
  const int64_t* first_part;  // of each output: its features are the output's
};
