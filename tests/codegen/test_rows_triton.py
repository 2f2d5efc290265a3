"""Triton of ``sparsecc::rows``: run in the interpreter, built for four GPUs, and run on one where it is."""

from __future__ import annotations

import re

import pytest
import torch
from grids import run_grid
from row_cases import ALL, CASES

from sparsecc.codegen.triton import build, rows
from sparsecc.runtime.ops import catalogue
from sparsecc.runtime.ops.rows import Output, Spec

pytest.importorskip("triton", reason="the `triton` extra is not installed")


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    counts = run_grid("rows_triton_grid.py", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", counts)
    assert passed, counts
    assert int(passed[1]) > 130, counts


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu() -> None:
    counts = run_grid("rows_triton_grid.py", TRITON_INTERPRET="0")
    assert "skipped" not in counts, counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 8192) for name in ALL if not re.search(r"hadamard \d", name)),
        *(
            (name, 12288)
            for name in ("residual, layer, int8 by token", "crms", "poly norm", "hadamard, int8")
        ),
    ],
)
def test_built_it_needs_no_more_than_a_gpu_has(name: str, size: int) -> None:
    spec, dtype = ALL[name].spec, torch.bfloat16
    if "hadamard" in name and (size & (size - 1) or size > rows.MOST_IN_REGISTERS):
        with pytest.raises(ValueError, match="hadamard"):
            rows.config(spec, size)
        return
    cut = rows.config(spec, size)
    built = build.build(
        build.load("rows", rows.source(spec, size)).kernel,
        rows.signature(spec, dtype),
        rows.constants(size, cut),
        num_warps=cut.warps,
    )
    for target, each in built.items():
        assert each.spills == 0, target
        assert each.shared <= build.TARGETS[target].shared, target


def test_rows_that_no_kernel_takes_are_named() -> None:
    with pytest.raises(ValueError, match="a power of two, not rows of 12"):
        rows.source(catalogue.hadamard(12), 12)
    with pytest.raises(ValueError, match="hadamard of 16384, over 8192"):
        rows.source(catalogue.hadamard(16384), 16384)
    both = Spec(("c = t0 - mean(t0)",), (Output("c", "wide", summed=True),))
    with pytest.raises(ValueError, match="sums over rows of 9000, over 8192"):
        rows.source(both, 9000)


def test_the_source_says_what_it_computes() -> None:
    spec = CASES["residual, layer, int8 by token"].spec
    head = rows.source(spec, 100).split("import triton")[0]
    assert "Triton, rows of N <= 128 elements; float32, bfloat16 or float16" in head
    assert "#   out0[m, n] = clamp(round(z / scale), -127, 127), as int8" in head
    assert "each in passes over it" in rows.source(spec, 9000)
    assert "in blocks of columns" in rows.source(catalogue.simple_gate(), 9000)
