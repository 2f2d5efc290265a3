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
  explicit Kernels(const char* name) : name_(name) {}

  void add(const std::string& dtype, const std::string& spec, const Kernel& kernel) {
    std::unique_lock lock(guard_);
    kernels_[dtype + spec] = kernel;
  }

  Kernel find(const std::string& dtype, const std::string& spec) const {
    std::shared_lock lock(guard_);
    const auto found = kernels_.find(dtype + spec);
    if (found == kernels_.end()) fail("no kernel is loaded for " + dtype + " and " + spec);
    return found->second;
  }

  void require(bool holds, const std::string& what) const {
    if (!holds) fail(what);
  }

  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(name_ + ": " + what); }

 private:
  std::string name_;
  mutable std::shared_mutex guard_;
  std::unordered_map<std::string, Kernel> kernels_;
};

void in_parallel(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace
