"""Structured linear layers: low rank, block-diagonal with a shuffle (Monarch), block-diagonal and dense.

Source  Wei et al. 2024, "Building on Efficient Foundations: Effectively Training LLMs with Structured
        Feedforward Layers" (arXiv:2406.16450): LowRank, BlockShuffle, BlockDense and self-guided training. Dao
        et al. 2022, "Monarch" (arXiv:2204.00595), projects a dense weight onto the second block by block.
Pays    fewer multiplications and bytes in training and in prefill. A compiled low-rank pair is multiplied back
        into one matrix where that is smaller (pass collapse-linear).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Structured(nn.Module):
    """A linear layer whose weight is a product of structured factors; a drop-in for ``nn.Linear``.

    Attributes:
        in_features, out_features: as of ``nn.Linear``.
        bias: [out] or None.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], without the bias."""
        raise NotImplementedError

    def merged(self) -> torch.Tensor:
        """The dense weight [out, in] that the factors stand for, with their gradients."""
        raise NotImplementedError

    def project(self, weight: torch.Tensor) -> None:
        """Set the factors to those nearest to a dense ``weight`` [out, in] in the Frobenius norm."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def to_linear(self) -> nn.Linear:
        """A dense layer with the merged weight: the pre-merge for decoding."""
        weight = self.merged().detach()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


