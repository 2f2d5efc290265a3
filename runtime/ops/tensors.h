// Checks of the tensors that native operators get, by what their kernels expect (parts.h).

#pragma once

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr const char* kTypeNames[] = {"float32", "bfloat16", "float16", "int8", "uint8"};
constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char,
                                 ScalarType::Byte};

template <class Kernel>
ElementType type_of_x(const Kernels<Kernel>& kernels, const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Float;
  kernels.require(x.is_cpu() && (wide || x.scalar_type() == ScalarType::BFloat16),
                  "x must be float32 or bfloat16 on CPU");
  return wide ? kFloat32 : kBFloat16;
}

template <class Kernel>
const void* data(const Kernels<Kernel>& kernels, Tensor& tensor, ElementType type, const std::string& name) {
  kernels.require(tensor.scalar_type() == kTypes[type] && tensor.is_cpu(),
                  name + " must be " + kTypeNames[type] + " on CPU");
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  return tensor.const_data_ptr();
}

// A part of a weight [features, size].
template <class Kernel>
void check_part(const Kernels<Kernel>& kernels, const Tensor& tensor, const WeightPart& part, int64_t features,
                int64_t size, const char* reader = "x needs it") {
  const bool matrix = part.per != 0;
  const bool fits = tensor.dim() == (matrix ? 2 : 1) && tensor.size(0) == features &&
                    (!matrix || tensor.size(1) == size / part.per);
  kernels.require(fits, std::string(part.name) + " is not [" + std::to_string(features) +
                            (matrix ? ", " + std::to_string(size / part.per) + "]" : "]") + ", as " + reader);
}

}  // namespace
