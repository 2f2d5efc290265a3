"""A :class:`~sparsecc.report.model.Report` for the terminal: one screen for usual models."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparsecc.report import words
from sparsecc.report.model import GraphReport, MatchRecord, PassReport, Report, Verdict

WIDTH = 100
_STATUS = {"passed": ("✓", "green"), "FAILED": ("✗", "bold red"), "skipped": ("–", "yellow")}


def render(report: Report) -> RenderableType:
    """The report as one renderable for rich."""
    parts: list[RenderableType] = [_head(report)]
    records = list(report)
    if any(record.matches for record in records):
        parts.append(_passes(records))
    idle = [record.name for record in records if not record.matches]
    if idle:
        parts.append(_labelled("no match", ", ".join(idle)))
    parts.extend(_refusals(record) for record in records if record.refused)
    if report.graphs:
        parts.append(_section("graphs"))
        parts.extend(_graph(graph) for graph in report.graphs)
    if report.graph_breaks:
        parts.append(_section("graph breaks"))
        parts.append(_bullets(report.graph_breaks))
    if report.verdicts:
        parts.append(_section("proof"))
        parts.extend(
            _verdict(graph, verdict, len(report.graphs) > 1)
            for graph in report.graphs
            for verdict in graph.verdicts
        )
    return Group(*parts)


def to_text(report: Report) -> str:
    """The report as plain text: no colours, fixed width, the same bytes for the same report."""
    return plain(render(report))


def plain(renderable: RenderableType, width: int = WIDTH) -> str:
    """Any renderable as plain text, whatever terminal or environment there is."""
    out = io.StringIO()
    console = Console(
        file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False,
        highlight=False, emoji=False, markup=False, legacy_windows=False, _environ={},
    )  # fmt: skip
    console.print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _head(report: Report) -> RenderableType:
    head = Text()
    head.append("sparsecc", style="bold")
    if report.model:
        head.append(f"  {report.model}")
    head.append(f"\n{words.headline(report)}\n")
    proof = words.proof_line(report)
    style = {"F": "bold red", "v": "green"}.get(proof[0], "yellow")
    head.append(proof, style=style)
    return head


def _passes(records: list[PassReport]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("pass", no_wrap=True)
    table.add_column("exactness")
    for title in ("applied", "refused", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("saved per call", overflow="fold")
    for record in records:
        if not record.matches:
            continue
        saved = words.savings(record.bytes_saved, record.flops_saved, record.launches_saved)
        skipped = sum(match.status == "skipped" for match in record.matches)
        if skipped:
            saved.append(f"({skipped} left for want of fuel)")
        table.add_row(
            record.name,
            record.exactness,
            Text(str(record.applied), style="bold green" if record.applied else "dim"),
            Text(str(record.refused), style="yellow" if record.refused else "dim"),
            words.in_seconds(record.seconds),
            ", ".join(saved) or "–",
        )
    return table


def _refusals(record: PassReport) -> RenderableType:
    parts: list[RenderableType] = [_section(f"{record.name} refused")]
    for group in words.refusal_groups(record.matches):
        title = Text.assemble(
            (group.code, "yellow"), f" ×{len(group.records)}  ", (group.reason, "")
        )
        parts.append(Padding(title, (0, 0, 0, 2)))
        lines = [_place(match) for match in group.records[: words.SHOWN]]
        rest = len(group.records) - words.SHOWN
        if rest > 0:
            lines.append(Text(f"+{rest} more"))
        parts.extend(Padding(line, (0, 0, 0, 6)) for line in lines)
    return Group(*parts)


def _place(match: MatchRecord) -> Text:
    line = Text(f"%{match.node}")
    if match.module:
        line.append(f"  {match.module}", style="cyan")
    if match.where:
        line.append(f"  {words.short_where(match.where)}", style="dim")
    if match.blame and match.blame != match.node:
        at = words.short_where(match.blame_where, parts=1).partition(",")[0]
        line.append(f"  because of %{match.blame}" + (f" ({at})" if at else ""))
    return line


def _graph(graph: GraphReport) -> RenderableType:
    facts = [words.plural(graph.nodes, "node"), "training" if graph.trains else "inference"]
    if graph.folded:
        folded = words.plural(graph.folded, "folded weight")
        facts.append(f"{folded} ({words.in_bytes(graph.folded_bytes)})")
    if graph.packed:
        facts.append(words.plural(graph.packed, "packed weight"))
    if graph.seconds:
        spent = words.stage_seconds(graph)
        times = ", ".join(f"{k} {words.in_seconds(v)}" for k, v in spent.items())
        facts.append(f"{words.in_seconds(sum(spent.values()))} ({times})")
    lines = [Text(f"{graph.index}: {', '.join(facts)}")]
    if graph.fell_through:
        lines.append(Text.assemble(("left to Inductor untouched: ", "yellow"), graph.fell_through))
    lines += [Text(words.kernel(choice)) for choice in graph.kernels]
    for reason, nodes in words.opaque_groups(graph).items():
        title = f"{words.plural(len(nodes), 'opaque node')}: "
        lines.append(Text.assemble((title, "yellow"), f"{reason} ({words.first(nodes)})"))
    rest: list[RenderableType] = [Padding(line, (0, 0, 0, 5)) for line in lines[1:]]
    return Group(Padding(lines[0], (0, 0, 0, 2)), *rest)


def _verdict(graph: GraphReport, verdict: Verdict, several: bool) -> RenderableType:
    status = words.verdict_status(verdict)
    sign, style = _STATUS[status]
    stage = f"graph {graph.index} {verdict.stage}" if several else verdict.stage
    line = Text.assemble((f"{sign} ", style), (f"{stage}  ", "bold"), words.verdict_words(verdict))
    parts: list[RenderableType] = [Padding(line, (0, 0, 0, 2))]
    details = [
        (t.name or "output", f"error {t.rmse:.2e}, allowed {t.bound_rmse:.2e}; "
         f"largest {t.max:.2e}, allowed {t.bound_max:.2e}; eager {t.eager_rmse:.2e}")
        for t in verdict.tensors
        if not t.passed
    ]  # fmt: skip
    if verdict.diverges:
        at = f" at {words.short_where(verdict.diverges_where)}" if verdict.diverges_where else ""
        details.append(("first difference", f"%{verdict.diverges}{at}"))
    if verdict.reproduce:
        details.append(("reproduce", verdict.reproduce))
    parts.extend(Padding(_labelled(k, v), (0, 0, 0, 6)) for k, v in details)
    return Group(*parts)


def _section(title: str) -> Text:
    return Text(f"\n{title}", style="bold")


def _labelled(label: str, body: str) -> Text:
    return Text.assemble((f"{label}: ", "dim"), body)


def _bullets(lines: list[str]) -> RenderableType:
    shown: list[Any] = [Padding(Text(line), (0, 0, 0, 2)) for line in lines[: 2 * words.SHOWN]]
    rest = len(lines) - len(shown)
    if rest > 0:
        shown.append(Padding(Text(f"+{rest} more"), (0, 0, 0, 2)))
    return Group(*shown)
