"""fold-norm-scale: LayerNorm Scaling's constant into γ and β."""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    Block,
    PreNorm,
    check_exact,
    check_training,
    error,
    ids,
    randomise,
    refusals,
    run,
)
from torch import nn

NAME = "fold-norm-scale"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 16)


class ScaledBlock(Block):
    layer = 2

    def forward(self, x):
        x = x + self.out(torch.tanh(self.mix(self.norm1(x) * self.layer**-0.5)))
        return x + self.down(torch.relu(self.up(self.norm2(x) / self.layer**0.5)))


def scaled(layers: int = 2) -> nn.Module:
    model = PreNorm(layers=layers)
    for layer in range(layers):
        model.blocks[layer] = ScaledBlock(16)
        model.blocks[layer].layer = layer + 2
    return randomise(model)


def test_every_pre_norm() -> None:
    check_exact(scaled(), ids(), applied={NAME: 4}, **ONLY)


def test_with_the_whole_family() -> None:
    check_exact(
        scaled(),
        ids(),
        applied={NAME: 4, "fold-norm-affine": 5, "layernorm-to-rmsnorm": 5},
    )


def test_dynamic_shapes_tied_and_updated() -> None:
    model = scaled().double().eval()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    with torch.no_grad():
        result, report = run(model, ids(), dynamic=True, **ONLY)
        assert report[NAME].applied == 4
        assert error(result, model(ids())) < 1e-12
        options = {"lower": "eager", "require": {NAME: 4}}
        fast = torch.compile(model, backend="sparsecc", options=options)
        fast(ids())
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(ids()), model(ids())) < 1e-12


def test_training() -> None:
    check_training(scaled, {NAME: 4})


class FanOut(ScaledBlock):
    def forward(self, x):
        y = self.norm1(x)
        return self.mix(y * 0.5) + y


class NoWeight(ScaledBlock):
    def forward(self, x):
        return self.mix(nn.functional.layer_norm(x, (16,)) * 0.5)


@pytest.mark.parametrize(("cls", "code"), [(FanOut, "fan-out"), (NoWeight, "not-a-weight")])
def test_refuses(cls: type[nn.Module], code: str) -> None:
    report = check_exact(randomise(cls(16)), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == [code]


@pytest.mark.parametrize("factor", [0.0, True])
def test_zero_and_booleans_are_left_alone(factor: float) -> None:
    class Odd(ScaledBlock):
        def forward(self, x):
            return self.mix(self.norm1(x) * factor)

    report = check_exact(randomise(Odd(16)), X, applied={NAME: 0}, **ONLY)
    assert report[NAME].matches == []
