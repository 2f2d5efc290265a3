"""Kernels of ``sparsecc::sparse_ffn`` of blocks behind a router against fp64: what is live and read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import for_threads, poisoned
from precision import assert_as_near, squares, wide

from sparsecc.codegen.cpp import sparse_ffn as generator
from sparsecc.codegen.triton import launch_sparse_ffn
from sparsecc.codegen.triton import sparse_ffn as triton_generator
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.sparse_ffn import (
    Spec,
    at_density,
    meaning,
    sparse_ffn,
    sparse_ffn_native,
)

COUNT, BLOCK = 9, 7  # 63 neurons: no multiple of what a chunk or a vector has
NEURONS = COUNT * BLOCK
SPEC = Spec("p0", "a * silu(p1 + v0)", gate=False, block=BLOCK)
CASES = {  # name -> formats, dtype, size of x, size of the output
    "fp32": ((), torch.float32, 37, 53),
    "bf16": ((), torch.bfloat16, 37, 53),
    "int8": (("int8", "int8"), torch.float32, 37, 53),
    "int4": (("int4g32z", "int4g32"), torch.float32, 64, 96),
}


def arguments(spec: Spec, rows: int, size: int, out: int, dtype: torch.dtype = torch.float32):
    """x, weights in their formats, and the bias and router of a spec; half of the router's values are 0."""
    weights = [(torch.randn(NEURONS, s) / s**0.5).to(dtype) for s in (size, out)]
    parts = [
        part
        for weight, form in zip(weights, spec.kept, strict=True)
        for part in formats.quantize(weight, form.name)
    ]
    router = torch.randn(rows, COUNT) * (torch.rand(rows, COUNT) < 0.5)
    return (
        torch.randn(rows, size).to(dtype),
        parts,
        [torch.randn(NEURONS).to(dtype), router.to(dtype)],
    )


@pytest.mark.parametrize("name", CASES)
def test_as_near_to_fp64_as_aten(name: str) -> None:
    forms, dtype, size, out = CASES[name]
    spec = replace(SPEC, formats=forms)
    generator.load(spec, dtype)
    some = torch.arange(0, NEURONS, 3)
    ours, aten = [], []
    for rows in (1, 2, 7, 16):
        for only in (None, some):
            case = (*arguments(spec, rows, size, out, dtype), only)
            with poisoned():
                got = sparse_ffn_native(*case, spec.text())
            x, weights, operands, _ = case
            reference = meaning(x.double(), wide(weights), wide(operands), only, spec.text())
            plain = meaning(*case, spec.text())
            assert (got.shape, got.dtype) == (plain.shape, dtype)
            ours.append(squares([got], [reference]))
            aten.append(squares([plain], [reference]))
    assert_as_near(ours, aten, torch.finfo(dtype).eps / 2)


def test_the_meaning_is_the_dense_formula() -> None:
    """y = vec(r_n · silu(h_n)) D, written over views; without an up projection too."""
    x, (up, down), (bias, router) = (wide(each) for each in nested(arguments(SPEC, 3, 37, 53)))
    (x,) = x
    h = torch.nn.functional.silu(x @ up.T + bias).view(3, COUNT, BLOCK) * router[..., None]
    got = meaning(x, [up, down], [bias, router], None, SPEC.text())
    assert (got - h.flatten(-2) @ down).norm() < 1e-14 * got.norm()
    given = Spec("p0", "a", gate=False, block=BLOCK)
    got = meaning(x, [down], [router], None, given.text())
    expected = router @ down.view(COUNT, BLOCK, -1).sum(1)
    assert (got - expected).norm() < 1e-14 * got.norm()
    generator.load(given)
    got = sparse_ffn_native(x.float(), [down.float()], [router.float()], None, given.text())
    assert (got - expected).norm() < 1e-6 * expected.norm()


def nested(case):
    x, weights, operands = case
    return [x], weights, operands


