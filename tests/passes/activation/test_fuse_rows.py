"""fuse-rows: which work on rows becomes one operator, how far a region reaches, and what stays apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import agrees_with_fp64, capture, error, randomise, refusals, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from sparsecc import pipeline
from sparsecc.options import Options
from sparsecc.report.model import GraphReport
from sparsecc.runtime.ops.rows import rows

NAME = "fuse-rows"
ONLY = {"passes": [NAME]}
LOWER = {"lower": "eager", "strict": True, "floor": False}
D = 24
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(3))
Forward = Callable[[Any, torch.Tensor], Any]


class Model(nn.Module):
    """Weights of every shape that an operand may have."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.weight, self.bias, self.other = (nn.Parameter(torch.ones(D)) for _ in range(3))
        self.leading = nn.Parameter(torch.ones(1, 1, D))
        self.coefficients = nn.Parameter(torch.ones(3))
        self.shift = nn.Parameter(torch.ones(1))
        self.by_row, self.by_token = nn.Parameter(torch.ones(5, 1)), nn.Parameter(torch.ones(5, D))
        self.linear = nn.Linear(D, D)
        self.rest = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.rest(self, x)


def made(forward: Forward) -> Model:
    return randomise(Model(forward)).eval()


def specs(report) -> list[str]:
    return [m.note for m in report[NAME].matches if m.status == "applied"]


# ---- published methods, spelled out ------------------------------------------------------------------


