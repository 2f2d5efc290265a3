"""Gated feed-forward networks in one operand order.

Law.   up(x) ⊙ act(gate(x)) = act(gate(x)) ⊙ up(x).
Source Shazeer, "GLU Variants Improve Transformer" (2020), eq. 5.
Legal  always: multiplication commutes bit by bit. Fused gate and up projections stay fused; only
       the order of the product is settled. :mod:`sparsecc.passes.analysis.ffn` is the view that
       later passes share.
Exact  bitwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsecc.passes.analysis.ffn import as_gated
from sparsecc.passes.analysis.linear import every_linear
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal
from sparsecc.passes.canonical._guard import GUARD_REFUSALS, guard

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseGatedFFN(Pass):
    """Put the activated branch of a gated FFN first."""

    name: ClassVar[str] = "raise-gated-ffn"
    family: ClassVar[str] = "canonical"
    law: ClassVar[str] = "up(x) ⊙ act(gate(x)) = act(gate(x)) ⊙ up(x)"
    source: ClassVar[str] = "Shazeer 2020, GLU Variants Improve Transformer, eq. 5"
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    pays: ClassVar[str] = "FFN passes see one order"
    refusals: ClassVar[Mapping[str, str]] = GUARD_REFUSALS

    def find(self, context: Context) -> list[Match]:
        maps = context.analyses.get(every_linear)
        matches = []
        for node in context.program.calls(aten.mul.Tensor):
            gated = as_gated(node, maps) or as_gated(node, maps, axis=1)
            if gated is not None and not gated.activated_first:
                matches.append(Match(node, {"activation": gated.activation}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        node = match.node
        return guard(context, node, node.args)

    def rewrite(self, match: Match, context: Context) -> None:
        up, activated = match.node.args[:2]
        new = context.program.call(
            aten.mul.Tensor,
            (activated, up),
            like=match.node,
            origin=self.name,
            before=match.node,
            val=match.node.meta["val"],
        )
        context.program.replace(match.node, new)

    @classmethod
    def examples(cls) -> list[Example]:
        functional = torch.nn.functional

        def before(x: Any, g: Any, u: Any) -> Any:
            return (x @ u) * functional.silu(x @ g)

        def after(x: Any, g: Any, u: Any) -> Any:
            return functional.silu(x @ g) * (x @ u)

        shapes = {"x": ("n", "d"), "g": ("d", "k"), "u": ("d", "k")}
        return [Example(before, after, shapes, ("g", "u"))]
