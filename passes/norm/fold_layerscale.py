"""LayerScale and other per-channel factors, folded into the linear layer that produces their operand.

Law.   λ ⊙ linear(x, W, b) = linear(x, diag(λ) W, λ ⊙ b).
Source Touvron et al., "Going deeper with Image Transformers" (2021), eq. 4; the fold is algebra.
Legal  when λ is a weight along the output features and the linear layer (or convolution) has no other reader.
Exact  in real arithmetic. In training it costs a pass over the weight each step, so it runs only when named.
Pays   one multiplication per element; and it lets LayerNorm → RMSNorm reach through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_shape, same_size
from sparsecc.passes.analysis.stream import carry
from sparsecc.passes.analysis.weights import WeightValues, other_users, weight_values
from sparsecc.passes.base import (
    RECOMPUTED,
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


@dataclass(frozen=True)
class FoldLayerScale(Pass):
    """Fold a per-channel multiplier into its producer."""

    name: ClassVar[str] = "fold-layerscale"
    family: ClassVar[str] = "norm"
    law: ClassVar[str] = "λ ⊙ linear(x, W, b) = linear(x, diag(λ)·W, λ⊙b)"
    source: ClassVar[str] = "Touvron et al. 2021, CaiT, eq. 4 (the layer); algebra (the fold)"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "networks with LayerScale: CaiT, ConvNeXt, DINOv2, BEiT"
    refusals: ClassVar[dict[str, str]] = {
        "fan-out": "something else reads the unscaled value too",
        "tied": "the weight is shared with another node",
        **RECOMPUTED,
        "region": "an autocast or grad-mode region begins or ends between the factor and its producer",
    }

    def find(self, context: Context) -> list[Match]:
        weights = context.analyses.get(weight_values)
        maps = context.analyses.get(linears)
        matches = []
        for node in context.program.calls(aten.mul.Tensor):
            for value, factor in (node.args[:2], node.args[1::-1]):
                found = _producer(node, value, factor, maps, weights)
                if found is not None:
                    linear, path = found
                    nodes = {"linear": linear, "path": path, "factor": factor, "value": value}
                    matches.append(Match(node, nodes))
                    break
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        linear: Linear = match.nodes["linear"]
        for node in match.nodes["path"]:
            if len(node.users) != 1:
                other = next(u for u in node.users if u is not match.node)
                return Refusal.at(other, "fan-out", f"{other.name} reads the unscaled value too")
        weights = context.analyses.get(weight_values)
        if other_users(linear.weight, linear.node, weights):
            return Refusal.at(linear.node, "tied", f"the weight of {linear.node.name} is shared")
        mode = context.analyses.get(modes)
        if mode[linear.node] != mode[match.node]:
            return Refusal.at(linear.node, "region", self.refusals["region"])
        return context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program, linear = context.program, match.nodes["linear"]
        build = program.weight(self.name, match.node)
        factor = build.wide(match.nodes["factor"])
        vector = build.call(aten.reshape.default, factor, [-1])
        along = linear.along(program, vector, linear.out_axis, self.name)
        weight = build.mul(build.wide(linear.weight), along)
        bias = None
        if linear.bias is not None:
            bias = build.mul(build.wide(linear.bias), vector)
            bias = build.as_dtype(bias, linear.bias.meta["val"].dtype)
        weight = build.as_dtype(weight, linear.weight.meta["val"].dtype)
        linear.set_weights(program, self.name, weight=weight, bias=bias)
        for node in match.nodes["path"]:
            node.meta[MOVED] = "it carries the per-channel factor"
        value: fx.Node = match.nodes["value"]
        if value.meta["val"].dtype != match.node.meta["val"].dtype:
            dtype = match.node.meta["val"].dtype
            value = program.call(
                aten.to.dtype, (value, dtype), like=match.node, origin=self.name, before=match.node
            )
        program.replace(match.node, value)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(nbytes(match.nodes["factor"]), numel(match.node))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any, g: Any) -> Any:
            return g * (x @ W.transpose(0, 1) + b)

        def after(x: Any, W: Any, b: Any, g: Any) -> Any:
            return x @ (W.transpose(0, 1) * g) + g * b

        shapes = {"x": ("n", "k"), "W": ("d", "k"), "b": ("d",), "g": ("d",)}
        return [Example(before, after, shapes, ("W", "b", "g"), symbolic=True)]


def _producer(
    node: fx.Node,
    value: Any,
    factor: Any,
    maps: dict[fx.Node, Linear],
    weights: WeightValues,
) -> tuple[Linear, list[fx.Node]] | None:
    """The linear map behind ``value`` and the nodes on the way, when ``factor`` scales its out features."""
    if not isinstance(value, fx.Node) or value in weights or factor not in weights:
        return None
    result = node.meta["val"]
    if not same_shape(value.meta["val"].shape, result.shape):
        return None
    axis = _only_axis(factor, result.dim())
    if axis is None or not same_size(factor.meta["val"].shape.numel(), result.shape[axis]):
        return None
    path = [value]
    while path[-1] not in maps:
        carried = carry(path[-1], axis)
        if carried is None or not carried.reindexes or len(carried.operands) != 1:
            return None
        source, axis = carried.operands[0]
        path.append(source)
    linear = maps[path[-1]]
    if axis != linear.feature_axis % linear.node.meta["val"].dim():
        return None
    return linear, path


def _only_axis(factor: fx.Node, rank: int) -> int | None:
    """The axis of a rank-``rank`` value along which ``factor`` varies, if it is exactly one."""
    shape = factor.meta["val"].shape
    wide = [i for i, s in enumerate(shape) if s != 1]
    if len(wide) != 1 or len(shape) > rank:
        return None
    return wide[0] + rank - len(shape)
