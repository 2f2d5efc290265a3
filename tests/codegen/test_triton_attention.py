"""Generated Triton for ``sparsecc::cached_attention``, as far as it needs no GPU: built, read, cut, chosen."""

from __future__ import annotations

import pytest
import torch
from cached_attention_cases import SPECS, inputs
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from sparsecc import regions
from sparsecc.codegen.triton import build, launch_attention
from sparsecc.codegen.triton import cached_attention as generator
from sparsecc.codegen.triton.few_rows import DTYPES
from sparsecc.errors import BuildError
from sparsecc.measurement import measure
from sparsecc.runtime.ops.cached_attention import Spec, cached_attention

pytest.importorskip("triton", reason="the `triton` extra is not installed")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
BUILT = {"llama": SPECS["llama"], "wide": Spec(128, 128, 4, True), "large": SPECS["large"]}


def built(fn, names: list[str], constants: dict, dtype: torch.dtype, mask: str, warps: int) -> dict:
    types = generator.signature([*names, *constants], dtype, mask)
    # Heads and caches of PyTorch: all strides but the mask's along the cache.
    strides = [name for name, kind in types.items() if kind == "i64" and name != "mask_s"]
    return build.build(fn, types, constants, warps, multiples=strides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "mask", "dtype"),
    [
        (1, "added", torch.float32),
        (16, "bool", torch.float32),
        (1, "added", torch.bfloat16),
        (4, "added", torch.bfloat16),
        (16, "bool", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", BUILT)
def test_built_it_needs_no_more_than_a_gpu_has(
    name: str, tokens: int, mask: str, dtype: torch.dtype
) -> None:
    """As it is cut where nothing was measured."""
    spec = BUILT[name]
    module = build.load("cached_attention", generator.source(spec, tokens, mask))
    cut = generator.configs(spec, tokens, dtype)[0]
    names, constants = generator.attend_arguments(spec, mask), generator.constants(cut)
    # Sixteen rows of 256 float32 are more than registers hold; in half precision ptxas gives up a few for
    # the sake of more programs at once.
    most = 0 if name != "large" or tokens == 1 else 1024 if dtype is torch.float32 else 16
    for target, each in built(module.attend, names, constants, dtype, mask, cut.warps).items():
        assert each.spills <= most, target
        assert each.shared <= build.TARGETS[target].shared, target


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_so_do_the_kernels_around_it(name: str) -> None:
    spec, dtype = BUILT[name], torch.bfloat16
    module = build.load("cached_attention", generator.source(spec, 2, "none"))
    names = ["scratch", "out", "heads", "chunks"]
    constants = generator.combine_constants(spec, 2)
    found = [built(module.write, generator.write_arguments(spec), {}, dtype, "none", 1)]
    found += [built(module.combine, names, constants, dtype, "none", 4)]
    for each in found:
        for target, one in each.items():
            assert one.spills == 0, target
            assert one.shared <= build.TARGETS[target].shared, target


@dtypes
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_cuts_are_what_triton_takes(tokens: int, dtype: torch.dtype) -> None:
    for spec in SPECS.values():
        found = generator.configs(spec, tokens, dtype)
        assert len(found) == len(set(found)) >= 2
        assert all(c.block_s & (c.block_s - 1) == 0 and c.block_s >= 16 for c in found)


@pytest.mark.parametrize("programs", [1, 7, 8, 512, 5000])
@pytest.mark.parametrize("length", [0, 1, 32, 33, 4096, 100_000])
def test_chunks_cover_the_cache_and_are_many_enough(programs: int, length: int) -> None:
    config = generator.Config(32, 4, 1)
    each = generator.chunk(programs, length, config)
    assert each > 0
    assert each % 32 == 0
    chunks = max(-(-length // each), 1)
    assert (chunks - 1) * each < max(length, 1) <= chunks * each
    tiles = max(-(-length // 32), 1)
    assert chunks == tiles or chunks * programs >= 512 / 2 or each <= 64
    assert chunks == 1 or chunks * programs <= 512


def test_the_source_says_what_it_computes() -> None:
    head, text = generator.source(SPECS["llama"], 1, "added").split("import triton\n")
    assert "1 new tokens; float32, bfloat16 or float16, with sums in float32" in head
    assert "k' = R k, written into keys[position]; v into values[position]" in head
    assert "softmax over s of (scale R q[t] . keys[s] + mask[t, s]) times values[s]" in head
    assert "q [B, H*3, T, 64], k [B, H, T, 64], v [B, H, T, 64]" in head
    assert "tl.dot" not in text
    plain = generator.source(SPECS["odd"], 5, "bool")
    assert "softmax over s with mask[t, s] of (scale q[t] . keys[s]) times values[s]" in plain
    assert "tl.dot" in plain


@pytest.mark.parametrize(("tokens", "mask"), [(0, "none"), (1, "causal")])
def test_what_no_kernel_computes(tokens: int, mask: str) -> None:
    with pytest.raises(ValueError, match="cached_attention in Triton: "):
        generator.source(SPECS["llama"], tokens, mask)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict:
    found: dict = {}
    monkeypatch.setattr(launch_attention.cuts, "chosen", found)
    return found


def on_cuda(mask: str, dtype: torch.dtype) -> list:
    """The arguments of a call on a GPU that is not here."""
    real = inputs("llama", 2, 1, 90, mask, 3, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cuda"), real)


@dtypes
@pytest.mark.parametrize(
    ("mask", "kind"), [("none", "none"), ("causal", "bool"), ("added", "added")]
)
def test_every_cut_is_a_variant(chosen: dict, mask: str, kind: str, dtype: torch.dtype) -> None:
    args = on_cuda(mask, dtype)
    found = regions.KINDS[cached_attention].kernels(tuple(args))
    problem = launch_attention.Problem(args[-1], 1, kind, dtype)
    assert list(found) == [f"triton {config}" for config in problem.configs()]
    name, variant = list(found.items())[-1]
    assert variant.language == "triton"
    with open(variant.source, encoding="utf-8") as file:
        assert file.read() == generator.source(SPECS["llama"], 1, kind)
    variant.keep()
    assert {key: f"triton {config}" for key, config in chosen.items()} == {problem: name}


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions.triton.build, "available", lambda: "Triton is not installed")
    with pytest.raises(BuildError, match="Triton is not installed"):
        regions.KINDS[cached_attention].kernels(tuple(on_cuda("none", torch.bfloat16)))


@pytest.mark.gpu
def test_a_measurement_measures_on_a_gpu() -> None:
    args = tuple(inputs("llama", 1, 1, 900, "causal", 899, dtype=torch.bfloat16, device="cuda"))
    kind = regions.KINDS[cached_attention]
    found, _ = measure({"aten": regions.Variant(kind.meaning, "aten"), **kind.kernels(args)}, args)
    assert "aten" in found
    assert len(found) > 2
    assert all(1e-7 < seconds < 1 for seconds in found.values())
