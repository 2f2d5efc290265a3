"""C++ for ``sparsecc::rows``: each row is read from memory once, and its statistics are taken in the cache.

Statistics that depend on others need a later pass over the row; everything that can be had in one pass is
computed in it. What is dear and needed in several passes is kept in a buffer beside the row. Rows are dealt out
to the threads; sums over rows are taken in parts that do not depend on the number of threads.
"""

from __future__ import annotations

import ast
import hashlib
import pathlib
from collections.abc import Iterator

import torch

from sparsecc.codegen.cpp import operators
from sparsecc.codegen.cpp.operators import FLAGS
from sparsecc.codegen.row_schedule import Schedule, law
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.rows import Output, Spec, Step

DTYPES = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
_STORED = {"wide": "Float32", "int8": "Int8", "float8_e4m3fn": "Float8E4M3"}
_CODES = {"x": "kAsTensors", "wide": "kWide", "int8": "kInt8", "float8_e4m3fn": "kFloat8E4m3fn"}


def source(spec: Spec, dtype: torch.dtype = torch.float32) -> str:
    """The C++ of one spec for tensors of ``dtype``, to be read: its law first.

    Raises:
        ValueError: no kernel reads tensors of this dtype.
    """
    if dtype not in DTYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"rows: tensors of {dtype} have no kernel; {known} have one")
    spec = Spec.of(spec.text())  # a valid one
    name = f"rows_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    kinds = ", ".join(f"{{{_CODES[o.dtype]}, {_shape(o, s)}}}" for o, s in _outputs(spec))
    counts = ", ".join(str(len(spec.operands(kind))) for kind in "tvs")
    return f"""// {name}: {str(dtype).removeprefix("torch.")} on CPU, for any number of rows m, and N features.
{law(spec, "//")}
// where t<i>[m, n], v<i>[n] and s<i>[m] are operands, and statistics are those of row m.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

{operators.text_of("rows.h", "vector.h", "functions.h", "storage.h", "statistics.h")}
namespace sparsecc {{
namespace {{

using Element = {DTYPES[dtype]};

{_Writer(spec).rows()}
{_run(spec)}

const RowsOutput outputs[] = {{{kinds}}};
const RowsKernel kernel = {{run, {counts}, {len(spec.outputs)}, outputs}};

}}  // namespace
}}  // namespace sparsecc

extern "C" __attribute__((visibility("default"))) const RowsKernel* rows_kernel() {{
  return &sparsecc::kernel;
}}
"""


def _outputs(spec: Spec) -> Iterator[tuple[Output, Step]]:
    return zip(spec.outputs, spec.results, strict=True)


def _shape(output: Output, step: Step) -> str:
    if output.summed:
        return "kSummed"
    return "kElements" if step.by_feature else "kScalars"


