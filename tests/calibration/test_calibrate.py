"""``calibrate``: budgets hold on data that was held back, searches against plain ones, and every error."""

from __future__ import annotations

import logging
import math
from itertools import product
from typing import Any

import pytest
import torch
from calibration.models import LN_AS_IT_IS, Chain, decoder, rows, token_batches
from support import fp64, randomise
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc import latency
from sparsecc.budget import DENSE, Rung, formats_of, lower_hull, nbytes, path
from sparsecc.errors import CalibrationError
from sparsecc.methods import make
from sparsecc.metrics import METRICS, logits
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.proof import compare
from sparsecc.recipe import Recipe
from sparsecc.simulate import simulate

HELD = 2


def measured(model: nn.Module, recipe: Recipe, metric: str, seen: Observations) -> float:
    """The metric on the last batches, by the definition and the simulation."""
    held = token_batches(6)[-HELD:]
    got = torch.cat(simulate(model, recipe, seen, held)).double().flatten(0, 1)
    with torch.no_grad():
        exact = torch.cat([model(batch) for batch in held]).double().flatten(0, 1)
    if metric == "kl":
        p = exact.softmax(-1)
        return float((p * (p.log() - got.softmax(-1).log())).sum(-1).mean())
    if metric == "rmse":
        return float((got - exact).norm() / exact.norm())
    if metric == "agreement":
        return float((got.argmax(-1) != exact.argmax(-1)).double().mean())
    tokens = torch.cat(held)
    losses = [
        F.cross_entropy(v.unflatten(0, tokens.shape)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for v in (got, exact)
    ]
    return float(losses[0].exp() / losses[1].exp()) - 1


# ---- simulation ---------------------------------------------------------------------------------------


def is_as_near_to_fp64(got: torch.Tensor, model: nn.Module, batch: torch.Tensor) -> bool:
    """By the rule of ``verify``."""
    with torch.no_grad():
        return compare("result", got, model(batch), fp64(model)(batch)).passed


def test_without_a_recipe_a_simulation_is_the_model() -> None:
    model, batches = decoder(), token_batches(2)
    seen = observe(model, batches)
    for got, batch in zip(simulate(model, None, seen, batches), batches, strict=True):
        assert is_as_near_to_fp64(got, model, batch)


@pytest.mark.parametrize("kind", ["decoder", "chain"])
def test_scales_and_shifts_alone_change_nothing(kind: str) -> None:
    model = (decoder() if kind == "decoder" else Chain().eval()).double()
    x = token_batches(1)[0] if kind == "decoder" else rows().double()
    options = {} if kind == "decoder" else LN_AS_IT_IS
    seen = observe(model, [x], options)
    recipe = make("smoothquant", seen)
    for name, link in seen.movable().items():
        if link.carries_shift:
            recipe.shifts[name] = torch.linspace(-1, 1, link.size)
    recipe.sites = dict.fromkeys(recipe.sites, "dense")
    (got,) = simulate(model, recipe, seen, [x], options)
    (own,) = simulate(model, None, seen, [x], options)
    assert float((got - own).norm() / own.norm()) < 1e-5  # simulated layers are fp32


def test_rounding_at_one_site_is_that_of_the_weight() -> None:
    """Against a copy of the model with the rounded weight in it."""
    model, (batch,) = decoder(), token_batches(1)
    seen = observe(model, [batch], {"passes": []})
    recipe = make("int4", seen, skip=[name for name in seen.sites if "down" not in name])
    (got,) = simulate(model, recipe, seen, [batch], {"passes": []})
    from sparsecc.runtime.ops import formats

    with torch.no_grad():
        weight = model.blocks[0].down.weight
        parts = formats.quantize(weight.double(), "int4g128z")
        weight.copy_(formats.dequantize("int4g128z", parts, torch.float32))
    assert is_as_near_to_fp64(got, model, batch)


# ---- budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "budget"),
    [("kl", 6e-4), ("rmse", 0.02), ("agreement", 0.005), ("perplexity", 0.003)],
)
def test_the_budget_holds_on_what_was_held_back(metric: str, budget: float) -> None:
    model = decoder()
    recipe = sparsecc.calibrate(
        model, token_batches(6), methods=["int4"], budget=budget, metric=metric, held_back=0.34
    )
    seen = observe(model, token_batches(6)[:-HELD])
    value = measured(model, recipe, metric, seen)
    assert recipe.budget["measured"] == pytest.approx(value, rel=1e-3, abs=1e-7)
    assert value <= budget
    assert recipe.budget["held"]
    assert recipe.budget["batches"] == HELD
    assert recipe.about["rows"] == 4 * 64
    assert recipe.sites
    # What is cheaper by its next step did not hold.
    cheaper = [e["bytes"] for e in recipe.tried if e["held"]]
    assert min(cheaper) == recipe.about["bytes"]


