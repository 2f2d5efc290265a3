"""LLM-FP4: weights and activations as floats of four bits (E2M1), with exponent biases that are real numbers.

Law     x ≈ 2^−b E2M1(2^b x), one b for the tensor; w ≈ 2^−c E2M1(2^c w), one c for each row. From max|x|:
        b = 2^E − log2 max|x| + log2(2 − 2^−M) − 1, which makes it the largest code; then b and c are searched
        among γ b, γ of 1 and of 100 from 0.01 to 1.2, in turns, by the squared error of the output on the
        sample. Pre-shifted exponents: channel j has k_j = clip(round(b_j) − round(min b), 0, 2^E − 1) more, as
        the scale s_j = 2^−k_j of a link: E2M1(x_j; b + k_j) = 2^−k_j E2M1(2^k_j x_j; b), to the bit.
Source  Liu et al. 2023, "LLM-FP4" (arXiv:2310.16836), §3 and §4 (pre-shifted exponent bias). No format but
        E2M1 is tried. γ b says little where b is near 0: there |b| counts as 4 (ours). What moves the largest
        code by more than an octave up or one and a half down is not tried.
Legal   k_j behind links that hold every column of their readers; other inputs have b alone. Rows of an odd
        number of weights become int8.
Pays    no time here: no kernel multiplies E2M1, and the arithmetic is emulated. Weights take an eighth of
        fp32's bytes. It says what hardware with FP4 products would make of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecc.errors import CalibrationError
from sparsecc.methods.common import (
    columns,
    covering,
    floored,
    group_of,
    largest_inputs,
    migrated,
    start,
)
from sparsecc.observations import Observations
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.minifloat import E2M1

CANDIDATES = 100
RANGE = (0.01, 1.2)  # of γ
_OCTAVES = (-1.0, 1.5)  # of the bias, around that of the largest magnitude
_LEAST_BIAS = 4.0


def llm_fp4(
    observations: Observations,
    activations: bool = True,
    shift: bool = True,
    rounds: int = 3,
    skip: Sequence[str] = (),
) -> Recipe:
    """E2M1 for every site.

    Args:
        activations: round them, too; otherwise weights alone.
        shift: pre-shift the exponents of channels.
        rounds: how often weights and activations take turns; 0 leaves the biases of the largest magnitudes.
    Raises:
        CalibrationError: fewer rounds than none.
    """
    if rounds < 0:
        raise CalibrationError(f"llm_fp4: rounds must be 0 or more, not {rounds}.")
    form = "fp4" if activations else "fp4w"
    options = {"activations": activations, "shift": shift, "rounds": rounds}
    recipe = start("llm_fp4", observations, [form, "int8"], skip, **options)
    for name, link in covering(observations, recipe).items() if activations and shift else ():
        places = preshift(largest_inputs(observations, link))
        if bool(places.any()):
            recipe.scales[name] = 1.0 / (torch.ones_like(places) << places)  # exact
    for members in group_of(observations, recipe).values():
        chosen = [site for site in members if recipe.sites[site] == form]
        if chosen:
            _Search(observations, recipe, chosen).run(rounds)
    return recipe


def preshift(largest: torch.Tensor) -> torch.Tensor:
    """k of every channel, int32: how many places its exponent moves.

    Args:
        largest: max|x| of every channel, fp64 [channels].
    """
    biases = math.log2(E2M1.largest) - floored(largest).log2()
    places = biases.round() - biases.min().round()
    return places.clamp(0, (1 << E2M1.exponent) - 1).to(torch.int32)


def offsets(bias: torch.Tensor) -> torch.Tensor:
    """By how much candidates differ from ``bias`` (any shape but []), fp64 [candidates, …]; the first by 0."""
    gamma = torch.linspace(*RANGE, CANDIDATES, dtype=torch.float64)
    apart = (gamma - 1).view(-1, *[1] * bias.dim()) * bias.double().abs().clamp(min=_LEAST_BIAS)
    found = torch.where((apart > _OCTAVES[0]) & (apart < _OCTAVES[1]), apart, 0.0)
    used = found.flatten(1).any(1)
    return torch.cat([torch.zeros_like(found[:1]), found[used]])


@dataclass
class _Reader:
    """A layer: what it reads and computes, on the sample.

    Attributes:
        x: [rows, K] fp32, behind scales.
        weight: [N, K] fp32, likewise.
        exact: x Wᵀ.
        largest: of every row, [N, 1]; above 0.
        share: what the largest code of a row stands for, of the row's largest magnitude, [N, 1].
    """

    site: str
    x: torch.Tensor
    weight: torch.Tensor
    exact: torch.Tensor
    largest: torch.Tensor
    share: torch.Tensor

    def kept(self, share: torch.Tensor) -> torch.Tensor:
        """What the format keeps of the weight, without packing it."""
        scale = self.largest * share / E2M1.largest
        return E2M1.rounded(self.weight / scale) * scale


class _Search:
    """Over the biases of layers that read one input."""

    def __init__(self, observations: Observations, recipe: Recipe, sites: Sequence[str]) -> None:
        self.recipe, largest = recipe, 0.0
        self.readers: list[_Reader] = []
        self.rounds_activations = recipe.sites[sites[0]] == "fp4"
        for site in sites:
            scale, _ = columns(observations, recipe, site)
            statistics = observations.input(site)
            largest = max(largest, float((statistics.largest / scale).max()))
            x = (statistics.sample.double() / scale).float()
            weight = migrated(observations, recipe, site).float()
            rows = weight.abs().amax(1, keepdim=True)
            rows = torch.where(rows > 0, rows, 1.0)
            share = torch.ones_like(rows)
            self.readers.append(_Reader(site, x, weight, x @ weight.T, rows, share))
        self.step = self.whole = largest / E2M1.largest if largest > 0 else 1.0

    def run(self, rounds: int) -> None:
        """Search, and write what was found into the recipe."""
        for _ in range(rounds):
            before = self.step, [reader.share for reader in self.readers]
            for reader in self.readers:
                reader.share = self._best_share(reader)
            if not self.rounds_activations:
                break  # weights are rounded for the same input in every turn
            self.step = self._best_step()
            same = all(
                torch.equal(r.share, s) for r, s in zip(self.readers, before[1], strict=True)
            )
            if same and self.step == before[0]:
                break
        for reader in self.readers:
            if rounds:
                self.recipe.clips[reader.site] = reader.share
            if self.rounds_activations:
                self.recipe.activations[reader.site] = self.step

    def _seen(self, x: torch.Tensor, step: float) -> torch.Tensor:
        return E2M1.rounded(x / step) * step if self.rounds_activations else x

    def _best_share(self, reader: _Reader) -> torch.Tensor:
        """Of every row the candidate with the least error of its output."""
        biases = math.log2(E2M1.largest) - reader.largest.double().log2()
        shares = torch.exp2(-offsets(biases)).float()
        seen = self._seen(reader.x, self.step)
        best, least = reader.share, torch.full_like(reader.share, torch.inf)
        for share in shares:
            wrong = seen @ reader.kept(share).T - reader.exact
            error = wrong.square().sum(0)[:, None]
            best = torch.where(error < least, share, best)
            least = torch.minimum(error, least)
        return best

    def _best_step(self) -> float:
        """The candidate with the least error of all outputs, each relative to its own size."""
        bias = torch.tensor([-math.log2(self.whole)], dtype=torch.float64)
        steps = [self.whole * math.exp2(-float(offset)) for offset in offsets(bias)]
        kept = [reader.kept(reader.share) for reader in self.readers]

        def error(step: float) -> float:
            found = 0.0
            for reader, weight in zip(self.readers, kept, strict=True):
                wrong = self._seen(reader.x, step) @ weight.T - reader.exact
                size = float(reader.exact.double().square().sum()) or 1.0
                found += float(wrong.double().square().sum()) / size
            return found

        return min(steps, key=error)