class _Writer:
    """The function that computes some rows of one spec."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.schedule = Schedule(spec)
        self.summed = [j for j, output in enumerate(spec.outputs) if output.summed]

    def rows(self) -> str:
        whole = any(step.op != "let" for step in self.spec.steps)
        by_feature = all(step.by_feature for step in self.spec.results)
        if self.summed and by_feature and not whole:
            return self._together()
        lines = ["void rows(const Rows& call, int64_t begin, int64_t end, float* sums) {"]
        lines.append("  const int64_t size = call.size;")
        kept = self.schedule.kept
        if kept:
            lines.append(f"  std::vector<float> buffer({len(kept)} * size);")
        for i, name in enumerate(kept):
            lines.append(f"  float* const kept_{name} = buffer.data() + {i} * size;")
        lines.append("  for (int64_t m = begin; m < end; ++m) {")
        lines += [f"    {line}" for line in self._operands()]
        for turn in range(self.schedule.passes):
            lines += [f"    {line}" for line in (*self._scalars(turn), *self._pass(turn))]
        lines += [f"    {line}" for line in self._scalars(self.schedule.passes)]
        lines += ["  }", "}"]
        return "\n".join(lines)

    def _together(self) -> str:
        """Several rows at a time: sums over rows are read and written once for all of them."""
        lines = ["void rows(const Rows& call, int64_t begin, int64_t end, float* sums) {"]
        lines += ["  const int64_t size = call.size;"]
        lines += [f"  float* out{j} = sums + {i} * size;" for i, j in enumerate(self.summed)]
        lines += ["  for (int64_t from = begin; from < end; from += kTogether) {"]
        lines += ["    const int count = std::min<int64_t>(end - from, kTogether);"]
        for kind, operands in (("t", "tensors"), ("v", "vectors"), ("s", "scalars")):
            element = "const Element" if kind == "t" else "const float"
            for i, name in enumerate(self.spec.operands(kind)):
                at = f"call.{operands}[{i}], from, count"
                lines.append(f"    const Several<{element}> {name}_rows({at});")
        lines += ["    each(size, [&](int64_t n, auto lanes, auto u) {"]
        lines += [f"      Vector out{j}_n = load(out{j} + n, lanes);" for j in self.summed]
        lines += ["      for (int i = 0; i < count; ++i) {"]
        inner = [f"const Element* {name} = {name}_rows.at[i];" for name in self.spec.operands("t")]
        inner += [f"const float* {name} = {name}_rows.at[i];" for name in self.spec.operands("v")]
        inner += [f"const float {name} = *{name}_rows.at[i];" for name in self.spec.operands("s")]
        for j, output in enumerate(self.spec.outputs):
            if not output.summed:
                stored = _STORED.get(output.dtype, "Element")
                at = f"static_cast<{stored}*>(call.out[{j}]) + (from + i) * size"
                inner.append(f"{stored}* out{j} = {at};")
        inner += [*self._scalars(0), *self._body(0, self.schedule.goals(0), "out{}_n += {};")]
        lines += [f"        {line}" for line in inner]
        lines += ["      }"]
        lines += [f"      store(out{j} + n, out{j}_n, lanes);" for j in self.summed]
        lines += ["    }, [] {});", "  }", "}"]
        return "\n".join(lines)

    def _operands(self) -> Iterator[str]:
        for name in self.spec.operands("t"):
            yield f"const Element* {name} = row<Element>(call.tensors[{name[1:]}], m);"
        for name in self.spec.operands("v"):
            yield f"const float* {name} = row<const float>(call.vectors[{name[1:]}], m);"
        for name in self.spec.operands("s"):
            yield f"const float {name} = *row<const float>(call.scalars[{name[1:]}], m);"
        for j, (output, step) in enumerate(_outputs(self.spec)):
            stored = _STORED.get(output.dtype, "Element")
            size = "size" if step.by_feature else "1"
            if not output.summed:
                yield f"{stored}* out{j} = static_cast<{stored}*>(call.out[{j}]) + m * {size};"
        for i, j in enumerate(self.summed):
            yield f"float* out{j} = sums + {i} * size;"

    def _scalars(self, turn: int) -> Iterator[str]:
        for step in self.schedule.scalars(turn):
            value = self._text(step.tree, "")
            if step in self.spec.results:
                yield f"store_one({step.name}, {value});"
            else:
                yield f"const float {step.name}_ = {value};"

    def _pass(self, turn: int) -> Iterator[str]:
        goals = self.schedule.goals(turn)
        if not goals:
            return
        statistics = [s for s in goals if s.op not in ("let", "hadamard")]
        for step in statistics:
            kind = {"max": "Max", "min": "Min"}.get(step.op, "Sum")
            yield f"{kind} {step.name}_part;"
        yield "each(size, [&](int64_t n, auto lanes, auto u) {"
        yield from (f"  {line}" for line in self._body(turn, goals))
        put_away = " ".join(f"{step.name}_part.put_away();" for step in statistics)
        yield f"}}, [&] {{ {put_away} }});" if put_away else "}, [] {});"
        for step in goals:
            if step in statistics:
                share = " / float(size)" if step.op == "mean" else ""
                yield f"const float {step.name}_ = {step.name}_part.value(){share};"
            elif step.op == "hadamard":
                yield f"hadamard(kept_{step.name}, size);"

    def _body(
        self,
        turn: int,
        goals: list[Step],
        add: str = "store(out{0} + n, load(out{0} + n, lanes) + ({1}), lanes);",
    ) -> Iterator[str]:
        needed = self.schedule.needed(turn)
        computed = [s for s in needed if not self.schedule.is_kept(s, turn)]
        for kind in "tv":
            for name in self.schedule.read([*computed, *goals], kind):
                yield f"const Vector {name}_n = load({name} + n, lanes);"
        for step in needed:
            if step not in computed:
                yield f"const Vector {step.name}_n = load(kept_{step.name} + n, lanes);"
                continue
            yield f"const Vector {step.name}_n = {self._text(step.tree, '_n')};"
            if step.name in self.schedule.kept:
                yield f"store(kept_{step.name} + n, {step.name}_n, lanes);"
        for step in goals:
            value = self._text(step.tree, "_n")
            if step.op == "hadamard":
                yield f"store(kept_{step.name} + n, {value}, lanes);"
            elif step.op != "let":
                yield f"{step.name}_part.add({value}, lanes, u);"
            elif step.name in {f"out{j}" for j in self.summed}:
                yield add.format(step.name[3:], value)
            else:
                yield f"store({step.name} + n, {value}, lanes);"

    def _text(self, tree: ast.expr, element: str) -> str:
        values = {"N": "float(size)"}
        for name in expressions.names(tree):
            step = self.schedule.steps.get(name)
            if step is not None:
                values[name] = f"{name}{element if step.by_feature else '_'}"
            elif name[0] in "tv" and name != "N":
                values[name] = f"{name}{element}"
            elif name != "N":
                values[name] = name
        text = expressions.to_cpp(tree, values)
        return text[1:-1] if isinstance(tree, ast.BinOp) else text  # without needless brackets


def _run(spec: Spec) -> str:
    """The function that deals the rows out to the threads."""
    empty = ""
    if any(step.op in ("max", "min") for step in spec.steps):
        empty = '  if (call->size < 1) return "a row without elements has no maximum";\n'
    if any(step.op == "hadamard" for step in spec.steps):
        empty += (
            "  if (call->size < 1 || (call->size & (call->size - 1)))\n"
            '    return "hadamard needs rows of a power of two of elements";\n'
        )
    summed = [j for j, output in enumerate(spec.outputs) if output.summed]
    if not summed:
        return f"""void run_rows(int64_t begin, int64_t end, void* context) {{
  rows(*static_cast<const Rows*>(context), begin, end, nullptr);
}}

