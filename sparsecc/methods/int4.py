"""int4 weights for each group of a row, rounded to the nearest: activations stay as they are.

Law     W ≈ s (q − z) for each group of a row, q in 0 … 15, s = (max − min) / 15 and z = −min / s; without a
        zero, s = max|w| / 7 and z = 8. z is no integer as a rule: nothing needs 0 to be a level, and a group
        that lies on one side of it keeps all sixteen.
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
    observations: Observations, group: int = 128, zero: bool = True, skip: Sequence[str] = ()
) -> Recipe:
    """Every site in int4; int8 where no group divides its rows.

    Args:
        group: weights that share a scale: 128, 64 or 32; smaller ones where it does not divide a row.
        zero: whether a group has a zero of its own.
    """
    return start("int4", observations, formats(group, zero), skip, group=group, zero=zero)


def formats(group: int, zero: bool) -> list[str]:
    """The formats to try, in order.

    Raises:
        CalibrationError: there are no groups of this size.
    """
    if group not in GROUPS:
        raise CalibrationError(unknown("group", group, map(str, GROUPS)))
    sizes = [g for g in sorted(GROUPS, reverse=True) if g <= group]
    return [*(f"int4g{g}{'z' if zero else ''}" for g in sizes), *dynamic(32)]
