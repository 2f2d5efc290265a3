"""Parts of the generated kernels of ``sparsecc::cached_attention``; they import it, and it needs Triton.

Softmax in pieces: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), eq. 4.
"""

# Triton has no types.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    d: tl.tensor,
    inside: tl.tensor,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Features ``d`` of R x, in float32: pairs (i, i + SIZE/2) turned by the angles; zero where not inside.

    Args:
        x, cos, sin: pointers that broadcast to ``d``.
    """
    second = d >= SIZE // 2
    other = tl.where(second, d - SIZE // 2, d + SIZE // 2)
    straight = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    crossed = tl.load(x + other, mask=inside, other=0.0).to(tl.float32)
    crossed = tl.where(second, crossed, -crossed)
    straight *= tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
    crossed *= tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
    return straight + crossed


@triton.jit
def weigh(
    score: tl.tensor, largest: tl.tensor, total: tl.tensor, AXIS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One more tile of scores: its weights, what earlier sums are to be scaled by, the new maximum and total.

    Args:
        score: -inf where a row does not see a key.
        largest, total: so far, -inf and 0 at first.
        AXIS: the last axis of ``score``, that of keys.
    """
    peak = tl.maximum(largest, tl.max(score, AXIS))
    shift = tl.where(
        peak == float("-inf"), 0.0, peak
    )  # nothing seen yet: -inf less -inf would be NaN
    weight = tl.exp(score - tl.expand_dims(shift, AXIS))
    share = tl.exp(largest - shift)
    return weight, share, peak, total * share + tl.sum(weight, AXIS)


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def not_finite(seen: tl.tensor, value: tl.tensor) -> tl.tensor:
    """What the values that are NaN or infinite add to the sums of the rows that see them; elsewhere 0.

    A matrix product would spread them to every row, as zero times NaN is NaN.

    Args:
        seen: ``[rows, keys]``, bool.
        value: ``[keys, features]``.
    """
    wide = value.to(tl.float32)
    sees = tl.where(seen, 1.0, 0.0).to(value.dtype)
    nan = tl.where(wide != wide, 1.0, 0.0).to(value.dtype)
    above = tl.where(wide == float("inf"), 1.0, 0.0).to(value.dtype)
    below = tl.where(wide == float("-inf"), 1.0, 0.0).to(value.dtype)
    sums = tl.where(tl.dot(sees, nan, input_precision="ieee") > 0, float("nan"), 0.0)
    sums += tl.where(tl.dot(sees, above, input_precision="ieee") > 0, float("inf"), 0.0)
    return sums + tl.where(tl.dot(sees, below, input_precision="ieee") > 0, float("-inf"), 0.0)


@triton.jit
def combine(
    scratch: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    chunks: tl.tensor,
    T: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A kernel: the chunks of one query put together; a query that sees nothing gets zeros.

    Args:
        scratch: ``[batch, heads, chunks, T * GROUPS, SIZE]`` weighted values, then as many maxima, then sums of
            weights, without the last axis; float32.
        out: ``[batch, T, heads, GROUPS, SIZE]``.
        BLOCK_C, BLOCK_D: chunks at a time; SIZE, made a power of two.
    """
    query = tl.program_id(0).to(tl.int64)
    every = tl.num_programs(0).to(tl.int64) * chunks
    r, head = query % (T * GROUPS), query // (T * GROUPS)
    first = head * chunks * (T * GROUPS) + r
    d = tl.arange(0, BLOCK_D)
    maxima, totals = scratch + every * SIZE, scratch + every * (SIZE + 1)
    peaks = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for start in range(0, chunks, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        place = first + c.to(tl.int64) * (T * GROUPS)
        peaks = tl.maximum(peaks, tl.load(maxima + place, mask=c < chunks, other=float("-inf")))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, chunks, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        place = first + c.to(tl.int64) * (T * GROUPS)
        share = tl.exp(tl.load(maxima + place, mask=c < chunks, other=float("-inf")) - peak)
        total += share * tl.load(totals + place, mask=c < chunks, other=0.0)
        inside = (c < chunks)[:, None] & (d < SIZE)[None, :]
        part = tl.load(scratch + place[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
        sums += share[:, None] * part
    weight = tl.sum(total, 0)
    value = tl.where(weight == 0, 0.0, tl.div_rn(tl.sum(sums, 0), weight))
    t, g, h, b = r // GROUPS, r % GROUPS, head % heads, head // heads
    place = ((b * T + t) * heads + h) * GROUPS + g
    tl.store(out + place * SIZE + d, value, mask=d < SIZE)
