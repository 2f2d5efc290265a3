"""Quantized checkpoints of a small model, packed number by number: a second reading of each layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from support import randomise
from torch import nn
from torch.nn import functional as F

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
G = 32


@dataclass
class Packed:
    """One layer: its tensors by suffix, the codes [N, K], scales and zeros [N, K/G], and W in fp64."""

    tensors: dict[str, torch.Tensor]
    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    weight: torch.Tensor


def words(rows: list[list[int]], bits: int = 32) -> torch.Tensor:
    """Unsigned numbers as the signed ones of the same bits."""
    signed = [[w - (1 << bits) if w >> (bits - 1) else w for w in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int32 if bits == 32 else torch.int16)


def random_codes(n: int, k: int, seed: int, groups: int | None = None) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    groups = k // G if groups is None else groups
    q = torch.randint(0, 16, (n, k), generator=generator)
    scale = (0.002 + 0.01 * torch.rand(n, groups, generator=generator)).half()
    return q, scale, torch.randint(1, 15, (n, groups), generator=generator)


def dense(q: Any, scale: Any, zero: Any, index: Any = None) -> torch.Tensor:
    """W, number by number."""
    n, k = q.shape
    each = k // scale.shape[1]
    weight = torch.empty(n, k, dtype=torch.float64)
    for i in range(n):
        s, z = scale[i].double().tolist(), zero[i].double().tolist()
        for j in range(k):
            g = j // each if index is None else index[j]
            weight[i, j] = s[g] * (int(q[i, j]) - z[g])
    return weight


def across_outputs(values: Any, order: Any = range(8)) -> torch.Tensor:
    """[rows, N] -> int32 [rows, N/8]; nibble i is output order[i] of its eight."""
    rows = values.tolist()
    return words(
        [
            [
                sum(row[8 * j + o] << (4 * i) for i, o in enumerate(order))
                for j in range(len(row) // 8)
            ]
            for row in rows
        ]
    )


def awq(n: int, k: int, seed: int) -> Packed:
    q, scale, zero = random_codes(n, k, seed)
    tensors = {
        "qweight": across_outputs(q.T, AWQ_ORDER),
        "qzeros": across_outputs(zero.T, AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }
    return Packed(tensors, q, scale, zero, dense(q, scale, zero))


def llm_awq(n: int, k: int, seed: int) -> Packed:
    q, scale, zero = random_codes(n, k, seed)
    packed = [[0] * k for _ in range(n // 4)]
    for i in range(n):
        for j in range(k):
            at = (j // 64) * 64 + (i % 4) * 16 + ((j % 64) // 32) * 8 + ((j % 8) // 2) * 2 + j % 2
            packed[i // 4][at] |= int(q[i, j]) << (4 * ((j % 32) // 8))
    start = (-scale * zero).half()
    rows = torch.full((8, n), 7.0).half()  # the rows of padding say nothing
    padded = [rows.clone(), rows.clone()]
    padded[0][: k // G], padded[1][: k // G] = scale.T, start.T
    tensors = {"qweight": words(packed, 16), "scales": padded[0], "scaled_zeros": padded[1]}
    wide = [v.double().repeat_interleave(G, 1) for v in (scale, start)]
    return Packed(tensors, q, scale, zero, q * wide[0] + wide[1])


def gptq(n: int, k: int, seed: int, less: int = 1, index: Any = None) -> Packed:
    """``less``: what is taken from zeros, 1 in version 1; ``index``: the group of each input."""
    q, scale, zero = random_codes(n, k, seed)
    rows = q.tolist()
    weights = [
        [sum(rows[i][8 * j + b] << (4 * b) for b in range(8)) for i in range(n)]
        for j in range(k // 8)
    ]
    plain = torch.arange(k, dtype=torch.int32) // G
    tensors = {
        "qweight": words(weights),
        "qzeros": across_outputs(zero.T - less),
        "scales": scale.T.contiguous(),
        "g_idx": plain if index is None else index,
    }
    return Packed(tensors, q, scale, zero, dense(q, scale, zero, index))


def packed4(n: int, k: int, seed: int, groups: int | None = None, zeros: bool = True) -> Packed:
    """pack-quantized. Stored are signed numbers plus 8, of weights and zeros alike."""
    q, scale, zero = random_codes(n, k, seed, groups)
    scale = scale.bfloat16() if groups == 1 else scale
    zero = zero if zeros else torch.full_like(zero, 8)
    tensors = {
        "weight_packed": across_outputs(q),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if zeros:
        tensors["weight_zero_point"] = across_outputs(zero.T).T.contiguous()
    return Packed(tensors, q, scale, zero, dense(q, scale, zero))


def int8(n: int, k: int, seed: int) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (n, k), generator=generator)
    q[0, :2] = torch.tensor([-128, 127])
    scale = 0.001 + 0.001 * torch.rand(n, 1, generator=generator)
    zero = torch.zeros(n, 1)
    tensors = {"weight": q.to(torch.int8), "weight_scale": scale}
    return Packed(tensors, q, scale, zero, dense(q, scale, zero))


# ---- a model, and checkpoints for it ---------------------------------------------------------------------

D, INNER = 128, 64
X = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
LAYERS = {"gate_proj": (INNER, D), "up_proj": (INNER, D), "down_proj": (D, INNER)}
SITES = [f"model.mlp.{name}.weight" for name in LAYERS]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
LLM_AWQ = {"w_bit": 4, "q_group_size": 32}


def scheme(reads: dict[str, Any] | None, target: str = "Linear") -> dict[str, Any]:
    groups = {"group_0": {"targets": [target], "input_activations": reads}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


EACH_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
FIXED = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, INNER, bias=False)
        self.up_proj = nn.Linear(D, INNER)
        self.down_proj = nn.Linear(INNER, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.norm, self.mlp = nn.RMSNorm(D), nn.RMSNorm(D), MLP()


class Model(nn.Module):
    """Named as in transformers; the head is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(D, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.model.mlp(self.model.input_layernorm(x))
        return self.lm_head(self.model.norm(x))


@cache
def made(make: Callable[..., Packed], *args: Any) -> Packed:
    return make(*args)


def checkpoint(
    make: Callable[..., Packed], *args: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Packed]]:
    """Every linear layer of the body packed, everything else as in a model with other weights."""
    layers = {
        f"model.mlp.{name}": made(make, n, k, seed, *args)
        for seed, (name, (n, k)) in enumerate(LAYERS.items())
    }
    source = randomise(Model(), 7).state_dict()
    tensors = {n: v for n, v in source.items() if n not in SITES}
    for name, layer in layers.items():
        tensors |= {f"{name}.{suffix}": value for suffix, value in layer.tensors.items()}
    return tensors, layers


def fresh(dtype: torch.dtype = torch.float32) -> nn.Module:
    return randomise(Model()).eval().to(dtype)
