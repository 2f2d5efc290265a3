"""Small models with what calibration must cope with: outlier channels, links of every kind, a tied head."""

from __future__ import annotations

from typing import Any

import torch
from support import ids, randomise
from torch import nn
from torch.nn import functional as F

VOCABULARY = 40
LN_AS_IT_IS = {"disable": ["layernorm-to-rmsnorm", "fold-norm-affine"]}  # so that shifts can move


class Block(nn.Module):
    """Attention with grouped heads and a gated FFN, both behind a norm."""

    def __init__(self, d: int, f: int, heads: int, kv: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.size = d // heads
        self.norm1, self.norm2 = norm(d), norm(d)
        self.q, self.k = nn.Linear(d, d, bias=False), nn.Linear(d, kv * self.size, bias=False)
        self.v, self.o = nn.Linear(d, kv * self.size, bias=False), nn.Linear(d, d, bias=False)
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        heads = [p(y).unflatten(-1, (-1, self.size)) for p in (self.q, self.k, self.v)]
        q, k, v = (h.transpose(1, 2) for h in heads)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A decoder; ``outliers`` channels of its stream are thirty times as large as the others."""

    def __init__(
        self,
        d: int = 64,
        f: int = 128,
        layers: int = 1,
        outliers: tuple[int, ...] = (3, 41),
        norm: type[nn.Module] = nn.RMSNorm,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, d)
        self.blocks = nn.ModuleList(Block(d, f, 4, 2, norm) for _ in range(layers))
        self.norm = norm(d)
        self.head = nn.Linear(d, VOCABULARY, bias=False)
        randomise(self)
        with torch.no_grad():
            self.embed.weight[:, list(outliers)] *= 30
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Chain(nn.Module):
    """LayerNorm, two layers that read it, ReLU between the next two: shifts move behind the norm."""

    def __init__(self, d: int = 32, f: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.a, self.b = nn.Linear(d, f), nn.Linear(d, f, bias=False)
        self.out = nn.Linear(f, d)
        randomise(self)
        with torch.no_grad():
            self.norm.bias[5] += 20  # skewed
            self.norm.weight[7] *= 40

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.out(F.relu(self.a(y) + 0 * x.sum())) + self.b(y)[..., :32]


def decoder(**sizes: Any) -> Decoder:
    made = Decoder(**sizes).eval()
    return made


def token_batches(count: int = 4, batch: int = 4, tokens: int = 16) -> list[torch.Tensor]:
    return [ids(batch, tokens, VOCABULARY, seed=seed) for seed in range(count)]


def rows(count: int = 64, d: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed))
