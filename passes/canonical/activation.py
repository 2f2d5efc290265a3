"""Activations that are spelled out, as the operator.

Law.   x · sigmoid(x) = silu(x);
       ½ · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) = gelu(x; tanh);
       ½ · x · (1 + erf(x / √2)) = gelu(x).
Source Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2; Elfwing et al. (2018)
       for SiLU.
Legal  when the constants agree to 1e-6 and the result has the dtype of x. Arithmetic is read as a
       polynomial, so factor order, grouping, x·x·x for x³ and division for multiplication make no
       difference.
Not    x · sigmoid(1.702 · x): QuickGELU is another function.
Note   at x = +inf the vectorized CPU kernel of gelu (erf) returns NaN; the spelling, inf.
Exact  in real arithmetic; in half precision the operator rounds once where the spelling rounds at
       each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving
from sparsecc.passes.canonical._guard import GUARD_REFUSALS, guard, interior, layout_matters
from sparsecc.passes.canonical._match import (
    arithmetic,
    dtype_of,
    is_tensor,
    operands,
    power,
)
from sparsecc.passes.canonical._polynomial import Polynomial, close, expand

aten = torch.ops.aten

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_TANH_ARGUMENT: Polynomial = {(1,): _SQRT_2_OVER_PI, (3,): _SQRT_2_OVER_PI * 0.044715}
_ERF_ARGUMENT: Polynomial = {(1,): math.sqrt(0.5)}
_HALF_GATE: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}  # ½ x (1 + t) over (x, t)
_GATE: Polynomial = {(1, 1): 1.0}  # x · t
_CLIMB = 4  # from the inner function up to the root: · x, · ½, 1 +, in any grouping


@dataclass(frozen=True)
class Spelling:
    """An activation spelled out: ``root`` computes ``target(x, **options)``."""

    root: fx.Node
    x: fx.Node
    target: Any
    options: Mapping[str, str]


@dataclass(frozen=True)
class RaiseActivation(Pass):
    """Raise SiLU and both GELUs to their operators."""

    name: ClassVar[str] = "raise-activation"
    family: ClassVar[str] = "canonical"
    law: ClassVar[str] = "x·sigmoid(x) = silu(x); ½x(1+tanh(√(2/π)(x+0.044715x³))) = gelu(x; tanh)"
    source: ClassVar[str] = "Hendrycks and Gimpel 2016, Gaussian Error Linear Units"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "FFN passes see one operator"
    refusals: ClassVar[Mapping[str, str]] = {
        **GUARD_REFUSALS,
        "layout": "the input is permuted, and a reader depends on the strides of the result",
    }

    def find(self, context: Context) -> list[Match]:
        matches, seen = [], set()
        for inner in list(context.program.graph.nodes):
            found = recognise(inner)
            if found is not None and found.root not in seen:
                seen.add(found.root)
                matches.append(Match(found.root, {"inner": inner}, note=str(found.target)))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        found = _again(match)
        refusal = guard(context, found.root, (found.x,))
        if refusal is None and layout_matters(found.root):
            refusal = Refusal.at(found.root, "layout", self.refusals["layout"])
        return refusal

    def rewrite(self, match: Match, context: Context) -> None:
        found = _again(match)
        new = context.program.call(
            found.target,
            (found.x,),
            dict(found.options),
            like=found.root,
            origin=self.name,
            before=found.root,
            val=found.root.meta["val"],
        )
        context.program.replace(found.root, new)

    def saving(self, match: Match, context: Context) -> Saving:
        found = _again(match)
        return Saving(launches=len(interior(found.root, (found.x,))) - 1)

    @classmethod
    def examples(cls) -> list[Example]:
        functional = torch.nn.functional
        shapes = {"x": ("n", "d")}

        def spelled_silu(x: Any) -> Any:
            return x * torch.sigmoid(x)

        def silu(x: Any) -> Any:
            return functional.silu(x)

        def gelu(x: Any) -> Any:
            return functional.gelu(x)

        def tanh_gelu(x: Any) -> Any:
            return 0.5 * x * (1 + torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x.pow(3))))

        def erf_gelu(x: Any) -> Any:
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0)))

        return [
            Example(spelled_silu, silu, shapes),
            Example(tanh_gelu, lambda x: functional.gelu(x, approximate="tanh"), shapes),
            Example(erf_gelu, gelu, shapes),
        ]


def recognise(inner: fx.Node) -> Spelling | None:
    """The activation around ``inner`` (its sigmoid, exp, tanh or erf), or None."""
    if not is_tensor(inner) or inner.op != "call_function":
        return None
    if inner.target is aten.sigmoid.default:
        x: Any = inner.args[0]
        return _rooted(inner, x, _GATE, aten.silu.default, {})
    if inner.target is aten.exp.default:
        return _silu_by_quotient(inner)
    if inner.target is aten.tanh.default:
        for x in _arguments(inner.args[0]):
            if close(expand(inner.args[0], (x,)), _TANH_ARGUMENT):
                options = {"approximate": "tanh"}
                return _rooted(inner, x, _HALF_GATE, aten.gelu.default, options)
    if inner.target is aten.erf.default:
        for x in _arguments(inner.args[0]):
            if close(expand(inner.args[0], (x,)), _ERF_ARGUMENT):
                return _rooted(inner, x, _HALF_GATE, aten.gelu.default, {})
    return None


def _rooted(
    inner: fx.Node, x: fx.Node, expected: Mapping[tuple[int, ...], float], target: Any, options: Any
) -> Spelling | None:
    """The node above ``inner`` that is the ``expected`` polynomial in x and ``inner``."""
    level = [inner]
    for _ in range(_CLIMB):
        level = [user for node in level for user in node.users if arithmetic(user) is not None]
        for root in dict.fromkeys(level):
            if close(expand(root, (x, inner)), expected) and _same_kind(root, x):
                return Spelling(root, x, target, options)
    return None


def _silu_by_quotient(inner: fx.Node) -> Spelling | None:
    """x / (1 + exp(−x)), also as a product with the reciprocal."""
    for x in _arguments(inner.args[0]):
        if not close(expand(inner.args[0], (x,)), {(1,): -1.0}):
            continue
        for denominator in inner.users:
            if not close(expand(denominator, (inner,)), {(0,): 1.0, (1,): 1.0}):
                continue
            for user in denominator.users:
                found = arithmetic(user)
                if found == ("div", x, denominator) and _same_kind(user, x):
                    return Spelling(user, x, aten.silu.default, {})
                if power(user) != (denominator, -1.0):
                    continue
                for root in user.users:
                    for a, b in operands(root, "mul"):
                        if a is x and b is user and _same_kind(root, x):
                            return Spelling(root, x, aten.silu.default, {})
    return None


def _arguments(node: Any) -> Iterator[fx.Node]:
    """Candidates for x in an inner function's argument: its arithmetic's nodes, nearest first."""
    level: list[Any] = [node]
    seen: set[fx.Node] = set()
    while level and len(seen) < 16:
        following: list[Any] = []
        for candidate in level:
            if not is_tensor(candidate) or candidate in seen:
                continue
            seen.add(candidate)
            yield candidate
            if (
                arithmetic(candidate) is not None
                or power(candidate) is not None
                or (candidate.target is aten.neg.default)
            ):
                following += candidate.all_input_nodes
        level = following


def _same_kind(root: fx.Node, x: fx.Node) -> bool:
    return dtype_of(root) == dtype_of(x) and same_shape(root.meta["val"].shape, x.meta["val"].shape)


def _again(match: Match) -> Spelling:
    found = recognise(match.nodes["inner"])
    assert found is not None
    return found
