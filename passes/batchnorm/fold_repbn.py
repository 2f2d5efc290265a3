"""RepBN: BatchNorm plus a multiple of its input, as one BatchNorm.

Law.   With s = √(σ²+ε):  BN(x; γ, β, μ, σ²) + η x = BN(x; γ + η s, β + η μ, μ, σ²).
Source Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
       Re-parameterized Batch Normalization" (2024), eq. 5 and 6.
Legal  when BatchNorm reads the running statistics, its result is read by the sum alone, and η is a number or a
       weight of one element (x itself: η = 1).
Exact  in real arithmetic; in training with frozen statistics too: only vectors are computed in every step.
Pays   a multiplication and an addition; and BatchNorm can then move into a layer before or behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.batchnorms import NOT_AFFINE, BatchNorm, batch_norms
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.stream import is_number
from sparsecc.passes.analysis.weights import WeightValues, weight_values
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


@dataclass(frozen=True)
class FoldRepBN(Pass):
    """Fold ``+ η x`` into the BatchNorm of x."""

    name: ClassVar[str] = "fold-repbn"
    family: ClassVar[str] = "batchnorm"
    law: ClassVar[str] = "s = √(σ²+ε):  BN(x; γ,β,μ,σ²) + ηx = BN(x; γ+ηs, β+ημ, μ,σ²)"
    source: ClassVar[str] = "Guo et al. 2024, SLAB, eq. 5 and 6"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "networks with RepBN (SLAB): opens the way to the other BatchNorm folds"
    refusals: ClassVar[dict[str, str]] = {
        **NOT_AFFINE,
        "fan-out": "something else reads the BatchNorm too",
        "written": "the input is written in place, maybe between the BatchNorm and the sum",
        "widened": "the sum has another dtype than the BatchNorm",
        "region": "an autocast or grad-mode region begins or ends between the BatchNorm and the sum",
    }

    def find(self, context: Context) -> list[Match]:
        norms = context.analyses.get(batch_norms)
        weights = context.analyses.get(weight_values)
        matches = []
        for node in context.program.calls(aten.add.Tensor):
            operands: Any = node.args[:2]
            if node.kwargs:
                continue
            for first, second in (operands, operands[::-1]):
                norm = norms.get(first)
                factor = None if norm is None else _multiple(second, norm.x, weights)
                if factor is not None:
                    matches.append(Match(node, {"norm": norm, "factor": factor}))
                    break
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        norm: BatchNorm = match.nodes["norm"]
        mode = context.analyses.get(modes)
        refusal = norm.refusal(context)
        if refusal is not None:
            return refusal
        if context.analyses.get(aliases).written(norm.x):
            return Refusal.at(norm.x, "written", f"{norm.x.name} is written in place")
        if len(norm.node.users) != 1:
            other = next(u for u in norm.node.users if u is not match.node)
            return Refusal.at(other, "fan-out", f"{other.name} reads the BatchNorm too")
        if norm.node.meta["val"].dtype != match.node.meta["val"].dtype:
            return Refusal.at(match.node, "widened", self.refusals["widened"])
        if mode[norm.node] != mode[match.node]:
            return Refusal.at(match.node, "region", self.refusals["region"])
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        program, norm = context.program, match.nodes["norm"]
        factor: fx.Node | float = match.nodes["factor"]
        build = program.weight(self.name, norm.node)
        dtype = (norm.weight or norm.mean).meta["val"].dtype
        mean = build.wide(norm.mean)
        if isinstance(factor, fx.Node):
            factor = build.call(aten.reshape.default, build.wide(factor), [])
        deviation = build.call(aten.sqrt.default, build.add(build.wide(norm.variance), norm.eps))
        scale, shift = build.mul(deviation, factor), build.mul(mean, factor)
        scale = build.add(scale, 1 if norm.weight is None else build.wide(norm.weight))
        shift = shift if norm.bias is None else build.add(shift, build.wide(norm.bias))
        vectors = [build.as_dtype(v, dtype) for v in (scale, shift)]
        given: Any = norm.node.args
        args = (given[0], *vectors, *given[3:])
        value = program.call(
            aten.batch_norm.default, args, like=norm.node, origin=self.name, before=match.node
        )
        value.meta[MOVED] = "it carries the multiple of its input"
        program.replace(match.node, value)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(3 * nbytes(match.node), 2 * numel(match.node), 2)

    @classmethod
    def examples(cls) -> list[Example]:
        # Of x + μ, which is any input as well: e x and e μ do not cancel then, and digits are left.
        def norm(x: Any, v: Any, g: Any, c: Any, eps: float) -> Any:
            return x / (v * v + eps) ** 0.5 * g + c

        def before(x: Any, m: Any, v: Any, g: Any, c: Any, e: Any, *, eps: float) -> Any:
            return norm(x, v, g, c, eps) + (x + m) * e

        def after(x: Any, m: Any, v: Any, g: Any, c: Any, e: Any, *, eps: float) -> Any:
            return norm(x, v, g + e * (v * v + eps) ** 0.5, c + e * m, eps)

        vectors = dict.fromkeys("mvgce", ("d",))
        options = {"eps": (1e-12, 1e-5, 1e-2)}
        return [
            Example(
                before, after, {"x": ("n", "d"), **vectors}, (*vectors,), options, symbolic=True
            )
        ]


def _multiple(node: Any, x: fx.Node, weights: WeightValues) -> fx.Node | float | None:
    """η where ``node`` is η times ``x``: a number, or a weight of one element."""
    if node is x:
        return 1.0
    if not isinstance(node, fx.Node) or node.target not in (aten.mul.Tensor, aten.mul.Scalar):
        return None
    operands: Any = node.args[:2]
    for value, factor in (operands, operands[::-1]):
        if value is not x:
            continue
        if is_number(factor):
            return float(factor)
        if factor in weights and factor.meta["val"].numel() == 1:
            element: fx.Node = factor
            return element
    return None
