"""Sums with signs and scales, seen as one: ``a − s ⊙ (b + 2c)`` has the terms a, b and c, with their factors.

A scale is a number, or a weight along one axis. All operators of a sum have one shape, one dtype, and one
autocast and grad mode; nothing else reads the inner ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.analysis.stream import is_number, is_tensor
from sparsecc.passes.analysis.weights import WeightValues, axis_along, weight_values
from sparsecc.passes.base import Analyses
from sparsecc.program import MOVED, Program

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_OPERATORS = (*_SUMS, aten.neg.default, aten.mul.Tensor)

Factor = fx.Node | float
Operands = Mapping[int, Factor]  # which arguments an operator adds up, each times what


@dataclass(frozen=True)
class Term:
    """Argument ``index`` of ``user``, which the sum holds times all ``factors``."""

    user: fx.Node
    index: int
    factors: tuple[Factor, ...]

    @property
    def value(self) -> fx.Node:
        value = self.user.args[self.index]
        assert isinstance(value, fx.Node)
        return value


@dataclass
class Sum:
    """The terms of ``root``.

    ``operators`` are its operators, inner ones first and ``root`` last, each with the place where it is a term.
    """

    root: fx.Node
    terms: list[Term]
    operators: list[tuple[fx.Node, Term | None]]
    operands: Mapping[fx.Node, Operands]

    def without(
        self, taken: Iterable[Term], program: Program, origin: str, moved: str
    ) -> fx.Node | None:
        """The sum of the other terms, None where there are none; ``moved`` says where the taken ones are.

        It may be the root. Where it is not, the root is for the caller to replace.
        """
        gone = {(term.user, term.index) for term in taken}
        kept: fx.Node | None = None
        for node, place in self.operators:
            operands = self.operands[node]
            left = [index for index in operands if (node, index) not in gone]
            kept = node if left else None
            if len(left) == len(operands):
                node.meta[MOVED] = moved
            elif left:
                kept = _scaled(program, node, left[0], operands[left[0]], origin)
            if place is not None and kept is None:
                gone.add((place.user, place.index))
            elif place is not None and kept is not node:
                program.replace(node, kept)  # type: ignore[arg-type]
        return kept


def sums(program: Program, analyses: Analyses) -> list[Sum]:
    """Every sum that is not part of a larger one."""
    weights, mode = analyses.get(weight_values), analyses.get(modes)
    found = {node: _operands(node, weights) for node in program.calls(*_OPERATORS)}
    operands = {node: indices for node, indices in found.items() if indices}
    inner = {node for node in operands if _is_inner(node, operands, mode)}
    return [_sum(node, operands, inner) for node in operands if node not in inner]


def _sum(root: fx.Node, operands: Mapping[fx.Node, Operands], inner: set[fx.Node]) -> Sum:
    terms: list[Term] = []
    operators: list[tuple[fx.Node, Term | None]] = [(root, None)]
    for node, place in operators:
        above = place.factors if place else ()
        for index, factor in operands[node].items():
            term = Term(node, index, above if factor == 1 else (*above, factor))
            if term.value in inner:
                operators.append((term.value, term))
            else:
                terms.append(term)
    return Sum(root, terms, operators[::-1], operands)


def _operands(node: fx.Node, weights: WeightValues) -> Operands:
    """Which arguments ``node`` adds up, each with its factor; none where it computes something else."""
    if node.target is aten.neg.default:
        return {0: -1}
    if len(node.args) != 2:
        return {}
    a, b = node.args
    if node.target is aten.mul.Tensor:
        for index, value, factor in ((0, a, b), (1, b, a)):
            number = is_number(factor) and is_tensor(value)
            if number or axis_along(factor, value, node, weights) is not None:
                return {index: factor}  # type: ignore[dict-item]
        return {}
    second: Any = node.kwargs.get("alpha", 1)
    shape = node.meta["val"].shape
    same = all(
        # sum() begins with a zero.
        same_shape(x.meta["val"].shape, shape) if is_tensor(x) else is_number(x) and x == 0  # type: ignore[union-attr]
        for x in (a, b)
    )
    if not same or not is_number(second):
        return {}
    factors = (1, -second if node.target is aten.sub.Tensor else second)
    return {i: factor for i, factor in enumerate(factors) if is_tensor(node.args[i])}


def _is_inner(
    node: fx.Node, operands: Mapping[fx.Node, Operands], mode: Mapping[fx.Node, Any]
) -> bool:
    """Whether one operator of a sum alone reads ``node``, once, and in its dtype and mode."""
    user = next(iter(node.users), node)
    if user not in operands or len(node.users) != 1:
        return False
    once = [user.args[index] for index in operands[user]].count(node) == 1
    return once and node.meta["val"].dtype == user.meta["val"].dtype and mode[node] == mode[user]


def _scaled(program: Program, node: fx.Node, index: int, factor: Factor, origin: str) -> fx.Node:
    """What is left of the sum ``node`` with one argument: that times its factor, in the dtype of the sum."""
    place: Any = {"like": node, "origin": origin, "before": node}
    source: Any = node.args[index]
    value = program.cast(source, node.meta["val"].dtype, **place)
    if factor == 1:
        return value
    if factor == -1:
        return program.call(aten.neg.default, (value,), **place)
    return program.call(aten.mul.Tensor, (value, factor), **place)
