"""Cross-layer equalization: the channels between two layers get equal ranges in the weights of both.

Law.   W₂ f(W₁x + b₁) = (W₂ diag(s)) f(diag(1/s)(W₁x + b₁)) for s > 0 and f(v/s) = f(v)/s;
       with r₁ the row ranges of W₁ and r₂ the column ranges of W₂, s = √(r₁ r₂)/r₂ makes both √(r₁ r₂).
Source Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), §4.1,
       eq. 11: a channel's precision is its range over that of its tensor, and the product of the two
       precisions is largest where the two ranges of every channel are equal. max |w| stands for the range.
Legal  where each reader of the channels is a linear layer, through what carries a positive scale: ReLU, pools,
       attention on v, one factor of a product; γ and β of a norm; q and k, whose scales cancel. Channels that a
       rotary embedding mixes share a scale, and so do the query heads that read one head of k or v.
Not    through GELU, SiLU and other activations that are not homogeneous, nor where the value is also returned,
       added to a residual stream, or read by anything else.
Exact  in real arithmetic. Where a range is zero s is 1, and s stays within [1/limit, limit]: by that much the
       values between may grow, which float16 may not hold where a bias is large beside its row.
Pays   nothing by itself: weights that are rounded per tensor afterwards keep more of their small channels.
       Each link is balanced once, in graph order, with the weights as the links before it left them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import OptionsError
from sparsecc.passes.analysis.links import Link, links
from sparsecc.passes.analysis.walk import UNSCALABLE
from sparsecc.passes.base import (
    RECOMPUTED,
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
)
from sparsecc.passes.quant._migrate import migrate_scale
from sparsecc.passes.quant._ranges import ranges
from sparsecc.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class BalanceChannels(Pass):
    """Give the channels between two layers equal weight ranges in both.

    Attributes:
        limit: the largest scale, and the reciprocal of the smallest (a number of at least 1): a channel that is
            almost dead on one side is not blown up on the other.
    """

    limit: float = 1024.0

    name: ClassVar[str] = "balance-channels"
    family: ClassVar[str] = "quant"
    law: ClassVar[str] = (
        "W₂ f(W₁x + b₁) = (W₂ diag(s)) f(diag(1/s)(W₁x + b₁)), f(v/s) = f(v)/s, s > 0"
    )
    source: ClassVar[str] = "Nagel et al. 2019, Data-Free Quantization, §4.1, eq. 11"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "nothing by itself; a preparation for rounding weights per tensor"
    refusals: ClassVar[Mapping[str, str]] = {**UNSCALABLE, **RECOMPUTED}

    def __post_init__(self) -> None:
        given: Any = self.limit
        if (
            isinstance(given, bool)
            or not isinstance(given, (int, float))
            or not 1 <= given < math.inf
        ):
            raise OptionsError(
                f"pass {self.name!r}: limit must be a number of at least 1, not {given!r}."
            )

    def find(self, context: Context) -> list[Match]:
        return [
            Match(link.node, {"link": link}, note=link.kind) for link in context.analyses.get(links)
        ]

    def check(self, match: Match, context: Context) -> Refusal | None:
        link: Link = match.nodes["link"]
        return link.refusal or context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        link: Link = match.nodes["link"]
        scale = self._scale(context.program, link)
        migrate_scale(context.program, link, scale, self.name)

    def _scale(self, program: Program, link: Link) -> fx.Node:
        build = program.weight(self.name, link.node)
        made = ranges(program, link, link.producers, self.name, rows=True)
        read = ranges(program, link, link.consumers, self.name, rows=link.kind == "q-k")
        # √r₁ and √r₂ apart: the product of two small ranges may underflow.
        ratio = build.call(
            aten.div.Tensor,
            build.call(aten.sqrt.default, made),
            build.call(aten.sqrt.default, read),
        )
        bounded = build.call(aten.clamp.default, ratio, 1 / self.limit, self.limit)
        both = build.call(
            aten.logical_and.default,
            build.call(aten.gt.Scalar, made, 0),
            build.call(aten.gt.Scalar, read, 0),
        )
        one = build.call(aten.new_ones.default, bounded, [])
        return build.call(aten.where.self, both, bounded, one)

    @classmethod
    def examples(cls) -> list[Example]:
        def linear(x: Any, W: Any, b: Any, V: Any, c: Any, p: Any) -> Any:
            return (x @ W.transpose(0, 1) + b) @ V.transpose(0, 1) + c

        def linear_scaled(x: Any, W: Any, b: Any, V: Any, c: Any, p: Any) -> Any:
            s = p * p + 1
            y = x @ (W.transpose(0, 1) / s) + b / s
            return y @ (V * s).transpose(0, 1) + c

        def relu(y: Any) -> Any:
            return (y + (y * y) ** 0.5) / 2

        def rectified(x: Any, W: Any, b: Any, V: Any, c: Any, p: Any) -> Any:
            return relu(x @ W.transpose(0, 1) + b) @ V.transpose(0, 1) + c

        def rectified_scaled(x: Any, W: Any, b: Any, V: Any, c: Any, p: Any) -> Any:
            s = p * p + 1
            y = relu(x @ (W.transpose(0, 1) / s) + b / s)
            return y @ (V * s).transpose(0, 1) + c

        def balanced(x: Any, W: Any, b: Any, V: Any, c: Any, p: Any) -> Any:
            made, read = W.abs().amax(1), V.abs().amax(0)
            s = torch.where((made > 0) & (read > 0), made.sqrt() / read.sqrt(), torch.ones_like(b))
            y = torch.relu(x @ (W / s[:, None]).T + b / s)
            return y @ (V * s).T + c

        def crossed(x: Any, W: Any, V: Any, p: Any) -> Any:
            return (x @ W.transpose(0, 1)) @ (x @ V.transpose(0, 1)).transpose(0, 1)

        def crossed_scaled(x: Any, W: Any, V: Any, p: Any) -> Any:
            s = p * p + 1
            return (x @ (W.transpose(0, 1) * s)) @ (x @ (V.transpose(0, 1) / s)).transpose(0, 1)

        shapes = {"x": ("n", "k"), "W": ("d", "k"), "b": ("d",), "V": ("m", "d"), "c": ("m",)}
        shapes["p"] = ("d",)
        weights = ("W", "b", "V", "c", "p")
        product = {"x": ("n", "k"), "W": ("d", "k"), "V": ("d", "k"), "p": ("d",)}
        return [
            Example(linear, linear_scaled, shapes, weights, symbolic=True),
            Example(rectified, rectified_scaled, shapes, weights, symbolic=True),
            Example(crossed, crossed_scaled, product, ("W", "V", "p"), symbolic=True),
            Example(rectified, balanced, shapes, weights),
        ]
