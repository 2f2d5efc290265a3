"""Cores of neurons that a prompt chooses and decoding keeps: their memory in this process, and its operators.

Law     The core of a token is its ⌈α #{i: h_i > 0}⌉ largest h_i, by value; the core of a sequence the ⌈βF⌉
        neurons that are in the cores of the most tokens, of equal ones the first.
Source  Wang et al. 2024, "CoreInfer" (arXiv:2410.18311), its stability-guided choice: made while the
        prompt is read, and frozen while tokens are decoded.
State   One core for each key (a recipe and a site) and process: the rows of a batch share it, by the sum of
        their counts, and the next prompt replaces it. ``sparsecc.reset_cores`` forgets all.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_LIBRARY = torch.library.Library("sparsecc", "FRAGMENT")
_ROWS = 256  # at a time: each needs its order
_CORES: dict[str, torch.Tensor] = {}  # key -> int64 [count], ascending


def token_counts(h: torch.Tensor, alpha: float) -> torch.Tensor:
    """How many tokens have each neuron in their core.

    Args:
        h: ``[tokens, F]``, the hidden values.
        alpha: the share of a token's positive values that are its core.

    Returns:
        int64 ``[F]``.
    """
    counts = torch.zeros(h.shape[-1], dtype=torch.int64, device=h.device)
    ranks = torch.arange(h.shape[-1], device=h.device)
    for rows in h.split(_ROWS):
        order = rows.argsort(dim=-1, descending=True, stable=True)
        positive = (rows > 0).sum(-1, keepdim=True).double()
        kept = ranks < (alpha * positive - 1e-9).ceil()  # 0.1 · 30 is a little more than 3
        counts += torch.zeros_like(kept).scatter(-1, order, kept).sum(0)
    return counts


def chosen(counts: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` neurons with the largest counts, of equal ones the first: int64 ``[count]``, ascending."""
    order = counts.argsort(stable=True, descending=True)
    return order[:count].sort().values


def core_size(beta: float, neurons: int) -> int:
    """⌈β F⌉, at least one."""
    return max(1, math.ceil(beta * neurons - 1e-9))


def reset_cores() -> None:
    """Forget the cores of all prompts; the next token is decoded with those of calibration."""
    _CORES.clear()


def _choose(h: torch.Tensor, alpha: float, count: int, key: str) -> torch.Tensor:
    """Keep the core of the tokens of ``h`` ``[..., F]`` under ``key``; of one token for each
    sequence, nothing.

    Returns:
        0 in h's dtype, without dimensions: added to a result, it keeps the operator in its graph.
    """
    tokens = h.shape[-2] if h.dim() > 1 else 1
    if tokens > 1:
        _CORES[key] = chosen(token_counts(h.detach().flatten(0, -2), alpha), count)
    return h.new_zeros(())


def _core(usual: torch.Tensor, like: torch.Tensor, key: str) -> torch.Tensor:
    """The core under ``key``, int64 ``[count]`` on the device of ``like``; ``usual`` where there is none."""
    known = _CORES.get(key)
    if known is None or known.shape != usual.shape:
        known = usual
    return known.to(like.device, copy=True)


def _define(name: str, signature: str, run: Any, shapes: Any) -> Any:
    # A replayed CUDA graph would neither choose nor look up.
    _LIBRARY.define(name + signature, tags=(torch.Tag.cudagraph_unsafe,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsecc::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.sparsecc, name).default


choose_core = _define(
    "choose_core",
    "(Tensor h, float alpha, int count, str key) -> Tensor",
    _choose,
    lambda h, alpha, count, key: h.new_empty(()),
)
core = _define(
    "core",
    "(Tensor usual, Tensor like, str key) -> Tensor",
    _core,
    lambda usual, like, key: like.new_empty(usual.shape, dtype=torch.int64),
)
