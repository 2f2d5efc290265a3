"""``python -m conformance.run SUITE...``: judge suites and write docs/conformance.md from the results."""

from __future__ import annotations

import pathlib
import signal
import sys
from typing import Annotated

import typer
from conformance import runner, sample, table
from conformance.runner import Limits, Row
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SUITES = ("opinfo", "moduleinfo", "transformers", "timm")
app = typer.Typer(add_completion=False)


@app.command()
def main(
    suites: Annotated[list[str] | None, typer.Argument(help="Suites; all by default.")] = None,
    lower: Annotated[str, typer.Option(help="aot_eager (breadth) or inductor.")] = "aot_eager",
    fixed: Annotated[bool, typer.Option("--sample", help="The fixed sample only.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="These names only.")] = None,
    again: Annotated[bool, typer.Option(help="Also names that have a result.")] = False,
    failed: Annotated[bool, typer.Option(help="Again what did not pass.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes at once.")] = 2,
    seconds: Annotated[float, typer.Option(help="Time limit of a name.")] = 0.0,
    mib: Annotated[float, typer.Option(help="Memory limit of a name.")] = 6000.0,
    results: Annotated[
        pathlib.Path | None, typer.Option(help="Results file; one a suite by default.")
    ] = None,
    page: Annotated[bool, typer.Option(help="Write docs/conformance.md afterwards.")] = True,
) -> None:
    """Judge every name of the suites that has no result yet."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end, too
    limits = Limits(seconds or (600.0 if lower == "inductor" else 120.0), mib, jobs)
    bad = 0
    for suite in suites or SUITES:
        path = results or runner.RESULTS / f"{suite}-{lower}.jsonl"
        chosen = only or (sample.names(suite, lower) if fixed else runner.load(suite).names())
        before = runner.read(path)
        left = [n for n in chosen if again or _wanted(before.get((suite, n, lower)), failed)]
        bad += sum(map(_bad, _run(suite, left, lower, limits, path)))
    if page:
        table.write()
    raise typer.Exit(int(bad > 0))


def _wanted(row: Row | None, failed: bool) -> bool:
    return row is None or (failed and row["status"] not in ("pass", "not built"))


def _run(suite: str, names: list[str], lower: str, limits: Limits, path: pathlib.Path) -> list[Row]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{suite} ({lower})", total=len(names))

        def finished(row: Row) -> None:
            runner.append(path, row)
            progress.advance(task)
            if row["status"] not in ("pass", "not built"):
                words = f"{row['name']}: {row['status']}: {row.get('words', '')}"
                console.print(f"{words} (peer: {row.get('peer', '-')})", markup=False)

        try:
            return runner.run(suite, names, lower, limits, finished)
        finally:
            if path.exists():
                runner.compact(path)


def _bad(row: Row) -> bool:
    return table.fails(row) and row["name"] not in sample.expected_failures(row["suite"])


if __name__ == "__main__":
    app()
