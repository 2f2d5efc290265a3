"""Attention that is spelled out, as the operator.

Law.   softmax(s · q kᵀ + m) v = scaled_dot_product_attention(q, k, v; m, scale = s).
Source Vaswani et al., "Attention Is All You Need" (2017), eq. 1.
Legal  when q, k, v and m have one dtype, float32 or float64, and the same batch and head
       dimensions; the mask is added after scaling; dropout is inactive; nobody else reads scores or
       probabilities. The right operand of the first product *is* kᵀ, so k is what it transposes, or
       its own transpose. Not where gradients flow: the fused kernels' backward takes the rows' sums
       from the rounded result, and was seen to be 3.5 times as far from fp64 as the spelling's.
Note   where a whole row is masked with −inf, the spelling is 0/0 = NaN and the operator gives 0.
       Finite masks (the dtype's minimum) give the same uniform row in both.
Exact  in real arithmetic.
Pays   the probabilities [.., L, S] are never written to memory.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving, nbytes
from sparsecc.passes.canonical._guard import guard, interior, stride_readers
from sparsecc.passes.canonical._match import dtype_of
from sparsecc.passes.canonical._scores import SCORES_REFUSALS, Attention, fits, recognise
from sparsecc.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Raise matmul, scale, mask, softmax, matmul to ``aten.scaled_dot_product_attention``."""

    name: ClassVar[str] = "raise-attention"
    family: ClassVar[str] = "canonical"
    law: ClassVar[str] = "softmax(s·qkᵀ + m) v = scaled_dot_product_attention(q, k, v; m, s)"
    source: ClassVar[str] = "Vaswani et al. 2017, Attention Is All You Need, eq. 1"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "the attention probabilities are not written to memory"
    refusals: ClassVar[Mapping[str, str]] = {
        **SCORES_REFUSALS,
        "training": "the backward of the fused kernels rounds more than the spelling does; what Inductor "
        "knows of it, it fuses by itself",
    }

    def find(self, context: Context) -> list[Match]:
        nodes = context.program.calls(aten.matmul.default, aten.bmm.default)
        return [Match(node) for node in nodes if recognise(node) is not None]

    def check(self, match: Match, context: Context) -> Refusal | None:
        found = _again(match)
        for code in found.problems:
            return Refusal.at(match.node, code, self.refusals[code])
        code = _mismatch(found)
        if code:
            return Refusal.at(match.node, code, self.refusals[code])
        inside = {*found.chain, match.node}
        for node in found.chain:
            reader = next((user for user in node.users if user not in inside), None)
            if reader is not None:
                reason = f"{reader.name} reads {node.name}, which would no longer exist"
                return Refusal.at(reader, "probabilities-used", reason)
        if context.trains:
            return Refusal.at(match.node, "training", self.refusals["training"])
        return guard(context, match.node, _leaves(found))

    def rewrite(self, match: Match, context: Context) -> None:
        # Recognised anew: an earlier match of this run may have replaced q, k or v.
        found, node, program = _again(match), match.node, context.program

        def call(target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
            return program.call(
                target, args, kwargs, like=node, origin=self.name, before=node, val=val
            )

        q, v, mask = found.q, found.v, _mask(found, call)
        k = found.k if found.k is not None else call(aten.transpose.int, found.k_transposed, -2, -1)
        scale = _scale(found, call)
        value = node.meta["val"]
        # The fused kernels take four dimensions only.
        flat = q.meta["val"].dim() == 3
        if flat:
            q, k, v = (call(aten.unsqueeze.default, t, 0) for t in (q, k, v))
            value = _unsqueezed(program, node)
        if mask is not None:
            while mask.meta["val"].dim() not in (2, 4):
                mask = call(aten.unsqueeze.default, mask, 0)
        new = call(
            aten.scaled_dot_product_attention.default,
            *(q, k, v, mask, 0.0, False),
            scale=scale,
            val=value,
        )
        if flat:
            new = call(aten.squeeze.dim, new, 0, val=node.meta["val"])
        # The kernels may return [.., L, H, D] in memory; matmul did not.
        readers = stride_readers(node)
        if readers and not _loosen(readers, context):
            new = call(aten.contiguous.default, new, val=node.meta["val"])
        program.replace(node, new)

    def saving(self, match: Match, context: Context) -> Saving:
        found = _again(match)
        # Probabilities are written and read once; with them, every step of the chain.
        return Saving(
            bytes=2 * sum(nbytes(node) for node in found.chain),
            launches=len(interior(match.node, _leaves(found))) - 1,
        )

    @classmethod
    def examples(cls) -> list[Example]:
        def before(q: Any, k: Any, v: Any, m: Any, *, scale: float) -> Any:
            return torch.softmax(q @ k.transpose(-1, -2) * scale + m, -1) @ v

        def after(q: Any, k: Any, v: Any, m: Any, *, scale: float) -> Any:
            attention = torch.nn.functional.scaled_dot_product_attention
            return attention(q, k, v, m, 0.0, False, scale=scale)

        shapes = {
            "q": ("b", "h", "l", "d"),
            "k": ("b", "h", "s", "d"),
            "v": ("b", "h", "s", "d"),
            "m": ("l", "s"),
        }
        return [Example(before, after, shapes, (), {"scale": (0.25, 1.0)})]


def _mismatch(found: Attention) -> str:
    """The refusal code of dtypes or shapes that the operator would treat differently, or ""."""
    key = found.k if found.k is not None else found.k_transposed
    tensors = (found.q, key, found.v, *found.chain, *found.masks)
    if {dtype_of(t) for t in tensors} not in ({torch.float32}, {torch.float64}):
        return "half-precision"
    batches = [list(t.meta["val"].shape)[:-2] for t in (found.q, key, found.v)]
    if not all(same_shape(batch, batches[0]) for batch in batches):
        return "broadcast"
    scores = found.chain[0].meta["val"].shape
    if not all(fits(mask.meta["val"].shape, scores) for mask in found.masks):
        return "broadcast"
    if found.k is None and found.k_transposed.meta["val"].stride()[-2] != 1:
        return "key-layout"
    return ""


def _leaves(found: Attention) -> tuple[Any, ...]:
    key = found.k if found.k is not None else found.k_transposed
    return found.q, key, found.v, *found.masks


def _mask(found: Attention, call: Any) -> fx.Node | None:
    """The sum of all masks (T5 and Swin add a position bias and a mask)."""
    total: fx.Node | None = None
    for mask in found.masks:
        total = mask if total is None else call(aten.add.Tensor, total, mask)
    return total


def _scale(found: Attention, call: Any) -> Any:
    """The product of all scale factors: a float, or a node where one of them is symbolic."""
    scale: Any = 1.0
    for factor, is_divisor in found.factors:
        if not isinstance(factor, fx.Node) and not isinstance(scale, fx.Node):
            scale = scale / factor if is_divisor else scale * factor
        elif not is_divisor and not isinstance(scale, fx.Node) and scale == 1.0:
            scale = factor
        else:
            scale = call(operator.truediv if is_divisor else operator.mul, scale, factor)
    return scale


def _loosen(readers: list[fx.Node], context: Context) -> bool:
    """Turn views that may no longer be possible into reshapes; False where that cannot be done."""
    alias = context.analyses.get(aliases)
    if any(node.target is not aten.view.default or alias.written(node) for node in readers):
        return False
    for node in readers:
        node.target = aten.reshape.default
    context.program.version += 1
    return True


def _unsqueezed(program: Program, node: fx.Node) -> Any:
    return program.fake(aten.unsqueeze.default, (node, 0), {})


def _again(match: Match) -> Attention:
    found = recognise(match.node)
    assert found is not None
    return found
