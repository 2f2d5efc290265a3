"""What went wrong in other tools, one test each: the numbers are those of the project's list of pitfalls."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PreNorm, check_exact, error, ids, randomise, run
from torch import nn
from torch.nn import functional as F

FOLD_BN, AFFINE, RMS = "fold-batchnorm", "fold-norm-affine", "layernorm-to-rmsnorm"
IMAGE = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))


def convolutional() -> nn.Module:
    layers = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    return randomise(nn.Sequential(*layers)).eval()


# ---- D1: weights folded at compile time go stale --------------------------------------------------


def loaded(model: nn.Module) -> None:
    model.load_state_dict(randomise(copy.deepcopy(model), 7).state_dict())


def stepped(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.enable_grad():
        model(IMAGE).square().mean().backward()
    optimizer.step()


def copied(model: nn.Module) -> None:
    model[0].weight.data.copy_(torch.randn_like(model[0].weight))


def reassigned(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(torch.randn_like(model[1].weight))


def buffers_written(model: nn.Module) -> None:
    model[4].running_var.mul_(3)


def trained(model: nn.Module) -> None:
    model.train()(IMAGE * 2 + 1)
    model.eval()


def widened(model: nn.Module) -> None:
    model.double()


@pytest.mark.parametrize(
    "change", [loaded, stepped, copied, reassigned, buffers_written, trained, widened]
)
def test_d1_stale_fold(change: Callable[[nn.Module], None]) -> None:
    model = convolutional()
    fast = torch.compile(model, backend="sparsecc", options={"require": {FOLD_BN: 2}})
    with torch.no_grad():
        assert error(fast(IMAGE), model(IMAGE)) < 1e-5
        before = model(IMAGE)
        change(model)
        x = IMAGE.to(model[0].weight.dtype)
        assert error(model(x), before) > 1e-3 or change is widened
        assert error(fast(x), model(x)) < 1e-5


# ---- D4: a producer is folded once and used twice -------------------------------------------------


class SharedConvolution(nn.Module):
    """BatchNorm on one path of a convolution only."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "second consumer":
            return self.norm(y) + torch.relu(y)
        if self.how == "module reused":
            return self.norm(y) + self.conv(torch.tanh(x))
        return self.norm(y), y


@pytest.mark.parametrize("how", ["second consumer", "module reused", "also returned"])
def test_d4_shared_convolution(how: str) -> None:
    check_exact(randomise(SharedConvolution(how)).eval(), IMAGE, applied={FOLD_BN: 0})


# ---- D5: the fold forgets to scale the convolution's bias ------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_d5_bias_of_the_convolution(bias: bool) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8))).eval()
    if bias:
        with torch.no_grad():
            model[0].bias.add_(3.0)
    check_exact(model, IMAGE, applied={FOLD_BN: 1})


# ---- D6: a fold in bfloat16 loses digits ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_d6_fold_in_half_precision(dtype: torch.dtype) -> None:
    model = convolutional().to(dtype)
    x = torch.randn(8, 4, 16, 16).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())

    def rmse(value: torch.Tensor) -> float:
        return float((value.double() - exact).square().mean().sqrt())

    with torch.no_grad():
        result, report = run(model, x)
        eager = model(x)
    assert report[FOLD_BN].applied == 2
    assert rmse(result) <= 1.5 * rmse(eager)


# ---- D9: tied embeddings ------------------------------------------------------------------------------


class TiedOutputs(PreNorm):
    def forward(self, tokens):
        return super().forward(tokens), self.embed(tokens)


@pytest.mark.parametrize("untie", [True, False])
def test_d9_tied_embeddings(untie: bool) -> None:
    model = randomise(TiedOutputs(tied=True)).eval()
    before = model.embed.weight.detach().clone()
    with torch.no_grad():
        expected = model(ids())
        (logits, embedded), report = run(model, ids(), passes={AFFINE: {"untie": untie}, RMS: {}})
    assert report[AFFINE].applied == 5 if untie else 4
    assert error(logits, expected[0]) < 1e-5
    assert torch.equal(embedded, expected[1])
    assert torch.equal(model.embed.weight, before)


# ---- D10: the fold misses one of the consumers ---------------------------------------------------------


