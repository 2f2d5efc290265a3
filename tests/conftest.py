"""Every test starts from a clean Dynamo; GPU tests need a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws on import is the same whichever files are collected; not the weights' seed."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
