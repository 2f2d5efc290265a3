"""Live neurons are counted at run time, by layer, where it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import agrees_with_fp64, randomise, run
from torch import nn

import sparsecc
from sparsecc import kernels, measurement

D, WIDE = 24, 56


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D))
        self.two = nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D))

    def forward(self, x):
        return self.two(x + self.one(x))


def measure(variants: Any, args: Any, prepare: Any) -> tuple[dict[str, float], bool]:
    """Every variant runs, as in a measurement; the kernel wins."""
    for variant in variants.values():
        variant.call(*measurement.arguments(args, prepare))
    return {"aten": 2.0, "cpp": 1.0}, False


@pytest.mark.parametrize(
    ("codegen", "count"), [("cpp", True), ("cpp", False), ("auto", True)], ids=str
)
def test_counts(codegen: str, count: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "_remembered", lambda *_: None)
    model, x = randomise(Net()).eval(), torch.randn(3, D)
    sparsecc.reset_live_neurons()
    with torch.no_grad():
        result, report = run(
            model, x, passes=["skip-zeros"], codegen=codegen, count=count, lower="inductor"
        )
        agrees_with_fp64(model, x, result)
        model.float()
        hidden = model.one[:2](x)
        wanted = {"one.2.weight": hidden, "two.2.weight": model.two[:2](x + model.one(x))}
    assert [(k.chosen, k.count) for k in report.graphs[0].kernels] == [("cpp", 2)]
    found = sparsecc.live_neurons()
    if not count:
        assert found == {}
        return
    assert found == {
        name: pytest.approx(float((h > 0).float().mean())) for name, h in wanted.items()
    }
    sparsecc.reset_live_neurons()
    assert sparsecc.live_neurons() == {}
