"""The pass manager: canonical forms, then the chosen rewrites, under instruments; everything is recorded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from sparsecc.errors import PassError, RecipeError, RequirementError, first_line
from sparsecc.instruments import Instrument
from sparsecc.log import log
from sparsecc.options import Options, disabled
from sparsecc.passes import registry
from sparsecc.passes.analysis.sites import sites
from sparsecc.passes.base import Analyses, Context, Match, Pass, Refusal
from sparsecc.program import Program, source_line
from sparsecc.recipe import Recipe
from sparsecc.report.model import GraphReport, MatchRecord, PassReport


def run(
    program: Program,
    options: Options,
    report: GraphReport,
    instruments: Sequence[Instrument] = (),
    last: Sequence[Pass] = (),
) -> int:
    """Rewrite ``program`` in place; returns how many rewrites were applied (canonical ones not counted).

    Args:
        last: passes that run behind those of the options.
    Raises:
        PassError: a pass failed inside, under ``strict`` (otherwise the graph should fall through).
    """
    report.nodes = len(program.graph.nodes)
    report.opaque = dict(program.opaque)
    _stage("captured", program, True, instruments)
    passes = [*options.pipeline(), *last]
    if not passes:
        return 0
    passes = [_under_names_of(program, rewriting) for rewriting in passes]
    recipes = (getattr(rewriting, "recipe", None) for rewriting in passes)
    program.given = frozenset().union(*(r.given() for r in recipes if isinstance(r, Recipe)))
    canonical = [registry.load(name)() for name in registry.CANONICAL]
    changed = [_run_pass(p, program, options, report, instruments) for p in canonical]
    _stage("canonical", program, any(changed), instruments)
    applied = 0
    for rewriting in passes:
        count = _run_pass(rewriting, program, options, report, instruments)
        applied += count
        _stage(rewriting.name, program, count > 0, instruments)
    _say_if_unnamed(program, passes, report)
    return applied


def _say_if_unnamed(program: Program, passes: Sequence[Pass], report: GraphReport) -> None:
    """Warn where a recipe has nothing to say of any layer."""
    asked = [p for p in passes if p.name in registry.FOR_RECIPES and p.name != "quantize-softmax"]
    if any(report.passes[rewriting.name].matches for rewriting in asked):
        return
    for rewriting in asked:
        recipe = getattr(rewriting, "recipe", None)
        if not isinstance(recipe, Recipe) or not (recipe.sites or recipe.sparsity):
            continue
        found = Analyses(program).get(sites)
        if found:
            log.warning(
                "the recipe (%r) names none of this graph's %d linear layers: %s here, %s there. Another "
                "model, or a part behind a graph break, whose names begin at that part.",
                recipe.method,
                len(found),
                found[0].name,
                next(iter({**recipe.sites, **recipe.sparsity})),
            )
        return


def _under_names_of(program: Program, rewriting: Pass) -> Pass:
    """The pass with its recipe, if it has one, by the names of this program."""
    recipe = getattr(rewriting, "recipe", None)
    if not isinstance(recipe, Recipe):
        return rewriting
    found: Any = rewriting
    return cast(
        "Pass", replace(found, recipe=recipe.under({s.fqn for s in program.slots.values()}))
    )


def _run_pass(
    rewriting: Pass,
    program: Program,
    options: Options,
    report: GraphReport,
    instruments: Sequence[Instrument],
) -> int:
    """Find, check and rewrite once over the program; returns the number of rewrites."""
    started = time.perf_counter()
    record = PassReport(rewriting.name, rewriting.family, rewriting.law, rewriting.exactness.value)
    report.passes[rewriting.name] = record
    context = Context(program, Analyses(program), rewriting.name in options.explicit)
    match: Match | None = None
    try:
        # All are judged on the same graph before any is rewritten; facts are computed once.
        legal: list[Match] = []
        for match in rewriting.find(context):
            refusal = rewriting.check(match, context)
            if refusal is not None:
                record.matches.append(_refused(match, refusal))
            elif not _allowed(rewriting, instruments):
                record.matches.append(_record("skipped", match, reason="out of fuel"))
            else:
                legal.append(match)
        for match in legal:
            saving = rewriting.saving(match, context)
            rewriting.rewrite(match, context)
            record.matches.append(_record("applied", match))
            record.bytes_saved += saving.bytes
            record.flops_saved += saving.flops
            record.launches_saved += saving.launches
        if record.applied:
            program.sweep()
    except RecipeError:  # the user's to mend: the message names the site
        raise
    except Exception as error:
        where = f" at {match.name} ({match.where})" if match is not None else ""
        raise PassError(
            f"pass {rewriting.name!r} failed{where}: {type(error).__name__}: {first_line(error)}. "
            f"Leave it out with options={{'disable': [{rewriting.name!r}]}}."
        ) from error
    finally:
        record.seconds = time.perf_counter() - started
    return record.applied


def _allowed(rewriting: Pass, instruments: Sequence[Instrument]) -> bool:
    # Canonical forms are not rewrites of their own: fuel is for what the user chose.
    if rewriting.family == "canonical":
        return True
    return all(i.may_rewrite(rewriting.name) for i in instruments)


def _stage(name: str, program: Program, changed: bool, instruments: Sequence[Instrument]) -> None:
    for instrument in instruments:
        instrument.stage(name, program, changed)


def _record(status: str, match: Match, reason: str = "") -> MatchRecord:
    return MatchRecord(status, match.name, match.module, match.where, match.note, reason=reason)


def _refused(match: Match, refusal: Refusal) -> MatchRecord:
    record = _record("refused", match, refusal.reason)
    record.code, record.blame = refusal.code, refusal.node
    record.blame_where = refusal.where or source_line(match.node)
    return record


def announce(report: GraphReport, options: Options) -> None:
    """Match counts and refusals at INFO; a warning when a pass that was asked for matched nothing."""
    for record in report.passes.values():
        if record.family == "canonical" or not record.matches:
            continue
        log.info(
            "graph %d: %s applied %d, refused %d",
            report.index,
            record.name,
            record.applied,
            record.refused,
        )
        for refusal in record.refusals:
            log.info(
                "  refused [%s] %s (%s): %s",
                refusal.code,
                refusal.node,
                refusal.where or "unknown source",
                refusal.reason,
            )
    asked = [name for name, _ in options.passes or () if name not in options.disable]
    for name in asked:
        if name in report.passes and not report.passes[name].applied:
            refused = report.passes[name].refused
            log.warning(
                "graph %d: pass %r was asked for and applied nowhere (%s). "
                "sparsecc.explain(model, *inputs) says why.",
                report.index,
                name,
                f"{refused} places refused" if refused else "no place matches",
            )


def check_requirements(applied: dict[str, int], options: Options) -> None:
    """Compare counts with ``require``.

    Raises:
        RequirementError: a pass was applied less (or, for ``==``, more) often than asked for.
    """
    if disabled():
        return  # the kill switch must not break the program that it is to save
    for name, (relation, wanted) in options.require.items():
        got = applied.get(name, 0)
        if (got < wanted) if relation == ">=" else (got != wanted):
            raise RequirementError(
                f"require={{{name!r}: '{relation}{wanted}'}} is not met: the pass was applied {got} times. "
                "sparsecc.explain(model, *inputs) lists what was refused and why."
            )
