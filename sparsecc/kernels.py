"""Which regions run by a generated kernel: measured once for each region and machine, and remembered."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from sparsecc.codegen import cpp
from sparsecc.errors import BuildError
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
        if choice.chosen == "cpp":
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
    try:
        cpp.few_rows.load(spec, fakes[0].dtype)
    except BuildError as error:
        log.warning("no kernel is generated (%s): %s", choice.region, error)
        choice.reason = str(error)
        return choice
    if options.codegen == "cpp":
        choice.chosen, choice.reason = "cpp", "codegen='cpp'"
        return choice
    choice.seconds = _remembered(key) or _remember(key, _measure(text, fakes))
    choice.chosen = min(choice.seconds, key=lambda name: choice.seconds[name])
    return choice


def _measure(text: str, fakes: list[Any]) -> dict[str, float]:
    """Median seconds of the kernel and of ATen, over weights that no cache holds."""
    x, weights, operands = (
        _random(fakes[0]),
        [_random(w) for w in fakes[1]],
        [_random(o) for o in fakes[2]],
    )
    size = sum(w.nbytes for w in weights)
    copies = [weights] + [[w.clone() for w in weights] for _ in range(math.ceil(_COLD / size) - 1)]

    def over(call: Any) -> Any:
        def run() -> None:
            for each in copies:
                call(x, each, operands, text)

        return run

    with torch.inference_mode():
        timings = side_by_side(
            {"aten": over(meaning), "cpp": over(few_rows_native)}, rounds=_ROUNDS
        )
    return {name: timing.median / len(copies) for name, timing in timings.items()}


def _random(fake: torch.Tensor) -> torch.Tensor:
    shape = tuple(fake.shape)
    if fake.dtype.is_floating_point:
        return torch.randn(shape, dtype=fake.dtype)
    return torch.randint(0, 128, shape, dtype=fake.dtype)  # levels of a weight


def _key(text: str, fakes: Sequence[Any]) -> str:
    shapes = [(tuple(t.shape), t.dtype) for t in (fakes[0], *fakes[1], *fakes[2])]
    parts = (text, str(shapes), str(torch.get_num_threads()), *native.machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _remembered(key: str) -> dict[str, float] | None:
    try:
        found = json.loads((native.folder() / f"choice-{key}.json").read_text(encoding="utf-8"))
        return {name: float(found[name]) for name in ("aten", "cpp")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(key: str, seconds: dict[str, float]) -> dict[str, float]:
    path = native.folder() / f"choice-{key}.json"
    try:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(seconds), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        log.info("a measurement is not kept: %s", error)
    return seconds
