"""All stages of the captured graphs as one self-contained page, with what each pass changed."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence

from sparsecc.dump.stages import GraphStages
from sparsecc.report.html import Markup, esc, fill, join, table, tag
from sparsecc.report.words import plural

_CONTEXT = 2  # unchanged lines around a hunk
_ALIKE = 0.6  # two lines this similar are compared word by word


def render(graphs: Sequence[GraphStages], title: str) -> str:
    """The page; lines that are equal in consecutive stages are left out of the comparisons."""
    stages = sum(len(graph.stages) for graph in graphs)
    return fill(
        "sparsecc.dump",
        "page.html",
        title=f"sparsecc: {title}",
        heading=title,
        headline=f"{plural(len(graphs), 'graph')}, {plural(stages, 'stage')}",
        body=join((_graph(graph) for graph in graphs), "\n"),
    )


def changes(before: str, after: str) -> tuple[int, int]:
    """Lines removed from and added to a text."""
    removed = added = 0
    for kind, a0, a1, b0, b1 in _matcher(before.splitlines(), after.splitlines()).get_opcodes():
        if kind != "equal":
            removed, added = removed + a1 - a0, added + b1 - b0
    return removed, added


def _graph(graph: GraphStages) -> Markup:
    texts = [stage.program.text() for stage in graph.stages]
    rows, sections = [], []
    for i, (stage, text) in enumerate(zip(graph.stages, texts, strict=True)):
        name, anchor = f"{i:03d} {stage.name}", f"g{graph.index}-{i}"
        nodes = len(stage.program.graph.nodes)
        removed, added = changes(texts[i - 1], text) if i else (0, 0)
        same = i > 0 and text == texts[i - 1]
        delta = "unchanged" if same else _delta(removed, added) if i else "start"
        rows.append((name if same else tag("a", name, href=f"#{anchor}"), nodes, delta))
        if same:
            continue
        sections.append(
            join(
                [
                    tag("h3", tag("span", name, class_="mono"), " ", delta if i else "", id=anchor),
                    _diff(texts[i - 1].splitlines(), text.splitlines()) if i else "",
                    _full(name, text, nodes, anchor, shown=i == 0),
                ]
            )
        )
    index = tag("div", table(("Stage", "Nodes", "Lines"), rows, ("", "num")), class_="panel")
    return tag("section", tag("h2", f"Graph {graph.index}"), index, *sections)


def _delta(removed: int, added: int) -> Markup:
    minus = tag("span", f"−{removed}", class_="tag bad")
    return join([minus, tag("span", f"+{added}", class_="tag good")], " ")


def _full(name: str, text: str, nodes: int, anchor: str, *, shown: bool) -> Markup:
    body = tag("pre", text, class_="full", data_stage=name, id=f"{anchor}-text")
    summary = tag("summary", f"Full text, {plural(nodes, 'node')}")
    return Markup(f'<details class="panel"{" open" if shown else ""}>{summary}{body}</details>')


def _diff(before: list[str], after: list[str]) -> Markup:
    blocks = []
    for hunk in _matcher(before, after).get_grouped_opcodes(_CONTEXT):
        rows = [row for code in hunk for row in _rows(code, before, after)]
        blocks.append(tag("tbody", join(rows, "\n")))
    columns = Markup('<colgroup><col class="no"><col><col class="no"><col></colgroup>')
    return tag("div", tag("table", columns, join(blocks), class_="diff"), class_="panel")


def _rows(
    code: tuple[str, int, int, int, int], before: list[str], after: list[str]
) -> Iterator[Markup]:
    kind, a0, a1, b0, b1 = code
    for left, right in _pairs(kind, range(a0, a1), range(b0, b1), before, after):
        if kind != "replace" or left is None or right is None:
            old = esc("" if left is None else before[left])
            new = esc("" if right is None else after[right])
        else:
            old, new = _marked(before[left], after[right])
        changed = kind != "equal"
        yield tag("tr", *_cell(left, old, "old" * changed), *_cell(right, new, "new" * changed))


def _pairs(
    kind: str, left: range, right: range, before: list[str], after: list[str]
) -> Iterator[tuple[int | None, int | None]]:
    """Line numbers to show beside each other: within a changed block, lines that differ in names
    only (an operator that now reads another node) stand side by side.
    """
    blocks = [(0, len(left), 0, len(right))]
    if kind == "replace":
        old = [re.sub(r"%[\w.]+", "%", before[i]) for i in left]
        new = [re.sub(r"%[\w.]+", "%", after[i]) for i in right]
        blocks = [code[1:] for code in _matcher(old, new).get_opcodes()]
    for a0, a1, b0, b1 in blocks:
        yield from itertools.zip_longest(left[a0:a1], right[b0:b1])


def _cell(line: int | None, content: Markup, kind: str) -> tuple[Markup, Markup]:
    if line is None:
        return tag("td", class_="no"), tag("td", class_="none")
    return tag("td", line + 1, class_="no"), tag("td", content, class_=kind)


def _marked(left: str, right: str) -> tuple[Markup, Markup]:
    """Both lines with the words that differ marked, unless nearly all do."""
    a, b = (re.findall(r"[\w.%]+|\W", line) for line in (left, right))
    matcher = _matcher(a, b)
    if matcher.ratio() < _ALIKE:
        return esc(left), esc(right)
    old: list[Markup] = []
    new: list[Markup] = []
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        for parts, words in ((old, a[a0:a1]), (new, b[b0:b1])):
            text = "".join(words)
            parts.append(esc(text) if kind == "equal" or not text else tag("mark", text))
    return join(old), join(new)


def _matcher(a: list[str], b: list[str]) -> difflib.SequenceMatcher[str]:
    return difflib.SequenceMatcher(None, a, b, autojunk=False)
