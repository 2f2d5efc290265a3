"""``sparsecc::rounded_weight``: one tensor of a weight in a format, as an operator for weight expressions."""

from __future__ import annotations

import torch

from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.define import define_meaning


def meaning(weight: torch.Tensor, clip: torch.Tensor | None, form: str, part: int) -> torch.Tensor:
    """The tensor ``part`` of ``weight`` in the format ``form`` (:func:`sparsecc.runtime.ops.formats.quantize`).

    Args:
        weight: ``[N, K]``, of any float dtype.
        clip: ``[N, groups]``, the largest magnitude that each group of a row keeps; None keeps all.

    Raises:
        ValueError: the format is unknown, K is not one of its sizes, or the groups do not divide K.
    """
    if clip is not None:
        rows, groups = clip.shape
        if weight.shape[0] != rows or weight.shape[1] % groups:
            raise ValueError(f"clip {list(clip.shape)} does not fit a weight {list(weight.shape)}")
        size = weight.shape[1] // groups
        limit = clip.to(weight.dtype).repeat_interleave(size, 1)
        weight = torch.minimum(torch.maximum(weight, -limit), limit)
    return formats.quantize(weight, form)[part]


rounded_weight = define_meaning(
    "rounded_weight", "(Tensor weight, Tensor? clip, str form, int part) -> Tensor", meaning
)
