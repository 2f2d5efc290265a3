"""Which values share storage, and which storages the program writes.

Pre-dispatch ATen is not functional: in-place operators and views are there, and a rewrite may neither move a
read across a write to the same storage nor fold a weight that the program itself changes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from sparsecc.passes.base import Analyses
from sparsecc.program import WRITING_OPERATORS, Program, moved_statistics


@dataclass(frozen=True)
class Aliases:
    """Storage roots of every node, and the nodes that write each root."""

    roots: dict[fx.Node, frozenset[fx.Node]]
    writers: dict[fx.Node, tuple[fx.Node, ...]]

    def written(self, node: fx.Node) -> bool:
        """Whether any storage that ``node`` may share is written anywhere in the program."""
        return any(self.writers.get(root) for root in self.roots[node])

    def writes(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that write a storage of ``node``."""
        return tuple(w for root in self.roots[node] for w in self.writers.get(root, ()))

    def same_storage(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that may share a storage with ``node`` (itself among them)."""
        mine = self.roots[node]
        return [other for other, roots in self.roots.items() if roots & mine]


def aliases(program: Program, analyses: Analyses) -> Aliases:
    """Follow the alias annotations of every operator's schema; unknown nodes may alias all they read."""
    del analyses
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    writers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    shared: dict[int, fx.Node] = {}
    for node in program.graph.nodes:
        slot = program.slot(node)
        if slot is not None and slot.storage:
            roots[node] = frozenset({shared.setdefault(slot.storage, node)})
            continue
        roots[node] = frozenset({node}).union(*(roots[a] for a in _aliased(node)))
        for target in _written(node, program):
            for root in roots[target]:
                writers[root].append(node)
    return Aliases(roots, {root: tuple(found) for root, found in writers.items()})


def _aliased(node: fx.Node) -> list[fx.Node]:
    """Inputs whose storage the result of ``node`` may share."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        returned = {
            s for r in schema.returns if r.alias_info is not None for s in r.alias_info.before_set
        }
        found = [
            a
            for argument, value in zip(schema.arguments, _bound(node), strict=False)
            if argument.alias_info is not None and argument.alias_info.before_set & returned
            for a in _nodes(value)
        ]
        if not found and node.target.namespace == "aten" and _is_composite(node.target):
            found = [a for a in node.all_input_nodes if _could_be_view(a, node)]
        return found
    return list(node.all_input_nodes)


def _written(node: fx.Node, program: Program) -> list[fx.Node]:
    """Inputs that ``node`` writes."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        return moved_statistics(node) + [
            a
            for argument, value in zip(schema.arguments, _bound(node), strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for a in _nodes(value)
        ]
    if _named_as_write(node) or node.kwargs.get("inplace") is True:
        return node.all_input_nodes[:1]
    if "out" in node.kwargs and isinstance(node.kwargs["out"], fx.Node):
        return [node.kwargs["out"]]
    if isinstance(node.target, torch._ops.HigherOrderOperator) and _body_writes(node, program):
        return list(node.all_input_nodes)
    return []


def _body_writes(node: fx.Node, program: Program) -> bool:
    if "mutation" in node.target.name() or "auto_functionalized" in node.target.name():  # type: ignore[union-attr]
        return True
    bodies = [a for a in node.all_input_nodes if a.op == "get_attr"]
    modules = [getattr(program.module, str(b.target), None) for b in bodies]
    return any(
        _mutates(inner)
        for module in modules
        if isinstance(module, fx.GraphModule)
        for sub in module.modules()
        if isinstance(sub, fx.GraphModule)
        for inner in sub.graph.nodes
    )


def _mutates(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable or moved_statistics(node))
    return node.op in ("call_function", "call_method") and _named_as_write(node)


def _named_as_write(node: fx.Node) -> bool:
    """Nodes that stayed as Dynamo had them: ``x.add_``, ``x[i] = y``, ``x += y``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return name in WRITING_OPERATORS
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _bound(node: fx.Node) -> list[object]:
    """Values in the order of the schema's arguments (None where absent)."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    return [
        node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for i, name in enumerate(names)
    ]


def _nodes(value: object) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, fx.Node)]


def _is_composite(target: torch._ops.OpOverload) -> bool:
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


# Composite operators always make a result of their own; any other may hand back (a view of) an input,
# as reshape, to, contiguous, einsum and dropout in eval mode do without saying so in their schema.
_FRESH = frozenset(
    "linear matmul layer_norm rms_norm group_norm instance_norm batch_norm conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "scaled_dot_product_attention softmax log_softmax cross_entropy_loss silu selu relu6 "
    "embedding_bag bilinear one_hot where pad".split()
)


def _could_be_view(source: fx.Node, node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    return name not in _FRESH and isinstance(source.meta.get("val"), torch.Tensor)
