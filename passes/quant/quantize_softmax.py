"""Attention probabilities rounded as a recipe says, before they weigh the values.

Law.   softmax(s q kᵀ + m) v ≈ Q(softmax(s q kᵀ + m)) v, Q a quantizer of runtime/ops/rounded_attention.py.
       P = A + √2 B with powers of two in A and B, so P v = A v + √2 (B v): shifted sums, one multiplication.
Source Li et al. 2023, "RepQ-ViT" (softmax activations); Zhong et al. 2023, "I&S-ViT" (shift-uniform-log2);
       Yang et al. 2024, "DopQ-ViT" (finer codes near 1).
Legal  in inference, for every attention of the model: the operator without dropout, and a softmax over the
       last axis that a product with something other than a weight reads. Other readers of the softmax keep it
       as it is.
Lossy  by the rounding. Rounded rows do not sum to one: a shift of v that was moved behind comes back changed.
Pays   nothing: it is emulated, to see what integer attention would make of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import RecipeError
from sparsecc.passes.analysis.regions import autocasts
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal
from sparsecc.passes.canonical._match import argument
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.rounded_attention import (
    Rounding,
    rounded_attention,
    rounded_probabilities,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizeSoftmax(Pass):
    """Round attention probabilities.

    Attributes:
        recipe: whose ``attention`` is carried out.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe("none"))

    name: ClassVar[str] = "quantize-softmax"
    family: ClassVar[str] = "quant"
    law: ClassVar[str] = "softmax(s·qkᵀ + m) v ≈ Q(softmax(s·qkᵀ + m)) v"
    source: ClassVar[str] = (
        "Li et al. 2023, RepQ-ViT; Zhong et al. 2023, I&S-ViT; Yang et al. 2024, DopQ-ViT"
    )
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    pays: ClassVar[str] = "nothing: it emulates integer attention, to see what that would lose"
    refusals: ClassVar[Mapping[str, str]] = {
        "training": "gradients flow, and rounding has none",
        "dropout": "probabilities are dropped at random",
        "axis": "the softmax is not over the last axis, which the product sums over",
        "weight": "what the probabilities weigh is a weight: this is no attention",
        "region": "under autocast, which narrows the product",
    }

    def find(self, context: Context) -> list[Match]:
        if not self.recipe.attention:
            return []
        note, program = self._rounding().text(), context.program
        found = [
            Match(n, note=note) for n in program.calls(aten.scaled_dot_product_attention.default)
        ]
        for node in program.calls(aten.matmul.default, aten.bmm.default):
            p: Any = node.args[0]
            if p.target is aten.softmax.int:
                found.append(Match(node, {"softmax": p}, note=note))
        return found

    def _rounding(self) -> Rounding:
        """Of the recipe.

        Raises:
            RecipeError: it says something else.
        """
        try:
            return Rounding.of(self.recipe.attention)
        except ValueError as error:
            raise RecipeError(f"the recipe's {error}.") from error

    def check(self, match: Match, context: Context) -> Refusal | None:
        node, softmax = match.node, match.nodes.get("softmax")
        code = ""
        if context.trains:
            code = "training"
        elif node in context.analyses.get(autocasts):
            code = "region"
        elif softmax is None:
            code = "dropout" if argument(node, "dropout_p") else ""
        elif argument(softmax, "dim") not in (-1, softmax.meta["val"].dim() - 1):
            code = "axis"
        elif node.args[1] in context.analyses.get(weight_values):
            code = "weight"
        return Refusal.at(node, code, self.refusals[code]) if code else None

    def rewrite(self, match: Match, context: Context) -> None:
        node, program, law = match.node, context.program, self._rounding().text()

        def call(target: Any, *args: Any) -> fx.Node:
            return program.call(target, args, like=node, origin=self.name, before=node)

        if "softmax" in match.nodes:
            rounded = call(rounded_probabilities, node.args[0], law)
            program.replace(node, call(node.target, rounded, node.args[1]))
            return
        options = (argument(node, name) for name in ("attn_mask", "is_causal", "scale"))
        grouped = bool(argument(node, "enable_gqa"))
        new = call(rounded_attention, *node.args[:3], *options, grouped, law)
        program.replace(node, new)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(A: Any, B: Any, v: Any, r: Any) -> Any:
            return (A + B * r[:, None]) @ v

        def after(A: Any, B: Any, v: Any, r: Any) -> Any:
            return A @ v + (B @ v) * r[:, None]  # one multiplication behind the shifted sums

        shapes = {"A": ("n", "k"), "B": ("n", "k"), "v": ("k", "d"), "r": ("n",)}
        return [Example(before, after, shapes, symbolic=True)]
