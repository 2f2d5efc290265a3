"""A :class:`~sparsecc.report.model.Report` as one self-contained HTML page."""

from __future__ import annotations

import json

from sparsecc.report import words
from sparsecc.report.html import Markup, details, esc, fill, join, table, tag
from sparsecc.report.model import GraphReport, MatchRecord, PassReport, Report, Verdict

_STATUS = {"passed": "good", "FAILED": "bad", "skipped": "warn", "applied": "good"}


def render(report: Report) -> str:
    """The whole page; it loads nothing from elsewhere."""
    records = list(report)
    body = [
        _passes(records),
        *(_matches(record) for record in records if record.matches),
        _graphs(report),
        _proof(report),
        _settings(report),
    ]
    return fill(
        "sparsecc.report",
        "page.html",
        title=f"sparsecc: {report.model or 'report'}",
        heading=report.model or "Compile report",
        headline=words.headline(report),
        proof=_headline_proof(report),
        cards=_cards(report),
        body=join(body, "\n"),
        footer=" · ".join(f"{name} {version}" for name, version in report.versions.items()),
    )


def _headline_proof(report: Report) -> Markup:
    line = words.proof_line(report)
    kind = {"F": "bad", "v": "good"}.get(line[0], "warn")
    return tag("span", line, class_=f"tag {kind}")


def _cards(report: Report) -> Markup:
    seconds = sum(sum(words.stage_seconds(graph).values()) for graph in report.graphs)
    ran = [v for v in report.verdicts if not v.skipped]
    proof = f"{sum(v.passed for v in ran)}/{len(ran)}" if ran else "–"
    applied, refused = words.counts(report)
    facts = [
        (applied, "rewrites applied"),
        (refused, "refused"),
        (f"{report.coverage:.0%}", "nodes in ATen"),
        (len(report.graph_breaks), "graph breaks"),
        (proof, "proofs passed"),
        (words.in_seconds(seconds), "compile time"),
    ]
    return join(tag("div", tag("b", f), tag("span", label), class_="card") for f, label in facts)


def _passes(records: list[PassReport]) -> Markup:
    if not records:
        return Markup("")
    rows = []
    for r in records:
        law = tag("code", r.law, class_="law") if r.law else ""
        saved = words.savings(r.bytes_saved, r.flops_saved, r.launches_saved)
        name = tag("a", r.name, href=f"#pass-{r.name}") if r.matches else r.name
        rows.append(
            (
                join([tag("b", name), law]),
                tag("span", r.exactness, class_="tag") if r.exactness else "",
                r.applied,
                r.refused,
                words.in_seconds(r.seconds) if r.seconds else "–",
                join((tag("div", s, class_="nowrap") for s in saved), "") or "–",
            )
        )
    head = ("Pass and its law", "Exactness", "Applied", "Refused", "Time", "Saved per call")
    body = table(head, rows, ("", "", "num", "num", "num"))
    return tag("section", tag("h2", "Passes"), tag("div", body, class_="panel"))


def _matches(record: PassReport) -> Markup:
    parts = [tag("h2", record.name, id=f"pass-{record.name}")]
    for group in words.refusal_groups(record.matches):
        title = join(
            [
                tag("span", group.code, class_="tag warn"),
                f" {group.reason} ",
                tag("span", words.plural(len(group.records), "place"), class_="soft"),
            ]
        )
        parts.append(details(title, _places(group.records, blame=True)))
    for status in ("applied", "skipped"):
        found = [match for match in record.matches if match.status == status]
        if found:
            label = tag("span", status, class_="tag " + _STATUS[status])
            title = join([label, f" {words.plural(len(found), 'place')}"])
            parts.append(details(title, _places(found)))
    return tag("section", *parts)


def _places(records: list[MatchRecord], *, blame: bool = False) -> Markup:
    rows = [
        (
            tag("code", "%" + m.node),
            m.module or "–",
            _where(m.where),
            join([tag("code", "%" + m.blame), " ", _where(m.blame_where)])
            if blame and m.blame
            else m.note,
        )
        for m in records
    ]
    return table(("Node", "Module", "Source", "Because of" if blame else "Note"), rows)


def _where(where: str) -> Markup:
    return tag("code", words.short_where(where), title=where, class_="soft") if where else esc("")


def _graphs(report: Report) -> Markup:
    parts = [_graph(graph) for graph in report.graphs]
    if report.graph_breaks:
        breaks = tag("ul", *(tag("li", line) for line in report.graph_breaks), class_="plain")
        head = tag("h3", words.plural(len(report.graph_breaks), "graph break"))
        parts.append(tag("div", head, breaks, class_="panel pad"))
    if not parts:
        return Markup("")
    return tag("section", tag("h2", "Graphs"), *parts)


