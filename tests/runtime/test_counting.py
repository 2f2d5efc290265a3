"""Live neurons are counted at run time, by layer, where it is asked for."""

from __future__ import annotations

import pytest
import torch
from support import agrees_with_fp64, randomise, run
from torch import nn

import sparsecc

D, WIDE = 24, 56


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D))
        self.two = nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D))

    def forward(self, x):
        return self.two(x + self.one(x))


@pytest.mark.parametrize("count", [True, False])
def test_counts(count: bool) -> None:
    model, x = randomise(Net()).eval(), torch.randn(3, D)
    sparsecc.reset_live_neurons()
    with torch.no_grad():
        result, report = run(model, x, passes=["skip-zeros"], codegen="cpp", count=count)
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
