"""SiLU and GELU: every spelling is raised, and nothing that only looks like one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

PASSES = ["drop-identities", "functionalize-inplace", "raise-activation"]
aten = torch.ops.aten
C = math.sqrt(2 / math.pi)


def tanh(x):
    # Literals: under dynamic=True a global or a default argument would be a symbolic float.
    return torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))


SPELLINGS = {
    "x*sigmoid": (lambda x: x * torch.sigmoid(x), "silu"),
    "sigmoid*x": (lambda x: x.sigmoid() * x, "silu"),
    "mul_": (lambda x: torch.sigmoid(x).mul_(x), "silu"),
    "x/(1+exp(-x))": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "x*(1/(exp(-x)+1))": (lambda x: x * (1 / (torch.exp(-x) + 1)), "silu"),
    "gpt2": (lambda x: 0.5 * x * (1 + tanh(x)), "tanh"),
    "pow(3.0)": (
        lambda x: (
            0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))
        ),
        "tanh",
    ),
    "x*x*x": (
        lambda x: 0.5 * x * (1 + torch.tanh((x + x * x * x * 0.044715) * 0.7978845608028654)),
        "tanh",
    ),
    "factored": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        "tanh",
    ),
    "distributed": (lambda x: x * (tanh(x) * 0.5 + 0.5), "tanh"),
    "product last": (lambda x: (1 + tanh(x)) * x * 0.5, "tanh"),
    "halved": (lambda x: x * (1 + tanh(x)) / 2, "tanh"),
    "two terms": (lambda x: 0.5 * x + 0.5 * x * tanh(x), "tanh"),
    "erf": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "erf"),
    "bert": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "erf"),
    "erf by product": (lambda x: x * (1 + torch.erf(x * 0.7071067811865475)) * 0.5, "erf"),
    "erf short constant": (lambda x: 0.5 * (x * (1 + torch.erf(x * 0.70710678))), "erf"),
}


def expected_node(result, kind):
    if kind == "silu":
        return result.node(aten.silu.default)
    node = result.node(aten.gelu.default)
    assert node.kwargs.get("approximate", "none") == ("tanh" if kind == "tanh" else "none")
    return node


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(run_pass, name, dynamic):
    function, kind = SPELLINGS[name]
    x = torch.randn(4, 6, dtype=torch.float64) * 3
    result = run_pass(PASSES, function, x, dynamic=dynamic)
    assert result.applied["raise-activation"] == 1, result.program.text()
    expected_node(result, kind)
    # Constants written with eight digits differ from the operator's in the ninth.
    tolerance = 1e-8 if name in ("factored", "erf short constant") else 1e-12
    torch.testing.assert_close(result.value, function(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["x*sigmoid", "gpt2", "bert"])
def test_amplitudes(run_pass, name, dtype):
    function, _ = SPELLINGS[name]
    x = torch.cat([torch.rand(64).sub(0.5) * s for s in (1e-4, 1.0, 30.0, 1.2e5)]).to(dtype)
    x = torch.cat([x, torch.tensor([0.0, -0.0], dtype=dtype)])
    result = run_pass(PASSES, function, x)
    assert result.applied["raise-activation"] == 1
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    exact = function(x.double())
    assert torch.isfinite(result.value).all()
    worst = (function(x).double() - exact).abs().max()
    assert (result.value.double() - exact).abs().max() <= worst + tolerance


def test_symbolic_constants_stay(run_pass):
    def function(x):
        return 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**3)))

    x = torch.randn(4, 6, dtype=torch.float64)
    assert run_pass(PASSES, function, x).applied["raise-activation"] == 1
    result = run_pass(PASSES, function, x, dynamic=True)  # here C may change without a recompile
    assert not result.applied["raise-activation"]
    torch.testing.assert_close(result.value, function(x))


def test_an_expression_as_x(run_pass):
    def function(x, b):
        y = x * 2 + b
        return 0.5 * y * (1 + tanh(y)) + y * torch.sigmoid(y)

    x, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    result = run_pass(PASSES, function, x, b)
    assert result.applied["raise-activation"] == 2
    torch.testing.assert_close(result.value, function(x, b), rtol=1e-12, atol=1e-12)


OTHERS = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "glu": lambda x: x[:, :3] * torch.sigmoid(x[:, 3:]),
    "sigmoid of -x": lambda x: x * torch.sigmoid(-x),
    "sigmoid": lambda x: (x + 1) * torch.sigmoid(x),
    "2 silu": lambda x: 2 * x + torch.sigmoid(x),
    "exp(x)": lambda x: x / (1 + torch.exp(x)),
    "2+exp(-x)": lambda x: x / (2 + torch.exp(-x)),
    "wrong a": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044725 * x**3))),
    "wrong c": lambda x: 0.5 * x * (1 + torch.tanh(0.7978 * (x + 0.044715 * x**3))),
    "square": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**2))),
    "fourth power": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x**4))),
    "not halved": lambda x: x * (1 + tanh(x)),
    "minus": lambda x: 0.5 * x * (1 - tanh(x)),
    "alpha": lambda x: 0.5 * x * torch.add(torch.ones(6), tanh(x), alpha=2),
    "x squared": lambda x: 0.5 * x * x * (1 + tanh(x)),
    "erf of x": lambda x: 0.5 * x * (1 + torch.erf(x)),
    "erf of x/1.414": lambda x: 0.5 * x * (1 + torch.erf(x / 1.414)),
    "erfc": lambda x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2))),
    "other input": lambda x: 0.5 * x.abs() * (1 + torch.erf(x / math.sqrt(2))),
    "floor division": lambda x: (
        0.5 * x * (1 + torch.erf(torch.div(x, math.sqrt(2), rounding_mode="floor")))
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_stay(run_pass, name):
    function, x = OTHERS[name], torch.randn(4, 6, dtype=torch.float64)
    result = run_pass(PASSES, function, x)
    assert not result.applied["raise-activation"]
    torch.testing.assert_close(result.value, function(x), rtol=0, atol=0)


def test_widened_results_stay(run_pass):
    def function(x):
        return x * torch.sigmoid(x.float())

    x = torch.randn(4, 6).bfloat16()
    result = run_pass(PASSES, function, x)
    assert not result.applied["raise-activation"]
    assert result.value.dtype == torch.float32


def test_a_write_between_the_reads_is_refused(run_pass):
    def function(x):
        y = x + 1
        gate = torch.sigmoid(y)
        y.view(-1).mul_(2)
        return y * gate

    x = torch.randn(4, 6)
    result = run_pass(PASSES, function, x)
    assert "written" in result.refused
    torch.testing.assert_close(result.value, function(x))


def test_a_grad_mode_switch_is_refused(run_pass):
    def function(x):
        with torch.no_grad():
            gate = torch.sigmoid(x)
        return x * gate

    x = torch.randn(4, 6, requires_grad=True)
    result = run_pass(PASSES, function, x, grad=True)
    assert result.refused == ["region"]
    got = torch.autograd.grad(result.value.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(function(x).sum(), x))


def test_an_autocast_region_is_not_left(run_pass):
    def function(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ w
            gate = torch.sigmoid(y)
        return y * gate

    x = torch.randn(6, 6)
    result = run_pass(PASSES, function, x, x)
    assert result.refused == ["region"]
    torch.testing.assert_close(result.value, function(x, x))


@pytest.mark.parametrize("name", ["gelu_new", "gelu_python", "silu", "gelu_fast", "quick_gelu"])
def test_transformers(run_pass, transformers, name):
    from transformers.activations import ACT2FN

    function = ACT2FN[name]
    x = torch.randn(4, 6, dtype=torch.float64)
    result = run_pass(PASSES, function, x)
    raised = result.targets["aten.gelu.default"] + result.targets["aten.silu.default"]
    assert raised == (0 if name == "quick_gelu" else 1), result.program.text()
    torch.testing.assert_close(result.value, function(x), rtol=1e-8, atol=1e-8)


def test_gradients(run_pass):
    def function(x):
        return SPELLINGS["gpt2"][0](x) + SPELLINGS["bert"][0](x) + SPELLINGS["x*sigmoid"][0](x)

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    result = run_pass(PASSES, function, x, grad=True)
    assert result.applied["raise-activation"] == 3
    got = torch.autograd.grad(result.value.sum(), x)
    expected = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_the_operators_are_left_alone(run_pass):
    def function(x):
        return F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh")

    assert not run_pass(PASSES, function, torch.randn(4, 6)).applied
