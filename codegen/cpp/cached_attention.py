"""C++ for ``sparsecc::cached_attention``: the cache is read once, by all queries that share it.

Tasks are pieces of 64 keys of one sequence and one head, dealt out to the threads; each leaves its largest
score, its sum of weights and its weighted values, which are put together at the end (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018, eq. 4). The pieces do not depend on the threads, so neither
do the bits.
"""

from __future__ import annotations

import pathlib

import torch

from sparsecc.codegen.cpp import operators
from sparsecc.runtime.ops.cached_attention import Spec

_LAW = """//   k' = {k}, written into keys[position]; v into values[position]
//   out[t] = softmax over s of (scale {q} . keys[s] + mask[t, s]) times values[s]"""


def source(spec: Spec) -> str:
    """The C++ of one spec, to be read: its law first."""
    law = _LAW.format(**({"q": "R q[t]", "k": "R k"} if spec.rotary else {"q": "q[t]", "k": "k"}))
    rotation = (
        "// R turns the pairs (i, i + size/2) by the angles of cos and sin.\n"
        if spec.rotary
        else ""
    )
    return f"""// cached_attention: float32 on CPU, for any batch, number of tokens and length of the cache;
// {spec.size} features of a key, {spec.value_size} of a value, {spec.groups} query heads a head of the cache.
{law}
{rotation}
#include <algorithm>
#include <vector>

{operators.text_of("cached_attention.h")}
{operators.text_of("vector.h", "functions.h")}
namespace {{

constexpr int64_t kSize = {spec.size}, kValueSize = {spec.value_size}, kGroups = {spec.groups};
constexpr bool kRotary = {str(spec.rotary).lower()};

}}  // namespace

{operators.text_of("attend.h")}
namespace {{

void prepare_some(int64_t begin, int64_t end, void* job) {{
  for (int64_t b = begin; b < end; ++b) prepare(*static_cast<Job*>(job), b);
}}

void run_tasks(int64_t begin, int64_t end, void* job) {{
  for (int64_t number = begin; number < end; ++number) task(*static_cast<const Job*>(job), number);
}}

const char* run(const CachedAttention* call) {{
  if (call->size != kSize || call->value_size != kValueSize || call->query_heads != kGroups * call->heads)
    return "the tensors are not of the sizes that the kernel was made for";
  if (!call->batch || !call->tokens) return nullptr;
  if (kRotary != call->rotates) return "a rotation is missing, or one too many";
  Job job{{call, call->tokens * kGroups, 0, limit_of(*call), {{}}, {{}}}};
  job.chunks = (job.limit + kChunk - 1) / kChunk;
  const int64_t heads = call->batch * call->heads;
  job.queries.resize(heads * job.rows * kSize);
  job.partial.resize(heads * job.chunks * job.rows * (2 + kValueSize));
  const int64_t enough = 1 << 14;  // products that are worth a thread
  const int64_t moved = call->tokens * call->heads * (kGroups + 2) * kSize;
  const int64_t products = job.rows * kChunk * (kSize + kValueSize);
  call->parallel(call->batch, 1 + enough / moved, prepare_some, &job);
  call->parallel(heads * job.chunks, 1 + enough / products, run_tasks, &job);
  for (int64_t b = 0; b < call->batch; ++b)
    for (int64_t h = 0; h < call->heads; ++h)
      for (int64_t r = 0; r < job.rows; ++r) combine(job, b, h, r);
  return nullptr;
}}

const CachedAttentionKernel kernel = {{run}};

}}  // namespace

extern "C" __attribute__((visibility("default"))) const CachedAttentionKernel* cached_attention_kernel() {{
  return &kernel;
}}
"""


def load(spec: Spec) -> pathlib.Path:
    """Make ``spec`` runnable on CPU tensors; returns its library, whose source lies beside it.

    Raises:
        BuildError: it cannot be built here.
    """
    return operators.load("cached_attention", torch.float32, spec.text(), source(spec))