def _graph(graph: GraphReport) -> Markup:
    facts = [words.plural(graph.nodes, "node"), "training" if graph.trains else "inference"]
    if graph.folded:
        size = words.in_bytes(graph.folded_bytes)
        facts.append(f"{words.plural(graph.folded, 'folded weight')}, {size}")
    if graph.packed:
        facts.append(words.plural(graph.packed, "packed weight"))
    parts = [
        tag("h3", f"Graph {graph.index}"),
        tag("p", " · ".join(facts), class_="soft"),
    ]
    if graph.fell_through:
        label = tag("span", "left to Inductor untouched", class_="tag warn")
        parts.append(tag("p", label, f" {graph.fell_through}"))
    spent = words.stage_seconds(graph)
    longest = max(spent.values(), default=0.0) or 1.0
    bars = [
        join(
            [
                tag("span", stage),
                tag("div", tag("i", style=f"width:{100 * s / longest:.1f}%"), class_="bar"),
                tag("span", words.in_seconds(s), class_="num soft"),
            ]
        )
        for stage, s in spent.items()
    ]
    if bars:
        parts.append(tag("div", *bars, class_="bars"))
    opaque = [
        tag(
            "li",
            f"{words.plural(len(nodes), 'opaque node')}: {why} ",
            tag("code", ", ".join(nodes)),
        )
        for why, nodes in words.opaque_groups(graph).items()
    ]
    notes = [tag("li", words.kernel(choice)) for choice in graph.kernels] + opaque
    if notes:
        parts.append(tag("ul", *notes, class_="plain"))
    return tag("div", *parts, class_="panel pad")


def _proof(report: Report) -> Markup:
    if not report.verdicts:
        return Markup("")
    several = len(report.graphs) > 1
    rows = [
        row
        for graph in report.graphs
        for verdict in graph.verdicts
        for row in _verdict(graph, verdict, several)
    ]
    head = ("Stage", "Output", "Eager’s error", "Error", "Ratio", "Allowed", "Verdict")
    body = table(head, rows, ("", "nowrap", "num", "num", "num", "num"))
    note = (
        "Root-mean-square errors against the same program in fp64. A rewrite passes when its error "
        "stays within what eager PyTorch itself commits, times a small factor."
    )
    return tag(
        "section",
        tag("h2", "Proof"),
        tag("p", note, class_="soft"),
        tag("div", body, class_="panel"),
    )


def _verdict(graph: GraphReport, verdict: Verdict, several: bool) -> list[tuple[object, ...]]:
    status = words.verdict_status(verdict)
    stage = tag("b", f"graph {graph.index}: {verdict.stage}" if several else verdict.stage)
    label = tag("span", status, class_="tag " + _STATUS[status])
    extra = [tag("div", verdict.skipped, class_="soft")] if verdict.skipped else []
    if verdict.diverges:
        where = _where(verdict.diverges_where)
        node = tag("code", "%" + verdict.diverges)
        extra.append(tag("div", "first differs at ", node, " ", where))
    if verdict.reproduce:
        extra.append(tag("div", "reproduce: ", tag("code", verdict.reproduce)))
    if not verdict.skipped:
        apart = f"algebra {verdict.algebra:.1e} apart in fp64"
        extra.insert(0, tag("div", apart, class_="soft"))
    first = join([stage, *extra])
    if not verdict.tensors:
        return [(first, "", "", "", "", "", label)]
    rows: list[tuple[object, ...]] = []
    for i, t in enumerate(verdict.tensors):
        own = tag("span", "passed", class_="tag good") if t.passed else ""
        own = own or tag("span", "FAILED", class_="tag bad")
        numbers = (f"{t.eager_rmse:.2e}", f"{t.rmse:.2e}", f"{t.ratio:.2f}×", f"{t.bound_rmse:.2e}")
        rows.append((first if i == 0 else "", t.name, *numbers, own))
    if not verdict.passed and all(t.passed for t in verdict.tensors):
        rows[0] = (*rows[0][:-1], label)
    return rows


def _settings(report: Report) -> Markup:
    options = [(tag("code", k), tag("code", _plain(v))) for k, v in report.options.items()]
    versions = [(k, tag("code", v)) for k, v in report.versions.items()]
    parts = []
    if options:
        parts.append(details("Options", table(("Option", "Value"), options)))
    if versions:
        parts.append(details("Versions", table(("Package", "Version"), versions)))
    return tag("section", tag("h2", "Setting"), *parts) if parts else Markup("")


def _plain(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)
