"""Sites: the weights of linear layers, by names that hold in every process, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.linear import Linear
from sparsecc.passes.analysis.links import Link, links
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses
from sparsecc.program import Program, ancestors
from sparsecc.runtime.ops.few_rows import Spec, few_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One weight matrix that a product reads.

    Attributes:
        name: the parameters that it is computed from, matrices alone, joined by "+"; of a stack of matrices
            [E, N, K] from which one is selected, its number too ("experts.down_proj.3").
        node: the product: ``aten.linear``, or ``sparsecc.few_rows``.
        weight: [N, K].
        index: which weight of the product.
    """

    name: str
    node: fx.Node
    weight: fx.Node
    index: int = 0

    @property
    def shape(self) -> list[int]:
        """[N, K]."""
        found: list[int] = list(self.weight.meta["val"].shape)
        return found


def sites(program: Program, analyses: Analyses) -> list[Site]:
    """Every dense weight [N, K] of a linear layer, in graph order; a layer called twice is two of one name."""
    weights = analyses.get(weight_values)
    found = []
    for node in program.calls(aten.linear.default, few_rows):
        read: Any = [node.args[1]]
        if node.target is few_rows:
            read = [] if Spec.of(str(node.args[3])).formats else node.args[1]
        for index, weight in enumerate(read):
            name = site_name(program, weight, weights)
            if name and weight.meta["val"].dim() == 2:
                found.append(Site(name, node, weight, index))
    return found


def site_name(program: Program, weight: fx.Node, weights: WeightValues) -> str:
    """The name of a weight; "" where it is not computed from weights alone."""
    if weight not in weights:
        return ""
    read = [p for p in weights.sources[weight] if p.meta["val"].dim() > 1]
    return "+".join(sorted(program.slots[p.name].fqn + _element(p, weight) for p in read))


def _element(parameter: fx.Node, weight: fx.Node) -> str:
    """The number of the one matrix of a stack that ``weight`` is computed from; "" where it is not one."""
    shape = parameter.meta["val"].shape
    if len(shape) < 3:
        return ""
    between = ancestors([weight])
    indices: set[Any] = set()
    for user in parameter.users:
        if user in between:
            first = user.target is aten.select.int and user.args[1] in (0, -len(shape))
            indices.add(user.args[2] if first else None)
    index = indices.pop() if len(indices) == 1 else None
    return f".{index % shape[0]}" if isinstance(index, int) else ""


def named_links(program: Program, analyses: Analyses) -> dict[str, Link]:
    """Links by name; of two with one name (a layer called twice) neither."""
    weights = analyses.get(weight_values)
    found: dict[str, list[Link]] = {}
    for link in analyses.get(links):
        readers = [
            site_name(program, side.of.weight, weights)
            for side in link.consumers
            if isinstance(side.of, Linear)
        ]
        if readers and all(readers) and len(readers) == len(link.consumers):
            found.setdefault(f"{link.kind}: {', '.join(sorted(readers))}", []).append(link)
    return {name: each[0] for name, each in found.items() if len(each) == 1}
