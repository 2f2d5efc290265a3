"""TEAL: input features of linear layers that are small are left out.

Law     x'_j = x_j where |x_j| > t, else 0, with t of each layer the quantile of |x| that the sparsity names.
Source  Liu et al. 2024, "TEAL" (arXiv:2408.14690), with one sparsity for all layers, or one for each
        (:mod:`sparsecc.greedy`). The quantile is that
        of |x| itself; the paper takes it of a distribution that is symmetric around zero.
Pays    of every weight only the columns of live features are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sparsecc.methods.common import empty, not_skipped, note
from sparsecc.methods.neurons import share
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe


def teal(
    observations: Observations,
    sparsity: float = 0.4,
    allocate: Callable[[float], Mapping[str, float]] | None = None,
    skip: Sequence[str] = (),
) -> Recipe:
    """One threshold for each linear layer.

    Args:
        sparsity: the share of input features to leave out.
        allocate: from it to that of each site; a site which it does not name has ``sparsity`` itself. None:
            so has every site.
    Raises:
        CalibrationError: it is no share.
    """
    share("sparsity", sparsity)
    recipe = empty("teal", observations.sites, skip, {"sparsity": sparsity})
    own = {} if allocate is None else allocate(sparsity)
    for site in not_skipped(observations.sites, skip):
        x, part = observations.input(site), own.get(site, sparsity)
        recipe.shapes[site] = list(observations.sites[site].shape)
        recipe.thresholds[site] = torch.tensor([x.percentile(part)], dtype=torch.float32)
        recipe.sparsity[site] = {"law": "input", "density": 1 - max(part, x.zeros)}
    rows = max((s.rows for s in observations.inputs.values()), default=0)
    note(recipe, observations.about, rows, observations.batches)
    return recipe
