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
from sparsecc.program import Program
from sparsecc.runtime.ops.few_rows import Spec, few_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One weight matrix that a product reads.

    Attributes:
        name: the parameters that it is computed from, matrices alone, joined by "+".
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
    return "+".join(sorted(program.slots[p.name].fqn for p in read))


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
