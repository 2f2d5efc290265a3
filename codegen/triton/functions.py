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
    """Half to even: above 2^23 there is no room for a fraction."""
    size = tl.abs(x)
    near = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(x < 0, -near, near), x)


@triton.jit
def maximum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    return minimum(maximum(x, low), high)


@triton.jit
def keep(x: tl.tensor, t: tl.tensor) -> tl.tensor:
    """x where |x| > t, else 0 (CATS, TEAL)."""
    return tl.where(tl.abs(x) <= t, 0.0, x)  # NaN stays NaN


@triton.jit
def fatrelu(x: tl.tensor, t: tl.tensor) -> tl.tensor:
    """x where x >= t, else 0 (ProSparse)."""
    return tl.where(x < t, 0.0, x)  # NaN stays NaN


@triton.jit
def to_int8(x: tl.tensor) -> tl.tensor:
    """Whole numbers within the range; NaN, which has no number, becomes 0."""
    return tl.where(x == x, x, 0.0).to(tl.int8)


@triton.jit
def to_e4m3(x: tl.tensor) -> tl.tensor:
    """The bits of float8 e4m3, rounded to even, at most 448: not every GPU can convert."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    magic: tl.constexpr = (
        0x46800000  # 2^14: adding it rounds to multiples of 2^-9, the smallest number
    )
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - magic
    normal = (
        size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)
    ) >> 20  # exponents' biases: 127 and 7
    number = tl.where(size < (121 << 23), small, normal)
    number = tl.where(size >= 0x43E00000, 0x7E, number)  # from 448 on
    number = tl.where(x == x, number, 0x7F)
    return (number | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def row_max(x: tl.tensor) -> tl.tensor:
    """The largest element, or NaN where there is one."""
    return tl.reduce(x, 0, maximum)


@triton.jit
def row_min(x: tl.tensor) -> tl.tensor:
    """The smallest element, or NaN where there is one."""
    return tl.reduce(x, 0, minimum)


@triton.jit
def _butterflies(x: tl.tensor, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Sums and differences of the elements that are WIDTH apart."""
    pairs = tl.permute(tl.reshape(x, [SIZE // (2 * WIDTH), 2, WIDTH]), [0, 2, 1])
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [SIZE])


@triton.jit
def hadamard(x: tl.tensor, SIZE: tl.constexpr, LOG: tl.constexpr) -> tl.tensor:
    """The Walsh–Hadamard transform of SIZE = 2 ** LOG elements."""
    for i in tl.static_range(LOG):
        x = _butterflies(x, SIZE, 2**i)
    return x


@triton.jit
def add_compensated(total: tl.tensor, lost: tl.tensor, x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """total + x, and what rounding added to it, to be taken off the next x (Kahan)."""
    rest = x - lost
    result = total + rest
    lost = (result - total) - rest
    return result, tl.where(lost == lost, lost, 0.0)  # of infinite sums nothing is lost
