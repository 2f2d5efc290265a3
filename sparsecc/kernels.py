"""Which regions run by a generated kernel: measured once for each region and machine, and remembered."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from sparsecc.errors import BuildError
from sparsecc.log import log
from sparsecc.measurement import arguments, measure, running, tensors
from sparsecc.options import Options
from sparsecc.program import Program
from sparsecc.regions import KINDS, Args, Kind, Variant
from sparsecc.report.model import GraphReport, KernelChoice
from sparsecc.runtime import native

_LANGUAGES = {"cpu": "cpp", "cuda": "triton"}  # of the kernels for one kind of device


def select(program: Program, options: Options, record: GraphReport) -> None:
    """Give every region of ``program`` that should have one its kernel; the others stay as they are.

    A region left alone is traced through by AOTAutograd, so Inductor compiles its meaning.
    """
    choices: dict[str, KernelChoice] = {}
    for node in program.calls(*KINDS):
        kind = KINDS[node.target]
        args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
        alike = (*args[:-1], kind.alike(args[-1]))
        key = _key(alike)
        choice = choices.get(key)
        if choice is None:
            choice = choices[key] = _choose(kind, alike, key, options)
            record.kernels.append(choice)
        else:
            choice.count += 1
        if choice.chosen != "aten":
            if alike[-1] != args[-1]:
                kind.kernels(args)  # loaded under its own text, which measuring must not count for
            node.target = kind.native
    if choices:
        program.module.recompile()


def _choose(kind: Kind, args: Args, key: str, options: Options) -> KernelChoice:
    choice = KernelChoice(*kind.words(args), "aten")
    if options.codegen == "aten" or (options.codegen == "auto" and options.lower != "inductor"):
        choice.reason = f"codegen={options.codegen!r}, lower={options.lower!r}"
        return choice
    device = tensors(args)[0].device.type
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
                name = next(running(kernels, arguments(args, kind.prepare)))
        else:
            variants = {"aten": Variant(kind.meaning, "aten"), **kernels}
            seconds = _remembered(key, variants)
            if seconds is None:
                seconds, settled = measure(variants, args, kind.prepare)
                if settled:
                    _remember(key, seconds)
                else:
                    log.info("%s: measured on a busy machine, and not kept", choice.region)
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


def _remember(key: str, seconds: dict[str, float]) -> None:
    path = native.folder() / f"choice-{key}.json"
    try:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(seconds), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        log.info("a measurement is not kept: %s", error)
