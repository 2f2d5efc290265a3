"""migrate-channels: a recipe's scales and shifts change every value between, and no result."""

from __future__ import annotations

import copy

import pytest
import torch
from quant_models import Net, Pair, Tokens, recipe_of
from support import capture, check_exact, error, fp64, managed_by_fsdp, randomise, run
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from sparsecc import pipeline
from sparsecc.options import Options
from sparsecc.passes.quant import _migrate
from sparsecc.recipe import Recipe
from sparsecc.report.model import GraphReport
from sparsecc.shadow import run_fp64

NAME = "migrate-channels"
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def exactly(recipe: Recipe) -> dict:
    """The pass alone: no fold before it, nothing rounded after it."""
    return {"passes": {NAME: {"recipe": recipe}}}


@pytest.mark.parametrize("build", [Net, Pair])
def test_every_link_is_migrated_and_nothing_changes(build) -> None:
    model = randomise(build()).eval()
    recipe = recipe_of(model, X)
    links = {*recipe.scales, *recipe.shifts}
    assert recipe.scales
    report = check_exact(model, X, applied={NAME: len(links)}, **exactly(recipe))
    assert {m.note for m in report[NAME].matches} == links


def test_the_values_between_are_what_the_recipe_says() -> None:
    """(y − z) / s of the value between a norm and its reader."""
    model = fp64(randomise(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)))).eval()
    x, name = X.double(), "norm-linear: 1.weight"
    recipe = recipe_of(model, x)
    assert set(recipe.scales) == {name}
    with torch.no_grad():
        program = capture(model, x)
        pipeline.run(program, Options.parse(exactly(recipe)), GraphReport(0))
        (linear,) = program.calls(torch.ops.aten.linear.default)
        program.output().args = ((linear.args[0],),)
        weights = [p for p in program.placeholders() if program.slot(p).role.is_weight]
        values = {p: model.get_parameter(program.slot(p).fqn) for p in weights}
        (between,) = run_fp64(program.module, [values.get(p, x) for p in program.placeholders()])
        expected = (model[0](x) - recipe.shifts[name].double()) / recipe.scales[name].double()
    assert error(between, expected) < 1e-12


WRONG = {
    "readers × 1/s": ("_scale_columns", lambda real: _inverse(real)),
    "Wz is left out": ("_add_behind", lambda real: lambda *_: None),
    "one reader is left out": ("_scale_columns", lambda real: _but_the_first(real)),
    "rows stay": ("_scale_rows", lambda real: lambda *_: None),
}


def _inverse(real):
    def wrong(program, side, vector, origin) -> None:
        build = program.weight(origin, side.node)
        real(program, side, build.call(torch.ops.aten.reciprocal.default, vector), origin)

    return wrong


def _but_the_first(real):
    seen = []

    def wrong(*args) -> None:
        if seen:
            real(*args)
        seen.append(args)

    return wrong


@pytest.mark.parametrize("name", WRONG)
def test_wrong_versions_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Net()).eval()
    recipe = recipe_of(model, X)
    attribute, wrong = WRONG[name]
    monkeypatch.setattr(_migrate, attribute, wrong(getattr(_migrate, attribute)))
    with pytest.raises(AssertionError):
        check_exact(model, X, applied={}, **exactly(recipe))


@pytest.mark.parametrize("what", ["scales", "shifts"])
def test_a_recipe_of_another_model_is_an_error(what: str) -> None:
    model = randomise(Net()).eval()
    recipe = recipe_of(model, X)
    name = next(iter(getattr(recipe, what)))
    getattr(recipe, what)[name] = torch.ones(3)
    with (
        torch.no_grad(),
        pytest.raises(
            BackendCompilerFailed, match=r"RecipeError: .*link 'norm-linear.*16 channels.*\[3\]"
        ),
    ):
        run(model, X, strict=False, **exactly(recipe))


def test_refuses_what_the_link_does_not_carry() -> None:
    model = randomise(Pair(F.gelu)).eval()
    recipe = Recipe("by hand", scales={"linear-linear: b.weight": torch.ones(12)})
    assert not recipe_of(model, X).scales
    with torch.no_grad():
        result, report = run(model, X, **exactly(recipe))
        assert report[NAME].applied == 0  # GELU: there is no such link
        assert error(result, model(X)) < 1e-6
    model = randomise(Pair()).eval()
    recipe = recipe_of(model, X)
    assert not recipe.shifts
    recipe.shifts = {name: torch.ones(12) for name in recipe.scales}  # ReLU carries none
    with torch.no_grad():
        _, report = run(model, X, **exactly(recipe))
    assert {m.code for m in report[NAME].refusals} == {"shift"}


def test_refuses_in_training_and_gathered() -> None:
    model = randomise(Net())
    recipe = recipe_of(model, X)
    _, report = run(model.train(), X, **exactly(recipe))
    assert {m.code for m in report[NAME].refusals} == {"training"}
    with torch.no_grad():
        _, report = run(managed_by_fsdp(model.eval()), X, **exactly(recipe))
    assert {m.code for m in report[NAME].refusals} == {"gathered"}


def test_tied_weights_are_refused() -> None:
    model = randomise(Tokens()).eval()
    tied = copy.deepcopy(model)
    ids = torch.randint(0, 20, (2, 5))
    recipe = recipe_of(model, ids)
    assert "norm-linear: gate.weight, up.weight" in recipe.scales
    tied.up.weight = tied.gate.weight
    recipe.scales["norm-linear: gate.weight, gate.weight"] = torch.full((16,), 2.0)
    with torch.no_grad():
        result, report = run(tied, ids, **exactly(recipe))
        assert error(result, tied(ids)) < 1e-5
    assert "norm-linear: gate.weight, gate.weight" not in {
        m.note for m in report[NAME].matches if m.status == "applied"
    }


def test_any_batch_and_updates_after_compile() -> None:
    model = fp64(randomise(Net())).eval()
    recipe = recipe_of(model, X.double())
    torch._dynamo.reset()
    fast = torch.compile(
        model, backend="sparsecc", dynamic=True, options={"lower": "eager", **exactly(recipe)}
    )
    with torch.no_grad():
        for batch in (3, 1, 7):
            x = torch.randn(batch, 5, 16, dtype=torch.float64)
            assert error(fast(x), model(x)) < 1e-12
        randomise(model, seed=5)
        assert error(fast(x), model(x)) < 1e-12
