"""``sparsecc::rows``: statistics over the last axis and pointwise expressions, in few passes over each row.

Norms with what follows them (quantization), activations with statistics of their own and rational ones, and the
Walsh–Hadamard transform are of this form: a row is read, kept in cache while its statistics are taken, and what
comes of it is written once.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.define import define

DTYPES = ("x", "wide", "int8", "float8_e4m3fn")
_OPERAND = re.compile(r"[tvs](0|[1-9][0-9]*)")
_RESERVED = re.compile(r"([tvs]|out|row)[0-9]+")
_NAME = re.compile(r"[a-z][a-z_0-9]*")


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The Walsh–Hadamard transform of each row, not scaled: ``H(H(x)) = N x``.

    Args:
        x: ``[..., N]``.

    Raises:
        ValueError: N is no power of two.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"rows: hadamard needs a power of two, not rows of {size}")
    width = 1
    while width < size:
        a, b = x.unflatten(-1, (size // (2 * width), 2, width)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        width *= 2
    return x


# Of a row, each with the axis kept.
REDUCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "max": lambda x: x.amax(-1, keepdim=True),
    "min": lambda x: x.amin(-1, keepdim=True),
}
_OVER_ROWS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **REDUCTIONS,
    "hadamard": hadamard,
}
_FUNCTIONS = (*expressions.MORE_FUNCTIONS, *_OVER_ROWS)


@dataclass(frozen=True)
class Output:
    """One result.

    Attributes:
        text: an expression over operands and statements. What does not vary within a row is ``[..., 1]``.
        dtype: "x" (that of the tensors), "wide" (that of the arithmetic: float32 for half precision),
            "int8" (of whole numbers within its range: the text rounds and clamps) or "float8_e4m3fn"
            (rounded to even; the text clamps to 448, beyond which PyTorch's versions differ).
        summed: over all rows: the result is ``[N]``, always "wide".
    """

    text: str
    dtype: str = "x"
    summed: bool = False


@dataclass(frozen=True)
class Step:
    """``name = op(tree)``, where the tree is pointwise and op is "let" or works on a whole row.

    Attributes:
        by_row, by_feature: whether the value differs from row to row, and within a row.
        level: how many passes over the row must be done before the value is to be had.
    """

    name: str
    op: str
    tree: ast.expr
    by_row: bool
    by_feature: bool
    level: int


@dataclass(frozen=True)
class Spec:
    """What one kernel computes, row by row.

    The operands are t0, … (tensors ``[..., N]``), v0, … (vectors over features) and s0, … (scalars of a row);
    ``N`` is the number of features. Statements and outputs are expressions
    (:mod:`sparsecc.runtime.ops.expressions`) with, in addition, ``sum``, ``mean``, ``max``, ``min`` over a row
    and ``hadamard`` of a row.

    Attributes:
        statements: ``"name = expression"`` each, over operands and the names before.
        outputs: the results.
    """

    statements: tuple[str, ...]
    outputs: tuple[Output, ...]

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Spec:
        """The spec of a text.

        Raises:
            ValueError: it is none.
        """
        try:
            data = json.loads(text)
            outputs = tuple(Output(**each) for each in data["outputs"])
            spec = cls(tuple(data["statements"]), outputs)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"rows: {text!r} is no spec") from error
        for output in spec.outputs:
            if output.dtype not in DTYPES:
                raise ValueError(
                    f"rows: dtype {output.dtype!r} of {output.text!r} is none of {', '.join(DTYPES)}"
                )
        for output, step in zip(spec.outputs, spec.results, strict=True):
            if not step.by_row:
                raise ValueError(f"rows: output {output.text!r} is the same for every row")
            if output.summed and (output.dtype != "wide" or not step.by_feature):
                raise ValueError(f'rows: sum {output.text!r} must be "wide" and vary within a row')
        if not spec.operands("t"):
            raise ValueError("rows: no tensor is read; the first one, t0, gives the shape")
        return spec

    @functools.cached_property
    def _program(self) -> tuple[list[Step], list[Step]]:
        scope = _Scope()
        for statement in self.statements:
            name, equals, text = statement.partition("=")
            name = name.strip()
            if not equals or not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
                raise ValueError(f"rows: {statement!r} is no `name = expression`")
            if name in scope.known:
                raise ValueError(f"rows: {statement!r} gives a name a second time")
            scope.statement(name, text)
        results = [scope.output(f"out{j}", output.text) for j, output in enumerate(self.outputs)]
        if not results or len(set(self.outputs)) < len(self.outputs):
            raise ValueError("rows: no output, or one twice")
        return [step for step in scope.steps if step not in results], results

    @property
    def steps(self) -> list[Step]:
        """The statements, with every operation on a whole row as one of its own."""
        return self._program[0]

    @property
    def results(self) -> list[Step]:
        """The outputs, which are pointwise over operands and steps."""
        return self._program[1]

    def operands(self, kind: str) -> list[str]:
        """The names of a kind ("t", "v" or "s") up to the last one that is read."""
        read = {name for s in (*self.steps, *self.results) for name in expressions.names(s.tree)}
        found = [int(name[1:]) for name in read if _OPERAND.fullmatch(name) and name[0] == kind]
        return [f"{kind}{i}" for i in range(max(found, default=-1) + 1)]


class _Scope:
    """The names so far, as statements add to them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.known: dict[str, Step] = {}

    def statement(self, name: str, text: str) -> Step:
        tree = expressions.parse(text.strip(), _FUNCTIONS)
        if isinstance(tree, ast.Name):
            raise ValueError(f"rows: {name!r} is another name of {tree.id!r}")
        function = tree.func if isinstance(tree, ast.Call) else None
        if isinstance(function, ast.Name) and function.id in _OVER_ROWS:  # needs no name of its own
            assert isinstance(tree, ast.Call)
            return self._step(name, function.id, self._pointwise(tree.args[0]))
        return self._step(name, "let", self._pointwise(tree))

    def output(self, name: str, text: str) -> Step:
        tree = expressions.parse(text, _FUNCTIONS)
        if isinstance(tree, ast.Name) and tree.id not in self.known:
            raise ValueError(f"rows: output {text!r} is no result")
        return self._step(name, "let", self._pointwise(tree))

    def _pointwise(self, tree: ast.expr) -> ast.expr:
        """``tree`` with every operation on a whole row as a name, whose step is added."""
        scope = self

        class Lift(ast.NodeTransformer):
            def visit_Call(self, node: ast.Call) -> ast.expr:
                assert isinstance(node.func, ast.Name)
                node.args = [self.visit(each) for each in node.args]
                if node.func.id not in _OVER_ROWS:
                    return node
                name = f"row{len(scope.steps)}"
                scope._step(name, node.func.id, node.args[0])
                return ast.copy_location(ast.Name(name, ast.Load()), node)

        result: ast.expr = Lift().visit(tree)
        return result

    def _step(self, name: str, op: str, tree: ast.expr) -> Step:
        by_row = by_feature = False
        level = 0
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and not set(expressions.names(call)) - {"N"}:
                raise ValueError(f"rows: {ast.unparse(call)!r} is a function of numbers alone")
        for operand in expressions.names(tree):
            if _OPERAND.fullmatch(operand):
                by_row |= operand[0] in "ts"
                by_feature |= operand[0] in "tv"
            elif operand in self.known:
                step = self.known[operand]
                by_row, by_feature = by_row | step.by_row, by_feature | step.by_feature
                level = max(level, step.level)
            elif operand != "N":
                raise ValueError(f"rows: {operand!r} in {ast.unparse(tree)!r} is not known there")
        if op != "let":
            if not (by_row and by_feature):
                what = f"{op}({ast.unparse(tree)})"
                raise ValueError(f"rows: the operand of {what!r} is not one value for each element")
            by_feature, level = op == "hadamard", level + 1
        step = Step(name, op, tree, by_row, by_feature, level)
        self.steps.append(step)
        self.known[name] = step
        return step


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for tensors of ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def result_dtype(output: Output, dtype: torch.dtype) -> torch.dtype:
    fixed = {"x": dtype, "wide": wide(dtype)}
    return fixed.get(output.dtype) or getattr(torch, output.dtype)


def result_shape(output: Output, step: Step, shape: Sequence[int]) -> tuple[int, ...]:
    if output.summed:
        return (shape[-1],)
    return tuple(shape) if step.by_feature else (*shape[:-1], 1)


def meaning(
    tensors: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    scalars: Sequence[torch.Tensor],
    kernel: str,
) -> list[torch.Tensor]:
    """The operator in ATen; half precision is computed in float32.

    Args:
        tensors: ``[..., N]`` each, of one shape and one floating dtype.
        vectors: ``[N]`` each, or more of the tensors' last axes (``[G, N]`` for rows of G kinds).
        scalars: ``[1]`` each, or the tensors' last axes but the last (``[G, 1]``), or all of them.
        kernel: the text of a :class:`Spec`.

    Returns:
        For each output ``[..., N]``, ``[..., 1]``, or ``[N]`` if summed.
    """
    spec = Spec.of(kernel)
    shape, dtype = tensors[0].shape, tensors[0].dtype
    values: dict[str, object] = {"N": shape[-1]}
    for kind, operands in zip("tvs", (tensors, vectors, scalars), strict=True):
        for i, operand in enumerate(operands):
            values[f"{kind}{i}"] = operand.to(wide(dtype))
    for step in spec.steps:
        value = expressions.evaluate(step.tree, values)
        values[step.name] = value if step.op == "let" else _OVER_ROWS[step.op](value.expand(shape))
    results = []
    for output, step in zip(spec.outputs, spec.results, strict=True):
        value = expressions.evaluate(step.tree, values)
        value = value.expand(*shape[:-1], shape[-1] if step.by_feature else 1)
        if output.summed:
            value = value.reshape(shape[:-1].numel(), shape[-1]).sum(0)
        results.append(value.to(result_dtype(output, dtype)).contiguous())
    return results


def _shapes(
    tensors: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    scalars: Sequence[torch.Tensor],
    kernel: str,
) -> list[torch.Tensor]:
    del vectors, scalars
    spec, x = Spec.of(kernel), tensors[0]
    return [
        x.new_empty(result_shape(output, step, x.shape), dtype=result_dtype(output, x.dtype))
        for output, step in zip(spec.outputs, spec.results, strict=True)
    ]


_SIGNATURE = "(Tensor[] tensors, Tensor[] vectors, Tensor[] scalars, str kernel) -> Tensor[]"
# The second runs by a generated kernel, which on CPU ``codegen.cpp.rows.load`` must have loaded.
rows, rows_native = define("rows", _SIGNATURE, meaning, _shapes)
