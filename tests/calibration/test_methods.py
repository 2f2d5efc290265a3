"""Methods: their formulas, what they gain over the naive ones, planted faults, floors, options."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from calibration.models import LN_AS_IT_IS, Chain, decoder, rows, token_batches

from sparsecc.errors import CalibrationError, RecipeError
from sparsecc.methods import METHODS, make
from sparsecc.methods.awq import clips, not_scored
from sparsecc.methods.common import (
    FLOOR,
    STATIC,
    columns,
    fits,
    floored,
    migrated,
    rounded,
    step_of,
)
from sparsecc.methods.lorc import low_rank
from sparsecc.methods.reference import apply, rounded_site
from sparsecc.methods.repq import channel_codes
from sparsecc.observations import Observations, ObservedSite
from sparsecc.observe import observe
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.rounded_weight import clipped
from sparsecc.statistics import Statistics
from sparsecc.watch import LinkFacts

Q, K, V, OUT = (f"blocks.0.{name}.weight" for name in "qkvo")
GATE, UP, DOWN = (f"blocks.0.{name}.weight" for name in ("gate", "up", "down"))
INTO_ATTENTION = f"norm-linear: {K}, {Q}, {V}"
CHAIN = "norm-linear: a.weight, b.weight"


@cache
def _decoder() -> Observations:
    return observe(decoder(), token_batches())


@cache
def _chain() -> Observations:
    return observe(Chain().eval(), [rows()], LN_AS_IT_IS)


@pytest.fixture
def seen() -> Observations:
    """Of a decoder with outlier channels."""
    return _decoder()


@pytest.fixture
def chain() -> Observations:
    """Of a skewed LayerNorm before two layers."""
    return _chain()


def total(observations: Observations, recipe: Recipe) -> float:
    return sum(error**2 for error in apply(observations, recipe).values()) ** 0.5


# ---- the reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8", "int4g32", "int4g32z", "int4g64za8", "bf16"])
def test_the_reference_is_the_product_of_the_format(seen: Observations, form: str) -> None:
    recipe = Recipe("any", sites={UP: form})
    x = seen.input(UP).sample.double()
    weight = seen.weight(UP).double()
    expected = formats.product(x, form, formats.quantize(weight, form))
    assert torch.allclose(rounded_site(seen, recipe, UP)(x), expected, rtol=1e-9, atol=1e-9)


def test_static_activations_are_divided_rounded_and_bounded(seen: Observations) -> None:
    step = 0.01  # many are clipped
    recipe = Recipe("any", sites={UP: STATIC}, activations={UP: step})
    x = seen.input(UP).sample.double()
    codes = (x / step).round().clamp(-127, 127)
    q, scale = formats.quantize(seen.weight(UP).double(), "int8")
    expected = step * scale.double() * (codes @ q.double().T)
    assert torch.allclose(rounded_site(seen, recipe, UP)(x), expected, rtol=1e-9, atol=1e-9)


def test_migration_alone_changes_nothing(seen: Observations) -> None:
    recipe = Recipe("any", sites=dict.fromkeys(seen.sites, "dense"))
    generator = torch.Generator().manual_seed(0)
    for name, link in seen.links.items():
        recipe.scales[name] = torch.rand(link.size, generator=generator) + 0.1
        if link.carries_shift:
            recipe.shifts[name] = torch.randn(link.size, generator=generator)
    assert max(apply(seen, recipe).values()) < 1e-12


def test_a_consumer_that_is_not_scaled_is_seen(seen: Observations) -> None:
    """Planted: the scale divides the value, and v is not multiplied by it."""
    recipe = Recipe("any", sites=dict.fromkeys(seen.sites, "dense"))
    recipe.scales[INTO_ATTENTION] = torch.linspace(0.5, 2, 64)
    whole = seen.links[INTO_ATTENTION]
    without = {site: c for site, c in whole.consumers.items() if site != V}
    wrong = replace(seen, links={INTO_ATTENTION: replace(whole, consumers=without)})
    site = rounded_site(wrong, recipe, V)
    x = seen.input(V).sample.double() / torch.linspace(0.5, 2, 64).double()  # what v would read
    exact = seen.input(V).sample.double() @ seen.weight(V).double().T
    assert float((site(x) - exact).norm() / exact.norm()) > 0.1


def test_a_shift_is_undone_by_the_weight_as_it_was(chain: Observations) -> None:
    recipe = Recipe("any", sites=dict.fromkeys(chain.sites, "dense"))
    recipe.scales[CHAIN] = torch.linspace(0.5, 2, 32)
    recipe.shifts[CHAIN] = torch.linspace(-3, 3, 32)
    assert max(apply(chain, recipe).values()) < 1e-12
    site = rounded_site(chain, recipe, "a.weight")
    site.behind = migrated(chain, recipe, "a.weight") @ site.shift  # planted: W' z
    x = chain.input("a.weight").sample.double()
    exact = x @ chain.weight("a.weight").double().T
    assert float((site(x) - exact).norm() / exact.norm()) > 0.1


# ---- gains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "options", "naive", "factor"),
    [
        ("smoothquant", {"group": None}, "int8", 0.5),
        ("int8", {"group": 32}, "int8", 0.9),
        ("smoothquant", {"static": True}, "w8a8", 0.5),
        ("outliertune", {}, "w8a8", 0.7),
        ("repq", {}, "w8a8", 0.7),
        ("repq", {"target": "median"}, "w8a8", 0.7),
        ("awq", {}, "int4", 0.6),
        ("lorc", {}, "int4", 0.9),
        ("lorc", {"base": "awq"}, "awq", 0.9),
        ("w8a8", {"choose": "mse"}, "w8a8", 1.0),
    ],
)
def test_methods_beat_the_naive_ones_at_the_same_bits(
    seen: Observations, better: str, options: dict[str, Any], naive: str, factor: float
) -> None:
    whole_rows = {"group": None} if naive == "int8" else {}
    good, plain = make(better, seen, **options), make(naive, seen, **whole_rows)
    assert good.sites.keys() == plain.sites.keys()
    assert good.sites == plain.sites or better == naive
    assert total(seen, good) < factor * total(seen, plain)


@pytest.mark.parametrize("name", ["smoothquant", "outliertune", "repq", "awq"])
def test_inverted_scales_lose_what_was_gained(seen: Observations, name: str) -> None:
    recipe = make(name, seen)
    wrong = replace(
        recipe, scales={n: 1 / s for n, s in recipe.scales.items()}, clips={}, activations={}
    )
    good = replace(recipe, clips={}, activations={})
    for each in (wrong, good):  # steps of their own, so that the scales alone are judged
        for site, form in each.sites.items():
            if form == STATIC:
                each.activations[site] = step_of(seen.input(site), *columns(seen, each, site))
    assert total(seen, wrong) > 2 * total(seen, good)


# ---- smoothquant --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_is_the_papers(seen: Observations, alpha: float) -> None:
    recipe = make("smoothquant", seen, alpha=alpha)
    read = seen.input(Q).largest
    held = torch.stack([seen.weight(site).abs().amax(0).double() for site in (Q, K, V)]).amax(0)
    expected = read**alpha / held ** (1 - alpha)
    by_column = columns(seen, recipe, Q)[0]  # the link may number channels in another order
    assert torch.allclose(by_column, expected, rtol=1e-6)


def test_all_of_the_range_moves_into_the_weights(seen: Observations) -> None:
    recipe = make("smoothquant", seen, alpha=1.0)
    for site in (Q, UP, DOWN):
        scale, _ = columns(seen, recipe, site)
        smoothed = seen.input(site).sample.double() / scale
        assert torch.allclose(smoothed.abs().amax(0), torch.ones(()).double(), rtol=1e-5)


def test_grouped_heads_share_a_scale(seen: Observations) -> None:
    recipe = make("smoothquant", seen)
    assert recipe.scales[f"v-o: {OUT}"].shape == (32,)
    scale = columns(seen, recipe, OUT)[0].view(4, 16)
    assert torch.equal(scale[0], scale[1])
    assert torch.equal(scale[2], scale[3])
    assert not torch.equal(scale[0], scale[2])


# ---- outliertune and repq -----------------------------------------------------------------------------


def codes_of(observations: Observations, recipe: Recipe, site: str) -> torch.Tensor:
    scale, shift = columns(observations, recipe, site)
    y = (observations.input(site).sample.double() - shift) / scale
    return (y / recipe.activations[site]).round()


def test_channels_use_all_codes_of_both_signs(chain: Observations) -> None:
    recipe = make("outliertune", chain)
    assert recipe.activations["a.weight"] == recipe.activations["b.weight"] == 1.0
    codes = codes_of(chain, recipe, "a.weight")
    assert torch.equal(codes.amax(0), torch.full((32,), 127.0, dtype=torch.float64))
    assert torch.equal(codes.amin(0), torch.full((32,), -127.0, dtype=torch.float64))
    x = chain.input("a.weight").sample.double()
    scale, shift = columns(chain, recipe, "a.weight")
    assert float(((codes * scale + shift - x).abs() / scale).max()) <= 0.5 + 1e-6


def test_without_a_shift_the_skewed_channel_costs_codes(chain: Observations) -> None:
    links = {n: replace(link, carries_shift=False) for n, link in chain.links.items()}
    unshifted = make("outliertune", replace(chain, links=links))
    assert not unshifted.shifts
    assert total(chain, make("outliertune", chain)) < total(chain, unshifted)


@pytest.mark.parametrize("target", ["mean", "median", "clipped"])
def test_codes_of_the_tensor_are_those_of_each_channel(chain: Observations, target: str) -> None:
    recipe = make("repq", chain, target=target)
    steps, zeros = channel_codes(chain, chain.links[CHAIN])
    assert torch.equal(zeros, zeros.round())
    assert float(zeros.abs().max()) > 100  # the skewed channel
    if target == "clipped":
        assert float(recipe.scales[CHAIN].max() / recipe.scales[CHAIN].min()) < float(
            steps.max() / steps.min()
        )
        return
    consumers = chain.links[CHAIN].consumers["a.weight"]
    index = torch.tensor(consumers)
    x = chain.input("a.weight").sample.double()
    own = (x / steps[index]).round() + zeros[index]
    apart = (codes_of(chain, recipe, "a.weight") - own).abs()
    assert float(apart.max()) <= 1  # scales are fp32: a tie may fall to the other side
    assert float((apart > 0).double().mean()) < 1e-3


def test_the_target_cancels_where_the_step_moves_into_the_link(chain: Observations) -> None:
    """(s / s̃) s̃ = s: the step of the tensor is one, and rows of W' are rounded by their own scale."""
    steps, _ = channel_codes(chain, chain.links[CHAIN])
    assert float(steps.mean()) != pytest.approx(float(steps.quantile(0.5)), rel=0.01)
    for target in ("mean", "median"):
        recipe = make("repq", chain, target=target)
        assert recipe.activations["a.weight"] == 1.0
        assert torch.allclose(recipe.scales[CHAIN].double(), steps, rtol=1e-6)


