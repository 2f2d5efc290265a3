"""int4 weights for each group of a row, rounded to the nearest: activations stay as they are.

Law     W ≈ s (q − z) for each group of a row, q in 0 … 15, s = (max − min) / 15 and z = −min / s; without a
        zero, s = max|w| / 7 and z = 8. z is an integer, so that 0 is a level and tiny weights, which large
        activations may meet, stay tiny; but for groups on one side of 0, where any z has half the error.
Source  Frantar et al. 2022, "GPTQ" (arXiv:2210.17323), §4 (the round-to-nearest baseline with groups).
Pays    an eighth of fp32's bytes (4.25 bits a weight with groups of 128 and a zero), where reading weights is
        the time. Needs no data; awq at the same bits is nearer to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.errors import CalibrationError, unknown
from sparsecc.methods.common import dynamic, start
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.formats import GROUPS


def int4(
    observations: Observations,
    group: int = 128,
    zero: bool = True,
    activations: str = "float",
    skip: Sequence[str] = (),
) -> Recipe:
    """Every site in int4; int8 where no group divides its rows.

    Args:
        group: weights that share a scale: 128, 64 or 32; smaller ones where it does not divide a row.
        zero: whether a group has a zero of its own.
        activations: "float", or "int8", for each group of a token: W4A8.
    """
    options = {"group": group, "zero": zero, "activations": activations}
    return start("int4", observations, formats(group, zero, activations), skip, **options)


def formats(group: int, zero: bool, activations: str) -> list[str]:
    """The formats to try, in order.

    Raises:
        CalibrationError: there are no groups of this size, or no such activations.
    """
    if activations not in ("float", "int8"):
        raise CalibrationError(unknown("activations", activations, ("float", "int8")))
    if group not in GROUPS:
        raise CalibrationError(unknown("group", group, map(str, GROUPS)))
    sizes = [g for g in sorted(GROUPS, reverse=True) if g <= group]
    suffix = ("z" if zero else "") + ("a8" if activations == "int8" else "")
    return [*(f"int4g{g}{suffix}" for g in sizes), *dynamic(32)]
