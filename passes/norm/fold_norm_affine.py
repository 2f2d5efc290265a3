"""The weight and bias of a norm, folded into every linear layer that reads it.

Law.   linear(a ⊙ u + c, W, b) = linear(u, W diag(a), b + Wc), for every reader of the norm.
Source algebra; as used for RMSNorm in "SliceGPT" (Ashkboos et al. 2024, §3.2) and "FlashNorm" (2024).
Legal  when all readers are linear layers that contract exactly the normalized axis. a and c may be γ and β
       inside the operator, or spelled after it: Gemma's (1 + w), casts, LayerNorm Scaling's constant.
Exact  in real arithmetic. A bias is created where a linear layer had none and c is not zero.
Pays   two passes over the activation where the norm is not fused, and the reads of γ and β; in training it
       costs a pass over each weight, so there it runs only when named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import OptionsError
from sparsecc.passes.analysis.affine import UNREADABLE, Readers, Tail, affine_tail, linear_readers
from sparsecc.passes.analysis.linear import linears
from sparsecc.passes.analysis.norms import Norm, as_norm
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.weights import weight_values
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


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold γ and β into all consumers of a norm.

    Attributes:
        untie: fold also into a weight that other nodes read (a tied head): they keep the old weight, and a
            second copy of it is made.
    """

    untie: bool = False

    name: ClassVar[str] = "fold-norm-affine"
    family: ClassVar[str] = "norm"
    law: ClassVar[str] = "linear(a⊙u + c, W, b) = linear(u, W·diag(a), b + Wc)"
    source: ClassVar[str] = "algebra; Ashkboos et al. 2024, SliceGPT, §3.2"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = (
        "norms whose weights are not fused away; a precondition of quantization folds"
    )
    refusals: ClassVar[dict[str, str]] = {
        **UNREADABLE,
        "tied": "a reader's weight is shared with another node (pass option untie=True folds a copy)",
        "not-a-weight": "the norm's scale or shift is not a weight, or the program writes it",
        **RECOMPUTED,
    }

    def __post_init__(self) -> None:
        given: Any = self.untie
        if not isinstance(given, bool):
            raise OptionsError(f"pass {self.name!r}: untie must be True or False, not {given!r}.")

    def find(self, context: Context) -> list[Match]:
        weights = context.analyses.get(weight_values)
        maps = context.analyses.get(linears)
        matches = []
        for node in context.program.calls(aten.layer_norm.default, aten.rms_norm.default):
            norm = as_norm(node)
            if norm is None:
                continue
            tail = affine_tail(norm.node, norm.size, weights)
            if norm.weight is None and norm.bias is None and not tail.folds:
                continue
            axis = node.meta["val"].dim() - 1
            reads = linear_readers(tail.end, axis, maps)
            matches.append(Match(node, {"norm": norm, "tail": tail, "readers": reads}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        norm: Norm = match.nodes["norm"]
        reads: Readers = match.nodes["readers"]
        refusal = reads.refusal(match.node, context, untie=self.untie)
        if refusal is not None:
            return refusal
        weights = context.analyses.get(weight_values)
        for vector in (norm.weight, norm.bias):
            if vector is not None and not weights.is_vector(vector, norm.size):
                return Refusal.at(
                    vector, "not-a-weight", f"{vector.name} is not a weight of shape [{norm.size}]"
                )
        mode = context.analyses.get(modes)
        tail: Tail = match.nodes["tail"]
        for step in tail.steps:  # a factor under no_grad detaches
            if mode[step.node][0] != mode[match.node][0]:
                return Refusal.at(step.node, "region", self.refusals["region"])
        return context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        norm = as_norm(match.node)  # afresh: an earlier match may have rewritten its input
        assert norm is not None
        tail: Tail = match.nodes["tail"]
        build = program.weight(self.name, norm.node)
        scale, shift = tail.affine(build, norm.weight, norm.bias)
        for linear in dict.fromkeys(match.nodes["readers"].linears):
            linear.absorb(program, scale, shift, self.name)
        _strip(program, norm, tail, self.name)

    def saving(self, match: Match, context: Context) -> Saving:
        norm: Norm = match.nodes["norm"]
        vectors = [v for v in (norm.weight, norm.bias) if v is not None]
        steps = len(vectors) + len(match.nodes["tail"].folds)
        return Saving(sum(nbytes(v) for v in vectors), steps * numel(norm.node))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(u: Any, W: Any, b: Any, V: Any, g: Any, c: Any) -> Any:
            y = u * g + c
            return y @ W.transpose(0, 1) + b, y @ V.transpose(0, 1)

        def after(u: Any, W: Any, b: Any, V: Any, g: Any, c: Any) -> Any:
            first = u @ (W * g).transpose(0, 1) + (b + (W * c).sum(-1))
            return first, u @ (V * g).transpose(0, 1) + (V * c).sum(-1)

        shapes = {
            "u": ("n", "d"),
            "W": ("k", "d"),
            "b": ("k",),
            "V": ("m", "d"),
            "g": ("d",),
            "c": ("d",),
        }
        return [Example(before, after, shapes, ("W", "b", "V", "g", "c"), symbolic=True)]


def _strip(program: Program, norm: Norm, tail: Tail, origin: str) -> None:
    """Take a and c off the norm; casts between them stay, and every dtype downstream is as it was."""
    bare = program.call(
        norm.node.target,  # type: ignore[arg-type]
        (norm.x, norm.shape, None, None, norm.eps)
        if norm.kind == "layer_norm"
        else (norm.x, norm.shape, None, norm.eps),
        like=norm.node,
        origin=origin,
        before=norm.node,
    )
    value = _cast(program, bare, norm.node, origin)
    for step in tail.steps:
        if step.kind == "cast":
            step.node.update_arg(0, value)
            value = step.node
        else:
            value = _cast(program, value, step.node, origin)
    value.meta[MOVED] = "its weight and bias are folded into its readers"
    end = tail.end if tail.steps else norm.node
    if end is not value:
        end.replace_all_uses_with(value)
    program.version += 1


def _cast(program: Program, value: fx.Node, like: fx.Node, origin: str) -> fx.Node:
    dtype = like.meta["val"].dtype
    return program.cast(value, dtype, like=like, origin=origin, before=like.next)
