"""The functions of ``runtime.ops.expressions`` in Triton, on fp32 tiles; generated kernels import them.

NaN and infinities propagate as in ATen. Importing this needs Triton; nothing but generated kernels does.
"""

# Triton has no types.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, rounded correctly; ``/`` itself may be off by two units in the last place on NVIDIA's GPUs."""
    return tl.div_rn(x, y)


@triton.jit
def relu(x: tl.tensor) -> tl.tensor:
    return tl.where(x < 0, 0.0, x)  # NaN stays NaN


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    return tl.div_rn(1.0, 1 + tl.exp(-x))


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    return tl.div_rn(x, 1 + tl.exp(-x))


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """By exp(-2|x|), which cannot overflow; near zero, where that cancels, by the series."""
    size = tl.abs(x)
    rest = tl.exp(-2 * size)
    far = tl.div_rn(1 - rest, 1 + rest)
    s = x * x  # the next term is below 1e-8 of x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(size < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x: tl.tensor) -> tl.tensor:
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def abs(x: tl.tensor) -> tl.tensor:  # noqa: A001
    return tl.abs(x)


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    return tl.exp(x)


@triton.jit
def sqrt(x: tl.tensor) -> tl.tensor:
    return tl.sqrt_rn(x)


@triton.jit
def rsqrt(x: tl.tensor) -> tl.tensor:
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def sign(x: tl.tensor) -> tl.tensor:
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # NaN and zero as they are


@triton.jit
def round(x: tl.tensor) -> tl.tensor:  # noqa: A001
    """Half to even: adding 1.5 * 2^23 leaves no room for a fraction; from 2^22 on there is none to lose."""
    magic = 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, tl.floor(x + 0.5))


@triton.jit
def maximum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    return minimum(maximum(x, low), high)
