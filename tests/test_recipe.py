"""Recipes as files, as options, and in models that are baked."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from quant_models import Net, recipe_of
from support import error, randomise, run
from torch._dynamo.exc import BackendCompilerFailed

import sparsecc
from sparsecc.errors import OptionsError, RecipeError
from sparsecc.options import Options
from sparsecc.recipe import Recipe

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def full() -> Recipe:
    return Recipe(
        "awq",
        sites={"a.weight": "int4g32"},
        shapes={"a.weight": [8, 32]},
        scales={"norm-linear: a.weight": torch.rand(32)},
        shifts={"norm-linear: a.weight": torch.randn(32)},
        clips={"a.weight": torch.rand(8, 1)},
        activations={"a.weight": 0.5},
        corrections={"a.weight": (torch.randn(8, 2), torch.randn(2, 32))},
        grids={"a.weight": (torch.rand(8, 1).half(), torch.rand(8, 1).half())},
        options={"group": 32},
        budget={"metric": "kl", "limit": 0.01},
        tried=[{"method": "int8", "kl": 0.001}],
        about={"rows": 512},
        versions={"torch": torch.__version__},
    )


def test_saved_and_loaded(tmp_path: pathlib.Path) -> None:
    recipe = full()
    recipe.save(tmp_path / "r.json")
    loaded = Recipe.load(tmp_path / "r.json")
    for name, value in vars(recipe).items():
        if name in ("scales", "shifts", "clips", "corrections", "grids"):
            assert getattr(loaded, name).keys() == value.keys()
            for key, tensor in value.items():
                pairs = zip(
                    torch.utils._pytree.tree_leaves(tensor),
                    torch.utils._pytree.tree_leaves(getattr(loaded, name)[key]),
                    strict=True,
                )
                assert all(torch.equal(a, b) for a, b in pairs)
        else:
            assert getattr(loaded, name) == value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.safetensors"]
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["sites"] == {"a.weight": "int4g32"}  # to be read


DAMAGED = {
    "missing": lambda p: p.unlink(),
    "half": lambda p: p.write_text(p.read_text()[:50]),
    "another version": lambda p: p.write_text(
        p.read_text().replace('"version": 1', '"version": 9')
    ),
    "no tensors": lambda p: p.with_suffix(".safetensors").unlink(),
    "damaged tensors": lambda p: p.with_suffix(".safetensors").write_bytes(b"12345678"),
    "unknown field": lambda p: p.write_text(p.read_text().replace('"about"', '"abuot"')),
    "a list": lambda p: p.write_text("[]"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_files_are_named(how: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.json"
    full().save(path)
    DAMAGED[how](path)
    with pytest.raises(RecipeError, match=r"r\.json"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match=r"r\.json"):
        Options.parse({"recipe": str(path)})


def test_bad_values(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match=r"must end in \.json"):
        full().save(tmp_path / "r.txt")
    with pytest.raises(RecipeError, match="nowhere"):
        full().save(tmp_path / "nowhere" / "r.json")
    with pytest.raises(RecipeError, match="not 3"):
        Options.parse({"recipe": 3})
    recipe = full()
    recipe.save(tmp_path / "r.json")
    before = (tmp_path / "r.json").read_text()
    recipe.about["loss"] = float("nan")
    with pytest.raises(RecipeError):
        recipe.save(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == before  # nothing is lost


def test_a_recipe_is_an_option_by_path(tmp_path: pathlib.Path) -> None:
    model = randomise(Net()).eval()
    recipe = recipe_of(model, X)
    recipe.save(tmp_path / "r.json")
    with torch.no_grad():
        one, report = run(model, X, recipe=recipe)
        two, _ = run(model, X, recipe=str(tmp_path / "r.json"))
    assert report["quantize-linear"].applied == len(recipe.sites)
    assert report["migrate-channels"].applied == len({*recipe.scales, *recipe.shifts})
    assert torch.equal(one, two)


def test_disabled_passes_and_the_preset_none() -> None:
    model = randomise(Net()).eval()
    recipe = recipe_of(model, X)
    with torch.no_grad():
        result, _ = run(model, X, recipe=recipe, disable=["quantize-linear"])
        assert error(result, model(X)) < 1e-5  # what is left is exact
        _, report = run(model, X, recipe=recipe, preset="none")
    assert report["quantize-linear"].applied == len(recipe.sites)


def test_another_model_is_an_error_also_without_strict() -> None:
    model = randomise(Net()).eval()
    recipe = recipe_of(model, X)
    recipe.shapes["down.weight"] = [16, 25]
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"down\.weight is \[16, 24\]"):
        run(model, X, strict=False, recipe=recipe)
    with pytest.raises(RecipeError, match=r"down\.weight"):
        sparsecc.bake(model, (X,), options={"recipe": recipe})


# ---- baked ---------------------------------------------------------------------------------------------


def test_a_baked_model_has_no_original_weights(tmp_path: pathlib.Path) -> None:
    model = randomise(Net()).eval()
    recipe = recipe_of(model, X)
    baked = sparsecc.bake(model, (X,), options={"recipe": recipe})
    state = baked.state_dict()
    rounded = [t for t in state.values() if t.dtype is torch.int8]
    assert len(rounded) == len(recipe.sites)
    assert sum(t.numel() for t in rounded) == sum(n * k for n, k in recipe.shapes.values())
    assert not any(t.dim() > 1 and t.is_floating_point() for t in state.values())
    with torch.no_grad():
        meant, _ = run(model, X, recipe=recipe)
        assert error(baked(X), meant) < 1e-3
        result, report = run(baked, X, lower="inductor")
        assert error(result, meant) < 1e-3
    assert {k.chosen for k in report.graphs[0].kernels} == {"cpp"}
    fresh = sparsecc.bake(randomise(Net(), seed=9).eval(), (X,), options={"recipe": recipe})
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(X), baked(X))


LOAD = """
import sys, torch, sparsecc.runtime.ops
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    fast = torch.compile(program.module(), backend="sparsecc", options={"lower": "aot_eager"})
    assert (fast(x) - expected).abs().max() < 1e-3 * expected.abs().max()
