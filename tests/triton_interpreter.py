"""Whether Triton's interpreter runs kernels, and what it must be taught for them to round as on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.language import bfloat16, core

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"


def in_turn(cases: Iterable[tuple[Any, ...]], axis: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Each case with each value on a GPU; in the interpreter, which is slow, with one of them, in turn."""
    if not INTERPRETED:
        return [(*case, value) for case, value in itertools.product(cases, axis)]
    size = len(
        axis
    )  # a turn begins one further than the last: cases whose number size divides meet all
    return [(*case, axis[(i + i // size) % size]) for i, case in enumerate(cases)]


@pytest.fixture(autouse=True, scope="module")
def as_on_a_gpu() -> Iterator[None]:
    """Triton's interpreter cuts float32 off where GPUs round it to bfloat16, and multiplies bfloat16's bits.

    And it makes the language's functions its own at every call of a function, not only at every launch, which
    took half of the time.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (bfloat16, triton.language.float32):
            return TensorHandle(widened(src.data), dst_type.scalar)
        if kinds == (triton.language.float32, bfloat16):
            rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), bfloat16)
        return cast(self, src, dst_type)

    patch_language = interpreter._patch_lang

    def patch_once(fn):
        known = [m for m in fn.__globals__.values() if m is triton.language or m is core]
        if known and not any(core.is_builtin(module.load) for module in known):
            return interpreter._LangPatchScope()  # with nothing to be restored
        return patch_language(fn)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar == bfloat16:
            a, b = (TensorHandle(widened(t.data), triton.language.float32) for t in (a, b))
        return dot(self, a, b, d, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