class EveryConsumer(nn.Module):
    """Gated FFN, attention beside it, and a router, all behind one norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=b) for b in (True, False, True))
        self.router = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        y = self.norm(x)
        share = self.router(y).softmax(-1)[..., :1]
        ffn = self.down(F.silu(self.gate(y)) * self.up(y))
        attention = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + share * ffn + (1 - share) * attention


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_d10_every_consumer(norm: type[nn.Module]) -> None:
    model = randomise(EveryConsumer(norm(8)))
    report = check_exact(model, torch.randn(2, 5, 8), applied={AFFINE: 1})
    assert not report[AFFINE].refusals


# ---- D13: eps of another norm, or the default ------------------------------------------------------------


class TwoNorms(nn.Module):
    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8, eps=eps) for eps in (first, second))
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.mix(self.norms[0](x))
        return self.head(self.norms[1](x))


@pytest.mark.parametrize("first", [1e-12, 1e-5, 1e-2])
@pytest.mark.parametrize("second", [1e-12, 1e-5, 1e-2])
def test_d13_eps(first: float, second: float) -> None:
    model = randomise(TwoNorms(first, second))
    nn.init.zeros_(model.embed.bias)
    rows = torch.randn(6, 8) * torch.tensor([0.0, 1e-8, 1e-4, 1e-2, 1.0, 1e3])[:, None]
    check_exact(model, rows, applied={RMS: 2, AFFINE: 2})


# ---- D14: axes, ranks and broadcasting of a LayerNorm that is spelled out --------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    axis=st.integers(-4, 3),
    keepdim=st.booleans(),
    weight=st.sampled_from(["none", "last", "full", "leading"]),
)
def test_d14_axes_and_broadcasting(shape: list[int], axis: int, keepdim: bool, weight: str) -> None:
    """Whatever is recognized, the result is eager's, in value and in shape."""
    axis = axis % len(shape)
    sizes = {
        "none": [1],
        "last": shape[-1:],
        "full": shape,
        "leading": [*shape[:1], *[1] * (len(shape) - 1)],
    }
    generator = torch.Generator().manual_seed(sum(shape) + axis)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    w = torch.randn(sizes[weight], generator=generator, dtype=torch.float64)
    head = torch.randn(3, shape[-1], generator=generator, dtype=torch.float64)

    def norm(x):
        mean = x.mean(axis, keepdim=keepdim)
        variance = (x - x.mean(axis, keepdim=True)).square().mean(axis, keepdim=keepdim)
        if not keepdim:
            mean, variance = mean.unsqueeze(axis), variance.unsqueeze(axis)
        return F.linear((x - mean) / torch.sqrt(variance + 1e-5) * w, head)

    with torch.no_grad():
        result, _ = run(norm, x)
        expected = norm(x)
    assert result.shape == expected.shape
    assert error(result, expected) < 1e-12


# ---- D16: fp16 overflows in the square of a norm -----------------------------------------------------------


@pytest.mark.parametrize("amplitude", [1e-4, 1e-2, 1.0, 1e2, 1e4, 6e4, float("inf"), float("nan")])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_d16_amplitudes(norm: type[nn.Module], amplitude: float) -> None:
    model = randomise(nn.Sequential(norm(16), nn.Linear(16, 8))).half()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    x[1:] *= amplitude if amplitude == amplitude and amplitude != float("inf") else 1.0
    x[2, 3] = amplitude
    x = x.half()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        result, report = run(model, x)
        eager = model(x)
    assert report[AFFINE].applied == 1
    assert torch.equal(result.isnan(), eager.isnan())
    assert torch.equal(result.isinf(), eager.isinf())
    rows = exact.isfinite().all(-1)
    assert error(result[rows], exact[rows]) <= 1.5 * error(eager[rows], exact[rows]) + 2**-11


# ---- D26: alpha, beta and other defaults of a linear operator are dropped ------------------------------------

LINEAR = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear without bias": lambda x, w, b: F.linear(x, w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "addmm, beta": lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.1),
    "addmm, alpha": lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2.0),
    "addmm, both": lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5, alpha=-1.5),
    "addmm, beta of zero": lambda x, w, b: torch.addmm(b, x, w.t(), beta=0),
    "mm": lambda x, w, b: torch.mm(x, w.t()),
    "matmul": lambda x, w, b: x @ w.mT + b,
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w.t()[None], beta=0.5)[0],
    "addmv": lambda x, w, b: torch.addmv(b, w, x[0], alpha=3.0),
}


@pytest.mark.parametrize("spelling", LINEAR)
@pytest.mark.parametrize("role", ["reader", "producer"])
def test_d26_default_arguments(spelling: str, role: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.ones(6))
            self.weight, self.bias = nn.Parameter(torch.ones(6, 8)), nn.Parameter(torch.ones(6))

        def forward(self, x):
            y = self.norm(x) if role == "reader" else x
            z = LINEAR[spelling](y, self.weight, self.bias)
            return z if role == "reader" else z * self.scale

    name = AFFINE if role == "reader" else "fold-layerscale"
    plain = spelling not in ("addmm, beta", "addmm, alpha", "addmm, both", "addmm, beta of zero")
    fires = plain and spelling not in ("baddbmm", "addmv")
    if role == "producer" and spelling == "matmul":
        fires = False  # its bias stands between
    check_exact(randomise(Model()), torch.randn(5, 8), applied={name: int(fires)})
