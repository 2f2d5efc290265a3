"""Where to take the mean out of the residual stream, so that LayerNorms see zero-mean rows.

Every value of the stream gets one of two labels: O, as the model has it, or R, with its mean over the
features removed (Πv, Π = I − 11ᵀ/d). Operators that carry the features commute with Π, so R flows through
them for free; it can be made at a producer by folding Π into the weights, or anywhere by subtracting the mean
at run time; it can never be undone. A LayerNorm that reads R may become an RMSNorm; any other reader needs
O. Choosing the labels is a minimum cut:

    source side = R                              sink side = O
    source → v      1.00        a LayerNorm reading v stays one if v is O
    v → sink        its cost    v is R, and its own weights or one subtraction at run time make it so
    v → sink        infinite    v is R and has a reader that sees the mean
    operand → v'    infinite    a removed mean cannot come back (v' is v as its operator makes it)
    v' → operand    1.50        the mean of one operand is subtracted at run time, for this reader alone
    operand → sink  infinite    the operand is stored narrower than v': recentred, it would be rounded
    v → v'          1.50        the mean of v is subtracted at run time, for all its readers

The unit is one LayerNorm made an RMSNorm.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.stream import Axis, carry, readers
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses, nbytes
from sparsecc.program import Program, is_shape_query, source_line, target_name

aten = torch.ops.aten

# In hundredths of one LayerNorm made an RMSNorm.
SAVED = 100
AT_RUN_TIME = 150  # a mean subtracted from an activation: a reduction and a pass over it
FOLDED = 1  # Π folded into a weight once
FOLDED_EACH_STEP = 10  # in training, and under FSDP, it is folded in every step
TABLE = 120  # an embedding table: a second copy of it, so never for one norm alone
BIG_TABLE = 160  # a copy that costs more than the subtraction would
BIG = 8 * 2**20  # bytes
INFINITE = 10**9

Value = tuple[fx.Node, Axis]


@dataclass(frozen=True)
class Producer:
    """How Π gets into a value that carries nothing on.

    ``kind`` is "linear", "embedding" or "weight" (folded into ``weight`` along ``axis``), or "activation"
    (subtracted at run time).
    """

    kind: str
    weight: fx.Node
    axis: int
    linear: Linear | None = None


@dataclass
class Plan:
    """The cheapest recentring of one program.

    ``norms`` maps each LayerNorm that may become an RMSNorm to the values that must be recentred for it;
    ``producers`` says how, and ``edges`` are subtractions at run time from one operand of one reader.
    ``refused`` holds (code, words, node to blame) of every other LayerNorm.
    """

    norms: dict[fx.Node, frozenset[Value]] = field(default_factory=dict)
    producers: dict[Value, Producer] = field(default_factory=dict)
    edges: dict[Value, list[Value]] = field(default_factory=dict)
    refused: dict[fx.Node, tuple[str, str, fx.Node]] = field(default_factory=dict)


def is_layer_norm(node: fx.Node) -> bool:
    return node.target is aten.layer_norm.default


def recentring_plan(program: Program, analyses: Analyses) -> Plan:
    """Label the stream of every LayerNorm of ``program`` by one minimum cut."""
    return _Planner(program, analyses).plan()


def is_narrower(operand: fx.Node, result: fx.Node) -> bool:
    """Whether ``operand`` has a coarser dtype than ``result`` (integers cannot hold a centred value at all)."""
    dtype: torch.dtype = operand.meta["val"].dtype
    if not dtype.is_floating_point:
        return True
    return torch.finfo(dtype).eps > torch.finfo(result.meta["val"].dtype).eps


class _Planner:
    def __init__(self, program: Program, analyses: Analyses) -> None:
        self.program = program
        self.weights: WeightValues = analyses.get(weight_values)
        self.linears = analyses.get(linears)
        self.alias = analyses.get(aliases)
        self.network = nx.DiGraph()
        self.network.add_nodes_from(("R", "O"))
        self.seen: set[Value] = set()
        self.producers: dict[Value, Producer] = {}
        self.blame: dict[Value, tuple[str, str, fx.Node]] = {}
        self.carried: dict[Value, tuple[Value, ...]] = {}

    def plan(self) -> Plan:
        plan = Plan()
        norms: dict[fx.Node, Value] = {}
        for norm in self.program.calls(aten.layer_norm.default):
            refusal = self._shape_refusal(norm)
            if refusal is not None:
                plan.refused[norm] = refusal
                continue
            x: Any = norm.args[0]
            norms[norm] = (x, x.meta["val"].dim() - 1)
            self._visit(norms[norm])
            self._arc("R", norms[norm], SAVED)
        if not norms:
            return plan
        moved = self._cut()
        for norm, value in norms.items():
            if value in moved:
                plan.norms[norm] = frozenset(self._recentred(value, moved))
            else:
                plan.refused[norm] = self._why_not(value)
        for value in {v for needed in plan.norms.values() for v in needed}:
            if value in self.producers:
                plan.producers[value] = self.producers[value]
            elif ("made", value) not in moved:
                plan.producers[value] = Producer("activation", *value)
            else:
                plan.edges[value] = [
                    operand
                    for operand in self.carried[value]
                    if operand not in moved and not self._zero_mean(operand)
                ]
        return plan

    # ---- building the network ------------------------------------------------------------------

    def _visit(self, start: Value) -> None:
        """Add ``start`` and everything its label depends on, upstream and downstream."""
        queue = deque([start])
        while queue:
            value = queue.popleft()
            if value in self.seen:
                continue
            self.seen.add(value)
            queue.extend(self._inputs(value))
            queue.extend(self._readers(value))

    def _inputs(self, value: Value) -> list[Value]:
        node, axis = value
        if self._zero_mean(value):
            return []
        carried = None if self._writes_in_place(node) else carry(node, axis)
        rounded = [v for v in carried.operands if self._rounded(v, node)] if carried else []
        for operand in rounded:
            self._arc(operand, "O", INFINITE)
            dtype = str(operand[0].meta["val"].dtype).removeprefix("torch.")
            words = f"recentred in {dtype}, it would be rounded before it is widened"
            self.blame.setdefault(operand, ("widened", words, node))
        if carried is None or (rounded and node in self.weights):
            producer = self._producer(value)
            self.producers[value] = producer
            self._arc(value, "O", self._cost(producer))
            return []
        self.carried[value] = carried.operands
        made = ("made", value)
        self._arc(made, value, INFINITE)
        self._arc(value, made, AT_RUN_TIME)
        for operand in carried.operands:
            if not self._zero_mean(operand):
                self._arc(operand, made, INFINITE)
                # One part of a split does not read the operand itself: it has no edge to subtract on.
                direct = operand[0] in node.all_input_nodes
                self._arc(made, operand, AT_RUN_TIME if direct else INFINITE)
        return list(carried.operands)

    def _rounded(self, operand: Value, reader: fx.Node) -> bool:
        """Whether something stored is read in a wider dtype: a weight, a table, an input, a layer's weights.

        What autocast makes narrow is not: it rounds the fp32 weight at each call, recentred or not.
        """
        node, axis = operand
        if not is_narrower(node, reader):
            return False
        if not node.meta["val"].dtype.is_floating_point:
            return True
        while node.op != "placeholder" and node.target is not aten.embedding.default:
            if node in self.linears:
                return not is_narrower(node, self.linears[node].weight)
            carried = carry(node, axis)
            if carried is None or not carried.reindexes or len(carried.operands) != 1:
                return False
            node, axis = carried.operands[0]
        return True

    def _readers(self, value: Value) -> list[Value]:
        """Values that carry ``value`` on; any reader that would notice the mean pins ``value`` to O."""
        node = value[0]
        if self._zero_mean(value):
            return []
        found: list[Value] = []
        if self.alias.written(node):
            self._arc(value, "O", INFINITE)
            words = f"the stream is written in place ({node.name})"
            self.blame[value] = ("mutated", words, self.alias.writes(node)[0])
        for user in readers(node):
            if is_shape_query(user) or self._invariant(user, value):
                continue
            onward = self._onward(user, value)
            if onward is None:
                self._arc(value, "O", INFINITE)
                self.blame.setdefault(value, self._exit_words(user))
            else:
                found.append(onward)
        return found

    def _onward(self, user: fx.Node, value: Value) -> Value | None:
        result = user.meta.get("val")
        if not isinstance(result, torch.Tensor):
            return None
        for axis in range(result.dim()):
            found = carry(user, axis)
            if found is not None and value in found.operands:
                return user, axis
        return None

    def _invariant(self, user: fx.Node, value: Value) -> bool:
        node, axis = value
        return (
            is_layer_norm(user)
            and user.args[0] is node
            and axis == node.meta["val"].dim() - 1
            and self._shape_refusal(user) is None
            and all(argument is not node for argument in user.args[2:])
        )

    def _producer(self, value: Value) -> Producer:
        node, axis = value
        last = node.meta["val"].dim() - 1
        linear = self.linears.get(node)
        feature = last if linear is None or not linear.is_conv else 1
        # The outputs of a grouped convolution read other inputs each: their mean is not in its weight.
        if linear is not None and axis == feature and not linear.is_grouped:
            return Producer("linear", linear.weight, linear.out_axis, linear)
        if node.target is aten.embedding.default:
            table: Any = node.args[0]
            counted = self.program.trains and any(node.args[3:5])  # scaled by frequency, or sparse
            if table in self.weights and axis == last and not counted:
                return Producer("embedding", table, 1)
        if node in self.weights:
            return Producer("weight", node, axis)
        return Producer("activation", node, axis)

    def _cost(self, producer: Producer) -> int:
        if producer.kind == "activation":
            return AT_RUN_TIME
        if producer.kind == "embedding":
            return TABLE if nbytes(producer.weight) <= BIG else BIG_TABLE
        return FOLDED_EACH_STEP if self.program.recomputes else FOLDED

    def _zero_mean(self, value: Value) -> bool:
        """Rows that have no mean already: an affine-free LayerNorm over the axis, zeros."""
        node, axis = value
        if self.alias.written(node):
            return False  # it is filled with something else
        if is_layer_norm(node):
            affine = any(a is not None for a in node.args[2:4])
            return not affine and axis == node.meta["val"].dim() - 1 and len(node.args[1]) == 1  # type: ignore[arg-type]
        carried = carry(node, axis)
        return carried is not None and not carried.operands

    def _writes_in_place(self, node: fx.Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

    def _shape_refusal(self, norm: fx.Node) -> tuple[str, str, fx.Node] | None:
        x: Any = norm.args[0]
        shape: Any = norm.args[1]
        if len(shape) != 1:
            return (
                "normalized-shape",
                f"normalizes over {len(shape)} axes, not the last one",
                norm,
            )
        if not isinstance(shape[0], int) or not isinstance(x.meta["val"].shape[-1], int):
            return ("symbolic-features", "the feature axis has a symbolic size", norm)
        return None

    def _arc(self, tail: Any, head: Any, capacity: int) -> None:
        before = self.network.get_edge_data(tail, head, {"capacity": 0})["capacity"]
        self.network.add_edge(tail, head, capacity=min(before + capacity, INFINITE))

    # ---- solving, and explaining ------------------------------------------------------------------

    def _cut(self) -> set[Any]:
        _, (source_side, _) = nx.minimum_cut(self.network, "R", "O")
        return set(source_side) - {"R"}

    def _recentred(self, value: Value, moved: set[Any]) -> set[Value]:
        """The values labelled R that ``value`` being R rests on."""
        found, queue = set(), deque([value])
        while queue:
            current = queue.popleft()
            if current in moved and current not in found:
                found.add(current)
                if ("made", current) in moved:
                    queue.extend(self.carried.get(current, ()))
        return found

    def _upstream(self, value: Value) -> set[Value]:
        found, queue = set(), deque([value])
        while queue:
            current = queue.popleft()
            if current not in found:
                found.add(current)
                queue.extend(self.carried.get(current, ()))
        return found

    def _why_not(self, value: Value) -> tuple[str, str, fx.Node]:
        """The reader that pins the stream, or what recentring would cost."""
        found, queue = {value}, deque([value])
        while queue:  # along infinite arcs: everything that would have to be R too
            current = queue.popleft()
            if current in self.blame:
                return self.blame[current]
            for head, arc in self.network[current].items():
                onward = head[1] if head[0] == "made" else head
                if head != "O" and arc["capacity"] >= INFINITE and onward not in found:
                    found.add(onward)
                    queue.append(onward)
        return self._cost_words(value, found)

    def _cost_words(self, value: Value, forced: set[Value]) -> tuple[str, str, fx.Node]:
        """Nothing forbids recentring ``value``; name what makes it dear, nearest to the norm first."""
        nearest = sorted(self._upstream(value), key=lambda v: v[0], reverse=True)
        along = {u for v in forced for u in self._upstream(v)} - set(nearest)
        upstream = nearest + sorted(along, key=lambda v: v[0])
        dear = [
            v
            for v in upstream
            if v in self.producers and self._cost(self.producers[v]) > FOLDED_EACH_STEP
        ]
        for at in upstream:
            if at in self.blame and self.blame[at][2].op == "output":
                return self.blame[at]
        for node, _ in dear:
            if is_layer_norm(node):
                words = "post-LN: the stream is itself the output of a LayerNorm with weights"
                return "post-norm", words, node
            if node.target is aten.dropout.default:
                return "dropout", "active dropout on the stream: mask*y has a mean again", node
            if node.target is aten.mul.Tensor:
                words = "a per-channel factor (LayerScale) stands between the linear layer and the stream"
                return "layer-scale", words, node
        for at in [v for v in upstream if v in self.blame]:
            return self.blame[at]
        for node, _ in dear[:1]:
            words = f"taking the mean out of {target_name(node)} costs more than the norms save"
            return "costs-more", words, node
        return "costs-more", "recentring costs more than the norms save", value[0]

    def _exit_words(self, user: fx.Node) -> tuple[str, str, fx.Node]:
        if user.op == "output":
            return ("stream-exit", "the stream is returned by the model without a LayerNorm", user)
        if user in self.linears:
            what = "a linear layer"
        elif is_layer_norm(user):
            what = "a LayerNorm over other axes"
        else:
            what = target_name(user)
        line = source_line(user)
        return (
            "stream-exit",
            f"the stream is also read by {what}" + (f" at {line}" if line else ""),
            user,
        )
