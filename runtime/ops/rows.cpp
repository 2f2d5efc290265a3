// sparsecc::rows_native on CPU: checks its arguments, finds the kernel of its spec, and hands it plain pointers.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <deque>

#include "kernels.h"

#include "rows.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Kernels<RowsKernel> kernels("rows");

[[noreturn]] void fail(const std::string& what) { kernels.fail(what); }

std::string name(char kind, size_t index) { return kind + std::to_string(index); }

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: fail("t0 must be float32, bfloat16 or float16");
  }
}

// What a call keeps alive: copies of operands that could not be read as they lie.
struct Kept {
  std::vector<Tensor> tensors;
  std::deque<std::vector<float>> floats;
};

// A tensor whose rows are dense and equally far apart is read where it lies.
RowsOperand strided(Tensor tensor, int64_t rows, Kept& kept) {
  const int64_t last = tensor.dim() - 1;
  int64_t stride = 0, inner = 1;
  bool regular = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (inner == 1) stride = tensor.stride(d);
    regular &= tensor.stride(d) == stride * inner;
    inner *= tensor.size(d);
  }
  if (!regular) {
    tensor = torch::stable::contiguous(tensor);
    stride = tensor.size(last);
  }
  kept.tensors.push_back(tensor);
  return {tensor.const_data_ptr(), stride, std::max<int64_t>(rows, 1)};
}

template <class T>
const float* widened(const Tensor& tensor, Kept& kept) {
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
  kept.floats.emplace_back(data, data + tensor.numel());
  return kept.floats.back().data();
}

// A vector or scalar, as float32: its shape must be the last axes of the tensors', `size` being the last one.
RowsOperand broadcast(const std::string& who, Tensor tensor, const std::vector<int64_t>& shape, int64_t size,
                      Kept& kept) {
  const int64_t from = static_cast<int64_t>(shape.size()) - tensor.dim();
  bool fits = tensor.is_cpu() && tensor.dim() >= 1 && from >= 0 && tensor.size(tensor.dim() - 1) == size;
  int64_t period = 1;
  for (int64_t d = 0; fits && d + 1 < tensor.dim(); ++d) {
    fits = tensor.size(d) == shape[from + d];
    period *= tensor.size(d);
  }
  if (!fits) {
    fail(who + " must be on CPU and have the tensors' last axes" +
         (who[0] == 's' ? ", the last one being 1" : ""));
  }
  tensor = torch::stable::contiguous(tensor);
  kept.tensors.push_back(tensor);
  const float* data = nullptr;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: data = static_cast<const float*>(tensor.const_data_ptr()); break;
    case ScalarType::BFloat16: data = widened<torch::headeronly::BFloat16>(tensor, kept); break;
    case ScalarType::Half: data = widened<torch::headeronly::Half>(tensor, kept); break;
    default: fail(who + " must be float32, bfloat16 or float16");
  }
  return {data, size, std::max<int64_t>(period, 1)};
}

void require_count(int64_t needed, size_t given, const char* what) {
  if (needed != static_cast<int64_t>(given)) {
    fail("the spec reads " + std::to_string(needed) + " " + what + ", not " + std::to_string(given));
  }
}

std::vector<Tensor> rows(std::vector<Tensor> tensors, std::vector<Tensor> vectors, std::vector<Tensor> scalars,
                         std::string spec) {
  if (tensors.empty()) fail("there is no tensor");
  const Tensor& x = tensors[0];
  if (x.dim() < 1) fail("t0 has no features");
  const RowsKernel kernel = kernels.find(dtype_name(x.scalar_type()), spec);
  require_count(kernel.tensors, tensors.size(), "tensors");
  require_count(kernel.vectors, vectors.size(), "vectors");
  require_count(kernel.scalars, scalars.size(), "scalars");

  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Rows call{};
  call.size = shape.back();
  call.rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) call.rows *= shape[i];

  Kept kept;
  std::vector<RowsOperand> tensor_data, vector_data, scalar_data;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto other = tensors[i].sizes();
    if (!std::equal(other.begin(), other.end(), shape.begin(), shape.end()))
      fail(name('t', i) + " and t0 differ in shape");
    if (!tensors[i].is_cpu() || tensors[i].scalar_type() != x.scalar_type())
      fail(name('t', i) + " must be on CPU and have t0's dtype");
    tensor_data.push_back(strided(tensors[i], call.rows, kept));
  }
  for (size_t i = 0; i < vectors.size(); ++i)
    vector_data.push_back(broadcast(name('v', i), vectors[i], shape, call.size, kept));
  for (size_t i = 0; i < scalars.size(); ++i)
    scalar_data.push_back(broadcast(name('s', i), scalars[i], shape, 1, kept));

  std::vector<void*> out;
  std::vector<Tensor> results;
  for (int64_t j = 0; j < kernel.outputs; ++j) {
    const RowsOutput& output = kernel.output[j];
    std::vector<int64_t> made = shape;
    if (output.shape == kScalars) made.back() = 1;
    if (output.shape == kSummed) made = {call.size};
    const ScalarType dtypes[] = {x.scalar_type(), ScalarType::Float, ScalarType::Char, ScalarType::Float8_e4m3fn};
    results.push_back(torch::stable::new_empty(x, made, dtypes[output.dtype]));
    out.push_back(results.back().mutable_data_ptr());
  }
  call.tensors = tensor_data.data();
  call.vectors = vector_data.data();
  call.scalars = scalar_data.data();
  call.out = out.data();
  call.parallel = in_parallel;
  if (const char* problem = kernel.run(&call)) fail(problem);
  return results;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void sparsecc_rows_register(const char* dtype, const char* spec,
                                                                              const RowsKernel* kernel) {
  kernels.add(dtype, spec, *kernel);
}

STABLE_TORCH_LIBRARY_IMPL(sparsecc, CPU, m) { m.impl("rows_native", TORCH_BOX(&rows)); }
