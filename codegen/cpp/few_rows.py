"""C++ for ``sparsecc::few_rows``: every weight is read once, whatever comes before and after in the same loop.

The weight rows are dealt out to the threads in blocks; a block is multiplied with up to ``kRows`` rows of the
input at a time from the cache. The norm of the input is made once, before, and so are its rows in int8 where a
format of weights wants them.
"""

from __future__ import annotations

import hashlib
import pathlib

import torch

from sparsecc.codegen.cpp import operators
from sparsecc.codegen.cpp.operators import FLAGS
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.few_rows import Spec
from sparsecc.runtime.ops.formats import MOST_INT8, Format

# A kernel's own dtype, that of x, operands and outputs, and the parts of weights: names here and in C++.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_TYPES = {
    torch.float32: ("kFloat32", "float"),
    torch.bfloat16: ("kBFloat16", "BFloat16"),
    torch.float16: ("kFloat16", "Half"),
    torch.int8: ("kInt8", "int8_t"),
    torch.uint8: ("kUInt8", "uint8_t"),
}


def source(spec: Spec, dtype: torch.dtype = torch.float32) -> str:
    """The C++ of one spec, to be read: its law first.

    Args:
        dtype: of x, operands and outputs: one of ``DTYPES``.
    """
    name = f"few_rows_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    law = [f"//   out{j}[m, n] = {text}" for j, text in enumerate(spec.outputs)]
    firsts = [spec.slots[spec.weights(j)[0]].start for j in range(len(spec.outputs))]
    bodies = [_output(spec, j, dtype) for j in range(len(spec.outputs))]
    parts = "\n".join(
        f"  part(job->ends, {j}, begin, end, [&](int64_t b, int64_t e) {{ block{j}(*job, b, e); }});"
        for j in range(len(spec.outputs))
    )
    ends = "\n".join(
        f"  job.ends[{j}] = {f'job.ends[{j - 1}] + ' if j else ''}"
        f"(call->features[{first}] + kBlock - 1) / kBlock;"
        for j, first in enumerate(firsts)
    )
    return f"""// {name}: {DTYPES[dtype]} on CPU, for any number of rows m, features n and size k.
{chr(10).join(law)}
// where p<i>[m, n] = sum over k of y[m, k] W<i>[n, k], y = {spec.norm_law},
// v<i>[n] and t<i>[m, n] are operands.{_kept_law(spec)}

#include <algorithm>
#include <iterator>

{operators.text_of("few_rows.h", "vector.h", "bytes.h", "weights.h", "products.h")}
namespace {{

using Element = {_TYPES[dtype][1]};

struct Job {{
  const FewRows* call;
{_members(spec, dtype)}
  int64_t ends[{len(spec.outputs)}];  // where the blocks of each output end
}};

{"".join(bodies)}
void run_blocks(int64_t begin, int64_t end, void* context) {{
  const Job* job = static_cast<const Job*>(context);
{parts}
}}

const char* run(const FewRows* call) {{
{_checks(spec)}
{_prologue(spec, dtype)}
  Job job{{call, {_fields(spec, dtype)}, {{}}}};
{ends}
  call->parallel(job.ends[{len(spec.outputs) - 1}], 1, run_blocks, &job);
  return nullptr;
}}

const FewRowsPart part_of[] = {{
{_parts(spec, dtype)}
}};
const int64_t first_part[] = {{{", ".join(map(str, firsts))}}};
const FewRowsKernel kernel = {{
    run, {_TYPES[dtype][0]}, std::size(part_of), part_of, {len(firsts)}, first_part}};

}}  // namespace

extern "C" __attribute__((visibility("default"))) const FewRowsKernel* few_rows_kernel() {{ return &kernel; }}
"""


def _kept_law(spec: Spec) -> str:
    if spec.plain:
        return ""
    kept = ", ".join(f"W{i} {form.name}" for i, form in enumerate(spec.kept))
    return f"\n// Weights: {kept} (runtime/ops/formats.py says what these are)."


def _struct(form: Format, dtype: torch.dtype) -> str:
    """The struct of codegen/cpp/weights.h."""
    if form.kind == "float":
        return f"Dense<{_TYPES[form.parts[0].dtype or dtype][1]}>"
    if form.kind == "int8":
        return "Int8"
    name = "Int4A8" if form.rounds_activations else "Int4"
    return f"{name}<{form.group}, {str(form.zero).lower()}>"


def _input(form: Format) -> str:
    """The name of the activations that a format reads."""
    if not form.rounds_activations:
        return "floats"
    return f"arranged{form.group}" if form.kind == "int4" else "quantized"


def _inputs(spec: Spec) -> list[tuple[str, str]]:
    """Names and types of the activations that the weights read, each once."""
    kinds = {
        "floats": "Floats",
        "quantized": "Quantized",
        **{f"arranged{form.group}": f"Arranged<{form.group}>" for form in spec.kept},
    }
    return [(name, kinds[name]) for name in dict.fromkeys(map(_input, spec.kept))]


def _members(spec: Spec, dtype: torch.dtype) -> str:
    weights = [f"  {_struct(form, dtype)} w{i};" for i, form in enumerate(spec.kept)]
    return "\n".join([*weights, *(f"  const {kind}& {name};" for name, kind in _inputs(spec))])


def _fields(spec: Spec, dtype: torch.dtype) -> str:
    """The values of the members."""
    weights = [_weight(spec, i, dtype) for i in range(len(spec.kept))]
    return ", ".join([*weights, *(name for name, _ in _inputs(spec))])


