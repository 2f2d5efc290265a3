"""push-affine: scales and shifts by weights, into the layers behind them, without a norm before."""

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

import sparsecc

NAME = "push-affine"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 8)


class UnifiedNorm(nn.Module):
    """Unified Normalization in inference: a running second moment, no mean."""

    def __init__(self, d: int, spelling: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))
        self.spelling = spelling

    def forward(self, x):
        v = self.running_var + 1e-5
        if self.spelling == 0:
            return x / torch.sqrt(v) * self.weight + self.bias
        if self.spelling == 1:
            return self.weight * (x * torch.rsqrt(v)) + self.bias
        return torch.addcmul(self.bias, x, self.weight * v.rsqrt())


class Block(nn.Module):
    def __init__(self, spelling: int = 0) -> None:
        super().__init__()
        self.norm = UnifiedNorm(8, spelling)
        self.q, self.v, self.out = (
            nn.Linear(8, 6),
            nn.Linear(8, 6, bias=False),
            nn.Linear(6, 8),
        )

    def forward(self, x):
        y = self.norm(x)
        return x + self.out(torch.tanh(self.q(y)) * self.v(y))


@pytest.mark.parametrize("spelling", [0, 1])
@pytest.mark.parametrize("dynamic", [None, True])
def test_unified_normalization(spelling: int, dynamic: bool | None) -> None:
    model = randomise(nn.Sequential(Block(spelling), Block(spelling)))
    check_exact(model, X, applied={NAME: 2}, dynamic=dynamic, **ONLY)


def test_another_spelling_is_left_alone() -> None:
    check_exact(randomise(Block(2)), X, applied={NAME: 0}, **ONLY)


class Smoothed(nn.Module):
    """What SmoothQuant leaves before a layer without a norm; a number and a cast of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(1, 8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.linear((torch.relu(x) / self.scale * 0.5).reshape(-1, 8))


def test_a_scale_alone_through_a_reshape() -> None:
    check_exact(randomise(Smoothed()), X, applied={NAME: 1}, **ONLY)


def test_norms_are_left_to_their_own_pass() -> None:
    class Normed(Block):
        def forward(self, x):
            return super().forward(nn.functional.layer_norm(x, (8,)) * self.norm.weight)

    model = randomise(Normed())
    _, report = run(model.eval().requires_grad_(False), X, passes=[NAME, "fold-norm-affine"])
    assert report[NAME].applied == 1  # UN's own; the norm's factor is not counted
    assert len(report[NAME].matches) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_eager(dtype: torch.dtype) -> None:
    model = randomise(Block()).to(dtype)
    exact = copy.deepcopy(model).double()(X.to(dtype).double())
    with torch.no_grad():
        result, report = run(model, X.to(dtype), **ONLY)
        eager = model(X.to(dtype))
    assert report[NAME].applied == 1
    assert error(result, exact) <= 1.5 * error(eager, exact)


def test_updated_after_compile() -> None:
    model = randomise(Block())
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 1}}
    )
    with torch.no_grad():
        for seed in (1, 2):
            assert error(fast(X), model(X)) < 1e-5
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
        model.norm.running_var.mul_(2)
        assert error(fast(X), model(X)) < 1e-5


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(20, 8), Block()

    def forward(self, ids):
        return torch.tanh(self.block(self.embed(ids)))


def test_training_walks_the_same_path() -> None:
    check_training(lambda: randomise(Trained()), applied={NAME: 1}, passes=[NAME])


# ---- refuses -------------------------------------------------------------------------------------


class Read(Block):
    def forward(self, x):
        y = self.norm(x)
        return self.q(y).sum() + y


class Returned(Block):
    def forward(self, x):
        y = self.norm(x)
        return self.q(y), y


class Shared(Block):
    def forward(self, x):
        return self.q(self.norm(x)) + self.q(x)


class Region(Block):
    def forward(self, x):
        y = self.norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.q(y)


class Widened(Block):
    def forward(self, x):
        return nn.functional.linear(x * self.norm.weight.double(), self.q.weight.double())


class Written(Block):
    """The caller's tensor changes before the layers that read what is made of it."""

    def forward(self, x):
        y = self.norm(x)
        x.mul_(2)
        return self.q(y)


REFUSED = {
    Read: "reader",
    Returned: "output",
    Shared: "tied",
    Region: "region",
    Widened: "widened",
    Written: "written",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Module]) -> None:
    model = randomise(cls()).eval()
    with torch.no_grad():
        result, report = run(model, X.clone(), **ONLY)
        expected = model(X.clone())
    agree(result, expected)
    assert refusals(report, NAME) == [REFUSED[cls]]


def test_a_sliced_input_keeps_its_scale() -> None:
    """What is scaled is not contiguous, the result is: a reader could tell."""
    model = randomise(Smoothed()).eval()
    with torch.no_grad():
        result, report = run(
            lambda x: model.linear(x[:, 1:, ::2] / model.scale), X.repeat(1, 1, 2), **ONLY
        )
        expected = model.linear(X.repeat(1, 1, 2)[:, 1:, ::2] / model.scale)
    assert error(result, expected) < 1e-6
    assert refusals(report, NAME) == ["layout"]


def test_a_symbolic_number_is_no_weight() -> None:
    """With dynamic=True a Python float is an input of the graph, and an operand without a shape."""
    model = randomise(Block()).eval().requires_grad_(False)
    report = sparsecc.Report()
    options = {**ONLY, "lower": "aot_eager", "report": report, "strict": True}
    fast = torch.compile(
        lambda x, s: model(x * s + s), backend="sparsecc", options=options, dynamic=True
    )
    for number in (0.5, 1.75):
        assert error(fast(X, number), model(X * number + number)) < 1e-6
    assert report.graphs[-1].passes[NAME].applied == 1


def test_training_and_gathered_weights_are_refused_unless_named() -> None:
    model = randomise(Block())
    _, report = run(model, X)
    assert "training" in refusals(report, NAME)
    with torch.no_grad():
        _, report = run(managed_by_fsdp(model), X)
    assert "gathered" in refusals(report, NAME)
