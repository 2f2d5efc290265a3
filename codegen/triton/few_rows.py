"""Triton for ``sparsecc::few_rows``: every weight is read once, whatever comes before and after.

Each program makes a tile of features for all rows. One to four rows have sums of their own, as matrix units
would compute sixteen; more rows are one tile of sixteen for ``tl.dot``. Sums are in float32. ``run`` is in
``launch.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.errors import BuildError
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.few_rows import Spec

MOST_APART = 4  # rows with sums of their own
MOST_ROWS = 16  # the least that ``tl.dot`` takes, and all that a kernel computes
DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
_SUMS = 64  # of a thread, at most: accumulators must fit the registers


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: features and products along k of a tile, warps, and tiles loaded ahead."""

    block_n: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_n}x{self.block_k}, {self.warps} warps, {self.stages} stages"


def configs(spec: Spec, rows: int, size: int, dtype: torch.dtype) -> list[Config]:
    """Those worth measuring, the one to take unmeasured first."""
    products = max(len(spec.weights(j)) for j in range(len(spec.outputs)))
    if rows <= MOST_APART:
        each = max(_SUMS // 2 ** math.ceil(math.log2(products * rows)), 1)
        tile = 32 * min(each, 16)  # of a warp
        cuts = [(4, 4, 1), (8, 4, 1), (4, 8, 1), (1, 4, 1)]
        if spec.norm != "layer":  # there, ptxas was seen to take 32 registers and spill the rest
            cuts.append((4, 4, 3))
        found = [Config(n, max(tile * warps // n, 32), warps, stages) for n, warps, stages in cuts]
    elif dtype is torch.float32:
        found = [Config(32, 32, 4, 2), Config(16, 32, 4, 2), Config(32, 16, 4, 3)]
    else:
        cut = (32, 128), (16, 128), (16, 256), (64, 64)
        found = [Config(n, k, 4, 2) for n, k in cut]
    most = max(16, 2 ** math.ceil(math.log2(max(size, 1))))  # no wider than the rows are
    narrow = [Config(c.block_n, min(c.block_k, most), c.warps, c.stages) for c in found]
    return list(dict.fromkeys(narrow))


def check_formats(spec: Spec) -> None:
    """Whether kernels read the weights of ``spec``.

    Raises:
        BuildError: one is not dense.
    """
    if not spec.plain:
        kept = ", ".join(form.name for form in spec.kept)
        raise BuildError(f"few_rows in Triton: weights are {kept}; kernels read dense ones")


def source(spec: Spec, rows: int) -> str:
    """The Triton of one spec for ``rows`` rows, to be read: its law first.

    Raises:
        ValueError: more rows than a kernel computes.
        BuildError: a weight is in a format that no kernel here reads.
    """
    check_formats(spec)
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"few_rows in Triton: 1 to {MOST_ROWS} rows, not {rows}")
    name = f"few_rows_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    outputs = range(len(spec.outputs))
    apart = rows <= MOST_APART
    what = f"M = {rows}" if apart else f"{MOST_APART} < M <= {MOST_ROWS}"
    law = "\n".join(f"#   out{j}[m, n] = {text}" for j, text in enumerate(spec.outputs))
    sizes = "\n".join(
        f"#   out{j} [M, N{j}], of {', '.join(f'W{i} [N{j}, K]' for i in spec.weights(j))}"
        for j in outputs
    )
    functions = {"divide"} if any("/" in text for text in spec.outputs) else set()
    functions.update(*(expressions.functions(tree) for tree in spec.trees))
    imports = ""
    if functions:
        names = ", ".join(sorted(functions))
        imports += f"from sparsecc.codegen.triton.functions import {names}\n"
    norm = {"none": "", "rms": "scale_of", "layer": "moments"}[spec.norm]
    if norm:
        imports += f"from sparsecc.codegen.triton.norms import {norm}\n"
    body = _apart if apart else _together
    blocks = "".join(_expression(spec, j) + _block(spec, j, body(spec, j, rows)) for j in outputs)
    return f"""# {name}: Triton, rows {what}; float32, bfloat16 or float16, with sums in float32.
{law}
# where p<i>[m, n] = sum over k of y[m, k] W<i>[n, k], y = {spec.norm_law},
# v<i>[n] and t<i>[m, n] are operands; x is [M, K].
{sizes}

import triton
import triton.language as tl

{imports}{"" if not imports else chr(10)}
{blocks}{_kernel(spec)}"""


def _used(spec: Spec, j: int) -> list[str]:
    """The pointers that output ``j`` reads, besides x."""
    return [f"w{i}" for i in spec.weights(j)] + [f"o{name[1:]}" for name in spec.operands(j)]


def pointers(spec: Spec) -> list[str]:
    """The kernel's pointers, in its order: x, weights w<i>, operands o<i>, results out<j>."""
    found = {name for j in range(len(spec.outputs)) for name in _used(spec, j)}
    inputs = sorted(found, key=lambda name: (name[0] == "o", int(name[1:])))
    return ["x", *inputs, *(f"out{j}" for j in range(len(spec.outputs)))]


def constants(
    spec: Spec, rows: int, size: int, features: tuple[int, ...], config: Config
) -> dict[str, Any]:
    """The kernel's constants; ``features`` are those of each output."""
    sizes = {f"N{j}": n for j, n in enumerate(features)}
    cut = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "STAGES": config.stages}
    return {"M": rows, "K": size, **sizes, **cut}


def signature(spec: Spec, dtype: torch.dtype) -> dict[str, str]:
    """The types of all arguments, for ``build``."""
    names = constants(spec, 1, 1, (1,) * len(spec.outputs), Config(1, 1, 1, 1))
    types = dict.fromkeys(pointers(spec), f"*{DTYPES[dtype]}")
    return {**types, **dict.fromkeys(names, "constexpr")}


# ---- the text ----------------------------------------------------------------------------------------


def _expression(spec: Spec, j: int) -> str:
    names = expressions.names(spec.trees[j])
    text = expressions.to_triton(spec.trees[j], {name: name for name in names})
    return f"@triton.jit\ndef expression{j}({', '.join(names)}):\n    return {text}\n\n\n"


_CUT = "BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,"


def _block(spec: Spec, j: int, body: list[str]) -> str:
    """The function that makes one tile of an output."""
    lines = "\n".join("    " + line if line else "" for line in body)
    return f"""@triton.jit
def block{j}(
    block, x, {", ".join(_used(spec, j))}, out,
    M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    {_CUT}
):
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    first = n[:, None] * K
{lines}


"""


def _kernel(spec: Spec) -> str:
    """One after the other, each output has as many programs as it has tiles."""
    outputs = range(len(spec.outputs))
    sizes = ", ".join(f"N{j}: tl.constexpr" for j in outputs)
    lines = []
    for j in outputs:
        begin = "block" if j == 0 else f"block - end{j - 1}"
        call = (
            f"block{j}({begin}, x, {', '.join(_used(spec, j))}, out{j}, "
            f"M, K, N{j}, BLOCK_N, BLOCK_K, STAGES)"
        )
        end = f"end{j} = {'' if j == 0 else f'end{j - 1} + '}tl.cdiv(N{j}, BLOCK_N)"
        if len(outputs) == 1:
            lines = [call]
        elif j == outputs[-1]:
            lines += ["else:", "    " + call]
        else:
            lines.insert(j, end)
            lines += [f"{'if' if j == 0 else 'elif'} block < end{j}:", "    " + call]
    body = "\n".join("    " + line for line in lines)
    return f"""@triton.jit
def kernel(
    {", ".join(pointers(spec))},
    M: tl.constexpr, K: tl.constexpr, {sizes},
    {_CUT}
):
    block = tl.program_id(0).to(tl.int64)
{body}
"""


def _apart(spec: Spec, j: int, rows: int) -> list[str]:
    """A tile where each row has sums of its own."""
    weights, each = spec.weights(j), range(rows)
    vectors = [name for name in spec.operands(j) if name[0] == "v"]
    tensors = [name for name in spec.operands(j) if name[0] == "t"]
    eps, names = spec.float_eps, ", ".join(expressions.names(spec.trees[j]))
    rms, layer = spec.norm == "rms", spec.norm == "layer"
    lines = [f"x{m} = x + {m} * K" for m in each]
    if layer:
        lines += [f"mean{m}, scale{m} = moments(x{m}, 1, K, {eps!r}, 1, BLOCK_K)" for m in each]
    if rms:
        lines += [f"squares{m} = tl.zeros([BLOCK_K], tl.float32)" for m in each]
    lines += [
        f"sums{i}_{m} = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)" for i in weights for m in each
    ]
    lines += ["for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):"]
    loop = [*_TILE]
    for m in each:
        loop += [f"row{m} = tl.load(x{m} + k, mask=k < K, other=0.0).to(tl.float32)"]
        if rms:
            loop += [f"squares{m} += row{m} * row{m}"]
        if layer:
            loop += [f"row{m} = (row{m} - mean{m}) * scale{m}"]
    for i in weights:
        loop += [f"weight{i} = {_weight(i)}.to(tl.float32)"]
        loop += [f"sums{i}_{m} += weight{i} * row{m}[None, :]" for m in each]
    lines += ["    " + line for line in loop]
    lines += [f"{v} = {_vector(v)}" for v in vectors]
    for m in each:
        if rms:
            lines += [f"scale{m} = scale_of(tl.sum(squares{m}, axis=0), K, {eps!r})"]
        scale = f" * scale{m}" if rms else ""
        lines += [f"p{i} = tl.sum(sums{i}_{m}, axis=1){scale}" for i in weights]
        at = f"{m} * N + n"
        lines += [
            f"{t} = tl.load(o{t[1:]} + {at}, mask=inside, other=0.0).to(tl.float32)"
            for t in tensors
        ]
        lines += [f"tl.store(out + {at}, expression{j}({names}), mask=inside)"]
    return lines


def _together(spec: Spec, j: int, rows: int) -> list[str]:
    """A tile where all rows are one operand of a matrix product."""
    weights = spec.weights(j)
    eps, names = spec.float_eps, ", ".join(expressions.names(spec.trees[j]))
    rms, layer = spec.norm == "rms", spec.norm == "layer"
    lines = [
        f"m = tl.arange(0, {MOST_ROWS}).to(tl.int64)",
        "rows = (m < M)[:, None]",
    ]
    if layer:
        lines += [f"mean, scale = moments(x, M, K, {eps!r}, {MOST_ROWS}, BLOCK_K)"]
    if rms:
        lines += [f"squares = tl.zeros([{MOST_ROWS}, BLOCK_K], tl.float32)"]
    lines += [f"sums{i} = tl.zeros([{MOST_ROWS}, BLOCK_N], tl.float32)" for i in weights]
    lines += ["for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):"]
    place = "x + m[:, None] * K + k[None, :]"
    loop = [*_TILE, f"row = tl.load({place}, mask=rows & (k < K)[None, :], other=0.0)"]
    if rms:
        loop += ["wide = row.to(tl.float32)", "squares += wide * wide"]
    if layer:  # rounded to the weights' type, as ATen's norm is
        loop += [
            "wide = (row.to(tl.float32) - mean[:, None]) * scale[:, None]",
            "row = wide.to(x.dtype.element_ty)",
        ]
    for i in weights:
        loop += [
            f"weight{i} = {_weight(i)}",
            f'sums{i} = tl.dot(row, tl.trans(weight{i}), sums{i}, input_precision="ieee")',
        ]
    lines += ["    " + line for line in loop]
    if rms:
        lines += [f"scale = scale_of(tl.sum(squares, axis=1), K, {eps!r})"]
    lines += [f"p{i} = sums{i}{' * scale[:, None]' if rms else ''}" for i in weights]
    lines += ["at = m[:, None] * N + n[None, :]", "tile = rows & inside[None, :]"]
    for name in spec.operands(j):
        if name[0] == "v":
            lines += [f"{name} = {_vector(name)}[None, :]"]
        else:
            load = f"tl.load(o{name[1:]} + at, mask=tile, other=0.0).to(tl.float32)"
            lines += [f"{name} = {load}"]
    return [*lines, f"tl.store(out + at, expression{j}({names}), mask=tile)"]


_TILE = ["k = start + tl.arange(0, BLOCK_K)", "tile = inside[:, None] & (k < K)[None, :]"]


def _weight(i: int) -> str:
    return f"tl.load(w{i} + first + k[None, :], mask=tile, other=0.0)"


def _vector(name: str) -> str:
    return f"tl.load(o{name[1:]} + n, mask=inside, other=0.0).to(tl.float32)"
