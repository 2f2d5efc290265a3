"""BatchNorms of a program, and the affine map that each is when it reads running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses, Context, Refusal
from sparsecc.program import Program, WeightBuilder

aten = torch.ops.aten


# Why a BatchNorm is no affine map with weights; the codes of :meth:`BatchNorm.refusal`.
NOT_AFFINE: Mapping[str, str] = {
    "batch-statistics": "it normalizes by the statistics of the batch",
    "not-a-weight": "its scale, shift or statistics are computed from the input",
}


@dataclass(frozen=True)
class BatchNorm:
    """``γ (x − μ)/√(σ²+ε) + β`` over axis 1 of ``x`` [N, C, ...]; γ and β may be None.

    ``of_the_batch``: μ and σ² are those of the batch (training, or no running statistics are kept).
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node | None
    variance: fx.Node | None
    eps: float
    of_the_batch: bool

    @property
    def vectors(self) -> list[fx.Node]:
        """What it reads besides ``x``."""
        return [v for v in (self.weight, self.bias, self.mean, self.variance) if v is not None]

    def reads_only(self, weights: WeightValues) -> bool:
        """Whether it is an affine map with weights: running statistics, nothing computed from the input."""
        return not self.of_the_batch and all(v in weights for v in self.vectors)

    def refusal(self, context: Context) -> Refusal | None:
        """Why it is none (codes of ``NOT_AFFINE``); None where it is."""
        if self.of_the_batch:
            return Refusal.at(self.node, "batch-statistics", NOT_AFFINE["batch-statistics"])
        if not self.reads_only(context.analyses.get(weight_values)):
            return Refusal.at(self.node, "not-a-weight", NOT_AFFINE["not-a-weight"])
        return None

    def affine(self, build: WeightBuilder) -> tuple[fx.Node, fx.Node]:
        """(t, h), both [C] and no narrower than fp32, with ``BN(x) = t x + h``; t = γ/√(σ²+ε), h = β − t μ."""
        assert self.mean is not None
        assert self.variance is not None
        variance = build.add(build.wide(self.variance), self.eps)
        scale = build.call(aten.rsqrt.default, variance)
        if self.weight is not None:
            scale = build.mul(scale, build.wide(self.weight))
        shift = build.mul(build.wide(self.mean), scale)
        if self.bias is not None:
            return scale, build.sub(build.wide(self.bias), shift)
        return scale, build.call(aten.neg.default, shift)


def batch_norms(program: Program, analyses: Analyses) -> dict[fx.Node, BatchNorm]:
    """Every BatchNorm of an activation, by node; NFNets standardize their weights with the operator."""
    weights = analyses.get(weight_values)
    found: dict[fx.Node, BatchNorm] = {}
    for node in program.calls(aten.batch_norm.default):
        args: Any = node.args
        x, weight, bias, mean, variance, training, _, eps = args[:8]
        if x in weights:
            continue
        missing = mean is None or variance is None
        found[node] = BatchNorm(node, x, weight, bias, mean, variance, eps, training or missing)
    return found
