"""Compact forms of a channel map, so that a vector per channel becomes one per row with a handful of operators.

The rows of a weight read the channels in regular patterns: in order, repeated for each pixel or query head, in
pairs. Such a run is written as reshape, permute and expand; a map is a short list of runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsecc.passes.analysis.channels import FREE

MOST = 512  # runs in a map; more would be a weight expression of thousands of nodes


@dataclass(frozen=True)
class Run:
    """Labels ``start + Σ iⱼ strideⱼ`` over ``dims`` = ((size, stride), …), row-major; FREE where start is.

    The strides that are not 0 are those of a dense array, in some order: the run covers ``count`` channels
    from ``start``, each as often as the others.
    """

    start: int
    dims: tuple[tuple[int, int], ...]

    @property
    def is_free(self) -> bool:
        return self.start == FREE

    @property
    def length(self) -> int:
        return math.prod(size for size, _ in self.dims)

    @property
    def count(self) -> int:
        return math.prod(size for size, stride in self.dims if stride)

    @property
    def order(self) -> list[int]:
        """The dims that step through channels, outermost first."""
        stepping = [i for i, (_, stride) in enumerate(self.dims) if stride]
        return sorted(stepping, key=lambda i: -self.dims[i][1])


def runs(labels: Sequence[int]) -> list[Run] | None:
    """``labels`` as runs, in order; None where that takes more than ``MOST``."""
    found: list[Run] = []
    start = 0
    while start < len(labels):
        stop = start + 1
        while stop < len(labels) and (labels[stop] == FREE) == (labels[start] == FREE):
            stop += 1
        segment = labels[start:stop]
        if segment[0] == FREE:
            found.append(Run(FREE, ((len(segment), 0),)))
        else:
            whole = _regular(segment)
            found += _steps(segment) if whole is None else [whole]
        start = stop
        if len(found) > MOST:
            return None
    return found


def _regular(labels: Sequence[int]) -> Run | None:
    """All of ``labels`` as one run."""
    dims = _dims(labels)
    if dims is None:
        return None
    run = Run(labels[0], tuple(dims))
    dense = 1
    for i in reversed(run.order):
        size, stride = run.dims[i]
        if stride != dense:
            return None
        dense *= size
    return run


def _dims(labels: Sequence[int]) -> list[tuple[int, int]] | None:
    count = len(labels)
    if count == 1:
        return []
    stride = labels[1] - labels[0]
    size = 2
    while size < count and labels[size] - labels[size - 1] == stride:
        size += 1
    if stride < 0 or count % size:
        return None
    blocks = range(0, count, size)
    if any(labels[b + i] - labels[b] != i * stride for b in blocks for i in range(size)):
        return None
    outer = _dims(labels[::size])
    return None if outer is None else [*outer, (size, stride)]


def _steps(labels: Sequence[int]) -> list[Run]:
    """Runs that step by one or stand still."""
    found = []
    start = 0
    while start < len(labels):
        stop = start + 1
        stride = labels[stop] - labels[start] if stop < len(labels) else 1
        if stride in (0, 1):
            while stop < len(labels) and labels[stop] - labels[stop - 1] == stride:
                stop += 1
        found.append(Run(labels[start], ((stop - start, stride if stop - start > 1 else 1),)))
        start = stop
    return found
