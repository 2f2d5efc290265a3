"""ATen operators in the grammar of ``sparsecc::rows``: what each computes of a row, as terms.

Terms are interned, so that equal ones are one: the mean of ``x - x.mean()`` is that of ``x.var()``.
"""

from __future__ import annotations

import ast
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.norms import as_norm
from sparsecc.passes.canonical._match import argument, arithmetic, is_last_dim, is_tensor, scalar

aten = torch.ops.aten

# The largest number of a format that a row may be rounded to.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_UNARY: dict[Any, str] = {
    aten.abs.default: "abs({})",
    aten.exp.default: "exp({})",
    aten.neg.default: "-{}",
    aten.reciprocal.default: "1 / {}",
    aten.relu.default: "relu({})",
    aten.round.default: "round({})",
    aten.rsqrt.default: "rsqrt({})",
    aten.sigmoid.default: "sigmoid({})",
    aten.sign.default: "sign({})",
    aten.silu.default: "silu({})",
    aten.sqrt.default: "sqrt({})",
    aten.tanh.default: "tanh({})",
}
_BINARY = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}"}
_EXTREMES: dict[Any, str] = {
    aten.maximum.default: "maximum({}, {})",
    aten.minimum.default: "minimum({}, {})",
}
_REDUCTIONS: dict[Any, str] = {
    aten.mean.dim: "mean({})",
    aten.sum.dim_IntList: "sum({})",
    aten.amax.default: "max({})",
    aten.amin.default: "min({})",
}
_WITH_PLACES: dict[Any, str] = {aten.max.dim: "max({})", aten.min.dim: "min({})"}
_VARIANCES = frozenset({aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim})
_DEVIATIONS = frozenset({aten.std.correction, aten.std.dim})
_BOTH = frozenset({aten.var_mean.correction, aten.var_mean.dim})
_MOST = 8  # of the exponents that are products
_DEEPEST = 12  # calls and operators within one another in one line


class Terms:
    """Expressions over operands, each kept once; the parts of a term stand before it."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], int] = {}
        self._terms: list[tuple[str, tuple[int, ...]]] = []

    def make(self, form: str, *parts: int) -> int:
        """The term ``form`` of ``parts``; an operand has none."""
        key = (form, *parts)
        if key not in self._found:
            self._found[key] = len(self._terms)
            self._terms.append((form, parts))
        return self._found[key]

    def written(self, wanted: Iterable[int]) -> tuple[tuple[str, ...], dict[int, str]]:
        """Statements, and the texts of ``wanted`` over them: what is read twice, or deep, is a statement."""
        results = list(dict.fromkeys(wanted))
        needed = set(results)
        for term in reversed(range(len(self._terms))):
            if term in needed:
                needed.update(self._terms[term][1])
        reads = Counter([part for term in needed for part in self._terms[term][1]] + results)
        texts: dict[int, str] = {}
        depth: dict[int, int] = {}
        statements: list[str] = []
        for term in sorted(needed):
            form, parts = self._terms[term]
            if not parts:
                texts[term], depth[term] = form, 0
                continue
            depth[term] = 1 + max(depth[part] for part in parts)
            text = form.format(*(f"({texts[part]})" for part in parts))
            text = ast.unparse(ast.parse(text, mode="eval"))  # without needless brackets
            texts[term] = text
            if reads[term] > 1 or depth[term] > _DEEPEST:
                depth[term] = 0
                texts[term] = f"y{len(statements)}"
                statements.append(f"{texts[term]} = {text}")
        return tuple(statements), {term: texts[term] for term in results}


@dataclass(frozen=True)
class Operation:
    """What a node computes of a row.

    Attributes:
        kind: "pointwise"; "statistic", of a row, which is the one input; "norm", whose first input is the row;
            "axis", a statistic with its axis put back; "cast", of a row, which ends a region.
        inputs: the tensors that are read.
        build: makes the term of those of the inputs.
        statistics: how many numbers are taken of the row on the way.
        hidden: the node whose result this one takes apart.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    build: Callable[..., int]
    statistics: int = 0
    hidden: fx.Node | None = None


def operation(node: fx.Node) -> Operation | None:
    """``node`` as an operation on rows, or None: not of the grammar, or not over the last axis."""
    if node.op != "call_function":
        return None
    for recognise in (_pointwise, _statistic, _norm, _softmax, _axis, _cast):
        found = recognise(node)
        if found is not None:
            return found
    return None


# ---- pointwise -----------------------------------------------------------------------------------------


def _of(*forms: str) -> Callable[..., int]:
    """The first form of the inputs, each further one of the term before."""

    def build(terms: Terms, *inputs: int) -> int:
        term = terms.make(forms[0], *inputs)
        for form in forms[1:]:
            term = terms.make(form, term)
        return term

    return build


