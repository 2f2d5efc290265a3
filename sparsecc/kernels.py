"""Which regions run by a generated kernel: measured once for each region and machine, and remembered."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch

from sparsecc.codegen import cpp, triton
from sparsecc.errors import BuildError, first_line
from sparsecc.log import log
from sparsecc.options import Options
from sparsecc.program import Program
from sparsecc.report.model import GraphReport, KernelChoice
from sparsecc.runtime import native
from sparsecc.runtime.ops.few_rows import Spec, few_rows, few_rows_native, meaning
from sparsecc.timing import side_by_side

# Weights in decoding come from memory: a measurement takes turns over as many copies as no cache holds.
_COLD = 96 * 2**20  # bytes
_ROUNDS = 7
_LANGUAGES = {"cpu": "cpp", "cuda": "triton"}  # of the kernels for one kind of device
_Call = Callable[..., Any]
_Arguments = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


def select(program: Program, options: Options, record: GraphReport) -> None:
    """Give every region of ``program`` that should have one its kernel; the others stay as they are.

    A region left alone is traced through by AOTAutograd, so Inductor compiles its meaning.
    """
    choices: dict[str, KernelChoice] = {}
    for node in program.calls(few_rows):
        x, weights, operands, text = node.args
        fakes = [x.meta["val"], [w.meta["val"] for w in weights], [o.meta["val"] for o in operands]]  # type: ignore[union-attr]
        key = _key(str(text), fakes)
        choice = choices.get(key)
        if choice is None:
            choice = choices[key] = _choose(str(text), fakes, key, options)
            record.kernels.append(choice)
        else:
            choice.count += 1
        if choice.chosen != "aten":
            node.target = few_rows_native
    if choices:
        program.module.recompile()


def _choose(text: str, fakes: list[Any], key: str, options: Options) -> KernelChoice:
    spec = Spec.of(text)
    shape = f"{list(fakes[0].shape)} x {', '.join(str(list(w.shape)) for w in fakes[1])}"
    choice = KernelChoice(" | ".join([spec.norm, *spec.outputs]), shape, "aten")
    if options.codegen == "aten" or (options.codegen == "auto" and options.lower != "inductor"):
        choice.reason = f"codegen={options.codegen!r}, lower={options.lower!r}"
        return choice
    device = fakes[0].device.type
    language = _LANGUAGES.get(device, "none")
    if options.codegen not in ("auto", language):
        choice.reason = f"codegen={options.codegen!r} has no kernels on {device}"
        return choice
    try:
        variants = _variants(text, fakes)
        if options.codegen == language:
            kernels = {name: call for name, call in variants.items() if name != "aten"}
            name, choice.reason = next(iter(kernels)), f"codegen={language!r}"
            if language != "cpp":  # which is built by now
                name = next(_running(kernels, text, _arguments(fakes)))
        else:
            seconds = _remembered(key, variants) or _remember(key, _measure(text, fakes))
            name, choice.seconds = min(seconds, key=lambda name: seconds[name]), seconds
    except BuildError as error:
        log.warning("no kernel is generated (%s): %s", choice.region, error)
        choice.reason = str(error)
        return choice
    choice.chosen = name.split()[0]
    if choice.chosen == "triton":
        _cut(text, fakes, name)
    return choice


def _variants(text: str, fakes: list[Any]) -> dict[str, _Call]:
    """What may run a region: "aten" first, then its kernel, which on GPUs may be cut in several ways.

    Raises:
        BuildError: there is no kernel.
    """
    if fakes[0].device.type == "cpu":
        cpp.few_rows.load(Spec.of(text))
        return {"aten": meaning, "cpp": few_rows_native}
    if why := triton.build.available():
        raise BuildError(why)

    def cut(name: str) -> _Call:
        def call(*args: Any) -> Any:
            _cut(text, fakes, name)
            return few_rows_native(*args)

        return call

    return {"aten": meaning, **{name: cut(name) for name in _cuts(text, fakes)}}


def _cuts(text: str, fakes: list[Any]) -> dict[str, triton.few_rows.Config]:
    problem = triton.launch.Problem.of(fakes[0], fakes[1], text)
    return {f"triton {config}": config for config in problem.configs()}


def _cut(text: str, fakes: list[Any], name: str) -> None:
    problem = triton.launch.Problem.of(fakes[0], fakes[1], text)
    triton.launch.choose(problem, _cuts(text, fakes)[name])


def _running(variants: dict[str, _Call], text: str, arguments: _Arguments) -> Iterator[str]:
    """The names of those that a first call builds and runs: a GPU may have too little for some.

    Raises:
        BuildError: none but "aten" does.
    """
    kernels, problem = 0, ""
    for name, call in variants.items():
        try:
            call(*arguments, text)
        except Exception as error:  # whatever Triton or a driver raises: another one runs instead
            problem = f"{name}: {type(error).__name__}: {first_line(error)}"
            log.info("not a candidate: %s", problem)
        else:
            kernels += name != "aten"
            yield name
    if not kernels:
        raise BuildError(problem)


def _measure(text: str, fakes: list[Any]) -> dict[str, float]:
    """Median seconds of each variant, over weights that no cache holds.

    Raises:
        BuildError: no kernel runs.
    """
    x, weights, operands = arguments = _arguments(fakes)
    size = sum(w.nbytes for w in weights)
    count = math.ceil(_cold(x.device) / size)
    copies = [weights] + [[w.clone() for w in weights] for _ in range(count - 1)]

    def over(call: Any) -> Any:
        def run() -> None:
            for each in copies:
                call(x, each, operands, text)

        return run

    with torch.inference_mode():
        variants = _variants(text, fakes)
        calls = {name: over(variants[name]) for name in _running(variants, text, arguments)}
        timings = side_by_side(calls, rounds=_ROUNDS)
    return {name: timing.median / len(copies) for name, timing in timings.items()}


def _cold(device: torch.device) -> int:
    if device.type != "cuda":
        return _COLD
    return max(_COLD, 2 * torch.cuda.get_device_properties(device).L2_cache_size)


def _arguments(fakes: list[Any]) -> _Arguments:
    def random(fake: torch.Tensor) -> torch.Tensor:
        return torch.randn(tuple(fake.shape), dtype=fake.dtype, device=fake.device)

    return random(fakes[0]), [random(w) for w in fakes[1]], [random(o) for o in fakes[2]]


def _key(text: str, fakes: Sequence[Any]) -> str:
    tensors = [(tuple(t.shape), t.dtype) for t in (fakes[0], *fakes[1], *fakes[2])]
    parts = (
        text,
        str(tensors),
        _device(fakes[0].device),
        str(torch.get_num_threads()),
        *native.machine(),
    )
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
