"""Specs of ``sparsecc::rows`` for published methods; each says which operands it reads."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from sparsecc.runtime.ops.rows import Output, Spec

_LARGEST = {"int8": 127, "float8_e4m3fn": 448}
_LEAST_SCALE = 1e-10  # of a row of zeros, whose quotients are then zeros too


def norm(kind: str, eps: float, x: str = "t0") -> tuple[str, ...]:
    """Statements for ``y``, the RMSNorm ("rms") or LayerNorm ("layer") of ``x`` without scale and shift.

    Raises:
        ValueError: another kind.
    """
    if kind == "rms":
        return (f"y = {x} * rsqrt(mean({x} * {x}) + {eps!r})",)
    if kind == "layer":  # the mean first: E(x²) − E(x)² cancels
        return (f"c = {x} - mean({x})", f"y = c * rsqrt(mean(c * c) + {eps!r})")
    raise ValueError(f'norm {kind!r} is neither "rms" nor "layer"')


def quantized(
    y: str, dtype: str = "int8", scale: str | None = None
) -> tuple[list[str], list[Output]]:
    """Statements and outputs for ``y`` in ``dtype``, symmetric.

    Args:
        y: an expression.
        dtype: "int8" or "float8_e4m3fn".
        scale: that of the whole tensor, an operand; or None for one of each row, the second output.
    """
    if dtype not in _LARGEST:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(_LARGEST)}")
    statements, outputs = [f"z = {y}"], []
    if scale is None:
        statements.append(f"scale = maximum(max(abs(z)), {_LEAST_SCALE!r}) / {_LARGEST[dtype]}")
        scale = "scale"
        outputs.append(Output("scale", "wide"))
    quotient = f"round(z / {scale})" if dtype == "int8" else f"z / {scale}"
    text = f"clamp({quotient}, -{_LARGEST[dtype]}, {_LARGEST[dtype]})"
    return statements, [Output(text, dtype), *outputs]


def quantized_norm(
    kind: str,
    eps: float,
    *,
    residual: bool = False,
    bias: bool = False,
    dtype: str = "int8",
    static: bool = False,
) -> Spec:
    """A norm that is quantized on its way out: q, its scale, and with a residual the sum.

    Operands: t0, and t1 with ``residual``; v0 the norm's weight, v1 its ``bias``; s0 the scale if ``static``.
    """
    x = "h" if residual else "t0"
    scaled = "y * v0 + v1" if bias else "y * v0"
    statements, outputs = quantized(scaled, dtype, "s0" if static else None)
    sums = ("h = t0 + t1",) if residual else ()
    return Spec(
        (*sums, *norm(kind, eps, x), *statements),
        (*outputs, Output("h")) if residual else tuple(outputs),
    )


def compressed_rms_norm(eps: float) -> Spec:
    """Pre-CRMSNorm: the RMSNorm of d features whose sum is zero, of which the first N = d - 1 are stored.

    Operands: t0. The divisor counts the feature that is not stored, which is minus the sum of the others.
    """
    law = f"t0 * rsqrt((sum(t0 * t0) + total * total) / (N + 1) + {eps!r})"
    return Spec(("total = sum(t0)",), (Output(law),))


def statistical_top_k(share: float) -> Spec:
    """relu(x − θ), θ the quantile of a normal distribution with the row's mean and deviation (Spark).

    Operands: t0.

    Args:
        share: k / N, how much of a row of normal values is kept.

    Raises:
        ValueError: it is not between 0 and 1; all of a row needs no threshold.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of {share} is not between 0 and 1")
    quantile = NormalDist().inv_cdf(1 - share)
    return Spec(("c = t0 - mean(t0)",), (Output(f"relu(c - sqrt(mean(c * c)) * {quantile!r})"),))


def poly_relu() -> Spec:
    """PolyReLU of order 3 (PolyCom): Σ aᵢ relu(x)ⁱ. Operands: t0; s0 … s3 the coefficients."""
    return Spec(("r = relu(t0)",), (Output("s0 + r * (s1 + r * (s2 + r * s3))"),))


def poly_norm(eps: float = 1e-6) -> Spec:
    """PolyNorm of order 3 (PolyCom): a₀ + Σ aᵢ xⁱ / √(mean(x²ⁱ) + ε). Operands: t0; s0 … s3 the coefficients.

    Large rows are divided by their largest element, with ε alike: x⁶ would overflow.
    """
    powers = (
        "a = maximum(max(abs(t0)), 1)",
        "u = t0 / a",
        "uu = u * u",
        "uuu = uu * u",
        "e = 1 / (a * a)",
    )
    terms = (
        f"s1 * u * rsqrt(mean(uu) + {eps!r} * e)",
        f"s2 * uu * rsqrt(mean(uu * uu) + {eps!r} * e * e)",
        f"s3 * uuu * rsqrt(mean(uuu * uuu) + {eps!r} * e * e * e)",
    )
    return Spec(powers, (Output("s0 + " + " + ".join(terms)),))


