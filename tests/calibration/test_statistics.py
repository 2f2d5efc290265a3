"""Statistics: what they say, and that no trace is left of how rows were cut into batches."""

from __future__ import annotations

import pytest
import torch

from sparsecc.statistics import ROWS, Statistics


def values(rows: int = 2000, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    x[:, 1] *= 100
    x[:, 2] = 0
    x[:, 3] = 5
    return x


def seen(x: torch.Tensor, batch: int = 100, shard: int = 0) -> Statistics:
    found = Statistics(x.shape[-1], shard)
    for part in x.split(batch):
        found.update(part)
    return found


def same(a: Statistics, b: Statistics) -> None:
    assert a.rows == b.rows
    for exact in ("low", "high", "bins", "sample", "keys"):
        assert torch.equal(getattr(a, exact), getattr(b, exact)), exact
    for summed in ("total", "squares"):
        assert torch.allclose(getattr(a, summed), getattr(b, summed), rtol=1e-12)


def test_moments_and_ranges() -> None:
    x = values()
    found = seen(x)
    assert torch.equal(found.low, x.amin(0))
    assert torch.equal(found.high, x.amax(0))
    assert torch.equal(found.largest, x.abs().amax(0))
    assert torch.allclose(found.mean_magnitude, x.abs().mean(0), rtol=1e-12)
    assert torch.allclose(found.squares, x.square().sum(0), rtol=1e-12)


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99, 0.999])
def test_percentiles_are_right_to_a_bin(fraction: float) -> None:
    x = values()
    exact = float(x.abs().flatten().quantile(fraction))
    assert seen(x).percentile(fraction) == pytest.approx(exact, rel=0.05)


def test_extreme_percentiles() -> None:
    x = values()
    assert seen(x).percentile(1.0) == float(x.abs().max())
    assert seen(x).percentile(0.1) == 0.0  # a sixth of the elements is
    assert seen(torch.zeros(3, 2)).percentile(0.5) == 0.0
    assert seen(torch.full((3, 2), 1e30)).percentile(0.5) == pytest.approx(1e30)
    with pytest.raises(ValueError, match="between 0 and 1"):
        seen(x).percentile(1.5)


@pytest.mark.parametrize("batch", [1, 7, 511, 512, 513, 2000])
def test_batches_leave_no_trace(batch: int) -> None:
    same(seen(values(), batch), seen(values(), 100))


def test_ranks_of_axes_do_not_matter() -> None:
    x = values()
    found = Statistics(6)
    found.update(x.view(20, 10, 10, 6))
    same(found, seen(x))


def test_the_sample_is_of_rows_that_were_seen_and_spreads_over_all() -> None:
    x = torch.arange(20000.0)[:, None].expand(-1, 2)
    found = seen(x, 128)
    assert found.sample.shape == (ROWS, 2)
    places = found.sample[:, 0]
    assert len(places.unique()) == ROWS
    # Uniform: the mean of 512 draws from 0 … 20000 lies within five of its standard deviations.
    assert abs(float(places.mean()) - 10000) < 5 * 20000 / 12**0.5 / ROWS**0.5
    quarters = torch.histc(places, 4, 0, 20000)
    assert float(quarters.min()) > ROWS / 4 - 5 * (ROWS * 3 / 16) ** 0.5


def test_few_rows_are_all_kept() -> None:
    x = values(20)
    kept = seen(x).sample
    assert torch.equal(kept.sort(0)[0], x.float().sort(0)[0])


def test_parts_merge_into_the_whole() -> None:
    x = values()
    both = seen(x[:800]).merge(seen(x[800:], shard=1))
    whole = seen(x)
    assert both.rows == 2000
    for exact in ("low", "high", "bins"):
        assert torch.equal(getattr(both, exact), getattr(whole, exact))
    assert torch.allclose(both.total, whole.total, rtol=1e-12)
    assert both.sample.shape == (ROWS, 6)
    from_first = sum(any(torch.equal(row, r) for r in x[:800].float()) for row in both.sample[:100])
    assert 20 < from_first < 60  # of 100, two fifths are expected
    assert torch.equal(both.keys, both.keys.sort()[0])


def test_shards_draw_other_rows() -> None:
    assert not torch.equal(seen(values()).keys, seen(values(), shard=1).keys)


def test_merging_needs_the_same_features() -> None:
    with pytest.raises(ValueError, match="6 features and 2"):
        seen(values()).merge(seen(torch.ones(3, 2)))


@pytest.mark.parametrize(("wrong", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_what_is_not_finite_is_refused_whole(wrong: float, word: str) -> None:
    found = seen(values(10))
    x = values(10)
    x[3, 4] = wrong
    with pytest.raises(ValueError, match=word):
        found.update(x)
    same(found, seen(values(10)))


def test_no_rows_are_nothing() -> None:
    found = seen(values(10))
    found.update(torch.zeros(0, 6))
    same(found, seen(values(10)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = values().to(dtype)
    found, wide = seen(x), seen(x.double())
    same(found, wide)
    assert found.sample.dtype == torch.float32
