"""``sparsecc::rounded_weight``: one tensor of a weight in a format, as an operator for weight expressions."""

from __future__ import annotations

import torch

from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.define import define_meaning


def meaning(
    weight: torch.Tensor,
    clip: torch.Tensor | None,
    form: str,
    part: int,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tensor ``part`` of ``weight`` in the format ``form`` (:func:`sparsecc.runtime.ops.formats.quantize`).

    Args:
        weight: ``[N, K]``, of any float dtype.
        clip: as of :func:`quantized`; None clips nothing.
        scale, zero: a grid that is given (:func:`sparsecc.runtime.ops.formats.quantize_on`).

    Raises:
        ValueError: the format is unknown, K is not one of its sizes, or the groups do not divide K.
    """
    return quantized(weight, clip, form, scale, zero)[part]


def quantized(
    weight: torch.Tensor,
    clip: torch.Tensor | None,
    form: str,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The tensors of ``weight`` in a format.

    Args:
        weight: ``[N, K]``, of any float dtype.
        clip: as of :func:`clipped`; of fp4, what the largest code of a row stands for, ``[N, 1]``, which may be
            more than the largest magnitude. None for all of it.
        scale, zero: a grid that is given (:func:`sparsecc.runtime.ops.formats.quantize_on`).

    Raises:
        ValueError: the format is unknown, K is not one of its sizes, or the shapes do not fit.
    """
    if clip is not None and formats.Format.of(form).kind == "fp4":
        if tuple(clip.shape) != (weight.shape[0], 1):
            raise ValueError(
                f"clip {list(clip.shape)} does not fit the rows of {list(weight.shape)}"
            )
        return formats.quantize(weight, form, clip)
    weight = weight if clip is None else clipped(weight, clip)
    if scale is not None:
        return formats.quantize_on(weight, form, scale, zero)
    return formats.quantize(weight, form)


def clipped(weight: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """``weight`` with no magnitude above ``clip`` times the largest of its group.

    Args:
        weight: ``[N, K]``.
        clip: ``[N, groups]``, shares of 0 … 1, which hold whatever the rows are scaled by.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, groups = clip.shape
    if weight.shape[0] != rows or weight.shape[1] % groups:
        raise ValueError(f"clip {list(clip.shape)} does not fit a weight {list(weight.shape)}")
    split = weight.unflatten(1, (groups, -1))
    limit = (clip.to(weight.dtype) * split.abs().amax(-1))[..., None]
    kept: torch.Tensor = torch.minimum(torch.maximum(split, -limit), limit).flatten(1)
    return kept


rounded_weight = define_meaning(
    "rounded_weight",
    "(Tensor weight, Tensor? clip, str form, int part, Tensor? scale=None, Tensor? zero=None) -> Tensor",
    meaning,
)
