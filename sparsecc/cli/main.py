"""The entry point: errors become one message and an exit code.

Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 an error inside, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from sparsecc.cli import calibrate, doctor, dump, explain, passes, sparsify, verify
from sparsecc.errors import SparseccError

_LONGEST = 30  # lines of a message

app = typer.Typer(
    name="sparsecc",
    help="Published efficiency methods as verified compiler passes.",
    epilog="A MODEL is module:factory, timm:NAME, hf:DIRECTORY or a .pt2 file. "
    "What a command makes goes to stdout, everything else to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (explain, verify, dump, calibrate, sparsify, passes, doctor):
    app.command()(command.command)


def _version(wanted: bool) -> None:
    if wanted:
        import sparsecc

        typer.echo(f"sparsecc {sparsecc.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Published efficiency methods as verified compiler passes."""


def run() -> None:
    """What the ``sparsecc`` script calls."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, also after errors."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=args, prog_name="sparsecc")
    except SystemExit as done:  # how typer ends, with 0 too
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        _say("interrupted", "")
        return 130
    except SparseccError as error:
        if "--debug" in args:
            traceback.print_exc()
        _say("error: ", str(error))
        return error.exit_code
    except Exception as error:
        if "--debug" in args:
            traceback.print_exc()
            return 3
        problem = _toolchain_problem(error)
        if problem:
            _say("error: ", f"{problem}.")
            return 2
        _say("internal error: ", f"{type(error).__name__}: {error}")
        _say("", "Run the command again with --debug for the traceback.")
        return 3
    return 0


def _toolchain_problem(error: Exception) -> str:
    try:
        from sparsecc._torch import toolchain_problem
    except Exception:  # torch itself cannot be imported, perhaps for the same reason
        return ""
    return toolchain_problem(error)


def _say(label: str, message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    lines = message.rstrip().splitlines()
    if len(lines) > _LONGEST:
        lines = [*lines[:_LONGEST], f"… {len(lines) - _LONGEST} more lines"]
    text = Text.assemble((label, "bold red"), "\n".join(lines))
    # Soft wrap: a path or a command must stay whole, so that it can be copied.
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


if __name__ == "__main__":
    run()
