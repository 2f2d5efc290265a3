"""RepQ-ViT: activations rounded for each channel, rewritten as one step for the tensor by scales of the link.

Law     per channel: code = round(x / s_j) + z_j with an integer z_j. For any step t > 0: x' = (x + s_j z_j) t
        / s_j gives round(x' / t) = the same code, so the link takes the scale r_j = s_j / t and the shift −s_j
        z_j.
Source  Li et al. 2023, "RepQ-ViT" (arXiv:2212.08254), eq. 8 to 11, in the symmetric form: codes within ±127
        and none added for the tensor. t: the mean of s_j (RepQ), the median (MOSF: Yang & Gong 2024,
        "DopQ-ViT", arXiv:2408.03291), or the mean of s_j clipped to Q1 − 1.5 IQR … Q3 + 1.5 IQR (ours, after
        "LRP-QViT", arXiv:2401.11243), where clipped channels saturate.
Range   of each channel: percentiles .99, .999 and 1 of the sample rows, whichever has the least squared error
        on them and on the channel's least and largest, which a sample may lack.
Floors  a channel's range counts as at least 1e-5 of the largest in its link; that of a constant channel is its
        value, without a shift.
Pays    as outliertune; ranges are trimmed, so that a few rows do not set the step of a channel. The step t
        itself only divides numbers between scale and step: the codes are those of each channel for every t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sparsecc.errors import CalibrationError, unknown
from sparsecc.methods.common import STATIC, covering, floored, gather, set_steps, start
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.watch import LinkFacts

_PERCENTILES = (1.0, 0.999, 0.99)


def _interquartile(s: torch.Tensor) -> torch.Tensor:
    low, high = torch.quantile(s, 0.25), torch.quantile(s, 0.75)
    return s.clamp(float(low - 1.5 * (high - low)), float(high + 1.5 * (high - low)))


CHOOSERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda s: s.mean(),
    "median": lambda s: s.quantile(0.5),
    "clipped": lambda s: s.mean(),  # of what was clipped before
}


def repq(
    observations: Observations,
    target: str = "mean",
    choose: str = "mse",
    skip: Sequence[str] = (),
) -> Recipe:
    """Static int8, with a step for each channel behind the links.

    The step of the tensor moves into the links with those of the channels, and rows of the weight have scales
    of their own, so that the mean and the median are one recipe here; "clipped" is another.

    Args:
        target: how the step of the tensor is made of those of its channels: "mean", "median" or "clipped".
        choose: how the steps of inputs without a link are chosen: "max", "percentile" or "mse".
    Raises:
        CalibrationError: there is no such target.
    """
    if target not in CHOOSERS:
        raise CalibrationError(unknown("target of repq:", target, CHOOSERS))
    recipe = start("repq", observations, [STATIC], skip, target=target, choose=choose)
    known: dict[str, float] = {}
    for name, link in covering(observations, recipe).items():
        steps, zeros = channel_codes(observations, link)
        if target == "clipped":
            steps = floored(_interquartile(steps))
        step = float(CHOOSERS[target](steps))
        recipe.scales[name] = (steps / step).float()
        if link.carries_shift:
            recipe.shifts[name] = (-steps * zeros).float()
        known |= dict.fromkeys(link.consumers, step)
    set_steps(observations, recipe, choose, known=known)
    return recipe


def channel_codes(observations: Observations, link: LinkFacts) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and the integer zero of every channel, fp64 [link.size]."""
    ends: dict[str, dict[str, torch.Tensor]] = {"low": {}, "high": {}}
    for site in link.consumers:
        seen = observations.input(site)
        x = seen.sample.double()
        least = torch.full((seen.size,), torch.inf, dtype=torch.float64)
        low, high = seen.low.clone(), seen.high.clone()
        for p in _PERCENTILES:
            a, b = (seen.low, seen.high) if p == 1 else (_ranked(x, 1 - p), _ranked(x, p))
            steps, zeros = _codes(a, b, link.carries_shift)
            # The ends are rare in a sample and dear to clip: they count once, a sample row for its share.
            known = torch.cat([x, torch.stack([seen.low, seen.high])])
            codes = ((known / steps).round() + zeros).clamp(-127, 127)
            lost = ((codes - zeros) * steps - known).square()
            error = lost[:-2].sum(0) * (seen.rows / len(x)) + lost[-2:].sum(0)
            low, high = torch.where(error < least, a, low), torch.where(error < least, b, high)
            least = torch.minimum(least, error)
        ends["low"][site], ends["high"][site] = low, high
    low = gather(link, ends["low"], least=True)
    high = gather(link, ends["high"])
    return _codes(low, high, link.carries_shift)


def _ranked(x: torch.Tensor, fraction: float) -> torch.Tensor:
    """The element of each column that a fraction of it does not exceed."""
    return x.kthvalue(1 + round(fraction * (len(x) - 1)), 0)[0]


def _codes(low: torch.Tensor, high: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not shift:
        steps = floored(torch.maximum(low.abs(), high.abs())) / 127
        return steps, torch.zeros_like(steps)
    half = (high - low) / 2
    live = half > 1e-5 * half.max()
    # A constant channel: its value is its range, so that it is not divided by almost nothing.
    half = torch.where(live, half, torch.maximum(low.abs(), high.abs()))
    steps = floored(half) / 127
    return steps, torch.where(live, -((high + low) / 2 / steps).round(), 0.0)
