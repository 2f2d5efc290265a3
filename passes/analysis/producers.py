"""The linear maps that make a value, for folds of a per-feature scale and shift into them.

``t ⊙ y + h`` moves back through operators that carry features to the linear maps behind ``y``: through sums
(the shift to one summand) and concatenations (each part takes its own elements of t and h).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import is_contiguous, same_layout
from sparsecc.passes.analysis.stream import carry, other_readers
from sparsecc.passes.analysis.weights import other_users, weight_values
from sparsecc.passes.base import Context, Refusal
from sparsecc.program import MOVED, Program

aten = torch.ops.aten

# Why a fold into what makes a value is not legal; the codes of :meth:`Producers.refusal`.
UNFOLDABLE: Mapping[str, str] = {
    "layout": "the result has other strides than the value it is made of, and is not contiguous",
    "fan-out": "something else reads the value before it too",
    "tied": "the weight of its producer is shared with another node",
    "region": "an autocast or grad-mode region begins or ends between it and its producer",
}

_CATS = (aten.cat.default, aten.concat.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)

Range = tuple[int, int]  # first feature, and how many


@dataclass(frozen=True)
class Part:
    """One linear map and the features of the value that it makes (None: all of them)."""

    linear: Linear
    features: Range | None
    shifts: bool  # whether the shift goes here; of the summands of a sum, one takes it


@dataclass
class Producers:
    """Everything between a value and the linear maps that make it.

    Attributes:
        parts: the linear maps.
        path: the values from the reader back to them, theirs included.
        stop: the first value found that no linear map makes, if any.
        other: the first node found that reads one of the values besides the fold's own reader, if any.
    """

    parts: list[Part] = field(default_factory=list)
    path: list[fx.Node] = field(default_factory=list)
    stop: fx.Node | None = None
    other: fx.Node | None = None

    def refusal(self, reader: fx.Node, context: Context) -> Refusal | None:
        """Why what ``reader`` does cannot move into the parts (codes of ``UNFOLDABLE``); None where it can."""
        result = reader.meta["val"]
        if not same_layout(result, self.path[0].meta["val"]) and not is_contiguous(result):
            return Refusal.at(reader, "layout", UNFOLDABLE["layout"])
        if self.other is not None:
            reason = f"{self.other.name} reads the value before it too"
            return Refusal.at(self.other, "fan-out", reason)
        weights = context.analyses.get(weight_values)
        mode = context.analyses.get(modes)
        for part in self.parts:
            node = part.linear.node
            if other_users(part.linear.weight, node, weights):
                return Refusal.at(node, "tied", f"the weight of {node.name} is shared")
            if mode[node] != mode[reader]:
                return Refusal.at(node, "region", UNFOLDABLE["region"])
        return None

    def fold(
        self, program: Program, scale: fx.Node, shift: fx.Node | None, origin: str, moved: str
    ) -> None:
        """Make the value ``scale ⊙ value + shift`` (both [features]); ``moved`` says what its values carry."""
        for part in self.parts:
            vectors = [scale, shift if part.shifts else None]
            if part.features is not None:
                first, count = part.features
                build = program.weight(origin, part.linear.node)
                vectors = [
                    v and build.call(aten.slice.Tensor, v, 0, first, first + count) for v in vectors
                ]
            assert vectors[0] is not None
            part.linear.scale_and_shift(program, vectors[0], vectors[1], origin)
        for node in self.path:
            node.meta[MOVED] = moved

    def replace(self, program: Program, reader: fx.Node, value: fx.Node, origin: str) -> None:
        """Give ``value``, with the dtype and the strides of ``reader``, to all who read ``reader``."""
        result = reader.meta["val"]
        place: Any = {"like": reader, "origin": origin, "before": reader}
        value = program.cast(value, result.dtype, **place)
        if not same_layout(result, value.meta["val"]):
            contiguous: Any = {"memory_format": torch.contiguous_format}
            value = program.call(aten.clone.default, (value,), contiguous, **place)
        program.replace(reader, value)


def producers(
    value: fx.Node, axis: int, reader: fx.Node, context: Context, *, shift: bool
) -> Producers:
    """What makes ``value``, whose features are on ``axis``, for a fold of what ``reader`` does to it.

    Where there is a ``shift``, only through operators that let it through too.
    """
    maps = context.analyses.get(linears)
    found = Producers()
    stack: list[tuple[fx.Node, fx.Node, int, Range | None, bool]] = [
        (value, reader, axis, None, shift)
    ]
    while stack and found.stop is None:
        node, user, axis, features, shifts = stack.pop()
        others = other_readers(node, user)
        if node in found.path:  # y + y: what is folded once would count twice
            others.append(user)
        found.path.append(node)
        found.other = found.other or next(iter(others), None)
        if node in maps:
            linear = maps[node]
            if axis == linear.feature_axis % node.meta["val"].dim():
                found.parts.append(Part(linear, features, shifts))
            else:
                found.stop = node
            continue
        sources = _sources(node, axis, features, shifts)
        if sources is None:
            found.stop = node
        else:
            stack.extend((source, node, *rest) for source, rest in reversed(sources))
    return found


def _sources(
    node: fx.Node, axis: int, features: Range | None, shifts: bool
) -> list[tuple[fx.Node, tuple[int, Range | None, bool]]] | None:
    """The operands that a scale and a shift of ``node`` go to, or None where they cannot."""
    if node.target in _CATS and _dimension(node) == axis:
        pieces: Any = node.args[0]
        sizes = [piece.meta["val"].shape[axis] for piece in pieces]
        if not all(isinstance(size, int) for size in sizes):
            return None
        starts = itertools.accumulate(sizes, initial=features[0] if features else 0)
        return [
            (piece, (axis, (start, size), shifts))
            for piece, start, size in zip(pieces, starts, sizes, strict=False)
        ]
    carried = carry(node, axis)
    if carried is None or (shifts and not carried.operands):
        return None
    if carried.reindexes or not shifts:
        return [(operand, (at, features, shifts)) for operand, at in carried.operands]
    if node.target not in _SUMS:
        return None
    return [(operand, (at, features, i == 0)) for i, (operand, at) in enumerate(carried.operands)]


def _dimension(cat: fx.Node) -> int:
    dim: Any = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return int(dim % cat.meta["val"].dim())
