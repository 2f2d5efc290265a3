// What every native sparsecc:: operator needs: its kernels by the text of their spec, threads, and checks.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

template <class Kernel>
class Kernels {
 public:
  void add(const std::string& spec, const Kernel& kernel) {
    std::unique_lock lock(guard_);
    kernels_[spec] = kernel;
  }

  Kernel find(const std::string& spec) const {
    std::shared_lock lock(guard_);
    const auto found = kernels_.find(spec);
    if (found == kernels_.end()) throw std::runtime_error("no kernel is loaded for " + spec);
    return found->second;
  }

 private:
  mutable std::shared_mutex guard_;
  std::unordered_map<std::string, Kernel> kernels_;
};

void in_parallel(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

}  // namespace
