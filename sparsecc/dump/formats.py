"""The formats of a dump, by name. Each writes one program.

Two have more to them: :mod:`.html` also shows all stages side by side, and :mod:`.mlir` needs an
exported program.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsecc.dump import dot, html, svg
from sparsecc.dump.nodes import NodeFacts, argument_data, facts, value_data
from sparsecc.dump.stages import GraphStages, Stage
from sparsecc.errors import OptionsError, unknown
from sparsecc.program import Program


@dataclass(frozen=True)
class Format:
    """A writer of one program. ``joins`` says that several programs may follow one another in a
    file; then ``comment`` starts the line that names each.
    """

    extension: str
    write: Callable[[Program, str], str]
    joins: bool = False
    comment: str = "#"


def text(program: Program, title: str) -> str:
    """One node a line, with shapes and dtypes."""
    return program.text()


def python(program: Program, title: str) -> str:
    """The graph as a Python module: shapes in annotations, source lines in comments."""
    code = program.module.print_readable(
        print_output=False, include_stride=True, include_device=True, colored=False
    )
    code = re.sub(
        r"[\x00-\x08\x0b-\x1f]", "�", code
    )  # of quoted source lines; no parser takes them
    imports = "import torch\nfrom torch import device, inf, nan  # noqa: F401\n"
    doc = title.replace("\\", "/").replace('"', "'")
    return f'"""{doc}"""\n\n{imports}\n\n{code.strip()}\n'


def json_data(program: Program, title: str) -> dict[str, Any]:
    """The graph as plain data; see :class:`~sparsecc.dump.nodes.NodeFacts` for the fields."""
    nodes = list(program.graph.nodes)
    return {
        "stage": title,
        "trains": program.trains,
        "opaque": dict(program.opaque),
        "nodes": [_node_data(node, fact) for node, fact in zip(nodes, facts(program), strict=True)],
    }


def _node_data(node: Any, fact: NodeFacts) -> dict[str, Any]:
    return {
        "name": fact.name,
        "op": fact.op,
        "target": fact.target,
        "args": argument_data(node.args),
        "kwargs": argument_data(dict(node.kwargs)),
        "value": value_data(node.meta.get("val")),
        "kind": fact.kind,
        "role": fact.role,
        "fqn": fact.fqn,
        "module": fact.module,
        "source": fact.source,
        "pass": fact.written_by,
    }


def to_json(program: Program, title: str) -> str:
    return json.dumps(json_data(program, title), indent=1, ensure_ascii=False) + "\n"


def to_html(program: Program, title: str) -> str:
    """One stage as a page; :func:`sparsecc.dump.html.render` shows all stages of a graph."""
    return html.render([GraphStages(0, [Stage(title, program)])], title)


FORMATS: dict[str, Format] = {
    "text": Format("txt", text, joins=True),
    "python": Format("py", python, joins=True),
    "dot": Format("dot", dot.write, joins=True, comment="//"),
    "svg": Format("svg", svg.write),
    "json": Format("json", to_json),
    "html": Format("html", to_html),
}
NAMES = (*FORMATS, "mlir")


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        OptionsError: no such format, or one that cannot be written from a ``Program``.
    """
    if name == "mlir":
        raise OptionsError(
            "format 'mlir' is written from an exported program, not from a compile's stages: "
            "use `sparsecc dump --format mlir` or sparsecc.dump.mlir.to_mlir(exported_program)."
        )
    if name not in FORMATS:
        raise OptionsError(unknown("format", name, NAMES))
    return FORMATS[name]
