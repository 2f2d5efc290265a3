"""Floating-point numbers of a few bits: a sign, E bits of exponent, M of fraction. All codes are finite.

Law     max = (2 − 2^−M) 2^(2^E − 1). For |y| ≤ max: p = max(⌊log2|y|⌋, 1), step = 2^(p − M), ŷ = round(y /
        step) step, ties to even. E2M1 has ±{0, 1, 2, 3, 4, 6, 8, 12}. A real-valued exponent bias b is a scale:
        x̂ = 2^−b ŷ(2^b x), and an integer k more in it moves the point by k places, exactly.
Source  Liu et al. 2023, "LLM-FP4" (arXiv:2310.16836), §3 (bias b, without codes for infinities and NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Minifloat:
    """E bits of exponent (two or more), M of fraction."""

    exponent: int
    fraction: int

    @property
    def largest(self) -> float:
        return (2 - 2.0**-self.fraction) * 2.0 ** ((1 << self.exponent) - 1)

    def rounded(self, y: torch.Tensor) -> torch.Tensor:
        """The nearest numbers of this kind, in y's dtype; beyond the largest, the largest. NaN stays."""
        y = y.clamp(-self.largest, self.largest)
        step = self._steps(y)
        found: torch.Tensor = (y / step).round() * step
        return found

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """The codes of numbers of this kind, uint8: sign, exponent, fraction, from the highest bit on."""
        size, step = numbers.abs(), self._steps(numbers)
        octave = torch.zeros_like(size)
        for p in range(2, 1 << self.exponent):
            octave = octave + (size >= 2.0**p)
        code = octave * (1 << self.fraction) + size / step
        return (code + (numbers < 0) * 2.0 ** (self.exponent + self.fraction)).to(torch.uint8)

    def numbers(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of codes; a zero has no sign."""
        code = codes.to(torch.int32)
        exponent = (code >> self.fraction) & ((1 << self.exponent) - 1)
        fraction = code & ((1 << self.fraction) - 1)
        whole = torch.where(exponent > 0, fraction | (1 << self.fraction), fraction)
        size = whole << (exponent - 1).clamp(min=0)
        signed = torch.where(code >> (self.exponent + self.fraction) > 0, -size, size)
        return signed.to(dtype) * 2.0 ** (1 - self.fraction)

    def _steps(self, y: torch.Tensor) -> torch.Tensor:
        """By comparisons, which are exact, and know what to do with 0."""
        size = y.abs()
        step = torch.full_like(size, 2.0 ** (1 - self.fraction))
        for p in range(2, 1 << self.exponent):
            step = torch.where(size >= 2.0**p, 2.0 ** (p - self.fraction), step)
        return step


E2M1 = Minifloat(2, 1)
