"""C++ for ``sparsecc::sparse_ffn``: the gate is read whole, and of up and down the rows of live neurons alone.

Neurons are cut into a fixed number of chunks, each with sums of its own that are added up in order at the end,
so that the bits do not depend on the threads (``live.h``). Where nothing selects among all neurons, a chunk
goes from gate to down without waiting for another.

Of blocks behind a router, its values are spread over neurons first (``blocks.h``); what follows is the same.

Counts of live neurons are kept for every label of a spec (:func:`counters`).
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import hashlib
import pathlib

import torch

from sparsecc.codegen.cpp import operators, weight_formats
from sparsecc.codegen.cpp.operators import FLAGS
from sparsecc.codegen.cpp.weight_formats import DTYPES, STORED, TYPES
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.formats import Format
from sparsecc.runtime.ops.sparse_ffn import MOST_ROWS, Spec

_HEADERS = (
    "sparse_ffn.h",
    "vector.h",
    "functions.h",
    "storage.h",
    "bytes.h",
    "weights.h",
    "products.h",
    "down.h",
    "select.h",
    "live.h",
)
_labels: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Counts:
    """What ran under one label.

    Attributes:
        live: live neurons, summed over all rows.
        union_live: neurons that are live for any row of a call, summed over the calls: what was read.
        neurons: of the network.
    """

    calls: int
    rows: int
    live: int
    union_live: int
    neurons: int


def counters() -> dict[str, Counts]:
    """What was counted since the last reset, by label; those that nothing ran under are there, too."""
    found = {}
    for label in sorted(_labels):
        values = (ctypes.c_int64 * len(dataclasses.fields(Counts)))()
        if operators.library("sparse_ffn").sparsecc_sparse_ffn_counts(label.encode(), values):
            found[label] = Counts(*values)
    return found


def reset_counters() -> None:
    """All counts are zero again."""
    if _labels:
        operators.library("sparse_ffn").sparsecc_sparse_ffn_reset()


def source(spec: Spec, dtype: torch.dtype = torch.float32) -> str:
    """The C++ of one spec, to be read: its law first. Label and density are no part of it.

    Args:
        dtype: of x, operands and output: one of ``weight_formats.DTYPES``.
    """
    spec = spec.source()
    name = f"sparse_ffn_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    names = _names(spec)
    headers = (*_HEADERS, "blocks.h") if spec.block else _HEADERS
    down = sum(len(form.parts) for form in spec.kept[:-1])
    read = spec.kept[:-1]
    prologue = weight_formats.prologue(read, dtype) if read else ""
    arranged = "\n".join(f"  {line}" for line in weight_formats.arranged(read))
    return f"""// {name}: {DTYPES[dtype]} on CPU, for up to {MOST_ROWS} rows m.
{_law(spec)}{weight_formats.law(spec.kept, names)}

#include <algorithm>
#include <functional>
#include <iterator>
#include <memory>
#include <type_traits>

{operators.text_of(*headers)}
namespace sparsecc {{
namespace {{

{_values(spec)}

}}  // namespace
}}  // namespace sparsecc

namespace {{

using Element = {TYPES[dtype][1]};

struct Law {{
  using Stored = sparsecc::{STORED[dtype]};
  using Weights = ::Weights<{_structs(spec, dtype)}>;
  static constexpr bool kGate = {_bool(spec.gate)}, kUp = {_bool(spec.up)}, kSelects = {_bool(spec.select)};
  static constexpr int kOperands = {_operands(spec)};
  static Vector activation(Vector p0, const Vector* v) {{ return {_activation(spec)}; }}
  static Vector after(Vector a, const Vector* v) {{ return {_call("after", "a", spec.trees[1])}; }}
  static Vector hidden(Vector a, Vector p1, const Vector* v) {{ return {_call("hidden", "", spec.trees[2])}; }}
  static void select(float* a, int64_t count) {{ {_select(spec)} }}
}};

const char* run(const SparseFfn* call) {{
{_checks(spec)}
{prologue}
{arranged}
  const None none{{}};
  const Law::Weights weights{{{_weights(spec, dtype)}}};
{_run(spec)}
  return nullptr;
}}

const WeightPart part_of[] = {{
{weight_formats.parts(spec.kept, spec.slots, names, dtype)}
}};
const SparseFfnKernel kernel = {{
    run, {TYPES[dtype][0]}, std::size(part_of), part_of, {down}, {_operands(spec)}{_block(spec)}}};

}}  // namespace

extern "C" __attribute__((visibility("default"))) const SparseFfnKernel* sparse_ffn_kernel() {{
  return &kernel;
}}
"""


def _bool(value: object) -> str:
    return str(bool(value)).lower()


def _names(spec: Spec) -> list[str]:
    """The projections that are there."""
    return [*["gate"] * spec.gate, *["up"] * spec.up, "down"]


def _law(spec: Spec) -> str:
    first, after, last = spec.activation, spec.after, spec.hidden
    select = f"{spec.select} of " if spec.select else ""
    return f"""//   y[m] = sum over i that are live for row m of h[m, i] down[i], live: a[m, i] is not 0
