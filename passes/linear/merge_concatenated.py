"""Linear maps of one input whose results are concatenated, merged into one.

Law.   cat(linear(x, W₁, b₁), linear(x, W₂, b₂)) = linear(x, [W₁; W₂], [b₁; b₂]).
Source algebra; Ding et al., "Diverse Branch Block" (2021), transform IV, merges parallel branches so.
Legal  when the parts are linear layers or convolutions over the same value with the same arguments, joined
       along their features, and nothing else reads them. A missing bias is one of zeros.
Exact  in real arithmetic: each element of the result is computed from the same row.
Pays   a read of x and a kernel for each part but one, and the copy that joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import is_contiguous, same_shape
from sparsecc.passes.analysis.stream import other_readers
from sparsecc.passes.analysis.weights import other_users, weight_values
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
)
from sparsecc.program import MOVED

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeConcatenated(Pass):
    """Merge concatenated linear maps of one input into one."""

    name: ClassVar[str] = "merge-concatenated"
    family: ClassVar[str] = "linear"
    law: ClassVar[str] = "cat(linear(x,W₁,b₁), linear(x,W₂,b₂)) = linear(x, [W₁;W₂], [b₁;b₂])"
    source: ClassVar[str] = "algebra; Ding et al. 2021, Diverse Branch Block, transform IV"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "parallel branches without an activation; separate projections joined"
    refusals: ClassVar[dict[str, str]] = {
        "arguments": "the parts differ in stride, padding, dilation, kernel or spelling",
        "grouped": "a grouped convolution reads another part of the input for each group",
        "fan-out": "something else reads a part too",
        "tied": "a part's weight is shared with another node",
        "written": "the input is written in place, maybe before the concatenation",
        "layout": "the parts or the whole are not contiguous",
        **RECOMPUTED,
        "region": "an autocast or grad-mode region begins or ends between the parts",
    }

    def find(self, context: Context) -> list[Match]:
        maps = context.analyses.get(linears)
        matches = []
        for node in context.program.calls(aten.cat.default, aten.concat.default):
            parts = [maps.get(part) for part in node.all_input_nodes]
            found = [part for part in parts if part is not None]
            given: Any = node.args[0]
            if len(found) < 2 or len(found) != len(given):
                continue
            axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            rank = node.meta["val"].dim()
            same_axis = all(part.feature_axis % rank == axis % rank for part in found)
            if same_axis and all(part.x is found[0].x for part in found):
                matches.append(Match(node, {"parts": found}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        parts: list[Linear] = match.nodes["parts"]
        first = parts[0]
        weights = context.analyses.get(weight_values)
        mode = context.analyses.get(modes)
        if context.analyses.get(aliases).written(first.x):
            return Refusal.at(first.x, "written", f"{first.x.name} is written in place")
        if not is_contiguous(match.node.meta["val"]):
            return Refusal.at(match.node, "layout", self.refusals["layout"])
        for part in parts:
            node = part.node
            if part.is_grouped:
                return Refusal.at(node, "grouped", self.refusals["grouped"])
            if not (part.is_conv or node.target is aten.linear.default) or not _alike(part, first):
                return Refusal.at(node, "arguments", self.refusals["arguments"])
            for other in other_readers(node, match.node):
                return Refusal.at(other, "fan-out", f"{other.name} reads {node.name} too")
            if other_users(part.weight, node, weights):
                return Refusal.at(node, "tied", f"the weight of {node.name} is shared")
            if not all(map(is_contiguous, (node.meta["val"], part.weight.meta["val"]))):
                return Refusal.at(node, "layout", self.refusals["layout"])
            if mode[node] != mode[match.node]:
                return Refusal.at(node, "region", self.refusals["region"])
        return context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program, parts = context.program, match.nodes["parts"]
        first: Linear = parts[0]
        build = program.weight(self.name, match.node)
        weight = build.call(aten.cat.default, [p.weight for p in parts], first.out_axis)
        bias = None
        if any(part.bias is not None for part in parts):
            rows = [
                build.call(aten.new_zeros.default, p.weight, [p.features])
                if p.bias is None
                else p.bias
                for p in parts
            ]
            bias = build.call(aten.cat.default, rows, 0)
        given: Any = first.node.args
        target: Any = first.node.target
        whole = program.call(
            target,
            (given[0], weight, bias, *given[3:]),
            like=match.node,
            origin=self.name,
            before=match.node,
            val=match.node.meta["val"],
        )
        whole.meta[MOVED] = "it computes the parts at once"
        program.replace(match.node, whole)

    def saving(self, match: Match, context: Context) -> Saving:
        parts: list[Linear] = match.nodes["parts"]
        again = nbytes(parts[0].x) * (len(parts) - 1)
        return Saving(again + 2 * nbytes(match.node), 0, len(parts))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, R: Any, s: Any) -> Any:
            y = x @ R[:1].transpose(0, 1) + s[:1]
            return y, x @ R[1:].transpose(0, 1) + s[1:]

        def after(x: Any, R: Any, s: Any) -> Any:
            whole = x @ R.transpose(0, 1) + s
            return whole[:, :1], whole[:, 1:]

        shapes = {"x": ("n", "k"), "R": ("d", "k"), "s": ("d",)}
        return [Example(before, after, shapes, ("R", "s"), symbolic=True)]


def _alike(part: Linear, first: Linear) -> bool:
    """Whether two maps differ in their weights alone."""
    ours, theirs = (x.weight.meta["val"] for x in (part, first))
    kernels = [list(w.shape) for w in (ours, theirs)]
    for kernel, one in zip(kernels, (part, first), strict=True):
        kernel[one.out_axis] = 0
    return (
        part.node.target is first.node.target
        and list(part.node.args[3:]) == list(first.node.args[3:])
        and part.node.kwargs == first.node.kwargs
        and ours.dtype == theirs.dtype
        and same_shape(*kernels)
    )
