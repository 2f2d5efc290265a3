"""Triton built for GPUs that are not here: reports to be read, failures that have names."""

from __future__ import annotations

import pathlib

import pytest

from sparsecc.codegen.triton import build
from sparsecc.errors import BuildError

pytest.importorskip("triton", reason="the `triton` extra is not installed")

SOURCE = """
import triton
import triton.language as tl

from sparsecc.codegen.triton.functions import gelu_tanh


@triton.jit
def kernel(x, out, N: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < N, other=0.0).to(tl.float32)
    tl.store(out + place, gelu_tanh(value), mask=place < N)
"""
# Two tiles of sums: too many for the registers of one warp.
GREEDY = """
import triton
import triton.language as tl


@triton.jit
def kernel(x, out, N: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    for start in range(N):
        value = tl.load(x + start * BLOCK + place)
        total += value * value
        other = other * value + total
    tl.store(out + place, total * other)
"""
SIGNATURE = {"x": "*bf16", "out": "*fp32", "N": "constexpr", "BLOCK": "constexpr"}


def test_a_build_says_what_it_needs() -> None:
    fn = build.load("simple", SOURCE).kernel
    built = build.build(fn, SIGNATURE, {"N": 1000, "BLOCK": 256})
    assert list(built) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    for name, each in built.items():
        assert each.spills == 0
        assert 4 <= each.registers <= 64
        assert 0 <= each.shared <= build.TARGETS[name].shared
        assert name in each.assembly


@pytest.mark.parametrize(("name", "block"), [("sm_90", 8192), ("gfx942", 32768)])
def test_spills_are_seen(name: str, block: int) -> None:
    fn = build.load("greedy", GREEDY).kernel
    constants, targets = {"N": 1000, "BLOCK": block}, {name: build.TARGETS[name]}
    built = build.build(fn, {**SIGNATURE, "x": "*fp32"}, constants, num_warps=1, targets=targets)
    assert built[name].spills > 0


def test_what_does_not_compile_is_named() -> None:
    fn = build.load("simple", SOURCE).kernel
    with pytest.raises(BuildError, match=r"kernel for sm_80: .*power of 2"):
        build.build(fn, SIGNATURE, {"N": 1000, "BLOCK": 7})


def test_a_source_is_kept_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.native, "folder", lambda: tmp_path / "new")
    text = SOURCE + "# kept\n"
    for _ in range(2):
        build.load.cache_clear()
        module = build.load("kept", text)
        (path,) = (tmp_path / "new").iterdir()
        assert module.__file__ == str(path)
        assert path.read_text() == text
        path.write_text(text[:40])  # damaged: written anew at the next load


@pytest.mark.parametrize("source", ["def", "import no_such_module"])
def test_a_source_that_does_not_load_is_named(source: str) -> None:
    with pytest.raises(BuildError, match=r"broken_\w+: (SyntaxError|ModuleNotFoundError)"):
        build.load("broken", source)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BuildError, match=r"absent: Triton is not installed; install sparsecc\[triton\]"
    ):
        build.load("absent", SOURCE + "# absent\n")
