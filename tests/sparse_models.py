"""Feed-forward networks of every kind, and what they compute when a recipe leaves neurons out, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsecc.recipe import Recipe

D, NEURONS = 32, 64
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
}


class FFN(nn.Module):
    """``kind`` as of the view: "plain", "gated", "fused" (gate first) or "swapped" (up first)."""

    def __init__(self, kind: str = "gated", act: str = "silu", bias: bool = True) -> None:
        super().__init__()
        self.kind, self.act = kind, ACTIVATIONS[act]
        first = 2 * NEURONS if kind in ("fused", "swapped") else NEURONS
        self.up, self.down = nn.Linear(D, first, bias=bias), nn.Linear(NEURONS, D, bias=bias)
        if kind == "gated":
            self.gate = nn.Linear(D, NEURONS, bias=bias)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the activation reads, and what its result is multiplied by."""
        if self.kind == "plain":
            return self.up(x), None
        if self.kind == "gated":
            return self.gate(x), self.up(x)
        both = self.up(x)
        if self.kind == "swapped":
            return both[..., -NEURONS:], both[..., :-NEURONS]
        gate, up = both.chunk(2, -1)
        return gate, up

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        z, u = self.parts(x)
        return self.act(z) if u is None else self.act(z) * u

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.hidden(x))


class Flat(nn.Module):
    """As GPT-2 spells it: weights [in, out], tokens flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(D, NEURONS)), nn.Parameter(torch.randn(NEURONS))
        self.v, self.c = nn.Parameter(torch.randn(NEURONS, D)), nn.Parameter(torch.randn(D))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(torch.addmm(self.b, x.reshape(-1, D), self.w)).view(*x.shape[:-1], NEURONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.c, self.hidden(x).view(-1, NEURONS), self.v)
        return x + y.view(x.shape)


def sparse(model: nn.Module, decide: Callable[[FFN, torch.Tensor], torch.Tensor]) -> nn.Module:
    """``model`` in fp64, every network with the hidden values that ``decide(ffn, x)`` gives."""
    twin = copy.deepcopy(model).double()
    for ffn in twin.modules():
        if isinstance(ffn, (FFN, Flat)):

            def hidden(x: torch.Tensor, ffn: Any = ffn, own: Any = ffn.hidden) -> torch.Tensor:
                ffn.hidden = own
                found = decide(ffn, x)
                ffn.hidden = hidden
                return found

            ffn.hidden = hidden  # type: ignore[assignment]
    return twin


def kept_activations(ffn: FFN, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Law "activation": |a| > t."""
    z, u = ffn.parts(x)
    a = ffn.act(z)
    a = a * (a.abs() > t.double())
    return a if u is None else a * u


def sizes_of_outputs(weight: torch.Tensor) -> torch.Tensor:
    """What rows of a weight [N, K] are divided by before they are rounded by column in int8; 1 for zeros."""
    _, exponent = weight.abs().amax(1).frexp()
    return (2.0**exponent).where(weight.abs().amax(1) > 0, 1.0)


def recipe(
    site: str = "down.weight", shape: tuple[int, int] = (D, NEURONS), **given: Any
) -> Recipe:
    """Of one site, by hand: law and options, ``t`` its thresholds, ``core`` its neurons."""
    found = Recipe("by hand", shapes={site: list(shape)})
    for name, into in (("t", found.thresholds), ("core", found.neurons)):
        value = given.pop(name, None)
        if value is not None:
            into[site] = value
    found.sparsity[site] = given
    return found
