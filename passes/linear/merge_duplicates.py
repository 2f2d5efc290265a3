"""Linear maps that compute the same thing twice, computed once.

Law.   linear(x, W, b), linear(x, W, b) = y, y with y = linear(x, W, b); and BatchNorm by running statistics.
Source common subexpressions (Cocke, "Global Common Subexpression Elimination", 1970), for linear maps alone,
       and for the BatchNorm behind them, which is one.
Legal  when both read the same values under the same autocast and grad mode, nothing that they read or return
       is written, and the caller does not get both results, which would then share memory. Inputs count as
       the same through equal deterministic operators. Two parameters that share storage are two values: they
       may part later, and no guard would tell.
Exact  bitwise. In training both gradients reach the one result and are added there.
Pays   a layer called twice on the same input; Inductor merges such calls too, but later, and until then both
       stand in the way of folds as "tied" or "fan-out".
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from sparsecc.passes.analysis.alias import Aliases, aliases
from sparsecc.passes.analysis.batchnorms import batch_norms
from sparsecc.passes.analysis.linear import Linear, every_linear
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.weights import is_pure
from sparsecc.passes.base import (
    Analyses,
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
    Saving,
    nbytes,
    numel,
)
from sparsecc.program import Program, moved_statistics


@dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Compute equal linear maps of the same input once."""

    name: ClassVar[str] = "merge-duplicates"
    family: ClassVar[str] = "linear"
    law: ClassVar[str] = "linear(x, W, b), linear(x, W, b) = y, y"
    source: ClassVar[str] = "Cocke 1970, Global Common Subexpression Elimination"
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    pays: ClassVar[str] = "layers called twice on one input; folds that would be refused as tied"
    refusals: ClassVar[dict[str, str]] = {
        "written": "what they read or return is written in place",
        "escapes": "the caller gets both results, and could tell that they share memory",
        "region": "the two run under different autocast or grad modes",
    }

    def find(self, context: Context) -> list[Match]:
        first = context.analyses.get(first_equal)
        maps = context.analyses.get(every_linear)
        norms = context.analyses.get(batch_norms)
        groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for node in context.program.graph.nodes:
            if node in maps or (node in norms and not norms[node].of_the_batch):
                groups[_spelling(node, first)].append(node)
        return [
            Match(node, {"linear": maps.get(node), "earlier": group[:i]})
            for group in groups.values()
            for i, node in enumerate(group)
            if i
        ]

    def check(self, match: Match, context: Context) -> Refusal | None:
        node = match.node
        earlier: list[fx.Node] = match.nodes["earlier"]
        mode = context.analyses.get(modes)
        if mode[earlier[0]] != mode[node]:
            return Refusal.at(node, "region", self.refusals["region"])
        alias = context.analyses.get(aliases)
        for value in (earlier[0], node, *node.all_input_nodes):
            if alias.written(value):
                words = f"{value.name} is written in place"
                return Refusal.at(alias.writes(value)[0], "written", words)
        if _escapes(node, alias) and any(_escapes(e, alias) for e in earlier):
            return Refusal.at(node, "escapes", self.refusals["escapes"])
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        context.program.replace(match.node, match.nodes["earlier"][0])

    def saving(self, match: Match, context: Context) -> Saving:
        linear: Linear | None = match.nodes["linear"]
        moved = (match.node, *match.node.all_input_nodes)
        flops = 2 * numel(match.node) if linear is None else linear.flops
        return Saving(sum(nbytes(value) for value in moved), flops, 1)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any) -> Any:
            return (x @ W.transpose(0, 1) + b) * 2 + (x @ W.transpose(0, 1) + b)

        def after(x: Any, W: Any, b: Any) -> Any:
            y = x @ W.transpose(0, 1) + b
            return y * 2 + y

        return [
            Example(
                before,
                after,
                {"x": ("n", "d"), "W": ("k", "d"), "b": ("k",)},
                ("W", "b"),
                symbolic=True,
            )
        ]


def first_equal(program: Program, analyses: Analyses) -> dict[fx.Node, fx.Node]:
    """For every node the first one that surely has its value: equal operators on equal operands."""
    alias, mode = analyses.get(aliases), analyses.get(modes)
    first: dict[fx.Node, fx.Node] = {}
    seen: dict[Hashable, fx.Node] = {}
    for node in program.graph.nodes:
        first[node] = node
        if _is_timeless(node, alias):
            first[node] = seen.setdefault((_spelling(node, first), mode[node]), node)
    return first


def _is_timeless(node: fx.Node, alias: Aliases) -> bool:
    """Whether ``node`` would compute the same wherever it stood."""
    if node.op != "call_function":
        return False
    if not (is_pure(node) or node.target is operator.getitem) or moved_statistics(node):
        return False
    return not any(alias.written(value) for value in (node, *node.all_input_nodes))


def _spelling(node: fx.Node, first: dict[fx.Node, fx.Node]) -> Hashable:
    """The operator and its arguments, equal values as one."""

    def spell(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return first[value]
        if isinstance(value, (list, tuple)):
            return tuple(map(spell, value))
        if isinstance(value, slice):
            return ("slice", *map(spell, (value.start, value.stop, value.step)))
        return type(value), repr(value)  # 1, 1.0 and True differ, and so do 0.0 and -0.0

    named = tuple((name, spell(node.kwargs[name])) for name in sorted(node.kwargs))
    return node.target, spell(node.args), named


def _escapes(node: fx.Node, alias: Aliases) -> bool:
    return any(user.op == "output" for held in alias.same_storage(node) for user in held.users)
