"""SmoothQuant: outlier channels of the activations are moved into the weights, where rounding is for each row.

Law     s_j = max|x_j|^α / max|W_·j|^(1−α), over the columns of all layers that read channel j; y' = y / s and
        W' = W diag(s) are what is rounded.
Source  Xiao et al. 2023, "SmoothQuant" (arXiv:2211.10438), eq. 4 and §4.
Floors  either magnitude counts as at least 1e-5 of the largest in its link: dead channels get finite scales.
Pays    int8 activations with outliers in few channels. α = 0.5 shares the difficulty evenly; larger where
        activations are the harder part. Nothing is multiplied at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecc.errors import CalibrationError
from sparsecc.methods.common import (
    STATIC,
    dynamic,
    floored,
    gather,
    largest_inputs,
    set_steps,
    start,
)
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.watch import LinkFacts


def smoothquant(
    observations: Observations,
    alpha: float = 0.5,
    static: bool = False,
    choose: str = "max",
    group: int | None = 32,
    skip: Sequence[str] = (),
) -> Recipe:
    """Scales for every link, then int8.

    Args:
        alpha: how much of a channel's range moves into the weights, between 0 and 1.
        static: a fixed step for the activations of each layer, instead of one for each token.
        choose: how static steps are chosen: "max", "percentile" or "mse".
        group: how many features of a token share a scale that is not static: 128, 64, 32, or None for all.
    Raises:
        CalibrationError: alpha is not between 0 and 1, or there are no such groups.
    """
    if not 0 <= alpha <= 1:
        raise CalibrationError(f"smoothquant: alpha must be between 0 and 1, not {alpha}.")
    formats = [STATIC] if static else dynamic(group)
    options = {"alpha": alpha, "static": static, "choose": choose, "group": group}
    recipe = start("smoothquant", observations, formats, skip, **options)
    for name, link in observations.movable().items():
        if link.consumers.keys() & recipe.sites.keys():
            recipe.scales[name] = smoothing(observations, link, alpha).float()
    if static:
        set_steps(observations, recipe, choose)
    return recipe


def smoothing(observations: Observations, link: LinkFacts, alpha: float) -> torch.Tensor:
    """s of one link, fp64 [link.size]."""
    weights = {site: observations.weight(site).abs().amax(0) for site in link.consumers}
    read = floored(largest_inputs(observations, link))
    held = floored(gather(link, weights))
    return read**alpha / held ** (1 - alpha)