def top_k(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Statistical top-k (Spark)."""
    cut = x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=0) * 0.6744897501960817
    return torch.relu(x - cut)


def poly_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    """PolyNorm as PolyCom's own code has it."""

    def norm(y: torch.Tensor) -> torch.Tensor:
        return y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    a = m.coefficients
    return a[0] * norm(x**3) + a[1] * norm(x**2) + a[2] * norm(x) + m.shift


def crms_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Pre-CRMSNorm: the feature that is not stored is minus the sum of the others."""
    total = x.sum(-1, keepdim=True)
    squares = x.square().sum(-1, keepdim=True) + total * total
    return x * torch.rsqrt(squares / (x.shape[-1] + 1) + 1e-5)


def evonorm_s0(m: Any, x: torch.Tensor) -> torch.Tensor:
    """EvoNorm-S0 over the last axis, the channels of a group."""
    deviation = torch.sqrt(x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5)
    return x * torch.sigmoid(m.by_token * x) / deviation * m.weight + m.bias


def quantized(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Residual, RMSNorm, int8 by token."""
    h = x + m.other
    y = F.rms_norm(h, (D,), m.weight, 1e-6)
    scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return torch.round(y / scale).clamp(-127, 127).to(torch.int8), scale, h


METHODS: dict[str, tuple[Forward, str]] = {
    "statistical top-k": (
        top_k,
        "y0 = mean(t0); y1 = t0 - y0; relu(t0 - (y0 + sqrt(mean(y1 * y1)) * 0.6744897501960817))",
    ),
    "poly norm": (
        poly_norm,
        "y0 = t0 * t0; y1 = y0 * t0; s0 * (y1 * rsqrt(mean(y1 * y1) + 1e-06)) + "
        "s1 * (y0 * rsqrt(mean(y0 * y0) + 1e-06)) + s2 * (t0 * rsqrt(mean(y0) + 1e-06)) + s3",
    ),
    "crms norm": (
        crms_norm,
        "y0 = sum(t0); t0 * rsqrt((sum(t0 * t0) + y0 * y0) / 25.0 + 1e-05)",
    ),
    "evonorm s0": (
        evonorm_s0,
        "y0 = t0 - mean(t0); t0 * sigmoid(v0 * t0) / sqrt(mean(y0 * y0) + 1e-05) * v1 + v2",
    ),
}


@pytest.mark.parametrize("codegen", ["aten", "cpp"])
@pytest.mark.parametrize("name", METHODS)
def test_published_methods_are_recognised(name: str, codegen: str) -> None:
    forward, expected = METHODS[name]
    model = made(forward)
    with torch.no_grad():
        result, report = run(model, X, codegen=codegen, **ONLY)
        agrees_with_fp64(model, X, result)
    assert specs(report) == [expected]
    assert [k.chosen for k in report.graphs[0].kernels] == [codegen]


def is_quantized(model: nn.Module, x: torch.Tensor, result: tuple[torch.Tensor, ...]) -> None:
    q, scale, h = result
    wide = copy.deepcopy(model).double()
    _, exact_scale, exact_h = wide(x.double())
    y = F.rms_norm(exact_h, (D,), wide.weight, 1e-6)
    assert (q.dtype, q.shape, scale.shape) == (torch.int8, x.shape, (*x.shape[:-1], 1))
    assert error(scale, exact_scale) < 1e-6
    assert error(h, exact_h) < 1e-6
    assert ((q * exact_scale - y).abs() <= exact_scale * (0.5 + 1e-4)).all()
    assert (q.abs().amax(-1) == 127).all()


@pytest.mark.parametrize(
    ("codegen", "lower"), [("aten", "eager"), ("cpp", "eager"), ("cpp", "inductor")]
)
def test_a_norm_that_is_quantized(codegen: str, lower: str) -> None:
    model = made(quantized)
    with torch.no_grad():
        result, report = run(model, X, codegen=codegen, lower=lower, **ONLY)
        is_quantized(model, X, result)
    assert report[NAME].applied == 1
    assert specs(report)[0].endswith("; y0; y2; clamp(round(y1 / y2), -127.0, 127.0)")


@pytest.mark.parametrize("name", METHODS)
def test_verified_in_fp64_and_through_inductor(name: str) -> None:
    model = made(METHODS[name][0])
    options = {"lower": "inductor", "codegen": "cpp", "verify": "each"}
    with torch.no_grad():
        result, report = run(model, X, **options, **ONLY)
        agrees_with_fp64(model, X, result)
    assert report.verified
    assert report[NAME].applied == 1


@pytest.mark.parametrize("size", [2, 3, 17, 577])
def test_odd_sizes(size: int) -> None:
    x = torch.randn(7, size)
    for forward in (top_k, crms_norm):
        model = made(forward)
        with torch.no_grad():
            result, report = run(model, x, codegen="cpp", **ONLY)
            agrees_with_fp64(model, x, result)
        assert report[NAME].applied == 1


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_special_values_propagate(name: str, special: float) -> None:
    model, x = made(METHODS[name][0]), X.clone()
    x[1, 2, 7] = special
    with torch.no_grad():
        result, _ = run(model, x, codegen="cpp", **ONLY)
        expected = model(x)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())
    keep = torch.arange(15).view(3, 5) != 7  # the other rows know nothing of it
    assert error(result[keep], expected[keep]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    model = made(top_k).to(dtype)
    with torch.no_grad():
        result, report = run(model, X.to(dtype), codegen="cpp", **ONLY)
        agrees_with_fp64(model, X.to(dtype), result)
    assert report[NAME].applied == 1


def test_updated_after_compile() -> None:
    model = made(poly_norm)
    with torch.no_grad():
        fast = torch.compile(model, backend="sparsecc", options={"codegen": "cpp", **LOWER, **ONLY})
        fast(X)
        for seed in (1, 2):
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
            agrees_with_fp64(model, X, fast(X))


def test_tied_weights() -> None:
    model = made(evonorm_s0)
    model.bias = model.weight
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1
    assert model.bias is model.weight


def test_any_number_of_rows() -> None:
    """One compile, without a guard on their number."""
    import sparsecc

    model, report = made(top_k), sparsecc.Report()
    options = {"codegen": "cpp", "lower": "inductor", "report": report, **ONLY}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        for count in (4, 9, 2):
            x = torch.randn(count, 3, D)
            torch._dynamo.mark_dynamic(x, 0)
            agrees_with_fp64(model, x, fast(x))
    assert len(report.graphs) == 1
    assert report[NAME].applied == 1


def test_a_long_expression() -> None:
    """Of more brackets than Python reads."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x / (spread(x) + 1)
        for _ in range(110):
            y = (y + 0.5) * 0.75
        return y

    model = made(forward)
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1


@pytest.mark.parametrize("shape", [(0, 8), (0, 2, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    model, x = made(top_k), torch.randn(shape)
    with torch.no_grad():
        result, report = run(model, x, codegen="cpp", **ONLY)
    assert report[NAME].applied == 1
    assert torch.equal(result, model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], -1)[..., 1],
        lambda x: x[:, ::2],
        lambda x: x[:1, :1].expand(4, 3, D),
    ],
)
def test_inputs_that_are_not_contiguous(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """They are read as they lie; a result that would lie as they do is left to PyTorch."""
    model, x = made(top_k), change(X)
    with torch.no_grad():
        result, report = run(model, x, codegen="cpp", **ONLY)
        agrees_with_fp64(model, x, result)
        expected = model(x)
    assert result.stride() == expected.stride()
    if expected.is_contiguous():
        assert report[NAME].applied == 1
    else:
        assert refusals(report, NAME) == ["layout"]


def test_two_threads_at_once() -> None:
    """Each gets the bits that it gets alone, call after call."""
    model = made(poly_norm)
    fast = torch.compile(model, backend="sparsecc", options={"codegen": "cpp", **LOWER, **ONLY})
    inputs = [torch.randn(3, 5, D) for _ in range(2)]
    with torch.no_grad():
        alone = [fast(x) for x in inputs]

    def work(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(fast(inputs[i]), alone[i]) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_a_preset_takes_it_where_kernels_are_asked_for() -> None:
    model = made(top_k)
    with torch.no_grad():
        for codegen, applied in (("aten", 0), ("cpp", 1)):
            result, report = run(model, X, codegen=codegen)
            agrees_with_fp64(model, X, result)
            assert (NAME in report.pass_names()) == bool(applied)
            if applied:
                assert report[NAME].applied == applied


def test_the_norm_before_products_is_theirs() -> None:
    """fuse-few-rows has taken it by then."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.linear(F.rms_norm(top_k(m, x), (D,), None, 1e-6))
        return top_k(m, y)

    model, x = made(forward), X[0]
    with torch.no_grad():
        result, report = run(model, x, codegen="cpp")
        agrees_with_fp64(model, x, result)
    assert [m.note for m in report["fuse-few-rows"].matches] == ["rms | p0 + v0"]
    assert report[NAME].applied == 2
    assert not [note for note in specs(report) if "1e-06" in note]


def test_the_kernel_is_what_runs() -> None:
    model = made(poly_norm)
    options = {"codegen": "cpp", **LOWER, **ONLY}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        fast(X)
        with torch.profiler.profile() as profile:
            fast(X)
    calls = [event.name for event in profile.events()]
    assert calls.count("sparsecc::rows_native") == 1
    assert not [c for c in calls if c in ("aten::mul", "aten::mean", "aten::pow")]


# ---- how far a region reaches ------------------------------------------------------------------------


def spread(x: torch.Tensor) -> torch.Tensor:
    return x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)


