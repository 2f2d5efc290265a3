"""What the model-zoo suites share."""

from __future__ import annotations

import torch
from support import randomise
from torch import nn
from torch.nn.modules.conv import _ConvNd


def randomise_network(model: nn.Module, seed: int = 0) -> nn.Module:
    """``randomise`` with wide layers scaled by all they sum over, so that deep networks stay finite."""
    randomise(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _ConvNd):
                weight = module.weight
                summed = weight.numel() // weight.shape[0]
                weight.sub_(0.05).mul_(2 * (weight.shape[-1] / summed) ** 0.5).add_(0.2 / summed)
            elif isinstance(module, nn.Linear) and module.in_features > 64:
                module.weight.sub_(0.05 - 3.2 / module.in_features)
    return model
