"""Weight expressions, cut out of the program in inference and evaluated once.

This is the only place where folding happens, so it is right once for every pass: tied weights, weights with
other users, weights that change later. What is cut: every expression that a pass wrote over weights, and the
user's own arithmetic on parameters when its result is no larger than what it reads, unless autocast narrows
it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.regions import autocasts
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses, nbytes
from sparsecc.program import WEIGHT, Program, Role, Slot, ancestors, no_autocast
from sparsecc.shadow import FoldInterpreter


@dataclass(frozen=True)
class Hoisted:
    """A program without weight arithmetic, and the expressions that feed it.

    Attributes:
        main: the program to compile; its last placeholders take the folded weights.
        keep: positions of the original inputs that ``main`` still reads, in order.
        sources: positions of the original inputs that the expressions read.
        names: the fully qualified names of the sources.
        expressions: a graph module from sources to folded weights.
    """

    main: Program
    keep: tuple[int, ...]
    sources: tuple[int, ...]
    names: tuple[str, ...]
    expressions: fx.GraphModule

    def evaluate(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Fold: fp64 arithmetic, then one cast to each weight's own dtype."""
        with torch.inference_mode(False), torch.no_grad(), no_autocast():
            plain = [s.detach() if not s.is_inference() else s.clone() for s in sources]
            return list(FoldInterpreter(self.expressions).run(*plain))


def hoist(program: Program) -> Hoisted | None:
    """Cut weight expressions out of ``program`` (left as it was); None when there are none."""
    main = program.copy()
    analyses = Analyses(main)
    frontier = _frontier(main, analyses)
    if not frontier:
        return None
    slots = main.placeholders()
    expressions, used = _extract(main, frontier)
    for index, node in enumerate(frontier):
        _replace_by_input(main, node, f"folded_{index}")
    main.sweep()
    keep = [i for i, p in enumerate(slots) if p.users or not main.slots[p.name].role.is_weight]
    for i, placeholder in enumerate(slots):
        if i not in set(keep):
            main.slots.pop(placeholder.name)
            main.graph.erase_node(placeholder)
    main.drop_constants()
    main.module.recompile()
    return Hoisted(
        main,
        tuple(keep),
        tuple(slots.index(u) for u in used),
        tuple(program.slots[u.name].fqn for u in used),
        expressions,
    )


def _frontier(program: Program, analyses: Analyses) -> list[fx.Node]:
    """Weight values worth cutting out that are read by nodes outside the cut."""
    weights = analyses.get(weight_values)
    bound = {*_under_autocast(program, analyses), *_returned(program, analyses)}
    cut = {n for n in weights.sources if _worth(n, program, weights, bound)}
    return [n for n in program.graph.nodes if n in cut and any(u not in cut for u in n.users)]


def _under_autocast(program: Program, analyses: Analyses) -> Collection[fx.Node]:
    """Nodes whose arithmetic autocast may narrow, by a region in the graph or around the call."""
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        return frozenset(program.graph.nodes)
    return analyses.get(autocasts)


def _returned(program: Program, analyses: Analyses) -> list[fx.Node]:
    """Values whose memory the caller gets: it may write them, and a folded weight must not be written."""
    facts = analyses.get(aliases)
    given = set().union(*(facts.roots[a] for a in program.output().all_input_nodes))
    return [node for node, roots in facts.roots.items() if roots & given]


def _worth(
    node: fx.Node, program: Program, weights: WeightValues, bound: Collection[fx.Node]
) -> bool:
    if node.op == "placeholder":
        return False
    if node.meta.get(WEIGHT):
        return True
    sources = weights.sources[node]
    if any(program.slots[s.name].role is not Role.PARAMETER for s in sources):
        return False  # buffers may change at every call; only a pass may decide to fold them
    if node in bound:
        return False  # the user's own rounding (expressions are evaluated without autocast), or results
    if _is_view(node) or _reads_only_the_shape(node):
        return False  # free at run time; a copy of an expanded view would be larger
    return nbytes(node) <= sum(nbytes(s) for s in sources)


def _is_view(node: fx.Node) -> bool:
    target: Any = node.target
    if any(r.alias_info is not None for r in target._schema.returns):
        return True
    return target._schema.name.removeprefix("aten::") in ("reshape", "to", "contiguous", "flatten")


def _reads_only_the_shape(node: fx.Node) -> bool:
    """``zeros_like``, ``new_full``: generated where they are used."""
    target: Any = node.target
    name = target._schema.name.removeprefix("aten::")
    return bool(name.endswith("_like") or name.startswith("new_"))


def _extract(program: Program, frontier: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A graph computing ``frontier`` from the placeholders that it depends on."""
    needed = ancestors(frontier)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    rounded: dict[fx.Node, fx.Node] = {}
    results = set(frontier)
    for node in program.graph.nodes:
        if node not in needed:
            continue
        # The user's own arithmetic takes values in their own dtypes; only ours stays in fp64.
        taken = mapping if node.meta.get(WEIGHT) else ChainMap(rounded, mapping)
        mapping[node] = graph.node_copy(node, taken.__getitem__)
        mapping[node].meta = dict(node.meta)
        if node in results or (
            node.meta.get(WEIGHT)
            and any(u in needed and not u.meta.get(WEIGHT) for u in node.users)
        ):
            # Rounded as soon as it is there: fp64 copies of all weights never exist at once.
            dtype = node.meta["val"].dtype
            rounded[node] = graph.call_function(_rounded, (mapping[node], dtype))
    graph.output(tuple(rounded[n] for n in frontier))
    used = [n for n in program.placeholders() if n in needed]
    return fx.GraphModule(program.module, graph), used


def _rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` in ``dtype``, never sharing memory with a source; strides are kept."""
    return value.to(dtype, copy=True)


def _replace_by_input(program: Program, node: fx.Node, name: str) -> None:
    last = program.placeholders()[-1]
    with program.graph.inserting_after(last):
        new = program.graph.placeholder(name)
    new.meta = {
        k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "nn_module_stack")
    }
    new._dynamo_source = None
    # Folded weights are refreshed in place, so their addresses hold still for CUDA graphs.
    new.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    program.slots[new.name] = Slot(new.name, Role.BUFFER, new.name)
    node.replace_all_uses_with(new)
    program.version += 1
