"""int8 with a fixed step for the activations of each layer: nothing is measured at run time.

Law     x ≈ s q, q = round(x / s) within ±127, and one s for the whole tensor: max|x| / 127, a percentile's, or
        the one with the least squared error.
Source  Jacob et al. 2018 (arXiv:1712.05877), §3; choosers: Wu et al. 2020, "Integer Quantization for Deep
        Learning Inference" (arXiv:2004.09602), §4.2.
Pays    where finding max|x| of every token costs more than it gives. A token that is smaller than the largest
        loses codes; outlier channels take them from all others (see smoothquant, outliertune, repq).
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.methods.common import STATIC, set_steps, start
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe


def w8a8(
    observations: Observations,
    choose: str = "max",
    percentile: float = 0.9999,
    skip: Sequence[str] = (),
) -> Recipe:
    """Every site in int8, with static activations.

    Args:
        choose: how steps are chosen: "max", "percentile" or "mse".
        percentile: of "percentile".
    """
    recipe = start("w8a8", observations, [STATIC], skip, choose=choose, percentile=percentile)
    set_steps(observations, recipe, choose, percentile)
    return recipe
