"""``sparsecc sparsify MODEL``: a recipe of which neurons or features count, from example data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from sparsecc.cli import common
from sparsecc.errors import CalibrationError, unknown

Method = Annotated[str, typer.Option(metavar="NAME", help="The method (see docs/sparsity.md).")]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--method-option",
        metavar="KEY=VALUE",
        help="An option of the method; the value is JSON or plain text. Repeatable.",
    ),
]


def command(
    model: common.Model,
    output: common.RecipeFile,
    data: common.Data = None,
    method: Method = "cats",
    method_option: MethodOptions = None,
    budget: common.Budget = None,
    metric: common.MetricName = "perplexity",
    held_back: common.HeldBack = 0.2,
    skip: common.Skip = None,
    passes: common.Passes = None,
    option: common.OptionPairs = None,
    json: common.Json = False,
    seed: common.Seed = 0,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Observe a model over example data and write a recipe for leaving out neurons or features."""
    from sparsecc.methods import SPARSITY

    common.check_recipe_file(output)
    if method not in SPARSITY:
        raise CalibrationError(unknown("method", method, SPARSITY))
    given = _given(method_option or [])
    options = common.gather(passes, option)
    loaded, _ = common.prepare(model, options, seed)
    from sparsecc.report.sparse import text
    from sparsecc.sparsity import sparsify

    recipe = sparsify(
        loaded.model,
        common.batches_of(loaded, data, seed),
        method,
        budget=budget,
        metric=metric,
        held_back=held_back,
        skip=skip or (),
        options=options,
        **given,
    )
    common.save_recipe(recipe, model, output)
    if json:
        common.emit_facts(recipe, "sparsity")
    else:
        common.show(text(recipe))


command.__name__ = "sparsify"

_OWN = (
    "budget",
    "metric",
    "held_back",
    "skip",
    "options",
    "model",
    "batches",
    "method",
    "progress",
)


def _given(pairs: Sequence[str]) -> dict[str, Any]:
    """The options of the method.

    Raises:
        CalibrationError: a pair is of another form, or has an option of its own.
    """
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise CalibrationError(f"--method-option takes KEY=VALUE, not {pair!r}.")
        if key in _OWN:
            raise CalibrationError(f"--method-option: {key!r} is no option of a method.")
        given[key] = common.value_of(value)
    return given
