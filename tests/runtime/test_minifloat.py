"""Floats of a few bits: which numbers there are, nearest ones, and codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec, meaning
from sparsecc.runtime.ops.formats import Format
from sparsecc.runtime.ops.minifloat import E2M1, Minifloat
from sparsecc.runtime.ops.rounded_weight import quantized

E2M1_NUMBERS = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
KINDS = [E2M1, Minifloat(2, 2), Minifloat(3, 0), Minifloat(3, 2)]


def by_the_law(y: float, kind: Minifloat) -> float:
    """In Python's numbers, by logarithms."""
    largest = (2 - 2**-kind.fraction) * 2 ** (2**kind.exponent - 1)
    y = max(-largest, min(largest, y))
    p = max(math.floor(math.log2(abs(y))), 1) if y else 1
    step = 2.0 ** (p - kind.fraction)
    return round(y / step) * step  # to even, like the law


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rounded_by_the_law(kind: Minifloat, dtype: torch.dtype) -> None:
    y = torch.cat([torch.linspace(-1.3, 1.3, 999) * kind.largest, torch.arange(-40, 41) / 4])
    y = y.to(dtype)
    got = kind.rounded(y)
    assert got.dtype is dtype
    assert got.tolist() == [by_the_law(value, kind) for value in y.tolist()]
    assert torch.equal(kind.rounded(got), got)


def test_the_numbers_of_four_bits() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    numbers = E2M1.numbers(codes, torch.float64)
    assert numbers.tolist() == [*E2M1_NUMBERS, *(-n for n in E2M1_NUMBERS)]
    assert torch.equal(E2M1.rounded(numbers), numbers)
    assert E2M1.largest == 12


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_codes_are_those_of_their_numbers(kind: Minifloat) -> None:
    codes = torch.arange(2 ** (1 + kind.exponent + kind.fraction), dtype=torch.uint8)
    numbers = kind.numbers(codes, torch.float32)
    assert len(numbers.unique()) == len(codes) - 1  # both zeros are one
    assert float(numbers.max()) == kind.largest
    again = kind.codes(numbers)
    assert torch.equal(again[numbers != 0], codes[numbers != 0])
    assert not again[numbers == 0].any()


def test_ties_zeros_bounds_and_nan() -> None:
    y = torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0, 0.0, 13.0, 1e30, -torch.inf])
    assert E2M1.rounded(y).tolist() == [0, 2, 2, 4, 4, 8, 8, 0, 12, 12, -12]
    assert E2M1.rounded(torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]


def test_a_preshifted_exponent_is_a_scale_to_the_bit() -> None:
    """E2M1(x; b + k) = 2^−k E2M1(2^k x; b) in fp32, whatever b is."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 3
    step = torch.tensor(2.0**-1.37)
    places = torch.arange(32) % 4
    scale = 1.0 / (torch.ones_like(places) << places)
    apart = E2M1.rounded(x / (step * scale)) * (step * scale)
    shifted = E2M1.rounded((x / scale) / step) * step * scale
    assert torch.equal(apart, shifted)
    assert not torch.equal(apart, E2M1.rounded(x / step) * step)


# ---- the formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.EMULATED)
def test_weights_are_the_nearest_numbers_of_their_row(name: str) -> None:
    weight = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[2] = 0
    share = torch.tensor([[1.0], [0.5], [0.7], [1.3], [0.9]])
    tensors = quantized(weight, share, name)
    formats.check(Format.of(name), tensors, 30)
    assert [t.dtype for t in tensors] == [torch.uint8, torch.float32]
    assert Format.of(name).nbytes(5, 30, 4) == 5 * 15 + 5 * 4
    found = formats.dequantize(name, tensors, torch.float64)
    for n in range(5):
        scale = float(tensors[1][n])
        assert scale == pytest.approx(float(share[n] * weight[n].abs().max()) / 12, rel=1e-6)
        for k in range(30):
            w = float(weight[n, k])
            expected = scale * by_the_law(w / scale, E2M1) if scale else 0.0
            assert float(found[n, k]) == pytest.approx(expected, rel=1e-12, abs=0)
    assert not found[2].any()
    assert torch.equal(
        formats.dequantize(name, formats.quantize(found, name), torch.float64)[0], found[0]
    )


def test_products_are_of_rounded_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, y = torch.randn(6, 32, generator=generator), torch.randn(3, 32, generator=generator) * 5
    tensors = formats.quantize(weight, "fp4")
    kept = formats.dequantize("fp4", tensors, torch.float64)
    seen = torch.tensor([[by_the_law(v, E2M1) for v in row] for row in y.tolist()]).double()
    got = formats.product(y.double(), "fp4", tensors)
    torch.testing.assert_close(got, seen @ kept.T, rtol=1e-13, atol=1e-13)
    floats = formats.product(y.double(), "fp4w", tensors)
    torch.testing.assert_close(floats, y.double() @ kept.T, rtol=1e-13, atol=1e-13)
    spec = Spec("none", 0.0, ("p0 + v0",), ("fp4",))
    bias = torch.randn(6, generator=generator)
    (result,) = meaning(y, tensors, [bias], spec.text())
    torch.testing.assert_close(result.double(), seen @ kept.T + bias.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", formats.EMULATED)
def test_the_emulation_can_be_traced(name: str) -> None:
    """Meta kernels are stricter than eager ones, of shifts above all."""
    y, weight = torch.randn(3, 32), torch.randn(6, 32)

    def product(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return formats.product(y, name, formats.quantize(weight, name))

    traced = make_fx(product, tracing_mode="fake")(y, weight)
    assert torch.equal(traced(y, weight), product(y, weight))


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="fp4: 5 features are no multiple of 2"):
        formats.quantize(torch.randn(2, 5), "fp4")
    with pytest.raises(ValueError, match=r"clip \[2, 3\] does not fit the rows"):
        quantized(torch.randn(2, 6), torch.ones(2, 3), "fp4")