def test_one_step_for_all_layers_of_an_input(seen: Observations) -> None:
    for name in ("w8a8", "outliertune", "repq"):
        steps = make(name, seen).activations
        assert steps[Q] == steps[K] == steps[V]
        assert steps.keys() == seen.sites.keys()


# ---- steps --------------------------------------------------------------------------------------------


def test_choosers() -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    x[7, 3] = 60.0
    found = Statistics(16)
    found.update(x)
    one, none = torch.ones(16).double(), torch.zeros(16).double()
    whole = step_of(found, one, none)
    assert whole == 60 / 127
    trimmed = step_of(found, one, none, "percentile", 0.999)
    assert trimmed == pytest.approx(float(x.abs().flatten().quantile(0.999)) / 127, rel=0.05)
    best = step_of(found, one, none, "mse")

    def error(step: float) -> float:
        return float((rounded(found.sample.double(), step) - found.sample).square().sum())

    assert error(best) <= error(whole)
    moved = step_of(found, one * 2, none + 1, "percentile", 0.999)
    exact = ((x - 1) / 2).abs().flatten().double()
    assert moved == pytest.approx(float(exact.kthvalue(round(0.999 * len(exact)))[0]) / 127)
    with pytest.raises(CalibrationError, match="Did you mean 'percentile'"):
        step_of(found, one, none, "percentil")
    with pytest.raises(CalibrationError, match=r"between 0.5 and 1, not 99"):
        step_of(found, one, none, "percentile", 99)


