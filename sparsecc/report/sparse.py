"""What a recipe of sparsity says, as a table: layers with their laws, and what a search tried."""

from __future__ import annotations

from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsecc.recipe import Recipe
from sparsecc.report import words
from sparsecc.sparsity import density, kept_share


def text(recipe: Recipe) -> RenderableType:
    """For a terminal."""
    parts: list[RenderableType] = [
        Text.assemble(("recipe", "bold"), f"  {recipe.method}\n{headline(recipe)}")
    ]
    if recipe.tried:
        parts.append(_tried(recipe))
    if recipe.sparsity:
        parts.append(_layers(recipe))
    return Group(*parts)


def headline(recipe: Recipe) -> str:
    """What the recipe does, in one sentence without its stop."""
    said = f"{words.plural(len(recipe.sparsity), 'layer')} sparse, {density(recipe):.1%} kept"
    if recipe.budget:
        budget = recipe.budget
        said += f"; {budget['metric']} {budget['measured']:.3g} where {budget['increase']:g} was allowed"
        if not budget["held"]:
            said += ": nothing that was tried holds"
    return said


def thresholds(recipe: Recipe, site: str) -> str:
    """Of a layer in few words: one number, the range of several, or what stands for them."""
    entry, limits = recipe.sparsity[site], recipe.thresholds.get(site)
    if limits is not None:
        low, high = (float(v) for v in torch.aminmax(limits.float()))
        return f"{low:.3g}" if low == high else f"{low:.3g} … {high:.3g}"
    if site in recipe.neurons:
        return words.plural(len(recipe.neurons[site]), "neuron")
    named = [f"{key} {entry[key]:.4g}" for key in ("k", "c") if key in entry]
    return ", ".join(named) or "–"


def _layers(recipe: Recipe) -> Table:
    found = _table("layer", "law")
    for title in ("threshold", "density"):
        found.add_column(title, justify="right", no_wrap=True)
    for site, entry in recipe.sparsity.items():
        kept = f"{kept_share(entry):.1%}"
        found.add_row(Text(site), entry["law"], thresholds(recipe, site), kept)
    return found


def _tried(recipe: Recipe) -> Table:
    metric = str(recipe.budget.get("metric", "measured"))
    found = _table()
    strength = _strength(recipe.tried[0])
    for title in (strength, "density", metric):
        found.add_column(title, justify="right", no_wrap=True)
    found.add_column("holds")
    for entry in recipe.tried:
        value = entry["measured"]
        held = entry["held"]
        found.add_row(
            f"{entry[strength]:.4g}",
            f"{entry['density']:.1%}",
            "–" if value is None else f"{value:.3g}",
            Text("yes" if held else "no", style="green" if held else ""),
        )
    return found


def _strength(entry: dict[str, Any]) -> str:
    return next(key for key in entry if key not in ("method", "density", "measured", "held"))


def _table(*titles: str) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for title in titles:
        found.add_column(title, overflow="fold")
    return found
