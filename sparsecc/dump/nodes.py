"""What the formats say about a node, gathered once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.program import ORIGIN, WEIGHT, Program, module_path, source_line, target_name


@dataclass(frozen=True)
class NodeFacts:
    """One node as plain values; ``inputs`` are the names of the nodes that it reads.

    ``kind`` is "weight" (a parameter or buffer), "input", "folded" (an expression over weights),
    "call" or "output".
    """

    name: str
    op: str
    kind: str
    target: str
    value: str
    inputs: tuple[str, ...]
    role: str
    fqn: str
    module: str
    source: str
    written_by: str
    opaque: str


def facts(program: Program) -> list[NodeFacts]:
    """Every node of ``program``, in topological order."""
    return [_facts(program, node) for node in program.graph.nodes]


def _facts(program: Program, node: fx.Node) -> NodeFacts:
    slot = program.slot(node)
    return NodeFacts(
        name=node.name,
        op=node.op,
        kind=_kind(program, node),
        target=target_name(node),
        value=value_words(node.meta.get("val")),
        inputs=tuple(n.name for n in node.all_input_nodes),
        role=slot.role.value if slot else "",
        fqn=slot.fqn if slot else "",
        module=module_path(node),
        source=source_line(node),
        written_by=str(node.meta.get(ORIGIN, "")),
        opaque=program.opaque.get(node.name, ""),
    )


def _kind(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        slot = program.slot(node)
        return "weight" if slot and slot.role.is_weight else "input"
    if node.op == "output":
        return "output"
    return "folded" if node.meta.get(WEIGHT) else "call"


def value_words(value: Any) -> str:
    """``float32[2, s0, 8]``; tuples in parentheses; empty when nothing is known."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(value_words(item) for item in value)})"
    return "" if value is None else type(value).__name__


def value_data(value: Any) -> Any:
    """Shape and dtype for JSON; sizes that are not numbers yet are given by name."""
    if isinstance(value, torch.Tensor):
        shape = [_size(size) for size in value.shape]
        return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return [value_data(item) for item in value]
    return None if value is None else {"type": type(value).__name__}


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def argument_data(arg: Any) -> Any:
    """An argument for JSON: nodes become ``{"node": name}``, what JSON lacks becomes text."""
    if isinstance(arg, fx.Node):
        return {"node": arg.name}
    if isinstance(arg, (list, tuple)):
        return [argument_data(item) for item in arg]
    if isinstance(arg, dict):
        return {str(key): argument_data(item) for key, item in arg.items()}
    if isinstance(arg, slice):
        return {"slice": [argument_data(a) for a in (arg.start, arg.stop, arg.step)]}
    if arg is None or isinstance(arg, (bool, int, str)):
        return arg
    if isinstance(arg, float):
        return arg if math.isfinite(arg) else str(arg)
    return str(arg)
