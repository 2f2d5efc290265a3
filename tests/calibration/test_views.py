"""The page and the table of a search, and the command line."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from calibration.models import decoder, token_batches

from sparsecc.cli.main import main
from sparsecc.methods import METHODS, make
from sparsecc.metrics import METRICS
from sparsecc.observe import observe
from sparsecc.recipe import Recipe
from sparsecc.report.frontier import best_of, chosen, frontier, headline, text
from sparsecc.report.text import plain


def searched() -> Recipe:
    """A recipe made by hand, as a search leaves it; one name needs escaping."""
    tried = [
        {
            "method": "awq",
            "bytes": 4000,
            "held": False,
            "measured": 0.5,
            "formats": {"int4g64z": 3},
        },
        {"method": "awq", "bytes": 6000, "held": True, "measured": 0.01, "formats": {"int8": 3}},
        {"method": "int8", "bytes": 9000, "held": True, "measured": 0.02, "formats": {"int8": 3}},
        {"method": "w8a8", "bytes": 9000, "held": False, "measured": None, "formats": {"int8s": 3}},
        {"method": "int8", "bytes": 20000, "held": True, "measured": 0.0, "formats": {"dense": 3}},
    ]
    return Recipe(
        "awq",
        sites={"a<b>.weight": "int8", "c.weight": "int8s"},
        shapes={"a<b>.weight": [4, 8], "c.weight": [8, 8]},
        activations={"c.weight": 0.125},
        budget={"metric": "kl", "increase": 0.03, "measured": 0.01, "held": True},
        tried=tried,
        about={"bytes": 6000, "bytes_before": 24000, "formats": {"dense": 1, "int8": 2}, "rows": 5},
        versions={"torch": "2.13"},
    )


def test_the_page_is_whole_and_shows_every_candidate() -> None:
    page = frontier(searched())
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    drawing = ET.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    points = drawing.findall(f"{name}circle")
    assert len(points) == 3  # neither what was not finite nor 0 has a place on a logarithmic scale
    assert [p.get("r") for p in points].count("7") == 1
    assert "a&lt;b&gt;.weight" in page
    assert "a<b>" not in page
    assert "budget 0.03" in svg
    for words in ("the budget holds", "5.9 KiB", "2 of 3 linear layers quantized", "0.125"):
        assert words in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    # Larger metrics are higher, more bytes further right.
    x, y = ([float(p.get(axis) or 0) for p in points] for axis in ("cx", "cy"))
    assert x == sorted(x)
    assert y[0] < y[2] < y[1]


def test_the_table_marks_what_was_chosen() -> None:
    shown = plain(text(searched()))
    assert "awq ←" in shown
    assert shown.count("←") == 1
    assert "where 0.03 was allowed" in shown
    assert "–" in shown


def test_the_edge_holds_what_no_other_beats() -> None:
    recipe = searched()
    assert [e["bytes"] for e in best_of(recipe.tried)] == [4000, 6000, 20000]
    assert chosen(recipe) is recipe.tried[1]
    recipe.method = "int8"
    assert chosen(recipe) is None


def test_a_recipe_without_a_search() -> None:
    recipe = make("int8", observe(decoder(), token_batches(1)))
    page = frontier(recipe)
    assert "not measured" in page
    assert "<svg" not in page
    assert headline(recipe) == "8 of 8 linear layers quantized"
    assert "recipe  int8" in plain(text(recipe))


def test_nothing_that_holds_is_said() -> None:
    recipe = searched()
    recipe.budget["held"] = False
    assert "nothing holds the budget" in frontier(recipe)


# ---- the command line ---------------------------------------------------------------------------------

MODEL = "calibration.data:model"


def test_a_recipe_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, page = tmp_path / "r.json", tmp_path / "r.html"
    arguments = [
        "--data",
        "calibration.data:batches",
        "--methods",
        "int8, int4",
        "--budget",
        "1e-3",
    ]
    arguments += ["--method-option", "int4.group=32", "--skip", "head.*", "--report", str(page)]
    assert main(["calibrate", MODEL, "-o", str(output), *arguments]) == 0
    captured = capsys.readouterr()
    recipe = Recipe.load(output)
    assert recipe.method == "int4"
    assert recipe.options["group"] == 32
    assert "head.weight" not in recipe.sites
    assert recipe.about["model"] == MODEL
    assert captured.out == plain(text(recipe))
    assert f"wrote {output}" in captured.err
    assert page.read_text() == frontier(recipe)


def test_facts_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    assert main(["calibrate", MODEL, "-o", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["method"] == "int8"
    assert facts["sites"] == Recipe.load(output).sites
    assert "the only batch" in captured.err


def test_time_by_a_file(tmp_path: Path) -> None:
    table, output = tmp_path / "t.json", tmp_path / "r.json"
    sites = observe(decoder(), token_batches(1)).sites
    table.write_text(json.dumps({n: {"dense": 2.0, "int8x32": 1.0} for n in sites}))
    arguments = ["--data", "calibration.data:ready", "--budget", "1", "--latency", str(table)]
    assert main(["calibrate", MODEL, "-o", str(output), *arguments]) == 0
    assert Recipe.load(output).budget["target"] == "latency"
    table.write_text("[1]")
    assert main(["calibrate", MODEL, "-o", str(output), *arguments]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "r.txt"], ".json file, not 'r.txt'"),
        (["-o", "r.json", "--methods", "awk"], "Did you mean 'awq'"),
        (["-o", "r.json", "--method-option", "awq.group=32"], "of a method in --methods"),
        (["-o", "r.json", "--data", "calibration.data"], "is no data. Give module:function"),
        (["-o", "r.json", "--data", "calibration.data:batchs"], "Did you mean 'batches'"),
        (["-o", "r.json", "--data", "calibration.data:number"], "gives int, which is no iterable"),
        (["-o", "r.json", "--data", "calibration.data:broken"], "failed: RuntimeError: no disk"),
        (["-o", "r.json", "--latency", "absent.json"], "cannot be read"),
        (["-o", "r.json", "--budget", "0.1"], "at least two are needed"),
        (
            ["-o", "r.json", "--budget", "1e-15", "--data", "calibration.data:ready", "--require"],
            "no layer",
        ),
        (["-o", "no/r.json"], "there is no folder 'no'"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", MODEL, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_an_exported_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    program, recipe = tmp_path / "m.pt2", tmp_path / "r.json"
    (batch,) = token_batches(1)
    torch.export.save(torch.export.export(decoder(), (batch,)), program)
    assert main(["calibrate", str(program), "-o", str(recipe)]) == 0
    assert Recipe.load(recipe).sites == make("int8", observe(decoder(), [batch])).sites


def test_importing_the_command_needs_no_torch() -> None:
    code = "import sys, sparsecc.cli.calibrate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_method_and_option_is_described() -> None:
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("|")]
    for name, (module, _) in METHODS.items():
        assert f"| `{name}` |" in page
        function = getattr(importlib.import_module(f"sparsecc.methods.{module}"), module)
        for option in list(inspect.signature(function).parameters)[1:]:
            (methods,) = (of for names, of in rows if f"`{option}`" in names)
            assert option == "skip" or name in methods, (name, option)
    for metric in METRICS:
        assert f"| `{metric}` |" in page