def test_a_tighter_budget_costs_more() -> None:
    model, batches = decoder(), token_batches(6)
    sizes = []
    for budget in (1e-2, 6e-4, 2e-5, 1e-7):
        recipe = sparsecc.calibrate(model, batches, methods=["int4"], budget=budget)
        sizes.append(recipe.about["bytes"])
        assert recipe.budget["measured"] <= budget
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 3


def test_the_cheapest_method_that_holds_is_chosen() -> None:
    model, batches = decoder(), token_batches(6)
    recipe = sparsecc.calibrate(
        model, batches, methods={"int8": {}, "awq": {"group": 32}, "smoothquant": {}}, budget=1e-3
    )
    assert recipe.method == "awq"
    assert recipe.options["group"] == 32
    assert {e["method"] for e in recipe.tried} == {"int8", "awq", "smoothquant"}
    assert recipe.scales
    assert recipe.clips


def test_what_costs_more_than_another_method_is_not_measured() -> None:
    model, batches = decoder(), token_batches(6)
    both = sparsecc.calibrate(model, batches, methods=["int8", "int4"], budget=1.1e-5)
    alone = sparsecc.calibrate(model, batches, methods=["int4"], budget=1.1e-5)
    whole = both.tried[0]
    assert (whole["method"], whole["held"]) == ("int8", True)
    assert all(e["bytes"] <= whole["bytes"] for e in both.tried)
    assert any(e["bytes"] > whole["bytes"] for e in alone.tried)
    assert both.about["bytes"] == min(whole["bytes"], alone.about["bytes"])


def test_what_serves_other_sites_is_left_out() -> None:
    """A recipe for some sites has their numbers alone."""
    recipe = sparsecc.calibrate(
        decoder(), token_batches(6), methods=["awq"], budget=2e-5, metric="kl"
    )
    forms = set(recipe.sites.values())
    assert len(recipe.sites) < 8 or forms != {"int4g64z", "int4g128z"}
    assert set(recipe.shapes) == set(recipe.sites)
    assert set(recipe.clips) <= {s for s, f in recipe.sites.items() if f.startswith("int4")}
    assert all(any(site in name for site in recipe.sites) for name in recipe.scales)


def test_too_small_a_budget_leaves_the_model_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = decoder(), token_batches(4)
    with caplog.at_level(logging.WARNING, "sparsecc"):
        recipe = sparsecc.calibrate(model, batches, budget=1e-15)
    assert recipe.sites == {}
    assert recipe.scales == {}
    assert not recipe.budget["held"]
    assert recipe.tried
    assert not any(entry["held"] for entry in recipe.tried)
    assert recipe.about["bytes"] == recipe.about["bytes_before"]
    assert "no layer can be quantized with kl of at most 1e-15" in caplog.text
    with pytest.raises(CalibrationError, match="no layer can be quantized"):
        sparsecc.calibrate(model, batches, budget=1e-15, require=True)


def test_without_a_budget_the_recipe_is_the_methods() -> None:
    model = decoder()
    recipe = sparsecc.calibrate(
        model, iter(token_batches(2)), methods={"smoothquant": {"alpha": 0.6}}
    )
    expected = make("smoothquant", observe(model, token_batches(2)), alpha=0.6)
    assert recipe.sites == expected.sites
    assert all(torch.equal(s, expected.scales[name]) for name, s in recipe.scales.items())
    assert recipe.budget == {}
    assert recipe.about["bytes"] < 0.3 * recipe.about["bytes_before"]


