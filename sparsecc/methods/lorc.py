"""LoRC: what rounding loses of a weight, given back in a low-rank product beside it.

Law     W ≈ Ŵ + U V, with U V the best approximation of rank r of E = W − Ŵ: E = Σ σ_i u_i v_iᵀ, U = [√σ_i
        u_i], V = [√σ_i v_iᵀ], i ≤ r. Then ‖E − U V‖² = Σ_{i>r} σ_i².
Source  Yao et al. 2023, "ZeroQuant-V2" (arXiv:2303.08302), §4, Low Rank Compensation.
Pays    on top of int4 and awq, in small models most: r (N + K) more numbers and products for each layer, 0.4 %
        at r = 8 and N = K = 4096. Rounding errors are nearly white, so a small r gives a small part back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsecc.errors import CalibrationError, unknown
from sparsecc.methods import METHODS, make
from sparsecc.methods.common import migrated
from sparsecc.methods.reference import rounded_site
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe


def lorc(
    observations: Observations,
    base: str = "int4",
    rank: int = 8,
    skip: Sequence[str] = (),
    options: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of another method, with a correction for every site.

    Args:
        base: the other method.
        rank: of the corrections.
        options: of the other method.
    Raises:
        CalibrationError: there is no such method, or the rank is not a positive whole number.
    """
    if base not in METHODS or base == "lorc":
        raise CalibrationError(unknown("base of lorc:", base, set(METHODS) - {"lorc"}))
    given: Any = rank
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise CalibrationError(f"lorc: rank must be a positive whole number, not {rank!r}.")
    recipe = make(base, observations, skip=skip, **(options or {}))
    for site in recipe.sites:
        wrong = (
            migrated(observations, recipe, site) - rounded_site(observations, recipe, site).weight
        )
        recipe.corrections[site] = low_rank(wrong, rank)
    recipe.method = "lorc"
    recipe.options = {"base": base, "rank": rank, **recipe.options}
    return recipe


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U [N, r] and V [r, K], fp32, whose product is the nearest of rank r to ``matrix`` [N, K]."""
    if matrix.shape[0] < matrix.shape[1]:
        left, right = low_rank(matrix.T, rank)
        return right.T.contiguous(), left.T.contiguous()
    wide = matrix.double()
    # The right singular vectors are those of the smaller Gram matrix: no decomposition of the large one.
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    kept = min(rank, matrix.shape[1])
    sigma, v = values[-kept:].clamp(min=0).sqrt().flip(0), vectors[:, -kept:].flip(1)
    root = sigma.sqrt()
    share = torch.where(root > 0, 1 / root, 0.0)
    return (wide @ v * share).float().contiguous(), (v * root).T.float().contiguous()
