"""LayerScale and other per-channel factors, folded into the linear layer that produces their operand.

Law.   λ ⊙ linear(x, W, b) = linear(x, diag(λ) W, λ ⊙ b).
Source Touvron et al., "Going deeper with Image Transformers" (2021), eq. 4; the fold is algebra.
Legal  when λ is a weight along the output features of a linear layer or convolution (of every summand, of
       every part of a concatenation) and nothing else reads what lies between.
Exact  in real arithmetic. In training it costs a pass over the weight each step, so it runs only when named.
Pays   one multiplication per element; and it lets LayerNorm → RMSNorm reach through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsecc.passes.analysis.producers import UNFOLDABLE, Producers, producers
from sparsecc.passes.analysis.weights import axis_along, weight_values
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
        **UNFOLDABLE,
        **RECOMPUTED,
    }

    def find(self, context: Context) -> list[Match]:
        weights = context.analyses.get(weight_values)
        matches = []
        for node in context.program.calls(aten.mul.Tensor):
            operands: Any = node.args[:2]
            for value, factor in (operands, operands[::-1]):
                axis = axis_along(factor, value, node, weights)
                if axis is None:
                    continue
                found = producers(value, axis, node, context, shift=False)
                if found.stop is None:
                    nodes = {"producers": found, "factor": factor, "value": value}
                    matches.append(Match(node, nodes))
                    break
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        found: Producers = match.nodes["producers"]
        return found.refusal(match.node, context) or context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        found: Producers = match.nodes["producers"]
        build = program.weight(self.name, match.node)
        factor = build.wide(match.nodes["factor"])
        vector = build.call(aten.reshape.default, factor, [-1])
        found.fold(program, vector, None, self.name, "it carries the per-channel factor")
        found.replace(program, match.node, match.nodes["value"], self.name)

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
