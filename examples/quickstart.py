"""A small transformer with random weights: compile it, print what was rewritten, prove it.

    python examples/quickstart.py

Takes a few seconds: ``lower="eager"`` runs the rewritten graph without generating kernels. Leave
the option out to have Inductor compile it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import sparsecc


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        result: Tensor = x + self.down(gelu(self.up(self.norm2(x))))
        return result


def main() -> None:
    torch.manual_seed(0)
    d, words = 64, 100
    blocks = [Block(d, heads=4) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(words, d), *blocks, nn.LayerNorm(d), nn.Linear(d, words))
    for parameter in model.parameters():  # fresh norms have weight 1 and bias 0, and hide errors
        nn.init.normal_(parameter, std=0.2)
    ids, report = torch.randint(0, words, (2, 16)), sparsecc.Report(model="quickstart")
    options: dict[str, Any] = {"lower": "eager", "verify": "each", "report": report}
    fast = torch.compile(model.eval(), backend="sparsecc", options=options)
    with torch.no_grad():
        difference = (fast(ids) - model(ids)).abs().max()
    print(report)
    print(f"largest difference from eager: {difference:.1e}")


if __name__ == "__main__":
    main()