SPREAD = "max(t0) - min(t0)"
REACH: dict[str, tuple[Forward, list[str]]] = {
    "operands of every shape": (
        lambda m, x: (x * m.weight + m.leading) * m.by_row / spread(x) + m.by_token * x * m.shift,
        [f"(t0 * v0 + v1) * s0 / ({SPREAD}) + v2 * t0 * s1"],
    ),
    "numbers": (
        lambda m, x: 1 - (2 * x + 3) / spread(x) + torch.add(x, x, alpha=1),
        [f"1.0 - (t0 * 2.0 + 3.0) / ({SPREAD}) + (t0 + t0)"],
    ),
    "functions": (
        lambda m, x: (
            F.gelu(x, approximate="tanh")
            * torch.tanh(F.silu(x).abs().sqrt())
            / (spread(x).exp() + 1).rsqrt()
        ),
        [f"gelu_tanh(t0) * tanh(sqrt(abs(silu(t0)))) / rsqrt(exp({SPREAD}) + 1.0)"],
    ),
    "powers": (
        lambda m, x: x.pow(5) / spread(x).pow(-0.5) + 1 / x,
        [f"y0 = t0 * t0; y0 * y0 * t0 / rsqrt({SPREAD}) + 1 / t0"],
    ),
    "clamps": (
        lambda m, x: torch.maximum(x.clamp(max=1), spread(x) * 0.1).clamp(-2, 2).clamp_min(0.5),
        [f"maximum(clamp(maximum(minimum(t0, 1.0), ({SPREAD}) * 0.1), -2.0, 2.0), 0.5)"],
    ),
    "an unbiased variance": (
        lambda m, x: x / (x.var(-1, keepdim=True) + 1) - x,
        ["y0 = t0 - mean(t0); t0 / (sum(y0 * y0) / (N - 1.0) + 1.0) - t0"],
    ),
    "a variance with its mean": (
        lambda m, x: (lambda v, u: (x - u) / (v + 1) * 2)(*torch.var_mean(x, -1, keepdim=True)),
        ["y0 = t0 - mean(t0); y0 / (sum(y0 * y0) / (N - 1.0) + 1.0) * 2.0"],
    ),
    "the axis put back": (
        lambda m, x: x / (x.amax(-1) - x.amin(-1)).unsqueeze(-1) + 1,
        [f"t0 / ({SPREAD}) + 1.0"],
    ),
    "numbers of rows without the axis": (
        lambda m, x: (x.abs().amax(-1) * 2 - x.mean(-1), x + spread(x)),
        ["max(abs(t0)) * 2.0 - mean(t0)", f"t0 + ({SPREAD})"],
    ),
    "the largest, its place not asked for": (
        lambda m, x: x / (x.max(-1, keepdim=True).values - x.min(-1, keepdim=True)[0]) * 2,
        [f"t0 / ({SPREAD}) * 2.0"],
    ),
    "not where its place is asked for": (
        lambda m, x: (lambda top: (x / (top[0] - x.mean(-1, keepdim=True)) * 2 + x, top[1]))(
            x.max(-1, keepdim=True)
        ),
        [],
    ),
    "what is also read outside": (
        lambda m, x: (lambda h: (h / spread(h) * 2, h.cumsum(-1)))(x + m.bias),
        [
            "y0 = t0 + v0; y0; y0 / (max(y0) - min(y0)) * 2.0",
        ],
    ),
    "a result that is read before the last operand is there": (
        lambda m, x: (lambda h: (h / spread(h) + x.cumsum(-1), torch.cos(h)))(x + m.bias),
        ["y0 = t0 + v0; y0; y0 / (max(y0) - min(y0)) + t1"],
    ),
    "a softmax with more": (
        lambda m, x: (lambda p: p - p.amax(-1, keepdim=True) * 0.5 + x)(x.softmax(-1)),
        ["y0 = exp(t0 - max(t0)); y1 = y0 / sum(y0); y1 - max(y1) * 0.5 + t0"],
    ),
    "halves of a row": (
        lambda m, x: (lambda a, b: a * b / (spread(a) + 1))(*x.chunk(2, -1)),
        ["t0 * t1 / (max(t0) - min(t0) + 1.0)"],
    ),
    "cut where something else runs between": (
        lambda m, x: top_k(m, top_k(m, x).cumsum(-1) + x),
        [
            METHODS["statistical top-k"][1],
            "y0 = t0 + t1; y1 = mean(y0); y2 = y0 - y1; relu(y0 - "
            "(y1 + sqrt(mean(y2 * y2)) * 0.6744897501960817))",
        ],
    ),
    "numbers of one region in another": (
        lambda m, x: (lambda s, part: (part - s) / (spread(part) + s))(
            spread(x) + x.mean(-1, keepdim=True) * 2, x[..., :8]
        ),
        [f"{SPREAD} + mean(t0) * 2.0", f"(t0 - s0) / ({SPREAD} + s0)"],
    ),
    "not over another axis": (
        lambda m, x: x / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)),
        [],
    ),
    "not what broadcasts between": (
        lambda m, x: x[:, :1] * (spread(x) + 1) * 2 + x,
        [f"{SPREAD} + 1.0"],
    ),
    "not what widens": (lambda m, x: x.double() / spread(x) + x.mean(-1, keepdim=True), []),
    "not by a number that is not finite": (
        lambda m, x: x.clamp(min=-float("inf")) / spread(x),
        ["t1 / (max(t0) - min(t0))"],
    ),
    "not a norm without ε": (lambda m, x: F.rms_norm(x, (D,)) * x.mean(-1, keepdim=True) + 1, []),
    "not an integer that may overflow": (
        lambda m, x: torch.round(x / spread(x) * 2).to(torch.int8).float(),
        ["round(t0 / (max(t0) - min(t0)) * 2.0)"],
    ),
}