# P(x) = Σ aᵢ xⁱ over v0 … v5, Q(x) = 1 + Σ |bⱼ| |x|ʲ over v6 … v9, by Horner's rule.
_RATIONAL = (
    "p = v0 + t0 * (v1 + t0 * (v2 + t0 * (v3 + t0 * (v4 + t0 * v5))))",
    "r = abs(t0)",
    "q = 1 + r * (abs(v6) + r * (abs(v7) + r * (abs(v8) + r * abs(v9))))",
)


def group_rational() -> Spec:
    """The group-rational activation of KAT (GR-KAN): P(x) / Q(x), deg P = 5, deg Q = 4.

    Operands: t0; v0 … v5 and v6 … v9 the coefficients a and b of each feature's group (:func:`by_feature`).
    """
    return Spec(_RATIONAL, (Output("p / q"),))


def group_rational_backward() -> Spec:
    """Gradients of :func:`group_rational`: dx, then those of a₀ … a₅ and b₁ … b₄ of each feature.

    Operands: t0 the input, t1 the gradient of the output; the vectors as there. :func:`by_group` adds the
    features of a group up.

    dx = g (P′/Q − P Q′/Q²), daᵢ = Σ g xⁱ/Q, dbⱼ = −Σ g P sign(bⱼ) |x|ʲ/Q² (FlashKAT).
    """
    slope = "v1 + t0 * (2 * v2 + t0 * (3 * v3 + t0 * (4 * v4 + t0 * (5 * v5))))"
    steep = "abs(v6) + r * (2 * abs(v7) + r * (3 * abs(v8) + r * (4 * abs(v9))))"
    statements = (
        *_RATIONAL,
        "g = t1 / q",
        "f = p / q",
        f"dp = {slope}",
        f"dq = sign(t0) * ({steep})",
        *("g1 = g * t0", "g2 = g1 * t0", "g3 = g2 * t0", "g4 = g3 * t0", "g5 = g4 * t0"),
        *("w = -g * f", "w1 = w * r", "w2 = w1 * r", "w3 = w2 * r", "w4 = w3 * r"),
    )
    numerator = [Output(name, "wide", summed=True) for name in ("g", "g1", "g2", "g3", "g4", "g5")]
    denominator = [Output(f"w{j} * sign(v{5 + j})", "wide", summed=True) for j in (1, 2, 3, 4)]
    return Spec(statements, (Output("g * (dp - f * dq)"), *numerator, *denominator))


def by_feature(coefficients: torch.Tensor, features: int) -> list[torch.Tensor]:
    """Coefficients of groups ``[groups, count]`` as ``count`` vectors ``[features]``."""
    wide = coefficients.repeat_interleave(features // coefficients.shape[0], 0)
    return list(wide.unbind(1))


def by_group(gradients: list[torch.Tensor], groups: int) -> torch.Tensor:
    """The other way: vectors ``[features]`` summed to ``[groups, count]``."""
    return torch.stack([each.unflatten(0, (groups, -1)).sum(1) for each in gradients], 1)


def simple_gate() -> Spec:
    """SimpleGate (NAFNet): the product of both halves of the channels. Operands: t0, t1, the halves."""
    return Spec((), (Output("t0 * t1"),))


def evonorm_s0(eps: float = 1e-5) -> Spec:
    """EvoNorm-S0: γ x σ(v x) / √(Var(x) + ε) + β, the population variance of a group of channels.

    Operands: t0, a row for each sample and group; v0, v1, v2 = v, γ, β (:func:`by_position`).
    """
    statements = ("c = t0 - mean(t0)",)
    law = f"t0 * sigmoid(v0 * t0) * rsqrt(mean(c * c) + {eps!r}) * v1 + v2"
    return Spec(statements, (Output(law),))


def evonorm_b0(eps: float = 1e-5) -> Spec:
    """EvoNorm-B0 by running statistics: γ x / max(√(running + ε), v x + √(Var(x) + ε)) + β.

    Operands: t0, a row for each sample and channel; s0 … s3 = v, γ, β, running variance, ``[channels, 1]``.
    """
    statements = (
        "c = t0 - mean(t0)",
        f"d = maximum(sqrt(s3 + {eps!r}), s0 * t0 + sqrt(mean(c * c) + {eps!r}))",
    )
    return Spec(statements, (Output("s1 * t0 / d + s2"),))


def by_position(channels: torch.Tensor, groups: int, positions: int) -> torch.Tensor:
    """A vector over channels ``[C]`` for rows that are groups: ``[groups, C/groups · positions]``."""
    return channels.repeat_interleave(positions).view(groups, -1)


def hadamard(size: int, quantize: bool = False) -> Spec:
    """The orthogonal Walsh–Hadamard transform H x / √size; or that in int8, with the scale of each row.

    Operands: t0, with ``size`` features, a power of two.
    """
    law = f"hadamard(t0) * {1 / math.sqrt(size)!r}"
    if not quantize:
        return Spec((), (Output(law),))
    statements, outputs = quantized(law)
    return Spec(tuple(statements), tuple(outputs))
