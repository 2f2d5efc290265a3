"""What methods of sparsity share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsecc.errors import CalibrationError
from sparsecc.ffn_statistics import FFNObservations
from sparsecc.methods.common import empty, not_skipped, note
from sparsecc.recipe import Recipe


def start(
    method: str, observations: FFNObservations, skip: Sequence[str], **options: Any
) -> tuple[Recipe, list[str]]:
    """A recipe that says nothing yet but the shapes, and the sites that it is for.

    Raises:
        CalibrationError: a pattern of ``skip`` matches no site.
    """
    recipe = empty(method, observations.ffns, skip, options)
    sites = not_skipped(observations.ffns, skip)
    recipe.shapes = {site: observations.ffns[site].shape for site in sites}
    rows = max((ffn.h.rows for ffn in observations.ffns.values()), default=0)
    note(recipe, observations.about, rows, observations.batches)
    return recipe, sites


def share(name: str, value: Any) -> float:
    """``value`` as a number of 0 … 1.

    Raises:
        CalibrationError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise CalibrationError(f"{name} is a share of 0 to 1, not {value!r}.")
    return float(value)


def kept_of(sparsity: float, neurons: int) -> int:
    """How many neurons of a row stay, at least one."""
    return max(1, round((1 - share("sparsity", sparsity)) * neurons))
