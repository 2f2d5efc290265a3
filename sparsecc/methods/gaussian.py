"""Statistical top-k: what lies above a quantile of a normal distribution with the row's mean and deviation.

Law     z' = relu(z − mean(z) − c std(z)) with c = Φ⁻¹(1 − k/F), population std. For normal z about k of F stay.
        z is what the activation reads (Spark, Gemma 3n) or what it gives. k = F leaves the model as it is.
Source  You et al. 2025, "Spark Transformer" (arXiv:2506.06644), eq. 6.
Pays    as top-k, without a sort. A model must be trained with it: z' is shifted, and one that was not computes
        another function.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

from sparsecc.errors import CalibrationError, unknown
from sparsecc.ffn_statistics import FFNObservations
from sparsecc.methods.neurons import kept_of, start
from sparsecc.recipe import Recipe

ON = ("input", "output")


def gaussian(
    observations: FFNObservations,
    sparsity: float = 0.95,
    on: str = "input",
    skip: Sequence[str] = (),
) -> Recipe:
    """The same share of every network's neurons.

    Args:
        sparsity: 1 − k/F.
        on: whether z is the "input" of the activation, or its "output".
    Raises:
        CalibrationError: the sparsity is no share, or ``on`` is neither.
    """
    if on not in ON:
        raise CalibrationError(unknown("on", on, ON))
    recipe, sites = start("gaussian", observations, skip, sparsity=sparsity, on=on)
    for site in sites:
        size = observations.ffns[site].size
        k = kept_of(sparsity, size)
        entry = {"law": "gaussian", "k": k, "on": on, "density": k / size}
        if k < size:
            entry["c"] = NormalDist().inv_cdf(1 - k / size)
        recipe.sparsity[site] = entry
    return recipe
