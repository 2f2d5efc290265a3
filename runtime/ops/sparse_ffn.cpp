// sparsecc::sparse_ffn_native on CPU: checks its arguments, finds the kernel of its spec, hands it plain pointers, and
// counts live neurons where the spec has a label.

#include "kernels.h"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "sparse_ffn.h"
#include "tensors.h"

namespace {

// What was counted under one label.
struct Counts {
  std::mutex guard;
  int64_t calls = 0, rows = 0, live = 0, union_live = 0, neurons = 0;
};

std::mutex labels_guard;
std::map<std::string, std::unique_ptr<Counts>> counts_of;   // by label
std::unordered_map<std::string, Counts*> counts_of_spec;  // by the text of a spec that has one

struct Loaded {
  SparseFfnKernel kernel;
  Counts* counts;  // nullptr: none
};

Kernels<Loaded> kernels("sparse_ffn");

void require(bool holds, const std::string& what) { kernels.require(holds, what); }

void count(Counts& counts, const SparseFfn& call) {
  std::lock_guard lock(counts.guard);
  counts.calls += 1;
  counts.rows += call.rows;
  counts.live += call.live[0];
  counts.union_live += call.live[1];
  counts.neurons = call.neurons;
}

Tensor sparse_ffn(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> operands, std::optional<Tensor> only,
                  std::string spec) {
  const Loaded loaded = kernels.find(kTypeNames[type_of_x(kernels, x)], spec);
  const SparseFfnKernel& kernel = loaded.kernel;
  require(x.dim() >= 1, "x has no features");
  SparseFfn call{};
  call.x = data(kernels, x, kernel.type, "x");
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  call.size = shape.back();
  call.rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) call.rows *= shape[i];

  require(int64_t(weights.size()) == kernel.parts,
          std::to_string(weights.size()) + " weight tensors, not " + std::to_string(kernel.parts));
  const WeightPart& down = kernel.part[kernel.down];
  require(weights[kernel.down].dim() == 2, std::string(down.name) + " is no matrix");
  call.neurons = weights[kernel.down].size(0);
  call.out_size = weights[kernel.down].size(1) * down.per;
  std::vector<const void*> parts, operand_data;
  std::optional<Tensor> router;
  for (int64_t i = 0; i < kernel.parts; ++i) {
    const WeightPart& part = kernel.part[i];
    const bool reads_x = part.first != kernel.down;
    check_part(kernels, weights[i], part, call.neurons, reads_x ? call.size : call.out_size,
               reads_x ? "x and down's weight need it" : "down's weight needs it");
    parts.push_back(data(kernels, weights[i], part.type, part.name));
  }
  if (kernel.block) {
    require(!operands.empty(), "no operands: the last one is the router's values");
    router = operands.back();
    operands.pop_back();
    require(call.neurons % kernel.block == 0, std::to_string(call.neurons) + " neurons are no multiple of blocks of " +
                                                  std::to_string(kernel.block));
    const int64_t count = call.neurons / kernel.block;
    require(router->dim() >= 1 && router->size(router->dim() - 1) == count && router->numel() == call.rows * count,
            "the router's values are not [" + std::to_string(call.rows) + ", " + std::to_string(count) +
                "], one for each row of x and block");
    call.router = data(kernels, *router, kernel.type, "the router's values");
  }
  require(int64_t(operands.size()) >= kernel.operands,
          std::to_string(operands.size()) + " operands, not " + std::to_string(kernel.operands));
  for (size_t i = 0; i < operands.size(); ++i) {
    const std::string name = "operand " + std::to_string(i);
    require(operands[i].dim() == 1 && operands[i].size(0) == call.neurons,
            name + " is not [" + std::to_string(call.neurons) + "], one for each neuron");
    operand_data.push_back(data(kernels, operands[i], kernel.type, name));
  }
  if (only) {
    require(only->dim() == 1 && only->scalar_type() == ScalarType::Long && only->is_cpu(),
            "only must be int64 [candidates] on CPU");
    *only = torch::stable::contiguous(*only);
    call.candidates = only->size(0);
    static const int64_t none = 0;  // an empty tensor may have no address, which would mean all neurons
    call.only = call.candidates ? static_cast<const int64_t*>(only->const_data_ptr()) : &none;
    for (int64_t i = 0; i < call.candidates; ++i)
      require(call.only[i] >= 0 && call.only[i] < call.neurons && (!i || call.only[i - 1] < call.only[i]),
              "only must be ascending numbers of the " + std::to_string(call.neurons) + " neurons");
  }
  shape.back() = call.out_size;
  Tensor result = torch::stable::new_empty(x, shape);
  int64_t live[2] = {};
  call.parts = parts.data();
  call.operands = operand_data.data();
  call.out = result.mutable_data_ptr();
  call.live = live;
  call.parallel = in_parallel;
  if (const char* problem = kernel.run(&call)) kernels.fail(problem);
  if (loaded.counts) count(*loaded.counts, call);
  return result;
}

}  // namespace

// Calls of `spec` are counted under `label`: before its kernel is registered.
extern "C" __attribute__((visibility("default"))) void sparsecc_sparse_ffn_label(const char* spec,
                                                                                 const char* label) {
  std::lock_guard lock(labels_guard);
  std::unique_ptr<Counts>& counts = counts_of[label];
  if (!counts) counts = std::make_unique<Counts>();
  counts_of_spec[spec] = counts.get();
}

extern "C" __attribute__((visibility("default"))) void sparsecc_sparse_ffn_register(
    const char* dtype, const char* spec, const SparseFfnKernel* kernel) {
  std::lock_guard lock(labels_guard);
  const auto found = counts_of_spec.find(spec);
  kernels.add(dtype, spec, {*kernel, found == counts_of_spec.end() ? nullptr : found->second});
}

// The calls, rows, live neurons summed over rows, neurons live for any row of a call, and neurons under a label; 0
// where it is unknown.
extern "C" __attribute__((visibility("default"))) int sparsecc_sparse_ffn_counts(const char* label, int64_t* counts) {
  std::lock_guard lock(labels_guard);
  const auto found = counts_of.find(label);
  if (found == counts_of.end()) return 0;
  std::lock_guard own(found->second->guard);
  const Counts& from = *found->second;
  const int64_t all[] = {from.calls, from.rows, from.live, from.union_live, from.neurons};
  std::copy(std::begin(all), std::end(all), counts);
  return 1;
}

// All counts are 0 again.
extern "C" __attribute__((visibility("default"))) void sparsecc_sparse_ffn_reset() {
  std::lock_guard lock(labels_guard);
  for (auto& [label, counts] : counts_of) {
    std::lock_guard own(counts->guard);
    counts->calls = counts->rows = counts->live = counts->union_live = counts->neurons = 0;
  }
}

STABLE_TORCH_LIBRARY_IMPL(sparsecc, CPU, m) { m.impl("sparse_ffn_native", TORCH_BOX(&sparse_ffn)); }
