"""What a search for a recipe tried: bytes against the metric, as a page with a plot and as a table."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsecc.recipe import Recipe
from sparsecc.report import words
from sparsecc.report.html import Markup, fill, join, table, tag

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 760, 340, 90, 44, 16


def frontier(recipe: Recipe) -> str:
    """The recipe and all candidates of its search as one HTML page; it loads nothing from elsewhere."""
    body = [_plot(recipe), _candidates(recipe), _sites(recipe)]
    return fill(
        "sparsecc.report",
        "page.html",
        title=f"sparsecc: recipe {recipe.method}",
        heading=f"Recipe: {recipe.method}",
        headline=headline(recipe),
        proof=_verdict(recipe),
        cards=_cards(recipe),
        body=join(body, "\n"),
        footer=" · ".join(f"{name} {version}" for name, version in recipe.versions.items()),
    )


def text(recipe: Recipe) -> RenderableType:
    """The same for a terminal."""
    parts: list[RenderableType] = [
        Text.assemble(("recipe", "bold"), f"  {recipe.method}\n{headline(recipe)}")
    ]
    if recipe.tried:
        found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
        found.add_column("method", no_wrap=True)
        for title in ("bytes", _metric(recipe)):
            found.add_column(title, justify="right", no_wrap=True)
        found.add_column("holds")
        found.add_column("formats", overflow="fold")
        best = chosen(recipe)
        for entry in recipe.tried:
            holds = Text("yes" if entry["held"] else "no", style="green" if entry["held"] else "")
            found.add_row(
                Text(entry["method"] + (" ←" if entry is best else "")),
                words.in_bytes(entry["bytes"]),
                _number(entry["measured"]),
                holds,
                _formats(entry["formats"]),
            )
        parts.append(found)
    return Group(*parts)


def headline(recipe: Recipe) -> str:
    """What the recipe does, in one sentence without its stop."""
    about = recipe.about
    sites = sum(about.get("formats", {}).values()) or len(recipe.sites)
    said = f"{len(recipe.sites)} of {words.plural(sites, 'linear layer')} quantized"
    if "bytes" in about:
        before, after = (words.in_bytes(about[k]) for k in ("bytes_before", "bytes"))
        said += f", {before} of weights become {after}"
    if recipe.budget:
        budget = recipe.budget
        said += f"; {budget['metric']} {_number(budget['measured'])} where {budget['increase']:g} was allowed"
    return said


def chosen(recipe: Recipe) -> dict[str, Any] | None:
    """The candidate that became the recipe."""
    about = (recipe.method, recipe.about.get("bytes"), recipe.budget.get("measured"))
    found = (e for e in recipe.tried if (e["method"], e["bytes"], e["measured"]) == about)
    return next((e for e in found if e["held"]), None)


def best_of(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The candidates that no other beats in both bytes and metric, by bytes."""
    found: list[dict[str, Any]] = []
    measured = [e for e in tried if e["measured"] is not None]
    for entry in sorted(measured, key=lambda e: (e["bytes"], e["measured"])):
        if not found or entry["measured"] < found[-1]["measured"]:
            found.append(entry)
    return found


