"""Options that several commands take, and how they write their results."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsecc.errors import CalibrationError, OptionsError

if TYPE_CHECKING:
    from sparsecc.cli.models import LoadedModel
    from sparsecc.recipe import Recipe
    from sparsecc.report.model import Report


def _verbose(context: typer.Context, wanted: bool) -> None:
    """Show the ``sparsecc`` logger on stderr until the command ends."""
    if not wanted:
        return
    logger, handler = logging.getLogger("sparsecc"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def restore() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    context.call_on_close(restore)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="module:factory, timm:NAME, hf:DIRECTORY, or a .pt2 file."
    ),
]
Passes = Annotated[
    str | None,
    typer.Option("--passes", metavar="A,B", help="Run these passes only (see `sparsecc passes`)."),
]
OptionPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the backend; the value is JSON or plain text. Repeatable.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights and inputs.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_verbose, help="Log each pass to stderr.")
]
# Read by main() from the command line itself, which also sees errors before a command starts.
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
ReportFile = Annotated[
    pathlib.Path | None,
    typer.Option("--output", "-o", help="Write to this file: .html, .json or text."),
]
# Of the commands that write a recipe.
RecipeFile = Annotated[
    pathlib.Path,
    typer.Option("--output", "-o", help="The recipe: a .json file; tensors go beside it."),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="A function that returns batches. Without it: the model's own inputs.",
    ),
]
Budget = Annotated[
    float | None, typer.Option(help="The largest value of the metric; 0 is no loss.")
]
MetricName = Annotated[str, typer.Option(help="kl, rmse, agreement or perplexity.")]
HeldBack = Annotated[float, typer.Option(help="Share of the batches that measures.")]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to leave alone. Repeatable."),
]


def gather(passes: str | None, pairs: Sequence[str] | None) -> dict[str, Any]:
    """The options of the command line, validated before any model is loaded.

    Raises:
        OptionsError: an unknown option, pass or value, or a pair without ``=``.
    """
    from sparsecc.options import Options

    options: dict[str, Any] = {}
    if passes is not None:
        options["passes"] = [name.strip() for name in passes.split(",") if name.strip()]
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionsError(f"--option takes KEY=VALUE, not {pair!r}.")
        options[key.strip()] = value_of(value)
    Options.parse(options)
    return options


def value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_recipe_file(output: pathlib.Path) -> None:
    """Said before the work and not after it.

    Raises:
        CalibrationError: a recipe cannot be written there.
    """
    if output.suffix != ".json":
        raise CalibrationError(f"--output is a .json file, not {str(output)!r}.")
    if not output.parent.is_dir():
        raise CalibrationError(f"--output: there is no folder {str(output.parent)!r}.")


def batches_of(loaded: LoadedModel, data: str | None, seed: int) -> Any:
    """The batches of ``--data``; without it the model's inputs as the only one, which is said."""
    from sparsecc.cli.models import load_data

    if data is not None:
        return load_data(data, seed)
    note("no --data: the model's example inputs are the only batch.")
    return [loaded.kwargs or loaded.args]


def save_recipe(recipe: Recipe, model: str, output: pathlib.Path) -> None:
    """Write a recipe that names the model which it is for."""
    recipe.about["model"] = model
    recipe.save(output)
    note(f"wrote {output}")


def emit_facts(recipe: Recipe, *names: str) -> None:
    """JSON: what can be said without tensors, of every recipe and in the fields ``names``."""
    shared = ("shapes", "options", "budget", "tried", "about", "versions")
    facts = {name: getattr(recipe, name) for name in ("method", *names, *shared)}
    emit(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def prepare(spec: str, options: dict[str, Any], seed: int) -> tuple[LoadedModel, dict[str, Any]]:
    """The model, and the options with a report that carries its name."""
    from sparsecc.cli.models import load
    from sparsecc.report.model import Report

    problem = cache_problem()
    if problem:  # torch would fail while it is imported, in words that blame the model
        raise OptionsError(problem)
    loaded = load(spec, seed)
    for line in loaded.notes:
        note(line)
    return loaded, {"report": Report(model=spec), **options}


def cache_problem() -> str:
    """Why Inductor's cache folder cannot be used, with the next step; "" when it can."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return (
            f"Inductor's cache folder {folder!r} cannot be written ({error.strerror}). "
            "Set TORCHINDUCTOR_CACHE_DIR to a folder that can, or unset it."
        )


def note(message: str) -> None:
    typer.echo(f"note: {message}", err=True)


def emit(text: str, output: pathlib.Path | None = None) -> None:
    """To stdout, or to a file.

    Raises:
        OptionsError: the file cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionsError(f"cannot write {str(output)!r}: {error.strerror or error}.") from error
    note(f"wrote {output}")


def emit_report(report: Report, output: pathlib.Path | None, as_json: bool) -> None:
    """A report in the form asked for: by flag, by the file's suffix, or for the terminal."""
    suffix = output.suffix.lower() if output else ""
    if as_json or suffix == ".json":
        emit(report.to_json() + "\n", output)
    elif suffix in (".html", ".htm"):
        emit(report.to_html(), output)
    elif output is None:
        show(report)
    else:
        emit(str(report), output)


def show(renderable: Any, width: int = 100) -> None:
    """A rich renderable to stdout: in colour on a terminal, else as plain text of fixed width."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(renderable)
    else:
        from sparsecc.report.text import plain

        emit(plain(renderable, width))
