"""Output features of a linear map that nobody reads, not computed.

Law.   linear(x, W, b)[..., R] = linear(x, W[R], b[R]), for R the union of all ranges of features that are read.
Source algebra (dead code, one feature at a time).
Legal  when every reader takes a part of the features (a slice, a part of a split or chunk, one index), behind
       reindexing of tokens and elementwise operators of one operand, and nothing on the way is written in
       place, or looked at through its strides by a reader or by the caller. The parts that are read are found
       again at their new place.
Exact  in real arithmetic: the same sums, which a kernel may order otherwise for another number of rows.
Pays   the rows' arithmetic, their bytes in the weight and in the result. One range of rows is a view of the
       weight and costs nothing in training; several are copied, so there it runs only when named.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.reindex import resized
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.analysis.stream import Carried, feature_axis_of_user
from sparsecc.passes.analysis.weights import is_pure, other_users, weight_values
from sparsecc.passes.base import (
    RECOMPUTED,
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
    Saving,
    nbytes,
)
from sparsecc.program import MOVED, Program, WeightBuilder, is_effect

aten = torch.ops.aten

_SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
_CASTS = (aten.to.dtype, aten._to_copy.default)

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A node that reads the features ``start`` to ``stop`` of ``source`` on ``axis``, and no others."""

    node: fx.Node
    source: fx.Node
    axis: int
    start: int
    stop: int
    step: int = 1
    single: bool = False  # one feature, whose axis is gone

    @property
    def place(self) -> fx.Node:
        """Where it is taken: a split, or the node itself."""
        parent = self.node.args[0]
        return parent if self.node.target is operator.getitem else self.node  # type: ignore[return-value]


@dataclass
class Reading:
    """All readers of a linear map: what only hands its features on, and the parts that are taken in the end."""

    carriers: Carried = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def kept(self) -> list[Range]:
        """The ranges of features that are read, joined where they touch."""
        joined: list[Range] = []
        for start, stop in sorted((p.start, p.stop) for p in self.parts if p.start < p.stop):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
            else:
                joined.append((start, stop))
        return joined


