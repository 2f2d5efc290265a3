"""Pointwise expressions as text: ``silu(p0) * p1 + t0``. One text has a meaning in ATen, C++ and Triton.

The grammar is Python's for ``+ - * /``, unary minus, numbers, names, and calls of ``FUNCTIONS``.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.nn import functional as F


def _maximum(a: Any, b: Any) -> Any:
    if not isinstance(a, torch.Tensor):
        a, b = b, a
    return torch.maximum(a, b) if isinstance(b, torch.Tensor) else torch.clamp(a, min=b)


def _minimum(a: Any, b: Any) -> Any:
    if not isinstance(a, torch.Tensor):
        a, b = b, a
    return torch.minimum(a, b) if isinstance(b, torch.Tensor) else torch.clamp(a, max=b)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# For grammars that ask for them.
MORE_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": torch.abs,
    "exp": torch.exp,
    "round": torch.round,
    "rsqrt": torch.rsqrt,
    "sign": torch.sign,
    "sqrt": torch.sqrt,
    "maximum": _maximum,
    "minimum": _minimum,
    "clamp": lambda x, low, high: _minimum(_maximum(x, low), high),
    # x beyond a threshold, else 0: |x| > t (CATS, TEAL) and x >= t (FATReLU); NaN stays.
    "keep": lambda x, t: torch.where(x.abs() <= t, 0.0, x),
    "fatrelu": lambda x, t: torch.where(x < t, 0.0, x),
}
# Of the others: one.
ARGUMENTS: Mapping[str, int] = {"maximum": 2, "minimum": 2, "clamp": 3, "keep": 2, "fatrelu": 2}
_BINARY: Mapping[type[ast.operator], tuple[Callable[..., Any], str]] = {
    ast.Add: (operator.add, "+"),
    ast.Sub: (operator.sub, "-"),
    ast.Mult: (operator.mul, "*"),
    ast.Div: (operator.truediv, "/"),
}


def parse(text: str, more: Collection[str] = ()) -> ast.expr:
    """The tree of ``text``.

    Args:
        text: an expression.
        more: further functions: of ``MORE_FUNCTIONS``, or of one argument and the caller's own.

    Raises:
        ValueError: not of the grammar.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"expression {text!r}: {error.msg}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else ""
            known = name in FUNCTIONS or name in more
            valid = known and len(node.args) == ARGUMENTS.get(name, 1) and not node.keywords
        elif isinstance(node, ast.BinOp):
            valid = type(node.op) in _BINARY
        elif isinstance(node, ast.UnaryOp):
            valid = isinstance(node.op, ast.USub)
        elif isinstance(node, ast.Constant):
            valid = isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
        else:
            valid = isinstance(node, (ast.Name, ast.operator, ast.unaryop, ast.expr_context))
        if not valid:
            raise ValueError(f"expression {text!r}: {ast.unparse(node)!r} is not of the grammar")
    return tree


def names(tree: ast.expr) -> list[str]:
    """The operands, each once, in the order of the text."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called]
    found.sort(key=lambda n: (n.lineno, n.col_offset))
    return list(dict.fromkeys(n.id for n in found))


def evaluate(tree: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value in ATen, operation by operation as the text says."""
    if isinstance(tree, ast.Name):
        return values[tree.id]
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.UnaryOp):
        return -evaluate(tree.operand, values)
    if isinstance(tree, ast.BinOp):
        function, _ = _BINARY[type(tree.op)]
        return function(evaluate(tree.left, values), evaluate(tree.right, values))
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    function = FUNCTIONS.get(tree.func.id) or MORE_FUNCTIONS[tree.func.id]
    return function(*(evaluate(each, values) for each in tree.args))


def render(
    tree: ast.expr, values: Mapping[str, str], number: str = "{!r}", divide: str = "({} / {})"
) -> str:
    """The text of ``tree`` in a language that has C's operators, and ``FUNCTIONS`` by their names.

    Args:
        values: the operands' own text.
        number: how a number is written, as a format of a float.
        divide: how a quotient is written, as a format of both sides.
    """

    def text(node: ast.expr) -> str:
        return render(node, values, number, divide)

    if isinstance(tree, ast.Name):
        return values[tree.id]
    if isinstance(tree, ast.Constant):
        return number.format(float(tree.value))  # type: ignore[arg-type]
    if isinstance(tree, ast.UnaryOp):
        return f"(-{text(tree.operand)})"
    if isinstance(tree, ast.BinOp):
        _, symbol = _BINARY[type(tree.op)]
        sides = text(tree.left), text(tree.right)
        return divide.format(*sides) if symbol == "/" else f"({sides[0]} {symbol} {sides[1]})"
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    return f"{tree.func.id}({', '.join(map(text, tree.args))})"


def functions(tree: ast.expr) -> set[str]:
    """The names of ``FUNCTIONS`` that are called."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


def to_cpp(tree: ast.expr, values: Mapping[str, str]) -> str:
    """C++ in fp32, for one element or a vector of them; ``values`` are the operands' own C++."""
    return render(tree, values, number="{!r}f")


def to_triton(tree: ast.expr, values: Mapping[str, str]) -> str:
    """Triton for a tile in fp32; ``values`` are the operands' own Triton.

    Functions are those of ``codegen.triton.functions``. Triton's ``/`` is not rounded correctly: see there.
    """
    return render(tree, values, divide="divide({}, {})")
