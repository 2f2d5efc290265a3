"""What generated Triton kernels of ``sparsecc::sparse_ffn`` share; they import it, and it needs Triton.

Law: a product of x and those rows of a weight alone that belong to given neurons; out = sum over live neurons
of h D[neuron], in parts whose order follows from sizes alone, and so do the bits.
Legal: weights ``[F, K]`` and ``[F, N]``, contiguous, in any format (``weights.py``); M rows of MP = 1, 2, 4 or
16, those behind M being zero.
Exact: dead neurons, which are not read, would add zero.
Source: three steps and gathered rows as in CATS (Lee et al. 2024, arXiv:2404.08763, alg. 1), for several rows
the union of their live neurons; sums over parts of the neurons are ours, as CATS adds by atomics.
"""

# Triton has no types.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from sparsecc.codegen.triton.weights import decoded


@triton.jit
def neurons_at(
    only: tl.tensor, place: tl.tensor, C: tl.tensor, F: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The neurons at ``place`` among the C that may be live, and whether there are such."""
    inside = place < C
    neuron = place
    if only is not None:
        neuron = tl.load(only + place, mask=inside, other=0)
        inside = inside & (neuron >= 0) & (neuron < F)
    return neuron, inside


@triton.jit
def product(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    neuron: tl.tensor,
    inside: tl.tensor,
    M: tl.constexpr,
    K: tl.constexpr,
    MP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """x Wᵀ for ROWS neurons, [MP, ROWS] in fp32; rows of W that are not ``inside`` are not read."""
    row_of = neuron.to(tl.int64)[:, None]
    m = tl.arange(0, MP).to(tl.int64)
    if MP == 1:
        sums = tl.zeros([ROWS, BLOCK_K], tl.float32)
    elif MP <= 4:
        sums = tl.zeros([MP, ROWS, BLOCK_K], tl.float32)
    else:
        sums = tl.zeros([MP, ROWS], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        there = (k < K)[None, :]
        w = decoded(weight, scale, zero, row_of, k[None, :], inside[:, None], there, K, GROUP)
        if MP == 1:
            row = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * row[None, :]
        else:
            rows = tl.load(
                x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & there, other=0.0
            )
            if MP <= 4:
                sums += rows.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
            elif rows.dtype == w.dtype:
                sums = tl.dot(rows, tl.trans(w), sums, input_precision="ieee")
            else:  # in x's dtype, a weight would be rounded once more
                wide = tl.trans(w.to(tl.float32))
                sums = tl.dot(rows.to(tl.float32), wide, sums, input_precision="ieee")
    if MP == 1:
        result = tl.sum(sums, axis=1)[None, :]
    elif MP <= 4:
        result = tl.sum(sums, axis=2)
    else:
        result = sums
    return result


@triton.jit
def live_at(live: tl.tensor, wanted: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """Where the ``wanted``-th of the live neurons of a chunk stand in it, in ascending order."""
    rank = tl.cumsum(live.to(tl.int32), 0) - 1
    hit = live[None, :] & (rank[None, :] == wanted[:, None])
    return tl.sum(tl.where(hit, tl.arange(0, CHUNK)[None, :], 0), axis=1)


@triton.jit
def gaussian_limits(
    kept: tl.tensor,
    limits: tl.tensor,
    F: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """mean + FACTOR std (the population's) of each row of [M, F], in two passes, as ``moments`` does."""
    row = kept + tl.program_id(0).to(tl.int64) * F
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        sums += tl.load(row + f, mask=f < F, other=0.0)
    mean = tl.div_rn(tl.sum(sums, axis=0), F)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        apart = tl.load(row + f, mask=f < F, other=0.0) - mean
        squares += tl.where(f < F, apart * apart, 0.0)
    std = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), F))
    tl.store(limits + tl.program_id(0), mean + FACTOR * std)


@triton.jit
def is_top(a: tl.tensor, neuron: tl.tensor, limit: tl.tensor, last: tl.tensor) -> tl.tensor:
    """Whether a is of the largest, the least of which is ``limit`` and the last of them is neuron ``last``.

    NaN is above every number, as ATen sorts.
    """
    above = (a > limit) | ((a != a) & (limit == limit))
    same = (a == limit) | ((a != a) & (limit != limit))
    return above | (same & (neuron <= last))


@triton.jit
def down(
    neurons: tl.tensor,
    counts: tl.tensor,
    h: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    partial: tl.tensor,
    chunks: tl.tensor,
    walk: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    MP: tl.constexpr,
    CHUNK: tl.constexpr,
    LIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """partial[part] [M, N] = sum over the live neurons of ``walk`` chunks of h D[neuron], LIVE at a time."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, MP).to(tl.int64)
    if MP == 1:
        sums = tl.zeros([LIVE, BLOCK_N], tl.float32)
    elif MP <= 4:
        sums = tl.zeros([MP, LIVE, BLOCK_N], tl.float32)
    else:
        sums = tl.zeros([MP, BLOCK_N], tl.float32)
    for chunk in range(part * walk, tl.minimum(part * walk + walk, chunks)):
        count = tl.load(counts + chunk)
        for start in tl.range(0, count, LIVE, num_stages=STAGES):
            j = start + tl.arange(0, LIVE)
            there = j < count
            neuron = tl.load(neurons + chunk * CHUNK + j, mask=there, other=0).to(tl.int64)
            row_of, column = neuron[:, None], n[None, :]
            inside = there[:, None], column < N
            w = decoded(weight, scale, zero, row_of, column, inside[0], inside[1], N, GROUP)
            w = w.to(tl.float32)
            if MP == 1:
                each = tl.load(h + chunk * CHUNK + j, mask=there, other=0.0)
                sums += each[:, None] * w
            else:
                at = (chunk * M + m[:, None]) * CHUNK + j[None, :]
                rows = tl.load(h + at, mask=(m < M)[:, None] & there[None, :], other=0.0)
                if MP <= 4:
                    sums += rows[:, :, None] * w[None, :, :]
                else:
                    sums = tl.dot(rows, w, sums, input_precision="ieee")
    if MP == 1:
        result = tl.sum(sums, axis=0)[None, :]
    elif MP <= 4:
        result = tl.sum(sums, axis=1)
    else:
        result = sums
    at = (part * M + m[:, None]) * N + n[None, :]
    tl.store(partial + at, result, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def combine(
    partial: tl.tensor, out: tl.tensor, parts: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """The sum over ``parts`` of SIZE elements each, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(partial + at, mask=at < SIZE, other=0.0)
        partial += SIZE
    tl.store(out + at, total, mask=at < SIZE)


@triton.jit
def add_counts(
    lives: tl.tensor,
    counts: tl.tensor,
    totals: tl.tensor,
    chunks: tl.tensor,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """totals (int64) += 1 call, M rows, and the sums of ``lives`` and ``counts`` over all chunks."""
    live = tl.zeros([BLOCK], tl.int64)
    union = tl.zeros([BLOCK], tl.int64)
    for start in range(0, chunks, BLOCK):
        c = start + tl.arange(0, BLOCK)
        live += tl.load(lives + c, mask=c < chunks, other=0)
        union += tl.load(counts + c, mask=c < chunks, other=0)
    tl.store(totals, tl.load(totals) + 1)
    tl.store(totals + 1, tl.load(totals + 1) + M)
    tl.store(totals + 2, tl.load(totals + 2) + tl.sum(live, axis=0))
    tl.store(totals + 3, tl.load(totals + 3) + tl.sum(union, axis=0))