def test_what_is_rare_and_large_is_not_clipped() -> None:
    """One element of 2000 rows, which is not among the sample rows."""
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    plain = Statistics(16)
    plain.update(x)
    absent = next(i for i in range(2000) if not (plain.sample == x[i]).all(1).any())
    x[absent, 3] = 1000
    found = Statistics(16)
    found.update(x)
    assert float(found.sample.max()) < 10
    one, none = torch.ones(16).double(), torch.zeros(16).double()
    assert step_of(found, one, none, "mse") == 1000 / 127
    seen = Observations(
        inputs={"fc": found}, sites={"fc": ObservedSite([4, 16], ["fc"], torch.ones(4, 16))}
    )
    link = LinkFacts("l", "norm-linear", 16, {"fc": tuple(range(16))}, {}, True, False)
    steps, _ = channel_codes(seen, link)
    assert float(steps[3]) == 1000 / 127


# ---- int4 and awq -------------------------------------------------------------------------------------


def test_groups_fall_back_where_they_do_not_divide(seen: Observations) -> None:
    sites = make("int4", seen).sites
    assert sites[DOWN] == "int4g128z"
    assert sites[UP] == "int4g64z"
    assert set(make("int4", seen, group=32, zero=False).sites.values()) == {"int4g32"}
    odd = observe(torch.nn.Linear(24, 4).eval(), [rows(8, 24)])
    assert make("int4", odd).sites == {"weight": "int8"}
    assert make("awq", odd).clips == {}
    with pytest.raises(CalibrationError, match="unknown group 48"):
        make("int4", seen, group=48)


