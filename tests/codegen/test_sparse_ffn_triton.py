"""Triton of ``sparsecc::sparse_ffn``: run in the interpreter, built for four GPUs; run on one where it is."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from grids import run_grid

from sparsecc.codegen.triton import build, launch_sparse_ffn, sparse_ffn
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.sparse_ffn import Spec

pytest.importorskip("triton", reason="the `triton` extra is not installed")

SIZES = (4096, 14336, 4096)  # K, F and N of a decoder
CATS = Spec("keep(silu(p0 + v0), v1)", "a * p1")
GAUSSIAN = Spec("p0", "a * p1", select="gaussian 1.6", after="gelu_tanh(a)")
TOP = Spec("relu(p0)", "a", select="top 200")
INT8 = replace(CATS, formats=("int8", "int8x32", "int8"), label="a layer")
INT4 = replace(CATS, formats=("int4g64za8", "int4g32z", "int4g128z"))
INPUTS = Spec("keep(p0, v0)", "a", gate=False)


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    counts = run_grid("sparse_ffn_triton_grid.py", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", counts)
    assert passed, counts
    assert int(passed[1]) >= 80, counts


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu() -> None:
    counts = run_grid("sparse_ffn_triton_grid.py", TRITON_INTERPRET="0")
    assert "skipped" not in counts, counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "rows", "dtype", "kernels", "core"),
    [
        (CATS, 1, torch.bfloat16, "gate live down combine", False),
        (CATS, 3, torch.float32, "live", True),
        (GAUSSIAN, 4, torch.bfloat16, "gaussian_limits live down", False),
        (TOP, 2, torch.float16, "live", False),
        (INPUTS, 16, torch.float32, "down", False),
        (CATS, 16, torch.bfloat16, "live down", False),
        (INT8, 1, torch.bfloat16, "round_activations gate live down add_counts", False),
        (INT8, 16, torch.bfloat16, "gate", False),
        (INT4, 3, torch.bfloat16, "gate live down", False),
        (INT4, 16, torch.bfloat16, "gate live down", False),
    ],
)
def test_built_it_needs_no_more_than_a_gpu_has(
    spec: Spec, rows: int, dtype: torch.dtype, kernels: str, core: bool
) -> None:
    """At the sizes of a decoder, as it is cut where nothing was measured."""
    config = sparse_ffn.configs(rows, SIZES[0], dtype)[0]
    module = build.load("sparse_ffn", sparse_ffn.source(spec))
    for kernel in kernels.split():
        types = sparse_ffn.signature(spec, kernel, dtype, core)
        constants = sparse_ffn.constants(spec, kernel, rows, SIZES, config)
        none = [n for n, kind in types.items() if kind == "constexpr" and n not in constants]
        constants |= dict.fromkeys(none)
        built = build.build(getattr(module, kernel), types, constants, config.warps)
        for target, each in built.items():
            assert each.spills == 0, (kernel, target)
            assert each.shared <= build.TARGETS[target].shared, (kernel, target)


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", sparse_ffn.DTYPES)
def test_tiles_are_no_wider_than_rows(dtype: torch.dtype, rows: int) -> None:
    for size in (1, 16, 100, 4096):
        for config in sparse_ffn.configs(rows, size, dtype):
            assert config.block_k & (config.block_k - 1) == 0
            assert 16 <= config.block_k < max(2 * size, 17)


@pytest.mark.parametrize("chunks", [0, 1, 7, 112, 4000])
@pytest.mark.parametrize("width", [1, 4096, 10**6])
def test_parts_take_every_chunk(chunks: int, width: int) -> None:
    parts, walk = sparse_ffn.parts(chunks, width, sparse_ffn.configs(1, 64, torch.float32)[0])
    assert (parts - 1) * walk < max(chunks, 1) <= parts * walk


def test_the_source_says_what_it_computes() -> None:
    head, body = sparse_ffn.source(CATS).split("import triton\n")
    assert "a = keep(silu(p0 + v0), v1)" in head
    assert "h = a * p1" in head
    assert "p0[m, i] = sum over k of x[m, k] G[i, k], p1 likewise of U" in head
    assert "atomic" not in body
    assert "relu(b - mean(b) - 1.6 std(b)) over a row of b = p0" in sparse_ffn.source(GAUSSIAN)
    assert "the 200 largest of a row of relu(p0), the others 0" in sparse_ffn.source(TOP)
    assert "p0 = x, " in sparse_ffn.source(INPUTS)


def test_weights_in_other_formats_are_refused() -> None:
    spec = Spec("relu(p0)", "a", formats=("fp4", "dense"))
    weights = [*formats.quantize(torch.randn(5, 8), "fp4"), torch.randn(5, 3)]
    case = torch.randn(2, 8), weights, [], None
    for refused in (
        lambda: sparse_ffn.source(spec),
        lambda: launch_sparse_ffn.run(*case, spec.text()),
    ):
        with pytest.raises(BuildError, match="weights are fp4, dense; no kernel reads E2M1"):
            refused()
