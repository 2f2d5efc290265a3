"""Side-by-side timing: all variants take turns in one run, so that a noisy machine hits them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Timing:
    """Seconds of each round of one variant."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def side_by_side(
    variants: Mapping[str, Callable[[], Any]], rounds: int = 15, warmup: int = 2
) -> dict[str, Timing]:
    """Time each variant once a round, in turn; the order is reversed every other round.

    Args:
        variants: name -> a call without arguments. On CUDA the device is synchronized around each.
        rounds: measured rounds (at least 2).
        warmup: rounds before them that do not count.
    """
    timings = {name: Timing() for name in variants}
    for index in range(warmup + rounds):
        order = list(variants.items())
        for name, call in reversed(order) if index % 2 else order:
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            if index >= warmup:
                timings[name].seconds.append(time.perf_counter() - started)
    return timings


def ratio(timings: Mapping[str, Timing], faster: str, base: str) -> float:
    """How many times ``faster`` is as fast as ``base``: the median of the rounds' own ratios."""
    pairs = zip(timings[base].seconds, timings[faster].seconds, strict=True)
    return statistics.median(b / f for b, f in pairs)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
