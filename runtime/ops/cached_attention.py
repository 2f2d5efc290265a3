"""``sparsecc::cached_attention``: rotate, write the new keys and values into the cache, and attend over it.

Decoding attends with one query, or a few, to a cache that is there already. Spelled out, the cache is copied
once for every query head that shares it and a dozen small operators surround the product; here the cache is
read once, where it lies.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsecc.runtime.ops.define import define


@dataclass(frozen=True)
class Spec:
    """What a kernel is generated for.

    Attributes:
        size: features of a query or key.
        value_size: features of a value.
        groups: query heads that share one head of the cache.
        rotary: whether queries and keys are rotated first.
    """

    size: int
    value_size: int
    groups: int
    rotary: bool

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Spec:
        """The spec of a text.

        Raises:
            ValueError: it is none.
        """
        try:
            spec = cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"cached_attention: {text!r} is no spec") from error
        if min(spec.size, spec.value_size, spec.groups) < 1 or (spec.rotary and spec.size % 2):
            raise ValueError(f"cached_attention: {text!r} has sizes that cannot be")
        return spec


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, halves paired: (a, b) -> (a cos - b sin, b cos + a sin).

    Su et al., "RoFormer" (2021), eq. 34, with the pairs (i, i + size/2) instead of (2i, 2i + 1).
    """
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


def meaning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scale: float,
    kernel: str,
) -> torch.Tensor:
    """The operator in ATen.

    Args:
        q: ``[B, H·groups, T, size]``, before rotation.
        k, v: ``[B, H, T, size]`` and ``[B, H, T, value_size]`` of the new tokens.
        keys, values: the cache, ``[B, H, S, size]`` and ``[B, H, S, value_size]``; written at ``positions``.
        positions: ``[T]``, int64.
        rotation: none, or cos and sin, ``[B or 1, 1, T, size]``.
        mask: None, or bool (True: attend) or float (added), that broadcasts to ``[B, H·groups, T, S]``. Kernels
            do not read keys and values that it excludes (False, -inf) for all queries.
        scale: of the scores.
        kernel: the text of a :class:`Spec`.

    Returns:
        ``[B, T, H·groups, value_size]``.
    """
    if rotation:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    groups = Spec.of(kernel).groups
    every_key, every_value = _for_each_query(keys, groups), _for_each_query(values, groups)
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, every_key, every_value, mask, scale=scale).transpose(1, 2)


def _for_each_query(cache: torch.Tensor, groups: int) -> torch.Tensor:
    if groups == 1:
        return cache
    batch, heads, length, size = cache.shape
    repeated = cache[:, :, None].expand(batch, heads, groups, length, size)
    return repeated.reshape(batch, heads * groups, length, size)


def _shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], values.shape[-1]))


_SIGNATURE = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions, "
    "Tensor[] rotation, Tensor? mask, float scale, str kernel) -> Tensor"
)
# The second runs by a generated kernel: on CPU ``codegen.cpp.cached_attention.load`` must have loaded it;
# on GPUs ``codegen.triton.launch_attention`` makes it, and a position outside the cache is not written, unseen.
cached_attention, cached_attention_native = define("cached_attention", _SIGNATURE, meaning, _shapes)
