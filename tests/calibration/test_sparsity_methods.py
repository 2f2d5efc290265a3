"""Methods of sparsity: what they observe, the numbers that they choose, and models that run by them."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
from calibration.models import decoder, token_batches
from sparse_models import FFN, NEURONS, D, Flat
from support import error, randomise, run
from torch import nn

import sparsecc
from sparsecc.errors import CalibrationError
from sparsecc.ffn_statistics import FFNStatistics
from sparsecc.methods import SPARSITY, make
from sparsecc.methods.cett import left_out, threshold
from sparsecc.observe_ffn import observe_ffn
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import cores
from sparsecc.runtime.ops.sparse_ffn import Spec, selected
from sparsecc.simulate_sparse import simulated_sparse
from sparsecc.statistics import Statistics

DOWN = "down.weight"
BATCHES = [torch.randn(6, 40, D, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def model(kind: str = "gated", act: str = "silu") -> FFN:
    made = randomise(FFN(kind, act)).eval()
    assert isinstance(made, FFN)
    return made


def values(ffn: FFN) -> tuple[torch.Tensor, torch.Tensor]:
    """|a| and h of all tokens, fp64."""
    wide = randomise(FFN(ffn.kind)).double()
    wide.load_state_dict(ffn.state_dict())
    wide.act = ffn.act
    with torch.no_grad():
        x = torch.cat(BATCHES).double()
        return wide.act(wide.parts(x)[0]).abs(), wide.hidden(x)


# ---- observation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "gated", "fused", "swapped"])
def test_what_is_kept_of_a_network(kind: str) -> None:
    ffn = model(kind, "relu")
    seen = observe_ffn(ffn, BATCHES)
    found = seen.ffns[DOWN]
    a, h = values(ffn)
    assert found.kind == ("fused" if kind == "swapped" else kind)
    assert found.activation == "relu"
    assert found.shape == [D, NEURONS]
    assert found.h.rows == 720
    assert torch.equal(found.down, ffn.down.weight.detach().t())
    assert torch.allclose(found.h.squares, h.flatten(0, 1).square().sum(0), rtol=1e-5)
    assert torch.allclose(found.a.total, a.flatten(0, 1).sum(0), rtol=1e-5)
    assert found.density == pytest.approx(float((h != 0).double().mean()), abs=1e-3)
    assert (found.a is found.h) == (kind == "plain")


def test_parts_merge_and_batches_leave_no_trace() -> None:
    ffn = model()
    whole = observe_ffn(ffn, BATCHES).ffns[DOWN]
    parts = [observe_ffn(ffn, [batch]).ffns[DOWN] for batch in BATCHES]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    cut = observe_ffn(ffn, [row for batch in BATCHES for row in batch]).ffns[DOWN]
    for other in (merged, cut):
        assert torch.equal(other.a.bins, whole.a.bins)
        assert torch.equal(other.h.bins, whole.h.bins)
        assert torch.allclose(other.h.squares, whole.h.squares)
    assert torch.equal(cut.h.sample, whole.h.sample)


def test_a_weight_by_columns_is_turned() -> None:
    flat = randomise(Flat()).eval()
    found = observe_ffn(flat, BATCHES).ffns["v"]
    assert found.shape == [D, NEURONS]
    assert torch.equal(found.down, flat.v.detach())


def test_a_tied_weight_has_another_name_in_another_graph() -> None:
    net = decoder(outliers=(), tied=True)
    recipe = sparsecc.sparsify(net, token_batches(2), "teal")
    (name,) = {"embed.weight", "head.weight"} & recipe.sparsity.keys()
    (other,) = {"embed.weight", "head.weight"} - {name}
    renamed = recipe.under({other})
    assert renamed.sparsity[other] == recipe.sparsity[name]
    assert torch.equal(renamed.thresholds[other], recipe.thresholds[name])


def test_what_cannot_be_observed() -> None:
    with pytest.raises(CalibrationError, match="no feed-forward network"):
        observe_ffn(nn.Linear(D, D).eval(), BATCHES)
    with pytest.raises(CalibrationError, match="no batches"):
        observe_ffn(model(), [])
    with pytest.raises(CalibrationError, match=r"activation before down\.weight holds a NaN"):
        observe_ffn(model(), [torch.full((2, D), torch.nan)])


# ---- cats and teal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_the_threshold_leaves_out_the_wanted_share(kind: str, sparsity: float) -> None:
    ffn = model(kind)
    recipe = sparsecc.sparsify(ffn, BATCHES, "cats", sparsity=sparsity)
    a, _ = values(ffn)
    measured = float((a <= float(recipe.thresholds[DOWN])).double().mean())
    assert measured == pytest.approx(sparsity, abs=0.01)
    assert recipe.sparsity[DOWN] == {"law": "activation", "density": 1 - sparsity}
    assert recipe.shapes == {DOWN: [D, NEURONS]}


def test_what_is_zero_by_itself_needs_no_threshold() -> None:
    recipe = make("cats", observe_ffn(model("gated", "relu"), BATCHES), sparsity=0.1)
    assert recipe.thresholds[DOWN].tolist() == [0]
    assert 0.2 < recipe.sparsity[DOWN]["density"] < 0.8


def test_inputs_of_every_layer() -> None:
    ffn = model()
    recipe = sparsecc.sparsify(ffn, BATCHES, "teal", sparsity=0.4)
    assert set(recipe.sparsity) == {"gate.weight", "up.weight", DOWN}
    x = torch.cat(BATCHES)
    for site, value in (("gate.weight", x), (DOWN, values(ffn)[1])):
        share = float((value.abs() <= recipe.thresholds[site]).double().mean())
        assert share == pytest.approx(0.4, abs=0.01)


# ---- cett ------------------------------------------------------------------------------------------------


def statistics(h: torch.Tensor, down: torch.Tensor) -> FFNStatistics:
    found = Statistics(h.shape[1])
    found.update(h)
    return FFNStatistics("plain", "relu", down, found, found)


def cett_of(ffn: FFNStatistics, limit: float) -> float:
    h = ffn.h.sample
    small = h.double().abs() * ffn.norms <= limit
    return left_out(h, ffn.down, small, h @ ffn.down)


def test_cett_is_what_is_left_out_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    h, down = torch.randn(100, 30, generator=generator), torch.randn(30, 9, generator=generator)
    ffn = statistics(h, down)
    assert cett_of(ffn, -1.0) == 0
    assert cett_of(ffn, 1e9) == pytest.approx(1)
    limits = []
    for target in (0.0, 0.1, 0.3, 0.6):
        limit, density = threshold(ffn, target)
        size = h.double().abs() * ffn.norms
        assert cett_of(ffn, limit) <= target
        assert density == pytest.approx(float((size > limit).double().mean()))
        larger = float(size[size > limit].min())
        assert cett_of(ffn, larger) > target
        limits.append(limit)
    assert limits == sorted(limits)
    assert threshold(ffn, 1.0)[1] == 0


def test_cett_does_not_see_how_neurons_are_scaled() -> None:
    """h_i c and D_i / c: the same neurons go."""
    generator = torch.Generator().manual_seed(0)
    h, down = torch.randn(64, 30, generator=generator), torch.randn(30, 9, generator=generator)
    scale = torch.exp2(torch.randint(-4, 5, (30,), generator=generator).float())  # exact
    first, second = statistics(h, down), statistics(h * scale, down / scale[:, None])
    one, two = threshold(first, 0.2)[0], threshold(second, 0.2)[0]
    assert one == pytest.approx(two, rel=1e-12)
    kept = h.double().abs() > one / first.norms
    assert torch.equal(kept, (h * scale).double().abs() > two / second.norms)
    assert 0.3 < float(kept.double().mean()) < 0.95
    # Without the norms they would not be.
    assert not torch.equal(h.abs() > 0.3, (h * scale).abs() > 0.3)


def test_a_budget_of_perplexity() -> None:
    net, batches = decoder(outliers=(), layers=2), token_batches(5)
    for method in ("cett", "cats"):
        recipe = sparsecc.sparsify(net, batches, method, budget=0.002)
        assert recipe.budget["held"]
        assert recipe.budget["metric"] == "perplexity"
        assert 0 < recipe.budget["measured"] <= 0.002
        assert len(recipe.tried) == 10
        held = [e for e in recipe.tried if e["held"]]
        lost = [e for e in recipe.tried if not e["held"]]
        assert held
        assert lost
        name = "cett" if method == "cett" else "sparsity"
        assert recipe.options[name] == max(e[name] for e in held)
        # What was measured is what the compiled model does.
        with torch.no_grad():
            exact, (got, _) = net(batches[-1]), run(net, batches[-1], recipe=recipe)
        losses = [
            nn.functional.cross_entropy(
                y[:, :-1].double().flatten(0, 1), batches[-1][:, 1:].flatten()
            )
            for y in (got, exact)
        ]
        increase = float((losses[0] - losses[1]).exp()) - 1
        assert increase == pytest.approx(recipe.budget["measured"], abs=1e-5)


# ---- top and gaussian --------------------------------------------------------------------------------------


def test_top_is_for_what_is_never_negative() -> None:
    recipe = sparsecc.sparsify(model("gated", "relu"), BATCHES, "top", sparsity=0.75)
    assert recipe.sparsity[DOWN]["k"] == NEURONS // 4
    assert 0.1 < recipe.sparsity[DOWN]["density"] <= 0.25
    assert sparsecc.sparsify(model("plain", "relu"), BATCHES, "top", k=3).sparsity[DOWN]["k"] == 3
    with pytest.raises(CalibrationError, match="silu may be negative"):
        sparsecc.sparsify(model("gated", "silu"), BATCHES, "top")


def _without_correction(z: torch.Tensor, c: float, correction: int) -> torch.Tensor:
    std, mean = torch.std_mean(z, -1, correction=correction, keepdim=True)
    return torch.relu(z - mean - c * std)


def test_the_statistical_selection() -> None:
    recipe = sparsecc.sparsify(model(), BATCHES, "gaussian", sparsity=0.95)
    entry = recipe.sparsity[DOWN]
    assert entry["k"] == 3
    assert entry["c"] == pytest.approx(NormalDist().inv_cdf(1 - 3 / NEURONS))
    assert "c" not in make("gaussian", observe_ffn(model(), BATCHES), sparsity=0.0).sparsity[DOWN]
    spec = Spec("p0", "a", gate=False, select="gaussian 1.2")
    z = torch.randn(50, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = float((selected(spec, 3 * z + 7) > 0).double().mean())
    assert kept == pytest.approx(1 - NormalDist().cdf(1.2), abs=0.01)
    assert torch.allclose(selected(spec, z + 5), selected(spec, z))
    assert torch.allclose(selected(spec, z * 4), 4 * selected(spec, z))
    small = z[:, :4]
    assert torch.allclose(selected(spec, small), _without_correction(small, 1.2, 0))
    assert not torch.allclose(selected(spec, small), _without_correction(small, 1.2, 1))


# ---- coreinfer -----------------------------------------------------------------------------------------------


def test_cores_by_hand() -> None:
    h = torch.tensor([[3.0, -9.0, 1.0, 2.0, -1.0], [1.0, 5.0, 0.0, -7.0, 1.0]])
    # ⌈0.4 · 3⌉ = 2 of each, by value: −9 and −7 are small.
    assert cores.token_counts(h, 0.4).tolist() == [2, 1, 0, 1, 0]
    assert cores.token_counts(h, 1.0).tolist() == [2, 1, 1, 1, 1]
    assert cores.token_counts(torch.ones(1, 30), 0.1).sum() == 3  # 0.1 · 30 is a little above 3
    assert cores.token_counts(-h.abs(), 1.0).sum() == 0
    assert cores.chosen(torch.tensor([1, 4, 4, 0, 4]), 2).tolist() == [1, 2]
    assert cores.core_size(0.4, 5) == 2
    assert cores.core_size(0.001, 5) == 1


def test_the_core_of_the_data() -> None:
    ffn = model()
    seen = observe_ffn(ffn, BATCHES)
    first, second = (make("coreinfer", seen, alpha=0.3, beta=0.5) for _ in range(2))
    core = first.neurons[DOWN]
    assert torch.equal(core, second.neurons[DOWN])
    assert len(core) == NEURONS // 2
    assert bool((core.diff() > 0).all())
    counts = cores.token_counts(seen.ffns[DOWN].h.sample, 0.3)
    rest = torch.ones(NEURONS, dtype=torch.bool)
    rest[core] = False
    assert int(counts[core].min()) >= int(counts[rest].max())
    whole = make("coreinfer", seen, beta=1.0)
    assert whole.neurons[DOWN].tolist() == list(range(NEURONS))


# ---- all of them -------------------------------------------------------------------------------------------


NARROW = {"cfsp": {"multiple": 8}}  # the models have fewer neurons than a group of CFSP


@pytest.mark.parametrize("name", SPARSITY)
def test_recipes_survive_their_file_and_run(name: str, tmp_path: Any) -> None:
    sparsecc.reset_cores()
    ffn = model("gated", "relu")
    recipe = sparsecc.sparsify(ffn, BATCHES, name, **NARROW.get(name, {}))
    assert recipe.method == name
    assert not recipe.sites
    assert recipe.about["rows"] == 720
    recipe.save(tmp_path / "recipe.json")
    again = Recipe.load(tmp_path / "recipe.json")
    assert again.sparsity == recipe.sparsity
    for field in ("thresholds", "neurons"):
        one, two = getattr(again, field), getattr(recipe, field)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    token = BATCHES[0][:1, :1]
    with torch.no_grad():
        exact = ffn(token)
        got, report = run(ffn, token, recipe=again)
    passes = ("sparsify-ffn", "sparsify-input", "prune-neurons")
    applied = {"ffn": [1, 0, 0], "input": [0, 3, 0], "networks": [0, 0, 1]}
    assert [report[each].applied for each in passes] == applied[SPARSITY[name]]
    assert 0 < error(got, exact) < 1
    if name in ("cats", "cett", "teal", "top", "cfsp"):
        with simulated_sparse(ffn) as simulation:
            simulation.use(recipe)
            assert error(got, simulation(token)) < 1e-6
            simulation.paused = True
            assert error(exact, simulation(token)) < 1e-6


@pytest.mark.parametrize("name", SPARSITY)
def test_what_is_skipped_is_left_alone(name: str) -> None:
    net = nn.Sequential(FFN("gated", "relu"), FFN("plain", "relu")).eval()
    recipe = sparsecc.sparsify(net, BATCHES, name, skip=["0.*"], **NARROW.get(name, {}))
    assert recipe.sparsity
    assert not any(site.startswith("0.") for site in recipe.sparsity)
    assert recipe.options["skip"] == ["0.*"]


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("cat", {}, "Did you mean 'cats'"),
        ("cats", {"sparsty": 1}, "Did you mean 'sparsity'"),
        ("cats", {"sparsity": 2}, "share of 0 to 1, not 2"),
        ("cats", {"skip": ["dwon.weight"]}, "Did you mean 'down.weight'"),
        ("cats", {"budget": 0.1, "sparsity": 0.5}, "a budget or sparsity=0.5, not both"),
        ("cats", {"budget": -1.0}, "number above 0"),
        ("cats", {"budget": 0.1, "metric": "perplexty"}, "Did you mean 'perplexity'"),
        ("cats", {"budget": 0.1, "held_back": 1.0}, "between 0 and 1"),
        ("coreinfer", {"budget": 0.1}, "no strength to search"),
        ("coreinfer", {"alpha": 0.0}, "alpha must be above 0"),
        ("gaussian", {"on": "inptu"}, "Did you mean 'input'"),
        ("top", {"k": 0}, "number of neurons, not 0"),
        ("teal", {"sparsity": True}, "share of 0 to 1"),
    ],
)
def test_wrong_arguments(method: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        sparsecc.sparsify(model("gated", "relu"), BATCHES[:2], method, **given)
