"""Small tools for the HTML pages: escaping, tables, and the templates that lie beside this file."""

from __future__ import annotations

import html
import importlib.resources
import string
from collections.abc import Iterable, Sequence


class Markup(str):
    """A string that is already HTML; every other string is escaped by :func:`esc`."""

    __slots__ = ()


def esc(value: object) -> Markup:
    """``value`` as HTML text, safe in elements and in quoted attributes."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    return Markup(separator.join(esc(part) for part in parts))


def tag(name: str, *children: object, **attributes: str) -> Markup:
    """``<name class="…">children</name>``; ``class_`` stands for ``class``."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{esc(v)}"' for k, v in attributes.items())
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], classes: Sequence[str] = ()
) -> Markup:
    """A table; ``classes`` holds the CSS class of each column ("" for none)."""
    kinds = [*classes, *[""] * (len(head) - len(classes))]
    titles = join(tag("th", t, class_=k) for t, k in zip(head, kinds, strict=True))
    lines = (
        tag("tr", *(tag("td", cell, class_=k) for cell, k in zip(row, kinds, strict=True)))
        for row in rows
    )
    return tag("table", tag("thead", tag("tr", titles)), tag("tbody", join(lines, "\n")))


def details(summary: object, body: object, *, open_: bool = False) -> Markup:
    state = " open" if open_ else ""
    return Markup(f'<details class="panel"{state}>{tag("summary", summary)}{esc(body)}</details>\n')


def read(package: str, name: str) -> str:
    """The text of a file installed with the package."""
    return importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")


def fill(package: str, template: str, **values: object) -> str:
    """A template with ``$name`` replaced; strings that are not :class:`Markup` are escaped."""
    style = Markup(read("sparsecc.report", "style.css"))
    text = string.Template(read(package, template))
    return text.substitute({k: esc(v) for k, v in values.items()} | {"style": style})
