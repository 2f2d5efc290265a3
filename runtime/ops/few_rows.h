// What sparsecc::few_rows and its generated kernels agree on.

#pragma once

#include "parts.h"

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

struct FewRowsKernel {
  const char* (*run)(const FewRows*);  // nullptr, or what is wrong with the arguments
  ElementType type;                    // of x, the operands and the outputs
  int64_t parts;
  const WeightPart* part;
  int64_t outputs;
  const int64_t* first_part;  // of each output: its features are the output's
};