class LowRank(Structured):
    """y = U (V x) + b, U [out, r], V [r, in]: r (in + out) multiplications."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        """Raises:
        ValueError: the rank is not between 1 and the smaller side.
        """
        super().__init__(in_features, out_features, bias)
        _check_rank(rank, min(in_features, out_features))
        self.first = nn.Parameter(_random(rank, in_features))
        self.second = nn.Parameter(_random(out_features, rank))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.first), self.second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.first), self.second, self.bias)

    def merged(self) -> torch.Tensor:
        return self.second @ self.first

    def project(self, weight: torch.Tensor) -> None:
        left, right = _factors(weight, self.first.shape[0])
        _set(self.first, right)
        _set(self.second, left)


class BlockDense(Structured):
    """y = A₂ (A₁ x) + b, A₁ block-diagonal of k blocks [q, in/k], A₂ dense [out, k q]."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, blocks: int, bias: bool = True
    ) -> None:
        """Args:
            rank: q, features that each block makes.
            blocks: k, a divisor of ``in_features``.

        Raises:
            ValueError: the blocks do not divide the features, or the rank is too large for a block.
        """
        super().__init__(in_features, out_features, bias)
        _check_blocks(blocks, in_features)
        _check_rank(rank, min(in_features // blocks, out_features))
        self.first = nn.Parameter(_random(blocks, rank, in_features // blocks))
        self.second = nn.Parameter(_random(out_features, blocks * rank))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(_by_block(x, self.first).flatten(-2), self.second)

    def merged(self) -> torch.Tensor:
        blocks, rank, _ = self.first.shape
        second = self.second.unflatten(1, (blocks, rank))
        return torch.einsum("okq,kqp->okp", second, self.first).flatten(1)

    def project(self, weight: torch.Tensor) -> None:
        blocks, rank, _ = self.first.shape
        pairs = [_factors(part, rank) for part in weight.chunk(blocks, 1)]
        _set(self.first, torch.stack([right for _, right in pairs]))
        _set(self.second, torch.cat([left for left, _ in pairs], 1))


class BlockShuffle(Structured):
    """y = P₂ A₂ P₁ A₁ x + b with block-diagonal A₁ (k blocks) and A₂ (l blocks): a Monarch matrix.

    z = A₁ x is [k, q]; flattened it is read as [r, l], k q = r l, and transposed: block i of A₂ [s, r] reads
    every l-th element. Output feature s l + i is element s of block i. Here q = l c and r = k c, so every pair
    of an input block and an output block is joined by c features: the part of the weight between them, rows
    i, i + l, i + 2 l, … and the columns of the block, is any matrix of rank c.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, blocks: int, bias: bool = True
    ) -> None:
        """Args:
            rank: c.
            blocks: k and l, a divisor of both numbers of features.

        Raises:
            ValueError: the blocks do not divide the features, or the rank is too large for a pair of blocks.
        """
        super().__init__(in_features, out_features, bias)
        _check_blocks(blocks, in_features)
        _check_blocks(blocks, out_features)
        _check_rank(rank, min(in_features, out_features) // blocks)
        self.rank, self.blocks = rank, blocks
        self.first = nn.Parameter(_random(blocks, blocks * rank, in_features // blocks))
        self.second = nn.Parameter(_random(blocks, out_features // blocks, blocks * rank))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        z = _by_block(x, self.first).flatten(-2)
        shuffled = z.unflatten(-1, (-1, self.blocks)).transpose(-1, -2)  # [..., l, r]
        return _by_block(shuffled.flatten(-2), self.second).transpose(-1, -2).flatten(-2)

    def merged(self) -> torch.Tensor:
        k = l = self.blocks  # noqa: E741
        # Element n = k_ q + l_ + l j of z meets block l_ of A₂ at its column k_ c + j.
        first = self.first.unflatten(1, (self.rank, l))  # [k, c, l, p]
        second = self.second.unflatten(2, (k, self.rank))  # [l, s, k, c]
        return torch.einsum("lskc,kclp->slkp", second, first).flatten(2).flatten(0, 1)

    def project(self, weight: torch.Tensor) -> None:
        parts = weight.unflatten(0, (-1, self.blocks)).unflatten(2, (self.blocks, -1))
        first = torch.empty_like(self.first, dtype=torch.float64).unflatten(1, (self.rank, -1))
        second = torch.empty_like(self.second, dtype=torch.float64).unflatten(2, (-1, self.rank))
        for i in range(self.blocks):  # of the output
            for k in range(self.blocks):  # of the input
                left, right = _factors(parts[:, i, k], self.rank)
                first[k, :, i], second[i, :, k] = right, left
        _set(self.first, first.flatten(1, 2))
        _set(self.second, second.flatten(2, 3))


KINDS: dict[str, type[Any]] = {
    "low-rank": LowRank,
    "block-dense": BlockDense,
    "block-shuffle": BlockShuffle,
}


def from_linear(linear: nn.Linear, kind: str, rank: int, blocks: int | None = None) -> Structured:
    """A structured layer near to a dense one: by truncated SVDs, the best of its kind in the Frobenius norm.

    Args:
        kind: "low-rank", "block-dense" or "block-shuffle".
        rank: of the whole weight, of each column block, of each pair of blocks.
        blocks: how many; not for "low-rank".
    Raises:
        ValueError: there is no such kind, or rank and blocks do not fit the layer.
    """
    if kind not in KINDS:
        raise ValueError(f"from_linear: unknown kind {kind!r}. Valid: {', '.join(KINDS)}.")
    if (blocks is None) != (kind == "low-rank"):
        raise ValueError(f"from_linear: {kind!r} takes {'no' if blocks else 'a number of'} blocks.")
    bias: nn.Parameter | None = linear.bias
    sizes = [linear.in_features, linear.out_features, rank, *([] if blocks is None else [blocks])]
    made: Structured = KINDS[kind](*sizes, bias=bias is not None).to(linear.weight)
    made.project(linear.weight.detach())
    if made.bias is not None and bias is not None:
        _set(made.bias, bias.detach())
    return made


class SelfGuided(nn.Module):
    """y = ρ W x + (1 − ρ) S(x) + b: a dense layer guides a structured one, and fades (Wei et al. 2024).

    W begins as the product of the factors, so that nothing changes at the start whatever ρ is.

    Attributes:
        rho: ρ, set before each step, from 1 to 0 (:func:`rho_at`).
    """

    def __init__(self, structured: Structured) -> None:
        super().__init__()
        self.structured = structured
        self.dense = nn.Parameter(structured.merged().detach().clone())
        self.rho = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rho == 0.0:
            result: torch.Tensor = self.structured(x)
            return result
        y = self.rho * F.linear(x, self.dense, self.structured.bias)
        return y if self.rho == 1.0 else y + (1 - self.rho) * self.structured(x)

    def finished(self) -> Structured:
        """The structured layer alone, to be put in this one's place.

        Raises:
            RuntimeError: ρ is not 0 yet: the dense layer still takes part.
        """
        if self.rho != 0.0:
            raise RuntimeError(
                f"SelfGuided: rho is {self.rho}, and the dense layer still takes part."
            )
        return self.structured


def rho_at(step: int, steps: int, kind: str = "cosine") -> float:
    """ρ of :class:`SelfGuided`: 1 at step 0, 0 from ``steps`` on.

    Args:
        kind: "cosine", ½ (1 + cos(π u)), or "linear", 1 − u.
    Raises:
        ValueError: there is no such kind.
    """
    if kind not in ("cosine", "linear"):
        raise ValueError(f"rho_at: unknown kind {kind!r}. Valid: cosine, linear.")
    if step >= steps:
        return 0.0
    passed = max(0, step) / steps
    return (1 + math.cos(math.pi * passed)) / 2 if kind == "cosine" else 1 - passed


def _by_block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[..., k, q] of [..., k p]: each block's own product with [k, q, p]."""
    blocks: torch.Tensor = x.unflatten(-1, (weight.shape[0], -1))
    result: torch.Tensor = torch.einsum("...kp,kqp->...kq", blocks, weight)
    return result


def _factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[m, r] and [r, n], fp64: the best product of rank r for [m, n], both of one size (Eckart-Young)."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / math.sqrt(shape[-1])


def _set(parameter: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _check_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"a rank is between 1 and {most} here, not {rank}.")


def _check_blocks(blocks: int, features: int) -> None:
    if blocks < 1 or features % blocks:
        raise ValueError(f"{blocks} blocks do not divide {features} features.")
