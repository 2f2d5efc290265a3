"""drop-dead-features: rows of weights that nobody reads go, and the readers find theirs again."""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    check_exact,
    check_training,
    error,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn

from sparsecc import rewrite
from sparsecc.passes.linear.drop_dead_features import DropDeadFeatures

NAME = "drop-dead-features"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 6)
SPACE = torch.randn(2, 6, 7, 8)


class Parts(nn.Module):
    """A projection to 12 features and a function that reads some of them."""

    def __init__(self, reads, bias: bool = True) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(6, 12, bias=bias), nn.Linear(4, 5)
        self.conv = nn.Conv2d(6, 12, 3, padding=1, bias=bias)
        self.up = nn.ConvTranspose2d(6, 12, 2, 2, bias=bias)
        self.depthwise = nn.Conv2d(6, 12, 3, groups=6)
        self.norm = nn.BatchNorm2d(4)
        self.matrix, self.c = nn.Parameter(torch.ones(6, 12)), nn.Parameter(torch.ones(12))
        self.reads = reads

    def forward(self, x):
        return self.reads(self, x)


def first_and_last(m, x):
    a, _, c = m.proj(x).chunk(3, -1)
    return a * c.tanh()


def through_views(m, x):
    y = m.proj(x).view(-1, 12).reshape(3, 5, 12).transpose(1, 2)
    return y[:, 2:5].exp().sum() + y[:, 7].cos()


def overlapping(m, x):
    y = m.proj(x)
    return y[..., 1:5] * y[..., 3:7] + y[..., 8:12]


def every_second(m, x):
    y = m.proj(x)
    return y[..., 1:8:3].exp(), y[..., 11] * 2


def by_sizes(m, x):
    a, _, c = torch.split(m.proj(x), [3, 5, 4], dim=-1)
    return a.sum(-1, keepdim=True) * c


def unbound(m, x):
    parts = m.proj(x).unbind(-1)
    return parts[3] - parts[10] * parts[4]


def two_views(m, x):
    y = m.proj(x)
    return y.transpose(0, 1)[..., :3].sum(0) + torch.relu(y)[..., 6:9].sum(1)


READS = {
    "slice": (lambda m, x: m.proj(x)[..., :4].tanh(), X),
    "slice from the end": (lambda m, x: m.out(m.proj(x)[..., -4:]), X),
    "slice in the middle": (lambda m, x: m.out(torch.tanh(m.proj(x)[:, 1:, 3:7])), X),
    "narrow": (lambda m, x: m.proj(x).narrow(-1, 2, 5).relu(), X),
    "one feature": (lambda m, x: m.proj(x)[..., 5].exp(), X),
    "index from the end": (lambda m, x: m.proj(x).select(-1, -2) * 2, X),
    "chunk": (lambda m, x: m.proj(x).chunk(2, -1)[1].exp(), X),
    "chunk, first and last": (first_and_last, X),
    "split": (lambda m, x: m.proj(x).split(5, -1)[2].exp(), X),
    "split by sizes": (by_sizes, X),
    "unbind": (unbound, X),
    "views": (through_views, X),
    "overlapping": (overlapping, X),
    "steps": (every_second, X),
    "elementwise": (lambda m, x: nn.functional.gelu(m.proj(x) * 2)[..., 4:8].sum(-1), X),
    "two ways": (two_views, X),
    "twice in one sum": (lambda m, x: ((y := m.proj(x)) + y)[..., 4:8].exp(), X),
    "matmul": (lambda m, x: (x @ m.matrix)[..., 3:6].exp(), X),
    "mm": (lambda m, x: (x[0] @ m.matrix)[..., 3:6].exp(), X),
    "addmm": (lambda m, x: torch.addmm(m.c, x[0], m.matrix)[:, 3:6].exp(), X),
    "convolution": (lambda m, x: m.norm(m.conv(x)[:, 2:6]), SPACE),
    "convolution, chunk": (lambda m, x: m.conv(x).chunk(3, 1)[2].relu(), SPACE),
    "transposed convolution": (lambda m, x: m.up(x)[:, 5:].relu(), SPACE),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", READS)
def test_reads(how: str, bias: bool, dynamic: bool | None) -> None:
    reads, x = READS[how]
    if dynamic and "views" in how:
        pytest.skip("it spells the sizes out")
    check_exact(randomise(Parts(reads, bias)), x, applied={NAME: 1}, dynamic=dynamic, **ONLY)


@pytest.mark.parametrize(
    ("how", "rows"), [("slice", 4), ("chunk, first and last", 8), ("overlapping", 10)]
)
def test_only_the_rows_that_are_read_are_left(how: str, rows: int) -> None:
    model = randomise(Parts(READS[how][0])).eval()
    program = rewrite(torch.export.export(model, (X,)), ONLY)
    layers = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [node.meta["val"].shape[-1] for node in layers] == [rows]
    assert error(program.module()(X), model(X)) < 1e-6


def test_later_passes_see_the_whole() -> None:
    model = randomise(Parts(READS["convolution"][0]))
    check_exact(model, SPACE, applied={NAME: 1, "fold-batchnorm": 1})


def test_proof_passes() -> None:
    model = randomise(Parts(through_views)).eval()
    with torch.no_grad():
        _, report = run(model, X, verify="each", **ONLY)
    assert report[NAME].applied == 1
    assert report.verified


@pytest.mark.parametrize("how", ["slice", "chunk, first and last", "convolution"])
def test_half_precision_is_as_near_to_fp64_as_eager(how: str) -> None:
    reads, x = READS[how]
    model = randomise(Parts(reads)).eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        model, x = model.bfloat16(), x.bfloat16()
        result, report = run(model, x, **ONLY)
        eager = model(x)
    assert report[NAME].applied == 1
    assert error(result, exact) <= 1.5 * error(eager, exact)


def test_autocast_keeps_the_dtype() -> None:
    def cast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = m.proj(m.same(x))[..., 2:6]  # bf16 meets weights in fp32
        return y * 2, m.out(y.float())

    model = Parts(cast)
    model.same = nn.Linear(6, 6)
    model = randomise(model).eval()
    with torch.no_grad():
        result, report = run(model, X, **ONLY)
        expected = model(X)
    assert report[NAME].applied == 1
    assert [r.dtype for r in result] == [e.dtype for e in expected]
    assert error(result[1], expected[1]) < 0.02


def test_weights_updated_after_compile() -> None:
    model = randomise(Parts(first_and_last)).eval()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        fast(X)
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(X), model(X)) < 1e-6