def _weight(spec: Spec, i: int, dtype: torch.dtype) -> str:
    """The struct of weight i, from plain pointers."""
    form, slot = spec.kept[i], spec.slots[i]
    fields = [
        f"static_cast<const {_TYPES[part.dtype or dtype][1]}*>(call->parts[{slot.start + j}])"
        for j, part in enumerate(form.parts)
    ]
    if form.kind == "int4" and not form.zero:
        fields.append("nullptr")
    return f"{{{', '.join([*fields, 'call->size'])}}}"


def _parts(spec: Spec, dtype: torch.dtype) -> str:
    return "\n".join(
        f'  {{"W{i}\'s {part.name} ({form.name})", {_TYPES[part.dtype or dtype][0]}, '
        f"{part.per}, {slot.start}}},"
        for i, (form, slot) in enumerate(zip(spec.kept, spec.slots, strict=True))
        for part in form.parts
    )


def _prologue(spec: Spec, dtype: torch.dtype) -> str:
    """The activations as the formats want them."""
    lines = ["const Element* x = static_cast<const Element*>(call->x);"]
    rows = "x"
    if dtype is not torch.float32:
        lines.append("Buffer<float> wide(call->rows * call->size);")
        lines.append("to_floats(x, call->rows * call->size, wide.data());")
        rows = "wide.data()"
    if spec.norm != "none":
        lines.append("Buffer<float> normalized(call->rows * call->size);")
        lines.append(
            f"{spec.norm}_norm({rows}, call->rows, call->size, {spec.float_eps!r}f, normalized.data());"
        )
        rows = "normalized.data()"
    names = [name for name, _ in _inputs(spec)]
    if "floats" in names:
        lines.append(f"const Floats floats{{{rows}, call->size}};")
    if any(name != "floats" for name in names):
        lines.append(f"const Quantized quantized({rows}, call->rows, call->size);")
    lines += [
        f"const {kind} {name}(quantized);"
        for name, kind in _inputs(spec)
        if name.startswith("arranged")
    ]
    return "\n".join(f"  {line}" for line in lines)


def _output(spec: Spec, j: int, dtype: torch.dtype) -> str:
    """The function that computes blocks of one output."""
    weights = spec.weights(j)
    products = "\n".join(
        f"      float p{i}[kBlock * kRows];\n"
        f"      products(job.w{i}, n, count, job.{_input(spec.kept[i])}, m, rows, p{i});"
        for i in weights
    )
    values = {f"p{i}": f"p{i}[r * kRows + c]" for i in weights}
    operands = []
    for name in spec.operands(j):
        operands.append(
            f"  const Element* {name} = static_cast<const Element*>(call.operands[{name[1:]}]);"
        )
        at = "n + r" if name[0] == "v" else "(m + c) * features + n + r"
        values[name] = f"widen({name}[{at}])"
    element = expressions.to_cpp(spec.trees[j], values)
    return f"""void block{j}(const Job& job, int64_t begin, int64_t end) {{
  const FewRows& call = *job.call;
  const int64_t features = call.features[{spec.slots[weights[0]].start}];
{"".join(line + chr(10) for line in operands)}\
  Element* out = static_cast<Element*>(call.out[{j}]);
  for (int64_t n = begin * kBlock; n < features && n < end * kBlock; n += kBlock) {{
    const int count = features - n < kBlock ? int(features - n) : kBlock;
    for (int64_t m = 0; m < call.rows; m += kRows) {{
      const int rows = call.rows - m < kRows ? int(call.rows - m) : kRows;
{products}
      for (int c = 0; c < rows; ++c)
        for (int r = 0; r < count; ++r) narrow({element}, &out[(m + c) * features + n + r]);
    }}
  }}
}}

"""


def _checks(spec: Spec) -> str:
    """What the generic operator cannot know: which operand has which size, and what a format needs."""
    lines = []
    for form in dict.fromkeys(spec.kept):
        if form.group > 1:
            lines.append(
                f"  if (call->size % {form.group}) "
                f'return "{form.name}: the features of x are no multiple of {form.group}";'
            )
        if form.rounds_activations:
            lines.append(
                f"  if (call->size > {MOST_INT8}) "
                f'return "{form.name}: x has more than {MOST_INT8} features, and int32 overflows";'
            )
    for j in range(len(spec.outputs)):
        first, *others = spec.weights(j)
        features = f"call->features[{spec.slots[first].start}]"
        lines += [
            f"  if (call->features[{spec.slots[i].start}] != {features}) "
            f'return "W{i} and W{first} differ in features";'
            for i in others
        ]
        for name in spec.operands(j):
            rows = "call->rows * " if name[0] == "t" else ""
            lines.append(
                f"  if (call->elements[{name[1:]}] != {rows}{features}) "
                f'return "{name} is not as large as output {j} needs it";'
            )
    return "\n".join(lines)


def load(
    spec: Spec, dtype: torch.dtype = torch.float32, flags: tuple[str, ...] = FLAGS
) -> pathlib.Path:
    """Make ``spec`` runnable on CPU tensors; returns its library, whose source lies beside it.

    Args:
        dtype: of x, operands and outputs.
        flags: of the compiler. The kernel that was loaded last for ``spec`` and ``dtype`` is the one that runs.

    Raises:
        BuildError: it cannot be built here, or there is no kernel for ``dtype``.
    """
    if dtype not in DTYPES:
        raise BuildError(f"few_rows: no kernel for {dtype}, but for {', '.join(DTYPES.values())}")
    return operators.load("few_rows", dtype, spec.text(), source(spec, dtype), flags)
