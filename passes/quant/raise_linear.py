"""Products and convolutions that a recipe rounds, raised to ``aten.linear``.

Law.   x W + b = linear(x, Wᵀ, b); a convolution is a linear layer on the patches that it reads.
Source algebra; Chellapilla et al. 2006, "High Performance Convolutional Neural Networks for Document
       Processing", §3 (the convolution as a product).
Legal  for the sites of a recipe, where a convolution is neither grouped nor transposed. Observation (no recipe)
       takes only those whose patches do not overlap: kernels of one tap, and kernels as large as their step.
Exact  in real arithmetic. The result keeps its strides: channels last costs nothing, channels first one copy.
Pays   nothing by itself: linear layers have integer kernels (quantize-linear). With them, pointwise
       convolutions pay in channels last and from about 80 channels on. Overlapping patches are copied,
       kh·kw numbers for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.convolutions import Taps, taps
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.sites import site_name
from sparsecc.passes.analysis.sizes import same_layout
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import (
    RECOMPUTED,
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
)
from sparsecc.program import Program
from sparsecc.recipe import Recipe

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseLinear(Pass):
    """Write matrix products and convolutions of a recipe's sites as linear layers.

    Attributes:
        recipe: whose sites are raised; None for all (observation).
    """

    recipe: Recipe | None = None

    name: ClassVar[str] = "raise-linear"
    family: ClassVar[str] = "quant"
    law: ClassVar[str] = (
        "x W + b = linear(x, Wᵀ, b);  conv(x, W) = linear(patches(x), [N, C·kh·kw] of W)"
    )
    source: ClassVar[str] = "algebra; Chellapilla et al. 2006, §3"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = (
        "with quantize-linear: products in any spelling, and pointwise convolutions in channels last "
        "from about 80 channels on"
    )
    refusals: ClassVar[Mapping[str, str]] = {
        **RECOMPUTED,
        "grouped": "each output reads the channels of its group alone (depthwise, say): no product of matrices",
        "transposed": "a transposed convolution adds patches up",
        "overlap": "patches overlap or are padded, and are copied for every tap: only where a recipe names it",
        "padding": "the padding is not the same on both sides",
        "size": "it steps over an input whose size is not known",
    }

    def find(self, context: Context) -> list[Match]:
        weights = context.analyses.get(weight_values)
        found = []
        for node, linear in context.analyses.get(linears).items():
            name = site_name(context.program, linear.weight, weights)
            asked = bool(name) and (self.recipe is None or name in self.recipe.sites)
            if asked and node.target is not aten.linear.default:
                found.append(Match(node, {"linear": linear}, note=name))
        return found

    def check(self, match: Match, context: Context) -> Refusal | None:
        linear: Linear = match.nodes["linear"]
        code = _unfit(linear, self.recipe is not None) if linear.is_conv else None
        if code is not None:
            return Refusal.at(match.node, code, self.refusals[code])
        return context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program, node = context.program, match.node
        linear: Linear = match.nodes["linear"]
        place: dict[str, Any] = {"like": node, "origin": self.name, "before": node}
        # Another match may have replaced what it read.
        x: Any = node.args[1 if node.target is aten.addmm.default else 0]
        if linear.is_conv:
            at = taps(linear)
            assert at is not None
            x = _patches(program, x, at, place)
        arguments = [x, _matrix(program, linear, self.name)]
        if linear.bias is not None:
            arguments.append(linear.bias)
            program.bring_before(linear.bias, node)
        result = program.call(aten.linear.default, tuple(arguments), **place)
        if linear.is_conv:
            result = _channels_second(program, result, node, place)
        program.replace(node, result)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any) -> Any:
            return torch.nn.functional.conv2d(x, W[:, :, None, None], b)

        def after(x: Any, W: Any, b: Any) -> Any:
            return (x.permute(0, 2, 3, 1) @ W.transpose(0, 1) + b).permute(0, 3, 1, 2)

        def product(x: Any, W: Any, b: Any) -> Any:
            return x @ W + b

        def raised(x: Any, W: Any, b: Any) -> Any:
            rows = W.transpose(0, 1)  # [d, k], as linear has them
            return x @ rows.transpose(0, 1) + b

        shapes = {"x": ("n", "k", "h", "w"), "W": ("d", "k"), "b": ("d",)}
        plain = {"x": ("n", "k"), "W": ("k", "d"), "b": ("d",)}
        return [
            Example(before, after, shapes, ("W", "b")),
            Example(product, raised, plain, ("W", "b"), symbolic=True),
        ]


def _unfit(linear: Linear, copies: bool) -> str | None:
    """Why a convolution stays (code of the refusals); ``copies``: whether its patches may overlap."""
    if linear.is_transposed:
        return "transposed"
    if linear.is_grouped:
        return "grouped"
    at = taps(linear)
    if at is None:
        return "padding"
    apart = at.is_pointwise or (at.kernel == at.stride and set(at.dilation) == {1})
    if not copies and (at.is_padded or not apart):
        return "overlap"
    sizes = linear.x.meta["val"].shape[2:]
    known = (s == 1 or isinstance(n, int) for n, s in zip(sizes, at.stride, strict=True))
    return None if all(known) else "size"


def _matrix(program: Program, linear: Linear, origin: str) -> fx.Node:
    """The weight as [N, K], contiguous, as a weight expression."""
    build = program.weight(origin, linear.node)
    if linear.is_conv:
        found = build.call(aten.reshape.default, linear.weight, [linear.features, -1])
    else:
        found = build.call(aten.t.default, linear.weight)
    found = build.call(
        aten.clone.default, found, memory_format=torch.contiguous_format
    )  # kernels read rows
    program.bring_before(found, linear.node)
    return found


def _patches(program: Program, x: fx.Node, at: Taps, place: dict[str, Any]) -> fx.Node:
    """[B, …, C·kh·kw] of [B, C, …]: what each output position reads, in the order of the weight."""
    rank = len(at.kernel)
    outer = range(2, rank + 2)
    if at.is_pointwise and not at.is_padded:  # a view that links lead through
        for axis, step in zip(outer, at.stride, strict=True):
            if step != 1:
                x = program.call(aten.slice.Tensor, (x, axis, 0, 2**63 - 1, step), **place)
        return program.call(aten.permute.default, (x, [0, *outer, 1]), **place)
    if at.is_padded:
        sides = [p for p in reversed(at.padding) for _ in range(2)]
        x = program.call(aten.constant_pad_nd.default, (x, sides), **place)
    for axis, kernel, step, spread in zip(outer, at.kernel, at.stride, at.dilation, strict=True):
        width = (kernel - 1) * spread + 1
        x = program.call(aten.unfold.default, (x, axis, width, step), **place)
        if spread != 1:
            x = program.call(aten.slice.Tensor, (x, -1, 0, 2**63 - 1, spread), **place)
    inner = range(rank + 2, 2 * rank + 2)  # [B, C, h, w, kh, kw]
    x = program.call(aten.permute.default, (x, [0, *outer, 1, *inner]), **place)
    return program.call(aten.flatten.using_ints, (x, 1 + rank), **place)


def _channels_second(
    program: Program, value: fx.Node, like: fx.Node, place: dict[str, Any]
) -> fx.Node:
    """[B, N, …] of [B, …, N], with the strides of ``like``."""
    rank = like.meta["val"].dim()
    value = program.call(aten.permute.default, (value, [0, rank - 1, *range(1, rank - 1)]), **place)
    if same_layout(value.meta["val"], like.meta["val"]):
        return value
    contiguous: Any = {"memory_format": torch.contiguous_format}
    value = program.call(aten.clone.default, (value,), contiguous, **place)
    # A convolution has its channels first or last.
    assert same_layout(value.meta["val"], like.meta["val"])
    return value
