"""A scale and a shift by weights, without a norm before them, folded into every linear layer that reads them.

Law.   linear(a ⊙ x + c, W, b) = linear(x, W diag(a), b + Wc), for every reader.
Source algebra; Unified Normalization in inference is such a map (Yang et al. 2022, "Unified Normalization for
       Accelerating and Stabilizing Transformers", eq. 10): γ ⊙ x/√(v+ε) + β with a running second moment v.
Legal  when all readers are linear layers that contract exactly the scaled axis, or unpadded convolutions over
       it, and a and c are weights along it, in any chain of multiplications, divisions and additions.
Exact  in real arithmetic. A bias is created where a linear layer had none and c is not zero.
Pays   a multiplication and an addition for each element, and the reads of a and c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.affine import (
    UNREADABLE,
    Readers,
    Tail,
    affine_step,
    affine_tail,
    linear_readers,
)
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.linear import linears
from sparsecc.passes.analysis.norms import as_norm
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_layout
from sparsecc.passes.analysis.weights import WeightValues, weight_values
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
from sparsecc.program import MOVED, Program

aten = torch.ops.aten

_STEPS = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
)


@dataclass(frozen=True)
class PushAffine(Pass):
    """Fold a per-feature scale and shift into all readers."""

    name: ClassVar[str] = "push-affine"
    family: ClassVar[str] = "norm"
    law: ClassVar[str] = "linear(a⊙x + c, W, b) = linear(x, W·diag(a), b + Wc)"
    source: ClassVar[str] = "algebra; Yang et al. 2022, Unified Normalization, eq. 10 (such a map)"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "Unified Normalization; scales left before a layer by SmoothQuant or AWQ"
    refusals: ClassVar[dict[str, str]] = {
        **UNREADABLE,
        "written": "what is scaled is written in place, maybe before a reader",
        "layout": "the result has other strides than what is scaled, which readers could see",
        "widened": "the result has another dtype than what is scaled",
        **RECOMPUTED,
    }

    def find(self, context: Context) -> list[Match]:
        weights = context.analyses.get(weight_values)
        maps = context.analyses.get(linears)
        matches = []
        seen = _after_norms(context.program, weights)
        for node in context.program.calls(*_STEPS):
            value = None if node in seen else _scaled(node, weights)
            if value is None:
                continue
            size = node.meta["val"].shape[-1]
            step = affine_step(node, value, size, weights)
            assert step is not None
            rest = affine_tail(node, size, weights)
            tail = Tail(rest.end, [step, *rest.steps])
            while any(s.kind == "cast" for s in tail.steps):
                tail.steps.pop()
            tail.end = tail.steps[-1].node
            seen |= {s.node for s in tail.steps}
            if any(isinstance(s.operand, fx.Node) for s in tail.steps):
                axis = node.meta["val"].dim() - 1
                reads = linear_readers(tail.end, axis, maps)
                if reads.all:  # otherwise it is but a bias or a scale of something else
                    nodes = {"tail": tail, "readers": reads, "value": value}
                    matches.append(Match(tail.end, nodes))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        tail: Tail = match.nodes["tail"]
        reads: Readers = match.nodes["readers"]
        value: fx.Node = match.nodes["value"]
        mode = context.analyses.get(modes)
        for step in tail.steps:
            if mode[step.node] != mode[match.node]:
                return Refusal.at(step.node, "region", self.refusals["region"])
        if context.analyses.get(aliases).written(value):
            return Refusal.at(value, "written", f"{value.name} is written in place")
        if not same_layout(match.node.meta["val"], value.meta["val"]):
            return Refusal.at(match.node, "layout", self.refusals["layout"])
        if value.meta["val"].dtype != match.node.meta["val"].dtype:
            return Refusal.at(match.node, "widened", self.refusals["widened"])
        return reads.refusal(match.node, context) or context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        tail: Tail = match.nodes["tail"]
        scale, shift = tail.affine(program.weight(self.name, match.node))
        for linear in match.nodes["readers"].all:
            linear.absorb(program, scale, shift, self.name)
        first = tail.steps[0]
        operands: Any = first.node.args[:2]
        value = operands[1] if operands[0] is first.operand else operands[0]
        value.meta[MOVED] = value.meta.get(MOVED) or "its scale and shift are in its readers"
        tail.end.replace_all_uses_with(value)
        program.version += 1

    def saving(self, match: Match, context: Context) -> Saving:
        steps = match.nodes["tail"].folds
        vectors = [s.operand for s in steps if isinstance(s.operand, fx.Node)]
        return Saving(sum(map(nbytes, vectors)), len(steps) * numel(match.node))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any, v: Any, g: Any, c: Any) -> Any:
            return (x / (v * v + 1) ** 0.5 * g + c) @ W.transpose(0, 1) + b

        def after(x: Any, W: Any, b: Any, v: Any, g: Any, c: Any) -> Any:
            a = g / (v * v + 1) ** 0.5
            return x @ (W * a).transpose(0, 1) + (b + (W * c).sum(-1))

        shapes = {"x": ("n", "d"), "W": ("k", "d"), "b": ("k",)}
        vectors = dict.fromkeys("vgc", ("d",))
        return [Example(before, after, {**shapes, **vectors}, ("W", "b", *vectors), symbolic=True)]


def _after_norms(program: Program, weights: WeightValues) -> set[fx.Node]:
    """What scales or shifts a norm: fold-norm-affine's."""
    found: set[fx.Node] = set()
    for node in program.calls(aten.layer_norm.default, aten.rms_norm.default):
        norm = as_norm(node)
        if norm is not None:
            found |= {step.node for step in affine_tail(node, norm.size, weights).steps}
    return found


def _scaled(node: fx.Node, weights: WeightValues) -> fx.Node | None:
    """The activation that ``node`` scales or shifts by a weight along its last axis, or by a number."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or node in weights:
        return None
    for operand in node.all_input_nodes:
        if operand not in weights and affine_step(node, operand, value.shape[-1], weights):
            return operand
    return None
