"""Rounded weights in Triton: decoded to floats, or multiplied as integers with activations in int8.

Law: W = scale q (int8), W = scale (q - zero) (int4, two to a byte); see ``runtime.ops.formats``, whose layout
and whose rounding of activations these follow.
Source: Jacob et al. 2018 (arXiv:1712.05877), eq. 1 and 4; groups as in GPTQ (Frantar et al. 2022,
arXiv:2210.17323).
Legal: contiguous tensors; groups divide the features of a row. Exact: sums of products of integers are in
int32, of which ``formats.MOST_INT8`` features have room; one multiplication by the scales follows, in fp32.

Importing this needs Triton; nothing but generated kernels does. A tensor that a format has not is None.
"""

# Triton has no types.
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from sparsecc.codegen.triton.functions import clamp, maximum, round, row_max, to_int8  # noqa: A004


@triton.jit
def levels(
    weight: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """What stands at [row, column]: of bytes or floats (GROUP = 0) these, of nibbles q - 8 in int8.

    Each byte is loaded for both of its nibbles, the second time from a cache: columns stay in their order.
    """
    if GROUP == 0:
        return tl.load(weight + row * SIZE + column, mask=mask, other=0)
    else:
        place = column % GROUP
        at = column // GROUP * (GROUP // 2) + place % (GROUP // 2)
        byte = tl.load(weight + row * (SIZE // 2) + at, mask=mask, other=0).to(tl.int32)
        return ((tl.where(place < GROUP // 2, byte, byte >> 4) & 15) - 8).to(tl.int8)


@triton.jit
def decoded(
    weight: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """W[row, column], 0 where there is none: in fp32, but floats as they are kept.

    Args:
        row, column: int64 ``[R, 1]`` and ``[1, C]``; ``rows`` and ``columns``: whether they are there.
    """
    mask = rows & columns
    w = levels(weight, row, column, mask, SIZE, GROUP)
    if scale is not None:
        if GROUP == 0:
            step = tl.load(scale + row, mask=rows, other=0.0)
            w = w.to(tl.float32) * step.to(tl.float32)
        else:
            at = row * (SIZE // GROUP) + column // GROUP
            w = w.to(tl.float32)
            if zero is not None:
                w += 8 - tl.load(zero + at, mask=mask, other=8.0).to(tl.float32)
            w *= tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
    return w


@triton.jit
def round_activations(
    x: tl.tensor,
    q: tl.tensor,
    steps: tl.tensor,
    K: tl.constexpr,
    TOGETHER: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [M, K] as int8 q and fp32 steps [M, groups], each of TOGETHER features; 0: of a row.

    STATIC: x comes divided by its step. Where q would be NaN in a group, its step is.
    """
    SIZE: tl.constexpr = K if TOGETHER == 0 else TOGETHER
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = row * K + group * SIZE
    peak = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        k = start + tl.arange(0, BLOCK)
        each = tl.load(x + first + k, mask=k < SIZE, other=0.0).to(tl.float32)
        peak = maximum(peak, tl.abs(each))
    largest = row_max(peak)
    if STATIC:
        step = tl.where(largest == largest, 1.0, largest)
    else:
        by = tl.div_rn(largest, 127.0)
        step = tl.where(by < float("inf"), by, float("nan"))
    tl.store(steps + row * (K // SIZE) + group, step)
    for start in range(0, SIZE, BLOCK):
        k = start + tl.arange(0, BLOCK)
        each = tl.load(x + first + k, mask=k < SIZE, other=0.0).to(tl.float32)
        if not STATIC:
            each = tl.where(by == 0, 0.0, tl.div_rn(each, tl.where(by == 0, 1.0, by)))
        tl.store(q + first + k, to_int8(clamp(round(each), -127.0, 127.0)), mask=k < SIZE)


@triton.jit
def product_int8(
    q: tl.tensor,
    steps: tl.tensor,
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
    TOGETHER: tl.constexpr,
) -> tl.tensor:
    """x Wᵀ for ROWS neurons, [MP, ROWS] in fp32, of activations that ``round_activations`` made.

    Sums are in int32 over each TOGETHER features; 0: over all of a row. Rows of W that are not ``inside`` are
    not read.
    """
    row = neuron.to(tl.int64)
    m = tl.arange(0, MP).to(tl.int64)
    if TOGETHER == 0:
        # Matrix units take 32 products of bytes at once.
        STEP: tl.constexpr = BLOCK_K if BLOCK_K > 32 else 32
        if MP <= 4:  # noqa: SIM108 - of two shapes
            whole = tl.zeros([MP, ROWS, STEP], tl.int32)
        else:
            whole = tl.zeros([MP, ROWS], tl.int32)
        for start in tl.range(0, K, STEP, num_stages=STAGES):
            k = start + tl.arange(0, STEP)
            there = (k < K)[None, :]
            w = levels(weight, row[:, None], k[None, :], inside[:, None] & there, K, GROUP)
            y = tl.load(q + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & there, other=0)
            if MP <= 4:
                whole += y.to(tl.int32)[:, None, :] * w.to(tl.int32)[None, :, :]
            else:
                whole = tl.dot(y, tl.trans(w), whole, out_dtype=tl.int32)
        if MP <= 4:
            whole = tl.sum(whole, axis=2)
        step = tl.load(steps + m, mask=m < M, other=0.0)
        sums = whole.to(tl.float32) * step[:, None]
    else:
        GROUPS: tl.constexpr = BLOCK_K // TOGETHER if MP <= 4 and BLOCK_K > TOGETHER else 1
        WIDE: tl.constexpr = GROUPS * TOGETHER
        OF_ROW: tl.constexpr = K // TOGETHER
        parts = tl.zeros([MP, ROWS, GROUPS], tl.float32)
        for start in tl.range(0, K, WIDE, num_stages=STAGES):
            k = start + tl.arange(0, WIDE)
            there = (k < K)[None, :]
            w = levels(weight, row[:, None], k[None, :], inside[:, None] & there, K, GROUP)
            y = tl.load(q + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & there, other=0)
            if MP <= 4:
                terms = y.to(tl.int32)[:, None, :] * w.to(tl.int32)[None, :, :]
                each = tl.sum(tl.reshape(terms, [MP, ROWS, GROUPS, TOGETHER]), axis=3)
            else:
                each = tl.dot(y, tl.trans(w), out_dtype=tl.int32)[:, :, None]
            g = start // TOGETHER + tl.arange(0, GROUPS)
            there = (g < OF_ROW)[None, :]
            part = each.to(tl.float32)
            if GROUP != 0:
                at = row[:, None] * OF_ROW + g[None, :]
                mask = inside[:, None] & there
                if zero is not None:  # its whole part stays among integers, where nothing is lost
                    origin = 8 - tl.load(zero + at, mask=mask, other=8.0).to(tl.float32)
                    near = round(origin)
                    y = tl.reshape(y.to(tl.int32), [MP, GROUPS, TOGETHER])
                    total = tl.sum(y, axis=2)[:, None, :]
                    part = (each + near.to(tl.int32)[None, :, :] * total).to(tl.float32)
                    part += (origin - near)[None, :, :] * total.to(tl.float32)
            step = tl.load(
                steps + m[:, None] * OF_ROW + g[None, :], mask=(m < M)[:, None] & there, other=0.0
            )
            factor = step[:, None, :]
            if GROUP != 0:
                own = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
                factor = factor * own[None, :, :]
            parts += part * factor
        sums = tl.sum(parts, axis=2)
    if GROUP == 0:
        own = tl.load(scale + neuron, mask=inside, other=0.0).to(tl.float32)
        sums = sums * own[None, :]
    return sums
