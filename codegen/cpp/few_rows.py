"""C++ for ``sparsecc::few_rows``: every weight is read once, whatever comes before and after in the same loop.

The weight rows are dealt out to the threads in blocks; a block is multiplied with up to ``ROWS`` rows of the
input at a time from the cache. The norm of the input is made once, before.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import threading

import torch

from sparsecc.runtime import native
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops import few_rows as operator
from sparsecc.runtime.ops.few_rows import Spec

FLAGS = ("-march=native", "-ffp-contract=fast", "-fno-math-errno")
_HERE = pathlib.Path(__file__).parent
_OPERATOR = pathlib.Path(operator.__file__)
_lock = threading.Lock()


def source(spec: Spec) -> str:
    """The C++ of one spec, to be read: its law first."""
    name = f"few_rows_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    eps = torch.finfo(torch.float32).eps if spec.eps is None else spec.eps
    law = [f"//   out{j}[m, n] = {text}" for j, text in enumerate(spec.outputs)]
    count = 1 + max(max(spec.weights(j)) for j in range(len(spec.outputs)))
    bodies = [_output(spec, j) for j in range(len(spec.outputs))]
    firsts = ", ".join(str(spec.weights(j)[0]) for j in range(len(spec.outputs)))
    parts = "\n".join(
        f"  part(job->ends, {j}, begin, end, [&](int64_t b, int64_t e) {{ block{j}(*job, b, e); }});"
        for j in range(len(spec.outputs))
    )
    ends = "\n".join(
        f"  job.ends[{j}] = {f'job.ends[{j - 1}] + ' if j else ''}"
        f"(call->features[{spec.weights(j)[0]}] + kBlock - 1) / kBlock;"
        for j in range(len(spec.outputs))
    )
    return f"""// {name}: float32 on CPU, for any number of rows m, features n and size k.
{chr(10).join(law)}
// where p<i>[m, n] = sum over k of y[m, k] W<i>[n, k], y = {_NORM_LAW[spec.norm].format(eps=eps)},
// v<i>[n] and t<i>[m, n] are operands.

#include <algorithm>
#include <vector>

{_interface()}
{_text(_HERE / "vector.h")}
{_text(_HERE / "few_rows.h")}
namespace {{

struct Job {{
  const FewRows* call;
  const float* x;
  int64_t ends[{len(spec.outputs)}];  // where the blocks of each output end
}};

{"".join(bodies)}
void run_blocks(int64_t begin, int64_t end, void* context) {{
  const Job* job = static_cast<const Job*>(context);
{parts}
}}

const char* run(const FewRows* call) {{
{_checks(spec, count)}
  Job job{{call, call->x, {{}}}};
{_prologue(spec.norm, eps)}
{ends}
  call->parallel(job.ends[{len(spec.outputs) - 1}], 1, run_blocks, &job);
  return nullptr;
}}

const int64_t first_weight[] = {{{firsts}}};
const FewRowsKernel kernel = {{run, {len(spec.outputs)}, first_weight}};

}}  // namespace

extern "C" __attribute__((visibility("default"))) const FewRowsKernel* few_rows_kernel() {{ return &kernel; }}
"""


_NORM_LAW = {
    "none": "x",
    "rms": "x / sqrt(mean(x^2) + {eps})",
    "layer": "(x - mean(x)) / sqrt(var(x) + {eps})",
}


def _prologue(norm: str, eps: float) -> str:
    if norm == "none":
        return ""
    return f"""  std::vector<float> normalized(call->rows * call->size);
  {norm}_norm(*call, {eps!r}f, normalized.data());
  job.x = normalized.data();"""


def _output(spec: Spec, j: int) -> str:
    """The function that computes blocks of one output."""
    weights = spec.weights(j)
    products = "\n".join(
        f"      float p{i}[kBlock * kRows];\n"
        f"      products(job.x + m * size, rows, call.weights[{i}] + n * size, count, size, p{i});"
        for i in weights
    )
    values = {f"p{i}": f"p{i}[r * kRows + c]" for i in weights}
    for name in spec.operands(j):
        at = "n + r" if name[0] == "v" else "(m + c) * features + n + r"
        values[name] = f"call.operands[{name[1:]}][{at}]"
    element = expressions.to_cpp(spec.trees[j], values)
    return f"""void block{j}(const Job& job, int64_t begin, int64_t end) {{
  const FewRows& call = *job.call;
  const int64_t size = call.size, features = call.features[{weights[0]}];
  for (int64_t n = begin * kBlock; n < features && n < end * kBlock; n += kBlock) {{
    const int count = features - n < kBlock ? int(features - n) : kBlock;
    for (int64_t m = 0; m < call.rows; m += kRows) {{
      const int rows = call.rows - m < kRows ? int(call.rows - m) : kRows;
{products}
      for (int c = 0; c < rows; ++c)
        for (int r = 0; r < count; ++r) call.out[{j}][(m + c) * features + n + r] = {element};
    }}
  }}
}}

"""


def _checks(spec: Spec, count: int) -> str:
    """What the generic operator cannot know: which operand has which size."""
    lines = []
    for j in range(len(spec.outputs)):
        first, *others = spec.weights(j)
        lines += [
            f"  if (call->features[{i}] != call->features[{first}]) "
            f'return "W{i} and W{first} differ in features";'
            for i in others
        ]
        for name in spec.operands(j):
            rows = "call->rows * " if name[0] == "t" else ""
            lines.append(
                f"  if (call->elements[{name[1:]}] != {rows}call->features[{first}]) "
                f'return "{name} is not as large as output {j} needs it";'
            )
    return "\n".join(lines)


def _interface() -> str:
    """What the operator and its kernels agree on: each is built from one text, without files to include."""
    return _text(_OPERATOR.with_name("few_rows.h")).replace("#pragma once", "")


def _text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _operator() -> ctypes.CDLL:
    """The operator's own library, loaded: its kernel for CPU tensors is registered."""
    text = _text(_OPERATOR.with_suffix(".cpp")).replace('#include "few_rows.h"', _interface())
    path = native.library("few_rows", text, libraries=("torch_cpu", "c10"))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@functools.cache
def _load(text: str) -> pathlib.Path:
    path = native.library("few_rows_kernel", source(Spec.of(text)), FLAGS)
    kernel = ctypes.CDLL(str(path))
    kernel.few_rows_kernel.restype = ctypes.c_void_p
    register = _operator().sparsecc_few_rows_register
    register.argtypes, register.restype = (ctypes.c_char_p, ctypes.c_void_p), None
    register(text.encode(), kernel.few_rows_kernel())
    return path


def load(spec: Spec) -> pathlib.Path:
    """Make ``spec`` runnable on CPU tensors; returns its library, whose source lies beside it.

    Raises:
        BuildError: it cannot be built here.
    """
    with _lock:
        return _load(spec.text())
