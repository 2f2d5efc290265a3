"""Graphviz text: a box for each node, dashed for weights, filled for what a pass wrote."""

from __future__ import annotations

from sparsecc.dump.nodes import NodeFacts, facts
from sparsecc.program import Program

_STYLE = {
    "weight": 'style="rounded,dashed", color="#8a94a3", fontcolor="#5d6878"',
    "input": 'style="rounded,bold", color="#2f5fd0"',
    "output": 'style="rounded,bold", color="#2f5fd0"',
    "folded": 'style="rounded,dashed,filled", color="#b06f00", fillcolor="#fdf1d8"',
    "call": 'style="rounded", color="#3c4654"',
}
_WRITTEN = 'style="rounded,filled", color="#b06f00", fillcolor="#fdf1d8"'


def write(program: Program, title: str, clusters: bool = False) -> str:
    """The program for ``dot -Tsvg``; ``clusters`` draws a box around each module."""
    nodes = facts(program)
    lines = [
        "digraph sparsecc {",
        f"  label={quote(title)}; labelloc=t; rankdir=TB;",
        '  node [shape=box, fontname="monospace", fontsize=10];',
        '  edge [arrowsize=0.6, color="#8a94a3"];',
    ]
    if clusters:
        lines += _clusters(nodes)
    else:
        lines += [f"  {_node(fact)}" for fact in nodes]
    for fact in nodes:
        lines += [f"  {quote(source)} -> {quote(fact.name)};" for source in fact.inputs]
    return "\n".join([*lines, "}"]) + "\n"


def _clusters(nodes: list[NodeFacts]) -> list[str]:
    groups: dict[str, list[NodeFacts]] = {}
    for fact in nodes:
        groups.setdefault(fact.module, []).append(fact)
    lines = []
    for i, (module, members) in enumerate(groups.items()):
        if not module:
            lines += [f"  {_node(fact)}" for fact in members]
            continue
        head = f'label={quote(module)}; fontsize=9; color="#c9d0da"; style=rounded;'
        lines.append(f"  subgraph cluster_{i} {{ {head}")
        lines += [f"    {_node(fact)}" for fact in members]
        lines.append("  }")
    return lines


def _node(fact: NodeFacts) -> str:
    label = [fact.name, fact.fqn or fact.target, fact.value]
    if fact.written_by:
        label.append(f"by {fact.written_by}")
    # Inputs and outputs have no target worth a line: it repeats the name.
    shown = [line for i, line in enumerate(label) if line and line not in label[:i]]
    style = _WRITTEN if fact.written_by and fact.kind == "call" else _STYLE[fact.kind]
    return f"{quote(fact.name)} [label={quote(*shown)}, {style}];"


def quote(*lines: str) -> str:
    r"""A quoted string of dot; several lines are joined by ``\n``."""
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines)
    return '"' + "\\n".join(escaped) + '"'
