"""Specs of ``sparsecc::rows`` with inputs, and what they mean by the papers' formulas, for all generators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from precision import assert_as_near, squares, wide
from torch import Tensor
from torch.nn import functional as F

from sparsecc.runtime.ops import catalogue
from sparsecc.runtime.ops.rows import Output, Spec, meaning

Operands = tuple[list[Tensor], list[Tensor], list[Tensor]]
Run = Callable[[list[Tensor], list[Tensor], list[Tensor], str], list[Tensor]]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A spec, the shapes of its operands for tensors of ``shape``, and the formula.

    Attributes:
        vectors, scalars: how many leading axes of the tensors each has (0: ``[N]`` or ``[1]``).
        formula: of fp64 tensors (t, v, s), the outputs before they are rounded to integers.
    """

    spec: Spec
    formula: Callable[..., list[Tensor]]
    tensors: int = 1
    vectors: Sequence[int] = ()
    scalars: Sequence[int] = ()
    positive: bool = False  # the scalars

    def operands(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Operands:
        def part(axes: int, last: int) -> Tensor:
            leading = shape[len(shape) - 1 - axes : -1]
            return torch.randn(*leading, last)

        tensors = [torch.randn(shape) for _ in range(self.tensors)]
        vectors = [part(axes, shape[-1]) for axes in self.vectors]
        scalars = [part(min(axes, len(shape) - 1), 1) for axes in self.scalars]
        if self.positive:
            scalars = [s.abs() + 0.1 for s in scalars]
        return [t.to(dtype) for t in tensors], vectors, scalars


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _by_token(y: Tensor, largest: int) -> list[Tensor]:
    scale = y.abs().amax(-1, keepdim=True) / largest
    return [y / scale, scale]


def _residual(t: list[Tensor], v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    h = t[0] + t[1]
    return [*_by_token(_layer(h, v[0], v[1]), 127), h]


def _compressed(t: list[Tensor], v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    full = torch.cat([t[0], -t[0].sum(-1, keepdim=True)], -1)  # zero mean: LayerNorm is RMSNorm
    return [F.layer_norm(full, full.shape[-1:], eps=EPS)[..., :-1]]


def _top_k(t: list[Tensor], v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    (x,) = t
    quantile = torch.special.ndtri(torch.tensor(0.75, dtype=x.dtype))
    deviation = x.std(-1, keepdim=True, correction=0)
    return [F.relu(x - x.mean(-1, keepdim=True) - deviation * quantile)]


def _poly_norm(t: list[Tensor], v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    (x,) = t
    terms = [x**i / ((x ** (2 * i)).mean(-1, keepdim=True) + 1e-6).sqrt() for i in (1, 2, 3)]
    return [s[0] + sum(a * term for a, term in zip(s[1:], terms, strict=True))]


def rational(x: Tensor, v: Sequence[Tensor]) -> Tensor:
    numerator = sum(a * x**i for i, a in enumerate(v[:6]))
    return numerator / (1 + sum(b.abs() * x.abs() ** j for j, b in enumerate(v[6:], 1)))


def _rational_backward(t: list[Tensor], v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in (t[0], *v)]
        return list(torch.autograd.grad(rational(leaves[0], leaves[1:]), leaves, t[1]))


def _evonorm_s0(t: list[Tensor], v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    (x,) = t
    deviation = (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    return [x * torch.sigmoid(v[0] * x) / deviation * v[1] + v[2]]


def _evonorm_b0(t: list[Tensor], v: list[Tensor], s: list[Tensor]) -> list[Tensor]:
    (x,) = t
    instance = (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    return [s[1] * x / torch.maximum((s[3] + EPS).sqrt(), s[0] * x + instance) + s[2]]


def walsh(size: int) -> Tensor:
    """The matrix by its definition: the sign is the parity of the bits that row and column share."""
    bits = [[bin(i & j).count("1") % 2 for j in range(size)] for i in range(size)]
    return 1.0 - 2.0 * torch.tensor(bits, dtype=torch.float64)


CASES: dict[str, Case] = {
    "rms, int8 by token": Case(
        catalogue.quantized_norm("rms", EPS),
        lambda t, v, s: _by_token(_rms(t[0], v[0]), 127),
        vectors=[0],
    ),
    "residual, layer, int8 by token": Case(
        catalogue.quantized_norm("layer", EPS, residual=True, bias=True),
        _residual,
        tensors=2,
        vectors=[0, 0],
    ),
    "layer, int8, static": Case(
        catalogue.quantized_norm("layer", EPS, bias=True, static=True),
        lambda t, v, s: [(_layer(t[0], v[0], v[1]) / s[0]).clamp(-127, 127)],
        vectors=[0, 0],
        scalars=[0],
        positive=True,
    ),
    "rms, fp8 by token": Case(
        catalogue.quantized_norm("rms", EPS, dtype="float8_e4m3fn"),
        lambda t, v, s: _by_token(_rms(t[0], v[0]), 448),
        vectors=[0],
    ),
    "crms": Case(catalogue.compressed_rms_norm(EPS), _compressed),
    "statistical top-k": Case(catalogue.statistical_top_k(0.25), _top_k),
    "poly relu": Case(
        catalogue.poly_relu(),
        lambda t, v, s: [sum(a * F.relu(t[0]) ** i for i, a in enumerate(s))],
        scalars=[0] * 4,
    ),
    "poly norm": Case(catalogue.poly_norm(), _poly_norm, scalars=[0] * 4),
    "group rational": Case(
        catalogue.group_rational(), lambda t, v, s: [rational(t[0], v)], vectors=[0] * 10
    ),
    "group rational, backward": Case(
        catalogue.group_rational_backward(), _rational_backward, tensors=2, vectors=[0] * 10
    ),
    "simple gate": Case(catalogue.simple_gate(), lambda t, v, s: [t[0] * t[1]], tensors=2),
    "evonorm s0": Case(catalogue.evonorm_s0(EPS), _evonorm_s0, vectors=[1, 1, 1]),
    "evonorm b0": Case(catalogue.evonorm_b0(EPS), _evonorm_b0, scalars=[1] * 4, positive=True),
    "operands of every kind, summed": Case(
        Spec(
            ("w = abs(s0)", "y = t0 * w - v0"),
            (Output("y * s1"), Output("y / (w + 1)", "wide", summed=True)),
        ),
        lambda t, v, s: [
            (t[0] * s[0].abs() - v[0]) * s[1],
            ((t[0] * s[0].abs() - v[0]) / (s[0].abs() + 1)).flatten(0, -2).sum(0),
        ],
        vectors=[1],
        scalars=[1, 9],
    ),
    "softmax": Case(
        Spec(("e = exp(t0 - max(t0))",), (Output("e / sum(e)"), Output("min(t0)", "wide"))),
        lambda t, v, s: [t[0].softmax(-1), t[0].amin(-1, keepdim=True)],
    ),
    "functions": Case(
        Spec(
            ("c = tanh(t0) + gelu(t0) - gelu_tanh(t0 - s0)",),
            (Output("silu(c) * sign(t0)", "wide"), Output("-sqrt(abs(minimum(c, t0)) + 2)")),
        ),
        lambda t, v, s: [
            F.silu(_functions(t[0], s[0])) * t[0].sign(),
            -(torch.minimum(_functions(t[0], s[0]), t[0]).abs() + 2).sqrt(),
        ],
        scalars=[9],
    ),
}
# For rows of a power of two of elements.
HADAMARD: dict[str, Case] = {
    f"hadamard {n}": Case(
        catalogue.hadamard(n),
        lambda t, v, s: [t[0] @ walsh(t[0].shape[-1]) / math.sqrt(t[0].shape[-1])],
    )
    for n in (1, 2, 8, 16, 32, 512)
}
HADAMARD["hadamard, int8"] = Case(
    catalogue.hadamard(256, quantize=True), lambda t, v, s: _by_token(t[0] @ walsh(256) / 16, 127)
)


def _functions(x: Tensor, shift: Tensor) -> Tensor:
    return torch.tanh(x) + F.gelu(x) - F.gelu(x - shift, approximate="tanh")


ALL = {**CASES, **HADAMARD}
SIZES = [1, 2, 3, 15, 16, 17, 64, 100, 577, 4099]


def sizes(name: str, most: int = 10**9) -> list[int]:
    """Numbers of features to try a case with, up to ``most`` where it does not fix one."""
    if name in HADAMARD:
        return [256 if name.endswith("int8") else int(name.split()[1])]
    least = 2 if name == "evonorm s0" else 1
    return [n for n in SIZES if least <= n <= most]


def doubled(operands: Operands) -> Operands:
    t, v, s = operands
    return wide(t), wide(v), wide(s)


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """``got`` is ``exact`` rounded to its dtype, but for what arithmetic in fp32 may do at a tie."""
    nearest = exact.to(got.dtype).double() if got.dtype is not torch.int8 else exact.round()
    slack = 1e-5 * exact.abs().clamp(min=1)
    assert ((got.double() - exact).abs() <= (nearest - exact).abs() + slack).all()


def check(run: Run, case: Case, *cases: Operands) -> None:
    """``run`` is as near to the formula in fp64 as the meaning, in what is rounded to integers too."""
    text = case.spec.text()
    ours, aten = [], []
    for operands in cases:
        got, plain = run(*operands, text), meaning(*operands, text)
        exact = case.formula(*doubled(operands))
        assert [(g.shape, g.dtype) for g in got] == [(p.shape, p.dtype) for p in plain]
        assert all(g.is_contiguous() for g in got)
        is_float = [g.dtype.itemsize > 1 for g in got]
        for each in (got, plain):
            for result, e, continuous in zip(each, exact, is_float, strict=True):
                if not continuous:
                    assert_rounded(result, e)
        if any(is_float):
            ours.append(squares(*_those(is_float, got, exact)))
            aten.append(squares(*_those(is_float, plain, exact)))
    if ours:
        assert_as_near(ours, aten)


def _those(which: list[bool], *lists: list[Tensor]) -> list[list[Tensor]]:
    return [[each for each, kept in zip(one, which, strict=True) if kept] for one in lists]


def check_special_values(run: Run, name: str, special: float, most: int = 10**9) -> None:
    """A NaN or infinity in an operand is where it is in the meaning."""
    case = ALL[name]
    for kind in range(3):
        operands = case.operands((3, sizes(name, most)[-1]))
        if not operands[kind]:
            continue
        operands[kind][0].view(-1)[-1] = special
        got = run(*operands, case.spec.text())
        expected = meaning(*doubled(operands), case.spec.text())
        for g, e in zip(got, expected, strict=True):
            g, e = g.float(), e.float()  # fp8 has no isfinite
            assert torch.equal(g.isnan(), e.isnan())
            assert torch.equal(g.isfinite(), e.isfinite())
            assert torch.equal(g[g.isinf()], e[e.isinf()])
