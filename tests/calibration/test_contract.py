"""What calibration says of a recipe is what the passes do: sites' weights and inputs after migration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from calibration.models import LN_AS_IT_IS, Chain, decoder, rows, token_batches
from support import capture, run
from torch import nn

from sparsecc import pipeline
from sparsecc.inspection import stages
from sparsecc.methods import make
from sparsecc.methods.common import columns, migrated
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.options import Options
from sparsecc.passes.analysis.sites import named_links, sites
from sparsecc.passes.base import Analyses
from sparsecc.passes.quant._migrate import migrate_scale, migrate_shift
from sparsecc.recipe import Recipe
from sparsecc.report.model import GraphReport
from sparsecc.simulate import simulate
from sparsecc.watch import At, WatchedGraph


class Recorder:
    def __init__(self) -> None:
        self.read: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def graph(self, *_: Any) -> None:
        pass

    def site(self, at: At, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> None:
        self.read[at.site] = (x.flatten(0, -2), weight)


def recorded(
    model: nn.Module, x: torch.Tensor, recipe: Recipe, options: dict[str, Any]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Input and weight of every site where the recipe's scales and shifts were moved, and the result."""
    with torch.no_grad():
        program = capture(model, x)
        pipeline.run(program, Options.parse(options), GraphReport(0))
        names = {site.node.name: site.name for site in sites(program, Analyses(program))}
        for name, link in Analyses(program).get(named_links).items():
            if name in recipe.shifts:  # first: the bias takes W as it was
                migrate_shift(program, link, recipe.shifts[name].tolist(), "test")
            if name in recipe.scales:
                migrate_scale(program, link, recipe.scales[name].tolist(), "test")
        recorder = Recorder()
        inputs: list[Any] = []

        def backend(gm: Any, example_inputs: Any) -> Any:
            inputs.extend(example_inputs)
            return gm.forward

        torch._dynamo.reset()
        torch.compile(model, backend=backend)(x)
        watched = WatchedGraph(program, recorder)
        # Numbers stand beside a weight, and then count among the sources that a name is made of.
        watched.sites = {node: replace(at, site=names[node]) for node, at in watched.sites.items()}
        (result,) = watched(*inputs)
    return recorder.read, result


def random_recipe(seen: Observations, shifts: bool) -> Recipe:
    generator = torch.Generator().manual_seed(3)
    recipe = Recipe("random")
    for name, link in seen.links.items():
        if link.carries_scale:
            recipe.scales[name] = torch.rand(link.size, generator=generator) * 3 + 0.3
        if link.carries_shift and shifts:
            recipe.shifts[name] = torch.randn(link.size, generator=generator)
    return recipe


@pytest.mark.parametrize("kind", ["decoder", "chain"])
def test_migrated_weights_and_inputs_are_those_of_the_passes(kind: str) -> None:
    model = (decoder() if kind == "decoder" else Chain().eval()).double()
    x = token_batches(1)[0] if kind == "decoder" else rows().double()
    options = {} if kind == "decoder" else LN_AS_IT_IS
    seen = observe(model, [x], options)
    plain, expected = recorded(model, x, Recipe("none"), options)
    recipe = random_recipe(seen, shifts=True)
    assert len(recipe.scales) >= (6 if kind == "decoder" else 1)
    assert recipe.shifts
    got, result = recorded(model, x, recipe, options)
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-9)
    assert got.keys() == plain.keys() == seen.sites.keys()
    for site, (y, weight) in got.items():
        scale, shift = columns(seen, recipe, site)
        assert torch.allclose(y, (plain[site][0] - shift) / scale, rtol=1e-9, atol=1e-9), site
        expected_weight = migrated(seen, recipe, site)  # of an fp32 copy
        assert torch.allclose(weight, expected_weight, rtol=1e-6, atol=1e-7), site


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int8", {}),
        ("smoothquant", {}),
        ("int4", {}),
        ("awq", {}),
        ("lorc", {"base": "awq"}),
        ("lorc", {"base": "int8"}),
        ("w8a8", {}),
        ("smoothquant", {"static": True}),
        ("outliertune", {}),
        ("repq", {}),
        ("llm_fp4", {}),
        ("llm_fp4", {"activations": False}),
    ],
)
def test_a_compiled_recipe_is_its_simulation(name: str, options: dict[str, Any]) -> None:
    model, (batch,) = decoder(layers=2, tied=True), token_batches(1)
    seen = observe(model, [batch])
    recipe = make(name, seen, **options)
    (simulated,) = simulate(model, recipe, seen, [batch])
    with torch.no_grad():
        compiled, report = run(model, batch, recipe=recipe, codegen="aten")
        exact = model(batch)
    assert report["quantize-linear"].applied == len(recipe.sites)
    assert "migrate-channels" not in report or report["migrate-channels"].refused == 0
    lost = float((simulated - exact).norm())
    assert lost > 1e-4 * float(exact.norm())
    # An activation between two codes may fall to the other one.
    assert float((compiled - simulated).norm()) < 0.1 * lost


@pytest.mark.parametrize("name", ["w8a8", "smoothquant", "outliertune", "repq"])
def test_no_step_is_multiplied_at_run_time_where_links_hold_them(name: str) -> None:
    """Every input of this network comes from a norm or a layer: the dump has no product beside its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(40, 32)
    seen = observe(model.eval(), [x], progress=False)
    recipe = make(name, seen, **({"static": True} if name == "smoothquant" else {}))
    assert set(recipe.sites.values()) == {"int8s"}
    assert set(recipe.activations.values()) == {1.0}
    with torch.no_grad():
        result, kept = stages(model, x, options={"recipe": recipe})
        exact = model(x)
    text = kept[0].stages[-1].program.text()
    assert text.count("sparsecc.few_rows.default(") == 2
    assert "aten.mul" not in text
    assert "aten.div" not in text
    assert result["quantize-linear"].applied == 2
    with torch.no_grad():
        got, _ = run(model, x, recipe=recipe)
    assert float((got - exact).norm() / exact.norm()) < 0.05
