"""CFSP: neurons of feed-forward networks pruned, more of them in blocks that change their input less.

Law     keep_l = (1 − p) u_l / mean(u), u_l = σ(a (I_l − mean(I))), with I_l how far block l turns its input;
        of network l the neurons with the largest Sⱼ = meanᵢ(W̄_d + W̄_u + W̄_g)ᵢⱼ Aⱼᶜ stay, with Aⱼ = ‖hⱼ‖₂ over
        the calibration tokens and W̄ᵢⱼ = |Wᵢⱼ| / Σⱼ|Wᵢⱼ| (of the down projection |W_d|ᵢⱼ Aⱼᵇ), each [d, F].
Source  Wang et al. 2025, "CFSP" (arXiv:2409.13199): coarse importance of blocks, fine importance of neurons.
        The sums over j are ours: they make a weight relative to the others that meet in one feature. The
        published code divides by sums over i; then the mean over i is 1/d for each, and Aⱼ alone decides.
Pays    the pruned share of a feed-forward network at every batch size, where some quality may be lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sparsecc.errors import CalibrationError, unknown
from sparsecc.methods.common import not_skipped, start
from sparsecc.methods.neurons import share
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe


def cfsp(
    observations: Observations,
    networks: Mapping[str, Sequence[str]],
    sparsity: float = 0.2,
    importance: Mapping[str, float] | None = None,
    amplification: float = 25.0,
    multiple: int = 128,
    norm_power: float = 1.0,
    down_power: float = 1.0,
    skip: Sequence[str] = (),
) -> Recipe:
    """The recipe that keeps the most important neurons of each network.

    Args:
        networks: down projection -> the layers before it (:func:`sparsecc.networks.networks`).
        sparsity: p, the share of all neurons to prune.
        importance: name of a block -> I_l (:func:`sparsecc.networks.block_angles`); a network belongs to the
            block in whose name its own begins. None: all networks keep the same share.
        amplification: a, for mean angles; the paper's sum over n tokens, divided by 10⁴, is a = n / 10⁴.
        multiple: what widths are rounded to, for kernels that read neurons in groups.
        norm_power: c.
        down_power: b.
        skip: patterns of sites; networks whose down projection is among them are left alone.
    Returns:
        A recipe with ``sparsity`` (law "prune") and ``neurons`` (int64 ascending) of every down projection
        that loses neurons; ``about["whole"]`` names the others.
    Raises:
        CalibrationError: an argument is out of its range, a network or block is not of these observations, or
            a pattern matches nothing.
    """
    _check(observations, networks, sparsity, multiple)
    given = {"sparsity": sparsity, "amplification": amplification, "multiple": multiple}
    powers = {"norm_power": norm_power, "down_power": down_power}
    recipe = start("cfsp", observations, (), skip, **given, **powers)
    chosen = not_skipped(networks, skip)
    recipe.about["whole"] = []
    angles = None if importance is None else [_of_block(name, importance) for name in chosen]
    shares = allocate(angles or [0.0] * len(chosen), sparsity, amplification)
    for name, part in zip(chosen, shares, strict=True):
        scores = neuron_scores(observations, name, networks[name], norm_power, down_power)
        size = len(scores)
        count = _width(part * size, size, multiple)
        if count == size:
            recipe.about["whole"].append(name)
            continue
        # Of equal scores the first stay.
        best = scores.argsort(stable=True, descending=True)[:count]
        recipe.neurons[name] = best.sort().values
        recipe.sparsity[name] = {"law": "prune", "keep": count / size}
    return recipe


def allocate(angles: Sequence[float], prune: float, amplification: float) -> list[float]:
    """The share that each network keeps, 1 − ``prune`` on average, none above 1."""
    if not angles:
        return []
    middle = sum(angles) / len(angles)
    raw = [
        1 / (1 + math.exp(-min(500.0, max(-500.0, amplification * (a - middle))))) for a in angles
    ]
    mean = sum(raw) / len(raw)
    if (1 - prune) * max(raw) / mean >= 1 and max(raw) > mean:
        # Deviations shrink until the largest share is below 1, by 5 % of what it may add.
        shrink = mean * (1 / (1 - prune) - 1) / ((max(raw) - mean) * 1.05)
        raw = [mean + (value - mean) * shrink for value in raw]
    return [(1 - prune) * value / mean for value in raw]


def neuron_scores(
    observations: Observations,
    down: str,
    before: Sequence[str],
    norm_power: float = 1.0,
    down_power: float = 1.0,
) -> torch.Tensor:
    """S of every neuron of a network, fp64 [F]; 0 where a neuron never fired."""
    norms = observations.input(down).squares.sqrt()  # Aⱼ
    weight = observations.weight(down).double().abs()
    found = _relative(weight * norms**down_power)
    size = weight.shape[1]
    for site in before:
        rows = (
            observations.weight(site).double().abs()
        )  # [F, d], or [2F, d] of gate and up together
        for part in rows.split(size):
            found = found + _relative(part.T)
    return found * norms**norm_power


def _relative(weight: torch.Tensor) -> torch.Tensor:
    """The mean over rows i of |Wᵢⱼ| / Σⱼ|Wᵢⱼ|, [F]; a row of zeros says nothing."""
    whole = weight.sum(1, keepdim=True)
    return torch.where(whole > 0, weight / whole, 0.0).mean(0)


def _width(wanted: float, size: int, multiple: int) -> int:
    """The nearest multiple, at least one of them and at most all neurons."""
    return min(size, max(multiple, round(wanted / multiple) * multiple))


def _of_block(name: str, importance: Mapping[str, float]) -> float:
    blocks = [block for block in importance if name.startswith(f"{block}.")]
    if not blocks:
        raise CalibrationError(
            f"{name} is in none of the blocks {', '.join(importance) or '(none)'}."
        )
    return float(importance[max(blocks, key=len)])


def _check(
    observations: Observations,
    networks: Mapping[str, Sequence[str]],
    sparsity: float,
    multiple: int,
) -> None:
    if share("sparsity", sparsity) == 1:
        raise CalibrationError("cfsp: sparsity is a share from 0 to below 1, not 1.")
    if multiple < 1 or multiple != int(multiple):
        raise CalibrationError(f"cfsp: multiple is a whole number above 0, not {multiple}.")
    if not networks:
        raise CalibrationError("cfsp: there are no networks to prune.")
    for down, before in networks.items():
        for site in (down, *before):
            if site not in observations.sites:
                raise CalibrationError(unknown("site", site, observations.sites))
        size = observations.sites[down].shape[1]
        rows = [observations.sites[site].shape[0] for site in before]
        if rows not in ([size], [size, size], [2 * size]):
            raise CalibrationError(
                f"{', '.join(before)} are not the layers before {down}: they make {rows} features, and it "
                f"reads {size}."
            )
