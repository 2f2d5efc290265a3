"""Which values depend on weights alone, and may therefore be folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_shape, same_size
from sparsecc.passes.analysis.stream import is_tensor
from sparsecc.passes.base import Analyses
from sparsecc.program import WEIGHT, Program, Role


@dataclass(frozen=True)
class WeightValues:
    """Nodes computed from parameters and buffers alone, by pure deterministic operators.

    In training not under ``no_grad``: a fold over such a value would stand in its region, and lose the
    gradients of the other weights.

    ``sources`` maps each such node to the placeholders it reads. Weights that the program itself writes
    (BatchNorm statistics in training, KV caches kept as buffers) are not among them.
    """

    sources: dict[fx.Node, frozenset[fx.Node]]

    def __contains__(self, node: object) -> bool:
        return node in self.sources

    def is_vector(self, node: object, size: int) -> bool:
        """Whether ``node`` is a weight of shape [size], or of leading ones and then [size]."""
        if not isinstance(node, fx.Node) or node not in self.sources:
            return False
        shape = node.meta["val"].shape
        return len(shape) >= 1 and same_shape(shape, [1] * (len(shape) - 1) + [size])


def weight_values(program: Program, analyses: Analyses) -> WeightValues:
    alias = analyses.get(aliases)
    mode = analyses.get(modes)
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in program.graph.nodes:
        slot = program.slot(node)
        if slot is not None:
            if slot.role in (Role.PARAMETER, Role.BUFFER) and not alias.written(node):
                sources[node] = frozenset({node})
            continue
        if node.op == "get_attr" and node.meta.get(WEIGHT):  # a recipe's constant
            sources[node] = frozenset()
            continue
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if program.trains and not mode[node][0]:
            continue
        inputs = node.all_input_nodes
        if (
            inputs
            and all(a in sources for a in inputs)
            and is_pure(node)
            and not alias.written(node)
        ):
            sources[node] = frozenset().union(*(sources[a] for a in inputs))
    return WeightValues(sources)


def is_pure(node: fx.Node) -> bool:
    """A deterministic operator of ATen or ours without side effects."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and target.namespace in ("aten", "sparsecc")
    )


def other_users(weight: fx.Node, user: fx.Node, weights: WeightValues) -> list[fx.Node]:
    """Who reads the matrices behind ``weight`` besides ``user``, seen through weight expressions.

    A vector that was computed from a matrix (its ranges, say) is not that matrix: a weight that is scaled by
    it shares nothing with the matrix.
    """
    found: dict[fx.Node, None] = {}
    stack = _matrices(weight, weights) or [weight]
    seen = set(stack)
    while stack:
        for reader in stack.pop().users:
            if reader in weights:
                if reader not in seen and reader.meta["val"].dim() > 1:
                    seen.add(reader)
                    stack.append(reader)
            elif reader is not user:
                found[reader] = None
    return list(found)


def only_axis(vector: fx.Node, rank: int) -> int | None:
    """The axis of a rank-``rank`` value along which ``vector`` varies, if it is exactly one."""
    shape = vector.meta["val"].shape
    wide = [i for i, s in enumerate(shape) if s != 1]
    if len(wide) != 1 or len(shape) > rank:
        return None
    return wide[0] + rank - len(shape)


def axis_along(vector: Any, value: Any, result: fx.Node, weights: WeightValues) -> int | None:
    """The axis of ``value`` along which ``result`` combines it with the weight ``vector``, one of each feature.

    None where ``vector`` is no such weight, or ``value`` is one too, or has another shape than ``result``.
    """
    if not is_tensor(value) or value in weights or vector not in weights:
        return None
    shape = result.meta["val"].shape
    axis = only_axis(vector, len(shape))
    if axis is None or not same_size(vector.meta["val"].shape.numel(), shape[axis]):
        return None
    return axis if same_shape(value.meta["val"].shape, shape) else None


def _matrices(weight: fx.Node, weights: WeightValues) -> list[fx.Node]:
    """The parameters and buffers of rank above one that ``weight`` is computed from, vectors aside."""
    found: dict[fx.Node, None] = {}
    stack, seen = [weight], {weight}
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            found[node] = None
        for source in node.all_input_nodes:
            if source in weights and source not in seen and source.meta["val"].dim() > 1:
                seen.add(source)
                stack.append(source)
    return [source for source in found if source.meta["val"].dim() > 1]
