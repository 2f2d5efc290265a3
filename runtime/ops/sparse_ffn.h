// What sparsecc::sparse_ffn and its generated kernels agree on.

#pragma once

#include "parts.h"

struct SparseFfn {
  const void* x;  // [rows, size]
  int64_t rows, size;
  int64_t neurons, out_size;
  const void* const* parts;     // the tensors of the weights, in a row
  const void* const* operands;  // [neurons] each
  const void* router;           // [rows, neurons / block]; nullptr where there is no router
  const int64_t* only;          // [candidates], ascending; nullptr where all neurons are
  int64_t candidates;
  void* out;      // [rows, out_size]
  int64_t* live;  // to be set: the sum over rows of live neurons, and those live for any row
  void (*parallel)(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                   void* context);
};

struct SparseFfnKernel {
  const char* (*run)(const SparseFfn*);  // nullptr, or what is wrong with the arguments
  ElementType type;                      // of x, the operands and the output
  int64_t parts;
  const WeightPart* part;
  int64_t down;      // the first part of the down projection, whose rows are as long as the output's
  int64_t operands;  // at least
  int64_t block = 0;  // neurons for each value of the router, which is the last operand; 0: there is none
};
