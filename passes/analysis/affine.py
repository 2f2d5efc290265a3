"""The affine tail of a norm, and everything that reads it.

``y = a ⊙ norm(x) + c``: the weight and bias inside the operator, then any chain of multiplications by and
additions of weights or constants, through casts. This is where γ, β, Gemma's ``1 + w`` and LayerNorm
Scaling's constant are found, in whatever spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.convolutions import taps
from sparsecc.passes.analysis.linear import Linear, every_linear, is_given
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.analysis.stream import feature_axis_of_user, is_number, is_tensor, readers
from sparsecc.passes.analysis.weights import WeightValues, other_users, weight_values
from sparsecc.passes.base import Context, Refusal, nbytes
from sparsecc.program import WeightBuilder, is_shape_query, target_name

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout)


@dataclass
class Step:
    """One node of the tail: "mul", "div" or "add" by ``operand`` (a weight node or a number), or "cast"."""

    kind: str
    node: fx.Node
    operand: Any = None


@dataclass
class Tail:
    """The steps after a norm, in order; ``end`` is the value that the rest of the program reads."""

    end: fx.Node
    steps: list[Step] = field(default_factory=list)

    @property
    def folds(self) -> list[Step]:
        return [s for s in self.steps if s.kind != "cast"]

    def affine(
        self, build: WeightBuilder, scale: fx.Node | None = None, shift: fx.Node | None = None
    ) -> tuple[fx.Node | float | None, fx.Node | None]:
        """(a, c) of ``a ⊙ x + c``, what comes first being ``scale ⊙ x + shift``; [d] in fp32 or wider."""
        a: Any = None if scale is None else vector(build, scale)
        c = None if shift is None else vector(build, shift)
        for step in self.folds:
            operand: Any = step.operand
            operand = vector(build, operand) if isinstance(operand, fx.Node) else operand
            if step.kind == "add":
                c = operand if c is None else build.add(c, operand)
                continue
            if step.kind == "div":
                operand = build.call(aten.reciprocal.default, operand)
            if a is None:
                a = operand
            elif isinstance(a, fx.Node):
                a = build.mul(a, operand)
            else:
                a = build.mul(operand, a) if isinstance(operand, fx.Node) else a * operand
            c = None if c is None else build.mul(c, operand)
        return a, c


def vector(build: WeightBuilder, node: fx.Node) -> fx.Node:
    """A weight of shape [d], or of leading ones and [d], as [d] in fp32 or wider."""
    wide = build.wide(node)
    return wide if wide.meta["val"].dim() == 1 else build.call(aten.reshape.default, wide, [-1])


def affine_tail(value: fx.Node, size: Any, weights: WeightValues) -> Tail:
    """Follow the only user of each value while it is affine in the last axis, of ``size`` features."""
    tail = Tail(value)
    kept: list[Step] = []
    current = value
    while len(current.users) == 1:
        step = affine_step(next(iter(current.users)), current, size, weights)
        if step is None:
            break
        kept.append(step)
        current = step.node
        if step.kind != "cast":  # a tail never ends in a cast: it stays for the readers
            tail.steps, tail.end = list(kept), current
    return tail


def affine_step(user: fx.Node, value: fx.Node, size: Any, weights: WeightValues) -> Step | None:
    """``user`` as one step after ``value``: a cast, or arithmetic with a weight [size] or a number."""
    if user.op != "call_function" or not (is_tensor(user) and is_tensor(value)):
        return None
    if user.target in _CASTS and user.args[0] is value:
        return Step("cast", user) if user.meta["val"].dtype.is_floating_point else None
    kinds: dict[Any, str] = {
        aten.mul.Tensor: "mul",
        aten.mul.Scalar: "mul",
        aten.add.Tensor: "add",
        aten.add.Scalar: "add",
        aten.div.Tensor: "div",
        aten.div.Scalar: "div",
    }
    kind = kinds.get(user.target)
    if kind is None or user.kwargs or len(user.args) != 2:
        return None
    a, b = user.args
    if a is not value and (b is not value or kind == "div"):
        return None
    other = b if a is value else a
    if not same_shape(user.meta["val"].shape, value.meta["val"].shape):
        return None
    if is_number(other):
        # a constant added to every feature is not a weight; leave it alone
        return None if kind == "add" else Step("mul", user, 1 / other if kind == "div" else other)
    if other is value or not weights.is_vector(other, size):
        return None
    return Step(kind, user, other)


# Why an affine map cannot move into what reads its result; the codes of :meth:`Readers.refusal`.
UNREADABLE: Mapping[str, str] = {
    "reader": "something other than a linear layer or convolution over the features reads it",
    "output": "the model returns it",
    "tied": "a reader's weight is shared with another node",
    "region": "an autocast or grad-mode region begins or ends between it and a reader",
    "given": "a recipe gives the codes of a reader's weight, which stays as it is",
}


@dataclass
class Readers:
    """Who reads a value: linear maps (possibly after reindexing), and the first node that is neither.

    ``padded`` are convolutions that pad what they read with zeros: a shift does not reach their border.
    """

    linears: list[Linear] = field(default_factory=list)
    padded: list[Linear] = field(default_factory=list)
    other: fx.Node | None = None

    @property
    def all(self) -> list[Linear]:
        return list(dict.fromkeys([*self.linears, *self.padded]))

    def refusal(self, node: fx.Node, context: Context, *, untie: bool = False) -> Refusal | None:
        """Why what ``node`` does cannot move into them (codes of ``UNREADABLE``); None where it can."""
        if self.other is not None and self.other.op == "output":
            return Refusal.at(node, "output", f"the model returns {node.name}")
        if self.other is not None:
            linear = context.analyses.get(every_linear).get(self.other)
            if linear is not None and is_given(linear, context.program, context.analyses):
                return Refusal.at(self.other, "given", f"{UNREADABLE['given']}: {self.other.name}")
            words = f"{target_name(self.other)} reads {node.name}, not a linear layer"
            return Refusal.at(self.other, "reader", words)
        if not self.all:
            return Refusal.at(node, "reader", "no linear layer reads it")
        weights, mode = context.analyses.get(weight_values), context.analyses.get(modes)
        ours = {linear.node for linear in self.all}
        for linear in self.all:
            shared = other_users(linear.weight, linear.node, weights)
            stranger = next((u for u in shared if u not in ours), None)
            if stranger is not None and not untie:
                words = (
                    f"the weight of {linear.node.name} is also read by {stranger.name}; folding would "
                    f"keep a second copy of {nbytes(linear.weight) / 2**20:.1f} MiB"
                )
                return Refusal.at(linear.node, "tied", words)
            if mode[linear.node] != mode[node]:
                return Refusal.at(linear.node, "region", UNREADABLE["region"])
        return None


def linear_readers(
    value: fx.Node, axis: int, linears: dict[fx.Node, Linear], *, padded: bool = False
) -> Readers:
    """Follow ``value`` through operators that only reindex, to the linear maps that contract its features.

    Convolutions that pad with zeros are among them only with ``padded``.
    """
    found = Readers()
    stack = [(value, axis)]
    while stack:
        node, at = stack.pop()
        for user in readers(node):
            if is_shape_query(user):
                continue
            linear = linears.get(user)
            if linear is not None and linear.x is node and _contracts(linear, at):
                where = taps(linear)
                if where is None or not where.is_padded:
                    found.linears.append(linear)
                    continue
                if padded:
                    found.padded.append(linear)
                    continue
            onward = feature_axis_of_user(user, node, at)
            if onward is not None and onward[1].reindexes and len(onward[1].operands) == 1:
                stack.append((user, onward[0]))
            else:
                found.other = user
                return found
    return found


def _contracts(linear: Linear, axis: int) -> bool:
    """Whether it contracts ``axis`` of what it reads, alike at every position."""
    if linear.is_conv:
        return axis == 1 and taps(linear) is not None
    return bool(axis == linear.x.meta["val"].dim() - 1)
