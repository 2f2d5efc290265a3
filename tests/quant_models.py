"""Models with every kind of link, and recipes for them that no calibration made."""

from __future__ import annotations

from typing import Any

import torch
from support import capture
from torch import nn
from torch.nn import functional as F

from sparsecc.passes.analysis.sites import named_links, sites
from sparsecc.passes.base import Analyses
from sparsecc.recipe import Recipe


class Net(nn.Module):
    """Every kind of link once: norm-linear (twice), q-k, v-o, up-down, linear-linear."""

    def __init__(self, d: int = 16, kv: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.RMSNorm(d)
        self.q, self.o = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.k, self.v = nn.Linear(d, 4 * kv), nn.Linear(d, 4 * kv)
        self.gate, self.up = nn.Linear(d, 24, bias=False), nn.Linear(d, 24, bias=False)
        self.down = nn.Linear(24, d)
        self.hidden, self.head = nn.Linear(d, 12), nn.Linear(12, 7)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(F.relu(self.hidden(x)))


class Tokens(Net):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)

    def forward(self, tokens):
        return super().forward(self.embed(tokens))


class Pair(nn.Module):
    def __init__(self, act: Any = F.relu) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(16, 12), nn.Linear(12, 8), act

    def forward(self, x):
        return self.b(self.act(self.a(x)))


def recipe_of(model: nn.Module, *args: Any, form: str = "int8", seed: int = 3) -> Recipe:
    """Every site in one format, and every link that carries them with random scales and shifts."""
    with torch.no_grad():
        program = capture(model, *args)
    analyses = Analyses(program)
    generator = torch.Generator().manual_seed(seed)
    recipe = Recipe("by hand")
    for site in analyses.get(sites):
        recipe.sites[site.name], recipe.shapes[site.name] = form, site.shape
    for name, link in analyses.get(named_links).items():
        if link.carries_scale:
            recipe.scales[name] = 0.5 + torch.rand(link.size, generator=generator)
        if link.carries_shift:
            recipe.shifts[name] = torch.randn(link.size, generator=generator)
    return recipe
