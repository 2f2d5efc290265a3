"""Generated Triton: run in the interpreter, built for four GPUs; and run on a GPU, where there is one."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from few_rows_cases import SPECS
from grids import run_grid
from support import randomise, run
from torch import nn

from sparsecc.codegen.triton import build, few_rows, launch
from sparsecc.errors import BuildError
from sparsecc.proof import compare
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec

pytest.importorskip("triton", reason="the `triton` extra is not installed")


GRIDS = {
    "triton_grid.py": 120,
    "triton_attention_grid.py": 95,
}  # and how many tests are in it, at least
grids = pytest.mark.parametrize("grid", GRIDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute each, alone on two cores
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


@pytest.mark.gpu
@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", few_rows.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_model_on_a_gpu(dtype: torch.dtype, lower: str) -> None:
    layers = nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 160), nn.SiLU()
    model = randomise(nn.Sequential(*layers, nn.Linear(160, 64, bias=False))).to("cuda", dtype)
    for rows in (1, 3, 16):
        x = torch.randn(rows, 64, device="cuda", dtype=dtype)
        with torch.no_grad():
            options = {"passes": ["fuse-few-rows"], "codegen": "triton", "lower": lower}
            result, report = run(model.eval(), x, **options)
            exact = copy.deepcopy(model).double()(x.double())
            assert compare("result", result, model(x), exact).passed
        chosen = [(k.region, k.chosen) for k in report.graphs[0].kernels]
        assert chosen == [("layer | silu(p0 + v0)", "triton"), ("none | p0", "triton")]


# A build takes seconds: each spec for each way to take rows, with the dtypes in turn.
BUILDS = [
    (name, rows, (torch.float32, torch.bfloat16)[(i + j) % 2])
    for i, name in enumerate(SPECS)
    for j, rows in enumerate((1, 4, 16))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows", "dtype"), BUILDS, ids=str)
def test_built_it_needs_no_more_than_a_gpu_has(name: str, rows: int, dtype: torch.dtype) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", ["gate and up", "residual"])
def test_every_cut_fits(name: str, rows: int) -> None:
    spec, target = SPECS[name], {"sm_90": build.TARGETS["sm_90"]}
    fn = build.load("few_rows", few_rows.source(spec, rows)).kernel
    for config in few_rows.configs(spec, rows, 4096, torch.bfloat16):
        constants = few_rows.constants(spec, rows, 4096, (4096,), config)
        types = few_rows.signature(spec, torch.bfloat16)
        (built,) = build.build(fn, types, constants, config.warps, targets=target).values()
        assert built.spills == 0, config
        assert built.shared <= target["sm_90"].shared, config


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


def test_weights_in_other_formats_are_refused() -> None:
    spec = Spec("none", 0.0, ("p0",), ("int8s",))
    case = torch.randn(2, 8), list(formats.quantize(torch.randn(5, 8), "int8s")), []
    for refused in (lambda: few_rows.source(spec, 2), lambda: launch.run(*case, spec.text())):
        with pytest.raises(BuildError, match="weights are int8s; kernels read dense ones"):
            refused()
