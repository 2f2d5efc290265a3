"""fold-batchnorm: BatchNorm into the layer before it, in every layout, and where it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from support import check_exact, check_training, error, managed_by_fsdp, randomise, refusals, run
from torch import nn

NAME = "fold-batchnorm"
ONLY = {"passes": [NAME]}
SPACE = torch.randn(2, 4, 9, 8)


def network(*layers: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(*layers)).eval()


# ---- fires ---------------------------------------------------------------------------------------

PRODUCERS = {
    "plain": (nn.Conv2d(4, 8, 3), SPACE),
    "strided": (nn.Conv2d(4, 8, 3, stride=2, padding=1), SPACE),
    "dilated": (nn.Conv2d(4, 8, 3, dilation=2, padding="same"), SPACE),
    "reflected": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), SPACE),
    "without bias": (nn.Conv2d(4, 8, (3, 1), bias=False), SPACE),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), SPACE),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), SPACE),
    "1d": (nn.Conv1d(4, 8, 3), SPACE[..., 0]),
    "3d": (nn.Conv3d(4, 8, (1, 3, 2)), SPACE[..., None].expand(-1, -1, -1, -1, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), SPACE),
    "transposed, square": (nn.ConvTranspose2d(4, 4, 3), SPACE),
    "transposed, grouped": (nn.ConvTranspose2d(4, 8, 3, groups=2), SPACE),
    "transposed, depthwise": (nn.ConvTranspose1d(4, 4, 3, groups=4, bias=False), SPACE[..., 0]),
    "transposed, 3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), SPACE[..., None]),
    "linear": (nn.Linear(4, 8), SPACE[:, :, 0, 0]),
    "linear without bias": (nn.Linear(4, 8, bias=False), SPACE[:, :, 0, 0]),
}


def channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def norm_for(layer: nn.Module, features: int | None = None, **options) -> nn.Module:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return kinds[layer.weight.dim()](features or channels(layer), **options)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", PRODUCERS)
def test_every_producer(kind: str, affine: bool) -> None:
    layer, x = PRODUCERS[kind]
    model = network(layer, norm_for(layer, affine=affine))
    check_exact(model, x, applied={NAME: 1}, **ONLY)


def test_no_batch_norm_is_left() -> None:
    model = network(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )
    check_exact(model, SPACE, applied={NAME: 2}, **ONLY)


@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-4])
def test_scales_that_are_zero_negative_or_small(scale: float) -> None:
    model = network(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[1].weight[::2] = scale
        model[1].running_var[1] = 0.0
    check_exact(model, SPACE, applied={NAME: 1}, **ONLY)


class OverTokens(nn.Module):
    """SLAB and LeViT: BatchNorm over the features of tokens."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.flat = nn.Linear(4, 8), nn.BatchNorm1d(8), flat

    def forward(self, x):
        y = self.linear(x)
        if self.flat:
            return self.norm(y.flatten(0, 1)).reshape_as(y)
        return self.norm(y.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("dynamic", [None, True])
def test_over_tokens(flat: bool, dynamic: bool | None) -> None:
    model = randomise(OverTokens(flat)).eval()
    check_exact(model, torch.randn(3, 5, 4), applied={NAME: 1}, dynamic=dynamic, **ONLY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_eager(dtype: torch.dtype) -> None:
    model = network(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    exact = copy.deepcopy(model).double()(SPACE.double())
    model = model.to(dtype)
    with torch.no_grad():
        result, report = run(model, SPACE.to(dtype), **ONLY)
        eager = model(SPACE.to(dtype))
    assert report[NAME].applied == 2
    assert result.dtype == dtype
    assert error(result, exact) <= 1.5 * error(eager, exact)


def test_statistics_and_weights_updated_after_compile() -> None:
    model = network(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 1}}
    )
    with torch.no_grad():
        for _ in range(2):
            assert error(fast(SPACE), model(SPACE)) < 1e-5
            model.train()(SPACE * 3 + 1)  # moves the running statistics, and no version counter
            model.eval()
            assert error(fast(SPACE), model(SPACE)) < 1e-5
            model.load_state_dict(randomise(copy.deepcopy(model), 3).state_dict())


class FrozenStatistics(nn.Module):
    """Fine-tuning with ``bn.eval()``: the statistics stay, the weights learn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(20, 4), OverTokens(flat=False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.block.norm.eval()
        return self

    def forward(self, ids):
        return torch.tanh(self.block(self.embed(ids)))


def test_fine_tuning_with_frozen_statistics_walks_the_same_path() -> None:
    check_training(lambda: randomise(FrozenStatistics()), applied={NAME: 1}, passes=[NAME])


class Joined(nn.Module):
    """BatchNorm over what several convolutions make."""

    def __init__(self, join, features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm, self.join = nn.BatchNorm2d(features), join

    def forward(self, x):
        return self.norm(self.join(self.first(x), self.second(x)))


JOINS = {
    "sum": (lambda a, b: a + b, 6),
    "difference": (lambda a, b: torch.sub(a, b, alpha=2), 6),
    "concatenation": (lambda a, b: torch.cat((a, b), 1), 12),
    "concatenation of a sum": (lambda a, b: torch.cat((a[:1] + b, a[1:]), 0), 6),
    "sum of concatenations": (lambda a, b: torch.cat((a, b), 2) + torch.cat((b, a), 2), 6),
    "sum before resizing": (lambda a, b: nn.functional.interpolate(a + b, scale_factor=2), 6),
    "sum before pooling": (lambda a, b: nn.functional.adaptive_avg_pool2d(a + b, 2), 6),
    "with itself": (lambda a, b: a + a + b, 6),
    "before padding": (lambda a, b: nn.functional.pad(a + b, (1, 1)), 6),
    "under a padded pool": (lambda a, b: nn.functional.avg_pool2d(a + b, 3, padding=1), 6),
    "one difference, the other sum": (lambda a, b: -(a + b), 6),
}
FOLDED = ("sum", "difference", "concatenation", "sum before resizing", "sum before pooling")


@pytest.mark.parametrize("join", JOINS)
def test_folds_into_every_summand_and_part(join: str) -> None:
    model = randomise(Joined(*JOINS[join])).eval()
    check_exact(model, SPACE, applied={NAME: int(join in FOLDED)}, **ONLY)


class Nested(nn.Module):
    """A concatenation of a concatenation and a sum: each part takes its own elements."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, n, 1) for n in (2, 3, 4, 4))
        self.norm = nn.BatchNorm2d(9)

    def forward(self, x):
        a, b, c, d = (layer(x) for layer in self.layers)
        return self.norm(torch.cat((torch.cat((a, b), 1), c + d), 1))


def test_nested_concatenations() -> None:
    check_exact(randomise(Nested()).eval(), SPACE, applied={NAME: 1}, **ONLY)


class Sliced(nn.Sequential):
    """BatchNorm of a part, and a view of its result that holds for contiguous tensors alone."""

    def forward(self, x):
        return self[1](self[0](x)[:, :, 1:]).view(-1)


def test_a_view_behind_a_sliced_value() -> None:
    model = randomise(Sliced(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).eval()
    check_exact(model, SPACE, applied={NAME: 1}, **ONLY)


def test_channels_last_stays() -> None:
    model = network(
        nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 3, groups=2)
    )
    model.append(nn.BatchNorm2d(8)).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        result, report = run(model, SPACE, **ONLY)
        expected = model(SPACE)
    assert report[NAME].applied == 2
    assert result.stride() == expected.stride()
    assert error(result, expected) < 1e-5


# ---- refuses -------------------------------------------------------------------------------------


class TwoReaders(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


class SharedConvolution(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + self[0](x + 1)


class Between(nn.Sequential):
    def forward(self, x):
        return self[1](torch.relu(self[0](x)))


class Region(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self[0](x)
        return self[1](y.float())


class Computed(nn.Sequential):
    def forward(self, x):
        norm = self[1]
        scale = norm.weight * x.mean()
        return nn.functional.batch_norm(
            self[0](x), norm.running_mean, norm.running_var, scale, norm.bias
        )


REFUSED = {
    TwoReaders: "fan-out",
    SharedConvolution: "tied",
    Between: "producer",
    Region: "region",
    Computed: "not-a-weight",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Sequential]) -> None:
    model = randomise(cls(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).eval()
    with torch.no_grad():
        result, report = run(model, SPACE, **ONLY)
        assert error(result, model(SPACE)) < 1e-6
    assert refusals(report, NAME) == [REFUSED[cls]]


def test_batch_statistics_stay() -> None:
    layers = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
    _, report = run(network(*layers), SPACE, **ONLY)
    assert refusals(report, NAME) == ["batch-statistics"]
    model = network(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).train()
    plain = copy.deepcopy(model)
    result, report = run(model, SPACE, **ONLY)
    assert refusals(report, NAME) == ["batch-statistics"]
    assert error(result, plain(SPACE)) < 1e-6
    assert torch.equal(model[1].running_var, plain[1].running_var)


def test_other_norms_are_left_alone() -> None:
    model = network(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True))
    check_exact(model, SPACE, applied={NAME: 0}, **ONLY)


class Standardized(nn.Conv2d):
    """A convolution of an NFNet: the operator normalizes the weight, by its own statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = nn.functional.batch_norm(rows, None, None, training=True)
        return nn.functional.conv2d(x, rows.reshape_as(self.weight), self.bias)


def test_a_standardized_weight_is_no_activation() -> None:
    with torch.no_grad():
        _, report = run(network(Standardized(4, 8, 3)), SPACE)
    assert not report[NAME].matches
    folded = network(Standardized(4, 8, 3), nn.BatchNorm2d(8))
    check_exact(folded, SPACE, applied={NAME: 1}, **ONLY)


def test_training_and_gathered_weights_are_refused_unless_named() -> None:
    model = network(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    _, report = run(model, SPACE)
    assert "training" in refusals(report, NAME)
    with torch.no_grad():
        _, report = run(managed_by_fsdp(model), SPACE)
    assert "gathered" in refusals(report, NAME)
