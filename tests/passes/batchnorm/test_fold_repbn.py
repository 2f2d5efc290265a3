"""fold-repbn: RepBN is one BatchNorm, and then it can fold further; where it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from support import check_exact, check_training, error, randomise, refusals, run
from torch import nn

NAME = "fold-repbn"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 4)


class RepBN(nn.Module):
    """SLAB's layer, over the features of tokens."""

    def __init__(self, d: int, affine: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(d, affine=affine)

    def forward(self, x):
        x = x.transpose(1, 2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


class Block(nn.Module):
    """A residual stream, RepBN where a transformer has LayerNorm, linear layers behind it."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 4), RepBN(4, affine)
        self.q, self.v = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.embed(x))
        y = self.norm(x)
        return x + self.out(torch.tanh(self.q(y)) * self.v(y))


class PRepBN(nn.Module):
    """Progressive: LayerNorm fades into RepBN while it trains; in evaluation RepBN alone is left."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.fraction = nn.LayerNorm(d), RepBN(d), 0.3

    def forward(self, x):
        if self.training:
            return self.fraction * self.norm1(x) + (1 - self.fraction) * self.norm2(x)
        return self.norm2(x)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dynamic", [None, True])
def test_folds_and_then_into_the_readers(affine: bool, dynamic: bool | None) -> None:
    model = randomise(Block(affine)).eval()
    check_exact(model, X, applied={NAME: 1}, dynamic=dynamic, **ONLY)
    applied = {NAME: 1, "fold-batchnorm": 0, "push-batchnorm": 1}
    check_exact(model, X, applied=applied, dynamic=dynamic)


def test_folds_and_then_into_the_producer() -> None:
    """The layer's own bias is scaled by γ/s + η, not by γ/s."""
    model = randomise(nn.Sequential(nn.Linear(4, 6), RepBN(6))).eval()
    check_exact(model, X, applied={NAME: 1, "fold-batchnorm": 1})


def test_progressive() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), PRepBN(6), nn.Linear(6, 3)))
    check_exact(model.eval(), X, applied={NAME: 1, "fold-batchnorm": 1})
    plain = copy.deepcopy(model.train())
    result, report = run(model, X)
    assert refusals(report, NAME) == ["batch-statistics"]
    assert error(result, plain(X)) < 1e-6


@pytest.mark.parametrize("spelled", [lambda x: x, lambda x: x * 0.5, lambda x: -2.0 * x])
@pytest.mark.parametrize("first", [True, False])
def test_numbers_and_the_input_itself(spelled, first: bool) -> None:
    class Plain(nn.BatchNorm2d):
        def forward(self, x):
            y, z = super().forward(x), spelled(x)
            return y + z if first else z + y

    check_exact(randomise(Plain(4)).eval(), torch.randn(2, 4, 5, 5), applied={NAME: 1}, **ONLY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_eager(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(RepBN(32), nn.Linear(32, 32))).eval().to(dtype)
    x = torch.randn(8, 5, 32).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        result, report = run(model, x)
        eager = model(x)
    assert report[NAME].applied == 1
    assert error(result, exact) <= 1.5 * error(eager, exact)


def test_updated_after_compile() -> None:
    model = randomise(Block()).eval()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 1}}
    )
    with torch.no_grad():
        for seed in (1, 2):
            assert error(fast(X), model(X)) < 1e-5
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
        model.norm.alpha.data.mul_(3)
        assert error(fast(X), model(X)) < 1e-5


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 4), RepBN(4), nn.Linear(4, 3)

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.bn.eval()
        return self

    def forward(self, ids):
        # With the transposed value PyTorch traces other strides than the operator returns.
        x = self.embed(ids).flatten(0, 1)
        return torch.tanh(self.head(self.norm.bn(x) + x * self.norm.alpha))


def test_fine_tuning_with_frozen_statistics_walks_the_same_path() -> None:
    check_training(lambda: randomise(Frozen()), applied={NAME: 1}, passes=[NAME])


# ---- refuses -------------------------------------------------------------------------------------


class Read(nn.BatchNorm1d):
    def forward(self, x):
        y = super().forward(x)
        return (y + x) * y


class Region(nn.BatchNorm1d):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = super().forward(x)
        return y + x


class Widened(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + self.weight[:1].double() * x


class Computed(nn.BatchNorm1d):
    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *statistics, self.weight * x.mean(), self.bias) + x


class Of(nn.BatchNorm1d):
    """The multiple of something else: not RepBN."""

    def forward(self, x):
        return super().forward(x) + 2 * torch.relu(x)


class Written(nn.BatchNorm1d):
    """The caller's tensor changes between the two reads."""

    def forward(self, x):
        y = super().forward(x)
        x[0] += 1
        return y + x


REFUSED = {
    Read: ["fan-out"],
    Region: ["region"],
    Widened: ["widened"],
    Written: ["written"],
    Computed: ["not-a-weight"],
    Of: [],
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Module]) -> None:
    model = randomise(cls(4)).eval()
    with torch.no_grad():
        x = X.transpose(1, 2)
        result, report = run(model, x.clone(), **ONLY)
        assert error(result, model(x.clone())) < 1e-6
    assert refusals(report, NAME) == REFUSED[cls]
    assert report[NAME].applied == 0
