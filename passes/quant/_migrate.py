"""Scales and shifts moved along a link: an equivalent transform, written as weight expressions.

Scale  producer rows ÷ s, consumer columns × s:   W₂ f(W₁x + b₁) = (W₂ diag(s)) f(diag(1/s)(W₁x + b₁)).
       Of a q-k link, rows of k ÷ s and rows of q × s.
Shift  producer bias − z, consumer bias + Wz with W as it was:   W₂y + b₂ = W₂(y − z) + (b₂ + W₂z).

Source Xiao et al. 2023, "SmoothQuant", eq. 4 (scale); Wei et al. 2023, "Outlier Suppression+", eq. 3 (shift).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.affine import Step, Tail
from sparsecc.passes.analysis.layout import Run, runs
from sparsecc.passes.analysis.linear import Linear, current
from sparsecc.passes.analysis.links import Link
from sparsecc.passes.analysis.norms import Norm, as_norm
from sparsecc.passes.analysis.walk import Side
from sparsecc.program import MOVED, ORIGIN, Program, WeightBuilder

aten = torch.ops.aten

Vector = fx.Node | Sequence[float]  # [link.size]: a weight node, or numbers


def migrate_scale(program: Program, link: Link, s: Vector, origin: str) -> None:
    """Divide what ``link``'s producers make by ``s``, and multiply what its consumers read by it.

    Args:
        s: [link.size], positive: a weight node of any floating dtype, or numbers. Of a node nothing is
            checked: whoever writes it keeps it above zero.
        origin: the name of the pass.
    Raises:
        ValueError: the link carries no scale, ``s`` has another length, or a number in it is not positive and
            finite.
    """
    if not link.carries_scale:
        raise ValueError(f"the link at {link.node.name} carries no scale: {link.refusal}")
    if not isinstance(s, fx.Node) and not all(0 < v < math.inf for v in s):
        raise ValueError("scales must be positive and finite.")
    build = program.weight(origin, link.node)
    scale = _vector(build, link, s)
    inverse = build.call(aten.reciprocal.default, scale)
    for side in link.producers:
        _scale_rows(program, side, inverse, origin)
    for side in link.consumers:
        if link.kind == "q-k":
            _scale_rows(program, side, scale, origin)
        else:
            _scale_columns(program, side, scale, origin)
    _mark(link, "it is scaled per channel, and what reads it undoes that")


def migrate_shift(program: Program, link: Link, z: Vector, origin: str) -> None:
    """Subtract ``z`` from what ``link``'s producers make, and add what it stood for behind its consumers.

    Biases are created where there are none, in the dtype of the weight.

    Args:
        z: [link.size]: a weight node of any floating dtype, or numbers.
        origin: the name of the pass.
    Raises:
        ValueError: the link carries no shift, ``z`` has another length, or a number in it is not finite.
    """
    if not link.carries_shift:
        why = link.refusal or link.shift_refusal
        raise ValueError(f"the link at {link.node.name} carries no shift: {why}")
    if not isinstance(z, fx.Node) and not all(math.isfinite(v) for v in z):
        raise ValueError("shifts must be finite.")
    build = program.weight(origin, link.node)
    shift = _vector(build, link, z)
    for side in link.consumers:
        _add_behind(program, side, shift, origin)
    negative = build.call(aten.neg.default, shift)
    for side in link.producers:
        _shift_rows(program, side, negative, origin)
    _mark(link, "it is shifted per channel, and what reads it undoes that")


# ---- edits ----------------------------------------------------------------------------------------


def _scale_rows(program: Program, side: Side, vector: fx.Node, origin: str) -> None:
    build = program.weight(origin, side.node)
    rows = _spread(build, side, vector, aten.new_ones.default)
    if isinstance(side.of, Norm):
        _scale_norm(program, side, rows, origin)
        return
    current(side.of).scale_and_shift(program, rows, None, origin)


def _scale_columns(program: Program, side: Side, vector: fx.Node, origin: str) -> None:
    assert isinstance(side.of, Linear)
    linear = current(side.of)
    build = program.weight(origin, side.node)
    columns = _spread(build, side, vector, aten.new_ones.default)
    linear.absorb(program, columns, None, origin)


def by_group(linear: Linear) -> list[Any]:
    """The shape of a grouped convolution's weight with the groups apart."""
    outputs, inputs, *kernel = linear.weight.meta["val"].shape
    return [linear.groups, outputs // linear.groups, inputs, *kernel]


def _add_behind(program: Program, side: Side, shift: fx.Node, origin: str) -> None:
    """Consumer bias + Wz."""
    assert isinstance(side.of, Linear)
    linear = current(side.of)
    build = program.weight(origin, side.node)
    columns = _spread(build, side, shift, aten.new_zeros.default)
    linear.absorb(program, None, columns, origin)


def _shift_rows(program: Program, side: Side, vector: fx.Node, origin: str) -> None:
    build = program.weight(origin, side.node)
    rows = _spread(build, side, vector, aten.new_zeros.default)
    if isinstance(side.of, Norm):
        _shift_norm(program, side, rows, origin)
    else:
        _set_bias(program, current(side.of), rows, origin)


def _set_bias(program: Program, linear: Linear, term: fx.Node, origin: str) -> None:
    build = program.weight(origin, linear.node)
    like = linear.weight if linear.bias is None else linear.bias
    if linear.bias is not None:
        term = build.add(build.wide(linear.bias), term)
    linear.set_weights(program, origin, bias=build.as_dtype(term, like.meta["val"].dtype))


def _scale_norm(program: Program, side: Side, rows: fx.Node, origin: str) -> None:
    """The last vector that is multiplied takes the factor, and so does all that is added after it."""
    norm, tail = current_norm(side)
    build = program.weight(origin, side.node)
    muls = [
        i
        for i, s in enumerate(tail.steps)
        if s.kind == "mul" and isinstance(operand(tail, s), fx.Node)
    ]
    first = muls[-1] if muls else -1
    if first < 0:
        weight = rows if norm.weight is None else build.mul(_flat(build, norm.weight), rows)
        bias = None if norm.bias is None else build.mul(_flat(build, norm.bias), rows)
        _set_norm(program, norm, weight, bias, origin)
    for i, step in enumerate(tail.steps):
        if i == first or (i > first and step.kind == "add"):
            _set_operand(program, tail, i, lambda old: build.mul(old, rows), origin)


def _shift_norm(program: Program, side: Side, rows: fx.Node, origin: str) -> None:
    norm, tail = current_norm(side)
    build = program.weight(origin, side.node)
    if tail.folds:
        _set_operand(program, tail, len(tail.steps) - 1, lambda old: build.add(old, rows), origin)
        return
    bias = rows if norm.bias is None else build.add(_flat(build, norm.bias), rows)
    _set_norm(program, norm, None, bias, origin)


def _set_norm(
    program: Program, norm: Norm, weight: fx.Node | None, bias: fx.Node | None, origin: str
) -> None:
    build = program.weight(origin, norm.node)

    def typed(new: fx.Node | None, old: fx.Node | None) -> fx.Node | None:
        if new is None:
            return old
        like = next(v for v in (old, norm.weight, norm.bias, norm.x) if v is not None)
        new = build.as_dtype(new, like.meta["val"].dtype)
        program.bring_before(new, norm.node)
        return new

    vectors: list[Any] = [typed(weight, norm.weight)]
    if norm.kind == "layer_norm":
        vectors.append(typed(bias, norm.bias))
    rest = norm.node.args[5:] if norm.kind == "layer_norm" else ()
    kwargs = {k: v for k, v in norm.node.kwargs.items() if k not in ("weight", "bias", "eps")}
    norm.node.args = (norm.x, norm.shape, *vectors, norm.eps, *rest)
    norm.node.kwargs = kwargs
    norm.node.meta[ORIGIN] = origin
    program.version += 1


def _set_operand(program: Program, tail: Tail, index: int, change: Any, origin: str) -> None:
    """Give one step of a norm's tail another vector."""
    step = tail.steps[index]
    old: Any = operand(tail, step)
    build = program.weight(origin, step.node)
    value = build.call(aten.reshape.default, change(_flat(build, old)), list(old.meta["val"].shape))
    # A vector that the program widens is not rounded to its own dtype again.
    value = build.as_dtype(value, step.node.meta["val"].dtype)
    program.bring_before(value, step.node)
    step.node.update_arg(1 if step.node.args[1] is old else 0, value)
    step.node.meta[ORIGIN] = origin
    program.version += 1


def current_norm(side: Side) -> tuple[Norm, Tail]:
    """The norm as it is now: an earlier link may have changed its weights."""
    norm = as_norm(side.node)
    assert norm is not None
    assert side.tail is not None
    return norm, side.tail


def operand(tail: Tail, step: Step) -> Any:
    """What a step multiplies or adds now: the argument that is not the value before it."""
    if not isinstance(step.operand, fx.Node):
        return step.operand
    index = tail.steps.index(step)
    behind = tail.steps[index - 1].node if index else None
    for value in step.node.args[:2]:
        is_norm = isinstance(value, fx.Node) and as_norm(value) is not None
        if value is not behind and not (behind is None and is_norm):
            return value
    raise AssertionError(f"{step.node.name} has no operand beside the norm")


def anchor(link: Link) -> fx.Node:
    """Some weight of ``link``, for constants that stand beside it."""
    for side in (*link.consumers, *link.producers):
        if isinstance(side.of, Linear):
            return current(side.of).weight
        norm, tail = current_norm(side)
        for value in (norm.weight, norm.bias, *(operand(tail, s) for s in tail.folds)):
            if isinstance(value, fx.Node):
                return value
    raise ValueError(f"the link at {link.node.name} has no weight.")


def _flat(build: WeightBuilder, node: fx.Node) -> fx.Node:
    return build.call(aten.reshape.default, build.wide(node), [-1])


# ---- vectors --------------------------------------------------------------------------------------


def _vector(build: WeightBuilder, link: Link, values: Vector) -> fx.Node:
    """[link.size], no narrower than fp32, and without gradients.

    For every constant the function of the weights is the same, and so are its gradients. A gradient through the
    vector itself would be lost or doubled where the path detaches.
    """
    if isinstance(values, fx.Node):
        shape = values.meta["val"].shape
        if len(shape) != 1 or shape[0] != link.size:
            raise ValueError(f"a vector of {link.size} channels is needed, not {list(shape)}.")
        wide = build.wide(values)
        return build.call(aten.detach.default, wide) if build.program.trains else wide
    if len(values) != link.size:
        raise ValueError(f"a vector of {link.size} channels is needed, not {len(values)}.")
    source = build.wide(anchor(link))
    numbers = [build.call(aten.new_full.default, source, [1], float(value)) for value in values]
    return numbers[0] if len(numbers) == 1 else build.call(aten.cat.default, numbers)


def _spread(build: WeightBuilder, side: Side, vector: fx.Node, fill: Any) -> fx.Node:
    """A vector per channel as one per row of ``side``, with ``fill`` where a row is left alone."""
    size = vector.meta["val"].shape[0]
    parts = []
    for run in runs_of(side):
        if run.is_free:
            parts.append(build.call(fill, vector, [run.length]))
            continue
        value = cut(build, vector, run.start, run.count, size)
        if len(run.dims) != 1 or not run.dims[0][1]:
            value = build.call(
                aten.reshape.default, value, [run.dims[i][0] for i in run.order] or [1]
            )
            value = _placed(build, value, run)
        parts.append(value)
    return parts[0] if len(parts) == 1 else build.call(aten.cat.default, parts)


def _placed(build: WeightBuilder, value: fx.Node, run: Run) -> fx.Node:
    """[sizes of the stepping dims, outermost first] -> [run.length]."""
    stepping = sorted(run.order)
    if run.order != stepping:
        value = build.call(aten.permute.default, value, [run.order.index(i) for i in stepping])
    sizes = [size for size, _ in run.dims]
    shape = [size if i in stepping else 1 for i, size in enumerate(sizes)]
    value = build.call(aten.reshape.default, value, shape)
    value = build.call(aten.expand.default, value, sizes)
    return build.call(aten.reshape.default, value, [run.length])


def cut(build: WeightBuilder, vector: fx.Node, start: int, length: int, size: int) -> fx.Node:
    """``vector[start : start + length]`` of a vector of ``size``."""
    if start == 0 and length == size:
        return vector
    return build.call(aten.slice.Tensor, vector, 0, start, start + length)


def runs_of(side: Side) -> list[Run]:
    """The channels of ``side`` as runs."""
    found = runs(side.channels)
    assert found is not None  # the link would have been refused
    return found


def _mark(link: Link, words: str) -> None:
    for node in link.path:
        node.meta[MOVED] = words
