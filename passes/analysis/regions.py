"""Autocast and grad-mode regions: between two switches of either, a program means one thing.

The switches are nodes of the graph. A match that spans two regions would move arithmetic from one
precision or one gradient rule into another, so every pass asks for the region of the nodes that it
joins.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from sparsecc.passes.base import Analyses
from sparsecc.program import Program

_AUTOCAST = frozenset(
    {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
)
_GRAD_MODE = frozenset({torch._C._set_grad_enabled})


def is_switch(node: fx.Node) -> bool:
    """Whether ``node`` enters or leaves an autocast or grad-mode region."""
    return node.op == "call_function" and (
        node.target in _AUTOCAST or switches_grad_mode(node) or _is_functorch(node)
    )


def switches_grad_mode(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _GRAD_MODE


def region(program: Program, analyses: Analyses) -> dict[fx.Node, int]:
    """The region id of every node; the id changes at each switch."""
    found: dict[fx.Node, int] = {}
    current = 0
    for node in program.graph.nodes:
        current += is_switch(node)
        found[node] = current
    return found


def modes(program: Program, analyses: Analyses) -> dict[fx.Node, tuple[object, ...]]:
    """The autocast and grad mode that every node runs in.

    Folding moves no activation arithmetic, so it may reach over a region that lies between two nodes; but
    both must run in the same mode. Where no gradient flows, grad mode does not matter.
    """
    found: dict[fx.Node, tuple[object, ...]] = {}
    stack: list[object] = []
    grad: object = program.trains
    for node in program.graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            stack.append(node)
        elif node.target is torch.amp.autocast_mode._exit_autocast and node.args[0] in stack:
            stack.remove(node.args[0])
        elif switches_grad_mode(node) and program.trains:
            grad = node.args[0]
        found[node] = (grad, *stack)
    return found


def switch_between(nodes: Iterable[fx.Node], regions: dict[fx.Node, int]) -> bool:
    """Whether ``nodes`` do not all lie in one region."""
    return len({regions[node] for node in nodes}) > 1


def autocasts(program: Program, analyses: Analyses) -> frozenset[fx.Node]:
    """Nodes that run with autocast switched on (by a switch in this graph)."""
    stack: dict[object, bool] = {}
    inside: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _AUTOCAST:
            if node.target is torch.amp.autocast_mode._enter_autocast:
                # _enter_autocast(device_type, dtype, enabled, cache_enabled)
                enabled = node.args[2] if len(node.args) > 2 else node.kwargs.get("enabled", True)
                stack[node] = bool(enabled)
            elif node.args:
                stack.pop(node.args[0], None)
        elif stack and list(stack.values())[-1]:
            inside.add(node)
    return frozenset(inside)


def _is_functorch(node: fx.Node) -> bool:
    """Switches of functorch's interpreter (vmap levels and the like) bound a region too."""
    module = getattr(node.target, "__module__", "") or ""
    return module in ("torch._C._functorch", "torch._functorch.predispatch")
