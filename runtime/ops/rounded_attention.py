"""Attention with rounded probabilities: quantizers for what softmax makes, and the operators that apply them.

Law     "log-sqrt2": q = round(−2 log2(p / s)) of 0 … 2^b − 1, and p̂ = s 2^(−q/2) = s 2^−⌈q/2⌉ (1 + (q mod 2)
        (√2 − 1)), so that a kernel needs two shifted sums and one multiplication; 0 where q would be more.
        "sulq": q = round(log2(p / η + 1) / Δ), p̂ = 2^round(qΔ + log2 η) − η, Δ = log2(1 + 1/η) / (2^b − 1), so
        that P̂ v = Σ v ≪ e − η Σ v.
        "tanq": q = round((2^b − 1) tan(a p) / tan a), p̂ = atan(q tan(a) / (2^b − 1)) / a.
Source  Li et al. 2023, "RepQ-ViT" (arXiv:2212.08254); Zhong et al. 2023, "I&S-ViT" (arXiv:2311.10126), here for
        the range of probabilities, 0 … 1; Yang et al. 2024, "DopQ-ViT" (arXiv:2408.03291), whose idea of finer
        codes near 1 the last is, with a formula of ours.
Pays    nothing here: rounding is emulated.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsecc.runtime.ops.define import define_meaning

# law -> what its parameter is by default, and what it must lie between.
LAWS: Mapping[str, tuple[float, float, float]] = {
    "log-sqrt2": (1.0, 0.0, 1.0),  # s: no probability is larger
    "sulq": (2.0**-10, 0.0, 1.0),  # η; where it is a power of two, 0 stays 0
    "tanq": (1.2, 0.0, math.pi / 2),  # a
}
BITS = (2, 8)


@dataclass(frozen=True)
class Rounding:
    """How probabilities are rounded.

    Attributes:
        law: one of ``LAWS``.
        bits: 2 to 8.
        parameter: s, η or a.
    """

    law: str
    bits: int
    parameter: float

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Rounding:
        """Of {"law": …, "bits": …, "parameter": …}; 4 bits and the law's own parameter unless given.

        Raises:
            ValueError: a name or a number is none of those.
        """
        unknown = set(given) - {"law", "bits", "parameter"}
        law, bits = str(given.get("law")), given.get("bits", 4)
        if unknown or law not in LAWS:
            raise ValueError(
                f"attention is {{'law': one of {', '.join(LAWS)}, 'bits', 'parameter'}}, not {dict(given)}"
            )
        usual, low, high = LAWS[law]
        parameter = float(given.get("parameter", usual))
        if not isinstance(bits, int) or not BITS[0] <= bits <= BITS[1]:
            raise ValueError(f"{law}: bits are {BITS[0]} to {BITS[1]}, not {bits!r}")
        if not low < parameter <= high or parameter == math.pi / 2:
            raise ValueError(f"{law}: parameter must be above {low} and up to {high:.3g}")
        return cls(law, bits, parameter)

    @classmethod
    @functools.cache
    def read(cls, text: str) -> Rounding:
        """Of :meth:`text`."""
        return cls.of(json.loads(text))

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def last(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def _delta(self) -> float:
        return math.log2(1 + 1 / self.parameter) / self.last

    def codes(self, p: torch.Tensor) -> torch.Tensor:
        """Whole numbers of 0 … 2^b − 1 in p's dtype, for p in 0 … 1; 2^b of "log-sqrt2" is 0. NaN stays."""
        if self.law == "log-sqrt2":
            return (-2 * torch.log2(p / self.parameter)).round().clamp(0, self.last + 1)
        if self.law == "sulq":
            found = (torch.log2(p + self.parameter) - math.log2(self.parameter)) / self._delta
        else:
            found = self.last * torch.tan(self.parameter * p) / math.tan(self.parameter)
        return found.round().clamp(0, self.last)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for, in their dtype."""
        if self.law == "log-sqrt2":
            odd = codes % 2
            size = self.parameter * torch.exp2(-(codes / 2).ceil()) * (1 + odd * (math.sqrt(2) - 1))
            return torch.where(codes > self.last, 0.0, size)
        if self.law == "sulq":
            exponent = (codes * self._delta + math.log2(self.parameter)).round()
            return torch.exp2(exponent) - self.parameter
        return torch.atan(codes * (math.tan(self.parameter) / self.last)) / self.parameter

    def rounded(self, p: torch.Tensor) -> torch.Tensor:
        """p̂, in p's dtype; computed in fp32 where p is narrower."""
        wide = p.to(torch.promote_types(p.dtype, torch.float32))
        return self.values(self.codes(wide)).to(p.dtype)


def probabilities(p: torch.Tensor, law: str) -> torch.Tensor:
    """``p`` of any shape, rounded; ``law`` is the text of a :class:`Rounding`."""
    return Rounding.read(law).rounded(p)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    grouped: bool,
    law: str,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` with rounded probabilities, computed in fp32 (fp64 where q is).

    Args:
        q: ``[..., H, L, D]``; k and v ``[..., H or fewer, S, D or another]``.
        mask: bool (True takes part) or what is added, which ``[..., L, S]`` may be expanded to.
        causal: key j takes part for query i where j ≤ i.
        scale: None for 1 / √D.
        grouped: k and v have fewer heads, each for a run of those of q.
        law: the text of a :class:`Rounding`.

    Returns:
        ``[..., H, L, D of v]`` in q's dtype. A row without a key is 0, as in the operator.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = q.to(wide), k.to(wide), v.to(wide)
    if grouped:
        k_, v_ = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k_, v_))
    scores = q_ @ k_.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        shape = (q.shape[-2], k.shape[-2])
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        narrow = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if narrow else scores + mask.to(wide)
    p = torch.ops.aten._safe_softmax(scores, -1)
    result: torch.Tensor = (Rounding.read(law).rounded(p) @ v_).to(q.dtype)
    return result


rounded_probabilities = define_meaning(
    "rounded_probabilities", "(Tensor p, str law) -> Tensor", probabilities
)
rounded_attention = define_meaning(
    "rounded_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale, bool grouped, str law) -> Tensor",
    attention,
)
