"""C++ for ``sparsecc::few_rows``: every weight is read once, whatever comes before and after in the same loop.

The weight rows are dealt out to the threads in blocks; a block is multiplied with up to ``kRows`` rows of the
input at a time from the cache. Where there are many rows, arithmetic is the limit and not memory: tiles of
weights are laid out for it once, and multiplied with bands of rows (``many_rows.h``). The norm of the input is
made once, before, and so are its rows in int8 where a format of weights wants them.
"""

from __future__ import annotations

import hashlib
import pathlib

import torch

from sparsecc.codegen.cpp import operators, weight_formats
from sparsecc.codegen.cpp.operators import FLAGS
from sparsecc.codegen.cpp.weight_formats import DTYPES, STORED, TYPES
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.few_rows import Spec

_JOBS = ("Job", "ManyRows")  # by whether there are many rows
_HEADERS = (
    "few_rows.h",
    "vector.h",
    "functions.h",
    "storage.h",
    "bytes.h",
    "weights.h",
    "products.h",
    "many_rows.h",
)


def source(spec: Spec, dtype: torch.dtype = torch.float32) -> str:
    """The C++ of one spec, to be read: its law first.

    Args:
        dtype: of x, operands and outputs: one of ``DTYPES``.
    """
    name = f"few_rows_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    law = [f"//   out{j}[m, n] = {text}" for j, text in enumerate(spec.outputs)]
    firsts = [spec.slots[spec.weights(j)[0]].start for j in range(len(spec.outputs))]
    outputs = range(len(spec.outputs))
    bytes_only = all(form.kind == "int8" and not form.together for form in spec.kept)
    many = "many_rows_of_int8(call->size)" if bytes_only else "kManyRows"
    bodies = [function(spec, j, dtype) for j in outputs for function in (_output, _tiles)]
    return f"""// {name}: {DTYPES[dtype]} on CPU, for any number of rows m, features n and size k.
{chr(10).join(law)}
// where p<i>[m, n] = sum over k of y[m, k] W<i>[n, k], y = {spec.norm_law},
// v<i>[n] and t<i>[m, n] are operands.{weight_formats.law(spec.kept, _names(spec))}

#include <algorithm>
#include <iterator>

{operators.text_of(*_HEADERS)}
namespace sparsecc {{
namespace {{

{_values(spec)}

}}  // namespace
}}  // namespace sparsecc

namespace {{

using Element = {TYPES[dtype][1]};
using Stored = sparsecc::{STORED[dtype]};

{_job(spec, dtype, many=False)}

{_job(spec, dtype, many=True)}

{"".join(bodies)}
{_run_some(spec, many=False)}

{_run_some(spec, many=True)}

const char* run(const FewRows* call) {{
{_checks(spec)}
{weight_formats.prologue(spec.kept, dtype, spec.norm, spec.float_eps)}
  if (call->rows < {many}) {{
{_start(spec, dtype, many=False)}
  }} else {{
{_start(spec, dtype, many=True)}
  }}
  return nullptr;
}}

const WeightPart part_of[] = {{
{weight_formats.parts(spec.kept, spec.slots, _names(spec), dtype)}
}};
const int64_t first_part[] = {{{", ".join(map(str, firsts))}}};
const FewRowsKernel kernel = {{
    run, {TYPES[dtype][0]}, std::size(part_of), part_of, {len(firsts)}, first_part}};

}}  // namespace

extern "C" __attribute__((visibility("default"))) const FewRowsKernel* few_rows_kernel() {{ return &kernel; }}
"""


def _inputs(spec: Spec, many: bool) -> dict[str, str]:
    """Names and types of the activations that the weights read."""
    return dict(weight_formats.activations(form, many) for form in spec.kept)


def _input(spec: Spec, i: int, many: bool = False) -> str:
    """Name of the activations that weight i reads."""
    return weight_formats.activations(spec.kept[i], many)[0]


def _job(spec: Spec, dtype: torch.dtype, many: bool) -> str:
    """What threads get: weights, activations, and where the blocks of each output end."""
    lines = [f"  {weight_formats.struct(form, dtype)} w{i};" for i, form in enumerate(spec.kept)]
    lines += [f"  const {kind}& {name};" for name, kind in _inputs(spec, many).items()]
    if many:
        lines.append("  Bands bands;")
    return f"""struct {_JOBS[many]} {{
  const FewRows* call;
{chr(10).join(lines)}
  int64_t ends[{len(spec.outputs)}];  // of each output's {"tasks" if many else "blocks"}
}};"""


def _names(spec: Spec) -> list[str]:
    return [f"W{i}" for i in range(len(spec.kept))]


def _weights(spec: Spec, dtype: torch.dtype) -> list[str]:
    """The structs of the weights, from plain pointers."""
    kept = zip(spec.kept, spec.slots, strict=True)
    return [weight_formats.weight(form, slot, dtype) for form, slot in kept]