def test_other_sizes_do_not_recompile() -> None:
    model = randomise(Parts(first_and_last)).eval()
    torch._dynamo.reset()
    options = {"lower": "eager", "require": {NAME: 1}}
    fast = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 7, 11):
            x = torch.randn(3, tokens, 6)
            assert error(fast(x), model(x)) < 1e-6


class FromIds(nn.Module):
    def __init__(self, reads) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(20, 6), Parts(reads)

    def forward(self, tokens):
        return torch.tanh(self.inner(self.embed(tokens)))


def test_training() -> None:
    # One range of rows is a view, and runs unasked; dead rows have zero gradients as before.
    check_training(lambda: randomise(FromIds(READS["slice"][0])), applied={NAME: 1})
    check_training(lambda: randomise(FromIds(first_and_last)), applied={NAME: 1}, **ONLY)
    _, report = run(
        randomise(FromIds(first_and_last)), torch.arange(6).view(2, 3), lower="aot_eager"
    )
    assert refusals(report, NAME) == ["training"]


def test_gathered_weights_are_refused_where_rows_are_copied() -> None:
    with torch.no_grad():
        _, report = run(managed_by_fsdp(randomise(Parts(first_and_last)).eval()), X)
    assert refusals(report, NAME) == ["gathered"]


def test_a_part_under_no_grad_stays_without_gradients() -> None:
    def partly(m, x):
        y = m.proj(x)
        with torch.no_grad():
            z = y[..., :4]
        return m.out(z)

    model = randomise(Parts(partly))
    result, report = run(model, X, lower="aot_eager", **ONLY)
    assert report[NAME].applied == 1
    result.sum().backward()
    assert model.proj.weight.grad is None
    assert model.out.weight.grad is not None


# ---- refuses -------------------------------------------------------------------------------------


def written(m, x):
    y = m.proj(x)
    z = y[..., :4]
    z[0] = 0
    return z * y[..., 2:6]


REFUSED = {
    "grouped": (lambda m, x: m.depthwise(x)[:, :4], SPACE),
    "written": (written, X),
    "escapes": (lambda m, x: m.proj(x)[..., :4], X),
    "layout": (lambda m, x: m.proj(x)[..., :4].as_strided((3, 4), (60, 1)) * 2, X),
    "tied": (lambda m, x: m.proj(x)[..., :4] * m.proj(torch.relu(x)).sum(), X),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    reads, x = REFUSED[code]
    report = check_exact(randomise(Parts(reads)), x, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == [code]


READ_WHOLE = {
    "a write": lambda m, x: (lambda y: (y[..., :4] * 1, y[0].zero_())[0])(m.proj(x)),
    "all parts": lambda m, x: torch.stack(m.proj(x).chunk(3, -1)).prod(0),
    "another reader": lambda m, x: (lambda y: y[..., :4] * y.sum())(m.proj(x)),
    "the caller": lambda m, x: (lambda y: (y[..., :4], y))(m.proj(x)),
    "like": lambda m, x: (lambda y: y[..., :4].sum() + torch.ones_like(y))(m.proj(x)),
    "norm": lambda m, x: nn.functional.layer_norm(m.proj(x), (12,))[..., :4],
    "softmax": lambda m, x: m.proj(x).softmax(-1)[..., :4],
    "tokens": lambda m, x: m.proj(x)[:, :2],
    "gather": lambda m, x: m.proj(x)[..., torch.tensor([0, 3])],
    "heads": lambda m, x: m.proj(x).view(3, 5, 3, 4)[:, :, :, :2],
    "product": lambda m, x: (m.proj(x) * x.sum(-1, keepdim=True))[..., :4],
}


@pytest.mark.parametrize("how", READ_WHOLE)
def test_what_is_read_as_a_whole(how: str) -> None:
    report = check_exact(randomise(Parts(READ_WHOLE[how])), X, applied={NAME: 0}, **ONLY)
    assert report[NAME].matches == []


def test_saving_is_counted_from_shapes() -> None:
    report = check_exact(randomise(Parts(READS["slice"][0])), X, applied={NAME: 1}, **ONLY)
    assert report[NAME].flops_saved == 2 * 15 * 6 * 8
    assert DropDeadFeatures.exactness.value == "exact"
