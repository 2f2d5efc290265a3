"""An attention with every layout that links must tell apart."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Grouped heads, four spellings of rotary embeddings, kernels or the long form."""

    def __init__(
        self,
        kv: int = 4,
        rope: str = "",
        fused: bool = False,
        sdpa: bool = True,
        mask: bool = False,
    ) -> None:
        super().__init__()
        self.kv, self.rope, self.sdpa, self.mask = kv, rope, sdpa, mask
        sizes = [16, 4 * kv, 4 * kv]
        self.sizes = sizes
        self.qkv = nn.ModuleList(
            [nn.Linear(16, sum(sizes))] if fused else [nn.Linear(16, n) for n in sizes]
        )
        self.out = nn.Linear(16, 16, bias=False)

    def rotated(self, x):
        if not self.rope:
            return x
        time = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
        angle = time * torch.tensor([0.3, 0.7], dtype=x.dtype)
        if self.rope == "partial":  # half of each head stays as it is
            turned, rest = x[..., :2], x[..., 2:]
            cos, sin = angle[:, :1].cos(), angle[:, :1].sin()
            a, b = turned[..., :1], turned[..., 1:]
            return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
        if self.rope == "interleaved":
            cos, sin = (f(angle).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
            other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos + other * sin
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x):
        made = [layer(x) for layer in self.qkv]
        parts = made if len(made) == 3 else made[0].split(self.sizes, -1)
        q, k, v = (p.unflatten(-1, (-1, 4)).transpose(1, 2) for p in parts)
        q, k = self.rotated(q), self.rotated(k)
        tokens = x.shape[1]
        if self.sdpa:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if self.mask else None
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv < 4
            )
        else:
            b, _, t, d = k.shape
            k, v = (
                z[:, :, None].expand(b, self.kv, 4 // self.kv, t, d).reshape(b, 4, t, d)
                for z in (k, v)
            )
            y = F.dropout(((q * 0.5) @ k.transpose(-1, -2)).softmax(-1), 0.1, self.training) @ v
        return self.out(y.transpose(1, 2).flatten(2))
