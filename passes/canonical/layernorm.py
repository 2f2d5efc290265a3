"""Hand-written LayerNorm, as the operator.

Law.  (x − mean(x)) · (var(x) + ε)^(−1/2) [· γ] [+ β] = layer_norm(x; γ, β, ε), over the last
       dimension, with var(x) = mean((x − mean(x))²), the biased variance.
Source Ba, Kiros and Hinton, "Layer Normalization" (2016), eq. 3 and 4.
Legal  when computed in float32 or float64; casts around stay where they are. γ and β move into the
       operator only where they act in the norm's own dtype and nothing else reads the value before
       them.
Not    the unbiased variance, and ε added to the standard deviation: those are other functions.
       mean(x²) − mean(x)² equals the variance only in real arithmetic: where it cancels, the
       spelling can give NaN and the operator does not, so it stays as written.
Exact  in real arithmetic; the operator may round in another order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving
from sparsecc.passes.canonical._match import (
    argument,
    arithmetic,
    dtype_of,
    is_last_dim,
    is_tensor,
    mean_last,
    operands,
    plus_eps,
    radicand,
    square,
    widened,
)
from sparsecc.passes.canonical._norm import (
    NORM_REFUSALS,
    NormSpelling,
    affine_tail,
    check_norm,
    peeled,
    scaled_by_root,
    width,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseLayerNorm(Pass):
    """Raise every spelling of LayerNorm to ``aten.layer_norm``."""

    name: ClassVar[str] = "raise-layernorm"
    family: ClassVar[str] = "canonical"
    law: ClassVar[str] = "(x-mean(x))·(var(x)+ε)^-½·γ+β = layer_norm(x; γ, β, ε)"
    source: ClassVar[str] = "Ba, Kiros and Hinton 2016, Layer Normalization, eq. 3"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "norm passes see one operator"
    refusals: ClassVar[Mapping[str, str]] = {
        **NORM_REFUSALS,
        "unbiased-variance": "divides by d-1; LayerNorm divides by d",
        "eps-outside": "eps is added to the standard deviation, not to the variance",
        "unstable-variance": "mean(x²)-mean(x)² rounds (and cancels) unlike the variance",
    }

    def find(self, context: Context) -> list[Match]:
        matches = []
        for node in list(context.program.graph.nodes):
            if recognise(node) is not None:
                matches.append(Match(node))
            elif miss := near_miss(node):
                matches.append(Match(node, {"miss": miss}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        miss = match.nodes.get("miss")
        if miss is not None:
            return Refusal.at(match.node, miss, self.refusals[miss])
        found = _again(match)
        return check_norm(found, dtype_of(found.root), context)

    def rewrite(self, match: Match, context: Context) -> None:
        # Recognised anew: an earlier match of this run may have replaced the input.
        found = _again(match)
        shape = [width(found, context, self.name)]
        new = context.program.call(
            aten.layer_norm.default,
            (found.x, shape, found.weight, found.bias, found.eps),
            like=found.root,
            origin=self.name,
            before=found.last,
            val=found.last.meta["val"],
        )
        context.program.replace(found.last, new)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(launches=_again(match).launches - 1)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, w: Any, b: Any, *, eps: float) -> Any:
            c = x - x.mean(-1, keepdim=True)
            return w * (c / torch.sqrt((c * c).mean(-1, keepdim=True) + eps)) + b

        def after(x: Any, w: Any, b: Any, *, eps: float) -> Any:
            return torch.layer_norm(x, (x.shape[-1],), w, b, eps)

        shapes = {"x": ("n", "d"), "w": ("d",), "b": ("d",)}
        return [Example(before, after, shapes, ("w", "b"), {"eps": (1e-12, 1e-5, 1e-2)})]


def recognise(node: fx.Node) -> NormSpelling | None:
    """The LayerNorm whose normalized value ``node`` is, or None."""
    for scaled, v in scaled_by_root(node):
        variance, eps = plus_eps(v)
        spread = biased_variance(variance)
        if spread is None:
            continue
        for centred, factor in peeled(scaled, dtype_of(node)):
            x = centred_input(centred)
            if x is None or widened(x) is not widened(spread):
                continue
            if not dtype_of(x) == dtype_of(spread) == dtype_of(variance) == dtype_of(node):
                continue
            weight, bias, last = affine_tail(node, factor, with_bias=True)
            return NormSpelling(node, x, eps, weight, bias, last)
    return None


def near_miss(node: fx.Node) -> str:
    """The refusal code of something that a reader would take for a LayerNorm, or ""."""
    found = arithmetic(node)
    if found is None or found[0] not in ("mul", "div"):
        return ""
    for scaled, v in scaled_by_root(node):
        variance, _ = plus_eps(v)
        source = _variance_input(variance, biased=False)
        if source is not None and _is_centred(scaled, source):
            return "unbiased-variance"
        for mean_square, squared_mean in operands(variance, "sub"):
            squares, mean = mean_last(mean_square), square(squared_mean)
            x = None if squares is None else square(squares)
            if x is not None and mean is not None and mean_last(mean) is x:
                return "unstable-variance" if _is_centred(scaled, x) else ""
    if found[0] == "div" and is_tensor(found[2]):
        deviation, eps = plus_eps(found[2])
        if eps != 0.0 and (source := _deviation_input(deviation)) is not None:
            return "eps-outside" if _is_centred(found[1], source) else ""
    return ""


def centred_input(node: Any) -> fx.Node | None:
    """``x`` where ``node`` is x minus its mean over the last dimension."""
    for x, mean in operands(node, "sub"):
        source = mean_last(mean) or _paired_mean(mean)
        if source is not None and source is x:
            return source
    return None


def biased_variance(node: Any) -> fx.Node | None:
    """``x`` where ``node`` is the biased variance of x over the last (kept) dimension."""
    squares = mean_last(node)
    if squares is not None:
        centred = square(squares)
        return None if centred is None else centred_input(centred)
    source = _variance_input(node, biased=True)
    # The variance of centred values is the variance.
    return centred_input(source) or source


def _variance_input(node: Any, *, biased: bool) -> fx.Node | None:
    """``x`` where ``node`` is a variance operator over the last dimension of x."""
    if not is_tensor(node) or node.op != "call_function":
        return None
    if node.target in (aten.var.correction, aten.var.dim):
        return _reduced(node, biased)
    return _pair(node, 0, biased)


def _paired_mean(node: Any) -> fx.Node | None:
    """``x`` where ``node`` is the mean that ``var_mean(x)`` returns."""
    if not is_tensor(node):
        return None
    return _pair(node, 1, True) or _pair(node, 1, False)


def _pair(node: fx.Node, index: int, biased: bool) -> fx.Node | None:
    if node.target is not operator.getitem or node.args[1] != index:
        return None
    pair: Any = node.args[0]
    if pair.target not in (aten.var_mean.correction, aten.var_mean.dim):
        return None
    return _reduced(pair, biased)


def _deviation_input(node: Any) -> fx.Node | None:
    if is_tensor(node) and node.target in (aten.std.correction, aten.std.dim):
        return _reduced(node, True) or _reduced(node, False)
    variance = radicand(node, 0.5)
    if variance is None or variance is node:
        return None
    return biased_variance(variance) or _variance_input(variance, biased=False)


def _reduced(node: fx.Node, biased: bool) -> fx.Node | None:
    source = node.args[0]
    if not is_tensor(source) or not argument(node, "keepdim", False):
        return None
    if not is_last_dim(argument(node, "dim"), source.meta["val"].dim()):  # type: ignore[union-attr]
        return None
    if str(node.target).endswith(".dim"):
        is_biased = not argument(node, "unbiased", True)
    else:
        correction = argument(node, "correction")
        is_biased = correction is not None and correction == 0
    return source if is_biased is biased else None  # type: ignore[return-value]


def _again(match: Match) -> NormSpelling:
    found = recognise(match.node)
    assert found is not None
    return found


def _is_centred(node: Any, source: fx.Node) -> bool:
    """Whether ``node`` (perhaps times a vector) is ``source`` minus its mean."""
    if not is_tensor(node):
        return False
    return any(centred_input(value) is source for value, _ in peeled(node, node.meta["val"].dtype))
