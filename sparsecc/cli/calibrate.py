"""``sparsecc calibrate MODEL``: a recipe of quantization from example data."""

from __future__ import annotations

import json as jsonlib
import pathlib
from typing import Annotated, Any

import typer

from sparsecc.cli import common
from sparsecc.errors import CalibrationError

Methods = Annotated[
    str, typer.Option(metavar="A,B", help="Methods to try (see docs/calibration.md).")
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--method-option",
        metavar="METHOD.KEY=VALUE",
        help="An option of a method; the value is JSON or plain text. Repeatable.",
    ),
]
Latency = Annotated[
    pathlib.Path | None,
    typer.Option(help="Save time instead of bytes: JSON, layer -> format -> seconds."),
]
Rows = Annotated[
    int | None,
    typer.Option(help="Save time, measured here for layers that read so many rows, not bytes."),
]
Require = Annotated[
    bool, typer.Option("--require", help="Fail where no layer can be quantized within the budget.")
]
Page = Annotated[
    pathlib.Path | None, typer.Option("--report", help="Write the search as a page: .html.")
]


def command(
    model: common.Model,
    output: common.RecipeFile,
    data: common.Data = None,
    methods: Methods = "int8",
    method_option: MethodOptions = None,
    budget: common.Budget = None,
    metric: common.MetricName = "kl",
    held_back: common.HeldBack = 0.2,
    latency: Latency = None,
    rows: Rows = None,
    skip: common.Skip = None,
    require: Require = False,
    report: Page = None,
    passes: common.Passes = None,
    option: common.OptionPairs = None,
    json: common.Json = False,
    seed: common.Seed = 0,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Observe a model over example data and write a recipe for quantizing its linear layers."""
    common.check_recipe_file(output)
    chosen = _methods(methods, method_option or [])
    table = None if latency is None else _table(latency)
    options = common.gather(passes, option)
    loaded, _ = common.prepare(model, options, seed)
    from sparsecc.calibration import calibrate
    from sparsecc.report.frontier import frontier, text

    recipe = calibrate(
        loaded.model,
        common.batches_of(loaded, data, seed),
        methods=chosen,
        budget=budget,
        metric=metric,
        held_back=held_back,
        target="bytes" if table is None and rows is None else "latency",
        latency=table,
        rows=1 if rows is None else rows,
        skip=skip or (),
        require=require,
        options=options,
    )
    common.save_recipe(recipe, model, output)
    if report is not None:
        common.emit(frontier(recipe), report)
    if json:
        common.emit_facts(recipe, "sites", "activations")
    else:
        common.show(text(recipe))


command.__name__ = "calibrate"


def _methods(names: str, pairs: list[str]) -> dict[str, dict[str, Any]]:
    """Methods with their options.

    Raises:
        CalibrationError: a pair is of another form, or of a method that is not tried.
    """
    chosen: dict[str, dict[str, Any]] = {n.strip(): {} for n in names.split(",") if n.strip()}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        method, dot, name = key.strip().partition(".")
        if not equals or not dot or method not in chosen:
            raise CalibrationError(
                f"--method-option takes METHOD.KEY=VALUE of a method in --methods, not {pair!r}."
            )
        chosen[method][name] = common.value_of(value)
    return chosen


def _table(path: pathlib.Path) -> dict[str, dict[str, float]]:
    try:
        found = jsonlib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"--latency {str(path)!r} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise CalibrationError(
            f"--latency {str(path)!r} is no table of layer -> format -> seconds."
        )
    return found
