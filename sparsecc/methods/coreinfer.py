"""CoreInfer: the neurons that matter for a prompt are chosen while it is read, and kept while it is answered.

Law     The core of a token is its ⌈α #{i: h_i > 0}⌉ largest hidden values, by value and not by magnitude; that
        of a sequence the ⌈βF⌉ neurons in the cores of the most tokens. Decoding reads these neurons alone.
Source  Wang et al. 2024, "CoreInfer" (arXiv:2410.18311), its stability-guided choice. What calibration chose
        stands in until there is a prompt.
Pays    β of gate, up and down is read for a token; the prompt itself costs what it did, and the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.errors import CalibrationError
from sparsecc.ffn_statistics import FFNObservations
from sparsecc.methods.neurons import share, start
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.cores import chosen, core_size, token_counts


def coreinfer(
    observations: FFNObservations,
    alpha: float = 0.4,
    beta: float = 0.4,
    skip: Sequence[str] = (),
) -> Recipe:
    """A core for each network, from sample tokens, and how prompts choose theirs.

    Args:
        alpha: the share of a token's positive values that are its core.
        beta: the share of neurons that are a sequence's core.
    Raises:
        CalibrationError: one is no share above 0.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not share(name, value):
            raise CalibrationError(f"{name} must be above 0.")
    recipe, sites = start("coreinfer", observations, skip, alpha=alpha, beta=beta)
    for site in sites:
        ffn = observations.ffns[site]
        count = core_size(beta, ffn.size)
        recipe.neurons[site] = chosen(token_counts(ffn.h.sample, alpha), count)
        recipe.sparsity[site] = {"law": "core", "alpha": alpha, "density": count / ffn.size}
    return recipe
