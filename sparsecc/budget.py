"""Which format each site gets: an ordering of choices by what they cost and what they spare.

Every site has a ladder of formats, from the cheapest up to none at all. One step up costs bytes (or seconds)
and takes error away. Steps are ordered by error for each byte, so that the first k of them are a good choice
for every k; how many it takes is measured on the model (:mod:`sparsecc.calibration`).

Source  the multiple-choice knapsack problem, solved by its greedy relaxation over the convex hull of each
        class (Sinha & Zoltners 1979, "The Multiple-Choice Knapsack Problem").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparsecc.errors import CalibrationError
from sparsecc.methods.common import dynamic, first_that_fits, fits
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.formats import Format

DENSE = "dense"  # a site that stays as it is
_ITEMSIZE = {"float64": 8, "float32": 4}


@dataclass(frozen=True)
class Rung:
    """One format of a site: its cost (bytes or seconds), and the error that it makes."""

    form: str
    cost: float
    error: float


def nbytes(observations: Observations, recipe: Recipe, site: str, form: str) -> int:
    """What a call reads of a site's weight in a format, with the recipe's correction where it has one."""
    features, size = observations.sites[site].shape
    own = _ITEMSIZE.get(observations.sites[site].dtype, 2)
    found = Format.of(form).nbytes(features, size, own)
    if site in recipe.corrections and form == recipe.sites.get(site):
        found += sum(factor.numel() for factor in recipe.corrections[site]) * own
    return found


def formats_of(recipe: Recipe, site: str) -> list[str]:
    """The formats that a site may have beside none: the recipe's own, and what lies between."""
    own, size = recipe.sites[site], recipe.shapes[site][1]
    found: list[str | None] = [own]
    if own.startswith("int4"):
        found.append(own.replace("int4g128", "int4g32").replace("int4g64", "int4g32"))
    if (
        own.startswith("int4") or own == "fp4w"
    ):  # beside fp4, readers of one input would need two steps
        found.append(first_that_fits(dynamic(32), size))
    return [form for form in dict.fromkeys(found) if form and fits(form, size)]


def cost_of(
    observations: Observations,
    recipe: Recipe,
    site: str,
    form: str,
    latency: Mapping[str, Mapping[str, float]] | None,
) -> float:
    """Bytes, or the seconds of a table.

    Raises:
        CalibrationError: the table has no such entry.
    """
    if latency is None:
        return nbytes(observations, recipe, site, form)
    try:
        return float(latency[site][form])
    except KeyError as error:
        raise CalibrationError(
            f"latency: the table has no entry for {site} in {form!r}."
        ) from error


def path(ladders: Mapping[str, Sequence[Rung]]) -> list[tuple[str, str]]:
    """Steps up, best first: (site, the format that it gets).

    A site starts at the cheapest rung of its hull; the last step of each ends where nothing is rounded.
    """
    steps = []
    for site, rungs in ladders.items():
        hull = lower_hull(rungs)
        for i, (below, above) in enumerate(pairwise(hull)):
            gain = (below.error - above.error) / (above.cost - below.cost)
            steps.append((-gain, site, i, above.form))
    # Along a hull gains fall, so a site's own steps stay in order.
    return [(site, form) for _, site, _, form in sorted(steps)]


def lower_hull(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs that no mixture of two others beats, by cost."""
    hull: list[Rung] = []
    for rung in sorted(rungs, key=lambda r: (r.cost, r.error)):
        if hull and rung.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], rung):
            hull.pop()
        hull.append(rung)
    return hull


def _above(a: Rung, b: Rung, c: Rung) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.error - a.error) * (c.cost - a.cost) >= (c.error - a.error) * (b.cost - a.cost)


def pruned(recipe: Recipe, chosen: Mapping[str, str], links: Mapping[str, Sequence[str]]) -> Recipe:
    """The recipe for the sites and formats that were chosen, without what serves others.

    Args:
        links: link -> the sites that read it.
    """
    own = {site for site, form in chosen.items() if form == recipe.sites[site]}
    needed = {name for name, readers in links.items() if set(readers) & set(chosen)}
    return Recipe(
        recipe.method,
        sites=dict(chosen),
        shapes={site: recipe.shapes[site] for site in chosen},
        scales={name: s for name, s in recipe.scales.items() if name in needed},
        shifts={name: z for name, z in recipe.shifts.items() if name in needed},
        clips={site: clip for site, clip in recipe.clips.items() if site in own},
        activations={
            site: step
            for site, step in recipe.activations.items()
            if site in chosen and Format.of(chosen[site]).static
        },
        corrections={site: pair for site, pair in recipe.corrections.items() if site in own},
        grids={site: grid for site, grid in recipe.grids.items() if site in own},
        attention=dict(recipe.attention),
        options=dict(recipe.options),
        about=dict(recipe.about),
        versions=dict(recipe.versions),
    )
