"""A constant vector added behind a linear layer, folded into its bias.

Law.   linear(x, W, b) + c = linear(x, W, b + c), and (h + linear(x, W, b)) + c = h + linear(x, W, b + c).
Source algebra. Activation steering adds such a vector to the residual stream (Turner et al., "Activation
       Addition", 2023); frozen BatchNorm in hand-written form adds one behind each convolution.
Legal  when c is a weight along the output features, nothing else reads the values between the layer and the
       sum, and the sum has the strides of what it is replaced by. A bias is created where there is none. The
       weight may be shared, and so may the old bias: other readers keep it.
Exact  in real arithmetic. Only a vector is computed, so it costs nothing in training either; but there a
       convolution's bias is left alone, whose gradient rounds three times as much.
Pays   one addition per element where it is not fused; a weight and a constant become one layer for later folds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.linear import Linear, as_linear, linears
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_layout
from sparsecc.passes.analysis.stream import carry, is_number, other_readers
from sparsecc.passes.analysis.weights import WeightValues, axis_along, weight_values
from sparsecc.passes.base import (
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
    Saving,
    nbytes,
    numel,
)
from sparsecc.program import MOVED

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor)


@dataclass(frozen=True)
class Summand:
    """A linear map that a value is a sum of: its sign, and the values from the sum back to it."""

    linear: Linear
    sign: int
    path: tuple[fx.Node, ...]

    def stranger(self, total: fx.Node) -> fx.Node | None:
        """Who reads a value on the path from ``total`` besides the path itself."""
        for node, reader in zip(self.path, (total, *self.path), strict=False):
            for other in other_readers(node, reader):
                return other
        return None


@dataclass(frozen=True)
class FoldShift(Pass):
    """Fold an added constant vector into the bias of its producer."""

    name: ClassVar[str] = "fold-shift"
    family: ClassVar[str] = "linear"
    law: ClassVar[str] = "linear(x, W, b) + c = linear(x, W, b + c)"
    source: ClassVar[str] = "algebra; Turner et al. 2023, Activation Addition (the steering vector)"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "hand-written biases, frozen BatchNorm, steering vectors"
    refusals: ClassVar[dict[str, str]] = {
        "fan-out": "something else reads the value before the constant is added",
        "bias-gradient": "in training: the gradient of a convolution's bias is summed less exactly",
        "written": "the sum is written in place",
        "layout": "the sum has other strides than the value it is made of",
        "region": "an autocast or grad-mode region begins or ends between the constant and the layer",
    }

    def find(self, context: Context) -> list[Match]:
        weights = context.analyses.get(weight_values)
        maps = context.analyses.get(linears)
        matches = []
        for node in context.program.calls(*_SUMS):
            for value, shift, factor in _terms(node):
                found = _summands(node, value, shift, maps, weights)
                if found:
                    chosen = next((s for s in found if s.stranger(node) is None), found[0])
                    nodes = {"summand": chosen, "shift": shift, "factor": factor}
                    matches.append(Match(node, nodes))
                    break
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        summand: Summand = match.nodes["summand"]
        stranger = summand.stranger(match.node)
        if stranger is not None:
            words = f"{stranger.name} reads a value before the constant is added"
            return Refusal.at(stranger, "fan-out", words)
        if context.trains and summand.linear.is_conv:
            return Refusal.at(match.node, "bias-gradient", self.refusals["bias-gradient"])
        if context.analyses.get(aliases).written(match.node):
            return Refusal.at(match.node, "written", self.refusals["written"])
        if not same_layout(match.node.meta["val"], summand.path[0].meta["val"]):
            return Refusal.at(match.node, "layout", self.refusals["layout"])
        mode = context.analyses.get(modes)
        if mode[summand.linear.node] != mode[match.node] or any(
            mode[node][0] != mode[match.node][0] for node in summand.path
        ):
            return Refusal.at(summand.linear.node, "region", self.refusals["region"])
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        program, node = context.program, match.node
        summand: Summand = match.nodes["summand"]
        shift: fx.Node = match.nodes["shift"]
        # Afresh: an earlier match may have given the layer a bias, or replaced what the sum reads.
        linear = as_linear(summand.linear.node, context.analyses.get(weight_values))
        assert linear is not None
        value = next(a for a in node.args[:2] if a is not shift)
        assert isinstance(value, fx.Node)
        build = program.weight(self.name, node)
        vector = build.call(aten.reshape.default, build.wide(shift), [-1])
        factor = match.nodes["factor"] * summand.sign
        if factor != 1:
            vector = build.mul(vector, factor)
        if linear.bias is not None:
            vector = build.add(build.wide(linear.bias), vector)
        like = linear.weight if linear.bias is None else linear.bias
        bias = build.as_dtype(vector, like.meta["val"].dtype)
        linear.set_weights(program, self.name, bias=bias)
        for moved in summand.path:
            moved.meta[MOVED] = "it carries the constant"
        program.replace(node, value)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(nbytes(match.nodes["shift"]), numel(match.node))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(h: Any, x: Any, W: Any, b: Any, c: Any) -> Any:
            y = x @ W.transpose(0, 1)
            return (y + b) + c, y - c, (h - (y + b)) + c

        def after(h: Any, x: Any, W: Any, b: Any, c: Any) -> Any:
            y = x @ W.transpose(0, 1)
            return y + (b + c), y + (-c), h - (y + (b - c))

        shapes = {"h": ("n", "d"), "x": ("n", "k"), "W": ("d", "k"), "b": ("d",), "c": ("d",)}
        return [Example(before, after, shapes, ("W", "b", "c"), symbolic=True)]


def _terms(node: fx.Node) -> Iterator[tuple[Any, Any, Any]]:
    """(value, constant, factor of the constant) in both orders, where the value itself has factor one."""
    a, b = node.args[:2]
    alpha: Any = node.kwargs.get("alpha", 1)
    if not is_number(alpha):
        return
    is_sub = node.target is aten.sub.Tensor
    yield a, b, -alpha if is_sub else alpha
    if not is_sub and alpha == 1:
        yield b, a, 1


def _summands(
    node: fx.Node, value: Any, shift: Any, maps: dict[fx.Node, Linear], weights: WeightValues
) -> list[Summand]:
    """The linear maps over whose output features ``shift`` lies, and of which ``value`` is a sum."""
    axis = axis_along(shift, value, node, weights)
    if axis is None:
        return []
    found = []
    seen: set[fx.Node] = set()
    stack: list[tuple[fx.Node, int, int, tuple[fx.Node, ...]]] = [(value, axis, 1, (value,))]
    while stack:
        current, at, sign, path = stack.pop()
        if current in seen or current.meta["val"].dtype != node.meta["val"].dtype:
            continue  # behind a cast, the constant would be rounded to the narrower type
        seen.add(current)
        linear = maps.get(current)
        if linear is not None:
            if at == linear.feature_axis % current.meta["val"].dim():
                found.append(Summand(linear, sign, path))
            continue
        for source, source_axis, source_sign in _sources(current, at):
            stack.append((source, source_axis, sign * source_sign, (*path, source)))
    return found


def _sources(node: fx.Node, axis: int) -> list[tuple[fx.Node, int, int]]:
    """The operands through any one of which a constant on ``axis`` reaches ``node``, with its sign there."""
    carried = carry(node, axis)
    if carried is None:
        return []
    if carried.reindexes:
        one = len(carried.operands) == 1
        return [(source, at, 1) for source, at in carried.operands] if one else []
    if node.target not in _SUMS or node.kwargs or node.args[0] is node.args[1]:
        return []  # x + x takes a constant twice
    signs = (1, -1 if node.target is aten.sub.Tensor else 1)
    pairs = zip(carried.operands, signs, strict=True)
    return [(source, at, sign) for (source, at), sign in pairs]
