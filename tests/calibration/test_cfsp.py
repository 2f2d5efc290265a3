"""CFSP: shares of blocks, scores of neurons, and a recipe that the pass carries out."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from calibration.models import decoder, token_batches
from support import error, run
from torch import nn

import sparsecc
from sparsecc.errors import CalibrationError, OptionsError
from sparsecc.methods.cfsp import allocate, cfsp, neuron_scores
from sparsecc.networks import Networks, angles, block_angles, networks, outermost
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.recipe import Recipe
from sparsecc.simulate_sparse import simulated_sparse
from sparsecc.sparsity import density

DOWN = "blocks.0.down.weight"
LAYERS = ("blocks.0.gate.weight", "blocks.0.up.weight")


@cache
def _model() -> nn.Module:
    """Two blocks; in the first one ten neurons never fire, by their rows of up."""
    model = decoder(layers=2)
    with torch.no_grad():
        model.blocks[0].up.weight[:10] = 0
        model.blocks[1].o.weight *= 0.2  # turns its input less than the first
        model.blocks[1].down.weight *= 0.2
    return model


@cache
def _seen() -> Observations:
    return observe(_model(), token_batches(2))


@cache
def _networks() -> Networks:
    return networks(_model(), token_batches(1)[0])


def test_networks_are_found_by_their_sites() -> None:
    assert _networks() == {
        f"blocks.{i}.down.weight": (f"blocks.{i}.gate.weight", f"blocks.{i}.up.weight")
        for i in range(2)
    }
    both, down = nn.Linear(8, 12), nn.Linear(12, 8)
    assert networks(nn.Sequential(both, nn.GELU(), down).eval(), torch.randn(3, 8)) == {
        "2.weight": ("0.weight",)
    }
    with pytest.raises(CalibrationError, match="no feed-forward network"):
        networks(nn.Linear(8, 8).eval(), torch.randn(3, 8))


def test_the_recipe_is_carried_out_and_equals_a_mask() -> None:
    model, batch = _model(), token_batches(1)[0]
    importance = block_angles(model, token_batches(2), ["blocks.?"])
    assert importance["blocks.0"] > importance["blocks.1"] > 0
    recipe = cfsp(_seen(), _networks(), 0.25, importance, amplification=2.0, multiple=8)
    widths = {name: len(kept) for name, kept in recipe.neurons.items()}
    assert widths["blocks.1.down.weight"] < widths[DOWN] < 128
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in recipe.neurons.items():
            mask = torch.zeros(128).index_fill(0, kept, 1)
            masked.get_parameter(name).mul_(mask)
        result, report = run(model, batch, recipe=recipe)
        assert report["prune-neurons"].applied == len(recipe.neurons) == 2
        assert error(result, masked(batch)) < 1e-5
        assert error(masked(batch), model(batch)) > 1e-3


@pytest.mark.parametrize("prune", [0.0, 0.05, 0.3, 0.7])
def test_shares_add_up_and_none_is_whole(prune: float) -> None:
    shares = allocate([0.1, 0.11, 0.15, 0.3, 0.02], prune, 40.0)
    assert sum(shares) / len(shares) == pytest.approx(1 - prune, abs=1e-12)
    assert max(shares) <= 1 + 1e-12
    assert prune == 0 or max(shares) < 1
    assert all(share > 0 for share in shares)
    order = sorted(range(5), key=[0.1, 0.11, 0.15, 0.3, 0.02].__getitem__)
    assert prune == 0 or sorted(range(5), key=shares.__getitem__) == order
    assert allocate([0.1, 0.1], prune, 40.0) == pytest.approx([1 - prune] * 2)
    assert all(math.isfinite(s) for s in allocate([0.0, 1.0], 0.5, 1e9))


def test_widths_are_multiples() -> None:
    for multiple, prune in ((128, 0.5), (32, 0.4), (1, 0.333)):
        recipe = cfsp(_seen(), _networks(), prune, multiple=multiple)
        wanted = max(multiple, round((1 - prune) * 128 / multiple) * multiple)
        kept = {len(neurons) for neurons in recipe.neurons.values()}
        assert kept == ({wanted} if wanted < 128 else set())
        for name, neurons in recipe.neurons.items():
            assert neurons.dtype is torch.int64
            assert bool((neurons.diff() > 0).all())
            assert recipe.sparsity[name] == {"law": "prune", "keep": wanted / 128}


def test_neurons_that_never_fire_go_first() -> None:
    recipe = cfsp(_seen(), {DOWN: LAYERS}, 10 / 128, multiple=1)
    assert recipe.neurons[DOWN].tolist() == list(range(10, 128))


def _by_hand(seen: Observations, axis: int) -> torch.Tensor:
    """The score with each |W| [d, F] divided by its sums over ``axis``."""
    norms = seen.input(DOWN).squares.sqrt()
    down = seen.weight(DOWN).double().abs() * norms
    total = sum(
        (w / w.sum(axis, keepdim=True).clamp(min=1e-300)).mean(0)
        for w in (down, *(seen.weight(site).double().abs().T for site in LAYERS))
    )
    return total * norms


def test_scores_are_relative_to_the_row() -> None:
    """Dividing by a neuron's own sum, as the published code does, leaves the order of the norms alone."""
    seen = _seen()
    norms = seen.input(DOWN).squares.sqrt()
    alive = norms > 0
    scores = neuron_scores(seen, DOWN, LAYERS)
    assert torch.allclose(scores, _by_hand(seen, 1), rtol=1e-12)

    def order(values: torch.Tensor) -> list[int]:
        return values[alive].argsort(stable=True).tolist()

    quirk = _by_hand(seen, 0)
    assert torch.allclose(quirk[alive], norms[alive] * 3 / 64, rtol=1e-9)
    assert order(scores) != order(norms)


