"""AWQ: channels that matter are scaled up before int4 rounding, and each group keeps the range that serves it.

Law     W x = (W diag(s)) (x / s). s = a^ρ with a_j = mean|x_j|, brought to √(max s · min s) = 1; ρ of 0, 1/20
        … 19/20 is the one with the least Σ ‖(Q(W diag(s)) diag(1/s) − W) X‖² over all layers that read the
        channels. Then, for each group of a row, the weights are clipped to the range, of ten between a half
        and all of it, with the least error of the group's part of the product.
Source  Lin et al. 2023, "AWQ" (arXiv:2306.00978), eq. 4 and 5, §3.2; as released (llm-awq), but for the loss,
        which is of the layers' own outputs and not of the block's. Rows of q and k are not clipped.
Floors  s is at least 1e-4 before it is centred.
Pays    int4 weights with float activations: the same bytes as int4, nearer to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsecc.methods.common import columns, gather, migrated, start
from sparsecc.methods.int4 import formats
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.formats import Format, dequantize, quantize
from sparsecc.runtime.ops.rounded_weight import clipped
from sparsecc.watch import LinkFacts

STEPS = 20
CLIPS = 10  # 1, 0.95 … 0.55 of the range
_LEAST = 1e-4
_BLOCK = 1024  # rows of a weight at a time


def awq(
    observations: Observations,
    group: int = 128,
    zero: bool = True,
    activations: str = "float",
    scale: bool = True,
    clip: bool = True,
    skip: Sequence[str] = (),
) -> Recipe:
    """Scales by search, clips by search, int4.

    Args:
        group, zero, activations: of the format, as for int4.
        scale, clip: whether to search for each.
    """
    options: dict[str, Any] = {"group": group, "zero": zero, "activations": activations}
    options |= {"scale": scale, "clip": clip}
    recipe = start("awq", observations, formats(group, zero, activations), skip, **options)
    for name, link in observations.movable().items() if scale else ():
        found = searched(observations, recipe, link)
        if found is not None:
            recipe.scales[name] = found
    for site, form in recipe.sites.items() if clip else ():
        if Format.of(form).kind == "int4":
            recipe.clips[site] = clips(observations, recipe, site)
    return recipe


def searched(observations: Observations, recipe: Recipe, link: LinkFacts) -> torch.Tensor | None:
    """The scales of one link, fp32 [link.size]; None where none does better than one."""
    readers = [site for site in link.consumers if site in recipe.sites]
    if not readers:
        return None
    mean = gather(link, {s: observations.input(s).mean_magnitude for s in link.consumers})
    best, least = None, torch.inf
    samples = {site: observations.input(site).sample for site in readers}
    for i in range(STEPS):
        s = centred(mean ** (i / STEPS))
        loss = sum(
            _loss(
                observations.weight(site),
                samples[site],
                recipe.sites[site],
                link.consumers[site],
                s,
            )
            for site in readers
        )
        if loss < least:
            best, least = (s if i else None), loss
    return None if best is None else best.float()


def centred(s: torch.Tensor) -> torch.Tensor:
    """``s`` above its floor, and its largest and least equally far from one."""
    s = s.clamp(min=_LEAST)
    return s / (s.max() * s.min()).sqrt()


def _loss(
    weight: torch.Tensor, x: torch.Tensor, form: str, channels: Sequence[int], s: torch.Tensor
) -> float:
    """‖(Q(W diag(s)) diag(1/s) − W) X‖² of one layer, fp32."""
    index = torch.tensor(channels, dtype=torch.int64)
    by = torch.where(index < 0, 1.0, s[index.clamp(min=0)]).float()
    kept = dequantize(form, quantize(weight * by, form), torch.float32) / by
    return float((x @ (kept - weight).T).double().square().sum())


def clips(observations: Observations, recipe: Recipe, site: str) -> torch.Tensor:
    """The share of its largest magnitude that each group of a row keeps, fp32 [N, groups]; q and k keep all."""
    form = Format.of(recipe.sites[site])
    weight = migrated(observations, recipe, site).float()
    scale, shift = (v.float() for v in columns(observations, recipe, site))
    x = (observations.input(site).sample - shift) / scale
    grouped = x.unflatten(1, (-1, form.group)).transpose(0, 1).double()  # [groups, rows, group]
    gram = (grouped.mT @ grouped).float()
    free = not_scored(observations, site)
    found = [
        _clip(block, gram, form.name, rows)
        for block, rows in zip(weight.split(_BLOCK), free.split(_BLOCK), strict=True)
    ]
    return torch.cat(found)


def _clip(weight: torch.Tensor, gram: torch.Tensor, form: str, free: torch.Tensor) -> torch.Tensor:
    groups, size = gram.shape[:2]
    split = weight.unflatten(1, (groups, size))  # [n, groups, group]
    best = torch.ones_like(split[..., 0])
    least = torch.full_like(best, torch.inf)
    for i in range(CLIPS):
        share = torch.full_like(best, 1 - i / STEPS)
        kept = dequantize(form, quantize(clipped(weight, share), form), torch.float32)
        wrong = (kept.unflatten(1, (groups, size)) - split).transpose(0, 1)  # [groups, n, group]
        error = ((wrong @ gram) * wrong).sum(-1).T
        better = error < least
        best, least = torch.where(better, share, best), torch.minimum(error, least)
    return torch.where(free[:, None], best, 1.0)


def not_scored(observations: Observations, site: str) -> torch.Tensor:
    """Which rows are neither q nor k, bool [N]."""
    free = torch.ones(observations.sites[site].shape[0], dtype=torch.bool)
    for link in observations.links.values():
        if link.kind == "q-k":
            for side in (link.consumers, link.producers):
                if site in side:
                    free &= torch.tensor(side[site]) < 0
    return free
