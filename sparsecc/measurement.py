"""How long the variants of a region take on this machine, whatever else runs beside."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from sparsecc.errors import BuildError, first_line
from sparsecc.log import log
from sparsecc.regions import Args, Variant
from sparsecc.timing import synchronize

# Weights in decoding come from memory: a measurement takes turns over as many copies as no cache holds.
COLD = 96 * 2**20  # bytes
_MOST_COPIES = 512
_ROUNDS = 4  # of a set
_SETS = 6  # at most
_AGREE = 1.1  # two sets, by the time of the fastest
_QUIET = 0.2  # stops by other processes for each call: 0.03 on an idle machine, 2 beside two busy threads


def _as_they_are(*args: Any) -> None:
    """Random arguments will do."""


@dataclass(frozen=True)
class _Set:
    """Seconds of single calls, of a few rounds in which all variants took turns; whether nothing interfered."""

    calls: Mapping[str, list[float]]
    quiet: bool

    @property
    def quartiles(self) -> dict[str, float]:
        return {name: statistics.quantiles(found, n=4)[0] for name, found in self.calls.items()}

    @property
    def least(self) -> dict[str, float]:
        return {name: min(found) for name, found in self.calls.items()}


def measure(
    variants: Mapping[str, Variant], args: Args, prepare: Callable[..., None] = _as_they_are
) -> tuple[dict[str, float], bool]:
    """Seconds of each variant over tensors that no cache holds, and whether they can be relied on.

    On CPU calls are timed one by one, and the lower quartile counts. Sets of rounds go on until two in a row
    were quiet and agree on the fastest variant and on its time. Beside other busy processes a kernel of several
    threads waits in most of its calls for one that was stopped: there, the least of all calls counts.

    Raises:
        BuildError: no kernel runs.
    """
    first = arguments(args, prepare)
    device, size = tensors(first)[0].device, sum(t.nbytes for t in tensors(first))
    count = min(math.ceil(_cold(device) / max(size, 1)), _MOST_COPIES)
    copies = [first, *(tree_map(_copy, first) for _ in range(count - 1))]
    clock = _one_by_one if device.type == "cpu" else _all_at_once
    with torch.inference_mode():
        calls = {name: variants[name].call for name in running(variants, first)}
        for call in calls.values():
            clock(call, copies)
        sets: list[_Set] = []
        for _ in range(_SETS):
            sets.append(_in_turn(calls, copies, clock))
            if len(sets) > 1 and _agree(*sets[-2:]):
                return _smaller([found.quartiles for found in sets[-2:]]), True
    return _smaller([found.least for found in sets]), False


def _in_turn(
    calls: Mapping[str, Callable[..., Any]], copies: Sequence[Args], clock: Callable[..., Any]
) -> _Set:
    """A few rounds; the order turns every other one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, stopped = list(calls.items()), _stopped()
    for _ in range(_ROUNDS):
        for name, call in order:
            seconds[name] += clock(call, copies)
        order.reverse()
    stops = (_stopped() - stopped) / (_ROUNDS * len(calls) * len(copies))
    return _Set(seconds, stops <= _QUIET)


def _stopped() -> int:
    """How often threads of this process had to leave a core to others; 0 where nobody counts (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _one_by_one(call: Callable[..., Any], copies: Sequence[Args]) -> list[float]:
    found = []
    for each in copies:
        started = time.perf_counter()
        call(*each)
        found.append(time.perf_counter() - started)
    return found


def _all_at_once(call: Callable[..., Any], copies: Sequence[Args]) -> list[float]:
    """Launches run ahead of a device: only what all take together is known."""
    synchronize()
    started = time.perf_counter()
    for each in copies:
        call(*each)
    synchronize()
    return [(time.perf_counter() - started) / len(copies)]


def _agree(one: _Set, other: _Set) -> bool:
    first, second = one.quartiles, other.quartiles
    best = min(first, key=lambda name: first[name])
    if not (one.quiet and other.quiet) or best != min(second, key=lambda name: second[name]):
        return False
    low, high = sorted((first[best], second[best]))
    return high <= _AGREE * low


def _smaller(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: min(each[name] for each in found) for name in found[0]}


def running(variants: Mapping[str, Variant], given: Args) -> Iterator[str]:
    """The names of those that a first call builds and runs: a GPU may have too little for some.

    Raises:
        BuildError: none but "aten" does.
    """
    kernels, problem = 0, ""
    for name, variant in variants.items():
        try:
            variant.call(*given)
        except Exception as error:  # whatever Triton or a driver raises: another one runs instead
            problem = f"{name}: {type(error).__name__}: {first_line(error)}"
            log.info("not a candidate: %s", problem)
        else:
            kernels += variant.language != "aten"
            yield name
    if not kernels:
        raise BuildError(problem)


def _cold(device: torch.device) -> int:
    if device.type != "cuda":
        return COLD
    return max(COLD, 2 * torch.cuda.get_device_properties(device).L2_cache_size)


def tensors(args: Args) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]


def arguments(args: Args, prepare: Callable[..., None] = _as_they_are) -> Args:
    found: Args = tree_map(_random, args)
    prepare(*found)
    return found


def _random(fake: Any) -> Any:
    """A tensor like a fake one, symbolic sizes by their hints: random, or the first positions, or all True."""
    if not isinstance(fake, torch.Tensor):
        return fake
    sizes: list[Any] = list(fake.shape)
    shape = [s if isinstance(s, int) else int(s.node.hint or 1) for s in sizes]
    if fake.dtype.is_floating_point:
        return torch.randn(shape, dtype=fake.dtype, device=fake.device)
    if fake.dtype is torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=fake.device)
    if fake.dtype in (torch.int8, torch.uint8):  # levels of a weight
        return torch.randint(0, 128, shape, dtype=fake.dtype, device=fake.device)
    return torch.arange(math.prod(shape), dtype=fake.dtype, device=fake.device).view(shape)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
