"""What a model computes under a recipe, without its kernels: every site is replaced by its rounded self.

Migration is exact, so a site may be judged where it stands: it takes its own input apart by the scales and
shifts of its links, rounds, multiplies, and puts its output together again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sparsecc.methods.reference import RoundedSite, rounded_site
from sparsecc.observations import Observations
from sparsecc.observe import arguments
from sparsecc.recipe import Recipe
from sparsecc.watch import At, LinkFacts, watched


class Simulation:
    """A model under one recipe after another; under none it is itself, and while ``paused`` too."""

    def __init__(self, observations: Observations) -> None:
        self.observations = observations
        self.rounded: dict[str, RoundedSite] = {}
        self.base: Recipe | None = None
        self.run: Any = None
        self.paused = False

    def use(self, recipe: Recipe | None, formats: Mapping[str, str] | None = None) -> None:
        """Round by ``recipe`` from now on; ``formats``: site -> its format, where that is not the recipe's."""
        if recipe is not self.base:
            self.base, self.rounded = recipe, {}
        if recipe is None:
            return
        wanted = recipe.sites if formats is None else formats
        # Rounding a weight takes longer than using it: what stays is kept.
        self.rounded = {
            site: known
            if (known := self.rounded.get(site)) is not None and known.form == form
            else rounded_site(self.observations, recipe, site, torch.float32, form)
            for site, form in wanted.items()
        }

    def __call__(self, batch: Any) -> Any:
        """The model's outputs."""
        return self.run(*arguments(batch))

    def graph(self, found: Sequence[str], links: Mapping[str, LinkFacts]) -> None:
        """Of a visitor: nothing to learn."""

    def site(self, at: At, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor | None:
        """Of a visitor: the rounded product instead of the layer's own."""
        layer = None if self.paused else self.rounded.get(at.site)
        if layer is None:
            return None
        result = layer.to(x.device)(x.float())
        return (result if bias is None else result + bias).to(x.dtype)


@contextlib.contextmanager
def simulated(
    model: Any, observations: Observations, options: Mapping[str, Any] | None = None
) -> Iterator[Simulation]:
    """The model as a function of batches; ``use`` says by which recipe. Compiled once for all of them.

    Args:
        observations: of this model, with the same options.
    """
    simulation = Simulation(observations)
    with watched(model, simulation, options) as simulation.run:
        yield simulation


def simulate(
    model: Any,
    recipe: Recipe | None,
    observations: Observations,
    batches: Sequence[Any],
    options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """The model's outputs on ``batches`` under a recipe (None: its own)."""
    with simulated(model, observations, options) as simulation:
        simulation.use(recipe)
        return [simulation(batch) for batch in batches]