def test_time_is_saved_by_a_table() -> None:
    """int8 is slower than nothing at one layer, faster at the others."""
    model, batches = decoder(), token_batches(6)
    names = observe(model, batches[:1]).sites
    table = {name: {"dense": 2.0, "int8x32": 1.0} for name in names}
    table["head.weight"]["int8x32"] = 3.0
    recipe = sparsecc.calibrate(model, batches, budget=1e-2, target="latency", latency=table)
    assert set(recipe.sites) == set(names) - {"head.weight"}
    assert recipe.tried[-1]["latency"] == 2.0 + len(names) - 1
    del table["head.weight"]
    with pytest.raises(CalibrationError, match=r"no entry for head\.weight"):
        sparsecc.calibrate(model, batches, budget=1e-2, target="latency", latency=table)


def test_time_is_measured_where_no_table_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = decoder(), token_batches(6)
    asked = []

    def seconds(shape: tuple[int, int], dtype: torch.dtype, rows: int, form: str) -> float:
        asked.append((shape, dtype, rows, form))
        return 1.0 if form == "int8x32" else 2.0

    monkeypatch.setattr(latency, "_seconds", seconds)
    recipe = sparsecc.calibrate(model, batches, budget=1.0, target="latency", rows=3)
    assert recipe.budget["target"] == "latency"
    assert recipe.tried[-1]["latency"] == len(recipe.sites)
    assert len(set(asked)) == len(asked)  # layers of one shape are measured once
    assert {rows for *_, rows, _ in asked} == {3}


def test_what_is_measured() -> None:
    model, batches = decoder(), token_batches(1)
    table = latency.measured(observe(model, batches), rows=2)
    up = table["blocks.0.up.weight"]
    assert 0 < up["int8x32"] < 1e-3
    assert 0 < up["dense"] < 1e-3
    assert table["blocks.0.gate.weight"] is up
    with pytest.raises(CalibrationError, match="'fp4' cannot be measured here"):
        up["fp4"]


def test_large_outputs_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = decoder(), token_batches(6)
    kept = sparsecc.calibrate(model, batches, methods=["int4"], budget=6e-4)
    monkeypatch.setattr("sparsecc.calibration._KEPT", 0)
    again = sparsecc.calibrate(model, batches, methods=["int4"], budget=6e-4)
    assert again.tried == kept.tried


def test_a_tied_head_can_be_left_alone() -> None:
    model, batches = decoder(tied=True), token_batches(4)
    recipe = sparsecc.calibrate(model, batches)
    assert recipe.sites["embed.weight"] == "int8x32"
    assert "embed.weight" not in sparsecc.calibrate(model, batches, skip=["embed.*"]).sites


def test_half_precision_models() -> None:
    model = decoder().to(torch.bfloat16)
    recipe = sparsecc.calibrate(model, token_batches(4), methods=["int4"], budget=0.1)
    assert recipe.sites
    assert recipe.about["bytes_before"] == 2 * sum(
        math.prod(s.shape) for s in observe(model, token_batches(1)).sites.values()
    )


# ---- ladders ------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_parts() -> None:
    seen = observe(decoder(), token_batches(1))
    site, (features, size) = "blocks.0.down.weight", (64, 128)
    recipe = make("lorc", seen, rank=4)
    count = features * size
    assert nbytes(seen, Recipe(""), site, DENSE) == 4 * count
    assert nbytes(seen, Recipe(""), site, "int8") == count + 4 * features
    assert nbytes(seen, Recipe(""), site, "int8s") == count + 4 * features
    assert nbytes(seen, Recipe(""), site, "int4g128z") == count // 2 + 4 * features
    assert nbytes(seen, Recipe(""), site, "int4g32z") == count // 2 + 4 * features * 4
    assert nbytes(seen, recipe, site, "int4g128z") == count // 2 + 4 * features + 4 * 4 * (64 + 128)
    assert formats_of(recipe, site) == ["int4g128z", "int4g32z", "int8x32"]
    assert formats_of(make("w8a8", seen), site) == ["int8s"]


def test_the_hull_holds_what_no_mixture_beats() -> None:
    rungs = [Rung(*r) for r in (("a", 1, 10), ("b", 2, 9), ("c", 3, 2), ("d", 4, 5), ("e", 9, 0))]
    assert [r.form for r in lower_hull(rungs)] == ["a", "c", "e"]
    slower = [Rung("int8", 5.0, 1.0), Rung(DENSE, 2.0, 0.0)]
    assert [r.form for r in lower_hull(slower)] == [DENSE]


