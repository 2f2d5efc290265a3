"""A constant on a norm's output, folded into the norm's own weight and bias.

Law.   s · (γ ⊙ u + β) = (sγ) ⊙ u + sβ.
Source Sun et al., "The Curse of Depth in Large Language Models" (2025), eq. 7: LayerNorm Scaling multiplies
       the output of each pre-norm by 1/√l.
Legal  when the norm has a weight and no other reader. (A norm whose readers are all linear layers loses its
       constant to ``fold-norm-affine``; this pass serves the others.)
Exact  in real arithmetic; a vector is rescaled, so it costs nothing in training either.
Pays   one multiplication per element where it is not fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsecc.passes.analysis.norms import Norm, as_norm
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.stream import is_number
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving, numel

aten = torch.ops.aten

_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class FoldNormScale(Pass):
    """Fold LayerNorm Scaling's constant into γ and β."""

    name: ClassVar[str] = "fold-norm-scale"
    family: ClassVar[str] = "norm"
    law: ClassVar[str] = "s·norm(x; γ, β) = norm(x; sγ, sβ)"
    source: ClassVar[str] = "Sun et al. 2025, The Curse of Depth in Large Language Models, eq. 7"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "networks trained with LayerNorm Scaling"
    refusals: ClassVar[dict[str, str]] = {
        "fan-out": "something else reads the unscaled norm too",
        "not-a-weight": "the norm has no weight to carry the constant",
        "region": "an autocast or grad-mode region begins or ends between the norm and the constant",
    }

    def find(self, context: Context) -> list[Match]:
        matches = []
        for node in context.program.calls(*_SCALES):
            norm, _ = _scaled_norm(node)
            if norm is not None:
                matches.append(Match(node, {"norm": norm}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        norm: Norm = match.nodes["norm"]
        weights = context.analyses.get(weight_values)
        if len(norm.node.users) != 1:
            other = next(u for u in norm.node.users if u is not match.node)
            return Refusal.at(other, "fan-out", f"{other.name} reads the unscaled norm too")
        mode = context.analyses.get(modes)
        if mode[norm.node] != mode[match.node]:
            return Refusal.at(match.node, "region", self.refusals["region"])
        if norm.weight is None or norm.weight not in weights:
            return Refusal.at(norm.node, "not-a-weight", "the norm has no weight of its own")
        if norm.bias is not None and norm.bias not in weights:
            return Refusal.at(norm.node, "not-a-weight", "the norm's bias is not a weight")
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        norm, factor = _scaled_norm(match.node)
        assert norm is not None
        program = context.program
        build = program.weight(self.name, match.node)

        def scaled(vector: Any) -> Any:
            if vector is None:
                return None
            wide = build.mul(build.wide(vector), factor)
            return build.as_dtype(wide, vector.meta["val"].dtype)

        args: tuple[Any, ...] = (norm.x, norm.shape, scaled(norm.weight))
        args += (scaled(norm.bias), norm.eps) if norm.kind == "layer_norm" else (norm.eps,)
        new = program.call(
            norm.node.target,  # type: ignore[arg-type]
            args,
            like=norm.node,
            origin=self.name,
            before=norm.node,
            val=match.node.meta["val"],
        )
        program.replace(match.node, new)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(flops=numel(match.node))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(u: Any, g: Any, b: Any, *, scale: float) -> Any:
            return (u * g + b) * scale

        def after(u: Any, g: Any, b: Any, *, scale: float) -> Any:
            return u * (g * scale) + b * scale

        shapes = {"u": ("n", "d"), "g": ("d",), "b": ("d",)}
        return [
            Example(
                before, after, shapes, ("g", "b"), {"scale": (0.5, 1.0, 2**-0.5)}, symbolic=True
            )
        ]


def _scaled_norm(node: Any) -> tuple[Norm | None, float]:
    a, b = node.args[:2]
    is_division = node.target in (aten.div.Tensor, aten.div.Scalar)
    for value, factor in ((a, b),) if is_division else ((a, b), (b, a)):
        if not is_number(factor) or factor == 0:
            continue
        norm = as_norm(value) if isinstance(value, torch.fx.Node) else None
        if norm is not None and value.meta["val"].dtype == node.meta["val"].dtype:
            return norm, 1 / factor if is_division else float(factor)
    return None, 1.0
