"""One view of every normalization over the last axis: LayerNorm and RMSNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """``kind`` is "layer_norm" or "rms_norm"; ``eps`` a float, a SymFloat node, or None (the dtype's)."""

    node: fx.Node
    kind: str
    x: fx.Node
    shape: list[Any]
    weight: fx.Node | None
    bias: fx.Node | None
    eps: Any

    @property
    def size(self) -> Any:
        return self.shape[-1]


def as_norm(node: fx.Node) -> Norm | None:
    """View ``node`` as a norm over exactly its last axis, or None."""
    if node.target is aten.layer_norm.default:
        x, shape, weight, bias, eps = _args(node, ("weight", "bias", "eps"), (None, None, 1e-5))
    elif node.target is aten.rms_norm.default:
        x, shape, weight, eps = _args(node, ("weight", "eps"), (None, None))
        bias = None
    else:
        return None
    if len(shape) != 1:
        return None
    kind = "layer_norm" if node.target is aten.layer_norm.default else "rms_norm"
    return Norm(node, kind, x, list(shape), weight, bias, eps)


def _args(node: fx.Node, names: tuple[str, ...], defaults: tuple[Any, ...]) -> list[Any]:
    given = list(node.args)
    for position, (name, default) in enumerate(zip(names, defaults, strict=True), start=2):
        if position >= len(given):
            given.append(node.kwargs.get(name, default))
    return given[: 2 + len(names)]
