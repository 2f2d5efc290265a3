"""``sparsecc explain MODEL``: what the passes do to a model, and where and why they do nothing."""

from __future__ import annotations

from sparsecc.cli import common


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
    """Say what was rewritten, what was refused and why."""
    options = common.gather(passes, option)
    loaded, options = common.prepare(model, options, seed)
    from sparsecc.inspection import explain

    report = explain(loaded.model, *loaded.args, options=options, **loaded.kwargs)
    common.emit_report(report, output, json)


command.__name__ = "explain"
