"""collapse-linear: two linear maps in one, in every spelling and window, and where they must stay two."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support import (
    capture,
    check_exact,
    check_training,
    error,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn

from sparsecc.passes.analysis.convolutions import Taps, taps
from sparsecc.passes.analysis.linear import linears
from sparsecc.passes.base import Analyses
from sparsecc.program import Program

NAME = "collapse-linear"
NAMED: dict[str, Any] = {"passes": {NAME: {"always": True}}}  # it need not pay
X = torch.randn(3, 5, 6)
SPACE = torch.randn(2, 4, 13, 11)


class Two(nn.Module):
    """6 → 12 → 7 features, and what happens between."""

    def __init__(self, calls, bias=(True, True)) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12, bias=bias[0]), nn.Linear(12, 7, bias=bias[1])
        self.A, self.B = nn.Parameter(torch.ones(6, 12)), nn.Parameter(torch.ones(12, 7))
        self.c, self.d = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(7))
        self.calls = calls

    def forward(self, x):
        return self.calls(self, x)


SPELLINGS = {
    "linear": lambda m, x: m.b(m.a(x)),
    "matmul": lambda m, x: x @ m.A @ m.B,
    "mm": lambda m, x: x[0] @ m.A @ m.B,
    "addmm": lambda m, x: torch.addmm(m.d, torch.addmm(m.c, x[0], m.A), m.B),
    "linear of matmul": lambda m, x: m.b(x @ m.A),
    "matmul of linear": lambda m, x: m.a(x) @ m.B,
    "mm of linear": lambda m, x: m.a(x[0]) @ m.B,
    "linear of addmm": lambda m, x: m.b(torch.addmm(m.c, x[0], m.A)),
    "addmm of linear": lambda m, x: torch.addmm(m.d, m.a(x[0]), m.B),
    "transposed": lambda m, x: x @ m.a.weight.t() @ m.b.weight.t(),
    "views": lambda m, x: m.b(m.a(x).view(-1, 12)),
    "views with sizes": lambda m, x: m.b(m.a(x).reshape(x.shape[0] * x.shape[1], -1)),
    "split tokens": lambda m, x: m.b(m.a(x).view(x.shape[0], 1, x.shape[1], 12)),
    "permuted": lambda m, x: m.b(m.a(x).transpose(0, 1).contiguous()),
    "one token": lambda m, x: m.b(m.a(x)[:, 0]),
    "mean of tokens": lambda m, x: m.b(m.a(x).mean(1)),
    "expanded": lambda m, x: m.b(m.a(x).unsqueeze(0).expand(2, -1, -1, 12)),
    "rolled": lambda m, x: m.b(torch.roll(m.a(x), 2, 1).flip(0)),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("bias", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize("how", SPELLINGS)
def test_spellings(how: str, bias: tuple[bool, bool], dynamic: bool | None) -> None:
    model = randomise(Two(SPELLINGS[how], bias))
    check_exact(model, X, applied={NAME: 1}, dynamic=dynamic, passes={NAME: {"always": True}})


def test_input_with_strides_that_the_view_between_would_not_take() -> None:
    model = randomise(Two(SPELLINGS["views"]))
    check_exact(model, torch.randn(5, 3, 6).transpose(0, 1), applied={NAME: 1}, **NAMED)


def test_one_map_is_left() -> None:
    class Counting(Two):
        pass

    program = capture(randomise(Counting(SPELLINGS["linear"])).eval(), X)
    assert len(linears(program, Analyses(program))) == 2
    report = check_exact(randomise(Two(SPELLINGS["linear"])), X, applied={NAME: 1})
    assert report[NAME].launches_saved == 1
    assert report[NAME].flops_saved == 2 * 15 * (6 * 12 + 12 * 7 - 6 * 7)


class Chain(nn.Sequential):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def test_chains_collapse_as_far_as_it_pays() -> None:
    check_exact(randomise(Chain(6, 12, 12, 5)), X, applied={NAME: 2})
    # Each pair alone pays, but once the first is collapsed the second would not: 40·20 < 10(40+20) fails.
    model = randomise(Chain(100, 40, 40, 100))
    report = check_exact(model, torch.randn(2, 100), applied={NAME: 1})
    assert refusals(report, NAME) == ["costs-more"]


@pytest.mark.parametrize(
    ("sizes", "pays"), [((6, 3, 6), False), ((6, 4, 6), True), ((12, 4, 6), False)]
)
def test_pays_exactly_where_the_product_is_smaller(sizes: tuple[int, ...], pays: bool) -> None:
    x = torch.randn(3, sizes[0])
    report = check_exact(randomise(Chain(*sizes)), x, applied={NAME: int(pays)})
    assert refusals(report, NAME) == ([] if pays else ["costs-more"])
    check_exact(randomise(Chain(*sizes)), x, applied={NAME: 1}, **NAMED)  # named: forced


def test_low_rank_adapters_stay() -> None:
    model = Two(lambda m, x: m.a(x) + x @ m.down @ m.up)
    model.down, model.up = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(2, 12))
    report = check_exact(randomise(model), X, applied={NAME: 0})
    assert refusals(report, NAME) == ["costs-more"]


# ---- convolutions --------------------------------------------------------------------------------

WINDOWS = [
    {},
    {"stride": 2},
    {"dilation": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid"},
    {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
]


@pytest.mark.parametrize("bias", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_kernel_then_one_position(options: dict, stride: int, bias: tuple[bool, bool]) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 9, 3, bias=bias[0], **options), nn.Conv2d(9, 5, 1, stride, bias=bias[1])
    )
    check_exact(randomise(model), SPACE, applied={NAME: 1}, **NAMED)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_one_position_then_kernel(options: dict, stride: int, bias: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 9, 1, stride, bias=False), nn.Conv2d(9, 5, 3, bias=bias, **options)
    )
    check_exact(randomise(model), SPACE, applied={NAME: 1}, **NAMED)


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_a_bias_does_not_pass_under_zero_padding(options: dict) -> None:
    model = nn.Sequential(nn.Conv2d(4, 9, 1), nn.Conv2d(9, 5, 3, **options))
    pads = options.get("padding", 0) not in (0, "valid")
    report = check_exact(randomise(model), SPACE, applied={NAME: int(not pads)}, **NAMED)
    assert refusals(report, NAME) == ["border"] * pads


PAIRS = {
    "one and one": nn.Sequential(nn.Conv2d(4, 9, 1, padding=1), nn.Conv2d(9, 5, 1, 2)),
    "padded twice": nn.Sequential(nn.Conv2d(4, 9, 1, 2, 1, bias=False), nn.Conv2d(9, 5, 3, 1, 2)),
    "groups": nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 10, 1, groups=2)),
    "groups, kernel last": nn.Sequential(
        nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 10, 3, groups=2)
    ),
    "depthwise twice": nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 8, 3, groups=4)),
    "depthwise after": nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 12, 3, groups=6)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_convolutions(kind: str) -> None:
    check_exact(randomise(PAIRS[kind]), SPACE, applied={NAME: 1}, **NAMED)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_ranks(dims: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(conv(4, 9, 2, padding=1), conv(9, 5, 1))
    check_exact(randomise(model), torch.randn(2, 4, *[5] * dims), applied={NAME: 1}, **NAMED)


LAST = torch.channels_last


@pytest.mark.parametrize("last", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("kernels", [(3, 1), (1, 3)])
def test_the_result_keeps_its_strides(kernels: tuple[int, int], last: tuple[bool, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 9, kernels[0], bias=False), nn.Conv2d(9, 5, kernels[1]))
    model, x = randomise(model).eval(), SPACE
    for layer, is_last in zip(model, last[1:], strict=True):
        layer.to(memory_format=LAST if is_last else torch.contiguous_format)
    with torch.no_grad():
        x = x.to(memory_format=LAST) if last[0] else x
        result, report = run(model, x, **NAMED)
        assert result.stride() == model(x).stride()
    assert report[NAME].applied == 1


def test_the_result_keeps_its_strides_behind_a_transpose() -> None:
    class Turned(nn.Sequential):
        def forward(self, x):
            return super().forward(x.transpose(1, 2))

    model = randomise(Turned(nn.Conv1d(4, 9, 1, bias=False), nn.Conv1d(9, 5, 3))).eval()
    x = torch.randn(2, 7, 4)
    with torch.no_grad():
        result, report = run(model, x, **NAMED)
        assert result.stride() == model(x).stride()
    assert report[NAME].applied == 1


def test_refuses_weights_of_unknown_layout() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 9, 3), nn.Conv2d(9, 5, 1)))
    model[0].weight = nn.Parameter(model[0].weight.detach().transpose(2, 3))
    report = check_exact(model, SPACE, applied={NAME: 0}, **NAMED)
    assert refusals(report, NAME) == ["layout"]


def test_convolutions_collapse_unasked_where_it_pays() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 1))
    check_exact(randomise(model), SPACE, applied={NAME: 1})
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 16, 3))
    check_exact(randomise(model), SPACE, applied={NAME: 1})
    model = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.Conv2d(4, 16, 3))
    report = check_exact(randomise(model), torch.randn(2, 16, 7, 7), applied={NAME: 0})
    assert refusals(report, NAME) == ["costs-more"]


def test_after_batch_norm_is_folded() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 4, 1),
        nn.BatchNorm2d(4),
    )
    check_exact(randomise(model), SPACE, applied={"fold-batchnorm": 2, NAME: 1})


def test_windows() -> None:
    model = nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2)
    program = capture(model.eval(), SPACE)
    (linear,) = linears(program, Analyses(program)).values()
    assert taps(linear) == Taps((3, 1), (1, 1), (2, 0), (2, 2))
    program = capture(nn.Conv2d(4, 4, 2, padding="same").eval(), SPACE)
    (linear,) = linears(program, Analyses(program)).values()
    assert taps(linear) is None


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_half_precision_is_as_near_to_fp64_as_eager(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model, x = Chain(6, 12, 7), torch.randn(64, 33, 6, generator=generator)
    if kind == "conv":
        model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 4, 1))
        x = torch.randn(8, 4, 16, 16, generator=generator)
    model = randomise(model).eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        model, x = model.bfloat16(), x.bfloat16()
        result, report = run(model, x)
        eager = model(x)
    assert report[NAME].applied == 1
    assert error(result, exact) <= 1.5 * error(eager, exact)
    assert (result - exact).norm() <= 1.5 * (eager - exact).norm()


def test_weights_updated_after_compile() -> None:
    model = randomise(Chain(6, 12, 7)).eval()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        fast(X)
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(X), model(X)) < 1e-6


def test_other_sizes_do_not_recompile() -> None:
    model = randomise(Two(SPELLINGS["views with sizes"])).eval()
    torch._dynamo.reset()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 7, 11):
            x = torch.randn(3, tokens, 6)
            assert error(fast(x), model(x)) < 1e-6


class FromIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(20, 6), Two(SPELLINGS["views with sizes"])

    def forward(self, tokens):
        return torch.tanh(self.inner(self.embed(tokens)))


def test_training_when_named() -> None:
    check_training(lambda: randomise(FromIds()), applied={NAME: 1}, **NAMED)
    _, report = run(randomise(FromIds()), torch.arange(6).view(2, 3), lower="aot_eager")
    assert refusals(report, NAME) == ["training"]


def test_gathered_weights_are_refused() -> None:
    with torch.no_grad():
        _, report = run(managed_by_fsdp(randomise(Chain(6, 12, 7)).eval()), X)
    assert refusals(report, NAME) == ["gathered"]


# ---- refuses -------------------------------------------------------------------------------------


def read_twice(m, x):
    y = m.a(x)
    return m.b(y).sum() + y.sum()


def returned(m, x):
    y = m.a(x)
    return m.b(y), y


def written(m, x):
    x = x * 2
    y = m.a(x)
    x[0] = 0
    return m.b(y) + x.sum()


def regional(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.a(x)
    return m.b(y.float())


REFUSED = {
    "fan-out": read_twice,
    "fan-out to the caller": returned,
    "written": written,
    "tied": lambda m, x: m.b(m.a(x)) + m.b(m.c * torch.relu(m.a(x + 1))),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    report = check_exact(randomise(Two(REFUSED[code])), X, applied={NAME: 0}, **NAMED)
    assert refusals(report, NAME) == [code.split()[0]]


def test_refuses_views_that_hold_for_some_sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "fake_for_all_sizes", lambda *_: None)
    report = check_exact(randomise(Two(SPELLINGS["views"])), X, applied={NAME: 0}, **NAMED)
    assert refusals(report, NAME) == ["layout"]


def test_refuses_to_leave_a_no_grad_region() -> None:
    def partly(m, x):
        with torch.no_grad():
            y = m.a(x)
        return m.b(y)

    model = randomise(Two(partly))
    result, report = run(model, X, lower="aot_eager", **NAMED)
    assert refusals(report, NAME) == ["region"]
    result.sum().backward()
    assert model.a.weight.grad is None


def test_detach_between_stops_the_gradient() -> None:
    model = randomise(Two(lambda m, x: m.b(m.a(x).detach())))
    result, report = run(model, X, lower="aot_eager", **NAMED)
    assert report[NAME].matches == []
    result.sum().backward()
    assert model.a.weight.grad is None


CONV_REFUSED = {
    "grouped": nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)),
    "grouped otherwise": nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1, groups=4)),
    "transposed": nn.Sequential(nn.ConvTranspose2d(4, 8, 2, 2), nn.Conv2d(8, 4, 1)),
    "border": nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1, padding=1)),
}


@pytest.mark.parametrize("code", CONV_REFUSED)
def test_refuses_convolutions(code: str) -> None:
    report = check_exact(randomise(CONV_REFUSED[code]), SPACE, applied={NAME: 0}, **NAMED)
    assert refusals(report, NAME) == [code.split()[0]]


def test_chains_of_convolutions_are_cut_once_a_run() -> None:
    model = nn.Sequential(nn.Conv2d(4, 9, 3), nn.Conv2d(9, 9, 1), nn.Conv2d(9, 5, 3))
    report = check_exact(randomise(model), SPACE, applied={NAME: 1}, **NAMED)
    assert refusals(report, NAME) == ["chain"]


NOT_A_PAIR = {
    "activation": lambda m, x: m.b(torch.relu(m.a(x))),
    "cast": lambda m, x: m.b(m.a(x).double().to(x.dtype)),
    "scaled": lambda m, x: m.b(m.a(x) * x.mean(-1, keepdim=True)),
    "mixed": lambda m, x: m.b(m.a(x).view(3, 12, 5).transpose(1, 2)),
    "addmm with alpha": lambda m, x: torch.addmm(m.d, x[0] @ m.A, m.B, alpha=2),
    "addmm with beta": lambda m, x: m.b(torch.addmm(m.c, x[0], m.A, beta=0.5)),
    "padded tokens": lambda m, x: m.b(nn.functional.pad(m.a(x), (0, 0, 1, 1))),
    "sum of tokens": lambda m, x: m.b(m.a(x).sum(1)),
    "autocast": regional,
}


@pytest.mark.parametrize("how", NOT_A_PAIR)
def test_what_is_no_pair(how: str) -> None:
    model = randomise(Two(NOT_A_PAIR[how])).eval()
    with torch.no_grad():
        result, report = run(model, X, **NAMED)
        assert error(result, model(X)) < 1e-6
    assert report[NAME].matches == []
