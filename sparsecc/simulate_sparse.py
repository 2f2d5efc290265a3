"""What a model computes under a recipe of sparsity, without compiling it: dead values are set to zero."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sparsecc.observe import arguments
from sparsecc.observe_ffn import unraised
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.sparse_ffn import Spec, selected
from sparsecc.watch import At, FFNAt, LinkFacts, watched

LAWS = ("activation", "hidden", "top", "prune", "input")


class SparseSimulation:
    """A model under one recipe after another; under none it is itself, and while ``paused`` too.

    Attributes:
        sites: of the graphs that have run.
    """

    def __init__(self) -> None:
        self.sites: set[str] = set()
        self.recipe: Recipe | None = None
        self.run: Any = None
        self.paused = False

    def use(self, recipe: Recipe | None, formats: Mapping[str, str] | None = None) -> None:
        """Leave out what ``recipe`` says from now on; its ``sites`` and ``formats`` are not looked at."""
        del formats
        self.recipe = recipe

    def __call__(self, batch: Any) -> Any:
        """The model's outputs."""
        return self.run(*arguments(batch))

    def graph(self, found: Sequence[str], links: Mapping[str, LinkFacts]) -> None:
        """Of a visitor: which sites there are."""
        self.sites.update(found)

    def site(self, at: At, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor | None:
        """Of a visitor: the product with what is left of its input."""
        law, limit = self._law(at.site), self._limit(at.site, x)
        if law != "input" or limit is None:
            return None
        return torch.nn.functional.linear(x.masked_fill(x.abs() <= limit, 0.0), weight, bias)

    def ffn(
        self, at: FFNAt, a: torch.Tensor, h: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor | None:
        """Of a visitor: what is left of the hidden values."""
        law, limit = self._law(at.site), self._limit(at.site, h)
        if law == "activation" and limit is not None:
            return h.masked_fill(a.abs() <= limit, 0.0)
        if law == "hidden" and limit is not None:
            return h.masked_fill(h.abs() <= limit, 0.0)
        if not law or self.recipe is None:
            return None
        if law == "prune":
            gone = torch.ones(h.shape[-1], dtype=torch.bool, device=h.device)
            gone[self.recipe.neurons[at.site].to(h.device)] = False
            return h.masked_fill(gone, 0.0)
        if law == "top":
            k = self.recipe.sparsity[at.site]["k"]
            return h.masked_fill(selected(Spec("p0", "a", select=f"top {k}"), a) == 0, 0.0)
        return None

    def not_shown(self, site: str) -> None:
        """Of a visitor: no recipe is carried out there."""

    def _law(self, site: str) -> str:
        if self.recipe is None or self.paused or site not in self.recipe.sparsity:
            return ""
        return str(self.recipe.sparsity[site]["law"])

    def _limit(self, site: str, like: torch.Tensor) -> torch.Tensor | None:
        known = None if self.recipe is None else self.recipe.thresholds.get(site)
        return None if known is None else known.to(like)


@contextlib.contextmanager
def simulated_sparse(
    model: Any, options: Mapping[str, Any] | None = None
) -> Iterator[SparseSimulation]:
    """The model as a function of batches; ``use`` says under which recipe. Compiled once for all of them."""
    simulation = SparseSimulation()
    with watched(model, simulation, unraised(options)) as simulation.run:
        yield simulation
