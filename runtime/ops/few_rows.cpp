// sparsecc::few_rows_native on CPU: checks its arguments, finds the kernel of its spec, and hands it plain pointers.

#include "kernels.h"

#include "few_rows.h"
#include "tensors.h"

using torch::stable::Tensor;

namespace {

Kernels<FewRowsKernel> kernels("few_rows");

void require(bool holds, const std::string& what) { kernels.require(holds, what); }

FewRowsKernel find(const std::string& spec, const Tensor& x) {
  return kernels.find(kTypeNames[type_of_x(kernels, x)], spec);
}

std::vector<Tensor> few_rows(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> operands,
                             std::string spec) {
  const FewRowsKernel kernel = find(spec, x);
  require(x.dim() >= 1, "x has no features");
  FewRows call{};
  call.x = data(kernels, x, kernel.type, "x");
  const auto sizes = x.sizes();
  call.size = sizes[x.dim() - 1];
  call.rows = 1;
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  for (size_t i = 0; i + 1 < shape.size(); ++i) call.rows *= shape[i];

  require(int64_t(weights.size()) == kernel.parts, std::to_string(weights.size()) + " weight tensors, not " +
                                                       std::to_string(kernel.parts));
  std::vector<const void*> parts, operand_data;
  std::vector<int64_t> features, elements;
  for (int64_t i = 0; i < kernel.parts; ++i) {
    const WeightPart& part = kernel.part[i];
    Tensor& tensor = weights[i];
    require(tensor.dim() >= 1, std::string(part.name) + " has no features");
    features.push_back(part.first == i ? tensor.size(0) : features[part.first]);
    check_part(kernels, tensor, part, features.back(), call.size);
    parts.push_back(data(kernels, tensor, part.type, part.name));
  }
  for (size_t i = 0; i < operands.size(); ++i) {
    operand_data.push_back(data(kernels, operands[i], kernel.type, "operand " + std::to_string(i)));
    elements.push_back(operands[i].numel());
  }
  std::vector<void*> out;
  std::vector<Tensor> results;
  for (int64_t j = 0; j < kernel.outputs; ++j) {
    shape.back() = features[kernel.first_part[j]];
    results.push_back(torch::stable::new_empty(x, shape));
    out.push_back(results.back().mutable_data_ptr());
  }
  call.parts = parts.data();
  call.features = features.data();
  call.operands = operand_data.data();
  call.elements = elements.data();
  call.out = out.data();
  call.parallel = in_parallel;
  if (const char* problem = kernel.run(&call)) throw std::runtime_error(std::string("few_rows: ") + problem);
  return results;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void sparsecc_few_rows_register(
    const char* dtype, const char* spec, const FewRowsKernel* kernel) {
  kernels.add(dtype, spec, *kernel);
}

STABLE_TORCH_LIBRARY_IMPL(sparsecc, CPU, m) { m.impl("few_rows_native", TORCH_BOX(&few_rows)); }
