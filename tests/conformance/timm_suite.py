"""One small member of every timm family."""

from __future__ import annotations

import torch
from conformance.case import Case, NotBuildable
from conformance.timm_models import MODELS
from conformance.zoo import randomise_network
from torch import nn

from sparsecc.cli.timm_models import import_timm

BATCH, CLASSES = 2, 10  # BatchNorm needs more than one value a channel


def names() -> list[str]:
    """Families, by the modules of ``timm.models``."""
    return sorted(MODELS)


def build(name: str) -> list[Case]:
    """The family's model of the table with random weights, at its smallest image."""
    model_name, size, shrunk = MODELS[name]
    try:
        model = create(model_name, **shrunk)
    except ModuleNotFoundError as error:
        raise NotBuildable(str(error)) from error
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, 3, size, size, generator=generator)
    return [Case(randomise_network(model).eval(), (image,))]


def create(name: str, **shrunk: object) -> nn.Module:
    timm = import_timm()
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **shrunk)
    return model