def _pointwise(node: fx.Node) -> Operation | None:
    target = node.target
    if target in _UNARY and len(node.args) == 1 and not node.kwargs:
        return _of_tensors(node, _UNARY[target], node.args)
    if target is aten.square.default:
        return _power(node, 2.0)
    if target is aten.gelu.default:
        name = "gelu_tanh" if argument(node, "approximate") == "tanh" else "gelu"
        return _of_tensors(node, f"{name}({{}})", node.args[:1])
    if target is aten.pow.Tensor_Scalar:
        return _power(node, scalar(node.args[1]))
    if target in _EXTREMES:
        return _of_tensors(node, _EXTREMES[target], node.args)
    if target in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
        return _clamp(node)
    found = arithmetic(node)
    if found is None:
        return None
    kind, *sides = found
    return _of_tensors(node, _BINARY[kind], sides)


def _of_tensors(node: fx.Node, form: str, sides: Any) -> Operation | None:
    """``form`` of tensors and numbers."""
    shown: list[str] = []
    inputs: list[fx.Node] = []
    for side in sides:
        value = scalar(side)
        if value is not None and math.isfinite(value):
            shown.append(f"({value!r})")
        elif is_tensor(side):
            shown.append("{}")
            inputs.append(side)
        else:
            return None
    return Operation("pointwise", tuple(inputs), _of(form.format(*shown))) if inputs else None


def _power(node: fx.Node, exponent: float | None) -> Operation | None:
    x = node.args[0]
    if not is_tensor(x) or exponent is None:
        return None
    roots = {0.5: "sqrt({})", -0.5: "rsqrt({})", -1.0: "1 / {}"}
    if exponent in roots:
        return Operation("pointwise", (x,), _of(roots[exponent]))  # type: ignore[arg-type]
    if exponent != int(exponent) or not 2 <= exponent <= _MOST:
        return None
    whole = int(exponent)
    return Operation("pointwise", (x,), lambda terms, x: _product(terms, x, whole))  # type: ignore[arg-type]


