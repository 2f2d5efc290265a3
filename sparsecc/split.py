"""Cutting a graph of AOTAutograd in two: what depends on weights alone, and the rest."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from sparsecc import _torch
from sparsecc.passes.analysis.weights import is_pure
from sparsecc.passes.base import nbytes
from sparsecc.program import ancestors

# What an attribute holds whose value the graph does not know: lint wants some tensor.
_UNSEEN = torch.empty(0)


class Split:
    """Moves values that depend on weights alone out of ``gm`` into ``graph``.

    In ``gm``, ``get_attr`` nodes stand for the moved values, as Inductor's patterns want constants. Call
    ``move`` as often as something new may be movable, then ``finish``.
    """

    def __init__(self, gm: fx.GraphModule, weights: Iterable[fx.Node]) -> None:
        self.gm, self.graph = gm, fx.Graph()
        self.values: dict[str, fx.Node] = {}  # attribute of gm -> the value it stands for
        self.weights: dict[fx.Node, fx.Node] = {}  # placeholder of graph -> placeholder of gm
        body = next(n for n in gm.graph.nodes if n.op != "placeholder")
        for node in weights:
            own = self.graph.placeholder(node.name)
            own.meta = {"val": node.meta["val"]}
            self.weights[own] = node
            self._stand_in(node, own, body)

    def _stand_in(self, node: fx.Node, value: fx.Node, before: fx.Node) -> None:
        name = f"_weight_{len(self.values)}"
        self.values[name] = value
        setattr(self.gm, name, value.meta.get("val", _UNSEEN))
        with self.gm.graph.inserting_before(before):
            new = self.gm.graph.create_node("get_attr", name)
        new.meta = dict(value.meta)
        node.replace_all_uses_with(new)

    def _stand_ins(self) -> list[fx.Node]:
        return [n for n in self.gm.graph.find_nodes(op="get_attr") if n.target in self.values]

    def move(self) -> None:
        """Move every value that is computed by pure operators from moved values and weights."""
        copies = {n: self.values[str(n.target)] for n in self._stand_ins()}
        constant = dict.fromkeys(copies)
        for node in self.gm.graph.nodes:
            inputs = node.all_input_nodes
            if inputs and all(a in constant for a in inputs) and _is_pure(node):
                constant[node] = None
        bound = _given_away(self.gm.graph, constant)
        frontier = [
            n
            for n in constant
            if n not in copies
            and n not in bound
            and any(u not in constant or u in bound for u in n.users)
        ]
        needed = ancestors(frontier)
        for node in self.gm.graph.nodes:  # `constant` is in this order, but for its stand-ins
            if node in needed and node not in copies:
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
                if "val" not in node.meta and not is_packed(node):  # patterns set none
                    copies[node].meta["val"] = _fake_result(copies[node])
        for node in frontier:
            self._stand_in(node, copies[node], node)
        self.gm.graph.eliminate_dead_code()

    def finish(self) -> list[fx.Node]:
        """Make the moved values inputs of ``gm``, after its other ones.

        What is not worth an input is moved back: views, and what is larger than the weights it comes from (an
        expanded token). Weights that ``gm`` no longer reads are inputs no more. Returns the new placeholders;
        ``graph`` computes their values, in order, from the weights that are left as its placeholders.
        """
        kept = self._worth_keeping()
        back: dict[fx.Node, fx.Node] = dict(self.weights)
        new: dict[fx.Node, fx.Node] = {}
        for node in self._stand_ins():
            value = self.values[str(node.target)]
            if value in kept and value not in new:
                last = list(self.gm.graph.find_nodes(op="placeholder"))[-1]
                with self.gm.graph.inserting_after(last):
                    new[value] = self.gm.graph.placeholder(f"packed_{len(new)}")
                new[value].meta = {"val": _strided_like(value)}
            elif value not in kept:
                self._restore(value, node, back)
            node.replace_all_uses_with(new[value] if value in kept else back[value])
            self.gm.graph.erase_node(node)
            delattr(self.gm, str(node.target))
        for placeholder in self.weights.values():
            if not placeholder.users:
                self.gm.graph.erase_node(placeholder)
        self.gm.graph.lint()
        self.gm.recompile()
        self.graph.output(tuple(new))
        self.graph.eliminate_dead_code()
        for own in self.graph.find_nodes(op="placeholder"):
            if not own.users:
                self.graph.erase_node(own)
        return list(new.values())

    def sources(self) -> list[fx.Node]:
        """After ``finish``: the placeholders that ``gm`` had for the weights that ``graph`` reads."""
        return [self.weights[own] for own in self.graph.find_nodes(op="placeholder")]

    def _worth_keeping(self) -> set[fx.Node]:
        values = dict.fromkeys(self.values[str(n.target)] for n in self._stand_ins() if n.users)
        read = {v: ancestors([v]) & self.weights.keys() for v in values if v not in self.weights}
        views = {v for v in read if self._views_a_weight(v)}
        kept = {
            v
            for v, weights in read.items()
            if is_packed(v) or (v not in views and nbytes(v) <= sum(map(nbytes, weights)))
        }
        # A view costs little at each call, but nothing where its weight is watched anyway.
        watched = set().union(*(read[v] for v in kept))
        return kept | {v for v in views if read[v] <= watched}

    def _views_a_weight(self, value: fx.Node) -> bool:
        while value not in self.weights and _is_view(value):
            value = value.all_input_nodes[0]
        return value in self.weights

    def _restore(self, value: fx.Node, before: fx.Node, back: dict[fx.Node, fx.Node]) -> None:
        needed = ancestors([value])
        with self.gm.graph.inserting_before(before):
            for node in self.graph.nodes:
                if node in needed and node not in back:
                    back[node] = self.gm.graph.node_copy(node, back.__getitem__)


def is_packed(value: fx.Node) -> bool:
    """Whether an operator gave ``value`` an opaque layout."""
    if value.target is operator.getitem:
        value = value.all_input_nodes[0]
    return _torch.packs(value.target)


def _is_pure(node: fx.Node) -> bool:
    target: Any = node.target
    if target is operator.getitem or _torch.packs(target):
        return True
    return is_pure(node) or target is torch.ops.prims.convert_element_type.default


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    # The last two may give back their input.
    return any(r.alias_info is not None for r in schema.returns) or schema.name in (
        "aten::reshape",
        "prims::inductor_force_stride_order",
    )


def _given_away(graph: fx.Graph, constant: Collection[fx.Node]) -> set[fx.Node]:
    """Values whose memory the caller may get, and write: they are computed anew at each call."""
    found: set[fx.Node] = set()
    stack = list(graph.output_node().all_input_nodes)
    while stack:
        node = stack.pop()
        if node in found or node.op != "call_function":
            continue
        if node in constant or _is_view(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _fake_result(node: fx.Node) -> Any:
    target: Any = node.target
    fakes = [a.meta["val"] for a in node.all_input_nodes]
    with fakes[0].fake_mode:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
        return target(*args, **kwargs)


def _strided_like(value: fx.Node) -> Any:
    """A fake tensor for an input: opaque ones pass for contiguous, as nothing but a kernel reads them."""
    if not is_packed(value):
        return value.meta["val"]
    packer = value.all_input_nodes[0] if value.target is operator.getitem else value

    target: Any = packer.target

    def zeros(node: fx.Node) -> torch.Tensor:
        like: torch.Tensor = node.meta["val"]
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).zero_()

    with _torch.real_tensors(), torch.no_grad():
        args, kwargs = fx.node.map_arg((packer.args, packer.kwargs), zeros)
        result = target(*args, **kwargs)
        if packer is not value:
            result = result[value.args[1]]
        shape, dtype = result.shape, result.dtype
        del result
    fake: Any = packer.all_input_nodes[0].meta["val"]
    with fake.fake_mode:
        return torch.empty(shape, dtype=dtype)
