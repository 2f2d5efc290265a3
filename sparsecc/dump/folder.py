"""A folder with every stage of a compile: an index to read, files to compare with any tool."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from sparsecc.dump import formats as registry
from sparsecc.dump import html
from sparsecc.dump.stages import GraphStages
from sparsecc.errors import OptionsError
from sparsecc.report.model import Report
from sparsecc.report.words import headline, proof_line

MARKER = ".sparsecc-dump"


@dataclass
class Kept:
    """The marker's content: the files that dumps wrote (only these may be replaced), and each
    graph's section of the index.
    """

    files: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)


def write_folder(
    graphs: Sequence[GraphStages],
    report: Report | None,
    folder: str | pathlib.Path,
    formats: Sequence[str] = ("text",),
) -> list[pathlib.Path]:
    """Write ``index.md``, ``graph0/000_captured.txt``, ``graph0/001_canonical.txt``, …, a report.

    The names are the same for the same stages, so two folders can be compared. A stage's files are
    written in every format of ``formats``; "html" adds one page for each graph instead. Graph 0
    starts the folder anew; others are added to it, so that a compile can hand over its graphs one
    by one.

    Returns:
        The files written.
    Raises:
        OptionsError: an unknown format, or the folder holds files that no earlier dump wrote.
    """
    root = pathlib.Path(folder)
    writers = {name: registry.get(name) for name in formats}
    kept = _clear(root, graphs)
    title = (report.model if report else "") or "model"
    files: dict[str, str] = {}
    for graph in graphs:
        kept.sections[str(graph.index)] = _graph(graph, title, writers, files)
    if report is not None:
        files["report.json"] = report.to_json() + "\n"
        if "html" in writers:
            files["report.html"] = report.to_html()
    files["index.md"] = _index(title, report, kept.sections)
    kept.files = sorted({*kept.files, *files})
    root.mkdir(parents=True, exist_ok=True)
    # The marker first: an interrupted dump must not lock the folder against the next one.
    (root / MARKER).write_text(json.dumps(asdict(kept), indent=1) + "\n", encoding="utf-8")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [root / name for name in sorted(files)]


def _graph(
    graph: GraphStages, title: str, writers: dict[str, registry.Format], files: dict[str, str]
) -> str:
    """Add one graph's files to ``files``; returns its section of the index."""
    place = f"graph{graph.index}"
    lines = [
        f"## Graph {graph.index}",
        "",
        "| stage | nodes | lines | files |",
        "|---|---|---|---|",
    ]
    previous = ""
    for i, stage in enumerate(graph.stages):
        name = f"{place}/{i:03d}_{slug(stage.name)}"
        caption = f"{title}, graph {graph.index}, {i:03d} {stage.name}"
        links = []
        for form, writer in writers.items():
            if form != "html":
                path = f"{name}.{writer.extension}"
                files[path] = writer.write(stage.program, caption)
                links.append(f"[{form}]({path})")
        text = stage.program.text()
        removed, added = html.changes(previous, text)
        delta = f"+{added} −{removed}" if removed or added else "unchanged"
        nodes, shown = len(stage.program.graph.nodes), delta if i else "–"
        lines.append(f"| {i:03d} {stage.name} | {nodes} | {shown} | {' '.join(links)} |")
        previous = text
    if "html" in writers:
        path = f"{place}/stages.html"
        files[path] = html.render([graph], f"{title}, graph {graph.index}")
        lines += ["", f"Every stage side by side: [{path}]({path})"]
    return "\n".join(lines)


def _index(title: str, report: Report | None, sections: dict[str, str]) -> str:
    parts = [f"# {title}"]
    if report is not None:
        parts.append(f"{headline(report)}; {proof_line(report)}.")
    parts += [sections[key] for key in sorted(sections, key=int)]
    if report is not None:
        parts.append("What each pass did: [report.json](report.json)")
    return "\n\n".join(parts) + "\n"


def slug(name: str) -> str:
    """A stage's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "stage"


def _clear(root: pathlib.Path, graphs: Sequence[GraphStages]) -> Kept:
    """Remove what earlier dumps wrote for these graphs (for all, when graph 0 is among them), and
    return what stays. Refuses when there are files of anybody else.
    """
    kept = Kept()
    if not root.exists():
        return kept
    if not root.is_dir():
        raise OptionsError(f"cannot dump into {str(root)!r}: it is a file. Name a folder.")
    # No marker, or a damaged one: then every file counts as somebody's.
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = Kept(**json.loads((root / MARKER).read_text(encoding="utf-8")))
    paths = [path for path in root.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    foreign = [name for name in names if name not in kept.files and name != MARKER]
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if foreign[3:] else "")
        raise OptionsError(
            f"cannot dump into {str(root)!r}: it holds files that sparsecc did not write "
            f"({shown}). Name an empty or a new folder."
        )
    fresh = any(graph.index == 0 for graph in graphs)
    places = tuple(f"graph{graph.index}/" for graph in graphs)
    for name in names:  # what was found, not what the marker says: that may name files elsewhere
        if name != MARKER and (fresh or name.startswith(places)):
            (root / name).unlink()
    if fresh:
        return Kept()
    kept.files = [name for name in kept.files if not name.startswith(places)]
    return kept
