"""What methods share: which sites, which format each, and the weights as scales and shifts leave them.

With scales s and shifts z on the links, a layer reads y' = (y − z) / s and its weight is W' = diag(1/r) W
diag(s), where r are the scales of the links that its own rows feed. Methods round W' and y'.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from sparsecc.errors import CalibrationError, unknown
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.formats import GROUPS, Format
from sparsecc.statistics import Statistics
from sparsecc.watch import LinkFacts

STATIC = "int8s"  # int8 weights, and activations that were divided by a fixed step
FLOOR = 1e-5  # of a channel's magnitude, relative to the largest of its link
_SMALLEST = 1e-30


def dynamic(group: int | None) -> list[str]:
    """The formats to try, in order, of int8 weights with dynamic activations.

    Args:
        group: features of a row that share a scale; None for the whole row.
    Raises:
        CalibrationError: there are no groups of this size.
    """
    if group is None:
        return ["int8"]
    if group not in GROUPS:
        raise CalibrationError(unknown("group", group, [*map(str, GROUPS), "None"]))
    return [f"int8x{group}", "int8"]


def fits(name: str, size: int) -> bool:
    """Whether rows of ``size`` weights can be kept in a format."""
    try:
        Format.of(name).check_size(size)
    except ValueError:
        return False
    return True


def first_that_fits(formats: Sequence[str], size: int) -> str | None:
    """The first of ``formats`` in which rows of ``size`` weights can be kept."""
    return next((form for form in formats if fits(form, size)), None)


def start(
    method: str,
    observations: Observations,
    formats: Sequence[str],
    skip: Sequence[str],
    **options: Any,
) -> Recipe:
    """A recipe that gives every site the first of ``formats`` that its rows fit, and no numbers yet.

    Args:
        skip: patterns of sites to leave alone ("*.lm_head.weight").
        **options: of the method, for the record.
    Raises:
        CalibrationError: a pattern matches no site.
    """
    recipe = empty(method, observations.sites, skip, options)
    for name in not_skipped(observations.sites, skip):
        shape = observations.sites[name].shape
        form = first_that_fits(formats, shape[1])
        if form is not None:
            recipe.sites[name], recipe.shapes[name] = form, list(shape)
    rows = max((s.rows for s in observations.inputs.values()), default=0)
    note(recipe, observations.about, rows, observations.batches)
    return recipe


def not_skipped(sites: Collection[str], skip: Sequence[str]) -> list[str]:
    """The sites that no pattern of ``skip`` matches."""
    return [n for n in sites if not any(fnmatch.fnmatchcase(n, pattern) for pattern in skip)]


def empty(
    method: str, sites: Collection[str], skip: Sequence[str], options: Mapping[str, Any]
) -> Recipe:
    """A recipe that says nothing yet.

    Raises:
        CalibrationError: a pattern of ``skip`` matches no site.
    """
    from sparsecc.inspection import versions

    if isinstance(skip, str):
        raise CalibrationError(f"skip is a list of patterns, not {skip!r}.")
    for pattern in skip:
        if not fnmatch.filter(sites, pattern):
            raise CalibrationError(unknown("site", pattern, sites))
    recipe = Recipe(method, options={**options, "skip": list(skip)})
    recipe.versions = {k: v for k, v in versions().items() if k in ("sparsecc", "torch")}
    return recipe


def note(recipe: Recipe, about: Mapping[str, Any], rows: int, batches: int) -> None:
    """Of the model and the data, for the record."""
    parameters = about.get("parameters", 0)
    recipe.about = {"parameters": parameters, "rows": rows, "batches": batches}
    if about.get("tied"):
        recipe.about["tied"] = about["tied"]


# ---- scales and shifts of links, as vectors of a site ----------------------------------------------------


def spread(channels: Sequence[int], vector: torch.Tensor, fill: float) -> torch.Tensor:
    """A vector per channel as one per row or column, ``fill`` where there is no channel."""
    index = torch.tensor(channels, dtype=torch.int64)
    return torch.where(index < 0, fill, vector.double()[index.clamp(min=0)])


def gather(link: LinkFacts, of: Mapping[str, torch.Tensor], *, least: bool = False) -> torch.Tensor:
    """The largest (or least) over all columns of a channel, of all consumers: fp64 [link.size].

    Args:
        of: site -> a vector over its columns.
    """
    empty = torch.inf if least else -torch.inf
    found = torch.full((link.size,), empty, dtype=torch.float64)
    for site, vector in of.items():
        index = torch.tensor(link.consumers[site], dtype=torch.int64)
        held = index >= 0
        found.scatter_reduce_(0, index[held], vector.double()[held], "amin" if least else "amax")
    return found


def columns(
    observations: Observations, recipe: Recipe, site: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale s and the shift z of every column of ``site``, fp64 [K]."""
    size = observations.sites[site].shape[1]
    scale, shift = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for name, link in observations.links.items():
        if link.kind == "q-k" or site not in link.consumers:
            continue
        if name in recipe.scales:
            scale *= spread(link.consumers[site], recipe.scales[name], 1.0)
        if name in recipe.shifts:
            shift += spread(link.consumers[site], recipe.shifts[name], 0.0)
    return scale, shift


def rows(observations: Observations, recipe: Recipe, site: str) -> torch.Tensor:
    """By what every row of ``site`` is divided, fp64 [N]."""
    found = torch.ones(observations.sites[site].shape[0], dtype=torch.float64)
    for name, link in observations.links.items():
        scale = recipe.scales.get(name)
        if scale is None:
            continue
        if site in link.producers:
            found *= spread(link.producers[site], scale, 1.0)
        if link.kind == "q-k" and site in link.consumers:
            found /= spread(link.consumers[site], scale, 1.0)
    return found


