"""The channels of one producer, followed forwards to what reads them.

Each channel is followed on its own: where an operator cannot carry it, it is struck out with a reason, and the
others go on. A channel that was struck out has scale one and shift zero everywhere, so it harms nobody.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.affine import Tail
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.channels import FREE, Channels
from sparsecc.passes.analysis.ffn import ACTIVATIONS
from sparsecc.passes.analysis.homogeneity import step
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.norms import Norm
from sparsecc.passes.analysis.pairs import Pairs
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.weights import WeightValues, other_users, weight_values
from sparsecc.passes.base import Analyses, Refusal
from sparsecc.program import Program, reads_shape_only, target_name

aten = torch.ops.aten

_PRODUCTS = (aten.mul.Tensor,)
_JOINS = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.stack.default,
    aten.where.self,
)

# Why a value's channels may not be scaled.
UNSCALABLE: Mapping[str, str] = {
    "output": "the model returns the value",
    "activation": "an activation in the way does not carry a scale (GELU, SiLU, sigmoid, …)",
    "reader": "something reads the value that neither carries its channels nor is a linear layer over them",
    "mixed": "the value is joined with one that is not scaled alike",
    "no-reader": "no linear layer reads the value",
    "written": "the value is written in place",
    "not-a-weight": "the norm's scale or shift is not a weight, or the program writes it",
    "tied": "a weight is shared with another node",
    "region": "an autocast or grad-mode region begins or ends between producer and reader",
    "layout": "the channels are read in an order that has no short form",
}
# Why a scale passes and a shift does not.
UNSHIFTABLE: Mapping[str, str] = {
    "shift": "an operator in the way carries a scale but no shift (ReLU, a product, a sum, zero padding)",
    "padding": "the reader pads with zeros, or is a transposed convolution: its border would differ",
    "no-bias": "nothing is added after the norm's last factor that could take the shift",
    "cancels": "q and k are shifted to no effect that could be undone",
}


@dataclass(frozen=True)
class Side:
    """One end of a link: a linear layer, or a norm with its affine tail.

    ``channels`` names the link's channel of every row (of a producer, and of q) or column (of a reader), or
    ``FREE`` where the row or column is left alone.
    """

    of: Linear | Norm
    channels: tuple[int, ...]
    tail: Tail | None = None

    @property
    def node(self) -> fx.Node:
        return self.of.node


class Facts:
    """What every walk asks of the program."""

    def __init__(self, program: Program, analyses: Analyses) -> None:
        self.nodes = list(program.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.maps: dict[fx.Node, Linear] = analyses.get(linears)
        self.weights: WeightValues = analyses.get(weight_values)
        self.alias = analyses.get(aliases)
        self.mode = analyses.get(modes)

    def shares(self, linear: Linear) -> Refusal | None:
        """A refusal where another node reads the matrix of ``linear`` too."""
        if other_users(linear.weight, linear.node, self.weights):
            reason = f"the weight of {linear.node.name} is shared"
            return Refusal.at(linear.node, "tied", reason)
        return None


@dataclass
class Score:
    """A read of q or k by the node that contracts them."""

    role: str
    node: fx.Node
    channels: Channels
    walk: Walk


@dataclass
class Walk:
    """The channels of one producer, followed to whatever reads them.

    Attributes:
        same: channels that must share one scale, by what ties them on the way.
        dead: channels that may be neither scaled nor shifted, with the first reason.
        unshifted: channels that may not be shifted, with the first reason.
        columns: the linear layers that read channels, with the channel of each column.
        scores: the reads as q or k.
        known: the values that hold channels; ``through``: what each has passed.
        roles: how the channels of a set (by its representative in ``same``) are read.
    """

    facts: Facts
    index: int
    side: Side
    same: Pairs[int] = field(default_factory=Pairs)
    dead: dict[int, Refusal] = field(default_factory=dict)
    unshifted: dict[int, Refusal] = field(default_factory=dict)
    columns: list[tuple[Linear, tuple[int, ...]]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    known: dict[fx.Node, Channels] = field(default_factory=dict)
    through: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    roles: dict[int, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start = self.node if self.side.tail is None else self.side.tail.end
        axis = self.side.of.feature_axis if isinstance(self.side.of, Linear) else -1
        rank = start.meta["val"].dim()
        self._queue: list[int] = []
        self._hold(start, Channels.along(rank, axis % rank, len(self.side.channels)), frozenset())
        refusal = self._producer_refusal()
        if refusal is not None:
            self._kill(self.side.channels, refusal)
            return
        done: set[int] = set()
        while self._queue:
            place = heapq.heappop(self._queue)
            if place not in done:  # in graph order: all operands are known
                done.add(place)
                self._visit(self.facts.nodes[place])
        self._settle()

    @property
    def node(self) -> fx.Node:
        return self.side.node

    def _producer_refusal(self) -> Refusal | None:
        of = self.side.of
        if isinstance(of, Linear):
            return self.facts.shares(of)
        for vector in (of.weight, of.bias):
            if vector is not None and not self.facts.weights.is_vector(vector, of.size):
                reason = f"{vector.name} is not a weight of shape [{of.size}]"
                return Refusal.at(vector, "not-a-weight", reason)
        assert self.side.tail is not None
        for tail in self.side.tail.steps:
            if self.facts.mode[tail.node] != self.facts.mode[of.node]:
                return Refusal.at(tail.node, "region", UNSCALABLE["region"])
        return None

    def _hold(self, node: fx.Node, channels: Channels, through: frozenset[str]) -> None:
        self.known[node], self.through[node] = channels, through
        if self.facts.alias.written(node):
            (writer, *_) = self.facts.alias.writes(node)
            reason = f"{writer.name} writes the value in place"
            self._kill(channels.labels, Refusal.at(writer, "written", reason))
        for user in node.users:
            heapq.heappush(self._queue, self.facts.order[user])

    def _visit(self, user: fx.Node) -> None:
        live = {
            a: self.known[a]
            for a in user.all_input_nodes
            if a in self.known and not _reads_the_shape(user, a) and self._lives(self.known[a])
        }
        if not live:
            return
        if user.op == "output":
            reason = "the model returns the value"
            self._lose(live, Refusal.at(next(iter(live)), "output", reason))
            return
        linear = self.facts.maps.get(user)
        if linear is not None and list(live) == [linear.x]:
            self._consume(linear, live[linear.x])
            return
        if len(live) > 1 and user.target in _PRODUCTS:
            live = self._one_factor(user, live)
        found = step(user, live)
        self._lose({a: live[a] for a in found.lost}, blame(user))
        for a, b in found.tied:
            if FREE in (a, b):
                self._kill((a, b), blame(user))
            else:
                self.same.join(a, b)
        if not found.shift:
            self._keep_unshifted(live, user)
        for role, operand, channels in found.scores:
            self.scores.append(Score(role, user, channels, self))
            self._keep_unshifted({operand: live[operand]}, user)
        if found.channels is not None:
            through = {found.through} - {""}
            if found.through == "product" and all(
                a in live or a in self.facts.weights for a in user.all_input_nodes
            ):
                through = set()  # a factor that is a weight makes no second branch
            behind = [self.through[a] for a in live if a not in found.lost]
            self._hold(user, found.channels, frozenset(through).union(*behind))

    def _one_factor(self, user: fx.Node, live: dict[fx.Node, Channels]) -> dict[fx.Node, Channels]:
        """Of two factors with channels, the one behind an activation is the gate, and stays."""
        gates = [a for a in live if "activation" in self.through[a]]
        if len(gates) != 1:
            return live
        self._lose({gates[0]: live[gates[0]]}, blame(user))
        left = {a: c for a, c in live.items() if a is not gates[0] and self._lives(c)}
        return left or live

    def _consume(self, linear: Linear, channels: Channels) -> None:
        rank = channels.rank
        axis = linear.feature_axis % rank
        size = linear.x.meta["val"].shape[axis]
        elsewhere = [a for a in channels.varying if a != axis]
        if elsewhere or not isinstance(size, int):
            self._kill(channels.labels, blame(linear.node))
            return
        labels = channels.labels if channels.varies(axis) else channels.labels * size
        if self.facts.mode[linear.node] != self.facts.mode[self.node]:
            self._kill(labels, Refusal.at(linear.node, "region", UNSCALABLE["region"]))
        shared = self.facts.shares(linear)
        if shared is not None:
            self._kill(labels, shared)
        if linear.is_conv and (linear.is_transposed or _pads(linear.node)):
            words = UNSHIFTABLE["padding"]
            for label in labels:
                self.unshifted.setdefault(label, Refusal.at(linear.node, "padding", words))
        self.columns.append((linear, labels))

    def _lives(self, channels: Channels) -> bool:
        return any(c != FREE and c not in self.dead for c in channels.labels)

    def _kill(self, labels: Iterable[int], refusal: Refusal) -> None:
        for label in labels:
            if label != FREE:
                self.dead.setdefault(label, refusal)

    def _lose(self, values: Mapping[fx.Node, Channels], refusal: Refusal) -> None:
        for channels in values.values():
            self._kill(channels.labels, refusal)

    def _keep_unshifted(self, values: Mapping[fx.Node, Channels], user: fx.Node) -> None:
        reason = f"{target_name(user)} carries no shift"
        refusal = Refusal.at(user, "shift", reason)
        for channels in values.values():
            for label in channels.labels:
                self.unshifted.setdefault(label, refusal)

    def _settle(self) -> None:
        """A channel that is read both by columns and as q or k, or as both of these, serves neither."""
        roles: dict[int, set[str]] = defaultdict(set)
        reader: dict[int, fx.Node] = {}
        for _, labels in self.columns:
            for label in labels:
                roles[self.same.find(label)].add("columns")
        for score in self.scores:
            for label in score.channels.labels:
                roles[self.same.find(label)].add(score.role)
                reader[self.same.find(label)] = score.node
        for root, members in self.same.sets(self.side.channels).items():
            refusal = next((self.dead[m] for m in members if m in self.dead), None)
            if refusal is None and len(roles[root]) > 1:
                refusal = blame(reader[root])
            if refusal is not None:
                self._kill(members, refusal)
            self.roles[root] = roles[root]

    def alive(self, label: int, role: str) -> bool:
        """Whether a channel may be scaled, and is read as "columns", "q" or "k"."""
        root = self.same.find(label)
        return label != FREE and label not in self.dead and role in self.roles.get(root, ())


def blame(user: fx.Node) -> Refusal:
    """The refusal of a reader that does not carry the channels."""
    name = target_name(user)
    if user.target in ACTIVATIONS:
        return Refusal.at(user, "activation", f"{name} does not carry a scale")
    if user.target in _JOINS:
        return Refusal.at(
            user, "mixed", f"{name} joins the value with one that is not scaled alike"
        )
    return Refusal.at(user, "reader", f"{name} reads the value and carries no scale")


def _reads_the_shape(user: fx.Node, value: fx.Node) -> bool:
    if user.target is aten.type_as.default and user.args[0] is not value:
        return True
    return user.op != "output" and reads_shape_only(user, value)


def _pads(node: fx.Node) -> bool:
    """Whether a convolution pads its input with zeros."""
    padding: Any = node.args[4] if len(node.args) > 4 else 0
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
