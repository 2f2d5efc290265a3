"""int8 weights for each row, activations for each token: needs no data, and is the floor of every comparison.

Law     W ≈ diag(s_w) q_w with s_w = max|w| / 127 of a row; x ≈ s_x q_x with s_x = max|x| / 127 of each 32
        features of a token, or of all.
Source  Jacob et al. 2018 (arXiv:1712.05877), eq. 1; for each token: Yao et al. 2022, "ZeroQuant", §4.1. In
        groups: llama.cpp's Q8_0 has groups of 32 in weights and activations.
Pays    a quarter of fp32's bytes, and products of integers. Outlier channels take the codes of all others in
        their group. Without groups sums stay integers for the whole row, which pays with many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.methods.common import dynamic, start
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe


def int8(observations: Observations, group: int | None = 32, skip: Sequence[str] = ()) -> Recipe:
    """Every site in int8, with dynamic activations.

    Args:
        group: how many features of a token share a scale: 128, 64, 32, or None for all.
    Raises:
        CalibrationError: there are no such groups.
    """
    return start("int8", observations, dynamic(group), skip, group=group)
