"""Streams whose rows have no mean: where one feature of them is redundant, and all that its removal touches.

A *stream* is everything tied to the feature axis of one bare RMSNorm: its input and its result, and, through
operators that carry the features, every value up to what writes them and down to what reads them. Its rows
sum to zero when all that writes it does: a linear layer, a table or a weight with the mean taken out, a mean
subtracted at run time, a LayerNorm without weights. Operators that carry the features commute with every
matrix on them, so with Π = I − 11ᵀ/d too, and RMSNorm scales a row by one number: Πx = x holds throughout.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.alias import Aliases, aliases
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.norms import Norm, as_norm
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.stream import Axis, carry, feature_axis_of_user, rank, readers
from sparsecc.passes.analysis.weights import WeightValues, other_users, weight_values
from sparsecc.passes.base import Analyses, nbytes
from sparsecc.program import WEIGHT, Program, is_shape_query, reads_shape_only, target_name

aten = torch.ops.aten

Problem = tuple[str, str, fx.Node]

# Of several reasons the most telling one is reported.
_TELLING = (
    "symbolic-features",
    "not-recentred",
    "affine",
    "eps",
    "stream-exit",
    "mutated",
    "operator",
    "not-centred",
    "region",
    "tied",
)
_AFFINE = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


@dataclass
class Stream:
    """One stream of ``size`` features.

    Attributes:
        first: the first of its norms in the graph.
        values: every value of it and its feature axis, in the order of the graph. Those in ``linears`` are
            written by a linear layer, in ``tables`` by an embedding, in ``cut`` by something that stays as
            wide as it is (a weight, a subtraction); the rest are norms and operators that carry.
        readers: the linear layers that contract its features; one may write the stream, too.
        refused: (code, words, node to blame) when a feature of it cannot be left out.
    """

    first: fx.Node
    size: int
    values: dict[fx.Node, Axis] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)
    linears: dict[fx.Node, Linear] = field(default_factory=dict)
    tables: list[fx.Node] = field(default_factory=list)
    cut: list[fx.Node] = field(default_factory=list)
    readers: dict[fx.Node, Linear] = field(default_factory=dict)
    refused: Problem | None = None


def centred_streams(program: Program, analyses: Analyses) -> list[Stream]:
    """Every stream with a norm in it; a norm with a mean to take out, or with weights, stands alone."""
    found: list[Stream] = []
    seen: set[fx.Node] = set()
    claimed: dict[fx.Node, Axis] = {}
    for node in program.calls(aten.layer_norm.default, aten.rms_norm.default):
        if node in seen:
            continue
        stream = _Finder(program, analyses, node).stream
        seen.update(stream.norms)
        twice = next((v for v, a in stream.values.items() if claimed.get(v, a) != a), None)
        if stream.refused is None and twice is not None:
            words = f"two axes of {twice.name} are features of streams"
            stream.refused = ("operator", words, twice)
        if stream.refused is None:
            claimed.update(stream.values)
        found.append(stream)
    return found


def subtracts_mean(node: fx.Node, axis: Axis, alias: Aliases) -> bool:
    """Whether ``node`` is ``v - v.mean(axis, keepdim=True)``, of a ``v`` that is not written between."""
    if node.target is not aten.sub.Tensor or node.kwargs:
        return False
    value, mean = node.args[:2]
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim or mean.kwargs:
        return False
    if not isinstance(value, fx.Node) or mean.args[0] is not value or alias.written(value):
        return False
    _, dims, keepdim = (*mean.args, False)[:3]
    return bool(keepdim) and [d % rank(value) for d in dims] == [axis]  # type: ignore[union-attr, operator]


class _Finder:
    def __init__(self, program: Program, analyses: Analyses, first: fx.Node) -> None:
        self.weights: WeightValues = analyses.get(weight_values)
        self.linears = analyses.get(linears)
        self.alias = analyses.get(aliases)
        self.modes = analyses.get(modes)
        self.counted = program.trains  # gradients of a table may be scaled by frequency
        self.problems: list[Problem] = []
        self.queue: deque[tuple[fx.Node, Axis]] = deque()
        features = first.meta["val"].shape[-1]
        self.stream = Stream(first, features if isinstance(features, int) else 0)
        if not isinstance(features, int):
            self._problem("symbolic-features", "the feature axis has a symbolic size", first)
        elif features < 2:
            self._problem("operator", "a single feature without a mean is zero", first)
        elif self._is_norm(first):
            self._visit(first)
        if not self.problems:
            self._ties()
        self._settle(program)

    def _settle(self, program: Program) -> None:
        stream = self.stream
        if self.problems:
            stream.refused = min(self.problems, key=lambda p: _TELLING.index(p[0]))
        position = {node: i for i, node in enumerate(program.graph.nodes)}
        stream.values = dict(sorted(stream.values.items(), key=lambda v: position[v[0]]))
        stream.norms.sort(key=position.__getitem__)

    def _problem(self, code: str, words: str, node: fx.Node) -> None:
        self.problems.append((code, words, node))

    def _visit(self, first: fx.Node) -> None:
        self.queue.append((first, rank(first) - 1))
        while self.queue:
            node, axis = self.queue.popleft()
            if node in self.stream.values:
                if self.stream.values[node] != axis:
                    words = f"two axes of {node.name} are features of the stream"
                    self._problem("operator", words, node)
                continue
            self.stream.values[node] = axis
            if self.alias.written(node):
                self._problem("mutated", f"the stream is written in place ({node.name})", node)
            self._same_mode(node)
            self._writer(node, axis)
            # A weight that stays as wide as it is keeps its other readers; a value is copied once for all.
            if node not in self.stream.cut or node not in self.weights:
                for user in node.users:
                    self._shape_reader(user, node, axis)
                for user in readers(node):
                    self._reader(user, node, axis)

    def _same_mode(self, node: fx.Node) -> None:
        """Weights stand before every region; all else runs as the norm does."""
        if node not in self.weights and self.modes[node] != self.modes[self.stream.first]:
            words = "an autocast or grad-mode region begins or ends on the stream"
            self._problem("region", words, node)

    # ---- upstream ----------------------------------------------------------------------------------

    def _writer(self, node: fx.Node, axis: Axis) -> None:
        """What writes the value: operands that it carries, or something whose mean is known to be out."""
        norm = as_norm(node)
        if norm is not None and axis == rank(node) - 1:
            if norm.kind == "rms_norm" and self._is_norm(node):
                self.stream.norms.append(node)
                self.queue.append((norm.x, axis))
            elif norm.kind == "layer_norm" and norm.weight is None and norm.bias is None:
                self.stream.cut.append(node)
            else:
                self._problem("affine", "a norm with weights writes the stream", node)
            return
        if subtracts_mean(node, axis, self.alias):
            self.stream.cut.append(node)
        elif node in self.linears:
            self._linear(self.linears[node], axis)
        elif node.target is aten.embedding.default:
            self._table(node, axis)
        elif node in self.weights and (node.meta.get(WEIGHT) or carry(node, axis) is None):
            self._needs(self._centred(node, axis), node)
            self.stream.cut.append(node)
        else:
            carried = carry(node, axis)
            self._needs(carried is not None, node)
            self.queue.extend(carried.operands if carried is not None else ())

    def _linear(self, linear: Linear, axis: Axis) -> None:
        features = 1 if linear.is_conv else rank(linear.node) - 1
        weight = not linear.is_grouped and self._centred(linear.weight, linear.out_axis)
        bias = linear.bias is None or self._centred(linear.bias, 0)
        self._needs(axis == features and weight and bias, linear.node)
        self.stream.linears[linear.node] = linear

    def _table(self, node: fx.Node, axis: Axis) -> None:
        table: Any = node.args[0]
        counted = self.counted and any(node.args[3:5])
        found = axis == rank(node) - 1 and not counted and table in self.weights
        self._needs(found and self._centred(table, 1), node)
        self.stream.tables.append(node)

    def _centred(self, node: fx.Node, axis: Axis) -> bool:
        """Whether a weight has its mean over ``axis`` taken out, up to one rounding."""
        if subtracts_mean(node, axis, self.alias):
            return True
        carried = carry(node, axis) if node in self.weights else None
        return carried is not None and all(self._centred(v, a) for v, a in carried.operands)

    def _needs(self, centred: bool, node: fx.Node) -> None:
        if not centred:
            words = f"{target_name(node)} writes the stream, and its rows may have a mean"
            self._problem("not-centred", words, node)

    # ---- downstream --------------------------------------------------------------------------------

    def _shape_reader(self, user: fx.Node, node: fx.Node, axis: Axis) -> None:
        """Values that are as wide as ``node`` without being computed from it."""
        if user.target is aten.zeros_like.default:
            self.queue.append((user, axis))
        elif is_shape_query(user):
            name = user.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
            dims = user.args[1:2]
            other = name == "sym_size" and dims and dims[0] % rank(node) != axis  # type: ignore[operator]
            if not (other or name.startswith("new_")):
                self._problem("operator", f"{target_name(user)} reads the stream's width", user)
        elif reads_shape_only(user, node):
            self.queue.append((user, axis))

    def _reader(self, user: fx.Node, node: fx.Node, axis: Axis) -> None:
        if user.op == "output":
            self._problem("stream-exit", "the caller gets the stream or a norm of it", user)
            return
        if is_shape_query(user) or reads_shape_only(user, node):
            return
        if user.target is aten.type_as.default and user.args[0] is not node:
            return
        linear = self.linears.get(user)
        contracted = 1 if linear is not None and linear.is_conv else rank(node) - 1
        reads = linear is not None and linear.x is node and not linear.is_grouped
        if linear is not None and reads and axis == contracted:
            self.stream.readers[user] = linear
            self._same_mode(user)
            return
        norm = as_norm(user)
        if norm is not None and norm.x is node and axis == rank(node) - 1:
            if self._is_norm(user):
                self.queue.append((user, axis))
            return
        onward = feature_axis_of_user(user, node, axis)
        if onward is not None:
            self.queue.append((user, onward[0]))
        elif user.target in _AFFINE and any(self._is_vector(a) for a in user.args):
            self._problem("affine", "a vector over the features is applied to the stream", user)
        else:
            words = f"{target_name(user)} reads the stream and needs every feature of it"
            self._problem("operator", words, user)

    def _is_vector(self, value: object) -> bool:
        return self.weights.is_vector(value, self.stream.size)

    def _is_norm(self, node: fx.Node) -> bool:
        """Whether ``node`` is a norm that can be rewritten; notes why not."""
        norm: Norm | None = as_norm(node)
        if norm is None:
            self._problem("operator", "the norm is over more than the features", node)
        elif norm.kind == "layer_norm":
            words = "a LayerNorm takes the mean out itself; layernorm-to-rmsnorm moves it upstream"
            self._problem("not-recentred", words, node)
        elif norm.weight is not None:
            words = "the norm has a weight; fold-norm-affine folds it into what reads the norm"
            self._problem("affine", words, node)
        elif norm.eps is None:
            self._problem("eps", "the norm's ε is that of its dtype, not a number", node)
        else:
            return True
        return False

    # ---- copies of weights -------------------------------------------------------------------------

    def _ties(self) -> None:
        """A weight that others read, too, would have to be kept beside its narrower copy."""
        for linear in self.stream.readers.values():
            weight = linear.weight
            if weight.meta.get(WEIGHT):  # a copy already, which nobody else needs
                users = list(weight.users)
            else:
                users = other_users(weight, linear.node, self.weights)
            strangers = [u for u in users if u not in self.stream.readers]
            if strangers:
                words = (
                    f"the weight of {linear.node.name} is also read by {strangers[0].name}; leaving out a "
                    f"feature would keep a second copy of {nbytes(weight) / 2**20:.1f} MiB"
                )
                self._problem("tied", words, linear.node)