"""


def test_a_baked_program_is_saved_and_loaded_in_another_process(tmp_path: pathlib.Path) -> None:
    model = randomise(Net()).eval()
    recipe = recipe_of(model, X)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
        program = sparsecc.rewrite(exported, {"recipe": recipe})
        expected = program.module()(X[:2])
    torch.export.save(program, tmp_path / "m.pt2")
    torch.save((X[:2], expected), tmp_path / "x.pt")
    command = [sys.executable, "-c", LOAD, tmp_path / "m.pt2", tmp_path / "x.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_recipe_a_baked_model_is_plain_pytorch() -> None:
    """Whatever `codegen` is by default: leaving is free."""
    model = randomise(
        torch.nn.Sequential(torch.nn.LayerNorm(512), torch.nn.Linear(512, 1024))
    ).eval()
    baked = sparsecc.bake(model, (torch.randn(2, 512),))
    assert "sparsecc." not in baked.code
    assert "sparsecc_folded" in baked.code


def test_options_name_the_recipe_in_reports() -> None:
    model = randomise(Net()).eval()
    report = sparsecc.explain(model, X, options={"recipe": recipe_of(model, X)})
    assert json.loads(report.to_json())["options"]["recipe"]


def test_unknown_options_are_still_found() -> None:
    with pytest.raises(OptionsError, match="Did you mean 'recipe'"):
        Options.parse({"recipes": full()})


# ---- names -----------------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 32)
        self.norm = torch.nn.RMSNorm(32)
        self.head = torch.nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


@pytest.mark.parametrize("method", ["int8", "smoothquant"])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_weight_is_found_by_each_of_its_names(name: str, method: str) -> None:
    model = randomise(Tied()).eval()
    tokens = torch.randint(0, 20, (2, 5))
    recipe = sparsecc.calibrate(model, [tokens], methods=[method])
    (known,) = recipe.sites
    assert set(recipe.about["tied"]) == {"embed.weight", "head.weight"}
    if name != known:  # as another door would call it
        for part in (recipe.sites, recipe.shapes):
            part[name] = part.pop(known)
    report = sparsecc.Report()
    with torch.no_grad():
        compiled = torch.compile(
            model,
            backend="sparsecc",
            options={"recipe": recipe, "report": report, "lower": "eager"},
        )
        got = compiled(tokens)
    assert report["quantize-linear"].applied == 1
    exported = torch.export.export(model, (tokens,))
    baked = sparsecc.rewrite(exported, {"recipe": recipe}).module()
    with torch.no_grad():
        assert error(baked(tokens), got.double()) < 1e-5
        assert error(got, model(tokens).double()) > 1e-4  # rounded in both


def test_a_recipe_that_names_no_layer_of_a_graph_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = randomise(Net()).eval()
    recipe = Recipe("int8", sites={"other.weight": "int8"})
    run(model, X, recipe=recipe)
    assert "names none of this graph's" in caplog.text
    assert "other.weight" in caplog.text
