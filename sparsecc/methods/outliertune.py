"""OutlierTune: activations rounded for each channel, the channels' steps folded into the weights beforehand.

Law     Y = (X_q diag(s)) Wᵀ = X_q (W diag(s))ᵀ: x' = (x − z) / s lies within ±127 and is rounded as it is; W
        diag(s) is rounded for each row. z_j = (max + min) / 2 and s_j = (max − min) / 254 (symmetrization);
        where no shift can move, z = 0 and s_j = max|x_j| / 127.
Source  Wang et al. 2024, "OutlierTune" (arXiv:2406.18832), §3 (pre-execution of dequantization,
        symmetrization).
Floors  a channel's range counts as at least 1e-5 of the largest in its link.
Pays    static int8 with outlier channels: no step is multiplied at run time. Columns of the weight grow with
        the range of their channel: where ranges differ by a hundred and more, smoothquant keeps more of the
        weight. A LayerNorm that became an RMSNorm carries no shift: disable layernorm-to-rmsnorm for skewed
        channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecc.methods.common import (
    STATIC,
    covering,
    floored,
    gather,
    largest_inputs,
    set_steps,
    start,
)
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.watch import LinkFacts


def outliertune(
    observations: Observations, choose: str = "mse", skip: Sequence[str] = ()
) -> Recipe:
    """Static int8 with unit steps behind the links; one step for the tensor elsewhere.

    Args:
        choose: how the steps of inputs without a link are chosen: "max", "percentile" or "mse".
    """
    recipe = start("outliertune", observations, [STATIC], skip, choose=choose)
    known: dict[str, float] = {}
    for name, link in covering(observations, recipe).items():
        middle, half = symmetrized(observations, link)
        recipe.scales[name] = (floored(half) / 127).float()
        if link.carries_shift:
            recipe.shifts[name] = middle.float()
        known |= dict.fromkeys(link.consumers, 1.0)
    set_steps(observations, recipe, choose, known=known)
    return recipe


def symmetrized(observations: Observations, link: LinkFacts) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle of every channel's range and half its width; 0 and max|y| where no shift moves. fp64."""
    if not link.carries_shift:
        half = largest_inputs(observations, link)
        return torch.zeros_like(half), half
    seen = {site: observations.input(site) for site in link.consumers}
    high = gather(link, {site: s.high for site, s in seen.items()})
    low = gather(link, {site: s.low for site, s in seen.items()}, least=True)
    return (high + low) / 2, (high - low) / 2