const char* run(const Rows* call) {{
{empty}  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call->size));
  call->parallel(call->rows, grain, run_rows, const_cast<Rows*>(call));
  return nullptr;
}}"""
    copies = "\n".join(
        f"  std::copy_n(sums + {i} * size, size, static_cast<float*>(call->out[{j}]));"
        for i, j in enumerate(summed)
    )
    return f"""struct Blocks {{
  const Rows* call;
  int64_t rows;  // of each block
  float* sums;   // [kBlocks, {len(summed)}, size]
}};

void run_blocks(int64_t begin, int64_t end, void* context) {{
  const Blocks& blocks = *static_cast<const Blocks*>(context);
  const int64_t count = {len(summed)} * blocks.call->size;
  std::vector<float> some(count);
  for (int64_t b = begin; b < end; ++b) {{
    const int64_t last = std::min(blocks.call->rows, (b + 1) * blocks.rows);
    for (int64_t m = b * blocks.rows; m < last; m += kSummedRows) {{
      std::fill(some.begin(), some.end(), 0.0f);
      rows(*blocks.call, m, std::min(last, m + kSummedRows), some.data());
      add_to(blocks.sums + b * count, some.data(), count);
    }}
  }}
}}

const char* run(const Rows* call) {{
{empty}  const int64_t size = call->size, count = {len(summed)} * size;
  std::vector<float> all(kBlocks * count);
  float* sums = all.data();
  Blocks blocks{{call, (call->rows + kBlocks - 1) / kBlocks, sums}};
  call->parallel(kBlocks, call->rows * size < kGrain ? kBlocks : 1, run_blocks, &blocks);
  for (int64_t b = 1; b < kBlocks; ++b) add_to(sums, sums + b * count, count);
{copies}
  return nullptr;
}}"""


def load(
    spec: Spec, dtype: torch.dtype = torch.float32, flags: tuple[str, ...] = FLAGS
) -> pathlib.Path:
    """Make ``spec`` runnable on CPU tensors of ``dtype``; returns its library, whose source lies beside it.

    Args:
        spec: what to compute.
        dtype: of the tensors: one of ``DTYPES``.
        flags: of the compiler. The kernel that was loaded last for ``spec`` and ``dtype`` is the one that runs.

    Raises:
        BuildError: it cannot be built here.
        ValueError: no kernel reads tensors of this dtype.
    """
    return operators.load("rows", dtype, spec.text(), source(spec, dtype), flags)
