"""Feed-forward networks of blocks of neurons, each of which a value of a router multiplies.

down(vec(r_n · h_n)), h = f(up(x)) viewed [..., N, d], r [..., N] made by a function that makes zeros (relu,
top-k), an RMSNorm behind it or none: BlockFFN, Song et al. 2025 (arXiv:2507.08771). r spreads over neurons by
an axis of one, by ``expand`` or by ``repeat_interleave``; f is elementwise, before the view or behind it.

An RMSNorm keeps zeros, whatever the sign of its weight: x / rms(x) · w. A LayerNorm or a shift behind it does
not. Only whether skipping pays depends on this: what is skipped, r itself says, and r = 0 gives 0 for any f.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.ffn import through_reshapes
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.live import Growth, Live, own, same_rows
from sparsecc.passes.analysis.norms import as_norm
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses
from sparsecc.passes.canonical._match import argument
from sparsecc.program import Program

aten = torch.ops.aten

# They keep the order of the elements.
_LAYOUTS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
    }
)


def find_blocks(program: Program, analyses: Analyses) -> list[Live]:
    """Every linear map of a matrix that reads blocks of neurons times values with zeros, in graph order."""
    maps, weights = analyses.get(linears), analyses.get(weight_values)
    found = []
    for down in maps.values():
        if down.is_conv or down.weight.meta["val"].dim() != 2:
            continue
        product, path = _source(down.x)
        if product.target is not aten.mul.Tensor or len(product.args) != 2:
            continue
        sides = (product.args, product.args[::-1])
        grown = (_network(maps, weights, down, product, *side) for side in sides)
        for live in grown:
            if live is not None:
                live.inside += path
                if own(live):
                    found.append(live)
                    break
    return found


def _network(
    maps: dict[fx.Node, Linear],
    weights: WeightValues,
    down: Linear,
    product: fx.Node,
    side: Any,
    other: Any,
) -> Live | None:
    """The network whose hidden value is ``product`` of a router's values, spread, and ``other``."""
    for each in (side, other):
        if not isinstance(each, fx.Node) or not isinstance(each.meta.get("val"), torch.Tensor):
            return None
    neurons = down.weight.meta["val"].shape[down.in_axis]
    values = _values(product, side)
    if values is None or not same_shape(other.meta["val"].shape, product.meta["val"].shape):
        return None
    router, block = values
    if router.meta["val"].shape[-1] * block != neurons or not _has_zeros(maps, weights, router):
        return None
    growth = _Hidden(maps, weights, opaque=False)
    text = growth.text(other)
    if text is None or len(growth.read) != 1:
        return None
    (up,) = growth.read
    x = through_reshapes(up.linear.x)
    # Of as many elements as the product's: nothing was broadcast on the way but vectors over all neurons.
    vectors = all(tuple(each.meta["val"].shape) == (neurons,) for each in growth.operands)
    width = up.linear.features // (1 if up.index is None else 2)
    if not vectors or width != neurons or not same_rows(x, down):
        return None
    hidden = "a * " + re.sub(r"\bp0\b", "p1", text)
    inside = [*growth.inside, product]
    return Live(
        down,
        x,
        up=up,
        hidden=hidden,
        operands=growth.operands,
        inside=inside,
        router=router,
        block=block,
    )


def _source(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a node is a layout of, and the layouts on the way."""
    path = []
    while node.target in _LAYOUTS:
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, path


def _values(product: fx.Node, side: fx.Node) -> tuple[fx.Node, int] | None:
    """``(r, d)`` of ``side``: each value of r [..., N] d times in a row, or once where it is broadcast."""
    whole, shape = product.meta["val"].shape, side.meta["val"].shape
    if len(whole) > 1 and same_shape(shape, (*whole[:-1], 1)):
        return _ending(side, whole[-2], whole[-1])
    if not same_shape(shape, whole):
        return None
    spread, _ = _source(side)
    source: Any = spread.args[0] if spread.args else None
    if spread.target is aten.repeat_interleave.self_int:
        rank, dim = source.meta["val"].dim(), argument(spread, "dim")
        if dim is None or dim % rank != rank - 1:
            return None
        return _ending(source, source.meta["val"].shape[-1], argument(spread, "repeats"))
    if spread.target is aten.expand.default:
        old, new = source.meta["val"].shape, spread.meta["val"].shape
        if len(new) > 1 and same_shape(old, (*new[:-1], 1)):
            return _ending(source, new[-2], new[-1])
    return None


def _ending(node: fx.Node, count: Any, block: Any) -> tuple[fx.Node, int] | None:
    """The value that ``node`` is a layout of, as soon as its last axis has ``count`` elements."""
    if not isinstance(count, int) or not isinstance(block, int):
        return None
    for each in (node, *(layout.args[0] for layout in _source(node)[1])):
        shape = each.meta["val"].shape  # type: ignore[union-attr]
        if len(shape) and shape[-1] == count:
            return each, block  # type: ignore[return-value]
    return None


def _has_zeros(maps: dict[fx.Node, Linear], weights: WeightValues, router: fx.Node) -> bool:
    """Whether a function made zeros in it that an RMSNorm alone came after."""
    value, _ = _source(router)
    norm = as_norm(value)
    if norm is not None and norm.kind == "rms_norm":
        value, _ = _source(norm.x)
    return Growth(maps, weights, opaque=True).has_zeros(value)


class _Hidden(Growth):
    """Reads through layouts, too."""

    def _text(self, node: fx.Node) -> str | None:
        found = super()._text(node)
        if found is None and node.target in _LAYOUTS and node not in self.weights:
            self.inside.append(node)
            return self.text(node.args[0])
        return found