def test_rows_too_long_for_a_format_are_left() -> None:
    assert not fits("int8", 2**17 + 1)
    assert fits("int8", 2**17)
    assert fits(STATIC, 64)
    assert not fits("int4g64", 96)


def test_scales_are_chosen_by_the_error_of_all_readers(seen: Observations) -> None:
    """Against a plain search in fp64 over the twenty exponents."""
    recipe = make("awq", seen, clip=False)
    assert not recipe.clips
    assert float(
        recipe.scales[INTO_ATTENTION].max() * recipe.scales[INTO_ATTENTION].min()
    ) == pytest.approx(1, rel=1e-5)
    x, mean = seen.input(Q).sample.double(), seen.input(Q).mean_magnitude

    def loss(s: torch.Tensor) -> float:
        found = 0.0
        for site in (Q, K, V):
            weight = seen.weight(site).double()
            q = formats.dequantize(
                "int4g64z", formats.quantize(weight * s, "int4g64z"), torch.float64
            )
            found += float((x @ (q / s - weight).T).square().sum())
        return found

    tried = [mean ** (i / 20) for i in range(20)]
    losses = [loss(s / (s.max() * s.min()).sqrt()) for s in tried]
    assert min(losses) < 0.5 * losses[0]
    assert loss(columns(seen, recipe, Q)[0]) == pytest.approx(min(losses), rel=1e-3)


def test_clips_never_lose_and_spare_q_and_k(seen: Observations) -> None:
    recipe = make("awq", seen)
    plain = replace(recipe, clips={})
    for site in seen.sites:
        kept = recipe.clips[site]
        assert float(kept.min()) >= 0.55 - 1e-5
        assert float(kept.max()) <= 1 + 1e-5
        if site in (Q, K):
            assert torch.allclose(kept, torch.ones(()), rtol=1e-5)
            assert not not_scored(seen, site).any()
        else:
            assert float(kept.min()) < 0.99
    assert total(seen, recipe) < total(seen, plain)


def test_clips_are_those_of_least_error_in_each_group(seen: Observations) -> None:
    """Against a plain search over one row and group."""
    recipe = make("int4", seen, group=32)
    found = clips(seen, recipe, UP)
    weight, x = seen.weight(UP).double(), seen.input(UP).sample.double()
    for row, group in ((0, 0), (5, 1), (100, 0)):
        part = slice(32 * group, 32 * group + 32)
        w, seen_by = weight[row : row + 1, part], x[:, part]
        errors = {}
        for i in range(10):
            share = torch.tensor([[1 - i / 20]], dtype=torch.float64)
            kept = clipped(w, share)
            q = formats.dequantize("int4g32z", formats.quantize(kept, "int4g32z"), torch.float64)
            errors[float(share)] = float((seen_by @ (q - w).T).square().sum())
        best = min(errors, key=errors.__getitem__)
        assert float(found[row, group]) == pytest.approx(best, rel=1e-5)


# ---- lorc ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_what_a_correction_leaves_is_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.linalg.svdvals(matrix)
    for rank in (1, 4, 8):
        u, v = low_rank(matrix, rank)
        assert u.shape == (shape[0], rank)
        assert v.shape == (rank, shape[1])
        left = float((matrix - u.double() @ v.double()).square().sum())
        assert left == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-5)
    u, v = low_rank(matrix, 99)
    assert torch.allclose(u.double() @ v.double(), matrix, atol=1e-6)
    u, v = low_rank(torch.zeros(shape), 3)
    assert not u.any()
    assert not v.any()


