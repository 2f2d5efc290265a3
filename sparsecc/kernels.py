"""Which regions run by a generated kernel: measured once for each region and machine, and remembered."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from sparsecc.codegen import cpp
from sparsecc.errors import BuildError
from sparsecc.log import log
from sparsecc.options import Options
from sparsecc.program import Program
from sparsecc.report.model import GraphReport, KernelChoice
from sparsecc.runtime import native
from sparsecc.runtime.ops import cached_attention, few_rows
from sparsecc.timing import side_by_side

# Weights in decoding come from memory: a measurement takes turns over as many copies as no cache holds.
_COLD = 96 * 2**20  # bytes
_MOST_COPIES = 512
_ROUNDS = 7


@dataclass(frozen=True)
class Kind:
    """An operator whose calls are regions; the last argument of each call is the text of its spec.

    Attributes:
        native: the same operator by a generated kernel.
        load: builds and loads the kernel of a spec's text; its library, whose source lies beside it.
        words: (region, shape) for the report, of a call's arguments.
        meaning: what stands for Inductor's code in a measurement.
    """

    native: Any
    load: Callable[[str], pathlib.Path]
    words: Callable[[tuple[Any, ...]], tuple[str, str]]
    meaning: Callable[..., Any]


def _few_rows_words(args: tuple[Any, ...]) -> tuple[str, str]:
    x, weights, _, text = args
    spec = few_rows.Spec.of(text)
    shape = f"{list(x.shape)} x {', '.join(str(list(w.shape)) for w in weights)}"
    return " | ".join([spec.norm, *spec.outputs]), shape


def _attention_words(args: tuple[Any, ...]) -> tuple[str, str]:
    q, keys, rotation = args[0], args[3], args[6]
    return (
        f"cached attention{' | rotated' * bool(rotation)}",
        f"{list(q.shape)} over {list(keys.shape)}",
    )


def _attention_meaning(*args: Any) -> torch.Tensor:
    """Without the rotation: Inductor fuses it, and run operator by operator it would count too much."""
    *before, _, mask, scale, text = args
    plain = (*before, [], mask, scale, text)
    return cached_attention.meaning(*plain)


KINDS: Mapping[Any, Kind] = {
    few_rows.few_rows: Kind(
        few_rows.few_rows_native,
        lambda text: cpp.few_rows.load(few_rows.Spec.of(text)),
        _few_rows_words,
        few_rows.meaning,
    ),
    cached_attention.cached_attention: Kind(
        cached_attention.cached_attention_native,
        lambda text: cpp.cached_attention.load(cached_attention.Spec.of(text)),
        _attention_words,
        _attention_meaning,
    ),
}


def select(program: Program, options: Options, record: GraphReport) -> None:
    """Give every region of ``program`` that should have one its kernel; the others stay as they are.

    A region left alone is traced through by AOTAutograd, so Inductor compiles its meaning.
    """
    choices: dict[str, KernelChoice] = {}
    for node in program.calls(*KINDS):
        kind = KINDS[node.target]
        args = fx.map_arg(node.args, lambda n: n.meta["val"])
        key = _key(args)
        choice = choices.get(key)
        if choice is None:
            choice = choices[key] = _choose(kind, args, key, options)
            record.kernels.append(choice)
        else:
            choice.count += 1
        if choice.chosen == "cpp":
            node.target = kind.native
    if choices:
        program.module.recompile()


def _choose(kind: Kind, args: Any, key: str, options: Options) -> KernelChoice:
    choice = KernelChoice(*kind.words(args), "aten")
    if options.codegen == "aten" or (options.codegen == "auto" and options.lower != "inductor"):
        choice.reason = f"codegen={options.codegen!r}, lower={options.lower!r}"
        return choice
    try:
        choice.source = str(kind.load(args[-1]).with_suffix(".cpp"))
    except BuildError as error:
        log.warning("no kernel is generated (%s): %s", choice.region, error)
        choice.reason = str(error)
        return choice
    if options.codegen == "cpp":
        choice.chosen, choice.reason = "cpp", "codegen='cpp'"
        return choice
    choice.seconds = _remembered(key) or _remember(key, _measure(kind, args))
    choice.chosen = min(choice.seconds, key=lambda name: choice.seconds[name])
    return choice


def _measure(kind: Kind, args: Any) -> dict[str, float]:
    """Median seconds of the kernel and of ATen, over tensors that no cache holds."""
    first = tree_map(_random, args)
    size = sum(t.nbytes for t in tree_leaves(first) if isinstance(t, torch.Tensor))
    count = min(math.ceil(_COLD / size), _MOST_COPIES)
    copies = [first, *(tree_map(_copy, first) for _ in range(count - 1))]

    def over(call: Any) -> Any:
        def run() -> None:
            for each in copies:
                call(*each)

        return run

    with torch.inference_mode():
        timings = side_by_side(
            {"aten": over(kind.meaning), "cpp": over(kind.native)}, rounds=_ROUNDS
        )
    return {name: timing.median / len(copies) for name, timing in timings.items()}


def _random(fake: Any) -> Any:
    """A tensor like a fake one, symbolic sizes by their hints: random, or the first positions, or all True."""
    if not isinstance(fake, torch.Tensor):
        return fake
    sizes: list[Any] = list(fake.shape)
    shape = [s if isinstance(s, int) else int(s.node.hint or 1) for s in sizes]
    if fake.dtype.is_floating_point:
        return torch.randn(shape, dtype=fake.dtype)
    if fake.dtype is torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.arange(math.prod(shape), dtype=fake.dtype).view(shape)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _key(args: Any) -> str:
    shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in tree_leaves(args)]
    parts = (str(shapes), str(torch.get_num_threads()), *native.machine())
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
