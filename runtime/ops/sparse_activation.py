"""``sparsecc::sparse_activation``: the activations of ``sparsecc::sparse_ffn`` alone, for any number of rows.

Where rows are many, their products are bound by arithmetic and stay products of whole matrices; this says which
neurons count between them, by the same expressions, so that the function is the same for any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecc.runtime.ops.define import define_meaning
from sparsecc.runtime.ops.sparse_ffn import Spec, hidden


def meaning(x: torch.Tensor, operands: Sequence[torch.Tensor], kernel: str) -> torch.Tensor:
    """``after(select(activation(x)))`` in x's dtype.

    Args:
        x: ``[..., F]`` of a float dtype.
        operands: ``[F]`` each.
        kernel: the text of a :class:`~sparsecc.runtime.ops.sparse_ffn.Spec` that multiplies by nothing: without
            a gate, and its ``hidden`` is "a".

    Raises:
        ValueError: the text is no spec, or one that reads weights.
    """
    spec = Spec.of(kernel)
    if spec.gate or spec.up:
        raise ValueError(f"sparse_activation: {kernel!r} reads weights")
    return hidden(spec, x, (), operands)


sparse_activation = define_meaning(
    "sparse_activation", "(Tensor x, Tensor[] operands, str kernel) -> Tensor", meaning
)