@dataclass(frozen=True)
class DropDeadFeatures(Pass):
    """Drop the rows of a weight whose results nobody reads."""

    name: ClassVar[str] = "drop-dead-features"
    family: ClassVar[str] = "linear"
    law: ClassVar[str] = "linear(x, W, b)[R] = linear(x, W[R], b[R])"
    source: ClassVar[str] = "algebra (dead code, by feature)"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "projections of which a part is used"
    refusals: ClassVar[dict[str, str]] = {
        "grouped": "the rows of a grouped convolution cannot be dropped one by one",
        "written": "a value on the way is written in place",
        "escapes": "the caller gets a part as a view, whose strides tell how many features there were",
        "layout": "a reader asks for strides, or a view on the way does not hold for fewer features",
        "tied": "the weight is shared with another node",
        **RECOMPUTED,
    }

    def find(self, context: Context) -> list[Match]:
        matches = []
        for linear in context.analyses.get(linears).values():
            reading = _reading(linear)
            if reading is None or not reading.kept:
                continue
            if _count(reading.kept) < linear.features:
                matches.append(Match(linear.node, {"linear": linear, "reading": reading}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        linear: Linear = match.nodes["linear"]
        reading: Reading = match.nodes["reading"]
        if linear.is_grouped:
            return Refusal.at(linear.node, "grouped", self.refusals["grouped"])
        alias = context.analyses.get(aliases)
        for node in (linear.node, *(node for node, _ in reading.carriers)):
            if alias.written(node):
                return Refusal.at(alias.writes(node)[0], "written", f"{node.name} is written")
            for held in alias.same_storage(node):
                if held.target is aten.as_strided.default:
                    return Refusal.at(held, "layout", f"{held.name} reads by strides")
                if any(user.op == "output" for user in held.users):
                    return Refusal.at(held, "escapes", self.refusals["escapes"])
        if other_users(linear.weight, linear.node, context.analyses.get(weight_values)):
            return Refusal.at(linear.node, "tied", f"the weight of {linear.node.name} is shared")
        if _values(linear, reading, context.program) is None:
            return Refusal.at(linear.node, "layout", self.refusals["layout"])
        return context.recomputed(linear.node) if len(reading.kept) > 1 else None

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        linear: Linear = match.nodes["linear"]
        reading: Reading = match.nodes["reading"]
        mode = context.analyses.get(modes)
        values = _values(linear, reading, program)
        assert values is not None
        build = program.weight(self.name, linear.node)
        kept, width = reading.kept, _count(reading.kept)
        weight = _rows(build, linear.weight, linear.out_axis, kept)
        bias = None if linear.bias is None else _rows(build, linear.bias, 0, kept)
        linear.set_weights(program, self.name, weight=weight, bias=bias)
        for node, axis in reading.carriers:
            found = resized(node, axis, width)
            if found is not None:  # an elementwise operator names no sizes
                node.target, node.args = found
        for node, value in values.items():
            node.meta["val"] = value
            node.meta[MOVED] = "features that nobody reads are gone"
        for part in reading.parts:
            whole = part.stop - part.start == width and part.step == 1 and not part.single
            if whole and mode[part.place] == mode[linear.node]:
                program.replace(part.node, part.source)
                continue
            start = part.start - _dead_before(part.start, kept)
            target, args = (
                (aten.select.int, (start,))
                if part.single
                else (aten.slice.Tensor, (start, start + part.stop - part.start, part.step))
            )
            new = program.call(
                target,
                (part.source, part.axis, *args),
                like=part.node,
                origin=self.name,
                before=part.place,
            )
            program.replace(part.node, new)

    def saving(self, match: Match, context: Context) -> Saving:
        linear: Linear = match.nodes["linear"]
        features = linear.features
        dead = features - _count(match.nodes["reading"].kept)
        moved = nbytes(linear.node) + nbytes(linear.weight)
        return Saving(moved * dead // features, linear.flops * dead // features)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any) -> Any:
            return (x @ W.transpose(0, 1) + b)[:, 1:]

        def after(x: Any, W: Any, b: Any) -> Any:
            return x @ W[1:].transpose(0, 1) + b[1:]

        shapes = {"x": ("n", "k"), "W": ("d", "k"), "b": ("d",)}
        return [Example(before, after, shapes, ("W", "b"), symbolic=True)]


def _reading(linear: Linear) -> Reading | None:
    """Who reads which features; None where somebody reads all, or in a way that is not understood."""
    axis = linear.feature_axis % linear.node.meta["val"].dim()
    if not isinstance(linear.node.meta["val"].shape[axis], int):
        return None
    reading = Reading()
    stack: Carried = [(linear.node, axis)]
    while stack:
        value, at = stack.pop()
        for user in filter(_is_live, value.users):
            if user.target is aten.sym_size.int and user.args[1] % value.meta["val"].dim() != at:
                continue
            parts = _parts(user, value, at)
            if parts is not None:
                reading.parts += parts
                continue
            onward = _onward(user, value, at)
            if onward is None:
                return None
            reading.carriers.append((user, onward))
            stack.append((user, onward))
    return reading


def _is_live(node: fx.Node) -> bool:
    """Whether ``node`` is of any use: a chunk has a node for each part, read or not."""
    return bool(node.users) or is_effect(node)


def _onward(user: fx.Node, value: fx.Node, axis: int) -> int | None:
    """The axis on which ``user`` hands all features of ``value`` on, if it only does that to each of them."""
    if not user.args or user.args[0] is not value or not is_pure(user):
        return None
    if _is_elementwise(user):
        return axis
    found = feature_axis_of_user(user, value, axis)
    if found is None or not found[1].reindexes or len(found[1].operands) != 1:
        return None
    return None if resized(user, found[0], 2) is None else found[0]


def _is_elementwise(user: fx.Node) -> bool:
    """Whether each element of the result comes from the one at its place."""
    target: Any = user.target
    known = torch.Tag.pointwise in target.tags or target in _CASTS
    one: Any = user.args[0]
    same = len(user.all_input_nodes) == 1 and isinstance(user.meta.get("val"), torch.Tensor)
    return known and same and same_shape(user.meta["val"].shape, one.meta["val"].shape)


def _parts(user: fx.Node, value: fx.Node, axis: int) -> list[Part] | None:
    """The parts of the features that ``user`` takes; None where it takes no parts."""
    rank, size = value.meta["val"].dim(), value.meta["val"].shape[axis]
    given: list[Any] = list(user.args[1:])
    if user.kwargs or not user.args or user.args[0] is not value:
        return None
    if user.target in _SPLITS:
        return _split(user, value, axis)
    if user.target not in (aten.slice.Tensor, aten.narrow.default, aten.select.int):
        return None
    dim, *numbers = given or [0]
    if dim % rank != axis or not all(isinstance(n, (int, type(None))) for n in numbers):
        return None
    if user.target is aten.select.int:
        index = numbers[0] % size
        return [Part(user, value, axis, index, index + 1, single=True)]
    if user.target is aten.narrow.default:
        start = numbers[0] % size if numbers[0] < 0 else numbers[0]
        return [Part(user, value, axis, start, start + numbers[1])]
    start, stop, step = slice(*[*numbers, None, None, None][:3]).indices(size)
    return [Part(user, value, axis, start, max(start, stop), step)]


def _split(user: fx.Node, value: fx.Node, axis: int) -> list[Part] | None:
    single = user.target is aten.unbind.int
    position = 1 if single else 2
    dim: Any = user.args[position] if len(user.args) > position else 0
    if dim % value.meta["val"].dim() != axis:
        return None
    sizes = [1 if single else part.shape[axis] for part in user.meta["val"]]
    parts = []
    for reader in filter(_is_live, user.users):
        index = reader.args[1] if reader.target is operator.getitem else None
        if not isinstance(index, int):
            return None
        start = sum(sizes[: index % len(sizes)])
        stop = start + sizes[index % len(sizes)]
        parts.append(Part(reader, value, axis, start, stop, single=single))
    return parts


def _values(linear: Linear, reading: Reading, program: Program) -> dict[fx.Node, Any] | None:
    """The fake values of the map and its carriers with the kept features alone; None where there are none."""
    width = _count(reading.kept)

    def narrowed(*args: Any) -> Any:
        # In one dtype, as autocast would have it.
        dtype = linear.node.meta["val"].dtype
        cut = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args]
        for place, given in enumerate(linear.node.args):
            if given is linear.weight or (given is linear.bias and given is not None):
                axis = linear.out_axis if given is linear.weight else 0
                cut[place] = cut[place].narrow(axis, 0, width)
        return linear.node.target(*cut, **linear.node.kwargs)  # type: ignore[operator]

    values: dict[fx.Node, Any] = {}
    target: Any
    for node, axis in [(linear.node, -1), *reading.carriers]:
        target, args = narrowed, node.args
        if node is not linear.node:
            target, args = resized(node, axis, width) or (node.target, node.args)
            args = tuple(values.get(a, a) if isinstance(a, fx.Node) else a for a in args)
        value = program.fake_for_all_sizes(target, args, node.kwargs)
        if value is None:
            return None
        values[node] = value.to(node.meta["val"].dtype)
    return values


def _rows(build: WeightBuilder, weight: fx.Node, axis: int, kept: list[Range]) -> fx.Node:
    """The kept rows of a weight, in order."""
    pieces = [build.call(aten.slice.Tensor, weight, axis, start, stop) for start, stop in kept]
    return pieces[0] if len(pieces) == 1 else build.call(aten.cat.default, pieces, axis)


def _count(ranges: list[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _dead_before(place: int, kept: list[Range]) -> int:
    return place - sum(max(0, min(stop, place) - start) for start, stop in kept)
