"""Comparing sizes without leaving a guard: ``==`` on a symbolic size would tie the program to what it saw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are surely equal, symbolic ones as expressions."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left, right = _expression(a), _expression(b)
    return bool(left == right) or bool((left - right).expand() == 0)


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes (or strides) are surely equal."""
    left, right = list(a), list(b)
    return len(left) == len(right) and all(map(same_size, left, right))


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape surely have the same strides, but for axes of size one."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same_size(size, 1) or same_size(left, right) for size, left, right in pairs)


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a tensor's strides are surely those of a contiguous one, but for axes of size one."""
    expected: Any = 1
    for size, stride in reversed(list(zip(value.shape, value.stride(), strict=True))):
        if not same_size(size, 1) and not same_size(stride, expected):
            return False
        expected = expected * size
    return True


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
