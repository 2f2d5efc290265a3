"""merge-duplicates: equal layers on equal inputs run once, and where two calls must stay two."""

from __future__ import annotations

import copy

import pytest
import torch
from support import capture, check_exact, check_training, error, randomise, refusals, run
from torch import nn

from sparsecc.passes.analysis.linear import linears
from sparsecc.passes.base import Analyses

NAME = "merge-duplicates"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 8)
SPACE = torch.randn(2, 8, 6, 5)


class Twice(nn.Module):
    """Layers, and a function that calls some of them twice."""

    def __init__(self, calls) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.matrix = nn.Parameter(torch.ones(8, 8))
        self.calls = calls

    def forward(self, x):
        return self.calls(self, x)


def branch(m, x):
    return m.conv(torch.relu(m.conv(x)))


def regional(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.tanh(m.a(x)).float()
    return y + m.a(x)


def rewritten(m, x):
    y = x * 2
    first = m.a(y)
    y[0] = 0
    return first + m.a(y)


def result_written(m, x):
    y, z = m.a(x), m.a(x)
    y[0] = 0
    return y * 2 + z


def rows(m, x):
    y = torch.stack([x, x])
    return m.a(y[0]) * m.a(y[1])


FIRES = {
    "linear": (lambda m, x: m.a(x) * torch.tanh(m.a(x)), X, 1),
    "three times": (lambda m, x: m.a(x) * torch.tanh(m.a(x)) - m.a(x).relu(), X, 2),
    "one is returned": (lambda m, x: (m.a(x), m.a(x) * 2), X, 1),
    "weight taken twice": (lambda m, x: (x @ m.matrix.t()).exp() * (x @ m.matrix.t()), X, 1),
    "addmm": (lambda m, x: torch.addmm(m.a.bias, x[0], m.matrix) * torch.addmm(m.a.bias, x[0], m.matrix), X, 1),
    "through views": (lambda m, x: m.a(x.flatten(0, 1)).exp() - m.a(x.flatten(0, 1)), X, 1),
    "convolution": (lambda m, x: m.conv(x) * m.conv(x).sigmoid(), SPACE, 1),
    "grouped": (lambda m, x: m.depthwise(x) * m.depthwise(x).sigmoid(), SPACE, 1),
    "transposed": (lambda m, x: m.up(x) * m.up(x).sigmoid(), SPACE, 1),
    "whole branches": (lambda m, x: branch(m, x) * branch(m, x).sigmoid(), SPACE, 2),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("how", FIRES)
def test_fires(how: str, dynamic: bool | None) -> None:
    calls, x, count = FIRES[how]
    model = randomise(Twice(calls))
    check_exact(model, x, applied={NAME: count}, dynamic=dynamic, **ONLY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", FIRES)
def test_bitwise(how: str, dtype: torch.dtype) -> None:
    calls, x, _ = FIRES[how]
    model, x = randomise(Twice(calls)).eval().to(dtype), x.to(dtype)
    with torch.no_grad():
        result, _ = run(model, x, **ONLY)
        expected = model(x)
    pairs = (
        zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_convolution_called_twice_is_no_longer_tied() -> None:
    model = randomise(Twice(lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x)).relu()))
    report = check_exact(model, SPACE, applied={"fold-batchnorm": 0}, passes=["fold-batchnorm"])
    assert refusals(report, "fold-batchnorm") == ["tied"] * 2
    check_exact(model, SPACE, applied={NAME: 2, "fold-batchnorm": 1})


def test_norms_of_the_batch_are_two() -> None:
    """Each moves the running statistics."""
    model = randomise(Twice(lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x)).relu())).train()
    plain = copy.deepcopy(model)
    result, report = run(model, SPACE, lower="aot_eager", **ONLY)
    assert report[NAME].applied == 1
    assert error(result, plain(SPACE)) < 1e-5
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)


def test_other_sizes_do_not_recompile() -> None:
    model = randomise(Twice(FIRES["linear"][0])).eval()
    torch._dynamo.reset()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 7, 11):
            x = torch.randn(3, tokens, 8)
            assert torch.equal(fast(x), model(x))


def test_weights_updated_after_compile() -> None:
    model = randomise(Twice(FIRES["linear"][0])).eval()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        fast(X)
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert torch.equal(fast(X), model(X))


class FromIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        x = self.embed(tokens)
        return torch.tanh(self.a(x)) * self.a(x)


def test_training_adds_the_gradients() -> None:
    check_training(lambda: randomise(FromIds()), applied={NAME: 1})


# ---- refuses -------------------------------------------------------------------------------------

REFUSED = {
    "escapes": lambda m, x: (m.a(x), m.a(x)),
    "escapes as a view": lambda m, x: (m.a(x)[1:], m.a(x).flatten()),
    "written": rewritten,
    "written result": result_written,
    "region": regional,
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    model = randomise(Twice(REFUSED[code])).eval()
    with torch.no_grad():
        result, report = run(model, X.clone(), **ONLY)
        expected = model(X.clone())
    assert refusals(report, NAME) == [code.split()[0]]
    pairs = (
        zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    )
    assert all(error(a, b) < 1e-6 for a, b in pairs)


def test_of_three_results_two_may_not_both_reach_the_caller() -> None:
    model = randomise(Twice(lambda m, x: (m.a(x).exp(), m.a(x), m.a(x))))
    report = check_exact(model, X, applied={NAME: 1}, **ONLY)
    assert refusals(report, NAME) == ["escapes"]


def test_no_grad_and_grad_stay_apart() -> None:
    def partly(m, x):
        with torch.no_grad():
            y = m.a(x)
        return y.detach() + m.a(x)

    model = randomise(Twice(partly))
    result, report = run(model, X, lower="aot_eager", **ONLY)
    assert refusals(report, NAME) == ["region"]
    result.sum().backward()
    assert model.a.weight.grad is not None


DIFFERENT = {
    "other weight": (lambda m, x: m.a(x) * m.b(x), X),
    "other input": (lambda m, x: m.a(x) * m.a(x + 1), X),
    "rows": (rows, X),
    "other bias": (lambda m, x: nn.functional.linear(x, m.a.weight) * m.a(x), X),
    "other stride": (
        lambda m, x: (m.conv(x).sum(), nn.functional.conv2d(x, m.conv.weight, m.conv.bias, 2)),
        SPACE,
    ),
    "noise": (lambda m, x: m.a(torch.rand_like(x)) * 0 + m.a(torch.rand_like(x)) * 0, X),
    "signed zero": (lambda m, x: m.a(x * 0.0) * m.a(x * -0.0), X),
}  # fmt: skip


@pytest.mark.parametrize("how", DIFFERENT)
def test_what_differs(how: str) -> None:
    calls, x = DIFFERENT[how]
    report = check_exact(randomise(Twice(calls)), x, applied={NAME: 0}, **ONLY)
    assert report[NAME].matches == []


def test_parameters_that_share_storage_are_two() -> None:
    """Nothing guards that they go on sharing: the second may get data of its own."""
    model = randomise(Twice(lambda m, x: m.a(x) * m.b(x).exp())).eval()
    model.b.weight.data, model.b.bias.data = model.a.weight.data, model.a.bias.data
    fast = torch.compile(model, backend="sparsecc", options={"lower": "eager"})
    with torch.no_grad():
        assert error(fast(X), model(X)) < 1e-6
        model.b.weight.data = torch.randn(8, 8)
        assert error(fast(X), model(X)) < 1e-6


def test_one_layer_is_left() -> None:
    program = capture(randomise(Twice(FIRES["three times"][0])).eval(), X)
    assert len(linears(program, Analyses(program))) == 3
