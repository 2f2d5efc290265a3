"""What calibration keeps of a value: ranges, moments, a histogram and sample rows, in constant memory.

Rows are what stands before the features: tokens, pixels, samples. How they were cut into batches leaves no
trace, and statistics of parts of the data merge into those of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

ROWS = 512  # sample rows kept
_PER_OCTAVE = 16  # bins for each power of two: a percentile is right to 4.4 %
_OCTAVES = 40  # 2⁻⁴⁰ … 2⁴⁰; what lies outside counts in the outermost bins
_BINS = 1 + 2 * _OCTAVES * _PER_OCTAVE  # the first one holds zeros


def _zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.float64)


@dataclass
class Statistics:
    """Of one value ``[..., size]``.

    Attributes:
        size: its features.
        shard: which part of the data this is; draws other sample rows than the other parts.
        rows: how many were seen.
        low, high: least and largest of each feature, fp64 [size].
        total, squares: Σ|x| and Σx² of each feature, fp64 [size].
        bins: how many |x| lie in each step of a logarithmic scale, int64.
        sample: at most ``most`` rows, fp32 [n, size], each row that was seen being as likely as any other.
        keys: their random keys, int64 [n], ascending; those with the least keys are kept.
        most: how many sample rows are kept.
    """

    size: int
    shard: int = 0
    rows: int = 0
    low: torch.Tensor = field(default_factory=lambda: _zeros(0))
    high: torch.Tensor = field(default_factory=lambda: _zeros(0))
    total: torch.Tensor = field(default_factory=lambda: _zeros(0))
    squares: torch.Tensor = field(default_factory=lambda: _zeros(0))
    bins: torch.Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    sample: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    keys: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    most: int = ROWS

    def __post_init__(self) -> None:
        if not self.low.numel() and self.size:
            self.low, self.high = _zeros(self.size) + torch.inf, _zeros(self.size) - torch.inf
            self.total, self.squares = _zeros(self.size), _zeros(self.size)
            self.sample = torch.zeros(0, self.size)

    def update(self, x: torch.Tensor) -> None:
        """Take ``x`` [..., size] in.

        Raises:
            ValueError: it holds a NaN or an infinity; nothing was taken in.
        """
        x = x.detach().reshape(-1, self.size)
        if not len(x):
            return
        low, high = x.amin(0).double().cpu(), x.amax(0).double().cpu()
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ValueError("a NaN" if bool(x.isnan().any()) else "an infinity")
        magnitude = x.abs()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.total += magnitude.sum(0, dtype=torch.float64).cpu()
        self.squares += x.double().square().sum(0).cpu()
        self.bins += torch.bincount(_bin(magnitude).flatten(), minlength=_BINS).cpu()
        keys = _random_keys(self.rows, len(x), self.shard)
        # After the first rows hardly any is kept: those that cannot be are not copied.
        last = torch.iinfo(torch.int64).max
        if len(self.keys) == self.most > 0:
            last = int(self.keys[-1])
        chosen = (keys < last).nonzero().flatten()
        if len(chosen) and self.most:
            self._keep(keys[chosen], x[chosen.to(x.device)].float().cpu())
        self.rows += len(x)

    def merge(self, other: Statistics) -> Statistics:
        """Of both together.

        Raises:
            ValueError: the features differ in number.
        """
        if self.size != other.size:
            raise ValueError(f"{self.size} features and {other.size}")
        both = Statistics(
            self.size,
            self.shard,
            self.rows + other.rows,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.total + other.total,
            self.squares + other.squares,
            self.bins + other.bins,
            self.sample,
            self.keys,
            self.most,
        )
        both._keep(other.keys, other.sample)
        return both

    def _keep(self, keys: torch.Tensor, rows: torch.Tensor) -> None:
        keys = torch.cat([self.keys, keys])
        order = torch.argsort(keys, stable=True)[: self.most]
        self.keys, self.sample = keys[order], torch.cat([self.sample, rows])[order]

    # ---- what methods read ---------------------------------------------------------------------------

    @property
    def zeros(self) -> float:
        """The share of elements that are exactly zero; 0 where none were seen."""
        return float(self.bins[0]) / max(1, self.rows * self.size)

    @property
    def largest(self) -> torch.Tensor:
        """max|x| of each feature, fp64 [size]."""
        return torch.maximum(self.low.abs(), self.high.abs()) if self.rows else _zeros(self.size)

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """Mean |x| of each feature, fp64 [size]."""
        return self.total / max(1, self.rows)

    def percentile(self, fraction: float) -> float:
        """The magnitude that a ``fraction`` of all elements does not exceed, to the width of a bin."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"a fraction is between 0 and 1, not {fraction}.")
        largest = float(self.largest.max()) if self.size else 0.0
        wanted = fraction * self.rows * self.size
        below = self.bins.cumsum(0)
        index = int(torch.searchsorted(below.double(), wanted))
        if index == 0:
            return 0.0
        if index >= _BINS - 1:
            return largest
        inside = (wanted - float(below[index - 1])) / max(1, int(self.bins[index]))
        edge = math.exp2((index - 1 + inside) / _PER_OCTAVE - _OCTAVES)
        return min(edge, largest)


def _bin(magnitude: torch.Tensor) -> torch.Tensor:
    wide = magnitude.to(torch.float32) if magnitude.dtype.itemsize < 4 else magnitude
    steps = (torch.log2(wide) + _OCTAVES) * _PER_OCTAVE
    found = steps.floor().clamp(0, _BINS - 2).long() + 1  # log2(0) is clamped, and put right here
    return torch.where(wide == 0, 0, found)


def _random_keys(start: int, count: int, shard: int) -> torch.Tensor:
    """A random number for each of the rows ``start``, ``start + 1``, …: splitmix64 of its place."""
    value = torch.arange(start, start + count) + (shard << 40)
    value = value * _signed(0x9E3779B97F4A7C15)
    value = (value ^ _right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _right(value, 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _right(value: torch.Tensor, by: int) -> torch.Tensor:
    """A shift that moves zeros in (int64's own repeats the sign)."""
    return (value >> by) & ((1 << (64 - by)) - 1)
