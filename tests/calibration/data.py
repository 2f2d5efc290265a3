"""A model and data for the command line."""

from __future__ import annotations

from typing import Any

import torch
from calibration.models import decoder, token_batches

ready = token_batches(5)
number = 3


def model() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    return decoder(), (token_batches(1)[0],)


def batches() -> Any:
    yield from token_batches(5)


def broken() -> Any:
    raise RuntimeError("no disk")
