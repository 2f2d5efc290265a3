"""Laws on SymPy arrays.

``Array`` gives SymPy matrices the few tensor methods that laws are written with (``mean``, ``sum``,
``transpose``, ``@``, slices, broadcasting), so the same ``before`` and ``after`` functions serve both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy

from sparsecc.passes.base import Example


class Array:
    """A NumPy object array of SymPy expressions with torch's names for what laws need."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, dtype=object)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: Any) -> Array:
        return Array(self.values[index])

    def _of(self, other: Any) -> Any:
        return other.values if isinstance(other, Array) else other

    def __add__(self, other: Any) -> Array:
        return Array(self.values + self._of(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Array:
        return Array(self.values - self._of(other))

    def __rsub__(self, other: Any) -> Array:
        return Array(self._of(other) - self.values)

    def __mul__(self, other: Any) -> Array:
        return Array(self.values * self._of(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Array:
        return Array(self.values / self._of(other))

    def __rtruediv__(self, other: Any) -> Array:
        return Array(self._of(other) / self.values)

    def __neg__(self) -> Array:
        return Array(-self.values)

    def __pow__(self, power: Any) -> Array:
        exact = sympy.nsimplify(power)
        return Array(self.values**exact)

    def __matmul__(self, other: Array) -> Array:
        return Array(self.values.dot(other.values))

    def mean(self, dim: int, keepdim: bool = False) -> Array:
        return self.sum(dim, keepdim) / sympy.Integer(self.values.shape[dim])

    def sum(self, dim: int, keepdim: bool = False) -> Array:
        return Array(self.values.sum(axis=dim, keepdims=keepdim))

    def transpose(self, a: int, b: int) -> Array:
        return Array(np.swapaxes(self.values, a, b))


def symbols(name: str, shape: tuple[int, ...]) -> Array:
    """A tensor of independent real symbols."""
    flat = [sympy.Symbol(f"{name}{i}", real=True) for i in range(int(np.prod(shape)))]
    return Array(np.array(flat, dtype=object).reshape(shape))


def holds_symbolically(
    example: Example, sizes: Mapping[str, int], options: Mapping[str, Any]
) -> bool:
    """Whether ``before - after`` simplifies to zero for every element, at the given sizes."""
    inputs = {k: symbols(k, tuple(sizes[s] for s in v)) for k, v in example.inputs.items()}
    exact = {k: sympy.nsimplify(v) if isinstance(v, float) else v for k, v in options.items()}
    pairs = zip(
        _flat(example.before(*inputs.values(), **exact)),
        _flat(example.after(*inputs.values(), **exact)),
        strict=True,
    )
    return all(
        sympy.simplify(a - b) == 0
        for left, right in pairs
        for a, b in zip(left.values.flat, right.values.flat, strict=True)
    )


def _flat(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
