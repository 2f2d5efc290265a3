"""Hand-written RMSNorm, as the operator.

Law.   x · (mean(x²) + ε)^(−1/2) [· γ] = rms_norm(x; γ, ε), over the last dimension.
Source Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4.
Legal  when the squares, their mean and the product are computed in float32 or float64. The casts
       around stay where they are: Llama rounds before γ, Gemma after (1 + γ), and both stay so. γ
       moves into the operator only where it multiplies the norm in the norm's own dtype and nothing
       else reads the bare norm. It may be any value of shape [d], such as Gemma's 1 + w.
Not    x · sqrt(d) / ‖x‖, ε outside the root, a mean over other dimensions: those are other
       functions.
Exact  in real arithmetic; the operator may round in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving
from sparsecc.passes.canonical._match import (
    dtype_of,
    mean_last,
    plus_eps,
    square,
    widened,
)
from sparsecc.passes.canonical._norm import (
    NORM_REFUSALS,
    NormSpelling,
    affine_tail,
    check_norm,
    peeled,
    scaled_by_root,
    width,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseRMSNorm(Pass):
    """Raise every spelling of RMSNorm to ``aten.rms_norm``."""

    name: ClassVar[str] = "raise-rmsnorm"
    family: ClassVar[str] = "canonical"
    law: ClassVar[str] = "x·(mean(x²)+ε)^-½·γ = rms_norm(x; γ, ε)"
    source: ClassVar[str] = "Zhang and Sennrich 2019, Root Mean Square Layer Normalization, eq. 4"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "norm passes see one operator"
    refusals: ClassVar[Mapping[str, str]] = NORM_REFUSALS

    def find(self, context: Context) -> list[Match]:
        nodes = list(context.program.graph.nodes)
        return [Match(node) for node in nodes if recognise(node) is not None]

    def check(self, match: Match, context: Context) -> Refusal | None:
        found = _again(match)
        return check_norm(found, dtype_of(found.x), context)

    def rewrite(self, match: Match, context: Context) -> None:
        # Recognised anew: an earlier match of this run may have replaced the input.
        found = _again(match)
        new = context.program.call(
            aten.rms_norm.default,
            (found.x, [width(found, context, self.name)], found.weight, found.eps),
            like=found.root,
            origin=self.name,
            before=found.last,
            val=found.last.meta["val"],
        )
        context.program.replace(found.last, new)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(launches=_again(match).launches - 1)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, w: Any, *, eps: float) -> Any:
            return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

        def after(x: Any, w: Any, *, eps: float) -> Any:
            return torch.rms_norm(x, (x.shape[-1],), w, eps)

        shapes = {"x": ("n", "d"), "w": ("d",)}
        return [Example(before, after, shapes, ("w",), {"eps": (1e-12, 1e-5, 1e-2)})]


def recognise(node: fx.Node) -> NormSpelling | None:
    """The RMSNorm whose normalized value ``node`` is, or None."""
    for scaled, v in scaled_by_root(node):
        mean, eps = plus_eps(v)
        squares = mean_last(mean)
        x = None if squares is None else square(squares)
        if (
            squares is None
            or x is None
            or not same_shape(node.meta["val"].shape, x.meta["val"].shape)
        ):
            continue
        for value, factor in peeled(scaled, dtype_of(node)):
            # The product may read the input before its (exact) widening; promotion widens it there.
            if widened(value) is not widened(x) or dtype_of(mean) != dtype_of(x):
                continue
            if dtype_of(node) != dtype_of(x):
                continue
            weight, _, last = affine_tail(node, factor, with_bias=False)
            return NormSpelling(node, x, eps, weight, None, last)
    return None


def _again(match: Match) -> NormSpelling:
    found = recognise(match.node)
    assert found is not None
    return found
