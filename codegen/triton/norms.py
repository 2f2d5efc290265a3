"""What generated Triton kernels ask about rows of their input; they import it, and it needs Triton."""

# Triton has no types.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(squares: tl.tensor, K: tl.constexpr, EPS: tl.constexpr) -> tl.tensor:
    """1 / sqrt(squares / K + EPS): what a norm multiplies with."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, K) + EPS))


@triton.jit
def moments(
    x: tl.tensor,
    M: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and 1 / sqrt(variance + EPS) of the first M of ROWS rows: [ROWS] each.

    The variance is of differences from the mean, in a second pass: x is small, and a difference of two large
    sums would lose what a large mean hides.
    """
    m = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        sums += tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, axis=1), K)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        here = (m < M) & (k < K)
        value = tl.load(x + m * K + k, mask=here, other=0.0).to(tl.float32) - mean[:, None]
        squares += tl.where(here, value * value, 0.0)
    return mean, scale_of(tl.sum(squares, axis=1), K, EPS)
