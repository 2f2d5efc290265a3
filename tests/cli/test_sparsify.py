"""``sparsecc sparsify``: a recipe from the command line, its table, and wrong usage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sparsecc.cli.main import main
from sparsecc.recipe import Recipe
from sparsecc.report.sparse import text, thresholds
from sparsecc.report.text import plain

MODEL = "calibration.data:model"
DATA = ("--data", "calibration.data:batches")
DOWN = "blocks.0.down.weight"


def test_a_recipe_and_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    arguments = ["--method", "teal", "--method-option", "sparsity=0.25", "--skip", "head.*"]
    assert main(["sparsify", MODEL, "-o", str(output), *DATA, *arguments]) == 0
    captured = capsys.readouterr()
    recipe = Recipe.load(output)
    assert recipe.method == "teal"
    assert recipe.options == {"sparsity": 0.25, "skip": ["head.*"]}
    assert "head.weight" not in recipe.sparsity
    assert recipe.about["model"] == MODEL
    assert captured.out == plain(text(recipe))
    (row,) = [line for line in captured.out.splitlines() if DOWN in line]
    assert row.split() == [DOWN, "input", f"{float(recipe.thresholds[DOWN]):.3g}", "75.0%"]
    assert f"wrote {output}" in captured.err


def test_a_search_says_what_it_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    arguments = ["--budget", "0.05", "--metric", "rmse", "--held-back", "0.4"]
    assert main(["sparsify", MODEL, "-o", str(output), *DATA, *arguments]) == 0
    shown, recipe = capsys.readouterr().out, Recipe.load(output)
    assert recipe.method == "cats"
    assert recipe.budget["batches"] == 2
    assert shown == plain(text(recipe))
    assert f"rmse {recipe.budget['measured']:.3g} where 0.05 was allowed" in shown
    held = [line.split()[-1] for line in shown.splitlines() if line.strip().endswith(("yes", "no"))]
    assert held == ["yes" if entry["held"] else "no" for entry in recipe.tried]
    assert len(held) == 10


def test_whole_neurons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, arguments = tmp_path / "r.json", ["--method", "cfsp"]
    for pair in ("sparsity=0.25", "multiple=8", "blocks=blocks.*"):
        arguments += ["--method-option", pair]
    assert main(["sparsify", MODEL, "-o", str(output), *DATA, *arguments]) == 0
    shown = capsys.readouterr().out
    assert Recipe.load(output).options["blocks"] == ["blocks.*"]
    assert "1 layer sparse, 75.0% kept" in shown
    (row,) = [line for line in shown.splitlines() if DOWN in line]
    assert row.split() == [DOWN, "prune", "96", "neurons", "75.0%"]


def test_greedy_from_the_command_line(tmp_path: Path) -> None:
    output, arguments = tmp_path / "r.json", ["--method", "teal", "--skip", "head.*"]
    for pair in ("sparsity=0.3", 'blocks=["blocks.*"]', "step=0.3", "rows=64"):
        arguments += ["--method-option", pair]
    assert main(["sparsify", MODEL, "-o", str(output), *DATA, *arguments]) == 0
    recipe = Recipe.load(output)
    assert recipe.options["blocks"] == ["blocks.*"]
    densities = {site: entry["density"] for site, entry in recipe.sparsity.items()}
    assert len(set(densities.values())) > 1
    sizes = {site: math.prod(recipe.shapes[site]) for site in densities}
    gone = sum((1 - densities[site]) * size for site, size in sizes.items())
    assert gone == pytest.approx(0.3 * sum(sizes.values()))


def test_facts_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    assert main(["sparsify", MODEL, "-o", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["sparsity"] == Recipe.load(output).sparsity != {}
    assert facts["options"]["sparsity"] == 0.5
    assert "the only batch" in captured.err


def test_thresholds_in_few_words() -> None:
    import torch

    entries = {"a": {"law": "hidden"}, "b": {"law": "top", "k": 3}, "c": {"law": "prune"}}
    recipe = Recipe("made", sparsity={**entries, "d": {"law": "gaussian"}})
    recipe.thresholds["a"] = torch.tensor([0.25, 1.0, 0.5])
    recipe.neurons["c"] = torch.tensor([1, 2])
    assert [thresholds(recipe, site) for site in "abcd"] == ["0.25 … 1", "k 3", "2 neurons", "–"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "r.txt"], "--output is a .json file"),
        (["-o", "no/r.json"], "no folder 'no'"),
        (["-o", "r.json", "--method", "cat"], "Did you mean 'cats'"),
        (["-o", "r.json", "--method-option", "sparsity"], "KEY=VALUE, not 'sparsity'"),
        (["-o", "r.json", "--method-option", "budget=1"], "'budget' is no option of a method"),
        (["-o", "r.json", "--method-option", "sparsty=1"], "Did you mean 'sparsity'"),
        (["-o", "r.json", "--method-option", "sparsity=2"], "share of 0 to 1, not 2"),
        (["-o", "r.json", "--budget", "0.1"], "at least two are needed"),
        (["-o", "r.json", "--budget", "1", "--metric", "mse"], "unknown metric"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sparsify", MODEL, *arguments]) == 2
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if not line.startswith("note:")]
    assert len(said) == 1
    assert words in said[0]
    assert not (tmp_path / "r.json").exists()