def test_steps_are_the_best_choice_for_their_cost() -> None:
    """Against all choices: along the path none of the same cost or less has less error."""
    generator = torch.Generator().manual_seed(0)
    ladders = {}
    for site in "wxyz":
        cost, error = torch.rand(2, 3, generator=generator).sort(-1)[0].tolist()
        ladders[site] = [Rung(f"f{i}", cost[i], error[2 - i]) for i in range(3)]
        ladders[site].append(Rung(DENSE, cost[2] + 1, 0.0))
    state = {site: rungs[0] for site, rungs in ladders.items()}
    every = [
        (sum(r.cost for r in choice), sum(r.error for r in choice))
        for choice in product(*ladders.values())
    ]
    steps = path(ladders)
    assert len(steps) >= 4
    for site, form in steps:
        state[site] = next(r for r in ladders[site] if r.form == form)
        cost = sum(r.cost for r in state.values())
        error = sum(r.error for r in state.values())
        assert all(e >= error - 1e-12 for c, e in every if c <= cost + 1e-12)
    assert {r.form for r in state.values()} == {DENSE}


# ---- metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_no_difference_is_zero(metric: str) -> None:
    (batch,) = token_batches(1)
    same = 5 * F.one_hot(batch.roll(-1, 1), 40).double()  # names every next token
    found = METRICS[metric]
    assert found.of(*found.sums(same, same.clone(), batch)) == 0
    assert found.of(*found.sums(-same, same, batch)) > 0


def test_labels_of_sequences_and_classes() -> None:
    exact, got = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    labels = torch.randint(0, 7, (3, 5))
    labels[0, 2:] = -100
    found = METRICS["perplexity"]
    value = found.of(*found.sums(got, exact, {"input_ids": labels * 0, "labels": labels}))
    losses = [
        F.cross_entropy(v[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) for v in (got, exact)
    ]
    assert value == pytest.approx(math.exp(losses[0] - losses[1]) - 1, rel=1e-5)
    classes = torch.tensor([0, 3, 6])
    batch = {"x": torch.zeros(3, 9), "labels": classes}
    value = found.of(*found.sums(got[:, 0], exact[:, 0], batch))
    losses = [F.cross_entropy(v[:, 0], classes) for v in (got, exact)]
    assert value == pytest.approx(math.exp(losses[0] - losses[1]) - 1, rel=1e-5)
    with pytest.raises(CalibrationError, match="needs labels"):
        found.sums(got, exact, torch.zeros(3, 9))


def test_logits_are_found_in_what_models_return() -> None:
    value = torch.ones(2, 3)
    outputs = (value, (value, 1), [value], {"logits": value}, {"first": value, "logits": value})
    for output in (*outputs, type("Output", (), {"logits": value})()):
        assert logits(output) is value
    for output in (None, 3, (), {}, torch.tensor([1, 2])):
        with pytest.raises(CalibrationError, match="no tensor of logits"):
            logits(output)


# ---- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"methods": "int8"}, "methods are a list"),
        ({"methods": []}, "methods are a list"),
        ({"methods": ["int8", "awq"]}, "need a budget"),
        ({"methods": ["ing8"]}, "Did you mean 'int8'"),
        ({"budget": 0}, "above 0"),
        ({"budget": math.nan}, "above 0"),
        ({"budget": 1, "metric": "perplexty"}, "Did you mean 'perplexity'"),
        ({"budget": 1, "held_back": 1}, "held_back"),
        ({"budget": 1, "target": "speed"}, "unknown target"),
        ({"budget": 1, "target": "latency", "rows": 0}, "at least 1, not 0"),
        ({"budget": 1, "latency": {}}, "needs target='latency'"),
        ({"skip": ["nothing.*"]}, "unknown site"),
        ({"budget": 1, "batches": 1}, "at least two are needed, not 1"),
        ({"batches": 0}, "no batches"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    batches = token_batches(arguments.pop("batches", 3))
    with pytest.raises(CalibrationError, match=words):
        sparsecc.calibrate(decoder(), batches, **arguments)


def test_a_model_whose_output_cannot_be_judged() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).argmax(-1)

    with pytest.raises(CalibrationError, match="no tensor of logits"):
        sparsecc.calibrate(randomise(Silent()).eval(), [rows(), rows()], budget=1)
