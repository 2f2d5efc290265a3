"""fuse-rows: which work on rows becomes one operator, what stays apart, and what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from row_models import (
    METHODS,
    NAME,
    ONLY,
    D,
    Forward,
    X,
    crms_norm,
    evonorm_s0,
    made,
    poly_norm,
    quantized,
    specs,
    spread,
    top_k,
)
from support import agrees_with_fp64, capture, error, randomise, refusals, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from sparsecc import pipeline
from sparsecc.options import Options
from sparsecc.report.model import GraphReport
from sparsecc.runtime.ops.rows import rows

LOWER = {"lower": "eager", "strict": True, "floor": False}


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
