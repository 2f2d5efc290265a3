"""llm_fp4: exponents of channels, what the search gains, planted faults, and what runs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from calibration.models import decoder, rows, token_batches
from support import run
from torch import nn

from sparsecc.budget import formats_of, pruned
from sparsecc.errors import CalibrationError
from sparsecc.methods import make
from sparsecc.methods.common import columns
from sparsecc.methods.llm_fp4 import offsets, preshift
from sparsecc.methods.reference import apply, rounded_site
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.minifloat import E2M1
from sparsecc.simulate import simulate

Q, UP, DOWN = (f"blocks.0.{name}.weight" for name in ("q", "up", "down"))


@cache
def _seen() -> Observations:
    return observe(decoder(), token_batches())


@pytest.fixture
def seen() -> Observations:
    """Of a decoder with outlier channels."""
    return _seen()


def total(observations: Observations, recipe: Recipe) -> float:
    return sum(error**2 for error in apply(observations, recipe).values()) ** 0.5


def test_places_are_the_papers() -> None:
    largest = torch.tensor([12.0, 6.1, 3.0, 1.0, 0.01, 0.0], dtype=torch.float64)
    # b is 0, 0.98, 2, 3.6, 10.2 and that of the floor
    assert preshift(largest).tolist() == [0, 1, 2, 3, 3, 3]
    assert preshift(largest * 1000).tolist() == [0, 1, 2, 3, 3, 3]
    assert not preshift(torch.zeros(3, dtype=torch.float64)).any()


def test_scales_are_powers_of_two_of_the_channels_ranges(seen: Observations) -> None:
    recipe = make("llm_fp4", seen)
    assert set(recipe.sites.values()) == {"fp4"}
    for scale in recipe.scales.values():
        assert set(scale.tolist()) <= {1.0, 0.5, 0.25, 0.125}
        assert len(scale.unique()) > 1
    by_column, _ = columns(seen, recipe, Q)
    biases = torch.log2(12 / seen.input(Q).largest)
    assert torch.equal(-by_column.log2(), (biases.round() - biases.min().round()).clamp(0, 3))
    assert not make("llm_fp4", seen, shift=False).scales
    assert not make("llm_fp4", seen, activations=False).scales


def test_candidates_are_multiples_of_the_bias() -> None:
    bias = torch.tensor([6.0, 0.5, -5.0], dtype=torch.float64)
    found = offsets(bias)
    assert not found[0].any()
    gammas = torch.linspace(0.01, 1.2, 100, dtype=torch.float64)
    for column, size in enumerate((6.0, 4.0, 5.0)):
        tried = (gammas - 1) * size
        inside = tried[(tried > -1) & (tried < 1.5)]
        assert set(found[:, column].tolist()) == {0.0, *inside.tolist()}


@pytest.mark.parametrize("activations", [True, False])
def test_every_turn_of_the_search_gains(seen: Observations, activations: bool) -> None:
    errors = [
        total(seen, make("llm_fp4", seen, activations=activations, rounds=rounds))
        for rounds in (0, 1, 3)
    ]
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-6)


def test_exponents_of_channels_gain_where_they_differ(seen: Observations) -> None:
    shifted, plain = (apply(seen, make("llm_fp4", seen, shift=shift)) for shift in (True, False))
    assert shifted[Q] < 0.8 * plain[Q]
    recipe = make("llm_fp4", seen, rounds=0)
    wrong = replace(recipe, scales={n: 1 / s for n, s in recipe.scales.items()})  # planted
    for site in (Q, UP):  # with a step of their own
        scale, _ = columns(seen, wrong, site)
        wrong.activations[site] = float((seen.input(site).largest / scale).max()) / 12
        assert apply(seen, wrong)[site] > 1.5 * apply(seen, recipe)[site]


def test_biases_are_those_of_least_error(seen: Observations) -> None:
    """Of some rows, and of the tensor, against a plain search in fp64, the others as they were found."""
    recipe = make("llm_fp4", seen, rounds=20)  # until nothing changes
    scale, _ = columns(seen, recipe, DOWN)
    x = seen.input(DOWN).sample.double() / scale
    site = rounded_site(seen, recipe, DOWN)
    weight = seen.weight(DOWN).double() * scale / site.rows[:, None]
    exact, step = x @ weight.T, recipe.activations[DOWN]
    seen_by = E2M1.rounded(x / step) * step
    for row in (0, 17):
        bias = (12 / weight[row : row + 1].abs().amax(1)).log2()
        errors = {}
        for offset in offsets(bias)[:, 0].tolist():
            share = torch.tensor([[2.0**-offset]])
            tensors = formats.quantize(weight[row : row + 1], "fp4w", share)
            kept = formats.dequantize("fp4w", tensors, torch.float64)
            errors[offset] = float((seen_by @ kept[0] - exact[:, row]).square().sum())
        found = -float(recipe.clips[DOWN][row, 0].double().log2())
        assert errors[min(errors, key=lambda o: abs(o - found))] == pytest.approx(
            min(errors.values()), rel=1e-4
        )
    whole = float((seen.input(DOWN).largest / scale).max()) / 12
    bias = -torch.tensor([whole], dtype=torch.float64).log2()

    def error(t: float) -> float:
        return float(((E2M1.rounded(x / t) * t) @ site.weight.T - exact).square().sum())

    best = min(error(whole * 2.0**-o) for o in offsets(bias)[:, 0].tolist())
    assert error(step) == pytest.approx(best, rel=1e-4)


def test_readers_of_one_input_share_its_bias(seen: Observations) -> None:
    recipe = make("llm_fp4", seen)
    assert len({recipe.activations[f"blocks.0.{name}.weight"] for name in "qkv"}) == 1
    assert recipe.activations[UP] != recipe.activations[DOWN]


def test_rows_of_odd_size_become_int8() -> None:
    odd = observe(nn.Linear(25, 4).eval(), [rows(8, 25)])
    recipe = make("llm_fp4", odd)
    assert recipe.sites == {"weight": "int8"}
    assert not recipe.activations
    with pytest.raises(CalibrationError, match="rounds must be 0 or more, not -1"):
        make("llm_fp4", odd, rounds=-1)


def test_a_budget_keeps_steps_of_the_sites_that_stay(seen: Observations) -> None:
    recipe = make("llm_fp4", seen)
    assert formats_of(recipe, UP) == ["fp4"]
    assert formats_of(make("llm_fp4", seen, activations=False), UP) == ["fp4w", "int8x32"]
    left = pruned(recipe, {UP: "fp4"}, {n: tuple(x.consumers) for n, x in seen.links.items()})
    assert left.activations == {UP: recipe.activations[UP]}
    assert set(left.clips) == {UP}


@pytest.mark.parametrize("options", [{"codegen": "cpp"}, {"codegen": "aten"}])
def test_what_runs_is_the_emulation(options: dict[str, Any]) -> None:
    """A kernel of another format must not read these codes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval()
    x = rows(40)
    seen = observe(model, [x])
    recipe = make("llm_fp4", seen)
    (simulated,) = simulate(model, recipe, seen, [x])
    with torch.no_grad():
        result, report = run(model, x, recipe=recipe, **options)
        lost = float((simulated - model(x)).norm())
    assert report["quantize-linear"].applied == 2
    assert {k.chosen for k in report.graphs[0].kernels} == {"aten"}
    if options["codegen"] == "cpp":
        assert "no kernel reads it" in report.graphs[0].kernels[0].reason
    assert lost > 0.1
    assert float((result - simulated).norm()) < 0.1 * lost
