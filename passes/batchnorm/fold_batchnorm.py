"""BatchNorm by running statistics, folded into the linear layer or convolution before it.

Law.   With t = γ/√(σ²+ε):  BN(conv(x, W, b)) = conv(x, diag(t)·W, t⊙(b−μ) + β).
Source Ioffe & Szegedy, "Batch Normalization" (2015), algorithm 2, step 11 (the layer); algebra (the fold).
Legal  when BatchNorm reads the running statistics and nothing else reads the convolution's result. The out
       features of W are axis 0, and of a transposed convolution axis 1 within each group. A sum of
       convolutions is folded in each summand, a concatenation in each part.
Exact  in real arithmetic, for every stride, dilation, padding mode and number of groups. In training the
       shift stays an addition, and the gradient of γ rounds more where |μ|/σ is large (2.7 times eager's was
       seen), so it runs only when named.
Pays   a read and a write of the feature map, and one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsecc.passes.analysis.batchnorms import NOT_AFFINE, BatchNorm, batch_norms
from sparsecc.passes.analysis.producers import UNFOLDABLE, Producers, producers
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


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold a BatchNorm into its producer."""

    name: ClassVar[str] = "fold-batchnorm"
    family: ClassVar[str] = "batchnorm"
    law: ClassVar[str] = "t = γ/√(σ²+ε):  BN(conv(x, W, b)) = conv(x, diag(t)·W, t⊙(b−μ)+β)"
    source: ClassVar[str] = "Ioffe & Szegedy 2015, algorithm 2 (the layer); algebra (the fold)"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "convolutional networks: one pass over each feature map, one kernel"
    refusals: ClassVar[dict[str, str]] = {
        **NOT_AFFINE,
        "producer": "no linear layer or convolution makes what it normalizes",
        **UNFOLDABLE,
        **RECOMPUTED,
    }

    def find(self, context: Context) -> list[Match]:
        matches = []
        for norm in context.analyses.get(batch_norms).values():
            found = producers(norm.x, 1, norm.node, context, shift=not context.trains)
            matches.append(Match(norm.node, {"norm": norm, "producers": found}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        norm: BatchNorm = match.nodes["norm"]
        found: Producers = match.nodes["producers"]
        refusal = norm.refusal(context)
        if refusal is not None:
            return refusal
        if found.stop is not None:
            words = f"{found.stop.name} makes what it normalizes, which is not a linear layer"
            return Refusal.at(found.stop, "producer", words)
        return found.refusal(norm.node, context) or context.recomputed(norm.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program, norm = context.program, match.nodes["norm"]
        found: Producers = match.nodes["producers"]
        build = program.weight(self.name, norm.node)
        scale, shift = norm.affine(build)
        moved, value = "it carries the BatchNorm", norm.x
        if context.trains:
            # The gradient of a convolution's bias is summed naively: 6 times eager's error was measured.
            found.fold(program, scale, None, self.name, moved)
            ones = [1] * (value.meta["val"].dim() - 2)
            vector = build.call(torch.ops.aten.reshape.default, shift, [-1, *ones])
            value = program.call(
                torch.ops.aten.add.Tensor,
                (value, vector),
                like=norm.node,
                origin=self.name,
                before=norm.node,
            )
        else:
            found.fold(program, scale, shift, self.name, moved)
        found.replace(program, norm.node, value, self.name)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(2 * nbytes(match.node), 2 * numel(match.node), 1)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any, m: Any, v: Any, g: Any, c: Any, *, eps: float) -> Any:
            return (x @ W.transpose(0, 1) + b - m) / (v * v + eps) ** 0.5 * g + c

        def after(x: Any, W: Any, b: Any, m: Any, v: Any, g: Any, c: Any, *, eps: float) -> Any:
            t = g / (v * v + eps) ** 0.5
            return x @ (W.transpose(0, 1) * t) + (t * (b - m) + c)

        shapes = {"x": ("n", "k"), "W": ("d", "k")}
        vectors = dict.fromkeys("bmvgc", ("d",))
        options = {"eps": (1e-12, 1e-5, 1e-2)}
        return [
            Example(before, after, {**shapes, **vectors}, ("W", *vectors), options, symbolic=True)
        ]
