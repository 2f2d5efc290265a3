"""``sparsecc verify MODEL``: prove every rewrite on a model's own weights against fp64."""

from __future__ import annotations

import typer

from sparsecc.cli import common
from sparsecc.errors import VerificationError


def command(
    model: common.Model,
    passes: common.Passes = None,
    option: common.OptionPairs = None,
    output: common.ReportFile = None,
    json: common.Json = False,
    seed: common.Seed = 0,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Prove each pass and the result against fp64; exit code 1 when a proof fails or cannot be made."""
    options = common.gather(passes, option)
    loaded, options = common.prepare(model, options, seed)
    from sparsecc.inspection import verify
    from sparsecc.report.words import proof_line

    report = verify(loaded.model, *loaded.args, options=options, **loaded.kwargs)
    common.emit_report(report, output, json)
    rewritten = any(not graph.fell_through for graph in report.graphs)
    if rewritten and not report.verified:
        why = [f"{v.stage}: {v.skipped}" for v in report.verdicts if v.skipped]
        why += report.fallbacks
        raise VerificationError("\n".join([f"{proof_line(report)}.", *why]))
    typer.echo(f"{proof_line(report)}.", err=True)


command.__name__ = "verify"