def test_a_full_correction_gives_the_weight_back(seen: Observations) -> None:
    recipe = make("lorc", seen, rank=64)
    assert recipe.method == "lorc"
    assert recipe.options["base"] == "int4"
    errors = apply(seen, recipe)
    assert max(e for site, e in errors.items() if site != DOWN) < 1e-5  # down has rank 64 of 64 too
    with pytest.raises(CalibrationError, match="rank must be"):
        make("lorc", seen, rank=0)
    with pytest.raises(CalibrationError, match="base of lorc"):
        make("lorc", seen, base="lorc")


# ---- floors -------------------------------------------------------------------------------------------


class Dead(torch.nn.Module):
    """A dead, a constant and a tiny channel behind ReLU, and a layer that reads zeros alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        self.dead, self.after = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        with torch.no_grad():
            self.up.weight[3:6] = 0
            self.up.bias[3:6] = torch.tensor([0.0, 2.0, 1e-20])
            self.down.weight[:, 7] = 0
            self.dead.weight.zero_()
            self.dead.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()) + self.after(self.dead(x).relu())


@pytest.mark.parametrize("name", METHODS)
def test_dead_and_constant_channels_get_finite_scales(name: str) -> None:
    seen = observe(Dead().eval(), [rows()])
    recipe = make(name, seen)
    for vectors in (recipe.scales, recipe.clips):
        for vector in vectors.values():
            assert bool(vector.isfinite().all())
    assert all(bool((s > 0).all()) for s in recipe.scales.values())
    assert all(0 < step < 1e6 for step in recipe.activations.values())
    errors = apply(seen, recipe)
    assert all(e < 0.2 for e in errors.values()), errors
    assert errors["after.weight"] == 0


def test_the_floor_is_relative() -> None:
    values = torch.tensor([0.0, 1e-9, 1.0, 100.0], dtype=torch.float64)
    assert floored(values).tolist() == [100 * FLOOR, 100 * FLOOR, 1.0, 100.0]
    assert floored(torch.zeros(3)).tolist() == [1, 1, 1]
    assert floored(values * 1e-20).tolist() == pytest.approx([1e-23, 1e-23, 1e-20, 1e-18])


# ---- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_what_is_skipped_is_left_alone(seen: Observations, name: str) -> None:
    recipe = make(name, seen, skip=["head.*", "*.down.weight"])
    assert set(seen.sites) - set(recipe.sites) == {"head.weight", DOWN}
    for field in (recipe.shapes, recipe.activations, recipe.clips, recipe.corrections):
        assert "head.weight" not in field
    assert recipe.options["skip"] == ["head.*", "*.down.weight"]
    assert "norm-linear: head.weight" not in recipe.scales
    apply(seen, recipe)


@pytest.mark.parametrize("name", METHODS)
def test_recipes_are_complete_and_survive_their_file(
    seen: Observations, name: str, tmp_path: Any
) -> None:
    recipe = make(name, seen)
    assert recipe.method == name
    assert recipe.shapes == {n: site.shape for n, site in seen.sites.items()}
    assert recipe.about == {
        "parameters": seen.about["parameters"],
        "rows": 256,
        "batches": 4,
        "fingerprint": seen.fingerprint,
    }
    assert set(recipe.versions) == {"sparsecc", "torch"}
    with pytest.raises(RecipeError, match="recipe"):
        recipe.save(tmp_path / "no" / "recipe.json")
    path = tmp_path / "recipe.json"
    recipe.save(path)
    again = Recipe.load(path)
    assert again.sites == recipe.sites
    assert apply(seen, again) == apply(seen, recipe)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_pure(seen: Observations, name: str) -> None:
    weights = {n: seen.weight(n).clone() for n in seen.sites}
    first, second = make(name, seen), make(name, seen)
    for field in ("scales", "shifts", "clips"):
        one, two = getattr(first, field), getattr(second, field)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert first.activations == second.activations
    assert all(torch.equal(seen.weight(n), w) for n, w in weights.items())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("smothquant", {}, "Did you mean 'smoothquant'"),
        ("smoothquant", {"alfa": 1}, "Did you mean 'alpha'"),
        ("smoothquant", {"alpha": 2}, "between 0 and 1, not 2"),
        ("int8", {"skip": "head.weight"}, "list of patterns"),
        ("int8", {"skip": ["haed.weight"]}, "Did you mean 'head.weight'"),
        ("repq", {"target": "maen"}, "Did you mean 'mean'"),
    ],
)
def test_wrong_options(seen: Observations, name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        make(name, seen, **options)
