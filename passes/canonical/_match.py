"""What raising passes share: arithmetic seen through its spellings, scalars, roots, means.

A matcher reads data flow backwards from a root. It never asks how a product was spelled:
``mul.Tensor`` with a scalar, ``mul.Scalar``, Python's ``operator.mul`` on a symbolic float and
``div`` by the inverse are one thing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.sizes import same_shape

aten = torch.ops.aten

_BINARY: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    operator.add: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    operator.sub: "sub",
    aten.rsub.Tensor: "rsub",
    aten.rsub.Scalar: "rsub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    operator.mul: "mul",
    aten.multiply.Tensor: "mul",
    aten.multiply.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.div.Tensor_mode: "div",
    aten.true_divide.Tensor: "div",
    aten.true_divide.Scalar: "div",
    operator.truediv: "div",
}
_CONSTANTS = frozenset(
    {torch.tensor, torch.as_tensor, torch.scalar_tensor, aten.scalar_tensor.default}
)
_CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten.type_as.default,
        aten._to_copy.default,
    }
)


# ---- tensors and arguments -----------------------------------------------------------------------


def is_tensor(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), torch.Tensor)


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument ``name`` of an ATen call, by position, by keyword, or the schema's default."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.kwargs.get(name, default)
    for index, formal in enumerate(node.target._schema.arguments):
        if formal.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, formal.default_value)
    return default


def is_vector(arg: Any, size: Any) -> bool:
    """Whether ``arg`` has the shape [size]."""
    return is_tensor(arg) and same_shape(arg.meta["val"].shape, [size])


def is_last_dim(dims: Any, rank: int) -> bool:
    """Whether ``dims`` names exactly the last of ``rank`` dimensions."""
    dims = [dims] if isinstance(dims, int) else dims
    return (
        isinstance(dims, (list, tuple))
        and len(dims) == 1
        and isinstance(dims[0], int)
        and rank > 0
        and dims[0] in (-1, rank - 1)
    )


# ---- arithmetic ----------------------------------------------------------------------------------


def arithmetic(node: Any) -> tuple[str, Any, Any] | None:
    """``(kind, a, b)`` of a binary operation on tensors: kind is add, sub, mul or div."""
    if not is_tensor(node) or node.op != "call_function":
        return None
    kind = _BINARY.get(node.target)
    if kind is None or len(node.args) < 2:
        return None
    if kind in ("add", "sub", "rsub") and argument(node, "alpha", 1) != 1:
        return None
    if kind == "div" and argument(node, "rounding_mode") is not None:
        return None
    a, b = node.args[0], node.args[1]
    return ("sub", b, a) if kind == "rsub" else (kind, a, b)


def operands(node: Any, kind: str) -> Iterator[tuple[Any, Any]]:
    """The operands of ``node`` if it is a ``kind``, in both orders where the operation commutes."""
    found = arithmetic(node)
    if found is not None and found[0] == kind:
        yield found[1], found[2]
        if kind in ("add", "mul") and found[1] is not found[2]:
            yield found[2], found[1]


def scalar(arg: Any) -> float | None:
    """The value of a number known while compiling: a literal, or a 0-dim constant made from one."""
    if isinstance(arg, bool):
        return None
    if isinstance(arg, (int, float)):
        return float(arg)
    if not isinstance(arg, fx.Node) or arg.op != "call_function":
        return None
    value: Any = None
    if arg.target in _CONSTANTS and arg.args:
        value = arg.args[0]
    elif arg.target is aten.full.default and arg.args[0] == []:
        value = arg.args[1]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    held = arg.meta.get("val")  # the constant was rounded when it was made
    return float(torch.tensor(value, dtype=held.dtype)) if is_tensor(arg) else float(value)  # type: ignore[union-attr]


def number(arg: Any) -> Any:
    """A scalar operand: a float, or the node of a symbolic float (which rewrites pass through)."""
    value = scalar(arg)
    if value is not None:
        return value
    is_symbolic = isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), torch.SymFloat)
    return arg if is_symbolic else None


def power(node: Any) -> tuple[fx.Node, float] | None:
    """``(base, exponent)`` of a unary power: pow, square, sqrt, rsqrt, reciprocal, 1/x, x*x."""
    if not is_tensor(node) or node.op != "call_function":
        return None
    fixed = {
        aten.square.default: 2.0,
        aten.sqrt.default: 0.5,
        aten.rsqrt.default: -0.5,
        aten.reciprocal.default: -1.0,
    }.get(node.target)
    if fixed is not None:
        return node.args[0], fixed
    if node.target in (aten.pow.Tensor_Scalar, operator.pow):
        exponent = scalar(node.args[1])
        return None if exponent is None else (node.args[0], exponent)
    found = arithmetic(node)
    if found is None:
        return None
    kind, a, b = found
    if kind == "mul" and a is b:
        return a, 2.0
    if kind == "div" and scalar(a) == 1.0 and is_tensor(b):
        return b, -1.0
    for a, b in operands(node, "mul"):  # 1/x traces to reciprocal(x) * 1
        if scalar(b) == 1.0 and is_tensor(a):
            return power(a)
    return None


def radicand(node: Any, exponent: float) -> fx.Node | None:
    """``v`` where ``node`` is v**exponent, through any chain of roots and reciprocals."""
    total = 1.0
    while (step := power(node)) is not None and step[1] in (0.5, -0.5, -1.0):
        node, total = step[0], total * step[1]
    return node if total == exponent and is_tensor(node) else None


def square(node: Any) -> fx.Node | None:
    """``x`` where ``node`` is x squared."""
    found = power(node)
    return found[0] if found is not None and found[1] == 2.0 else None


def mean_last(node: Any) -> fx.Node | None:
    """``x`` where ``node`` is the mean of x over its last dimension, the dimension kept."""
    if not is_tensor(node) or node.op != "call_function":
        return None
    if node.target is aten.unsqueeze.default and node.args[1] in (-1, node.meta["val"].dim() - 1):
        return _reduced(node.args[0], aten.mean.dim, keepdim=False)
    found = _reduced(node, aten.mean.dim, keepdim=True)
    if found is not None:
        return found
    split = arithmetic(node)  # sum / d
    if split is None or split[0] not in ("mul", "div"):
        return None
    for total, count in operands(node, split[0]):
        source = _reduced(total, aten.sum.dim_IntList, keepdim=True)
        value = scalar(count)
        if source is None or value is None:
            continue
        width = source.meta["val"].shape[-1]
        wanted = width if split[0] == "div" else 1 / width if isinstance(width, int) else None
        if isinstance(width, int) and wanted is not None and math.isclose(value, wanted):
            return source
    return None


def _reduced(node: Any, target: Any, *, keepdim: bool) -> fx.Node | None:
    if not is_tensor(node) or node.target is not target:
        return None
    source = node.args[0]
    if not is_tensor(source) or not is_last_dim(argument(node, "dim"), source.meta["val"].dim()):
        return None
    if bool(argument(node, "keepdim")) is not keepdim:
        return None
    cast = argument(node, "dtype")
    return source if cast in (None, dtype_of(source)) else None


def plus_eps(node: fx.Node) -> tuple[fx.Node, Any]:
    """``(v, eps)`` of v + eps, eps a float or a symbolic float's node; else ``(node, 0.0)``."""
    for value, eps in operands(node, "add"):
        eps = number(eps)
        if is_tensor(value) and eps is not None:
            return value, eps
    return node, 0.0


def cast_source(node: fx.Node) -> fx.Node | None:
    """The input of a pure dtype cast on one device."""
    if node.target not in _CASTS or not is_tensor(node) or not is_tensor(node.args[0]):
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    return source if source.meta["val"].device == node.meta["val"].device else None


def widened(node: fx.Node) -> fx.Node:
    """``node`` without the casts that only widened it (these are exact)."""
    source = cast_source(node)
    while source is not None and torch.promote_types(dtype_of(source), dtype_of(node)) == dtype_of(
        node
    ):
        node, source = source, cast_source(source)
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
