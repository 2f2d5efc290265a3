"""push-batchnorm: BatchNorm into the layers behind it, right at the border too, and where it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    agree,
    check_exact,
    check_training,
    error,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn

NAME = "push-batchnorm"
ONLY = {"passes": [NAME]}
SPACE = torch.randn(2, 4, 9, 8)


def network(*layers: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(*layers)).eval()


READERS = {
    "1x1": nn.Conv2d(4, 6, 1),
    "3x3": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, 2, stride=2, bias=False),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding="valid"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "reflected": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "repeated": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
}
PADDED = {
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "padded, strided": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "padded, grouped": nn.Conv2d(4, 8, 5, padding=(2, 0), groups=2),
    "padded, dilated": nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("affine", [True, False])
def test_every_reader(kind: str, affine: bool) -> None:
    model = network(nn.ReLU(), nn.BatchNorm2d(4, affine=affine), READERS[kind])
    check_exact(model, SPACE, applied={NAME: 1}, **ONLY)


@pytest.mark.parametrize("kind", PADDED)
def test_zero_padding_is_exact_at_the_border(kind: str) -> None:
    model = network(nn.ReLU(), nn.BatchNorm2d(4), PADDED[kind])
    check_exact(model, SPACE, applied={NAME: 1}, **ONLY)
    with torch.no_grad():
        double = copy.deepcopy(model).double()
        got, _ = run(double, SPACE.double(), **ONLY)
        want = double(SPACE.double())
    for row in (got[..., 0, :] - want[..., 0, :], got[..., -1] - want[..., -1]):
        assert row.abs().max() < 1e-12


def test_zero_padding_is_refused_unless_named_and_known() -> None:
    model = network(nn.ReLU(), nn.BatchNorm2d(4), PADDED["padded"])
    with torch.no_grad():
        _, report = run(model, SPACE)
        assert refusals(report, NAME) == ["border"]
        _, report = run(model, SPACE, dynamic=True, **ONLY)
        assert refusals(report, NAME) == ["border"]


class Pooled(nn.Module):
    """LeViT's head: tokens pooled, BatchNorm, a classifier, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.other = nn.Linear(4, 5, bias=False)

    def forward(self, x):
        y = self.norm(x.mean(1))
        return self.head(y), self.other(y)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_classifier_and_a_second_one(dynamic: bool | None) -> None:
    model = randomise(Pooled()).eval()
    check_exact(model, torch.randn(3, 5, 4), applied={NAME: 1}, dynamic=dynamic, **ONLY)


def test_updated_after_compile() -> None:
    model = network(nn.ReLU(), nn.BatchNorm2d(4), READERS["grouped"])
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 1}}
    )
    with torch.no_grad():
        for _ in range(2):
            assert error(fast(SPACE), model(SPACE)) < 1e-5
            model.train()(SPACE * 3 + 1)
            model.eval()
            assert error(fast(SPACE), model(SPACE)) < 1e-5
            model.load_state_dict(randomise(copy.deepcopy(model), 3).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_eager(dtype: torch.dtype) -> None:
    model = network(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 32, 3)).to(dtype)
    x = torch.randn(4, 4, 9, 8).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        result, report = run(model, x, **ONLY)
        eager = model(x)
    assert report[NAME].applied == 1
    assert result.dtype == dtype
    assert error(result, exact) <= 1.5 * error(eager, exact)


class Frozen(nn.Module):
    """Fine-tuning with frozen statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.conv = (
            nn.Embedding(20, 4),
            nn.BatchNorm1d(4),
            nn.Conv1d(4, 6, 3),
        )

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, ids):
        return torch.tanh(self.conv(self.norm(self.embed(ids).transpose(1, 2))))


def test_fine_tuning_with_frozen_statistics_walks_the_same_path() -> None:
    check_training(lambda: randomise(Frozen()), applied={NAME: 1}, passes=[NAME])


# ---- refuses -------------------------------------------------------------------------------------


class Also(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y).sum() + torch.tanh(y)


class Returned(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y), y


class Shared(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + self[1](x)


class Region(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            return self[1](y)


class Computed(nn.Sequential):
    def forward(self, x):
        norm = self[0]
        scale = norm.weight * x.mean()
        statistics = norm.running_mean, norm.running_var
        return self[1](nn.functional.batch_norm(x, *statistics, scale, norm.bias))


class Turned(nn.Sequential):
    """A linear layer over another axis than the channels."""

    def forward(self, x):
        return nn.functional.linear(self[0](x), self[1].weight[:, :, 0, 0].repeat(1, 2))


class Written(nn.Sequential):
    """The caller's tensor changes before the layer that reads its BatchNorm."""

    def forward(self, x):
        y = self[0](x)
        x.mul_(2)
        return self[1](y)


REFUSED = {
    Also: "reader",
    Returned: "output",
    Shared: "tied",
    Region: "region",
    Computed: "not-a-weight",
    Turned: "reader",
    Written: "written",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Sequential]) -> None:
    model = randomise(cls(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1))).eval()
    with torch.no_grad():
        result, report = run(model, SPACE.clone(), **ONLY)
        expected = model(SPACE.clone())
    agree(result, expected)
    assert refusals(report, NAME) == [REFUSED[cls]]


def test_a_sliced_input_keeps_its_batch_norm() -> None:
    """Its result is contiguous, its input is not: what the layer returns would have other strides."""
    model = network(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1))
    with torch.no_grad():
        result, report = run(lambda x: model(x[:, :, 1:, ::2]), SPACE, **ONLY)
        assert error(result, model(SPACE[:, :, 1:, ::2])) < 1e-6
    assert refusals(report, NAME) == ["layout"]


def test_transposed_convolutions_are_refused() -> None:
    """What a tap adds depends on the position: zeros stand between the inputs."""
    model = network(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, stride=2))
    with torch.no_grad():
        _, report = run(model, SPACE, **ONLY)
    assert refusals(report, NAME) == ["reader"]


def test_batch_statistics_stay() -> None:
    model = network(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)).train()
    plain = copy.deepcopy(model)
    result, report = run(model, SPACE, **ONLY)
    assert refusals(report, NAME) == ["batch-statistics"]
    assert error(result, plain(SPACE)) < 1e-6


def test_training_and_gathered_weights_are_refused_unless_named() -> None:
    model = network(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1))
    _, report = run(model, SPACE)
    assert "training" in refusals(report, NAME)
    with torch.no_grad():
        _, report = run(managed_by_fsdp(model), SPACE)
    assert "gathered" in refusals(report, NAME)
