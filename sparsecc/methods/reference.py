"""What a recipe makes of one layer, in plain arithmetic: the reference for passes, searches and simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sparsecc.methods.common import columns, migrated, rounded, rows
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.minifloat import E2M1
from sparsecc.runtime.ops.rounded_weight import quantized


@dataclass
class RoundedSite:
    """One layer under a recipe, as a function of its own input: y = r ⊙ (Q(x') Q(W')ᵀ + x' Vᵀ Uᵀ) + W z.

    Attributes:
        form: the format.
        weight: what the format keeps of W', [N, K].
        scale, shift: s and z of the columns, [K].
        rows: r, [N].
        behind: W z, [N].
        step: of static activations.
        correction: U and V.
    """

    form: str
    weight: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    rows: torch.Tensor
    behind: torch.Tensor
    step: float
    correction: tuple[torch.Tensor, torch.Tensor] | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] of [..., K], without the layer's own bias."""
        y = (x - self.shift) / self.scale
        result = F.linear(self.seen(y), self.weight)
        if self.correction is not None:
            result = result + y @ self.correction[1].T @ self.correction[0].T
        return result * self.rows + self.behind

    def to(self, device: torch.device) -> RoundedSite:
        """The same on a device; moved once."""
        if self.weight.device != device:
            for name in ("weight", "scale", "shift", "rows", "behind"):
                setattr(self, name, getattr(self, name).to(device))
            if self.correction is not None:
                self.correction = (self.correction[0].to(device), self.correction[1].to(device))
        return self

    def seen(self, y: torch.Tensor) -> torch.Tensor:
        """What rounding leaves of the activations."""
        form = formats.Format.of(self.form)
        if not form.rounds_activations:
            return y
        if form.kind == "fp4":
            return E2M1.rounded(y / self.step) * self.step
        if form.static:
            return rounded(y, self.step)
        q, scale = formats.quantize_activations(y, form)
        return (q * scale).flatten(-2)


def rounded_site(
    observations: Observations,
    recipe: Recipe,
    site: str,
    dtype: torch.dtype = torch.float64,
    form: str | None = None,
) -> RoundedSite:
    """The layer ``site`` under ``recipe``, in ``dtype``; ``form``: another format than the recipe's."""
    chosen = form or recipe.sites[site]
    own = chosen == recipe.sites.get(site)
    weight = migrated(observations, recipe, site)
    clip = recipe.clips.get(site) if own else None
    grid = (recipe.grids.get(site) if own else None) or (None, None)
    tensors = quantized(weight, clip, chosen, *grid)
    kept = formats.dequantize(chosen, tensors, torch.float64)
    scale, shift = columns(observations, recipe, site)
    correction = recipe.corrections.get(site) if own else None
    return RoundedSite(
        chosen,
        kept.to(dtype),
        scale.to(dtype),
        shift.to(dtype),
        rows(observations, recipe, site).to(dtype),
        (observations.weight(site).double() @ shift).to(dtype),
        recipe.activations.get(site, 1.0),
        None if correction is None else (correction[0].to(dtype), correction[1].to(dtype)),
    )


def errors_of(
    observations: Observations, recipe: Recipe, site: str, forms: Sequence[str]
) -> list[float]:
    """‖Ŷ − Y‖² / ‖Y‖² of one layer's output in each format, on the sample rows, fp64; 0 where both are 0."""
    x = observations.input(site).sample.double()
    exact = x @ observations.weight(site).double().T
    whole = float(exact.square().sum())
    found = []
    for form in forms:
        got = rounded_site(observations, recipe, site, form=form)(x)
        wrong = float((got - exact).square().sum())
        found.append(wrong / whole if whole else float(wrong > 0))
    return found


def apply(observations: Observations, recipe: Recipe) -> dict[str, float]:
    """Site -> the relative root-mean-square error of its output on the sample rows, fp64."""
    return {
        site: errors_of(observations, recipe, site, [form])[0] ** 0.5
        for site, form in recipe.sites.items()
    }
