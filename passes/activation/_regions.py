"""Regions over rows: which values are rows or numbers of rows, and which of them can be computed at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.passes.activation._operations import Operation, Terms, operation
from sparsecc.passes.analysis.sizes import same_shape, same_size
from sparsecc.passes.analysis.weights import WeightValues
from sparsecc.passes.canonical._match import is_tensor
from sparsecc.program import Program, is_effect
from sparsecc.runtime.ops.rows import Output, Spec

_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}


@dataclass(frozen=True)
class Value:
    """A node over rows of one shape.

    Attributes:
        kind: "row" (``[..., N]``), "one" (a number of each row, ``[..., 1]``) or "flat" (``[...]``).
        rows: the shape ``[..., N]``.
    """

    node: fx.Node
    operation: Operation
    kind: str
    rows: tuple[Any, ...]


@dataclass
class Region:
    """One operator to be.

    Attributes:
        values: what is computed, in the order of the program.
        operands: tensors, vectors and scalars, by kind.
        results: the values that are read outside, with the index of the output that each is.
        at: the place of the anchor among the values.
    """

    values: list[Value]
    operands: dict[str, list[fx.Node]] = field(default_factory=lambda: {"t": [], "v": [], "s": []})
    results: dict[fx.Node, int] = field(default_factory=dict)
    spec: Spec = field(default_factory=lambda: Spec((), ()))
    at: int = 0

    @property
    def inside(self) -> set[fx.Node]:
        """The values, and what they take apart where nothing else does."""
        nodes = {v.node for v in self.values}
        hidden = {v.operation.hidden for v in self.values if v.operation.hidden is not None}
        return nodes | {node for node in hidden if nodes.issuperset(readers(node))}

    @property
    def rows(self) -> tuple[Any, ...]:
        return self.values[0].rows

    @property
    def statistics(self) -> int:
        return sum(v.operation.statistics for v in self.values)

    @property
    def reads(self) -> list[fx.Node]:
        return [node for nodes in self.operands.values() for node in nodes]

    @property
    def anchor(self) -> fx.Node:
        """The node in front of which the operator goes."""
        return self.values[self.at].node

    @property
    def first_reader(self) -> fx.Node | None:
        inside = self.inside
        users = (u for v in self.values for u in readers(v.node))
        return min((u for u in users if u not in inside), default=None)

    def place(self, moved: Mapping[fx.Node, fx.Node]) -> bool:
        """Put it behind all that it reads, and say whether its readers stand behind that.

        Args:
            moved: values that will be made in front of another node.
        """
        inside = self.inside
        reads = {i for v in self.values for i in v.operation.inputs if i not in inside}
        last = max(max(node, moved.get(node, node)) for node in reads)
        at = next((i for i, v in enumerate(self.values) if last < v.node), None)
        first = self.first_reader
        if at is None or first is None or not self.values[at].node < first:
            return False
        self.at = at
        return True


def find(program: Program, weights: WeightValues) -> list[Region]:
    """The regions of ``program``, in an order in which each reads what is made by those before.

    Each can be computed at its anchor: behind what it reads, in front of what reads its results.
    """
    found = []
    for values in _connected(list(_values(program, weights).values())):
        for part in _at_once(values):
            region = _written(part)
            if region is not None:
                found.append(region)
    return sorted(_placed(found), key=lambda region: region.anchor)


def _placed(regions: list[Region]) -> list[Region]:
    """Those that still find a place when the others' results are made at the others' anchors."""
    while True:
        moved = {node: r.anchor for r in regions for node in r.results}
        anchors = [r.anchor for r in regions]
        kept = [r for r in regions if r.place(moved)]
        if len(kept) == len(regions) and anchors == [r.anchor for r in kept]:
            return kept
        regions = kept


# ---- which values --------------------------------------------------------------------------------------


def _values(program: Program, weights: WeightValues) -> dict[fx.Node, Value]:
    found: dict[fx.Node, Value] = {}
    for node in program.graph.nodes:
        if not is_tensor(node) or node in weights:
            continue
        step = operation(node)
        value = None if step is None else _value(node, step, found)
        if value is not None:
            found[node] = value
    return found


def _value(node: fx.Node, step: Operation, found: dict[fx.Node, Value]) -> Value | None:
    out, first = node.meta["val"], step.inputs[0].meta["val"]
    alike = all(i.meta["val"].device == out.device for i in step.inputs)
    dtypes = {i.meta["val"].dtype for i in step.inputs}
    dtypes |= set() if step.kind == "cast" else {out.dtype}
    if not alike or len(dtypes) > 1 or not first.dtype.is_floating_point:
        return None
    kinds = {i: found[i].kind for i in step.inputs if i in found}
    if step.kind == "statistic":
        rows = tuple(first.shape)
        kind = "one" if out.dim() == first.dim() else "flat"
        fits = kinds.get(step.inputs[0], "row") == "row" and _are_rows(rows)
        return Value(node, step, kind, rows) if fits else None
    if step.kind == "axis":
        source = found.get(step.inputs[0])
        is_flat = source is not None and source.kind == "flat"
        return Value(node, step, "one", source.rows) if is_flat else None  # type: ignore[union-attr]
    if step.kind != "pointwise":
        rows = tuple(out.shape)
        source = found.get(step.inputs[0])
        fits = same_shape(first.shape, rows) and (source is None or source.kind == "row")
        fits &= all(_operand(i.meta["val"], rows) is not None for i in step.inputs)
        fits &= "flat" not in kinds.values()
        return Value(node, step, "row", rows) if fits and _are_rows(rows) else None
    return _pointwise(node, step, found)


def _pointwise(node: fx.Node, step: Operation, found: dict[fx.Node, Value]) -> Value | None:
    shape = tuple(node.meta["val"].shape)
    known = [found[i] for i in step.inputs if i in found]
    rows: tuple[Any, ...]
    is_row = any(same_shape(i.meta["val"].shape, shape) for i in step.inputs)
    is_row |= any(v.kind == "one" and same_shape(v.rows, shape) for v in known)
    if is_row and _are_rows(shape) and not any(v.kind == "flat" for v in known):
        kind, rows = "row", shape
    elif any(v.kind == "one" for v in known):
        kind, rows = "one", next(v.rows for v in known if v.kind == "one")
    elif known and all(v.kind == "flat" for v in known) and len(known) == len(step.inputs):
        kind, rows = "flat", known[0].rows
    else:
        return None
    if not same_shape(shape, {"row": rows, "one": (*rows[:-1], 1), "flat": rows[:-1]}[kind]):
        return None
    for each in step.inputs:
        other = found.get(each)
        if other is not None and other.kind == kind and same_shape(other.rows, rows):
            continue
        if kind == "flat":
            return None
        # A number of other rows is an operand like any.
        if _operand(each.meta["val"], rows) not in (("s",) if kind == "one" else ("t", "v", "s")):
            return None
    return Value(node, step, kind, rows)


def _are_rows(shape: Sequence[Any]) -> bool:
    return len(shape) > 0 and not same_size(shape[-1], 1) and not same_size(shape[-1], 0)


def _operand(value: torch.Tensor, rows: Sequence[Any]) -> str | None:
    """Which kind of operand a tensor is to ``rows``, if any."""
    if same_shape(value.shape, rows):
        return "t"
    shape = trimmed(value)
    count = len(shape)
    if count > len(rows):
        return None
    if same_shape(shape, rows[-count:]):
        return "v"
    is_scalar = same_size(shape[-1], 1) and same_shape(shape[:-1], rows[-count:-1])
    return "s" if is_scalar else None


def trimmed(value: torch.Tensor) -> tuple[Any, ...]:
    """The shape of ``value`` without leading ones, and of one axis at least."""
    shape = list(value.shape) or [1]
    while len(shape) > 1 and same_size(shape[0], 1):
        shape.pop(0)
    return tuple(shape)


# ---- which of them together ----------------------------------------------------------------------------


def _connected(values: Sequence[Value]) -> list[list[Value]]:
    """Values over rows of one shape that read each other."""
    known = {value.node: value for value in values}
    group: dict[fx.Node, list[Value]] = {}
    for value in values:
        mine = group[value.node] = [value]
        for source in value.operation.inputs:
            other = known.get(source)
            if other is None or group[source] is mine or not same_shape(other.rows, value.rows):
                continue
            small, mine = sorted((mine, group[source]), key=len)
            mine += small
            for each in small:
                group[each.node] = mine
    distinct = {id(members): members for members in group.values()}
    return [sorted(members, key=lambda v: v.node) for members in distinct.values()]


def _at_once(values: list[Value]) -> list[list[Value]]:
    """``values``, cut in front of each reader that stands before something else that is read."""
    done, todo = [], [values]
    while todo:
        part = todo.pop()
        region = Region(part)
        first = region.first_reader
        if first is None:  # nobody reads it
            continue
        if region.place({}):
            done.append(part)
            continue
        todo += _connected([v for v in part if v.node < first])
        todo += _connected([v for v in part if first < v.node])
    return done


def readers(node: fx.Node) -> list[fx.Node]:
    """The users of ``node``, but for those that are left over."""
    return [user for user in node.users if user.users or is_effect(user)]


# ---- the spec ------------------------------------------------------------------------------------------


def _written(values: list[Value]) -> Region | None:
    """The region with its spec, or None where something that it reads is no operand, or nothing is a row."""
    region, terms = Region(values), Terms()
    made: dict[fx.Node, int] = {}
    inside = region.inside
    for value in values:
        for source in value.operation.inputs:
            if source in made:
                continue
            kind = _operand(source.meta["val"], value.rows)
            if source in inside or kind is None or value.operation.kind == "axis":
                return None
            operands = region.operands[kind]
            made[source] = terms.make(f"{kind}{len(operands)}")
            operands.append(source)
        inputs = (made[source] for source in value.operation.inputs)
        made[value.node] = value.operation.build(terms, *inputs)
    results = [v.node for v in values if any(u not in inside for u in readers(v.node))]
    statements, texts = terms.written(made[node] for node in results)
    outputs: dict[Output, int] = {}
    for node in results:
        output = Output(texts[made[node]], _FORMATS.get(node.meta["val"].dtype, "x"))
        region.results[node] = outputs.setdefault(output, len(outputs))
    region.spec = Spec(statements, tuple(outputs))
    return region if region.operands["t"] and outputs else None
