"""Which channel of a producer each element of a value belongs to: small integer maps, never tensors.

A map has the rank of its value; an axis along which the channel is the same has size 1 in the map, whatever
the value's own (possibly symbolic) size is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecc.passes.analysis.sizes import same_size

FREE = -1  # an element of no channel: a scale or shift of the producer does not reach it


@dataclass(frozen=True)
class Channels:
    """The channel of every element: ``labels`` in row-major order over ``shape``."""

    shape: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def along(cls, rank: int, axis: int, size: int) -> Channels:
        """Channels 0 … size − 1 along one axis of a value of the given rank."""
        shape = [1] * rank
        shape[axis] = size
        return cls(tuple(shape), tuple(range(size)))

    @property
    def rank(self) -> int:
        return len(self.shape)

    def varies(self, axis: int) -> bool:
        return self.shape[axis] != 1

    @property
    def varying(self) -> list[int]:
        return [axis for axis in range(self.rank) if self.varies(axis)]

    @property
    def strides(self) -> list[int]:
        return [math.prod(self.shape[axis + 1 :]) for axis in range(self.rank)]

    def moved(self, order: Sequence[int | None]) -> Channels:
        """The map whose axis i is this one's axis ``order[i]`` (None: a new axis, the same all along)."""
        strides = self.strides
        return self._strided([(1, 0) if a is None else (self.shape[a], strides[a]) for a in order])

    def sliced(self, axis: int, start: int, step: int, length: int) -> Channels:
        """The elements start, start + step, … of a varying axis."""
        strides = self.strides
        view = [(n, s) for n, s in zip(self.shape, strides, strict=True)]
        view[axis] = (length, strides[axis] * step)
        return self._strided(view, start * strides[axis])

    def spread(self, shape: Sequence[int]) -> Channels:
        """Broadcast to ``shape``, which is 1 only where this map is."""
        padded = self.padded(len(shape))
        steps = zip(padded.shape, padded.strides, shape, strict=True)
        return padded._strided([(size, stride if own != 1 else 0) for own, stride, size in steps])

    def padded(self, rank: int) -> Channels:
        """With axes in front, as broadcasting has it."""
        return Channels((1,) * (rank - self.rank) + self.shape, self.labels)

    def repeated(self, axis: int, times: int) -> Channels:
        """Each element of ``axis`` ``times`` in a row (nothing changes where the axis does not vary)."""
        if not self.varies(axis) or times == 1:
            return self
        split = (*self.shape[: axis + 1], 1, *self.shape[axis + 1 :])
        wide = (*self.shape[: axis + 1], times, *self.shape[axis + 1 :])
        shape = (*self.shape[:axis], self.shape[axis] * times, *self.shape[axis + 1 :])
        return Channels(shape, Channels(split, self.labels).spread(wide).labels)

    def reshaped(self, before: Sequence[Any], after: Sequence[Any]) -> Channels | None:
        """The map of the value reshaped from ``before`` to ``after``; None where symbolic sizes hide it."""
        groups = _aligned(before, after)
        if groups is None:
            return None
        wide, shape = list(self.shape), [1] * len(after)
        for olds, news in groups:
            if all(self.shape[axis] == 1 for axis in olds):
                continue
            sizes = [before[axis] for axis in olds] + [after[axis] for axis in news]
            if not all(isinstance(size, int) for size in sizes):
                return None
            for axis in olds:
                wide[axis] = before[axis]
            for axis in news:
                shape[axis] = after[axis]
        return Channels(tuple(shape), self.spread(wide).labels)._reduced()

    def _reduced(self) -> Channels:
        """Size 1 for every axis along which nothing changes."""
        found = self
        for axis in found.varying:
            first = found.sliced(axis, 0, 1, 1)
            if first.spread(found.shape).labels == found.labels:
                found = first
        return found

    def _strided(self, view: Sequence[tuple[int, int]], offset: int = 0) -> Channels:
        places = [offset]
        for size, stride in view:
            places = [p + i * stride for p in places for i in range(size)]
        return Channels(tuple(size for size, _ in view), tuple(self.labels[p] for p in places))


def joined(parts: Sequence[Channels], axis: int, sizes: Sequence[int]) -> Channels:
    """The map of a concatenation along ``axis``, where part i is ``sizes[i]`` long."""
    common = common_shape(parts)
    wide = []
    for part, size in zip(parts, sizes, strict=True):
        shape = list(common)
        shape[axis] = size
        wide.append(part.spread(shape))
    inner = math.prod(common[axis + 1 :])
    outer = math.prod(common[:axis])
    labels: list[int] = []
    for row in range(outer):
        for part, size in zip(wide, sizes, strict=True):
            labels += part.labels[row * size * inner : (row + 1) * size * inner]
    shape = list(common)
    shape[axis] = sum(sizes)
    return Channels(tuple(shape), tuple(labels))


def common_shape(maps: Sequence[Channels]) -> list[int]:
    """The broadcast shape of several maps of values that broadcast."""
    rank = max(m.rank for m in maps)
    return [max(sizes) for sizes in zip(*(m.padded(rank).shape for m in maps), strict=True)]


def paired(a: Channels, b: Channels) -> Iterator[tuple[int, int]]:
    """The two channels of every element of a broadcast pair, each pair once."""
    shape = common_shape((a, b))
    yield from dict.fromkeys(zip(a.spread(shape).labels, b.spread(shape).labels, strict=True))


def _aligned(
    before: Sequence[Any], after: Sequence[Any]
) -> list[tuple[list[int], list[int]]] | None:
    """The smallest runs of axes that a reshape maps onto each other, by equal products."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        run = _run(before[i:], after[j:])
        if run is None:
            return None
        groups.append((list(range(i, i + run[0])), list(range(j, j + run[1]))))
        i, j = i + run[0], j + run[1]
    return groups


def _run(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, int] | None:
    lengths = [(a, b) for a in range(len(before) + 1) for b in range(len(after) + 1)]
    for a, b in sorted(lengths[1:], key=sum):
        if same_size(math.prod(before[:a]), math.prod(after[:b])):
            return a, b
    return None