def test_dead_blocks_are_not_read_and_live_ones_are_counted() -> None:
    """The union over rows is read; a row without a live block is 0; a negative value and NaN are live."""
    spec = replace(SPEC, label="blocks")
    generator.load(spec)
    x, weights, (bias, router) = arguments(spec, 4, 37, 53)
    router.zero_()
    router[0, 2], router[2, [2, 8]] = -1.5, 0.5
    dead = torch.tensor([n not in (2, 8) for n in range(COUNT)]).repeat_interleave(BLOCK)
    reference = meaning(x.double(), wide(weights), wide([bias, router]), None, spec.text())
    for weight in weights:
        weight[dead] = torch.nan
    generator.reset_counters()
    with poisoned():
        got = sparse_ffn_native(x, weights, [bias, router], None, spec.text())
    assert torch.equal(got[[1, 3]], torch.zeros(2, 53))
    assert (got - reference).norm() < 1e-6 * reference.norm()
    counts = generator.Counts(1, 4, 3 * BLOCK, 2 * BLOCK, NEURONS)
    assert generator.counters()["blocks"] == counts
    router[1, 8] = torch.nan
    got = sparse_ffn_native(x, weights, [bias, router], None, spec.text())
    assert got[1].isnan().all()
    assert torch.equal(got[3], torch.zeros(53))
    none = sparse_ffn_native(x[:0], weights, [bias, router[:0]], None, spec.text())
    assert none.shape == meaning(x[:0], weights, [bias, router[:0]], None, spec.text()).shape
    router.zero_()
    assert not sparse_ffn_native(x, weights, [bias, router], None, spec.text()).any()


def test_the_same_bits_for_any_number_of_threads_and_any_shape_of_the_router() -> None:
    generator.load(SPEC)
    x, weights, (bias, router) = arguments(SPEC, 6, 37, 53)
    results = for_threads(
        lambda: [sparse_ffn_native(x, weights, [bias, router], None, SPEC.text())]
    )
    assert all(torch.equal(result[0], results[0][0]) for result in results)
    shaped = x.view(2, 3, 37), weights, [bias, router.t().contiguous().t().view(1, 6, COUNT)], None
    assert torch.equal(sparse_ffn_native(*shaped, SPEC.text()).view(6, 53), results[0][0])
    for operator in (sparse_ffn, sparse_ffn_native):
        torch.library.opcheck(
            operator, (*shaped, SPEC.text()), test_utils=("test_schema", "test_faketensor")
        )


WRONG = {
    r"router's values are not \[3, 9\]": lambda b, r: [b, r[:, 1:]],
    r"not \[3, 9\], one for each row": lambda b, r: [b, r[1:]],
    "router's values must be float32 on CPU": lambda b, r: [b, r.double()],
    "0 operands, not 1": lambda b, r: [r],
    "no operands: the last one is the router's": lambda b, r: [],
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    generator.load(SPEC)
    x, weights, operands = arguments(SPEC, 3, 37, 53)
    with pytest.raises(RuntimeError, match=words):
        sparse_ffn_native(x, weights, WRONG[words](*operands), None, SPEC.text())


def test_what_does_not_fit_is_named() -> None:
    x, weights, (bias, router) = arguments(SPEC, 3, 37, 53)
    for wrong in (router[:, 1:], router[1:]):
        with pytest.raises(
            ValueError, match=r"router \[.*\] for 3 rows of 63 neurons in blocks of 7"
        ):
            meaning(x, weights, [bias, wrong], None, SPEC.text())
    uneven = replace(SPEC, block=8)
    generator.load(uneven)
    with pytest.raises(RuntimeError, match="63 neurons are no multiple of blocks of 8"):
        sparse_ffn_native(x, weights, [bias, router], None, uneven.text())
    for spec, words in (
        (Spec("p0", "a", block=7), "beside a gate"),
        (replace(SPEC, select="top 3"), "beside a gate or a selection"),
        (replace(SPEC, block=-1), "not -1"),
        (replace(SPEC, block=True), "not True"),
    ):
        with pytest.raises(ValueError, match=words):
            Spec.of(spec.text())


def test_triton_has_no_kernel() -> None:
    x, weights, operands = arguments(SPEC, 3, 37, 53)
    for refused in (
        lambda: triton_generator.source(SPEC),
        lambda: launch_sparse_ffn.run(x, weights, operands, None, SPEC.text()),
    ):
        with pytest.raises(BuildError, match="no kernel reads a router's blocks of 7"):
            refused()


def test_at_density_so_many_blocks_are_live() -> None:
    spec = replace(SPEC, density=1 / 3)
    x, weights, operands = arguments(spec, 2, 37, 53)
    at_density(x, weights, operands, None, spec.text())
    assert (operands[1] != 0).sum(-1).tolist() == [3, 3]
    assert operands[0].unique().numel() == 1
    assert meaning(x, weights, operands, None, spec.text()).isfinite().all()