//   p0 = {_first(spec)}{", p1 = x up^T" if spec.up else ""}, v<j>[i] are operands
//   s = {select}{first}; a = {after.replace("a", "s") if after == "a" else f"({after})(a = s)"}; h = {last}"""


def _first(spec: Spec) -> str:
    """What p0 is."""
    if spec.block:
        return f"router[m, i / {spec.block}]"
    return "x gate^T" if spec.gate else "x"


def _run(spec: Spec) -> str:
    return (
        f"  run_blocks<Law, {spec.block}>(*call, weights);"
        if spec.block
        else "  run<Law>(*call, weights);"
    )


def _block(spec: Spec) -> str:
    return f", {spec.block}" if spec.block else ""


def _operands(spec: Spec) -> int:
    """How many there must be."""
    return max((int(name[1:]) + 1 for name in spec.vectors), default=0)


def _values(spec: Spec) -> str:
    """The expressions, for a vector of neurons."""
    functions = []
    for name, tree in zip(("activation", "after", "hidden"), spec.trees, strict=True):
        names = expressions.names(tree)
        arguments = ", ".join(f"Vector {each}" for each in names)
        value = expressions.to_cpp(tree, {each: each for each in names})
        functions.append(f"inline Vector {name}({arguments}) {{ return splat({value}); }}")
    return "\n".join(functions)


def _call(name: str, first: str, tree: ast.expr, value: str = "") -> str:
    """A call of one of the expressions, whose operands are in v; ``value`` stands for the name ``first``."""
    names = (
        value if value and each == first else f"v[{each[1:]}]" if each[0] == "v" else each
        for each in expressions.names(tree)
    )
    return f"sparsecc::{name}({', '.join(names)})"


def _activation(spec: Spec) -> str:
    """Activations as they come before a selection, or whole where there is none."""
    text = _call("activation", "p0", spec.trees[0])
    return text if spec.select else _call("after", "a", spec.trees[1], text)


def _select(spec: Spec) -> str:
    if spec.top is not None:
        return f"select_top(a, count, {spec.top});"
    if spec.gaussian is not None:
        return f"select_gaussian(a, count, {spec.gaussian!r});"
    return ""


def _down(form: Format, dtype: torch.dtype) -> str:
    """The struct of codegen/cpp/down.h."""
    if form.kind == "float":
        return f"DenseDown<{TYPES[form.parts[0].dtype or dtype][1]}>"
    if form.kind == "int8":
        return "Int8Down"
    return f"Int4Down<{form.group}, {_bool(form.zero)}>"


def _structs(spec: Spec, dtype: torch.dtype) -> str:
    read = {
        name: weight_formats.struct(form, dtype)
        for name, form in zip(_names(spec)[:-1], spec.kept, strict=False)
    }
    down = _down(spec.kept[-1], dtype)
    return f"{read.get('gate', 'None')}, {read.get('up', 'None')}, {down}"


def _weights(spec: Spec, dtype: torch.dtype) -> str:
    """The structs of the weights and what they read, from plain pointers."""
    fields = {
        name: (weight_formats.weight(form, slot, dtype), weight_formats.activations(form)[0])
        for name, form, slot in zip(_names(spec)[:-1], spec.kept, spec.slots, strict=False)
    }
    both = [part for name in ("gate", "up") for part in fields.get(name, ("{}", "none"))]
    down = weight_formats.weight(spec.kept[-1], spec.slots[-1], dtype, "call->out_size")
    return ", ".join([*both, down])


def _checks(spec: Spec) -> str:
    """What the generic operator cannot know."""
    lines = [
        f'  if (call->rows > {MOST_ROWS}) return "more than {MOST_ROWS} rows: compute all neurons";'
    ]
    if spec.select:
        lines.append('  if (call->only) return "a core beside a selection over all neurons";')
    if not spec.gate and not spec.block:
        lines.append(
            "  if (call->size != call->neurons) "
            'return "x, without a gate, has not a value for each neuron";'
        )
    lines += weight_formats.checks(spec.kept[:-1])
    lines += weight_formats.checks(spec.kept[-1:], "call->out_size", "down")
    return "\n".join(lines)


def load(
    spec: Spec, dtype: torch.dtype = torch.float32, flags: tuple[str, ...] = FLAGS
) -> pathlib.Path:
    """Make ``spec`` runnable on CPU tensors; returns its library, whose source lies beside it.

    Specs that differ in label and density alone share it.

    Args:
        dtype: of x, operands and output.
        flags: of the compiler. The kernel that was loaded last for ``spec`` and ``dtype`` is the one that runs.

    Raises:
        BuildError: it cannot be built here, or there is no kernel for ``dtype`` or for a format.
    """
    weight_formats.check("sparse_ffn", spec.kept, dtype)
    text = spec.text()
    if spec.label:
        operators.library("sparse_ffn").sparsecc_sparse_ffn_label(
            text.encode(), spec.label.encode()
        )
        _labels.add(spec.label)
    return operators.load("sparse_ffn", dtype, text, source(spec, dtype), flags)
