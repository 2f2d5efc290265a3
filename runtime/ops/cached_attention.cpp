// sparsecc::cached_attention_native on CPU: checks its arguments, finds the kernel of its spec, and hands it
// plain pointers and strides.

#include <optional>

#include "kernels.h"

#include "cached_attention.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Kernels<CachedAttentionKernel> kernels("cached_attention");

void require(bool holds, const std::string& what) { kernels.require(holds, what); }

Rows rows(const Tensor& tensor, const char* what) {
  if (tensor.dim() != 4 || tensor.scalar_type() != ScalarType::Float || !tensor.is_cpu())
    kernels.fail(std::string(what) + " must be float32 on CPU, four axes");
  if (tensor.size(3) > 1 && tensor.stride(3) != 1)
    kernels.fail(std::string("the features of ") + what + " must be contiguous");
  return {static_cast<float*>(tensor.mutable_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Tensor dense(const Tensor& tensor) {
  const bool holds = tensor.dim() == 0 || tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1;
  return holds ? tensor : torch::stable::contiguous(tensor);
}

void match(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* what) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && tensor.size(axis++) == size;
  if (!same) kernels.fail(std::string("the sizes of ") + what + " do not fit the rest");
}

void set_mask(CachedAttention& call, const Tensor& mask) {
  const int64_t sizes[] = {call.batch, call.query_heads, call.tokens, call.length};
  require(mask.dim() <= 4 && mask.is_cpu(), "the mask has more than four axes, or is not on CPU");
  for (int64_t axis = 0; axis < 4; ++axis) {
    const int64_t own = axis - (4 - mask.dim());
    const int64_t size = own < 0 ? 1 : mask.size(own);
    require(size == 1 || size == sizes[axis], "the mask does not broadcast to the scores");
    call.mask_strides[axis] = size == 1 ? 0 : mask.stride(own);
  }
  if (mask.scalar_type() == ScalarType::Bool)
    call.allowed = static_cast<const bool*>(mask.const_data_ptr());
  else if (mask.scalar_type() == ScalarType::Float)
    call.added = static_cast<const float*>(mask.const_data_ptr());
  else
    kernels.fail("the mask must be bool or float32");
}

Tensor cached_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor positions,
                        std::vector<Tensor> rotation, std::optional<Tensor> mask, double scale, std::string spec) {
  const CachedAttentionKernel kernel = kernels.find("float32", spec);
  q = dense(q), k = dense(k), v = dense(v);
  positions = torch::stable::contiguous(positions);
  CachedAttention call{};
  call.q = rows(q, "q"), call.k = rows(k, "k"), call.v = rows(v, "v");
  call.keys = rows(keys, "keys"), call.values = rows(values, "values");
  call.batch = q.size(0), call.query_heads = q.size(1), call.tokens = q.size(2), call.size = q.size(3);
  call.heads = keys.size(1), call.length = keys.size(2), call.value_size = values.size(3);
  match(keys, {call.batch, call.heads, call.length, call.size}, "keys");
  match(values, {call.batch, call.heads, call.length, call.value_size}, "values");
  match(k, {call.batch, call.heads, call.tokens, call.size}, "k");
  match(v, {call.batch, call.heads, call.tokens, call.value_size}, "v");
  match(positions, {call.tokens}, "positions");
  require(positions.scalar_type() == ScalarType::Long && positions.is_cpu(),
          "positions must be int64 on CPU");
  call.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t t = 0; t < call.tokens; ++t)
    if (call.positions[t] < 0 || call.positions[t] >= call.length)
      kernels.fail("position " + std::to_string(call.positions[t]) +
                               " is outside the cache of " + std::to_string(call.length) + " tokens");
  call.rotates = !rotation.empty();
  if (call.rotates) {
    require(rotation.size() == 2, "a rotation is cos and sin");
    Rows* const places[] = {&call.cos, &call.sin};
    for (size_t i = 0; i < 2; ++i) {
      rotation[i] = dense(rotation[i]);
      *places[i] = rows(rotation[i], "cos and sin");
      const int64_t batch = rotation[i].size(0);
      require(batch == 1 || batch == call.batch, "cos and sin do not fit the batch");
      match(rotation[i], {batch, 1, call.tokens, call.size}, "cos and sin");
      if (batch == 1) places[i]->batch = 0;
    }
  }
  if (mask) set_mask(call, *mask);
  call.scale = static_cast<float>(scale);
  Tensor out = torch::stable::new_empty(q, {call.batch, call.tokens, call.query_heads, call.value_size});
  call.out = static_cast<float*>(out.mutable_data_ptr());
  call.parallel = in_parallel;
  if (const char* problem = kernel.run(&call))
    kernels.fail(problem);
  return out;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void sparsecc_cached_attention_register(
    const char* dtype, const char* spec, const CachedAttentionKernel* kernel) {
  kernels.add(dtype, spec, *kernel);
}

STABLE_TORCH_LIBRARY_IMPL(sparsecc, CPU, m) { m.impl("cached_attention_native", TORCH_BOX(&cached_attention)); }
