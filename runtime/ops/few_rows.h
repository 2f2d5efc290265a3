// What sparsecc::few_rows and its generated kernels agree on.

#pragma once

#include <cstdint>

struct FewRows {
  const float* x;  // [rows, size]
  int64_t rows, size;
  const float* const* weights;  // [features[i], size] each
  const int64_t* features;
  const float* const* operands;  // [features] or [rows, features] each
  const int64_t* elements;       // of each operand
  float* const* out;             // [rows, features] each
  void (*parallel)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                   void* context);
};

struct FewRowsKernel {
  const char* (*run)(const FewRows*);  // nullptr, or what is wrong with the arguments
  int64_t outputs;
  const int64_t* first_weight;  // of each output: its features are the output's
};
