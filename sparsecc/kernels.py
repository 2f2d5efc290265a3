"""Which regions run by a generated kernel: measured once for each region and machine, and remembered."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from sparsecc.errors import BuildError, first_line
from sparsecc.log import log
from sparsecc.options import Options
from sparsecc.program import Program
from sparsecc.regions import KINDS, Args, Kind, Variant
from sparsecc.report.model import GraphReport, KernelChoice
from sparsecc.runtime import native
from sparsecc.timing import side_by_side

# Weights in decoding come from memory: a measurement takes turns over as many copies as no cache holds.
_COLD = 96 * 2**20  # bytes
_MOST_COPIES = 512
_ROUNDS = 7
_LANGUAGES = {"cpu": "cpp", "cuda": "triton"}  # of the kernels for one kind of device


def _as_they_are(*args: Any) -> None:
    """Random arguments will do."""


def select(program: Program, options: Options, record: GraphReport) -> None:
    """Give every region of ``program`` that should have one its kernel; the others stay as they are.

    A region left alone is traced through by AOTAutograd, so Inductor compiles its meaning.
    """
    choices: dict[str, KernelChoice] = {}
    for node in program.calls(*KINDS):
        kind = KINDS[node.target]
        args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
        key = _key((*args[:-1], kind.alike(args[-1])))
        choice = choices.get(key)
        if choice is None:
            choice = choices[key] = _choose(kind, args, key, options)
            record.kernels.append(choice)
        else:
            choice.count += 1
            if choice.chosen != "aten" and kind.alike(args[-1]) != args[-1]:
                kind.kernels(args)  # loaded under its own text
        if choice.chosen != "aten":
            node.target = kind.native
    if choices:
        program.module.recompile()


def _choose(kind: Kind, args: Args, key: str, options: Options) -> KernelChoice:
    choice = KernelChoice(*kind.words(args), "aten")
    if options.codegen == "aten" or (options.codegen == "auto" and options.lower != "inductor"):
        choice.reason = f"codegen={options.codegen!r}, lower={options.lower!r}"
        return choice
    device = _tensors(args)[0].device.type
    language = _LANGUAGES.get(device, "none")
    if options.codegen not in ("auto", language):
        choice.reason = f"codegen={options.codegen!r} has no kernels on {device}"
        return choice
    try:
        kernels = kind.kernels(args)
        if not kernels:
            choice.reason = "too many rows, or a number that is not known"
            return choice
        if options.codegen == language or kind.must(args):
            name, choice.reason = next(iter(kernels)), f"codegen={options.codegen!r}"
            if language != "cpp":  # which is built by now
                name = next(_running(kernels, _arguments(args, kind.prepare)))
        else:
            variants = {"aten": Variant(kind.meaning, "aten"), **kernels}
            seconds = _remembered(key, variants) or _remember(
                key, _measure(variants, args, kind.prepare)
            )
            name, choice.seconds = min(seconds, key=lambda name: seconds[name]), seconds
    except BuildError as error:
        log.warning("no kernel is generated (%s): %s", choice.region, error)
        choice.reason = str(error)
        return choice
    choice.source = next(iter(kernels.values())).source
    if name != "aten":
        kernels[name].keep()
        choice.chosen, choice.source = kernels[name].language, kernels[name].source
    return choice


def _running(variants: Mapping[str, Variant], arguments: Args) -> Iterator[str]:
    """The names of those that a first call builds and runs: a GPU may have too little for some.

    Raises:
        BuildError: none but "aten" does.
    """
    kernels, problem = 0, ""
    for name, variant in variants.items():
        try:
            variant.call(*arguments)
        except Exception as error:  # whatever Triton or a driver raises: another one runs instead
            problem = f"{name}: {type(error).__name__}: {first_line(error)}"
            log.info("not a candidate: %s", problem)
        else:
            kernels += variant.language != "aten"
            yield name
    if not kernels:
        raise BuildError(problem)


def _measure(
    variants: Mapping[str, Variant], args: Args, prepare: Callable[..., None] = _as_they_are
) -> dict[str, float]:
    """Seconds of each variant over tensors that no cache holds: the least disturbed of a few rounds.

    Raises:
        BuildError: no kernel runs.
    """
    first = _arguments(args, prepare)
    tensors = _tensors(first)
    size = max(sum(t.nbytes for t in tensors), 1)
    count = min(math.ceil(_cold(tensors[0].device) / size), _MOST_COPIES)
    copies = [first, *(tree_map(_copy, first) for _ in range(count - 1))]

    def over(variant: Variant) -> Any:
        def run() -> None:
            for each in copies:
                variant.call(*each)

        return run

    with torch.inference_mode():
        calls = {name: over(variants[name]) for name in _running(variants, first)}
        timings = side_by_side(calls, rounds=_ROUNDS)
    return {name: min(timing.seconds) / len(copies) for name, timing in timings.items()}


def _cold(device: torch.device) -> int:
    if device.type != "cuda":
        return _COLD
    return max(_COLD, 2 * torch.cuda.get_device_properties(device).L2_cache_size)


def _tensors(args: Args) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]


def _arguments(args: Args, prepare: Callable[..., None] = _as_they_are) -> Args:
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


def _key(args: Args) -> str:
    leaves = tree_leaves(args)
    shown = [(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in leaves]
    parts = str(shown), _device(leaves[0].device), str(torch.get_num_threads()), *native.machine()
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _remembered(key: str, names: Container[str]) -> dict[str, float] | None:
    """The seconds of the variants that ran, if they are still among ``names``."""
    try:
        found = json.loads((native.folder() / f"choice-{key}.json").read_text(encoding="utf-8"))
        seconds = {name: float(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    known = "aten" in seconds and len(seconds) > 1 and all(name in names for name in seconds)
    return seconds if known else None


def _remember(key: str, seconds: dict[str, float]) -> dict[str, float]:
    path = native.folder() / f"choice-{key}.json"
    try:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(seconds), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        log.info("a measurement is not kept: %s", error)
    return seconds