def _run_some(spec: Spec, many: bool) -> str:
    function = "tiles" if many else "block"
    parts = "\n".join(
        f"  part(job->ends, {j}, begin, end, [&](int64_t b, int64_t e) {{ {function}{j}(*job, b, e); }});"
        for j in range(len(spec.outputs))
    )
    return f"""void {"run_tiles" if many else "run_blocks"}(int64_t begin, int64_t end, void* context) {{
  const {_JOBS[many]}* job = static_cast<const {_JOBS[many]}*>(context);
{parts}
}}"""


def _start(spec: Spec, dtype: torch.dtype, many: bool) -> str:
    """Fills the job and hands it to the threads."""
    inputs = _inputs(spec, many)
    lines = weight_formats.arranged(spec.kept, many)
    fields = ["call", *_weights(spec, dtype), *inputs]
    if many:
        fields.append("Bands(call->rows)")
    lines.append(f"{_JOBS[many]} job{{{', '.join(fields)}, {{}}}};")
    wide, times = ("kTile", " * job.bands.tasks()") if many else ("kBlock", "")
    for j in range(len(spec.outputs)):
        features = f"call->features[{spec.slots[spec.weights(j)[0]].start}]"
        before = f"job.ends[{j - 1}] + " if j else ""
        lines.append(f"job.ends[{j}] = {before}({features} + {wide} - 1) / {wide}{times};")
    run = "run_tiles" if many else "run_blocks"
    lines.append(f"call->parallel(job.ends[{len(spec.outputs) - 1}], 1, {run}, &job);")
    return "\n".join(f"    {line}" for line in lines)


def _output(spec: Spec, j: int, dtype: torch.dtype) -> str:
    """The function that computes blocks of one output."""
    weights = spec.weights(j)
    products = "\n".join(
        f"      float p{i}[kBlock * kRows];\n"
        f"      products(job.w{i}, Following{{n}}, count, job.{_input(spec, i)}, m, rows, p{i});"
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


def _values(spec: Spec) -> str:
    """The expression of each output, for a vector of features."""
    functions = []
    for j, tree in enumerate(spec.trees):
        names = expressions.names(tree)
        arguments = ", ".join(f"Vector {name}" for name in names)
        value = expressions.to_cpp(tree, {name: name for name in names})
        functions.append(f"inline Vector value{j}({arguments}) {{ return {value}; }}")
    return "\n".join(functions)


def _tiles(spec: Spec, j: int, dtype: torch.dtype) -> str:
    """The function that computes tiles of one output for many rows."""
    weights, operands = spec.weights(j), spec.operands(j)
    lines = [
        f"Panel<{weight_formats.struct(spec.kept[i], dtype)}> panel{i}(job.w{i});\n"
        f"  alignas(64) float p{i}[kBands * kTall * kTile];"
        for i in weights
    ]
    lines += [
        f"const Stored* {name} = static_cast<const Stored*>(call.operands[{name[1:]}]);"
        for name in operands
    ]
    packs = " ".join(f"panel{i}.pack(n, count);" for i in weights)
    products = "\n".join(
        f"    products(panel{i}, job.{_input(spec, i, many=True)}, job.bands, first, last, p{i});"
        for i in weights
    )
    values = {f"p{i}": f"load(p{i} + c * kTile + r)" for i in weights}
    for name in operands:
        at = "n + r" if name[0] == "v" else "at"
        values[name] = f"sparsecc::load({name} + {at}, lanes)"
    arguments = ", ".join(values[name] for name in expressions.names(spec.trees[j]))
    return f"""void tiles{j}(const ManyRows& job, int64_t begin, int64_t end) {{
  const FewRows& call = *job.call;
  const int64_t features = call.features[{spec.slots[weights[0]].start}], tasks = job.bands.tasks();
{"".join(f"  {line}{chr(10)}" for line in lines)}\
  Stored* out = static_cast<Stored*>(call.out[{j}]);
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {{
    const int64_t n = task / tasks * kTile;
    const int count = int(std::min<int64_t>(features - n, kTile));
    if (n != packed) {{ {packs} }}
    packed = n;
    const int64_t first = task % tasks * kBands, last = std::min(first + kBands, job.bands.count);
    const int64_t m = job.bands.begin(first), rows = job.bands.begin(last) - m;
{products}
    for (int64_t c = 0; c < rows; ++c)
      over_lanes(count, [&](int r, auto lanes) {{
        const int64_t at = (m + c) * features + n + r;
        sparsecc::store(out + at, sparsecc::value{j}({arguments}), lanes);
      }});
  }}
}}

"""


def _checks(spec: Spec) -> str:
    """What the generic operator cannot know: which operand has which size, and what a format needs."""
    lines = weight_formats.checks(spec.kept)
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
        BuildError: it cannot be built here, or there is no kernel for ``dtype`` or for a format.
    """
    weight_formats.check("few_rows", spec.kept, dtype)
    return operators.load("few_rows", dtype, spec.text(), source(spec, dtype), flags)
