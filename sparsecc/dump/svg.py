"""A drawing of a program: one row a node in topological order, uses as arcs in the left margin.

Weights are muted and stand right above their first use; what a pass wrote is highlighted.
"""

from __future__ import annotations

import re
from html import escape

from sparsecc.dump.nodes import NodeFacts, facts
from sparsecc.program import Program

ROW = 18  # height of a row
MARGIN = 160  # width of the arcs' margin
TOP = 56
CHAR = 7.25  # width of a character of the 12 px monospace font
_WIDEST = 120  # characters of a column before it is cut

_STYLE = """
.bg{fill:#fff}text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1b2330}
.t{font:600 15px system-ui,sans-serif}.s{font:12px system-ui,sans-serif;fill:#5d6878}
.v{fill:#5d6878}.weight text{fill:#8a94a3}.input .n,.output .n{fill:#2f5fd0;font-weight:600}
.by{fill:#fdf1d8}.by-n{fill:#8a5a00}.dot{fill:#5d6878}.weight .dot{fill:#c3cad4}
.a{fill:none;stroke:#6f8fd8;stroke-width:1;opacity:.75}.w{stroke:#c3cad4;opacity:.6}
.r:hover rect.hit{fill:#2f5fd0;fill-opacity:.08}.hit{fill:transparent}
@media (prefers-color-scheme:dark){.bg{fill:#11151c}text{fill:#e3e8f0}.s,.v{fill:#93a0b4}
.weight text{fill:#6b7686}.input .n,.output .n{fill:#86acff}.by{fill:#3a2c0d}.by-n{fill:#f2c05e}
.w{stroke:#3a4657}}
"""


def write(program: Program, title: str) -> str:
    """The drawing as SVG text."""
    nodes = _order(facts(program))
    rows = {fact.name: i for i, fact in enumerate(nodes)}
    columns = [
        [_cut(fact.name) for fact in nodes],
        [_call(fact) for fact in nodes],
        [_cut(fact.value) for fact in nodes],
        [fact.written_by for fact in nodes],
    ]
    lefts, left = [], MARGIN + 10.0
    for column in columns:
        lefts.append(left)
        left += max((len(cell) for cell in column), default=0) * CHAR + 18
    height = TOP + ROW * len(nodes) + 16
    width = round(max(left, MARGIN + 10 + 8.2 * len(title)) + 10)
    weights = sum(fact.kind == "weight" for fact in nodes)
    written = sum(bool(fact.written_by) for fact in nodes)
    subtitle = f"{len(nodes)} nodes, {weights} of them weights; {written} written by passes"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="bg" width="{width}" height="{height}"/>',
        f'<text class="t" x="16" y="24">{_xml(title)}</text>',
        f'<text class="s" x="16" y="42">{_xml(subtitle)}</text>',
        *_arcs(nodes, rows),
        *(
            _row(fact, i, [column[i] for column in columns], lefts, width)
            for i, fact in enumerate(nodes)
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _order(nodes: list[NodeFacts]) -> list[NodeFacts]:
    """Still topological, but each weight stands right above its first use: arcs stay short."""
    weights = {fact.name: fact for fact in nodes if fact.kind == "weight"}
    used = {name for fact in nodes for name in fact.inputs}
    ordered = []
    for fact in nodes:
        if fact.name in weights and fact.name in used:
            continue
        ordered += [weights[name] for name in fact.inputs if name in weights and name in used]
        used.difference_update(fact.inputs)
        ordered.append(fact)
    return ordered


def _arcs(nodes: list[NodeFacts], rows: dict[str, int]) -> list[str]:
    """Uses, those of weights first so that they lie behind; a long arc bends further out."""
    arcs: dict[bool, list[str]] = {True: [], False: []}
    kinds = {fact.name: fact.kind for fact in nodes}
    for user in nodes:
        for source in user.inputs:
            start, end = _middle(rows[source]), _middle(rows[user.name])
            distance = rows[user.name] - rows[source]
            # Saturates at the margin: the curve's control points lie 4/3 beyond its furthest point.
            bend = (MARGIN - 16) * 4 / 3 * distance / (distance + 16)
            weight = kinds[source] == "weight"
            out = f"{MARGIN - bend:.1f}"
            path = f"M{MARGIN} {start}C{out} {start} {out} {end} {MARGIN} {end}"
            arcs[weight].append(f'<path class="a{" w" if weight else ""}" d="{path}"/>')
    return arcs[True] + arcs[False]


def _row(fact: NodeFacts, i: int, cells: list[str], lefts: list[float], width: int) -> str:
    base = TOP + ROW * i + 13
    top = TOP + ROW * i
    box = f'x="{MARGIN + 4}" y="{top}" width="{width - MARGIN - 8}" height="{ROW}" rx="4"'
    parts = [f'<g class="r {fact.kind}">']
    if fact.written_by:
        parts.append(f'<rect class="by" {box}/>')
    parts.append(
        f'<rect class="hit" {box}/><circle class="dot" cx="{MARGIN}" cy="{_middle(i)}" r="2"/>'
    )
    for cell, left, kind in zip(cells, lefts, ("n", "c", "v", "by-n"), strict=True):
        if cell:
            parts.append(f'<text class="{kind}" x="{left:.0f}" y="{base}">{_xml(cell)}</text>')
    hints = [fact.target if fact.kind == "call" else fact.role, fact.fqn, fact.module, fact.source]
    tip = "\n".join(hint for hint in (*hints, fact.opaque) if hint)
    parts.append(f"<title>{_xml(tip)}</title></g>" if tip else "</g>")
    return "".join(parts)


def _call(fact: NodeFacts) -> str:
    if fact.kind in ("weight", "input"):
        return _cut(fact.fqn or fact.role)
    named = ", ".join(fact.inputs)
    return _cut(f"return {named}" if fact.kind == "output" else f"{fact.target}({named})")


def _middle(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def _xml(text: str) -> str:
    """Escaped, and without the control characters that XML does not know."""
    return escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text))
