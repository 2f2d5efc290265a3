"""CETT: neurons that together make up a given share of the output are left out, the smallest first.

Law     S = {i: |h_i| ‖D_i‖ ≤ t}, and CETT(t) is the mean over tokens of ‖Σ_{i∈S} h_i D_i‖ / ‖Σ_i h_i D_i‖.
        t is the largest with CETT(t) of at most what is asked for; neuron i goes where |h_i| ≤ t / ‖D_i‖.
Source  Zhang et al. 2024, "ReLU² Wins" (arXiv:2402.03804); Luo et al. 2024, "Sparsing Law" (arXiv:2411.02335).
        Here over a sample of tokens.
Pays    of down only the rows of live neurons are read; in a plain network that is what CATS reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecc.ffn_statistics import FFNObservations, FFNStatistics
from sparsecc.methods.neurons import share, start
from sparsecc.recipe import Recipe

_ROWS = 128  # sample tokens: each step of the search multiplies them by the weight


def cett(observations: FFNObservations, cett: float = 0.2, skip: Sequence[str] = ()) -> Recipe:
    """One threshold for each neuron.

    Args:
        cett: the share of the output's norm to leave out; 0.2 is that of the papers.
    Raises:
        CalibrationError: it is no share.
    """
    share("cett", cett)
    recipe, sites = start("cett", observations, skip, cett=cett)
    for site in sites:
        ffn = observations.ffns[site]
        limit, density = threshold(ffn, cett)
        recipe.thresholds[site] = (limit / ffn.norms).float()
        recipe.sparsity[site] = {"law": "hidden", "density": density, "cett": cett}
    return recipe


def threshold(ffn: FFNStatistics, target: float) -> tuple[float, float]:
    """The largest t with CETT(t) ≤ target, and the share of neurons above it."""
    h = ffn.h.sample[:_ROWS]
    size = h.double().abs() * ffn.norms
    whole = h @ ffn.down
    steps = size.flatten().unique()  # ascending; nothing changes between two of them
    low, high = -1, len(steps) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if left_out(h, ffn.down, size <= steps[middle], whole) <= target:
            low = middle
        else:
            high = middle - 1
    limit = float(steps[low]) if low >= 0 else 0.0
    return limit, float((size > limit).double().mean())


def left_out(
    h: torch.Tensor, down: torch.Tensor, small: torch.Tensor, whole: torch.Tensor
) -> float:
    """The mean over tokens of what ``small`` neurons make up of the output; tokens without output aside.

    Args:
        h: ``[tokens, F]``.
        down: ``[F, N]``.
        small: bool ``[tokens, F]``.
        whole: ``[tokens, N]``, the product of ``h`` and ``down``.
    """
    part = (h.masked_fill(~small, 0.0) @ down).norm(dim=1)
    all_of_it = whole.norm(dim=1)
    some = all_of_it > 0
    return float((part[some] / all_of_it[some]).double().mean()) if bool(some.any()) else 0.0
