"""fold-shift: constants into the bias of the linear layer before them, and where they must stay."""

from __future__ import annotations

import copy

import pytest
import torch
from support import check_exact, check_training, error, ids, randomise, refusals, run
from torch import nn

NAME = "fold-shift"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 8)
SPACE = torch.randn(2, 8, 6, 5)


class Shifted(nn.Module):
    """A layer, a constant and how the two meet."""

    def __init__(self, join, bias: bool = True, shape: tuple[int, ...] = (8,)) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=bias)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.c, self.d = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(8))
        self.matrix = nn.Parameter(torch.ones(8, 8))
        self.join = join

    def forward(self, x):
        return self.join(self, x)


# ---- fires ---------------------------------------------------------------------------------------

SPELLINGS = {
    "add": lambda m, x: m.linear(x) + m.c,
    "from the left": lambda m, x: m.c + m.linear(x),
    "sub": lambda m, x: m.linear(x) - m.c,
    "alpha": lambda m, x: torch.add(m.linear(x), m.c, alpha=3),
    "alpha of sub": lambda m, x: torch.sub(m.linear(x), m.c, alpha=0.5),
    "in place": lambda m, x: m.linear(x).add_(m.c),
    "matmul": lambda m, x: x @ m.matrix + m.c,
    "mm": lambda m, x: x[0] @ m.matrix + m.c,
    "transposed": lambda m, x: x[0] @ m.matrix.t() + m.c,
    "addmm": lambda m, x: torch.addmm(m.d, x[0], m.matrix) + m.c,
    "permuted": lambda m, x: m.linear(x).flatten(0, 1).unsqueeze(1).transpose(0, 1) + m.c,
    "mean of tokens": lambda m, x: m.linear(x).mean(1) + m.c,
    "residual": lambda m, x: (x + torch.tanh(x) + m.linear(x)) + m.c,
    "residual, subtracted": lambda m, x: (x - m.linear(x)) - m.c,
    "expression": lambda m, x: m.linear(x) + (m.c * m.d - 1),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", SPELLINGS)
def test_spellings(how: str, bias: bool, dynamic: bool | None) -> None:
    model = randomise(Shifted(SPELLINGS[how], bias))
    check_exact(model, X, applied={NAME: 1}, dynamic=dynamic, **ONLY)


@pytest.mark.parametrize("bias", [True, False])
def test_convolution(bias: bool) -> None:
    model = Shifted(lambda m, x: m.conv(x) + m.c, bias, (8, 1, 1))
    check_exact(randomise(model), SPACE, applied={NAME: 1}, **ONLY)


def test_several_constants_on_one_layer() -> None:
    model = Shifted(lambda m, x: (x + (m.linear(x) + m.c) + m.d) - m.c, bias=False)
    check_exact(randomise(model), X, applied={NAME: 3}, **ONLY)


class Frozen(nn.Module):
    """Detection models' frozen BatchNorm: a scale and a shift made of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3, bias=False)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x):
        w, b, m, v = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (v + 1e-5).rsqrt()
        return self.conv(x) * scale + (b - m * scale)


def test_frozen_batch_norm_after_its_scale() -> None:
    check_exact(randomise(Frozen()), SPACE, applied={"fold-layerscale": 1, NAME: 1})


def test_old_bias_and_weight_stay_for_their_other_readers() -> None:
    model = Shifted(lambda m, x: (m.linear(x) + m.c) * m.linear(x + 1))
    check_exact(randomise(model), X, applied={NAME: 1}, **ONLY)


@pytest.mark.parametrize("how", ["add", "residual", "matmul"])
def test_half_precision_is_as_near_to_fp64_as_eager(how: str) -> None:
    model = randomise(Shifted(SPELLINGS[how])).eval()
    x = torch.randn(16, 64, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        model, x = model.bfloat16(), x.bfloat16()
        result, report = run(model, x, **ONLY)
        eager = model(x)
    assert report[NAME].applied == 1
    assert result.dtype == torch.bfloat16
    assert error(result, exact) <= 1.5 * error(eager, exact)
    assert (result - exact).norm() <= 1.5 * (eager - exact).norm()


def test_weights_updated_after_compile() -> None:
    model = randomise(Shifted(SPELLINGS["residual"])).eval()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 1}}
    )
    with torch.no_grad():
        fast(X)
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(X), model(X)) < 1e-6


def test_other_sizes_do_not_recompile() -> None:
    model = randomise(Shifted(SPELLINGS["residual"])).eval()
    torch._dynamo.reset()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 7, 11):
            x = torch.randn(3, tokens, 8)
            assert error(fast(x), model(x)) < 1e-6


class FromIds(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(20, 8), inner

    def forward(self, tokens):
        return torch.tanh(self.inner(self.embed(tokens)))


@pytest.mark.parametrize("how", ["residual", "matmul"])
def test_training_walks_the_same_path_unasked(how: str) -> None:
    build = lambda: randomise(FromIds(Shifted(SPELLINGS[how])))  # noqa: E731
    check_training(build, applied={NAME: 1})


# ---- refuses -------------------------------------------------------------------------------------


def partly(m, x):
    with torch.no_grad():
        y = m.linear(x)
    return y + m.c


def rejoined(m, x):
    y = m.linear(x)
    return (y + m.c) * y


def stream(m, x):
    h = x + m.linear(x)
    return (h + m.c).tanh() + h


def written(m, x):
    y = m.linear(x) + m.c
    y[0] = 0
    return y


REFUSED = {
    "fan-out": rejoined,
    "fan-out of the sum": stream,
    "written": written,
    "layout": lambda m, x: (m.linear(x)[:, 1:] + m.c).view(-1),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    report = check_exact(randomise(Shifted(REFUSED[code])), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == [code.split()[0]]


def test_refuses_to_leave_a_no_grad_region() -> None:
    model = randomise(Shifted(partly))
    result, report = run(model, X, lower="aot_eager", **ONLY)
    assert refusals(report, NAME) == ["region"]
    result.sum().backward()
    assert model.c.grad is not None


def test_a_second_way_is_found_where_the_first_is_read_elsewhere() -> None:
    def two(m, x):
        y = m.linear(x)
        return (y + (x @ m.matrix)) + m.c + y

    check_exact(randomise(Shifted(two)), X, applied={NAME: 1}, **ONLY)


NOT_A_SHIFT = {
    "doubled": lambda m, x: (lambda y: y + y + m.c)(m.linear(x)),
    "scaled": lambda m, x: m.linear(x) * x.mean(-1, keepdim=True) + m.c,
    "activation": lambda m, x: torch.relu(m.linear(x)) + m.c,
    "number": lambda m, x: m.linear(x) + 1,
    "negated": lambda m, x: m.c - m.linear(x),
    "weighted": lambda m, x: torch.add(m.c, m.linear(x), alpha=2),
    "addmm with beta": lambda m, x: torch.addmm(m.d, x[0], m.matrix, beta=0.5) + m.c,
    "weighted summand": lambda m, x: torch.add(x, m.linear(x), alpha=2) + m.c,
    "added to an input": lambda m, x: m.linear(x + m.c),
    "padded": lambda m, x: nn.functional.pad(m.linear(x), (0, 0, 1, 1)) + m.c,
    "sum of tokens": lambda m, x: m.linear(x).sum(1) + m.c,
    "joined": lambda m, x: torch.cat([m.linear(x), x], 1) + m.c,
}


@pytest.mark.parametrize("how", NOT_A_SHIFT)
def test_what_is_no_shift(how: str) -> None:
    report = check_exact(randomise(Shifted(NOT_A_SHIFT[how])), X, applied={NAME: 0}, **ONLY)
    assert report[NAME].matches == []


def test_a_size_takes_no_shift() -> None:
    """A symbolic size is an operand without a shape."""
    model = randomise(Shifted(lambda m, x: m.linear(x) * (x.shape[1] + m.c)))
    check_exact(model, X, applied={NAME: 0}, dynamic=True, **ONLY)


@pytest.mark.parametrize("shape", [(5, 1), (5, 8), (1,), (3, 1, 8)])
def test_other_axes_are_no_shift(shape: tuple[int, ...]) -> None:
    model = randomise(Shifted(SPELLINGS["add"], shape=shape))
    report = check_exact(model, X, applied={NAME: 0}, **ONLY)
    assert report[NAME].matches == []


def test_a_wider_constant_is_not_rounded() -> None:
    model = randomise(Shifted(lambda m, x: m.linear(x).float() + m.c)).eval()
    model.linear.bfloat16()
    with torch.no_grad():
        result, report = run(model, X.bfloat16(), **ONLY)
        assert torch.equal(result, model(X.bfloat16()))
    assert report[NAME].matches == []


def test_inputs_and_ids_are_untouched() -> None:
    model = randomise(FromIds(Shifted(SPELLINGS["in place"]))).eval()
    tokens = ids()
    before = tokens.clone()
    check_exact(model, tokens, applied={NAME: 1}, **ONLY)
    assert torch.equal(tokens, before)


def test_a_convolution_keeps_its_bias_in_training() -> None:
    """PyTorch sums its gradient naively: three times eager's rounding error was measured."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.c = nn.Conv2d(4, 4, 3), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return self.conv(x) + self.c

    model, x = randomise(Shifted()), torch.randn(2, 4, 6, 6)
    _, report = run(model, x, passes=[NAME])
    assert refusals(report, NAME) == ["bias-gradient"]
    with torch.no_grad():
        _, report = run(model, x, passes=[NAME])
    assert report[NAME].applied == 1


def test_one_part_of_a_split() -> None:
    """A constant behind one part must not reach the other."""
    model, x = randomise(Shifted(lambda m, x: m.linear(x))), torch.randn(4, 8)

    def both(x):
        first, second = model.linear(x).split(2, dim=0)
        return first + model.c, second

    with torch.no_grad():
        result, report = run(both, x, **ONLY)
        expected = both(x)
        assert all(error(a, b) < 1e-6 for a, b in zip(result, expected, strict=True))
        assert refusals(report, NAME) == ["fan-out"]
        result, report = run(lambda x: both(x)[0], x, **ONLY)
        assert error(result, expected[0]) < 1e-6
    assert report[NAME].applied == 1