def migrated(observations: Observations, recipe: Recipe, site: str) -> torch.Tensor:
    """W' of a site, fp64 [N, K]: what is rounded."""
    scale, _ = columns(observations, recipe, site)
    by = rows(observations, recipe, site)
    return observations.weight(site).double() * scale / by[:, None]


# ---- magnitudes -----------------------------------------------------------------------------------------


def floored(values: torch.Tensor) -> torch.Tensor:
    """Positive and finite: dead channels get a small part of the largest one; all dead, one."""
    largest = values.max()
    if not largest > _SMALLEST:
        return torch.ones_like(values)
    return values.clamp(min=float(largest) * FLOOR)


def largest_inputs(observations: Observations, link: LinkFacts) -> torch.Tensor:
    """max|y| of every channel, fp64 [link.size]."""
    return gather(link, {site: observations.input(site).largest for site in link.consumers})


def group_of(observations: Observations, recipe: Recipe) -> dict[tuple[str, ...], list[str]]:
    """The sites of a recipe by what they read: those of one input share one step."""
    found: dict[tuple[str, ...], list[str]] = {}
    related = _inputs_together(observations)
    for site in recipe.sites:
        found.setdefault(related[site], []).append(site)
    return found


def _inputs_together(observations: Observations) -> dict[str, tuple[str, ...]]:
    """Site -> all groups that are tied to its own by a layer that reads several."""
    tied: dict[str, set[str]] = {}
    for site in observations.sites.values():
        whole = set(site.groups).union(*(tied.get(g, ()) for g in site.groups))
        for group in whole:
            tied[group] = whole
    return {n: tuple(sorted(tied[s.groups[0]])) for n, s in observations.sites.items()}


# ---- one step for a tensor ------------------------------------------------------------------------------

CHOOSERS = ("max", "percentile", "mse")


def step_of(
    statistics: Statistics,
    scale: torch.Tensor,
    shift: torch.Tensor,
    choose: str = "max",
    percentile: float = 0.9999,
) -> float:
    """The step of y' = (y − z) / s for codes of −127 … 127; one where y is always 0.

    Args:
        scale, shift: of every column, fp64 [K].
        choose: "max": nothing is clipped; "percentile": so many elements are not (for s = 1, z = 0 of all rows,
            else of the sample); "mse": the range, of 40 between a half and all of it, with the least squared
            error on the sample, which stands for all rows, and on the least and largest of each feature.
    Raises:
        CalibrationError: there is no such chooser, or the percentile is none.
    """
    if choose not in CHOOSERS:
        raise CalibrationError(unknown("chooser", choose, CHOOSERS))
    if not 0.5 <= percentile <= 1:
        raise CalibrationError(f"percentile must be between 0.5 and 1, not {percentile}.")
    ends = torch.stack([(statistics.low - shift) / scale, (statistics.high - shift) / scale])
    whole = float(ends.abs().max())
    if not whole > _SMALLEST:
        return 1.0
    plain = bool((scale == 1).all() and (shift == 0).all())
    sample = (statistics.sample.double() - shift) / scale
    if choose == "percentile":
        found = (
            statistics.percentile(percentile)
            if plain
            else float(
                sample.abs().flatten().kthvalue(max(1, round(percentile * sample.numel())))[0]
            )
        )
        whole = found if found > _SMALLEST else whole
    elif choose == "mse":
        ranges = [whole * (1 - i / 80) for i in range(41)]
        # Largest elements are rare in a sample and dear to clip; what is known of them counts, too.
        share = statistics.rows / max(1, len(sample))

        def error(width: float) -> float:
            step = width / 127
            lost = share * (rounded(sample, step) - sample).square().sum()
            return float(lost + (rounded(ends, step) - ends).square().sum())

        whole = min(ranges, key=error)
    return whole / 127


def rounded(y: torch.Tensor, step: float) -> torch.Tensor:
    """What codes of −127 … 127 with a fixed step keep of ``y``."""
    return (y / step).round().clamp(-127, 127) * step


def set_steps(
    observations: Observations,
    recipe: Recipe,
    choose: str,
    percentile: float = 0.9999,
    known: Mapping[str, float] | None = None,
) -> None:
    """Give every site with static activations its step, one for each input.

    Args:
        known: site -> a step that was chosen already.
    """
    for members in group_of(observations, recipe).values():
        static = [site for site in members if recipe.sites[site] == STATIC]
        found = [known[site] for site in static if known and site in known]
        if not found:
            found = [
                step_of(
                    observations.input(site),
                    *columns(observations, recipe, site),
                    choose,
                    percentile,
                )
                for site in static
            ]
        for site in static:
            recipe.activations[site] = max(found)
    _fold_steps(observations, recipe)


def _fold_steps(observations: Observations, recipe: Recipe) -> None:
    """Move the steps of a link's readers into its scale: x / s is then what the producers make."""
    for name, link in covering(observations, recipe).items():
        steps = {recipe.activations.get(site) for site in link.consumers}
        step = next(iter(steps))
        if len(steps) == 1 and step is not None and step != 1.0:
            scale = recipe.scales.get(name, torch.ones(link.size))
            recipe.scales[name] = (scale.double() * step).float()
            recipe.activations |= dict.fromkeys(link.consumers, 1.0)


def covering(observations: Observations, recipe: Recipe) -> dict[str, LinkFacts]:
    """Links that hold every column of every reader, so that a step for each channel is one for the tensor."""
    return {
        name: link
        for name, link in observations.movable().items()
        if link.kind != "q-k"
        and all(min(channels) >= 0 for channels in link.consumers.values())
        and all(len(observations.sites[site].groups) == 1 for site in link.consumers)
        and link.consumers.keys() & recipe.sites.keys()
    }
