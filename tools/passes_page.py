"""Writes docs/passes.md from the passes themselves.

python tools/passes_page.py            # rewrite the page
python tools/passes_page.py --check    # exit 1 when it is stale
"""

from __future__ import annotations

import argparse
import inspect
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

from sparsecc.cli.passes import describe
from sparsecc.passes import registry
from sparsecc.passes.base import Pass

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "passes.md"
COMMAND = "python tools/passes_page.py"

HEAD = f"""\
<!-- Written by `{COMMAND}` from the passes; edit their docstrings and run it again. -->

# The passes

In the order in which they run. A pass is a law with its legality: it looks for places that have the
form of the law's left side, and rewrites each where that is legal. Every other place is a
*refusal*, reported with a code, a reason and a source line. A refusal is a result, not an error.

Exactness: **bitwise** means the same bits; **exact** means equal in real arithmetic, with another
rounding; a lossy one runs with a recipe that asks for it. [verify.md](verify.md) says how both are proved.
"""

REWRITES = """\
## Rewrites

The preset `default` runs those that say so; the others are exact as well, but have to be named: they
prepare for another pass, or were not measured to pay everywhere. Options are given by name:
`options={"passes": {"fold-norm-affine": {"untie": True}}}`.
"""

CANONICAL = """\
## Canonical forms

They turn the many spellings of one idea into one operator. They run before the rewrites, whenever
at least one rewrite is chosen, and cannot be left out one by one. They do not count as rewrites.
Where no rewrite applies, their result is not used either: Inductor gets the graph as it was.
"""

EXACTNESS = {
    "bitwise": "bitwise: the same bits",
    "exact": "exact: equal in real arithmetic; rounding differs",
    "lossy": "lossy: another function",
}
# What the table above the text already says.
_TABLED = ("Law", "Source")
_LABEL = re.compile(r"([A-Z][a-z]+)\.?\s+(\S.*)")


def page() -> str:
    """The whole page."""
    parts = [HEAD, _overview(), REWRITES]
    parts += [section(registry.load(name)) for name in registry.REWRITES]
    parts.append(CANONICAL)
    parts += [section(registry.load(name)) for name in registry.CANONICAL]
    return "\n".join(parts)


def _overview() -> str:
    rows = []
    for name, cls in registry.all_passes().items():
        kind = "canonical form" if name in registry.CANONICAL else f"rewrite, {cls.family}"
        rows.append((f"[`{name}`](#{name})", kind, cls.exactness.value, cls.__doc__ or ""))
    rows = [(*row[:3], row[3].partition("\n")[0]) for row in rows]
    return table(("pass", "kind", "exactness", "what it does"), rows)


def section(cls: type[Pass]) -> str:
    """One pass."""
    facts = describe(cls)
    title, paragraphs = read(facts["module_doc"])
    presets = ", ".join(f"`{p}`" for p in facts["presets"])
    named = f"in preset {presets}" if presets else "only when named"
    runs = "before every rewrite" if facts["canonical"] else named
    file = pathlib.Path(inspect.getfile(cls)).resolve().relative_to(ROOT).as_posix()
    law = paragraphs.get("Law", [facts["law"]])
    rows = [
        ("Source", " ".join(paragraphs.get("Source", [facts["source"]]))),
        ("Exactness", EXACTNESS[facts["exactness"]]),
        ("Where it pays", facts["pays"] or "–"),
        ("Runs", runs),
        ("Code", f"[`{file}`](../{file})"),
    ]
    parts = [
        f"### {facts['name']}\n",
        title + "\n",
        "\n".join(["```text", *law, "```", ""]),
        table(("", ""), rows),
    ]
    for label, lines in paragraphs.items():
        if label not in _TABLED:
            parts.append(f"**{label}** {markdown(' '.join(lines))}\n")
    if facts["refusals"]:
        refusals = [(f"`{code}`", words) for code, words in facts["refusals"].items()]
        parts.append(table(("refusal", "when"), refusals))
    if facts["options"]:
        meanings = attributes(inspect.getdoc(cls) or "")
        options = [
            (f"`{o['name']}`", f"`{o['type']}`", f"`{o['default']!r}`", meanings.get(o["name"], ""))
            for o in facts["options"]
        ]
        parts.append(table(("option", "type", "default", "meaning"), options))
    return "\n".join(parts)


def read(doc: str) -> tuple[str, dict[str, list[str]]]:
    """A module docstring as its first line and its labelled paragraphs (Law, Legal, Not, …)."""
    title, _, body = doc.partition("\n")
    found: dict[str, list[str]] = {}
    label = ""
    for line in body.splitlines():
        start = _LABEL.fullmatch(line)
        if start is not None:
            label = start[1]
            found[label] = [start[2].rstrip()]
        elif label and line.strip():
            found[label].append(line.strip())
    return markdown(title.strip()), found


def attributes(doc: str) -> dict[str, str]:
    """The ``Attributes:`` block of a class docstring, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.partition("Attributes:\n")[2].splitlines():
        start = re.fullmatch(r"    (\w+): (.*)", line)
        if start is not None:
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def markdown(text: str) -> str:
    """reStructuredText's literals and roles as Markdown's."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = (" | ".join(markdown(cell).replace("|", "\\|") for cell in row) for row in lines)
    return "\n".join(f"| {row} |" for row in cells) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    check: bool = parser.parse_args().check
    new = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == new:
        return 0
    if check:
        print(f"{PAGE.relative_to(ROOT)} is stale: run {COMMAND}", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
