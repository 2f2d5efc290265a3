"""``sparsify``: from a model and example data to a recipe of which neurons or features count."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sparsecc.calibration import Judge, split
from sparsecc.errors import CalibrationError, unknown
from sparsecc.greedy import Greedy
from sparsecc.methods import SPARSITY, make
from sparsecc.methods.neurons import share
from sparsecc.metrics import METRICS
from sparsecc.modules import listed
from sparsecc.networks import block_angles, networks
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.observe_ffn import observe_ffn, unraised
from sparsecc.recipe import Recipe
from sparsecc.simulate_sparse import simulated_sparse

_STRENGTH = {
    "cats": "sparsity",
    "top": "sparsity",
    "teal": "sparsity",
    "cfsp": "sparsity",
    "cett": "cett",
}
_STEPS = 10  # of the search: the strength is right to 2⁻¹⁰


def sparsify(
    model: Any,
    batches: Iterable[Any],
    method: str = "cats",
    *,
    budget: float | None = None,
    metric: str = "perplexity",
    held_back: float = 0.2,
    skip: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **given: Any,
) -> Recipe:
    """Observe ``model`` over ``batches`` and say which neurons, or input features, count.

    With a budget, the method's strength (``sparsity``, or ``cett``: then this is the PPL-p % of Sparsing Law)
    is one number for all layers: the largest that holds the metric on batches that were not observed.

    Args:
        model: a module in eval mode, or a function that returns logits.
        batches: tensors, tuples of arguments or dicts of keyword arguments.
        method: "cats", "cett", "top", "gaussian", "coreinfer", "teal" or "cfsp" (:mod:`sparsecc.methods`).
        budget: the largest value of the metric, 0 being the model as it is; None takes the strength as given.
        metric: "perplexity" (relative increase), "kl", "rmse" or "agreement", as of ``calibrate``.
        held_back: the share of the batches that measures, with a budget; the last ones.
        skip: patterns of sites to leave alone.
        options: of the backend: passes left out there must be left out here.
        progress: bars on stderr; None where that is a terminal.
        **given: options of the method; of "cfsp" also ``blocks``, patterns of the names of blocks, by whose
            angles it allots neurons; of "teal" ``blocks`` (with ``step`` and ``rows``), in each of which the
            layers whose sparsity costs least get more of it (:class:`sparsecc.greedy.Greedy`).
    Raises:
        CalibrationError: the model or the data cannot be calibrated on, an argument is wrong, or the method has
            no strength to search.
    """
    if method not in SPARSITY:
        raise CalibrationError(unknown("method", method, SPARSITY))
    given = {**given, "skip": list(skip)}
    if budget is None:
        return _looked(model, batches, method, given, options, progress)()
    if method not in _STRENGTH:
        raise CalibrationError(
            f"method {method!r} has no strength to search; a budget is for {', '.join(_STRENGTH)}."
        )
    strength = _STRENGTH[method]
    if strength in given:
        raise CalibrationError(f"give a budget or {strength}={given[strength]!r}, not both.")
    if not 0 < budget < math.inf:
        raise CalibrationError(f"a budget is a number above 0, not {budget}.")
    if metric not in METRICS:
        raise CalibrationError(unknown("metric", metric, METRICS))
    if not 0 < held_back < 1:
        raise CalibrationError(f"held_back is a share between 0 and 1, not {held_back}.")
    first, held = split(list(batches), held_back)
    recipe_of = _looked(model, first, method, given, options, progress)
    tried: list[dict[str, Any]] = []
    best, measured = recipe_of(**{strength: 0.0}), 0.0
    with simulated_sparse(model, options) as simulation:
        judge = Judge(simulation, METRICS[metric], held, progress)
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            recipe = recipe_of(**{strength: middle})
            value = judge(recipe)
            holds = value <= budget  # a NaN does not
            tried.append(
                {
                    "method": method,
                    strength: middle,
                    "density": density(recipe),
                    "measured": value if math.isfinite(value) else None,
                    "held": holds,
                }
            )
            if holds:
                low, best, measured = middle, recipe, value
            else:
                high = middle
    best.tried = tried
    best.budget = {
        "metric": metric,
        "increase": budget,
        "measured": measured,
        "batches": len(held),
        "held": any(entry["held"] for entry in tried),
    }
    return best


def density(recipe: Recipe) -> float:
    """The mean share of neurons or features that count, over the layers that the method looked at."""
    shares = [kept_share(entry) for entry in recipe.sparsity.values()]
    shares += [1.0] * len(recipe.about.get("whole", ()))
    return sum(shares) / max(1, len(shares))


def kept_share(entry: Mapping[str, Any]) -> float:
    """Of one layer, by its entry in a recipe; of law "prune" the share of neurons."""
    return float(entry["keep"] if entry["law"] == "prune" else entry["density"])


def _looked(
    model: Any,
    batches: Iterable[Any],
    method: str,
    given: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    progress: bool | None,
) -> Callable[..., Recipe]:
    """The model is looked at once; the result makes recipes of what was seen, by the method's strength."""
    kind = SPARSITY[method]
    if kind == "ffn":
        seen = observe_ffn(model, batches, options, progress=progress)
        return functools.partial(make, method, seen, **given)
    if kind == "input":
        batches = list(batches) if "blocks" in given else batches
        of = observe(model, batches, unraised(options), progress=progress)
        if "blocks" in given:
            return _greedy(model, batches, method, given, of, options)
        return functools.partial(make, method, of, **given)
    return _of_networks(model, list(batches), method, given, options, progress)


def _greedy(
    model: Any,
    batches: Iterable[Any],
    method: str,
    given: Mapping[str, Any],
    seen: Observations,
    options: Mapping[str, Any] | None,
) -> Callable[..., Recipe]:
    """As :func:`_looked`, with a sparsity of its own for every layer in a block."""
    own = {key: given[key] for key in ("blocks", "step", "rows") if key in given}
    rest = {key: value for key, value in given.items() if key not in own}
    share("sparsity", rest.get("sparsity", 0))  # said before the work
    greedy = Greedy(model, batches, seen=seen, skip=given["skip"], options=options, **own)

    def recipe_of(**strength: float) -> Recipe:
        recipe = make(method, seen, allocate=greedy, **rest, **strength)
        recipe.options |= {**own, "blocks": listed(own["blocks"])}
        return recipe

    return recipe_of


def _of_networks(
    model: Any,
    batches: list[Any],
    method: str,
    given: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    progress: bool | None,
) -> Callable[..., Recipe]:
    """As :func:`_looked`, with the model's networks and the angles of its blocks."""
    for name in ("networks", "importance"):
        if name in given:
            raise CalibrationError(f"sparsify finds {name} itself; call sparsecc.methods.{method}.")
    given = dict(given)
    blocks = given.pop("blocks", None)
    if blocks is not None:
        given["importance"] = block_angles(model, batches, blocks)
    seen = observe(model, batches, options, progress=progress)
    # A weight that many layers share has no statistics of its own, and none of its networks is pruned.
    whole = {
        down: before
        for down, before in networks(model, batches[0], options).items()
        if all(site in seen.sites for site in (down, *before))
    }

    def recipe_of(**strength: float) -> Recipe:
        recipe = make(method, seen, networks=whole, **{**given, **strength})
        if blocks is not None:
            recipe.options["blocks"] = listed(blocks)
        return recipe

    return recipe_of
