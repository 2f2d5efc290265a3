"""Elementwise arithmetic as a polynomial: all factor orders, groupings and powers are the same.

``0.5 * x * (1 + t)`` and ``x * (t * 0.5 + 0.5)`` are both ``{(1, 0): 0.5, (1, 1): 0.5}`` over the
atoms (x, t).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sparsecc.passes.canonical._match import arithmetic, is_tensor, power, scalar

aten = torch.ops.aten

Polynomial = dict[tuple[int, ...], float]

_DEPTH = 10  # nodes from root to atom; the longest spelling of GELU takes 6
_DEGREE = 4


def expand(node: Any, atoms: Sequence[fx.Node], depth: int = _DEPTH) -> Polynomial | None:
    """``node`` as a polynomial over ``atoms``, or None when it is none (or too large)."""
    unit = (0,) * len(atoms)
    for index, atom in enumerate(atoms):
        if node is atom:
            return {tuple(int(i == index) for i in range(len(atoms))): 1.0}
    value = scalar(node)
    if value is not None:
        return {unit: value}
    if not is_tensor(node) or depth == 0:
        return None
    raised = power(node)
    if raised is not None and raised[1] in (2.0, 3.0):
        base = expand(raised[0], atoms, depth - 1)
        return None if base is None else _power(base, int(raised[1]))
    if node.target is aten.neg.default:
        base = expand(node.args[0], atoms, depth - 1)
        return None if base is None else {key: -c for key, c in base.items()}
    found = arithmetic(node)
    if found is None:
        return None
    kind, left, right = found
    a, b = expand(left, atoms, depth - 1), expand(right, atoms, depth - 1)
    if a is None or b is None:
        return None
    if kind == "mul":
        return _multiply(a, b)
    if kind == "div":
        divisor = b.get(unit, 0.0)
        if set(b) != {unit} or divisor == 0.0:
            return None
        return {key: c / divisor for key, c in a.items()}
    sign = 1.0 if kind == "add" else -1.0
    total = dict(a)
    for key, c in b.items():
        total[key] = total.get(key, 0.0) + sign * c
    return total


def close(
    found: Polynomial | None, expected: Mapping[tuple[int, ...], float], tolerance: float = 1e-6
) -> bool:
    """Whether the coefficients agree to a relative ``tolerance``."""
    if found is None:
        return False
    nonzero = {key: c for key, c in found.items() if c != 0.0}
    return set(nonzero) == set(expected) and all(
        abs(nonzero[key] - c) <= tolerance * abs(c) for key, c in expected.items()
    )


def _multiply(a: Polynomial, b: Polynomial) -> Polynomial | None:
    product: Polynomial = {}
    for left, c in a.items():
        for right, d in b.items():
            key = tuple(map(sum, zip(left, right, strict=True)))
            if sum(key) > _DEGREE:
                return None
            product[key] = product.get(key, 0.0) + c * d
    return product


def _power(base: Polynomial, exponent: int) -> Polynomial | None:
    result: Polynomial | None = base
    for _ in range(exponent - 1):
        result = None if result is None else _multiply(result, base)
    return result
