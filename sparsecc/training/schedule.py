"""The weight of a sparsity loss over training: constant first, then in stages along sine curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SineSchedule:
    """λ(t) of ProSparse (Song et al. 2024, arXiv:2402.13516, progressive sparsity regularization).

    λ₁ in the first stage; in stage i λ(t) = λᵢ₋₁ + ½ (λᵢ − λᵢ₋₁) (sin(π (u − ½)) + 1), where u is how much of
    the stage has passed, between 0 and 1; λ of the last stage after it. Continuous, and flat at the borders.

    Attributes:
        weights: λ₁, λ₂, …, one for each stage.
        ends: the step at which each stage ends.
    """

    weights: Sequence[float]
    ends: Sequence[int]

    def __post_init__(self) -> None:
        if not self.weights or len(self.weights) != len(self.ends):
            raise ValueError(
                f"SineSchedule: a weight and an end for each stage, not {len(self.weights)} weights and "
                f"{len(self.ends)} ends."
            )
        if any(b <= a for a, b in zip((0, *self.ends), self.ends, strict=False)):
            raise ValueError(f"SineSchedule: stages end one after another, not at {self.ends}.")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise ValueError(f"SineSchedule: weights are numbers from 0 on, not {self.weights}.")

    def __call__(self, step: float) -> float:
        """λ at a step, from 0 on."""
        for i, end in enumerate(self.ends):
            if step < end:
                if i == 0:
                    return float(self.weights[0])
                low, high, start = self.weights[i - 1], self.weights[i], self.ends[i - 1]
                passed = (step - start) / (end - start)
                return low + (high - low) * (math.sin(math.pi * (passed - 0.5)) + 1) / 2
        return float(self.weights[-1])
