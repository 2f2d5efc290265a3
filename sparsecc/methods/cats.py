"""CATS: neurons whose activated gate is small are left out.

Law     a' = a where |a| > t, else 0, with a the gate behind its activation, and t of each layer the quantile of
        |a| over the data that the wanted sparsity names. Magnitudes count: SiLU is negative for half of its
        inputs.
Source  Lee et al. 2024, "CATS" (arXiv:2404.08763), alg. 1. In a network without a gate, |a| is that of its
        hidden values.
Pays    of up and down only the rows of live neurons are read; gate is read whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecc.ffn_statistics import FFNObservations
from sparsecc.methods.neurons import share, start
from sparsecc.recipe import Recipe


def cats(observations: FFNObservations, sparsity: float = 0.5, skip: Sequence[str] = ()) -> Recipe:
    """One threshold for each network.

    Args:
        sparsity: the share of activations to leave out. Where more are zero by themselves, the threshold is 0.
    Raises:
        CalibrationError: the sparsity is no share.
    """
    share("sparsity", sparsity)
    recipe, sites = start("cats", observations, skip, sparsity=sparsity)
    for site in sites:
        a = observations.ffns[site].a
        recipe.thresholds[site] = torch.tensor([a.percentile(sparsity)], dtype=torch.float32)
        density = 1 - max(sparsity, a.zeros)
        recipe.sparsity[site] = {"law": "activation", "density": density}
    return recipe
