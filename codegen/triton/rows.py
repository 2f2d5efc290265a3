"""Triton for ``sparsecc::rows``: a row for each program, in registers if it fits, else in few passes over it.

Where nothing is done to whole rows, programs take blocks of columns instead. Sums over rows are taken by each
program over ``ROWS`` rows, and then over the programs, in an order that does not change. ``run`` is in
``launch_rows.py``.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.codegen.row_schedule import Schedule, law
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.rows import Spec, Step

DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
MOST_IN_REGISTERS = 8192  # elements of a row
_STORED = {"wide": "fp32", "int8": "i8", "float8_e4m3fn": "u8"}
_REDUCTIONS = {
    "sum": "tl.sum({})",
    "mean": "divide(tl.sum({}), N)",
    "max": "row_max({})",
    "min": "row_min({})",
}
_NEUTRAL = {"max": 'float("-inf")', "min": 'float("inf")'}


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: elements of a block, warps, and rows of a program (one, but for sums over rows)."""

    block: int
    warps: int
    rows: int


def config(spec: Spec, size: int) -> Config:
    """The one to take for rows of ``size`` elements.

    Raises:
        ValueError: no kernel takes such rows.
    """
    whole = any(step.op != "let" for step in spec.steps)
    summed = any(output.summed for output in spec.outputs)
    fitting = 2 ** math.ceil(math.log2(max(size, 1)))
    if not whole:
        block = min(fitting, 512)  # sums of every output over rows stay in registers
        return Config(block, max(1, min(4, block // 128)), 64 if summed else 1)
    if any(step.op == "hadamard" for step in spec.steps):
        if size != fitting:
            raise ValueError(f"rows: hadamard needs a power of two, not rows of {size}")
        if size > MOST_IN_REGISTERS:
            raise ValueError(f"rows in Triton: hadamard of {size}, over {MOST_IN_REGISTERS}")
    if summed and size > MOST_IN_REGISTERS:
        raise ValueError(f"rows in Triton: sums over rows of {size}, over {MOST_IN_REGISTERS}")
    block = fitting if size <= MOST_IN_REGISTERS else 4096
    return Config(block, max(1, min(16, block // 256)), 16 if summed else 1)


def source(spec: Spec, size: int) -> str:
    """The Triton of one spec for rows of ``size`` elements, to be read: its law first.

    Raises:
        ValueError: no kernel takes such rows.
    """
    spec = Spec.of(spec.text())  # a valid one
    writer = _Writer(spec, size)
    body = "\n".join(f"    {line}" for line in writer.kernel())
    functions = sorted(writer.functions())
    imports = f"from sparsecc.codegen.triton.functions import {', '.join(functions)}\n\n\n"
    name = f"rows_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    return f"""# {name}: Triton, {writer.what}; float32, bfloat16 or float16, computed in float32.
{law(spec, "#")}
# where t<i>[m, n], v<i>[n] and s<i>[m] are operands, and statistics are those of row m.
# Row m of t<i> begins at m * t<i>_stride; that of v<i> and s<i> is m modulo its period.

import triton
import triton.language as tl

{imports if functions else chr(10)}@triton.jit
def kernel(
    {", ".join(pointers(spec))},
    {", ".join(integers(spec))},
    M, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LOG: tl.constexpr,
):
{body}
"""


def pointers(spec: Spec) -> list[str]:
    """The kernel's pointers, in its order: operands, then results."""
    operands = [name for kind in "tvs" for name in spec.operands(kind)]
    return [*operands, *(f"out{j}" for j in range(len(spec.outputs)))]


def integers(spec: Spec) -> list[str]:
    """Where the rows of operands lie: see the source's head."""
    strides = [f"{name}_stride" for name in spec.operands("t")]
    return strides + [f"{name}_period" for kind in "vs" for name in spec.operands(kind)]


def constants(size: int, cut: Config) -> dict[str, Any]:
    log = cut.block.bit_length() - 1
    return {"N": size, "BLOCK": cut.block, "ROWS": cut.rows, "LOG": log}


def signature(spec: Spec, dtype: torch.dtype) -> dict[str, str]:
    """The types of all arguments, for ``build``."""
    kinds = {"t": DTYPES[dtype], "v": "fp32", "s": "fp32"}
    types = {name: f"*{kinds[k]}" for k in "tvs" for name in spec.operands(k)}
    for j, output in enumerate(spec.outputs):
        types[f"out{j}"] = f"*{_STORED.get(output.dtype, DTYPES[dtype])}"
    types.update(dict.fromkeys(integers(spec), "i32"))
    return {**types, "M": "i32", **dict.fromkeys(("N", "BLOCK", "ROWS", "LOG"), "constexpr")}


class _Writer:
    """The body of the kernel of one spec."""

    def __init__(self, spec: Spec, size: int) -> None:
        self.spec = spec
        self.schedule = Schedule(spec)
        self.cut = config(spec, size)
        self.whole = any(step.op != "let" for step in spec.steps)
        self.loops = self.whole and self.cut.block < size
        self.summed = [f"out{j}" for j, output in enumerate(spec.outputs) if output.summed]
        self.what = f"rows of N <= {self.cut.block} elements"
        if not self.whole:
            self.what = "rows of N elements, in blocks of columns"
        elif self.loops:
            self.what = "rows of N elements, each in passes over it"

    def functions(self) -> set[str]:
        """What the kernel imports."""
        found: set[str] = set()
        for step in (*self.spec.steps, *self.spec.results):
            found |= expressions.functions(step.tree)
            if step.op == "mean" or any(isinstance(n, ast.Div) for n in ast.walk(step.tree)):
                found.add("divide")
            if step.op in ("max", "min"):
                found |= {f"row_{step.op}", *(["maximum", "minimum"] if self.loops else [])}
            if step.op == "hadamard":
                found.add("hadamard")
        kinds = {output.dtype for output in self.spec.outputs}
        found |= {"add_compensated"} if self.summed else set()
        found |= {"to_int8"} if "int8" in kinds else set()
        return found | ({"to_e4m3"} if "float8_e4m3fn" in kinds else set())

    def kernel(self) -> Iterator[str]:
        if self.summed:
            yield "part = tl.program_id(0).to(tl.int64)"
            for name in self.summed:
                yield f"{name}_sum = tl.zeros([BLOCK], tl.float32)"
                yield f"{name}_lost = tl.zeros([BLOCK], tl.float32)"
        else:
            yield "m = tl.program_id(0).to(tl.int64)"
        if not self.loops:
            yield from _columns("0" if self.whole else "tl.program_id(1) * BLOCK")
        if self.summed:
            yield "for m in range(part * ROWS, tl.minimum((part + 1) * ROWS, M)):"
        indent = "    " if self.summed else ""
        for line in self._row():
            yield indent + line
        for name in self.summed:
            yield f"tl.store({name} + part * N + n, {name}_sum, mask=here)"

    def _row(self) -> Iterator[str]:
        for name in self.spec.operands("s"):
            yield f"{name}_ = tl.load({name} + m % {name}_period)"
        if not self.loops:
            yield from self._loads([*self.spec.steps, *self.spec.results])
        for turn in range(self.schedule.passes):
            yield from self._scalars(turn)
            yield from self._pass(turn) if self.loops else self._at_once(turn)
        yield from self._scalars(self.schedule.passes)

    def _loads(self, steps: list[Step]) -> Iterator[str]:
        for name in self.schedule.read(steps, "t"):
            at = f"{name} + m * {name}_stride + n"
            yield f"{name}_n = tl.load({at}, mask=here, other=0.0).to(tl.float32)"
        for name in self.schedule.read(steps, "v"):
            yield f"{name}_n = tl.load({name} + m % {name}_period * N + n, mask=here, other=0.0)"

    def _scalars(self, turn: int) -> Iterator[str]:
        for step in self.schedule.scalars(turn):
            if step in self.spec.results:
                yield f"tl.store({step.name} + m, {self._stored(step)})"
            else:
                yield f"{step.name}_ = {self._text(step.tree)}"

    def _at_once(self, turn: int) -> Iterator[str]:
        """All of the row is in registers."""
        for step in self.spec.steps:
            if step.op == "let" and step.by_feature and step.level == turn:
                yield f"{step.name}_n = {self._text(step.tree)}"
        for step in self.schedule.goals(turn):
            value = self._text(step.tree)
            if step.op == "let":
                yield self._output(step)
            elif step.op == "hadamard":
                yield f"{step.name}_n = hadamard({value}, BLOCK, LOG)"
            else:
                only = f"tl.where(here, {value}, {_NEUTRAL.get(step.op, '0.0')})"
                yield f"{step.name}_ = {_REDUCTIONS[step.op].format(only)}"

    def _pass(self, turn: int) -> Iterator[str]:
        goals = self.schedule.goals(turn)
        if not goals:
            return
        for step in goals:
            if step.op != "let":
                neutral = _NEUTRAL.get(step.op, "0.0")
                yield f"{step.name}_part = tl.full([BLOCK], {neutral}, tl.float32)"
        yield "for start in range(0, N, BLOCK):"
        needed = self.schedule.needed(turn, stop=False)
        inner = [*_columns("start"), *self._loads([*needed, *goals])]
        inner += [f"{step.name}_n = {self._text(step.tree)}" for step in needed]
        for step in goals:
            value, part = self._text(step.tree), f"{step.name}_part"
            if step.op == "let":
                inner.append(self._output(step))
            elif step.op in ("max", "min"):
                only = f"tl.where(here, {value}, {_NEUTRAL[step.op]})"
                inner.append(f"{part} = {step.op}imum({part}, {only})")
            else:
                inner.append(f"{part} += tl.where(here, {value}, 0.0)")
        yield from (f"    {line}" for line in inner)
        for step in goals:
            if step.op != "let":
                yield f"{step.name}_ = {_REDUCTIONS[step.op].format(f'{step.name}_part')}"

    def _output(self, step: Step) -> str:
        if step.name in self.summed:
            sums = f"{step.name}_sum, {step.name}_lost"
            return f"{sums} = add_compensated({sums}, {self._text(step.tree)})"
        return f"tl.store({step.name} + m * N + n, {self._stored(step)}, mask=here)"

    def _stored(self, step: Step) -> str:
        """Stores convert to the pointer's own type; what rounds or has no type for it is written out."""
        dtype = self.spec.outputs[int(step.name[3:])].dtype
        wrapped = {"int8": "to_int8({})", "float8_e4m3fn": "to_e4m3({})"}.get(dtype, "{}")
        return wrapped.format(self._text(step.tree))

    def _text(self, tree: ast.expr) -> str:
        values = {"N": "N"}
        for name in expressions.names(tree):
            step = self.schedule.steps.get(name)
            element = step.by_feature if step is not None else name[0] in "tv"
            if name != "N":
                values[name] = f"{name}{'_n' if element else '_'}"
        text = expressions.to_triton(tree, values)
        return text[1:-1] if text[0] == "(" and isinstance(tree, ast.BinOp) else text


def _columns(start: str) -> list[str]:
    place = "tl.arange(0, BLOCK)" if start == "0" else f"{start} + tl.arange(0, BLOCK)"
    return [f"n = {place}", "here = n < N"]
