"""What hand-written norms share: the product with an inverse root, the affine tail, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.base import Context, Refusal
from sparsecc.passes.canonical._guard import GUARD_REFUSALS, guard, interior, layout_matters
from sparsecc.passes.canonical._match import (
    arithmetic,
    dtype_of,
    is_tensor,
    is_vector,
    only_user,
    operands,
    radicand,
    widened,
)

aten = torch.ops.aten

NORM_REFUSALS = {
    **GUARD_REFUSALS,
    "half-precision": "computed in half precision; the operator computes in float32 (no overflow)",
    "layout": "the input is permuted, and a reader depends on the strides of the result",
}


@dataclass(frozen=True)
class NormSpelling:
    """One hand-written norm.

    Attributes:
        root: the node that holds the normalized value.
        x: what is normalized, in the dtype of the computation.
        eps: a float, or the node of a symbolic float.
        weight / bias: vectors over the last dimension that the norm's operator can take in.
        last: the node that the operator replaces (the root, or the end of its affine tail).
    """

    root: fx.Node
    x: fx.Node
    eps: Any
    weight: fx.Node | None
    bias: fx.Node | None
    last: fx.Node

    @property
    def leaves(self) -> tuple[Any, ...]:
        """What the spelling reads: the product may read the input before its widening."""
        return self.x, widened(self.x), self.weight, self.bias, self.eps

    @property
    def launches(self) -> int:
        """How many operators the spelling takes."""
        return len(interior(self.last, self.leaves))


def scaled_by_root(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """``(a, v)`` where ``node`` is a · v**-1/2, spelled as a product or as a quotient."""
    found = arithmetic(node)
    if found is None or found[0] not in ("mul", "div"):
        return
    exponent = -0.5 if found[0] == "mul" else 0.5
    for a, root in operands(node, found[0]):
        v = radicand(root, exponent)
        if v is not None and v is not root and is_tensor(a):
            yield a, v


def peeled(node: fx.Node, dtype: torch.dtype) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """``node`` as it is, then as a product with a vector: ``(a, None)``, ``(a, w)`` for a · w."""
    yield node, None
    size = node.meta["val"].shape[-1] if node.meta["val"].dim() else None
    for a, w in operands(node, "mul"):
        if is_tensor(a) and is_vector(w, size) and dtype_of(w) == dtype_of(a) == dtype:
            yield a, w


def affine_tail(
    root: fx.Node, weight: fx.Node | None, *, with_bias: bool
) -> tuple[fx.Node | None, fx.Node | None, fx.Node]:
    """``(weight, bias, last)``: the vectors that scale and shift ``root``, and only it."""
    size, dtype, last = root.meta["val"].shape[-1], dtype_of(root), root
    if weight is None:
        weight = _vector(last, "mul", size, dtype)
        last = next(iter(last.users)) if weight is not None else last
    bias = _vector(last, "add", size, dtype) if with_bias else None
    last = next(iter(last.users)) if bias is not None else last
    return weight, bias, last


def _vector(node: fx.Node, kind: str, size: Any, dtype: torch.dtype) -> fx.Node | None:
    user = only_user(node)
    if user is None:
        return None
    for a, vector in operands(user, kind):
        if a is node and is_vector(vector, size) and dtype_of(vector) == dtype == dtype_of(user):
            found: fx.Node = vector
            return found
    return None


def check_norm(found: NormSpelling, computed: torch.dtype, context: Context) -> Refusal | None:
    """The refusals that norms share; ``computed`` is the dtype of the mean of squares."""
    root = found.root
    if not {computed, dtype_of(found.x), dtype_of(root)} <= {torch.float32, torch.float64}:
        return Refusal.at(root, "half-precision", NORM_REFUSALS["half-precision"])
    refusal = guard(context, found.last, found.leaves)
    if refusal is not None:
        return refusal
    if layout_matters(found.last):
        return Refusal.at(root, "layout", NORM_REFUSALS["layout"])
    return None


def width(found: NormSpelling, context: Context, origin: str) -> Any:
    """The size of the last dimension: an int, or a node that reads a symbolic one."""
    size = found.x.meta["val"].shape[-1]
    if isinstance(size, int):
        return size
    return context.program.call(
        aten.sym_size.int,
        (found.x, -1),
        like=found.root,
        origin=origin,
        before=found.last,
        val=size,
    )
