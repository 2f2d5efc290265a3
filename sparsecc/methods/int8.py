"""int8 weights for each row, activations for each token: needs no data, and is the floor of every comparison.

Law     W ≈ diag(s_w) q_w with s_w = max|w| / 127 of a row; x ≈ s_x q_x with s_x = max|x| / 127 of a token.
Source  Jacob et al. 2018 (arXiv:1712.05877), eq. 1; for each token: Yao et al. 2022, "ZeroQuant", §4.1.
Pays    a quarter of fp32's bytes, and products of integers. Outlier channels take the codes of all others.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.methods.common import start
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe


def int8(observations: Observations, skip: Sequence[str] = ()) -> Recipe:
    """Every site in int8, with dynamic activations."""
    return start("int8", observations, ["int8"], skip)