def _metric(recipe: Recipe) -> str:
    return str(recipe.budget.get("metric", "measured"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _formats(formats: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in formats.items())


def _verdict(recipe: Recipe) -> Markup:
    if not recipe.budget:
        return tag("span", "not measured: no budget was given", class_="tag warn")
    held = recipe.budget["held"]
    line = "the budget holds on data that was held back" if held else "nothing holds the budget"
    return tag("span", line, class_="tag good" if held else "tag bad")


def _cards(recipe: Recipe) -> Markup:
    about = recipe.about
    facts = [
        (len(recipe.sites), "layers quantized"),
        (words.in_bytes(about["bytes"]) if "bytes" in about else "–", "of weights"),
        (_number(recipe.budget.get("measured")), _metric(recipe)),
        (len(recipe.tried), "candidates measured"),
        (about.get("rows", "–"), "rows observed"),
    ]
    return join(tag("div", tag("b", f), tag("span", label), class_="card") for f, label in facts)


def _candidates(recipe: Recipe) -> Markup:
    if not recipe.tried:
        return Markup("")
    best = chosen(recipe)
    rows = [
        (
            tag("b", entry["method"]) if entry is best else entry["method"],
            words.in_bytes(entry["bytes"]),
            _number(entry["measured"]),
            tag(
                "span",
                "yes" if entry["held"] else "no",
                class_="tag good" if entry["held"] else "tag",
            ),
            _formats(entry["formats"]),
        )
        for entry in recipe.tried
    ]
    head = ("Method", "Bytes", _metric(recipe), "Holds", "Layers by format")
    body = table(head, rows, ("", "num", "num"))
    return tag("section", tag("h2", "Candidates"), tag("div", body, class_="panel"))


def _sites(recipe: Recipe) -> Markup:
    rows = [
        (
            tag("code", site),
            " × ".join(map(str, recipe.shapes.get(site, []))),
            form,
            _number(recipe.activations.get(site)),
        )
        for site, form in recipe.sites.items()
    ]
    body = table(("Layer", "Shape", "Format", "Step"), rows, ("", "nowrap", "nowrap", "num"))
    return tag("section", tag("h2", "Layers"), tag("div", body, class_="panel"))


# ---- the plot ----------------------------------------------------------------------------------------


def _plot(recipe: Recipe) -> Markup:
    """Bytes to the right, the metric upwards on a logarithmic scale."""
    shown = [e for e in recipe.tried if e["measured"] is not None and e["measured"] > 0]
    if not shown:
        return Markup("")
    limit = float(recipe.budget["increase"])
    values = [limit, *(e["measured"] for e in shown)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    most = 1.05 * float(max(e["bytes"] for e in shown))

    def x(size: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _EDGE) * size / most

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return float(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _EDGE) * share)

    parts = [_axes(most, low, high, x, y)]
    parts.append(_line([(_LEFT, y(limit)), (_WIDTH - _EDGE, y(limit))], "--bad", "6 5"))
    parts.append(_label(_WIDTH - _EDGE, y(limit) - 6, f"budget {limit:g}", "end", "--bad"))
    edge = [e for e in best_of(recipe.tried) if e["measured"] > 0]
    parts.append(_line([(x(e["bytes"]), y(e["measured"])) for e in edge], "--accent"))
    best = chosen(recipe)
    for entry in shown:
        title = tag("title", f"{entry['method']}: {words.in_bytes(entry['bytes'])}, "
                    f"{_number(entry['measured'])}; {_formats(entry['formats'])}")  # fmt: skip
        colour = "--good" if entry["held"] else "--soft"
        place = {"cx": f"{x(entry['bytes']):.1f}", "cy": f"{y(entry['measured']):.1f}"}
        radius = "7" if entry is best else "4"
        parts.append(tag("circle", title, **place, r=radius, style=f"fill:var({colour})"))
    drawing = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        style="width:100%;height:auto",
        xmlns="http://www.w3.org/2000/svg",
    )
    name = tag("h2", f"{_metric(recipe)} against bytes of weights")
    return tag("section", name, tag("div", drawing, class_="panel pad"))


def _axes(most: float, low: int, high: int, x: Any, y: Any) -> Markup:
    parts = []
    for power in range(low, high + 1):
        parts.append(_line([(_LEFT, y(10.0**power)), (_WIDTH - _EDGE, y(10.0**power))], "--line"))
        parts.append(_label(_LEFT - 8, y(10.0**power) + 4, f"{10.0**power:.0e}", "end"))
    for i in range(5):
        size = most * i / 4
        parts.append(_label(x(size), _HEIGHT - _BOTTOM + 20, words.in_bytes(int(size)), "middle"))
    return join(parts)


def _line(points: list[tuple[float, float]], colour: str, dashes: str = "none") -> Markup:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    style = f"fill:none;stroke:var({colour});stroke-width:1.5;stroke-dasharray:{dashes}"
    return tag("polyline", points=path, style=style)


def _label(x: float, y: float, words_: str, anchor: str, colour: str = "--soft") -> Markup:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor}
    return tag("text", words_, **place, style=f"fill:var({colour});font-size:12px")
