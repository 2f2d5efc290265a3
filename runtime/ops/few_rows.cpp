// sparsecc::few_rows_native on CPU: checks its arguments, finds the kernel of its spec, and hands it plain pointers.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "few_rows.h"

using torch::stable::Tensor;

namespace {

std::shared_mutex guard;
std::unordered_map<std::string, FewRowsKernel> kernels;

void in_parallel(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

FewRowsKernel find(const std::string& spec) {
  std::shared_lock lock(guard);
  const auto found = kernels.find(spec);
  if (found == kernels.end()) throw std::runtime_error("few_rows: no kernel is loaded for " + spec);
  return found->second;
}

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("few_rows: ") + what);
}

const float* data(const Tensor& tensor) {
  require(tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.is_cpu(),
          "all tensors must be float32 on CPU");
  return static_cast<const float*>(tensor.const_data_ptr());
}

std::vector<Tensor> few_rows(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> operands,
                             std::string spec) {
  const FewRowsKernel kernel = find(spec);
  require(x.dim() >= 1, "x has no features");
  x = torch::stable::contiguous(x);
  FewRows call{};
  const auto sizes = x.sizes();
  call.x = data(x);
  call.size = sizes[x.dim() - 1];
  call.rows = 1;
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  for (size_t i = 0; i + 1 < shape.size(); ++i) call.rows *= shape[i];

  std::vector<const float*> weight_data, operand_data;
  std::vector<int64_t> features, elements;
  for (Tensor& weight : weights) {
    require(weight.dim() == 2 && weight.size(1) == call.size, "a weight is not [features, size of x]");
    weight = torch::stable::contiguous(weight);
    weight_data.push_back(data(weight));
    features.push_back(weight.size(0));
  }
  for (Tensor& operand : operands) {
    operand = torch::stable::contiguous(operand);
    operand_data.push_back(data(operand));
    elements.push_back(operand.numel());
  }
  std::vector<float*> out;
  std::vector<Tensor> results;
  for (int64_t j = 0; j < kernel.outputs; ++j) {
    shape.back() = features.at(kernel.first_weight[j]);
    results.push_back(torch::stable::new_empty(x, shape));
    out.push_back(static_cast<float*>(results.back().mutable_data_ptr()));
  }
  call.weights = weight_data.data();
  call.features = features.data();
  call.operands = operand_data.data();
  call.elements = elements.data();
  call.out = out.data();
  call.parallel = in_parallel;
  if (const char* problem = kernel.run(&call)) throw std::runtime_error(std::string("few_rows: ") + problem);
  return results;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void sparsecc_few_rows_register(const char* spec,
                                                                                  const FewRowsKernel* kernel) {
  std::unique_lock lock(guard);
  kernels[spec] = *kernel;
}

STABLE_TORCH_LIBRARY_IMPL(sparsecc, CPU, m) { m.impl("few_rows_native", TORCH_BOX(&few_rows)); }
