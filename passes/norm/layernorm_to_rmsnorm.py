"""LayerNorm → RMSNorm: ``LN(x) = RMS(Πx)``, with Π = I − 11ᵀ/d folded into whatever writes the stream.

Law.   layer_norm(x, γ, β, ε) = rms_norm(Πx, γ, ε) + β, because Πx has no mean, so its variance is its mean
       square and the same ε stays exact. Π commutes with residual adds, per-token factors and reindexing; so
       it is moved up to the weights that write the stream: W ← ΠW, b ← Πb, E ← EΠ.
Source Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (2023), §3, eq. 4–7.
Legal  when every reader of the recentred values is blind to their mean (LayerNorms over the same axis), or
       carries them on to such readers; where to recentre is a minimum cut (``analysis.zero_mean``).
Exact  in real arithmetic, at inference and in training: ∂L/∂W = Π ∂L/∂(ΠW), so AdamW walks the same path.
Pays   one reduction and the centring per token and norm; costs nothing at run time in inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.norms import Norm, as_norm
from sparsecc.passes.analysis.zero_mean import Plan, Producer, Value, is_narrower, recentring_plan
from sparsecc.passes.base import (
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
    Saving,
    numel,
)
from sparsecc.program import MOVED, Program

aten = torch.ops.aten


@dataclass
class _Recentring:
    """One plan, and whether it has been carried out; shared by the matches of one run."""

    plan: Plan
    done: bool = False


@dataclass(frozen=True)
class LayerNormToRMSNorm(Pass):
    """Turn every LayerNorm that reads a recentrable stream into an RMSNorm."""

    name: ClassVar[str] = "layernorm-to-rmsnorm"
    family: ClassVar[str] = "norm"
    law: ClassVar[str] = "layer_norm(x, γ, β, ε) = rms_norm(Πx, γ, ε) + β;  Π(Wx+b) = (ΠW)x + Πb"
    source: ClassVar[str] = "Jiang et al. 2023, Pre-RMSNorm and Pre-CRMSNorm Transformers, eq. 4-7"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "pre-LN networks: one reduction and the centring per token and norm"
    refusals: ClassVar[dict[str, str]] = {
        "normalized-shape": "the norm is over more than the last axis",
        "symbolic-features": "the feature axis has a symbolic size",
        "stream-exit": "something that sees the mean reads the stream: an output, a head, an RMSNorm",
        "post-norm": "the stream is the output of a LayerNorm with weights (post-LN, sandwich norm)",
        "layer-scale": "an unfolded per-channel factor stands before the stream",
        "dropout": "element dropout is active on the stream",
        "mutated": "the stream is written in place",
        "widened": "a weight, a table or an input is read in a wider dtype: recentred, it would be rounded",
        "costs-more": "subtracting the mean at run time would cost more than the norms save",
    }

    def find(self, context: Context) -> list[Match]:
        state = _Recentring(context.analyses.get(recentring_plan))
        return [
            Match(node, {"state": state}) for node in context.program.calls(aten.layer_norm.default)
        ]

    def check(self, match: Match, context: Context) -> Refusal | None:
        refused = match.nodes["state"].plan.refused.get(match.node)
        if refused is None:
            return None
        code, reason, blame = refused
        return Refusal.at(blame, code, reason)

    def rewrite(self, match: Match, context: Context) -> None:
        program, state = context.program, match.nodes["state"]
        if not state.done:  # all of it at once: norms that stay LayerNorms are blind to the mean
            state.done = True
            moved = {value for needed in state.plan.norms.values() for value in needed}
            for value in sorted(moved, key=lambda v: v[0]):
                self._recentre(program, value, state.plan)
        norm = as_norm(match.node)
        assert norm is not None
        program.replace(norm.node, rms_norm_like(program, norm, self.name))

    def saving(self, match: Match, context: Context) -> Saving:
        # Per element: the subtraction; per row: one sum. Bytes are equal once fused.
        return Saving(flops=2 * numel(match.node))

    # ---- recentring ------------------------------------------------------------------------------

    def _recentre(self, program: Program, value: Value, plan: Plan) -> None:
        node, _ = value
        node.meta[MOVED] = "its mean over the features is taken out"
        producer = plan.producers.get(value)
        if producer is not None:
            self._at_producer(program, node, producer)
        for operand, axis in plan.edges.get(value, ()):
            wide = operand
            if is_narrower(operand, node):
                dtype = node.meta["val"].dtype
                wide = program.call(
                    aten.to.dtype, (operand, dtype), like=node, origin=self.name, before=node
                )
            centred = self._subtracted(program, wide, axis, before=node)
            node.replace_input_with(operand, centred)

    def _at_producer(self, program: Program, node: fx.Node, producer: Producer) -> None:
        build = program.weight(self.name, node)
        if producer.linear is not None:
            bias = producer.linear.bias
            producer.linear.set_weights(
                program,
                self.name,
                weight=build.centred(producer.weight, producer.axis),
                bias=None if bias is None else build.centred(bias, 0),
            )
        elif producer.kind == "embedding":
            node.update_arg(0, build.centred(producer.weight, producer.axis))
        else:
            following = node.next
            if producer.kind == "weight":
                centred = build.centred(node, producer.axis)
            else:
                centred = self._subtracted(program, node, producer.axis, before=following)
            mine = _between(node, centred)
            node.replace_all_uses_with(centred, delete_user_cb=lambda user: user not in mine)
            centred.meta[MOVED] = node.meta.pop(MOVED)
        program.version += 1

    def _subtracted(
        self, program: Program, value: fx.Node, axis: int, *, before: fx.Node
    ) -> fx.Node:
        mean = program.call(
            aten.mean.dim, (value, [axis], True), like=value, origin=self.name, before=before
        )
        return program.call(
            aten.sub.Tensor, (value, mean), like=value, origin=self.name, before=before
        )

    @classmethod
    def examples(cls) -> list[Example]:
        def rms(x: Any, eps: float) -> Any:
            return x / ((x * x).mean(-1, keepdim=True) + eps) ** 0.5

        def layer(x: Any, eps: float) -> Any:
            return rms(x - x.mean(-1, keepdim=True), eps)

        def before(x: Any, h: Any, W: Any, b: Any, g: Any, c: Any, *, eps: float) -> Any:
            return layer(x + (h @ W.transpose(0, 1) + b), eps) * g + c

        def after(x: Any, h: Any, W: Any, b: Any, g: Any, c: Any, *, eps: float) -> Any:
            W, b = W - W.mean(0, keepdim=True), b - b.mean(-1, keepdim=True)
            x = x - x.mean(-1, keepdim=True)
            return rms(x + (h @ W.transpose(0, 1) + b), eps) * g + c

        shapes = {"x": ("n", "d"), "h": ("n", "k"), "W": ("d", "k")}
        vectors = {"b": ("d",), "g": ("d",), "c": ("d",)}
        return [
            Example(
                before,
                after,
                {**shapes, **vectors},
                ("W", "b", "g", "c"),
                {"eps": (1e-12, 1e-5, 1e-2)},
                symbolic=True,
            )
        ]


def _between(node: fx.Node, last: fx.Node) -> set[fx.Node]:
    """``last`` and the nodes it is computed from, back to ``node``."""
    found, stack = {last}, [last]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is not node and source not in found:
                found.add(source)
                stack.append(source)
    return found


def rms_norm_like(program: Program, norm: Norm, origin: str) -> fx.Node:
    """An RMSNorm with the weight, bias, ε and result dtype of a LayerNorm (one rounding, as it has)."""
    x, weight, bias = norm.x, norm.weight, norm.bias
    result = norm.node.meta["val"].dtype
    half = x.meta["val"].dtype in (torch.bfloat16, torch.float16)
    same = all(v is None or v.meta["val"].dtype == x.meta["val"].dtype for v in (weight, bias))

    def call(target: Any, *args: Any) -> fx.Node:
        return program.call(target, args, like=norm.node, origin=origin, before=norm.node)

    def wide(node: fx.Node) -> fx.Node:
        return call(aten.to.dtype, node, torch.float32)

    if half and (bias is not None or not same or result != x.meta["val"].dtype):
        x = wide(x)
    elif not same:
        x = call(aten.to.dtype, x, result) if x.meta["val"].dtype != result else x
    working = x.meta["val"].dtype
    if weight is not None and weight.meta["val"].dtype != working:
        weight = call(aten.to.dtype, weight, working)
    if bias is not None and bias.meta["val"].dtype != working:
        bias = call(aten.to.dtype, bias, working)
    value = call(aten.rms_norm.default, x, norm.shape, weight, norm.eps)
    if bias is not None:
        value = call(aten.add.Tensor, value, bias)
    return value if working == result else call(aten.to.dtype, value, result)
