"""RMSNorm → CRMSNorm: one feature of a stream whose rows have no mean is left out, with any index j.

Law.   Σx = 0 makes x_j = −Σx′, with x′ = x without its feature j; so, over the d features of x,
       rms_norm(x, ε) without j = x′ · ((Σx′² + (Σx′)²)/d + ε)^-½, and
       linear(x, W, b) = linear(x′, W_≠j − W_j, b).
       What writes x loses row j of its weight and bias, or column j of its table.
Source Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (2023), CRMSNorm; there j is the last.
Legal  on streams that ``layernorm-to-rmsnorm`` has recentred, where every norm is a bare RMSNorm
       (``fold-norm-affine`` folds γ and β first), every reader of the stream or its norms is a linear map, and
       every operator between takes d − 1 features: all of it or nothing of it is rewritten.
Exact  in real arithmetic, at inference and in training (∂L/∂W is what it was). It rounds more: x_j carries the
       rounding of all others, and less their mean the weights of one exponent round alike, so it adds up
       with d. In fp32 up to 2 times eager's error was measured at d = 1024, in bf16 2 to 7 times from
       d = 256 on. So weights stored in half precision are refused; under autocast they are fp32.
Pays   (d − 1)/d of each product and of the stream, against one more sum per norm, and an odd width where d is
       even: measured slower on CPU, so no preset has it. It is for a d − 1 that suits the kernels better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import OptionsError
from sparsecc.passes.analysis.centred import Stream, centred_streams
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.narrow import narrowed_call, narrowed_values
from sparsecc.passes.analysis.norms import as_norm
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
from sparsecc.program import MOVED, ORIGIN, Program

aten = torch.ops.aten

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerNormToCRMSNorm(Pass):
    """Leave out one feature of a recentred stream.

    One match is one stream with all its norms.

    Attributes:
        drop: index of the feature that is left out of every stream (negative: from the end).
    """

    drop: int = -1

    name: ClassVar[str] = "layernorm-to-crmsnorm"
    family: ClassVar[str] = "norm"
    law: ClassVar[str] = (
        "Σx = 0: rms_norm(x, ε)_≠j = x′·((Σx′² + (Σx′)²)/d + ε)^-½;  "
        "linear(x, W, b) = linear(x′, W_≠j − W_j, b)"
    )
    source: ClassVar[str] = "Jiang et al. 2023, Pre-RMSNorm and Pre-CRMSNorm Transformers, CRMSNorm"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "streams whose width less one suits the kernels; measure it"
    refusals: ClassVar[dict[str, str]] = {
        "drop": "the stream has no feature of that index",
        "symbolic-features": "the feature axis has a symbolic size",
        "not-recentred": "a LayerNorm reads the stream (run layernorm-to-rmsnorm before)",
        "affine": "a norm has weights, or a vector is applied to the stream (run fold-norm-affine before)",
        "eps": "a norm has no ε of its own: it is that of the dtype",
        "stream-exit": "the model returns the stream or a norm of it",
        "mutated": "the stream is written in place",
        "operator": "an operator reads the stream that needs every feature",
        "not-centred": "something writes the stream whose rows may have a mean",
        "rounded": "a weight that writes the stream is stored in half precision: its rounding would add up",
        "tied": "the weight of a reader is shared with another node",
        "sizes": "an operator on the stream does not take one feature less, or would for some sizes only",
        "region": "an autocast or grad-mode region begins or ends on the stream",
        **RECOMPUTED,
    }

    def __post_init__(self) -> None:
        given: Any = self.drop
        if not isinstance(given, int) or isinstance(given, bool):
            raise OptionsError(f"pass {self.name!r}: drop must be a whole number, not {given!r}.")

    def find(self, context: Context) -> list[Match]:
        return [
            Match(
                stream.first,
                {"stream": stream},
                f"{len(stream.norms)} norms, {stream.size} -> {stream.size - 1} features",
            )
            for stream in context.analyses.get(centred_streams)
        ]

    def check(self, match: Match, context: Context) -> Refusal | None:
        stream: Stream = match.nodes["stream"]
        if stream.refused is not None:
            code, words, blame = stream.refused
            return Refusal.at(blame, code, words)
        if not -stream.size <= self.drop < stream.size:
            words = f"feature {self.drop} is none of the {stream.size} of the stream"
            return Refusal.at(match.node, "drop", words)
        narrow = _stored_narrow(stream, context.analyses.get(weight_values))
        if narrow is not None:
            return Refusal.at(narrow, "rounded", self.refusals["rounded"])
        values, failed = narrowed_values(context.program, stream)
        if failed is not None:
            return Refusal.at(failed[1], "sizes", failed[0])
        match.nodes["values"] = values
        return context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        stream: Stream = match.nodes["stream"]
        program, values = context.program, match.nodes["values"]
        at = self.drop % stream.size
        maps = context.analyses.get(linears)  # afresh: an earlier match may have changed weights
        weights = context.analyses.get(weight_values)
        for node in dict.fromkeys((*stream.linears, *stream.readers)):
            self._linear(program, maps[node], stream, at)
        for table in stream.tables:
            weight: Any = table.args[0]
            table.update_arg(0, self._weight_without(program, table, weight, 1, at))
        instead = {
            node: self._weight_without(program, node, node, stream.values[node], at)
            if node in weights
            else self._without(program, node, stream.values[node], at)
            for node in stream.cut
        }
        for node, value in values.items():  # splits are among them, too
            if node in stream.cut:
                continue
            if node not in stream.linears and node not in stream.tables:
                self._narrow(node, stream, instead)
            node.meta["val"] = value
            node.meta[ORIGIN], node.meta[MOVED] = self.name, "one feature of it is left out"
        for node in stream.readers:
            self._redirect(node, instead)
        for norm in stream.norms:
            program.replace(norm, self._crms(program, norm, stream.size))
        program.version += 1

    def saving(self, match: Match, context: Context) -> Saving:
        """Of products and the weights that they read; a norm has one sum more, a cut at run time a copy."""
        stream: Stream = match.nodes["stream"]
        d = stream.size
        saved = Saving()
        for node, linear in {**stream.linears, **stream.readers}.items():
            spared = (node in stream.linears) + (node in stream.readers)
            share = 1 - (1 - 1 / d) ** spared
            rows = linear.x if linear.is_transposed else node
            features = linear.in_axis if linear.is_transposed else linear.out_axis
            count = numel(rows) // int(linear.weight.meta["val"].shape[features])
            flops = 2 * count * numel(linear.weight) * share
            saved += Saving(round(nbytes(linear.weight) * share), round(flops))
        for norm in stream.norms:
            saved += Saving(flops=-(numel(norm) // d) * (d - 3))
        weights = context.analyses.get(weight_values)
        copied = sum(2 * nbytes(node) for node in stream.cut if node not in weights)
        return saved + Saving(bytes=-copied)

    # ---- the parts -------------------------------------------------------------------------------

    def _linear(self, program: Program, linear: Linear, stream: Stream, at: int) -> None:
        """Row ``at`` of what writes the stream goes; of what reads it, column ``at`` is taken off the rest."""
        weight, bias = linear.weight, linear.bias
        if linear.node in stream.linears:
            weight = self._weight_without(program, linear.node, weight, linear.out_axis, at)
            if bias is not None:
                bias = self._weight_without(program, linear.node, bias, 0, at)
        if linear.node in stream.readers:
            build = program.weight(self.name, linear.node)
            wide, axis = build.wide(weight), linear.in_axis
            column = build.call(aten.slice.Tensor, wide, axis, at, at + 1)
            rest = self._weight_without(program, linear.node, wide, axis, at)
            weight = build.as_dtype(build.sub(rest, column), weight.meta["val"].dtype)
        linear.set_weights(program, self.name, weight=weight, bias=bias)

    def _weight_without(
        self, program: Program, like: fx.Node, weight: fx.Node, axis: int, at: int
    ) -> fx.Node:
        return _cut(program.weight(self.name, like).call, weight, axis, at)

    def _without(self, program: Program, node: fx.Node, axis: int, at: int) -> fx.Node:
        following = node.next

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return program.call(target, args, kwargs, like=node, origin=self.name, before=following)

        return _cut(call, node, axis, at)

    def _narrow(self, node: fx.Node, stream: Stream, instead: dict[fx.Node, fx.Node]) -> None:
        """Read narrower operands, and give the narrower size where one is spelled out."""
        if node in stream.values and node not in stream.norms:
            node.target, node.args, node.kwargs = narrowed_call(
                node, stream.values[node], stream.size - 1
            )
        self._redirect(node, instead)

    def _redirect(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> None:
        for old, new in instead.items():
            node.replace_input_with(old, new)

    def _crms(self, program: Program, node: fx.Node, d: int) -> fx.Node:
        norm = as_norm(node)
        assert norm is not None

        def call(target: Any, *args: Any) -> fx.Node:
            return program.call(target, args, like=node, origin=self.name, before=node)

        result = node.meta["val"].dtype
        x = norm.x
        if x.meta["val"].dtype in _HALF:
            x = call(aten.to.dtype, x, torch.float32)
        total = call(aten.sum.dim_IntList, x, [-1], True)
        squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, x, x), [-1], True)
        squares = call(aten.add.Tensor, squares, call(aten.mul.Tensor, total, total))
        mean = call(aten.div.Scalar, squares, d)
        scale = call(aten.rsqrt.default, call(aten.add.Scalar, mean, norm.eps))
        value = call(aten.mul.Tensor, x, scale)
        if value.meta["val"].dtype != result:
            value = call(aten.to.dtype, value, result)
        value.meta[MOVED] = "one feature of it is left out"
        return value

    @classmethod
    def examples(cls) -> list[Example]:
        def centred(x: Any, dim: int) -> Any:
            return x - x.mean(dim, keepdim=True)

        def before(x: Any, h: Any, W: Any, b: Any, V: Any, c: Any, *, eps: float, j: int) -> Any:
            x = centred(x, -1) + (h @ centred(W, 0).transpose(0, 1) + centred(b, 0))
            y = x / ((x * x).mean(-1, keepdim=True) + eps) ** 0.5
            return y @ V.transpose(0, 1) + c

        def after(x: Any, h: Any, W: Any, b: Any, V: Any, c: Any, *, eps: float, j: int) -> Any:
            d = x.shape[-1]
            rest = [i for i in range(d) if i != j % d]
            x = centred(x, -1)[:, rest]
            x = x + (h @ centred(W, 0)[rest].transpose(0, 1) + centred(b, 0)[rest])
            total = x.sum(-1, keepdim=True)
            mean = ((x * x).sum(-1, keepdim=True) + total * total) / d
            y = x / (mean + eps) ** 0.5
            return y @ (V[:, rest] - V[:, [j % d]]).transpose(0, 1) + c

        shapes = {"x": ("n", "d"), "h": ("n", "k"), "W": ("d", "k"), "b": ("d",)}
        return [
            Example(
                before,
                after,
                {**shapes, "V": ("m", "d"), "c": ("m",)},
                ("W", "b", "V", "c"),
                {"eps": (1e-12, 1e-5, 1e-2), "j": (-1, 0, 1)},
                symbolic=True,
            )
        ]


def _stored_narrow(stream: Stream, weights: WeightValues) -> fx.Node | None:
    """What writes the stream with a weight in half precision, if anything does."""
    for node in stream.values:
        written: list[Any] = [node] if node in stream.cut and node in weights else []
        if node in stream.linears:
            written = [stream.linears[node].weight, stream.linears[node].bias]
        elif node in stream.tables:
            written = [node.args[0]]
        if any(w is not None and w.meta["val"].dtype in _HALF for w in written):
            return node
    return None


def _cut(call: Any, value: fx.Node, axis: int, at: int) -> fx.Node:
    """``value`` without index ``at`` of ``axis``, contiguous."""
    width = value.meta["val"].shape[axis]
    parts = [
        call(aten.slice.Tensor, value, axis, first, last)
        for first, last in ((0, at), (at + 1, width))
        if first < last
    ]
    if len(parts) == 2:
        return call(aten.cat.default, parts, axis)  # type: ignore[no-any-return]
    # A slice keeps the strides of the whole, which a folded weight has not.
    return call(aten.clone.default, parts[0], memory_format=torch.contiguous_format)  # type: ignore[no-any-return]