def test_a_fused_gate_and_up_scores_as_two() -> None:
    seen = copy.deepcopy(_seen())
    site = copy.copy(seen.sites[LAYERS[0]])
    site.weight = torch.cat([seen.weight(name) for name in LAYERS])
    site.shape = list(site.weight.shape)
    seen.sites["both"] = site
    fused = neuron_scores(seen, DOWN, ["both"])
    assert torch.allclose(fused, neuron_scores(seen, DOWN, LAYERS), rtol=1e-12)
    assert cfsp(seen, {DOWN: ["both"]}, 0.5, multiple=1).neurons[DOWN].numel() == 64


def test_angles() -> None:
    x = torch.randn(4, 7, dtype=torch.float64)
    same = angles(x, x * (1 + 1e-7))  # a cosine that rounds above 1
    assert bool(same.isfinite().all())
    assert float(same.max()) < 1e-6
    assert angles(x, -x).tolist() == pytest.approx([1.0] * 4)
    assert float(angles(torch.zeros(1, 3), torch.ones(1, 3))) == pytest.approx(0.5)
    turned = torch.stack([-x[:, 1], x[:, 0]], -1)
    assert angles(x[:, :2], turned).tolist() == pytest.approx([0.5] * 4)


def test_block_angles_take_hooks_away_and_say_what_is_wrong() -> None:
    model = _model()
    with pytest.raises(OptionsError, match=r"blocks\.0"):
        block_angles(model, token_batches(1), "block.0")
    with pytest.raises(CalibrationError, match=r"blocks\.0\.up is no block.*\[4, 16, 128\]"):
        block_angles(model, token_batches(1), "blocks.0.up")
    with pytest.raises(CalibrationError, match="not called"):
        block_angles(model, [], "blocks.?")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sparsity": 1.0}, "from 0 to below 1"),
        ({"sparsity": -0.1}, "share of 0 to 1"),
        ({"multiple": 0}, "above 0"),
        ({"networks": {}}, "no networks"),
        ({"networks": {DOWN: ["blocks.0.gat.weight"]}}, "Did you mean 'blocks.0.gate.weight'"),
        ({"networks": {DOWN: ["blocks.0.q.weight"]}}, "not the layers before"),
        ({"importance": {"block": 0.1}}, "in none of the blocks"),
        ({"skip": ["*.dwon.weight"]}, "unknown site"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        cfsp(_seen(), **{"networks": _networks(), **given})


def test_the_recipe_survives_its_file_and_skips(tmp_path: Any) -> None:
    recipe = cfsp(_seen(), _networks(), 0.5, multiple=8, skip=[DOWN])
    assert set(recipe.neurons) == {"blocks.1.down.weight"}
    recipe.save(tmp_path / "recipe.json")
    again = Recipe.load(tmp_path / "recipe.json")
    assert again.sparsity == recipe.sparsity
    assert again.options == recipe.options
    for name, kept in recipe.neurons.items():
        assert torch.equal(again.neurons[name], kept)


# ---- sparsify ----------------------------------------------------------------------------------------------


def test_sparsify_finds_networks_and_angles() -> None:
    model, batches = _model(), token_batches(2)
    given = {"amplification": 2.0, "multiple": 8}
    recipe = sparsecc.sparsify(model, batches, "cfsp", sparsity=0.25, blocks="blocks.*", **given)
    by_hand = cfsp(
        observe(model, batches),
        _networks(),
        0.25,
        block_angles(model, batches, "blocks.?"),
        **given,
    )
    assert recipe.sparsity == by_hand.sparsity
    assert len({entry["keep"] for entry in recipe.sparsity.values()}) == 2
    for name, kept in by_hand.neurons.items():
        assert torch.equal(recipe.neurons[name], kept)
    assert recipe.options == {**by_hand.options, "blocks": ["blocks.*"]}
    alike = sparsecc.sparsify(model, batches, "cfsp", sparsity=0.25, multiple=8)
    assert {entry["keep"] for entry in alike.sparsity.values()} == {0.75}


def test_a_budget_is_measured_as_the_compiled_model_runs() -> None:
    model, batches = _model(), token_batches(4)
    recipe = sparsecc.sparsify(
        model, batches, "cfsp", budget=0.02, metric="rmse", multiple=4, blocks="blocks.*"
    )
    assert recipe.budget["held"]
    assert 0 < recipe.budget["measured"] <= 0.02
    assert {entry["held"] for entry in recipe.tried} == {True, False}
    assert 0 < density(recipe) < 1
    with torch.no_grad():
        exact, (got, report) = model(batches[-1]), run(model, batches[-1], recipe=recipe)
    assert report["prune-neurons"].applied == len(recipe.neurons) > 0
    rmse = float((got - exact).double().norm() / exact.double().norm())
    assert rmse == pytest.approx(recipe.budget["measured"], rel=1e-3)
    with simulated_sparse(model) as simulation:
        simulation.use(recipe)
        assert error(got, simulation(batches[-1])) < 1e-5


def test_a_network_that_stays_whole_counts() -> None:
    recipe = cfsp(_seen(), _networks(), 0.5, skip=[DOWN])
    assert density(recipe) == 1  # of 128 neurons at least one group of 128 stays
    assert density(cfsp(_seen(), _networks(), 0.0)) == 1
    recipe = cfsp(_seen(), _networks(), 0.25, {"blocks.0": 9.0, "blocks.1": 0.0}, multiple=64)
    assert len(recipe.sparsity) == 1
    assert density(recipe) == 0.75


def test_outer_modules_stand_for_their_parts() -> None:
    assert list(outermost(_model(), "blocks.*")) == ["blocks.0", "blocks.1"]
    assert list(outermost(_model(), ["blocks.1.up", "blocks.?"])) == ["blocks.0", "blocks.1"]
    assert list(outermost(_model(), ["*", "blocks.0"])) == [""]


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (_model, {"networks": {}}, "finds networks itself"),
        (_model, {"sparsity": 0.5, "budget": 0.1}, "not both"),
        (_model, {"multiple": 0.5}, "whole number"),
        (lambda: _model().forward, {"blocks": "blocks.?"}, "the model is a method"),
    ],
)
def test_wrong_use_of_sparsify(model: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        sparsecc.sparsify(model(), token_batches(2), "cfsp", **given)
