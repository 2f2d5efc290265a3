"""``sparsecc passes``: the catalogue, read from the passes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import json as jsonlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsecc.cli import common

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparsecc.passes.base import Pass

Name = Annotated[str | None, typer.Argument(metavar="PASS", help="Show everything about one pass.")]


def command(
    name: Name = None,
    json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """List the passes, or show one pass's law, legality and options."""
    from sparsecc.passes import registry

    if name is not None:
        found = describe(registry.load(name))
        _show(found, json, lambda: _page(found))
        return
    listed = [describe(cls) for cls in registry.all_passes().values()]
    _show(listed, json, lambda: _table(listed))


command.__name__ = "passes"


def describe(cls: type[Pass]) -> dict[str, Any]:
    """A pass as plain data."""
    from sparsecc.passes import registry

    module = inspect.getmodule(cls)
    return {
        "name": cls.name,
        "family": cls.family,
        "exactness": cls.exactness.value,
        "law": cls.law,
        "source": cls.source,
        "pays": cls.pays,
        "canonical": cls.name in registry.CANONICAL,
        "presets": [preset for preset, names in registry.PRESETS.items() if cls.name in names],
        "refusals": dict(cls.refusals),
        "options": [_option(field) for field in dataclasses.fields(cls)],  # type: ignore[arg-type]
        "doc": inspect.getdoc(cls) or "",
        "module_doc": inspect.getdoc(module) or "",
    }


def _option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    default: Any = None
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    return {"name": field.name, "type": kind, "default": default}


def _show(data: Any, as_json: bool, render: Any) -> None:
    if as_json:
        text = jsonlib.dumps(data, indent=2, ensure_ascii=False, default=str)
        common.emit(text + "\n")
        return
    common.show(render(), width=120)  # docstrings are about as wide


def _table(listed: list[dict[str, Any]]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("pass", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("exactness", no_wrap=True)
    table.add_column("law")
    for entry in listed:
        style = "dim" if entry["canonical"] else "bold"
        table.add_row(
            Text(entry["name"], style=style),
            entry["family"],
            entry["exactness"],
            Text(entry["law"]),
        )
    return table


def _page(entry: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    presets = ", ".join(entry["presets"])
    named = f"in preset {presets}" if presets else "only when named"
    runs = "always, before the others" if entry["canonical"] else named
    facts = [
        ("law", entry["law"]),
        ("exactness", entry["exactness"]),
        ("family", entry["family"]),
        ("runs", runs),
        ("source", entry["source"]),
        ("pays", entry["pays"]),
    ]

    def grid(rows: list[tuple[str, str]]) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for left, right in rows:
            table.add_row(Text(left), Text(right))
        return Padding(table, (0, 0, 0, 2))

    parts: list[RenderableType] = [
        Text(entry["name"], style="bold"),
        grid([(k, v) for k, v in facts if v]),
    ]
    if entry["refusals"]:
        parts += [Text("\nrefuses when", style="bold"), grid(list(entry["refusals"].items()))]
    if entry["options"]:
        rows = [(o["name"], f"{o['type']} = {o['default']!r}") for o in entry["options"]]
        parts += [Text("\noptions", style="bold"), grid(rows)]
    for doc in dict.fromkeys((entry["module_doc"], entry["doc"])):
        # The docstring that @dataclass makes up is only the signature.
        if doc and not doc.startswith(entry["name"]) and not _signature(doc):
            parts += [Text(), Padding(Text(doc), (0, 0, 0, 2))]
    return Group(*parts)


def _signature(doc: str) -> bool:
    return "\n" not in doc and doc.endswith(")") and doc.partition("(")[0].isidentifier()
