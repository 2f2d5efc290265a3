"""BatchNorm by running statistics, folded into the linear layers and convolutions that read it.

Law.   With t = γ/√(σ²+ε), h = β − t⊙μ:  conv(t⊙x + h, W, b) = conv(x, W·diag(t), b + W∗h).
Source Ioffe & Szegedy, "Batch Normalization" (2015), algorithm 2, step 11 (the layer); algebra (the fold).
Legal  when every reader is a linear layer or a convolution over the normalized channels. Where a convolution
       pads with zeros, h is missing at the border: W∗h is a map of the result's size, [1, out, H, W], which
       costs more than it saves, so it is made only when the pass is named and the size is known.
Exact  in real arithmetic, for every stride, dilation and number of groups.
Pays   where fold-batchnorm has no producer to fold into (a pooled feature, an activation between).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.affine import UNREADABLE, Readers, linear_readers
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.batchnorms import NOT_AFFINE, BatchNorm, batch_norms
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.sizes import same_layout
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
from sparsecc.program import MOVED

aten = torch.ops.aten


@dataclass(frozen=True)
class PushBatchNorm(Pass):
    """Fold a BatchNorm into its readers."""

    name: ClassVar[str] = "push-batchnorm"
    family: ClassVar[str] = "batchnorm"
    law: ClassVar[str] = "t = γ/√(σ²+ε), h = β−t⊙μ:  conv(t⊙x+h, W, b) = conv(x, W·diag(t), b+W∗h)"
    source: ClassVar[str] = "Ioffe & Szegedy 2015, algorithm 2 (the layer); algebra (the fold)"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = (
        "BatchNorm before a classifier (LeViT), or between an activation and a layer"
    )
    refusals: ClassVar[dict[str, str]] = {
        **NOT_AFFINE,
        "layout": "its result has other strides than its input, which readers could see",
        "written": "its input is written in place, maybe before a reader",
        **UNREADABLE,
        "border": "a convolution pads it with zeros: the shift becomes a map of the result's size, which "
        "costs more than it saves; name the pass to force it (the size must be known)",
        **RECOMPUTED,
    }

    def find(self, context: Context) -> list[Match]:
        maps = context.analyses.get(linears)
        matches = []
        for norm in context.analyses.get(batch_norms).values():
            reads = linear_readers(norm.node, 1, maps, padded=True)
            matches.append(Match(norm.node, {"norm": norm, "readers": reads}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        norm: BatchNorm = match.nodes["norm"]
        reads: Readers = match.nodes["readers"]
        refusal = norm.refusal(context)
        if refusal is not None:
            return refusal
        if context.analyses.get(aliases).written(norm.x):
            return Refusal.at(norm.x, "written", f"{norm.x.name} is written in place")
        if not same_layout(norm.node.meta["val"], norm.x.meta["val"]):
            return Refusal.at(norm.node, "layout", self.refusals["layout"])
        refusal = reads.refusal(norm.node, context)
        if refusal is not None:
            return refusal
        for linear in reads.padded:
            if not context.explicit or not _has_known_size(linear):
                return Refusal.at(linear.node, "border", self.refusals["border"])
        return context.recomputed(norm.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program, norm = context.program, match.nodes["norm"]
        reads: Readers = match.nodes["readers"]
        scale, shift = norm.affine(program.weight(self.name, norm.node))
        for linear in dict.fromkeys(reads.linears):
            linear.absorb(program, scale, shift, self.name)
        for linear in dict.fromkeys(reads.padded):
            self._with_map(linear, scale, shift, context)
        dtype = norm.node.meta["val"].dtype
        value = program.cast(
            norm.node.args[0], dtype, like=norm.node, origin=self.name, before=norm.node
        )
        value.meta[MOVED] = "the BatchNorm is in its readers"
        program.replace(norm.node, value)

    def _with_map(self, linear: Linear, scale: fx.Node, shift: fx.Node, context: Context) -> None:
        """W∗h as what the convolution makes of h alone, zero border included, added behind it."""
        program, node = context.program, linear.node
        build = program.weight(self.name, node)
        x = linear.x.meta["val"]
        rank = x.dim()
        channels = build.call(aten.reshape.default, shift, [1, -1, *[1] * (rank - 2)])
        channels = build.call(aten.expand.default, channels, [1, *x.shape[1:]])
        given: Any = node.args
        target: Any = node.target
        wide = build.wide(linear.weight)
        made = build.call(target, channels, wide, None, *given[3:])
        linear.absorb(program, scale, None, self.name)
        made = build.as_dtype(made, node.meta["val"].dtype)
        total = program.call(aten.add.Tensor, (node, made), like=node, origin=self.name, after=node)
        program.bring_before(made, total)
        node.meta[MOVED] = "its share of the BatchNorm's shift is added behind it"
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def saving(self, match: Match, context: Context) -> Saving:
        reads: Readers = match.nodes["readers"]
        maps = sum(nbytes(linear.node) for linear in reads.padded)
        return Saving(2 * nbytes(match.node) - maps, 2 * numel(match.node), 1)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any, m: Any, v: Any, g: Any, c: Any, *, eps: float) -> Any:
            return ((x - m) / (v * v + eps) ** 0.5 * g + c) @ W.transpose(0, 1) + b

        def after(x: Any, W: Any, b: Any, m: Any, v: Any, g: Any, c: Any, *, eps: float) -> Any:
            t = g / (v * v + eps) ** 0.5
            return x @ (W * t).transpose(0, 1) + (b + (W * (c - t * m)).sum(-1))

        def padded(y: Any, V: Any, t: Any, h: Any) -> Any:
            return conv(y * t[:, None, None] + h[:, None, None], V, padding=1)

        def mapped(y: Any, V: Any, t: Any, h: Any) -> Any:
            shift = h[:, None, None].expand(1, *y.shape[1:])
            return conv(y, V * t[:, None, None], padding=1) + conv(shift, V, padding=1)

        conv = torch.nn.functional.conv2d
        shapes = {"x": ("n", "d"), "W": ("k", "d"), "b": ("k",)}
        vectors = dict.fromkeys("mvgc", ("d",))
        options = {"eps": (1e-12, 1e-5, 1e-2)}
        image: dict[str, tuple[str, ...]] = {"y": ("n", "d", "rows", "columns")}
        image |= {"V": ("m", "d", "k", "k"), "t": ("d",), "h": ("d",)}
        return [
            Example(
                before, after, {**shapes, **vectors}, ("W", "b", *vectors), options, symbolic=True
            ),
            Example(padded, mapped, image, ("V", "t", "h")),
        ]


def _has_known_size(linear: Linear) -> bool:
    return all(isinstance(size, int) for size in linear.x.meta["val"].shape[1:])
