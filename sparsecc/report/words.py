"""Words that every view of a report shares: sizes, times, source lines, and refusals by code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from sparsecc.report.model import GraphReport, KernelChoice, MatchRecord, Report, Verdict

SHOWN = 3  # places listed for one reason before "+N more"


@dataclass
class Group:
    """Refusals of one pass with the same code; ``reason`` is the first one's."""

    code: str
    reason: str
    records: list[MatchRecord] = field(default_factory=list)


def refusal_groups(records: Iterable[MatchRecord]) -> list[Group]:
    """Refused records by code, the most frequent first (ties in the order in which they came)."""
    groups: dict[str, Group] = {}
    for record in records:
        if record.status == "refused":
            code = record.code or "refused"
            groups.setdefault(code, Group(code, record.reason)).records.append(record)
    return sorted(groups.values(), key=lambda group: -len(group.records))


def opaque_groups(graph: GraphReport) -> dict[str, list[str]]:
    """Reason -> the nodes that stayed as Dynamo had them for that reason."""
    groups: dict[str, list[str]] = {}
    for node, reason in graph.opaque.items():
        groups.setdefault(reason, []).append(node)
    return groups


def first(items: list[str], shown: int = SHOWN) -> str:
    """``a, b, c, +4 more``."""
    rest = [f"+{len(items) - shown} more"] if len(items) > shown else []
    return ", ".join([*items[:shown], *rest])


def short_where(where: str, parts: int = 2) -> str:
    """A source line with the last ``parts`` of its path: ``llama/modeling.py:54, in forward``."""
    path, colon, rest = where.rpartition(":")  # from the right: a Windows path has a colon too
    if not colon:
        return where
    return "/".join(re.split(r"[/\\]", path)[-parts:]) + colon + rest


def plural(count: int, noun: str) -> str:
    suffix = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{suffix}"


def scaled(value: float, unit: str, steps: str = " KMGTP", base: float = 1000.0) -> str:
    """``1_500_000, "FLOP"`` -> ``1.5 MFLOP``."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    step = 0
    while value >= base and step < len(steps) - 1:
        value, step = value / base, step + 1
    number = f"{value:.0f}" if step == 0 else f"{value:.1f}"
    return f"{sign}{number} {steps[step].strip()}{unit}"


def in_bytes(count: int) -> str:
    if abs(count) < 1024:
        return f"{count} B"
    return scaled(count, "iB", base=1024.0)


def in_seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def kernel(choice: KernelChoice) -> str:
    """What runs a region, and the times or the reason it was chosen by."""
    why = choice.reason or ", ".join(f"{n} {in_seconds(t)}" for n, t in choice.seconds.items())
    return f"{choice.count} × {choice.region} by {choice.chosen}: {choice.shape} ({why})"


def savings(bytes_saved: int, flops_saved: int, launches_saved: int) -> list[str]:
    """What is saved per call, without the zeros."""
    found = []
    if bytes_saved:
        found.append(in_bytes(bytes_saved))
    if flops_saved:
        found.append(scaled(flops_saved, "FLOP"))
    if launches_saved:
        found.append(plural(launches_saved, "launch"))
    return found


def stage_seconds(graph: GraphReport) -> dict[str, float]:
    """Time per stage. The driver's total ("sparsecc") is left out: its parts are there."""
    return {stage: spent for stage, spent in graph.seconds.items() if stage != "sparsecc"}


def verdict_words(verdict: Verdict) -> str:
    """One line on a proof: the errors that were compared, or why nothing was."""
    if verdict.skipped:
        return f"not checked: {verdict.skipped}"
    words = []
    if verdict.tensors:
        own = "eager's own" if verdict.loss is None else "that of the rounded program in fp64"
        words.append(f"worst error {verdict.worst_ratio:.2f}× {own}")
    if verdict.loss is not None:
        words.append(f"lossy by {verdict.loss:.2e} of the outputs")
    words.append(f"algebra {verdict.algebra:.1e} apart in fp64")
    return "; ".join(words)


def verdict_status(verdict: Verdict) -> str:
    if verdict.skipped:
        return "skipped"
    return "passed" if verdict.passed else "FAILED"


def headline(report: Report) -> str:
    """The one sentence on top of every view."""
    applied, refused = counts(report)
    nodes = sum(graph.nodes for graph in report.graphs)
    return (
        f"{plural(applied, 'rewrite')} applied, {refused:,} refused; "
        f"{plural(len(report.graphs), 'graph')} of {plural(nodes, 'node')}, "
        f"{report.coverage:.0%} seen as ATen; "
        f"{plural(len(report.graph_breaks), 'graph break')}"
    )


def counts(report: Report) -> tuple[int, int]:
    """Rewrites applied and refused. Canonical forms only prepare for them and do not count."""
    rewrites = [record for record in report if record.family != "canonical"]
    return sum(r.applied for r in rewrites), sum(r.refused for r in rewrites)


def proof_line(report: Report) -> str:
    """Whether it was proved, in one sentence."""
    ran = [v for v in report.verdicts if not v.skipped]
    if not ran:
        return "not verified" if not report.verdicts else "not verified (nothing could be checked)"
    failed = [v.stage for v in ran if not v.passed]
    if failed:
        return f"FAILED verification at {first(failed)}"
    return f"verified against fp64 ({plural(len(ran), 'check')} passed)"
