"""How large the weights of a link are, per channel: what data-free recipes compute scales from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.layout import Run
from sparsecc.passes.analysis.linear import Linear, current
from sparsecc.passes.analysis.links import Link
from sparsecc.passes.analysis.norms import Norm
from sparsecc.passes.analysis.walk import Side
from sparsecc.passes.quant._migrate import (
    anchor,
    by_group,
    current_norm,
    cut,
    operand,
    runs_of,
)
from sparsecc.program import Program, WeightBuilder

aten = torch.ops.aten


def ranges(
    program: Program, link: Link, sides: Sequence[Side], origin: str, *, rows: bool
) -> fx.Node:
    """The largest magnitude per channel over the rows (or columns) of ``sides``: [link.size], fp32 or wider.

    Gradients do not flow through it: what is computed from it is a constant of each step.
    """
    build = program.weight(origin, link.node)
    pieces: list[tuple[Run, fx.Node]] = []
    for side in sides:
        sizes = (
            _row_sizes(program, link, side, origin)
            if rows
            else _column_sizes(program, side, origin)
        )
        start = 0
        for run in runs_of(side):
            if not run.is_free:
                part = cut(build, sizes, start, run.length, len(side.channels))
                pieces.append((run, _over_repeats(build, part, run)))
            start += run.length
    edges = sorted({edge for run, _ in pieces for edge in (run.start, run.start + run.count)})
    found = []
    for low, high in pairwise(edges):
        inside = [
            cut(build, value, low - run.start, high - low, run.count)
            for run, value in pieces
            if run.start <= low and high <= run.start + run.count
        ]
        largest = inside[0]
        for value in inside[1:]:
            largest = build.call(aten.maximum.default, largest, value)
        found.append(largest)
    return found[0] if len(found) == 1 else build.call(aten.cat.default, found)


def _row_sizes(program: Program, link: Link, side: Side, origin: str) -> fx.Node:
    build = program.weight(origin, side.node)
    if isinstance(side.of, Norm):
        return _norm_sizes(build, link, side)
    linear = current(side.of)
    weight = _magnitude(build, linear.weight)
    if linear.is_transposed and linear.is_grouped:
        inputs, outputs, *kernel = linear.weight.meta["val"].shape
        split = [linear.groups, inputs // linear.groups, outputs, *kernel]
        weight = build.call(aten.reshape.default, weight, split)
        largest = build.call(aten.amax.default, weight, [1, *range(3, len(split))])
        return build.call(aten.reshape.default, largest, [-1])
    return _largest(build, weight, linear.out_axis)


def _column_sizes(program: Program, side: Side, origin: str) -> fx.Node:
    assert isinstance(side.of, Linear)
    linear = current(side.of)
    build = program.weight(origin, side.node)
    weight = _magnitude(build, linear.weight)
    if linear.is_grouped and not linear.is_transposed:
        weight = build.call(aten.reshape.default, weight, by_group(linear))
        rank = weight.meta["val"].dim()
        largest = build.call(aten.amax.default, weight, [1, *range(3, rank)])
        return build.call(aten.reshape.default, largest, [-1])
    return _largest(build, weight, linear.in_axis)


def _norm_sizes(build: WeightBuilder, link: Link, side: Side) -> fx.Node:
    norm, tail = current_norm(side)
    factors = [norm.weight, *(operand(tail, s) for s in tail.folds if s.kind == "mul")]
    found: Any = None
    number = 1.0
    for factor in factors:
        if isinstance(factor, fx.Node):
            vector = build.call(aten.reshape.default, _magnitude(build, factor), [-1])
            found = vector if found is None else build.mul(found, vector)
        elif factor is not None:
            number *= abs(factor)
    if found is None:  # a norm without γ: every channel has magnitude one
        found = build.call(aten.new_ones.default, build.wide(anchor(link)), [len(side.channels)])
    return build.mul(found, number) if number != 1.0 else found


def _magnitude(build: WeightBuilder, weight: fx.Node) -> fx.Node:
    wide = build.wide(weight)
    if build.program.trains:
        wide = build.call(aten.detach.default, wide)
    return build.call(aten.abs.default, wide)


def _largest(build: WeightBuilder, weight: fx.Node, axis: int) -> fx.Node:
    others = [a for a in range(weight.meta["val"].dim()) if a != axis]
    return build.call(aten.amax.default, weight, others)


def _over_repeats(build: WeightBuilder, part: fx.Node, run: Run) -> fx.Node:
    """[run.length] -> [run.count]: the largest of each channel's rows."""
    sizes = [size for size, _ in run.dims]
    repeats = [i for i, (_, stride) in enumerate(run.dims) if not stride]
    value = build.call(aten.reshape.default, part, sizes)
    if repeats:
        value = build.call(aten.amax.default, value, repeats, True)
    if run.order != sorted(run.order):
        value = build.call(aten.permute.default, value, [*repeats, *run.order])
    return build.call(aten.reshape.default, value, [run.count])
