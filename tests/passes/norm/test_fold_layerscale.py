"""fold-layerscale: per-channel factors into the linear layer or convolution before them."""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    Block,
    check_exact,
    check_training,
    error,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn

NAME = "fold-layerscale"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 16)


class Scaled(nn.Module):
    """CaiT's and DINOv2's residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(16)
        self.a, self.b = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(1, 1, 16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        block = self.block
        x = block.mix(x)
        x = x + self.a * block.out(torch.tanh(block.mix(block.norm1(x))))
        x = x + block.down(torch.relu(block.up(block.norm2(x)))) * self.b
        return self.head(self.norm(x))


class ConvScaled(nn.Module):
    def __init__(self, permuted: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.scale = nn.Parameter(torch.ones(8) if permuted else torch.ones(8, 1, 1))
        self.permuted = permuted

    def forward(self, x):
        y = self.conv(x)
        return (y.permute(0, 2, 3, 1) if self.permuted else y) * self.scale


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, groups=4, stride=2, bias=False)
        self.scale = nn.Parameter(torch.ones(8, 1))

    def forward(self, x):
        return self.scale * self.conv(x)


def test_folds_both_branches_and_lets_recentring_through() -> None:
    check_exact(randomise(Scaled()), X, applied={NAME: 2}, **ONLY)
    check_exact(randomise(Scaled()), X, applied={NAME: 2, "layernorm-to-rmsnorm": 3})


@pytest.mark.parametrize("permuted", [True, False])
def test_convolutions(permuted: bool) -> None:
    check_exact(randomise(ConvScaled(permuted)), torch.randn(2, 3, 6, 6), applied={NAME: 1}, **ONLY)


def test_grouped_convolution_without_bias() -> None:
    check_exact(randomise(Grouped()), torch.randn(2, 4, 9), applied={NAME: 1}, **ONLY)


def test_factor_made_after_its_producer() -> None:
    """timm reshapes the factor where it is used, behind the convolution that it is folded into."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 8, 1), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.conv(x) * self.scale.view(-1, 1, 1)

    check_exact(randomise(Late()), torch.randn(2, 3, 4, 4), applied={NAME: 1}, **ONLY)


class Viewed(nn.Module):
    """A view of the scaled part that holds for contiguous tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return (self.linear(x)[:, 1:] * self.scale).view(-1)


def test_a_view_behind_a_sliced_value() -> None:
    check_exact(randomise(Viewed()), torch.randn(2, 5, 4), applied={NAME: 1}, **ONLY)


class PartOfSplit(nn.Module):
    """One half of the tokens is scaled, the other is not."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.linear, self.scale, self.both = nn.Linear(4, 6), nn.Parameter(torch.ones(6)), both

    def forward(self, x):
        first, second = self.linear(x).split(2, dim=0)
        return (first * self.scale, second) if self.both else first * self.scale


def test_one_part_of_a_split() -> None:
    x = torch.randn(4, 4)
    check_exact(randomise(PartOfSplit(both=False)), x, applied={NAME: 1}, **ONLY)
    model = randomise(PartOfSplit(both=True)).eval()
    with torch.no_grad():
        result, report = run(model, x, **ONLY)
        assert all(error(a, b) < 1e-6 for a, b in zip(result, model(x), strict=True))
    assert refusals(report, NAME) == ["fan-out"]


def test_half_precision_rounds_once() -> None:
    model = randomise(Scaled()).bfloat16().eval()
    with torch.no_grad():
        _, report = run(model, X.bfloat16(), verify="final", **ONLY)
    assert report[NAME].applied == 2
    assert report.verified


def test_dynamic_shapes() -> None:
    model = randomise(Scaled()).double().eval()
    with torch.no_grad():
        result, report = run(model, X.double(), dynamic=True, **ONLY)
        assert error(result, model(X.double())) < 1e-12
    assert report[NAME].applied == 2


def test_weights_updated_after_compile() -> None:
    model = randomise(Scaled()).eval()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 2}}
    )
    with torch.no_grad():
        fast(X)
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(X), model(X)) < 1e-6


class Tokens(Scaled):
    def forward(self, x):
        return super().forward(x.double() if self.a.dtype == torch.float64 else x)


def test_training() -> None:
    class FromIds(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)

        def forward(self, tokens):
            return super().forward(self.embed(tokens))

    check_training(lambda: randomise(FromIds()), {NAME: 2}, **ONLY)
    _, report = run(randomise(Scaled()), X, lower="aot_eager")
    assert refusals(report, NAME) == ["training"] * 2
    assert set(refusals(report, "layernorm-to-rmsnorm")) == {"layer-scale"}


def test_refuses_fan_out() -> None:
    class FanOut(Scaled):
        def forward(self, x):
            y = self.block.mix(x)
            return y * self.a + y

    report = check_exact(randomise(FanOut()), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["fan-out"]


def test_refuses_tied() -> None:
    class Tied(Scaled):
        def forward(self, x):
            return self.block.mix(x) * self.a + self.block.mix(2 * x)

    report = check_exact(randomise(Tied()), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["tied"]


def test_refuses_to_leave_a_no_grad_region() -> None:
    class Partly(Scaled):
        def forward(self, x):
            with torch.no_grad():
                y = self.block.mix(x)
            return y * self.a

    model = randomise(Partly())
    result, report = run(model, X, lower="aot_eager", **ONLY)
    assert refusals(report, NAME) == ["region"]
    result.sum().backward()
    assert model.a.grad is not None


@pytest.mark.parametrize("shape", [(5, 1), (3, 1, 1), (5, 16)])
def test_other_axes_are_not_a_layer_scale(shape: tuple[int, ...]) -> None:
    class Other(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.rand(shape))

        def forward(self, x):
            return self.block.mix(x) * self.factor

    report = check_exact(randomise(Other()), X, applied={NAME: 0}, **ONLY)
    assert report[NAME].matches == []


def test_a_size_is_no_layer_scale() -> None:
    """A symbolic size is an operand without a shape."""

    class Sized(Scaled):
        def forward(self, x):
            return self.block.mix(x) * (self.a * x.shape[1])

    check_exact(randomise(Sized()), X, applied={NAME: 0}, dynamic=True, **ONLY)


def test_gathered_weights_are_refused() -> None:
    with torch.no_grad():
        _, report = run(managed_by_fsdp(randomise(Scaled()).eval()), X)
    assert refusals(report, NAME) == ["gathered"] * 2
    assert sum(graph.folded for graph in report.graphs) == 0
