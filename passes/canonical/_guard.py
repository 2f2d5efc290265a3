"""What no raising may do: join two regions, move a read over a write, change strides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.regions import region, switch_between
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.base import Context, Refusal
from sparsecc.passes.canonical._match import is_tensor

aten = torch.ops.aten

_ELEMENTWISE = (aten.dropout.default, aten.type_as.default)  # without the tag

GUARD_REFUSALS: Mapping[str, str] = {
    "region": "the computation spans an autocast or grad-mode switch",
    "written": "an operand is written in place between its reads, or, in training, after them",
}


def interior(root: fx.Node, leaves: Iterable[Any]) -> list[fx.Node]:
    """The nodes that compute ``root`` from ``leaves``: root included, leaves not."""
    stop = {leaf for leaf in leaves if isinstance(leaf, fx.Node)}
    found: dict[fx.Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in found or node in stop or node.op in ("placeholder", "get_attr"):
            continue
        if not is_tensor(node) and node is not root and not isinstance(node.meta.get("val"), tuple):
            continue  # symbolic numbers are not part of the tensor computation
        found[node] = None
        stack += node.all_input_nodes
    return list(found)


def guard(context: Context, root: fx.Node, leaves: Iterable[Any]) -> Refusal | None:
    """Refuse what no raising may do: join two regions, or move a read across a write."""
    leaves = [leaf for leaf in leaves if is_tensor(leaf)]
    inside = interior(root, leaves)
    regions = context.analyses.get(region)
    if switch_between(inside, regions):
        return Refusal.at(root, "region", GUARD_REFUSALS["region"])
    alias = context.analyses.get(aliases)
    first = min(inside)
    for node in (*inside, *leaves):
        for write in alias.writes(node):
            # In training, an operator may save its operands and its result where the spelling saves neither.
            if first < write and (write < root or context.trains):
                return Refusal.at(write, "written", GUARD_REFUSALS["written"])
    return None


def layout_matters(node: fx.Node) -> bool:
    """Whether a result with other strides than ``node`` could be told apart.

    Raised operators may return a contiguous tensor where elementwise arithmetic kept the strides of
    a permuted input (or the other way round). That matters to ``view``-like readers and to the
    caller.
    """
    return not _contiguous(node.meta["val"]) and bool(stride_readers(node))


def _contiguous(value: torch.Tensor) -> bool:
    expected: list[Any] = []
    step: Any = 1
    for size in reversed(value.shape):
        expected.insert(0, step)
        step = step * size
    return same_shape(value.stride(), expected)


def stride_readers(node: fx.Node) -> list[fx.Node]:
    """The readers whose meaning depends on the strides of ``node``, its views, or what inherits them."""
    strided = (aten.view.default, aten.view_as.default, aten.as_strided.default, aten.view.dtype)
    stack, seen, found = list(node.users), {node}, []
    while stack:
        user = stack.pop()
        if user in seen or user.target is aten.contiguous.default:
            continue
        seen.add(user)
        target = user.target
        if isinstance(target, torch._ops.OpOverload):
            if target in strided:
                found.append(user)
            is_view = any(result.alias_info is not None for result in target._schema.returns)
            inherits = torch.Tag.pointwise in target.tags or target in _ELEMENTWISE
            if is_view or inherits or (is_tensor(user) and not _contiguous(user.meta["val"])):
                stack += user.users
        elif user.op == "call_function" and getattr(target, "__module__", "") == "_operator":
            stack += user.users
        else:  # the caller, or an operator that nothing is known of
            found.append(user)
    return found
