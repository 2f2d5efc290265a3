"""One view of every feed-forward network: linear, activation, linear; and the gated kinds.

plain   down(act(up(x)))
gated   down(act(gate(x)) ⊙ up(x))
fused   the same, gate and up being the halves of one linear map (split, chunk or slices)

Linear maps are products, with the features last, or 1×1 convolutions, with the features on axis 1. In one
network all are of one kind, since nothing between them moves the features.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.convolutions import one_tap, taps
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.sizes import same_shape, same_size
from sparsecc.passes.base import Analyses
from sparsecc.program import Program

aten = torch.ops.aten

ACTIVATIONS = frozenset(
    {
        aten.celu.default,
        aten.elu.default,
        aten.gelu.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.mish.default,
        aten.relu.default,
        aten.relu6.default,
        aten.selu.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softplus.default,
        aten.square.default,
        aten.tanh.default,
    }
)
_PARTITIONS = frozenset(
    {
        aten.chunk.default,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        torch.chunk,  # tuples that cross an opaque node are left as Dynamo had them
        torch.split,
        "chunk",
        "split",
    }
)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class FFN:
    """One feed-forward network.

    Attributes: x: what the first linear maps read. gate: the linear map under the activation; None
        in a plain network. up: the linear map of the other branch (in a plain network, the only
        one). In a fused network ``gate`` and ``up`` are the same linear map. down: the linear map
        that reads the hidden value. activation: the node of the activation. kind: "plain", "gated"
        or "fused". hidden: the value that ``down`` reads: the activation, or its product with
        ``up``. halves: in a fused network, the nodes that hold gate and up.
    """

    x: fx.Node
    gate: Linear | None
    up: Linear
    down: Linear
    activation: fx.Node
    kind: str
    hidden: fx.Node
    halves: tuple[fx.Node, fx.Node] | None = None

    @property
    def layers(self) -> list[Linear]:
        """Each linear map once, ``down`` last."""
        fused = self.gate is None or self.halves is not None
        return [self.up, self.down] if fused else [self.gate, self.up, self.down]  # type: ignore[list-item]

    @property
    def is_conv(self) -> bool:
        """Whether its linear maps are 1×1 convolutions, and its rows the pixels."""
        return self.down.is_conv

    @property
    def axis(self) -> int:
        """Which axis of every value between the linear maps holds the neurons: -1, or 1 of convolutions."""
        return self.down.feature_axis

    @property
    def neurons(self) -> int:
        return int(self.down.weight.meta["val"].shape[self.down.in_axis])


@dataclass(frozen=True)
class Gated:
    """act(gate) ⊙ up: a product of two branches over one input."""

    product: fx.Node
    activation: fx.Node
    gate: Linear
    up: Linear
    halves: tuple[fx.Node, fx.Node] | None
    activated_first: bool


def find_ffns(program: Program, analyses: Analyses) -> list[FFN]:
    """Every feed-forward network, in graph order.

    Reshapes that keep the features are seen through (GPT-2's Conv1D flattens the tokens); dropout
    between the activation and ``down`` is not: it is part of the function while it is active. Of
    convolutions only those that read each pixel alone, and all its features, are linear maps here.
    """
    maps = analyses.get(linears)
    found = []
    for down in maps.values():
        axis = down.feature_axis
        if not _by_rows(down):
            continue
        hidden = through_reshapes(down.x, axis)
        if is_activation(hidden):
            up = _linear(hidden.args[0], maps, axis)
            if up is not None:
                x = through_reshapes(up.x, axis)
                found.append(FFN(x, None, up, down, hidden, "plain", hidden))
            continue
        gated = as_gated(hidden, maps, axis)
        if gated is not None:
            kind = "gated" if gated.halves is None else "fused"
            x = through_reshapes(gated.up.x, axis)
            found.append(
                FFN(x, gated.gate, gated.up, down, gated.activation, kind, hidden, gated.halves)
            )
    return found


def as_gated(node: fx.Node, maps: dict[fx.Node, Linear], axis: int = -1) -> Gated | None:
    """View ``node`` as act(gate(x)) ⊙ up(x), in either operand order, or None; features are on ``axis``."""
    if node.target is not aten.mul.Tensor or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    for activated, other, first in ((a, b, True), (b, a, False)):
        if not is_activation(activated) or not isinstance(other, fx.Node):
            continue
        source: Any = activated.args[0]  # type: ignore[union-attr]
        gate, up = _linear(source, maps, axis), _linear(other, maps, axis)
        if gate is not None and up is not None and gate.node is not up.node:
            # Of two shapes, broadcasting pairs other rows, and of images even other features.
            alike = same_shape(source.meta["val"].shape, other.meta["val"].shape)
            if alike and through_reshapes(gate.x, axis) is through_reshapes(up.x, axis):
                return Gated(node, activated, gate, up, None, first)  # type: ignore[arg-type]
            continue
        fused = _halves_of(source, other, axis)
        linear = None if fused is None else _linear(fused, maps, axis)
        if linear is not None:
            halves = (source, other)
            return Gated(node, activated, linear, linear, halves, first)  # type: ignore[arg-type]
    return None


def is_activation(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in ACTIVATIONS


def through_reshapes(node: fx.Node, axis: int = -1) -> fx.Node:
    """``node`` without the reshapes that leave the features alone: the last dimension, or axis 1 of images."""
    while node.target in _RESHAPES:
        source: Any = node.args[0]
        if not _keeps(source.meta["val"].shape, node.meta["val"].shape, axis):
            break
        node = source
    return node


def _keeps(old: Any, new: Any, axis: int) -> bool:
    """Whether a reshape leaves the features on their axis: their number, and of images the batch before."""
    if axis == 1:
        return min(len(old), len(new)) > 1 and same_shape(old[:2], new[:2])
    return bool(old) and bool(new) and same_size(old[-1], new[-1])


def _linear(node: Any, maps: dict[fx.Node, Linear], axis: int) -> Linear | None:
    """The linear map, with its features on ``axis``, that ``node`` is the result of."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    found = maps.get(through_reshapes(node, axis))
    fits = found is not None and found.feature_axis == axis and _by_rows(found)
    return found if fits else None


def _by_rows(linear: Linear) -> bool:
    """Whether each row, or pixel, of the result is a product of the same one of the input."""
    if not linear.is_conv:
        return True
    rank = linear.weight.meta["val"].dim() - 2
    return not linear.is_grouped and taps(linear) == one_tap(rank)


def _halves_of(a: fx.Node, b: fx.Node, axis: int) -> fx.Node | None:
    """The node whose features ``a`` and ``b`` halve, in either order."""
    first, second = half_of(a, axis), half_of(b, axis)
    if first is None or second is None or first[0] is not second[0]:
        return None
    return first[0] if {first[1], second[1]} == {0, 1} else None


def half_of(node: fx.Node, axis: int = -1) -> tuple[fx.Node, int] | None:
    """``(whole, 0 or 1)`` where ``node`` is a half of ``whole`` on ``axis``, which holds the features."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        parts, index = node.args[0], node.args[1]
        if parts.target not in _PARTITIONS:
            return None
        whole = parts.args[0]
        dim = parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0)
        values = parts.meta["val"]
        sizes = [value.shape[dim] for value in values]
        if len(sizes) != 2 or not same_size(sizes[0], sizes[1]) or index not in (0, 1):
            return None
        return (whole, index) if _is_axis(whole, dim, axis) else None  # type: ignore[return-value]
    if node.target is aten.slice.Tensor:
        whole, dim, start, end, step = (*node.args, None, None, None, None, None)[:5]
        if not _is_axis(whole, dim if dim is not None else 0, axis) or step not in (None, 1):
            return None
        width = whole.meta["val"].shape[axis]  # type: ignore[union-attr]
        if not isinstance(width, int) or width % 2:
            return None
        start = start or 0
        end = width if end is None else end
        if not isinstance(start, int) or not isinstance(end, int):
            return None
        start, end = start % width, min(end, width) if end >= 0 else width + end
        bounds = {(0, width // 2): 0, (width // 2, width): 1}
        half = bounds.get((start, end))
        return None if half is None else (whole, half)  # type: ignore[return-value]
    return None


def _is_axis(node: Any, dim: Any, axis: int) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(dim, int):
        return False
    rank = node.meta["val"].dim()
    return -rank <= axis < rank and dim in (axis % rank, axis % rank - rank)
