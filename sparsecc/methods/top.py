"""Top-k of ReLU: the k largest activations of a token stay.

Law     a'_i = a_i where it is among the k largest of its token, of equal ones the first, else 0. Exact where
        k is at least the number of neurons that ReLU leaves.
Source  Li et al. 2022, "The Lazy Neuron Phenomenon" (arXiv:2210.06313).
Pays    at most k rows of the down projection (and of up) are read for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsecc.errors import CalibrationError
from sparsecc.ffn_statistics import FFNObservations
from sparsecc.methods.neurons import kept_of, start
from sparsecc.recipe import Recipe

_NEVER_NEGATIVE = ("relu", "relu6")


def top(
    observations: FFNObservations,
    sparsity: float = 0.9,
    k: int | None = None,
    skip: Sequence[str] = (),
) -> Recipe:
    """The same share of every network's neurons, or the same number.

    Args:
        sparsity: the share of neurons to leave out, where k is not given.
        k: how many stay.
    Raises:
        CalibrationError: a number is wrong, or an activation may be negative: the largest values of it are not
            those that count.
    """
    asked: Any = k  # the user's
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise CalibrationError(f"k is a number of neurons, not {asked!r}.")
    recipe, sites = start("top", observations, skip, sparsity=sparsity, k=k)
    for site in sites:
        ffn = observations.ffns[site]
        if ffn.activation not in _NEVER_NEGATIVE:
            raise CalibrationError(
                f"{site}: top-k is for {' and '.join(_NEVER_NEGATIVE)}, and {ffn.activation} may be negative. "
                "Take method 'cats', or skip the layer."
            )
        count = min(kept_of(sparsity, ffn.size) if k is None else k, ffn.size)
        alive = (ffn.h.sample != 0).sum(1).clamp(max=count).double()
        density = float(alive.mean()) / ffn.size
        recipe.sparsity[site] = {"law": "top", "k": count, "density": density}
    return recipe