def _product(terms: Terms, x: int, exponent: int) -> int:
    if exponent == 1:
        return x
    half = _product(terms, x, exponent // 2)
    square = terms.make("{} * {}", half, half)
    return terms.make("{} * {}", square, x) if exponent % 2 else square


def _bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The numbers between which ``node`` clamps; None where it does not, or not between numbers."""
    if node.target not in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
        return None
    low, high = argument(node, "min"), argument(node, "max")
    values = scalar(low), scalar(high)
    known = all(
        given is None or (value is not None and math.isfinite(value))
        for given, value in zip((low, high), values, strict=True)
    )
    return values if known else None


def _clamp(node: fx.Node) -> Operation | None:
    bounds = _bounds(node)
    if bounds is None or bounds == (None, None) or not is_tensor(node.args[0]):
        return None
    low, high = bounds
    forms = [f"maximum({{}}, {low!r})"] * (low is not None)
    forms += [f"minimum({{}}, {high!r})"] * (high is not None)
    if len(forms) == 2:
        forms = [f"clamp({{}}, {low!r}, {high!r})"]
    return Operation("pointwise", (node.args[0],), _of(*forms))  # type: ignore[arg-type]


# ---- statistics and norms ------------------------------------------------------------------------------


def _last(node: fx.Node) -> fx.Node | None:
    """The row of a reduction over the last axis alone, in its own dtype."""
    x = node.args[0]
    if not is_tensor(x) or argument(node, "dtype") is not None:
        return None
    on_last = is_last_dim(argument(node, "dim"), x.meta["val"].dim())  # type: ignore[union-attr]
    return x if on_last else None  # type: ignore[return-value]


def _statistic(node: fx.Node) -> Operation | None:
    hidden: Any = node.args[0] if node.target is operator.getitem else None
    reducing = node if hidden is None else hidden
    target = getattr(reducing, "target", None)
    if target not in (*_REDUCTIONS, *_VARIANCES, *_WITH_PLACES, *_BOTH):
        return None
    x = _last(reducing)
    if x is None or (hidden is None) != (target in (*_REDUCTIONS, *_VARIANCES)):
        return None
    if hidden is None and target in _REDUCTIONS:
        return Operation("statistic", (x,), _of(_REDUCTIONS[target]), 1)
    if target in _WITH_PLACES:
        alone = _alone(node, hidden)  # nobody asks where the largest one is
        form = _WITH_PLACES[target]
        return Operation("statistic", (x,), _of(form), 1, hidden) if alone else None
    if target in _BOTH and node.args[1] == 1:
        return Operation("statistic", (x,), _of("mean({})"), 1, hidden)
    less = _correction(reducing)
    size = x.meta["val"].shape[-1]
    if less is None or not isinstance(size, int) or size <= less:
        return None

    def build(terms: Terms, x: int) -> int:
        variance = _variance(terms, x, less)
        return terms.make("sqrt({})", variance) if target in _DEVIATIONS else variance

    return Operation("statistic", (x,), build, 2, hidden)


def _alone(node: fx.Node, hidden: fx.Node) -> bool:
    others = any(u.users for u in hidden.users if u is not node)
    return bool(node.args[1] == 0) and not others


def _correction(node: fx.Node) -> float | None:
    """What is taken off the number of elements."""
    if node.target in (aten.var.dim, aten.std.dim, aten.var_mean.dim):
        return float(bool(argument(node, "unbiased")))
    less = argument(node, "correction")
    return 1.0 if less is None else scalar(less)


def _variance(terms: Terms, x: int, less: float) -> int:
    centred = _centred(terms, x)
    square = terms.make("{} * {}", centred, centred)
    if not less:
        return terms.make("mean({})", square)
    return terms.make(f"{{}} / (N - {less!r})", terms.make("sum({})", square))


def _centred(terms: Terms, x: int) -> int:
    return terms.make("{} - {}", x, terms.make("mean({})", x))


def _norm(node: fx.Node) -> Operation | None:
    norm = as_norm(node)
    # Without ε the norm takes that of its dtype, which a proof in fp64 would find to be another one.
    if norm is None or not isinstance(norm.eps, float):
        return None

    def build(terms: Terms, x: int, *affine: int) -> int:
        centred = _centred(terms, x) if norm.kind == "layer_norm" else x
        mean = terms.make("mean({})", terms.make("{} * {}", centred, centred))
        y = terms.make("{} * {}", centred, terms.make(f"rsqrt({{}} + {norm.eps!r})", mean))
        rest = iter(affine)
        if norm.weight is not None:
            y = terms.make("{} * {}", y, next(rest))
        return y if norm.bias is None else terms.make("{} + {}", y, next(rest))

    vectors = [v for v in (norm.weight, norm.bias) if v is not None]
    return Operation("norm", (norm.x, *vectors), build, 1)


def _softmax(node: fx.Node) -> Operation | None:
    if node.target is not aten.softmax.int or argument(node, "dtype") is not None:
        return None
    x = _last(node)
    return None if x is None else Operation("norm", (x,), softmax, 1)


def softmax(terms: Terms, x: int) -> int:
    """exp(x − max x) / Σ exp(x − max x)."""
    e = terms.make("exp({})", terms.make("{} - {}", x, terms.make("max({})", x)))
    return terms.make("{} / {}", e, terms.make("sum({})", e))


# ---- shapes and formats --------------------------------------------------------------------------------


def _axis(node: fx.Node) -> Operation | None:
    if node.target is not aten.unsqueeze.default or not is_tensor(node.args[0]):
        return None
    if node.args[1] not in (-1, node.meta["val"].dim() - 1):
        return None
    return Operation("axis", (node.args[0],), lambda terms, x: x)  # type: ignore[arg-type]


def _cast(node: fx.Node) -> Operation | None:
    """A row of numbers that the format holds, so that no overflow has to be the same."""
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return None
    source, dtype = node.args
    largest = _LARGEST.get(dtype)  # type: ignore[arg-type]
    if largest is None or not is_tensor(source) or source.meta["val"].dtype is not torch.float32:  # type: ignore[union-attr]
        return None
    clamps = [b for n in _rounded(source) if (b := _bounds(n)) is not None and None not in b]  # type: ignore[arg-type]
    least = -largest - (dtype is torch.int8)
    if not any(least <= low <= high <= largest for low, high in clamps):  # type: ignore[operator]
        return None
    is_whole = any(n.target is aten.round.default for n in _rounded(source))  # type: ignore[arg-type]
    if dtype is torch.int8 and not is_whole:
        return None
    return Operation("cast", (source,), lambda terms, x: x)  # type: ignore[arg-type]


def _rounded(node: fx.Node) -> Iterator[fx.Node]:
    """A clamp and a round, in either order."""
    yield node
    inner = node.args[0]
    is_clamp = _bounds(node) is not None
    if not isinstance(inner, fx.Node) or inner.op != "call_function":
        return
    if is_clamp and inner.target is aten.round.default and len(inner.args) == 1:
        bounds = _bounds(node)
        if bounds is not None and all(b is None or b == int(b) for b in bounds):
            yield inner
    elif node.target is aten.round.default and len(node.args) == 1 and _bounds(inner) is not None:
        yield inner
