"""noisyquant: what its noise gains over w8a8, that it is a shift and nothing else, and where there is none."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from calibration.models import LN_AS_IT_IS, Chain, decoder, rows, token_batches
from support import check_exact, fp64, randomise, run
from torch import nn

from sparsecc.methods import make
from sparsecc.methods.common import columns, rounded
from sparsecc.methods.reference import apply
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.recipe import Recipe

LINK = "norm-linear: 1.weight"


def crowded(spread: float = 0.0) -> nn.Module:
    """One wide channel sets the step; others stay within a tenth of it, at the middle between two codes.

    Args:
        spread: how far from the middle, in steps.
    """
    model = randomise(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))).eval()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 3.0, 0.0
        step = float(model[0](rows(256))[:, 3].abs().max()) / 127
        others = torch.arange(32) != 3
        model[0].weight[others] = 0.02 * step
        model[0].bias[others] = ((torch.arange(32) % 7 + 0.5) * step)[others]
        model[0].bias[others] += (
            spread * step * (2 * torch.rand(31, generator=torch.Generator().manual_seed(0)) - 1)
        )
        model[0].weight[9], model[0].bias[9] = 0.0, 0.0  # dead
    return model


@cache
def _crowded() -> tuple[nn.Module, Observations]:
    model = crowded()
    return model, observe(model, [rows(256)], LN_AS_IT_IS)


def lost(seen: Observations, recipe: Recipe, site: str) -> float:
    """‖Q(x') s + z − x‖ of what a site reads."""
    x = seen.input(site).sample.double()
    scale, shift = columns(seen, recipe, site)
    y = (x - shift) / scale
    return float(((rounded(y, recipe.activations[site]) * scale + shift) - x).norm())


def test_values_that_crowd_between_codes_are_told_apart() -> None:
    _, seen = _crowded()
    noisy, plain = make("noisyquant", seen), make("w8a8", seen)
    assert noisy.sites == plain.sites
    assert lost(seen, noisy, "1.weight") < 0.2 * lost(seen, plain, "1.weight")
    assert apply(seen, noisy)["1.weight"] < 0.2 * apply(seen, plain)["1.weight"]
    wrong = replace(noisy, shifts={LINK: noisy.shifts[LINK] / 2})  # planted: less than was found
    assert apply(seen, wrong)["1.weight"] > 2 * apply(seen, noisy)["1.weight"]


def test_a_channel_that_is_always_zero_stays_exact() -> None:
    _, seen = _crowded()
    shift = make("noisyquant", seen).shifts[LINK]
    by_column = columns(seen, make("noisyquant", seen), "1.weight")[1]
    assert int((shift == 0).sum()) == 1
    assert float(by_column[9]) == 0.0


def test_the_noise_is_the_seeds() -> None:
    """Where channels crowd at places of their own, no mean serves them all."""
    seen = observe(crowded(0.3), [rows(64)], LN_AS_IT_IS)
    first, again, other = (make("noisyquant", seen, seed=seed).shifts[LINK] for seed in (1, 1, 7))
    assert torch.equal(first, again)
    assert (
        apply(seen, make("noisyquant", seen))["1.weight"]
        < apply(seen, make("w8a8", seen))["1.weight"]
    )
    assert len(first.unique()) > 20
    assert not torch.equal(first, other)


@pytest.mark.parametrize("choose", ["max", "mse"])
@pytest.mark.parametrize("skewed", [False, True])
def test_no_layer_is_worse_than_without(choose: str, skewed: bool) -> None:
    options = LN_AS_IT_IS if skewed else {}
    model, data = (Chain().eval(), [rows()]) if skewed else (decoder(), token_batches(1))
    seen = observe(model, data, options)
    noisy, plain = (apply(seen, make(m, seen, choose=choose)) for m in ("noisyquant", "w8a8"))
    total = [sum(error**2 for error in each.values()) for each in (noisy, plain)]
    assert total[0] <= total[1] * (1 + 1e-9)
    if skewed:  # the mean alone centres the skewed channel
        assert total[0] < 0.8 * total[1]


def test_adding_noise_changes_nothing_where_nothing_is_rounded() -> None:
    model, seen = _crowded()
    recipe = make("noisyquant", seen)
    passes = {"migrate-channels": {"recipe": replace(recipe, scales={})}}
    check_exact(fp64(model), rows().double(), applied={"migrate-channels": 1}, passes=passes)


def test_a_compiled_model_has_the_noise() -> None:
    model, seen = _crowded()
    x, recipe = rows(), make("noisyquant", seen)
    plain = make("w8a8", seen)
    with torch.no_grad():
        exact = fp64(model)(x.double())
        noisy, report = run(model, x, recipe=recipe, **LN_AS_IT_IS)
        without, _ = run(model, x, recipe=plain, **LN_AS_IT_IS)
    assert report["migrate-channels"].applied == 1
    assert report["quantize-linear"].applied == 1
    assert float((noisy - exact).norm()) < 0.5 * float((without - exact).norm())


def test_without_a_link_that_carries_a_shift_it_is_w8a8() -> None:
    """RMSNorms have no place for one, nor has ReLU."""
    seen = observe(decoder(), token_batches(1))
    links = {n: replace(link, carries_shift=False) for n, link in seen.links.items()}
    unshifted = replace(seen, links=links)
    noisy, plain = make("noisyquant", unshifted), make("w8a8", unshifted)
    assert not noisy.shifts
    assert noisy.activations == plain.activations
    assert all(torch.equal(noisy.scales[n], s) for n, s in plain.scales.items())