@pytest.mark.parametrize("name", REACH)
def test_how_far_a_region_reaches(name: str) -> None:
    forward, expected = REACH[name]
    model = made(forward)
    x = X.abs() + 0.1 if name in ("functions", "powers") else X
    with torch.no_grad():
        result, report = run(model, x, codegen="cpp", **ONLY)
        agrees_with_fp64(model, x, result)
    assert specs(report) == expected


# ---- refusals ----------------------------------------------------------------------------------------


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = top_k(m, x)
    x.add_(y)
    return y


def long(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = top_k(m, x)
    for _ in range(300):
        y = y * 0.99
    return y


REFUSED: dict[str, Forward] = {
    "large": long,
    "plain": lambda m, x: F.rms_norm(x + m.bias, (D,), m.weight, 1e-6) * 2 + x,
    "written": written,
    "layout": lambda m, x: top_k(m, x.transpose(0, 1)),
    "dtype": lambda m, x: top_k(m, x.double()),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    model = made(REFUSED[code])
    with torch.no_grad():
        result, report = run(model, X.clone(), codegen="cpp", **ONLY)
        expected = model(X.clone())
    assert error(result, expected) < 1e-6
    assert result.stride() == expected.stride()
    assert refusals(report, NAME) == [code]


def test_refuses_a_softmax_that_is_spelled_out() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    with torch.no_grad():
        _, report = run(made(forward), X, codegen="cpp", **ONLY)
    assert refusals(report, NAME) == ["plain"]


def test_refuses_rows_of_unknown_length() -> None:
    model = made(top_k)
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", dynamic=True, **ONLY)
        agrees_with_fp64(model, X, result)
    assert refusals(report, NAME) == ["size"]


def test_refuses_where_gradients_flow() -> None:
    model = made(evonorm_s0)
    result, report = run(model, X, codegen="cpp", **{**LOWER, "lower": "aot_eager"}, **ONLY)
    assert refusals(report, NAME) == ["training"]
    result.sum().backward()
    assert model.weight.grad is not None


def test_refuses_a_region_of_autocast() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        low = x.amin(-1, keepdim=True)
        with torch.autocast("cpu", torch.bfloat16):
            return (x - low) / (x.amax(-1, keepdim=True) - low)

    with torch.no_grad():
        result, report = run(made(forward), X, codegen="cpp", **ONLY)
        assert error(result, forward(None, X)) < 1e-6
    assert refusals(report, NAME) == ["region"]


@pytest.mark.parametrize(
    ("dtype", "applied"),
    [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 1), (torch.float64, 0)],
)
def test_on_a_gpu(dtype: torch.dtype, applied: int) -> None:
    """By shapes and types alone: no GPU is needed to see what becomes an operator."""
    record = GraphReport(0)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, D, device="cuda", dtype=dtype)
        program = capture(lambda x: top_k(None, x), x)
        pipeline.run(program, Options.parse(ONLY), record)
    assert record.passes[NAME].applied == applied
    assert len(list(program.calls(rows))) == applied
