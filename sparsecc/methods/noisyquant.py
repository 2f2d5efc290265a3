"""NoisyQuant: fixed noise is added to activations before they are rounded, and taken out behind the weight.

Law     Q(x + N) W'ᵀ + (b − W N) ≈ x Wᵀ + b, one vector N over the channels for all tokens. It is the shift
        z = −N of a link: producers add N, biases take W z. N_j = m + a u_j, u_j uniform on [−1, 1]. Mean m,
        then range a, are those with the least squared error of the readers' outputs on the sample.
Source  Liu et al. 2023, "NoisyQuant" (arXiv:2211.16056), §3.2 and 3.3; Theorem 1 says when it helps. Noise is
        uniform as in the paper (its released code draws 2 N(0, 1) − 1).
Floors  a channel that is always 0 gets no noise: it is exact as it is.
Legal   where a link carries a shift, and holds every column of its readers; other inputs stay those of w8a8.
        A LayerNorm that became an RMSNorm carries none: disable layernorm-to-rmsnorm and fold-norm-affine.
Pays    static int8 of values that crowd between two codes, or lie on one side of 0. Nothing at run time. N
        stays 0 where it does not lower the error of both halves of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecc.methods.common import (
    STATIC,
    covering,
    gather,
    rounded,
    set_steps,
    spread,
    start,
    step_of,
)
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats
from sparsecc.statistics import Statistics
from sparsecc.watch import LinkFacts

MEANS = 10  # how many shares of the way that centres the tensor, and how many parts of a step
RANGES = 20  # tenths of a step


def noisyquant(
    observations: Observations,
    choose: str = "max",
    percentile: float = 0.9999,
    seed: int = 0,
    skip: Sequence[str] = (),
) -> Recipe:
    """Static int8 with noise on the links that carry a shift.

    Args:
        choose: how steps are chosen, with the noise in place: "max", "percentile" or "mse".
        percentile: of "percentile".
        seed: of the noise.
    """
    options = {"choose": choose, "percentile": percentile, "seed": seed}
    recipe = start("noisyquant", observations, [STATIC], skip, **options)
    for name, link in covering(observations, recipe).items():
        if link.carries_shift:
            found = _Search(observations, recipe, link, choose, percentile).best(seed)
            if found is not None:
                recipe.shifts[name] = -found
    set_steps(observations, recipe, choose, percentile)
    return recipe


@dataclass
class _Input:
    """A value that readers of a link read, with their weights: rows are divided by the norm of their output.

    Attributes:
        statistics: of the value.
        channels: of its columns.
        weight, kept: of all its readers, as it is and rounded, fp64 [N, K].
    """

    statistics: Statistics
    channels: Sequence[int]
    weight: torch.Tensor
    kept: torch.Tensor


class _Search:
    """Over the noise of one link."""

    def __init__(
        self,
        observations: Observations,
        recipe: Recipe,
        link: LinkFacts,
        choose: str,
        percentile: float,
    ) -> None:
        self.choose, self.percentile = choose, percentile
        seen = {site: observations.input(site) for site in link.consumers}
        self.low = gather(link, {site: s.low for site, s in seen.items()}, least=True)
        self.high = gather(link, {site: s.high for site, s in seen.items()})
        groups: dict[str, list[str]] = {}
        for site in link.consumers:
            if site in recipe.sites:
                groups.setdefault(observations.sites[site].groups[0], []).append(site)
        self.inputs: list[_Input] = []
        for first, *others in groups.values():
            weights, kept = [], []
            for site in (first, *others):
                weight = observations.weight(site).double()
                norm = float((seen[site].sample.double() @ weight.T).norm()) or 1.0
                codes = formats.quantize(weight, STATIC)
                weights.append(weight / norm)
                kept.append(formats.dequantize(STATIC, codes, torch.float64) / norm)
            channels = link.consumers[first]
            self.inputs.append(_Input(seen[first], channels, torch.cat(weights), torch.cat(kept)))

    def best(self, seed: int) -> torch.Tensor | None:
        """N, fp32 [channels]; None where none does better than 0."""
        generator = torch.Generator().manual_seed(seed)
        unit = 2 * torch.rand(len(self.low), generator=generator, dtype=torch.float64) - 1
        live = (self.low < 0) | (self.high > 0)
        none = torch.zeros_like(unit)
        step, base = max(self._step(each, none) for each in self.inputs), self._losses(none)
        middle = float(self.high.max() + self.low.min()) / 2
        means = [-middle * (i + 1) / MEANS for i in range(MEANS)]
        means += [step * (i / MEANS - 0.5) for i in range(MEANS + 1)]
        tried: list[tuple[float | None, float]] = [(mean, 0.0) for mean in means]
        tried += [(None, step * (i + 1) / 10) for i in range(RANGES)]

        best, least, mean = None, float(base.sum()), 0.0
        for centre, width in tried:
            around = mean if centre is None else centre
            noise = torch.where(live, around + width * unit, 0.0).float()
            losses = self._losses(noise.double())
            if bool((losses < base).all()) and float(losses.sum()) < least:
                best, least, mean = noise, float(losses.sum()), around
        return best

    def _step(self, each: _Input, noise: torch.Tensor) -> float:
        shift = spread(each.channels, -noise, 0.0)
        one = torch.ones_like(shift)
        return step_of(each.statistics, one, shift, self.choose, self.percentile)

    def _losses(self, noise: torch.Tensor) -> torch.Tensor:
        """Σ ‖Ŷ − Y‖² / ‖Y‖² over the readers, of the even and of the odd rows of the sample, fp64 [2]."""
        found = torch.zeros(2, dtype=torch.float64)
        for each in self.inputs:
            y = each.statistics.sample.double() + spread(each.channels, noise, 0.0)
            seen = rounded(y, self._step(each, noise))
            wrong = (seen @ each.kept.T - y @ each.weight.T).square().sum(-1)
            found += torch.stack([wrong[::2].sum(), wrong[1::2].sum()])
        return found
