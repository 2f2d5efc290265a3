"""Smooth activations exchanged for ReLU, whose zeros are zeros: the first step of ProSparse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from sparsecc.modules import matching

# By name, since transformers has classes of its own and is no requirement here.
_CLASSES = frozenset(
    "SiLU SiLUActivation GELU GELUActivation GELUTanh NewGELUActivation FastGELUActivation "
    "QuickGELUActivation PytorchGELUTanh AccurateGELUActivation ClippedGELUActivation".split()
)
_FUNCTIONS = (F.silu, F.gelu)


class FATReLU(nn.Module):
    """x where x ≥ T, else 0: ReLU that also drops small values, which are not shifted.

    Song et al. 2024, "ProSparse" (arXiv:2402.13516, activation threshold shifting); Kurtz et al. 2020,
    "Inducing and Exploiting Activation Sparsity" (forced-activation-threshold ReLU). At T itself x is kept.
    """

    def __init__(self, threshold: float) -> None:
        """Args:
            threshold: T, from 0 on.

        Raises:
            ValueError: it is below 0 or not finite.
        """
        super().__init__()
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"FATReLU: a threshold is a number from 0 on, not {threshold}.")
        self.threshold = float(threshold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] of [...], of x's dtype."""
        return torch.where(x >= self.threshold, x, 0.0)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


def relufy(
    model: nn.Module, patterns: Sequence[str] | str = "*", threshold: float | None = None
) -> int:
    """Exchange SiLU and GELU for ReLU, in place; returns how many were exchanged. Weights stay as they are.

    The model is another function afterwards: fine-tune it.

    Args:
        model: its modules of these activations (torch's and those of transformers), and attributes that hold
            the functions, are exchanged; a forward that calls ``F.silu`` itself has nothing to exchange.
        patterns: of their names ("*.mlp.act_fn").
        threshold: of :class:`FATReLU`; None for ReLU.
    Raises:
        OptionsError: a pattern matches no such activation; the message names those that there are.
    """
    there: dict[str, nn.Module] = {}  # name -> the module that holds it
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ in _CLASSES and name:
            there[name] = model.get_submodule(name.rpartition(".")[0])
        for key, value in vars(module).items():
            if any(value is function for function in _FUNCTIONS):
                there[f"{name}.{key}".lstrip(".")] = module
    chosen = matching(there, patterns, "activation of the model (SiLU, GELU):")
    for name in chosen:
        new = nn.ReLU() if threshold is None else FATReLU(threshold)
        key, holder = name.rpartition(".")[2], there[name]
        vars(holder).pop(key, None)  # a function, which a module of the same name cannot replace
        setattr(holder, key, new)
    return len(chosen)
