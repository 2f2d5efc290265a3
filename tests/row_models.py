"""Published methods on rows, spelled out, and the model that they are tried in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import randomise
from torch import nn
from torch.nn import functional as F

NAME = "fuse-rows"
ONLY = {"passes": [NAME]}
D = 24
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(3))
Forward = Callable[[Any, torch.Tensor], Any]


class Model(nn.Module):
    """Weights of every shape that an operand may have."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.weight, self.bias, self.other = (nn.Parameter(torch.ones(D)) for _ in range(3))
        self.leading = nn.Parameter(torch.ones(1, 1, D))
        self.coefficients = nn.Parameter(torch.ones(3))
        self.shift = nn.Parameter(torch.ones(1))
        self.by_row, self.by_token = nn.Parameter(torch.ones(5, 1)), nn.Parameter(torch.ones(5, D))
        self.linear = nn.Linear(D, D)
        self.rest = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.rest(self, x)


def made(forward: Forward) -> Model:
    return randomise(Model(forward)).eval()


def specs(report) -> list[str]:
    return [m.note for m in report[NAME].matches if m.status == "applied"]


# ---- published methods, spelled out ------------------------------------------------------------------


def top_k(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Statistical top-k (Spark)."""
    cut = x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=0) * 0.6744897501960817
    return torch.relu(x - cut)


def poly_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    """PolyNorm as PolyCom's own code has it."""

    def norm(y: torch.Tensor) -> torch.Tensor:
        return y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    a = m.coefficients
    return a[0] * norm(x**3) + a[1] * norm(x**2) + a[2] * norm(x) + m.shift


def crms_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Pre-CRMSNorm: the feature that is not stored is minus the sum of the others."""
    total = x.sum(-1, keepdim=True)
    squares = x.square().sum(-1, keepdim=True) + total * total
    return x * torch.rsqrt(squares / (x.shape[-1] + 1) + 1e-5)


def evonorm_s0(m: Any, x: torch.Tensor) -> torch.Tensor:
    """EvoNorm-S0 over the last axis, the channels of a group."""
    deviation = torch.sqrt(x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5)
    return x * torch.sigmoid(m.by_token * x) / deviation * m.weight + m.bias


def quantized(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Residual, RMSNorm, int8 by token."""
    h = x + m.other
    y = F.rms_norm(h, (D,), m.weight, 1e-6)
    scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return torch.round(y / scale).clamp(-127, 127).to(torch.int8), scale, h


METHODS: dict[str, tuple[Forward, str]] = {
    "statistical top-k": (
        top_k,
        "y0 = mean(t0); y1 = t0 - y0; relu(t0 - (y0 + sqrt(mean(y1 * y1)) * 0.6744897501960817))",
    ),
    "poly norm": (
        poly_norm,
        "y0 = t0 * t0; y1 = y0 * t0; s0 * (y1 * rsqrt(mean(y1 * y1) + 1e-06)) + "
        "s1 * (y0 * rsqrt(mean(y0 * y0) + 1e-06)) + s2 * (t0 * rsqrt(mean(y0) + 1e-06)) + s3",
    ),
    "crms norm": (
        crms_norm,
        "y0 = sum(t0); t0 * rsqrt((sum(t0 * t0) + y0 * y0) / 25.0 + 1e-05)",
    ),
    "evonorm s0": (
        evonorm_s0,
        "y0 = t0 - mean(t0); t0 * sigmoid(v0 * t0) / sqrt(mean(y0 * y0) + 1e-05) * v1 + v2",
    ),
}


def spread(x: torch.Tensor) -> torch.Tensor:
    return x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
