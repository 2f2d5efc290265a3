"""``calibrate``: from a model and example data to a recipe, searched under a budget in the user's own terms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecc.budget import DENSE, Rung, cost_of, formats_of, nbytes, path, pruned
from sparsecc.errors import CalibrationError, unknown
from sparsecc.latency import measured
from sparsecc.log import log
from sparsecc.methods import make
from sparsecc.methods.reference import errors_of
from sparsecc.metrics import METRICS, Metric, logits
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.progress import tracked
from sparsecc.recipe import Recipe
from sparsecc.simulate import Simulation, simulated
from sparsecc.simulate_sparse import SparseSimulation

_KEPT = 2**30  # bytes of the model's own outputs that are kept between candidates
TARGETS = ("bytes", "latency")


def calibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("int8",),
    budget: float | None = None,
    metric: str = "kl",
    held_back: float = 0.2,
    target: str = "bytes",
    latency: Mapping[str, Mapping[str, float]] | None = None,
    rows: int = 1,
    skip: Sequence[str] = (),
    require: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Recipe:
    """Observe ``model`` over ``batches`` and say how its linear layers are to be quantized.

    Without a budget the recipe is the method's, for every layer. With one, each method's recipe is tried on
    batches that calibration did not see, and layers get finer formats, or stay as they are, until the metric
    holds; the cheapest recipe that holds is returned.

    Args:
        model: a module in eval mode, or a function that returns logits.
        batches: tensors, tuples of arguments or dicts of keyword arguments.
        methods: names (:mod:`sparsecc.methods`), or a mapping from names to their options.
        budget: the largest value of the metric, 0 being the model as it is; 0.02 of "perplexity" is 2 %.
        metric: "kl" (of the logits, for each position), "rmse" (relative), "agreement" (share of positions with
            another top-1), "perplexity" (relative increase; of the batch's ``labels``, or of the next tokens).
        held_back: the share of the batches that measures; the last ones.
        target: what to save: "bytes" of weights that a call reads, or "latency".
        latency: site -> format ("dense" as it is) -> seconds; None to measure them on this machine's CPU.
        rows: of the input of a layer, where latency is measured: 1 where one token is decoded at a time.
        skip: patterns of sites to leave alone, of all methods. A tied head is rounded as a copy of its own.
        require: raise where no layer can be quantized within the budget, instead of returning an empty recipe.
        options: of the backend: passes left out there must be left out here.
        progress: bars on stderr; None where that is a terminal.
    Raises:
        CalibrationError: the model or the data cannot be calibrated on, an argument is wrong, or the budget is
            too small (with ``require``).
    """
    chosen = _checked(methods, budget, metric, held_back, target, latency)
    if budget is None:
        (name, given), *_ = chosen.items()
        seen = observe(model, batches, options, progress=progress)
        recipe = make(name, seen, **_with_skip(given, skip))
        recipe.about |= _sizes(seen, recipe, recipe.sites)
        return recipe
    first, held = split(list(batches), held_back)
    seen = observe(model, first, options, progress=progress)
    if target == "latency" and latency is None:
        latency = measured(seen, rows)
    with simulated(model, seen, options) as simulation:
        judge = Judge(simulation, METRICS[metric], held, progress)
        searches: list[_Search] = []
        for name, given in chosen.items():
            recipe = make(name, seen, **_with_skip(given, skip))
            limit = min((search.cost for search in searches), default=math.inf)
            searches.append(_search(seen, recipe, judge, budget, latency, limit))
    return _best(seen, searches, metric, budget, target, len(held), require)


def _checked(
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    budget: float | None,
    metric: str,
    held_back: float,
    target: str,
    latency: Mapping[str, Mapping[str, float]] | None,
) -> dict[str, Mapping[str, Any]]:
    """The methods with their options."""
    given: Any = methods
    if isinstance(given, str) or not given:
        raise CalibrationError(f"methods are a list of names, not {methods!r}.")
    chosen = dict(given) if isinstance(given, Mapping) else {name: {} for name in given}
    if len(chosen) > 1 and budget is None:
        raise CalibrationError("several methods need a budget to choose among them.")
    if budget is not None and not 0 < budget < math.inf:
        raise CalibrationError(f"a budget is a number above 0, not {budget}.")
    if metric not in METRICS:
        raise CalibrationError(unknown("metric", metric, METRICS))
    if not 0 < held_back < 1:
        raise CalibrationError(f"held_back is a share between 0 and 1, not {held_back}.")
    if target not in TARGETS:
        raise CalibrationError(unknown("target", target, TARGETS))
    if target != "latency" and latency is not None:
        raise CalibrationError("a table of latencies needs target='latency'.")
    return chosen


def _with_skip(given: Mapping[str, Any], skip: Sequence[str]) -> dict[str, Any]:
    return {**given, "skip": [*skip, *given.get("skip", ())]}


def split(batches: list[Any], held_back: float) -> tuple[list[Any], list[Any]]:
    """The batches to observe, and those that measure.

    Raises:
        CalibrationError: there are not two.
    """
    if len(batches) < 2:
        raise CalibrationError(
            f"a budget is measured on batches that are held back: at least two are needed, not {len(batches)}."
        )
    count = min(len(batches) - 1, max(1, round(held_back * len(batches))))
    return batches[:-count], batches[-count:]


class Judge:
    """Measures the model under a recipe on the batches that were held back."""

    def __init__(
        self,
        simulation: Simulation | SparseSimulation,
        metric: Metric,
        batches: list[Any],
        progress: bool | None,
    ) -> None:
        self.simulation, self.metric, self.batches = simulation, metric, batches
        self.progress = progress
        self.own: list[torch.Tensor] = []
        simulation.use(None)
        kept = 0
        for batch in batches:
            found = logits(simulation(batch))
            kept += found.numel() * found.element_size()
            if kept > _KEPT:
                break
            self.own.append(found)

    def __call__(self, recipe: Recipe, formats: Mapping[str, str] | None = None) -> float:
        sums = [0.0, 0.0]
        self.simulation.use(recipe, formats)
        for i, batch in enumerate(
            tracked(self.batches, f"measuring {recipe.method}", self.progress)
        ):
            if i < len(self.own):
                exact = self.own[i]
            else:  # too large to keep
                self.simulation.paused = True
                exact = logits(self.simulation(batch))
                self.simulation.paused = False
            for place, part in enumerate(
                self.metric.sums(logits(self.simulation(batch)), exact, batch)
            ):
                sums[place] += part
        return self.metric.of(*sums)


@dataclass
class _Search:
    """One method's way up its ladder."""

    recipe: Recipe
    formats: dict[str, str] = field(default_factory=dict)  # of the cheapest choice that holds
    measured: float = 0.0
    cost: float = 0.0
    tried: list[dict[str, Any]] = field(default_factory=list)


def _search(
    seen: Observations,
    recipe: Recipe,
    judge: Judge,
    budget: float,
    latency: Mapping[str, Mapping[str, float]] | None,
    limit: float,
) -> _Search:
    """The fewest steps up that hold, by bisection: each step takes error away. ``limit``: the cost to beat."""
    ladders = _ladders(seen, recipe, latency)
    steps = path(ladders)
    found = _Search(recipe)

    def after(count: int) -> dict[str, str]:
        state = {
            site: min(rungs, key=lambda r: (r.cost, r.error)).form
            for site, rungs in ladders.items()
        }
        state |= dict(steps[:count])
        return {site: form for site, form in state.items() if form != DENSE}

    def cost(formats: Mapping[str, str]) -> float:
        return sum(
            next(r.cost for r in rungs if r.form == formats.get(site, DENSE))
            for site, rungs in ladders.items()
        )

    def holds(count: int) -> bool:
        formats = after(count)
        value = judge(recipe, formats)
        held = value <= budget  # a NaN does not
        entry = {"method": recipe.method, **_sizes(seen, recipe, formats), "held": held}
        entry["measured"] = value if math.isfinite(value) else None
        if latency is not None:
            entry["latency"] = cost(formats)
        found.tried.append(entry)
        if held:
            found.formats, found.measured, found.cost = formats, value, cost(formats)
        return held

    found.cost = cost({})
    # All steps leave the model as it is; what costs more than another method's choice is not worth measuring.
    dear = (k for k in range(1, len(steps)) if cost(after(k)) > limit)
    low, high = 0, next(dear, len(steps))
    if not steps or holds(0):
        return found
    while high - low > 1:
        count = (low + high) // 2
        if holds(count):
            high = count
        else:
            low = count
    return found


def _ladders(
    seen: Observations, recipe: Recipe, latency: Mapping[str, Mapping[str, float]] | None
) -> dict[str, list[Rung]]:
    ladders = {}
    for site in recipe.sites:
        forms = formats_of(recipe, site)
        errors = [*errors_of(seen, recipe, site, forms), 0.0]
        ladders[site] = [
            Rung(form, cost_of(seen, recipe, site, form, latency), error)
            for form, error in zip([*forms, DENSE], errors, strict=True)
            if math.isfinite(error)  # where a format cannot hold the weight at all
        ]
    return ladders


def _sizes(seen: Observations, recipe: Recipe, formats: Mapping[str, str]) -> dict[str, Any]:
    """Bytes of all sites' weights as they would be, and how many sites have each format."""
    forms = {site: formats.get(site, DENSE) for site in seen.sites}
    return {
        "bytes": sum(nbytes(seen, recipe, site, form) for site, form in forms.items()),
        "bytes_before": sum(nbytes(seen, recipe, site, DENSE) for site in forms),
        "formats": dict(sorted(Counter(forms.values()).items())),
    }


def _best(
    seen: Observations,
    searches: Sequence[_Search],
    metric: str,
    budget: float,
    target: str,
    held_back: int,
    require: bool,
) -> Recipe:
    best = min(searches, key=lambda s: (s.cost, s.measured))
    tried = [entry for search in searches for entry in search.tried]
    if not best.formats:
        least = min((e["measured"] for e in tried if e["measured"] is not None), default=None)
        words = (
            f"no layer can be quantized with {metric} of at most {budget}"
            + ("" if least is None else f"; the least that was measured is {least:.3g}")
            + f" ({len(tried)} candidates of {', '.join(s.recipe.method for s in searches)})."
        )
        if require:
            raise CalibrationError(words)
        log.warning("%s The recipe leaves the model as it is.", words)
    readers = {name: list(link.consumers) for name, link in seen.links.items()}
    recipe = pruned(best.recipe, best.formats, readers)
    recipe.tried = tried
    recipe.budget = {
        "metric": metric,
        "increase": budget,
        "measured": best.measured,
        "target": target,
        "batches": held_back,
        "held": bool(best.formats),
    }
    recipe.about |= _sizes(seen, best.recipe, best.formats)
    return recipe
