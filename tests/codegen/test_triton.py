"""Generated Triton: run in the interpreter, built for four GPUs; and run on a GPU, where there is one."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from few_rows_cases import SPECS

from sparsecc.codegen.triton import build, few_rows

pytest.importorskip("triton", reason="the `triton` extra is not installed")


GRIDS = {
    "triton_grid.py": 250,
    "triton_attention_grid.py": 300,
}  # and how many tests are in it, at least
grids = pytest.mark.parametrize("grid", GRIDS)


def run_grid(grid: str, **environment: str) -> str:
    """A file of tests in a process of its own; the last line of pytest's words."""
    path = pathlib.Path(__file__).with_name(grid)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        cwd=path.parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes each, alone on two cores
@grids
def test_in_the_interpreter(grid: str) -> None:
    counts = run_grid(grid, TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", counts)
    assert passed, counts
    assert int(passed[1]) > GRIDS[grid], counts


@pytest.mark.gpu
@pytest.mark.slow
@grids
def test_on_a_gpu(grid: str) -> None:
    counts = run_grid(grid, TRITON_INTERPRET="0")
    assert "skipped" not in counts, counts


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("dtype", few_rows.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SPECS)
def test_built_it_needs_no_more_than_a_gpu_has(name: str, dtype: torch.dtype, rows: int) -> None:
    """At the sizes of a decoder, as it is cut where nothing was measured."""
    spec = SPECS[name]
    config = few_rows.configs(spec, rows, 4096, dtype)[0]
    features = (4096, 1024, 1024)[: len(spec.outputs)]
    built = build.build(
        build.load("few_rows", few_rows.source(spec, rows)).kernel,
        few_rows.signature(spec, dtype),
        few_rows.constants(spec, rows, 4096, features, config),
        num_warps=config.warps,
    )
    for target, each in built.items():
        assert each.spills == 0, target
        assert each.shared <= build.TARGETS[target].shared, target


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", few_rows.DTYPES)
def test_tiles_are_no_wider_than_rows(dtype: torch.dtype, rows: int) -> None:
    for spec in SPECS.values():
        for size in (1, 16, 100, 4096):
            for config in few_rows.configs(spec, rows, size, dtype):
                assert config.block_k & (config.block_k - 1) == 0
                assert 16 <= config.block_k < max(2 * size, 17)


def test_the_source_says_what_it_computes() -> None:
    text = few_rows.source(SPECS["gate and up"], 1)
    head = text.split("import triton")[0]
    assert "out0[m, n] = silu(p0) * p1" in head
    assert "y = (x - mean(x)) / sqrt(var(x) + 1e-05)" in head
    assert "rows M = 1; float32, bfloat16 or float16, with sums in float32" in head
    assert "out0 [M, N0], of W0 [N0, K], W1 [N0, K]" in head
    assert "tl.dot" not in text
    assert "tl.dot" in few_rows.source(SPECS["gate and up"], 5)


@pytest.mark.parametrize("rows", [0, 17])
def test_rows_that_no_kernel_computes(rows: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 16 rows, not {rows}"):
        few_rows.source(SPECS["one"], rows)
