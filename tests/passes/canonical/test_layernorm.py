"""LayerNorm: every spelling is raised, and nothing that only looks like one."""

from __future__ import annotations

import pytest
import torch

PASSES = ["drop-identities", "functionalize-inplace", "raise-layernorm"]
LAYER_NORM = torch.ops.aten.layer_norm.default
D = 8


def centred(x):
    return x - x.mean(-1, keepdim=True)


def var(x, **options):
    return x.var(-1, keepdim=True, **options)


def by_var_mean(x, w, b):
    v, m = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - m) * torch.rsqrt(v + 1e-3) * w + b


def by_old_var_mean(x, w, b):
    v, m = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return b + w * ((x - m) / (v + 1e-3).sqrt())


def by_hand(x, w, b):
    c = centred(x)
    return w * (c / torch.sqrt((c * c).mean(-1, keepdim=True) + 1e-3)) + b


def twice_centred(x, w, b):
    c = centred(x)
    return w * c * torch.rsqrt(var(c, unbiased=False) + 1e-3) + b


def in_place(x, w, b):
    c = x - x.mean(-1, keepdim=True)
    return c.div_(c.pow(2).mean(-1, keepdim=True).add_(1e-3).sqrt_()).mul_(w).add_(b)


SPELLINGS = {
    "unbiased=False": lambda x, w, b: (
        centred(x) / torch.sqrt(var(x, unbiased=False) + 1e-3) * w + b
    ),
    "correction=0": lambda x, w, b: centred(x) * torch.rsqrt(var(x, correction=0) + 1e-3) * w + b,
    "pow(-0.5)": lambda x, w, b: b + w * (centred(x) * (var(x, correction=0) + 1e-3) ** -0.5),
    "1/sqrt": lambda x, w, b: centred(x) * (1 / (1e-3 + var(x, correction=0)).sqrt()) * w + b,
    "mean of squares": lambda x, w, b: (
        w * centred(x) / (centred(x).pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() + b
    ),
    "var_mean": by_var_mean,
    "var_mean, unbiased": by_old_var_mean,
    "by hand": by_hand,
    "twice centred": twice_centred,
    "in place": in_place,
    "no eps": lambda x, w, b: centred(x) / torch.sqrt(var(x, unbiased=False)) * w + b,
}


def inputs(dtype=torch.float64):
    x = torch.randn(2, 3, D, dtype=dtype) + 2
    return x, torch.randn(D, dtype=dtype) + 0.3, torch.randn(D, dtype=dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(run_pass, name, dynamic):
    function, tensors = SPELLINGS[name], inputs()
    result = run_pass(PASSES, function, *tensors, dynamic=dynamic)
    assert result.applied["raise-layernorm"] == 1, result.program.text()
    node = result.node(LAYER_NORM)
    assert node.args[2] is not None
    assert node.args[3] is not None
    torch.testing.assert_close(result.value, function(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["by hand", "unbiased=False", "var_mean"])
def test_float32(run_pass, name):
    function, tensors = SPELLINGS[name], inputs(torch.float32)
    result = run_pass(PASSES, function, *tensors)
    assert result.applied["raise-layernorm"] == 1
    torch.testing.assert_close(result.value, function(*tensors), rtol=1e-5, atol=1e-5)


def mean_of_other_dim(x):
    return (x - x.mean(-2, keepdim=True)) / torch.sqrt(var(x, unbiased=False) + 1e-3)


def unstable(x):
    m = x.mean(-1, keepdim=True)
    return (x - m) / torch.sqrt((x * x).mean(-1, keepdim=True) - m * m + 1e-3)


NEAR_MISSES = {
    "unbiased": (lambda x: centred(x) / torch.sqrt(var(x) + 1e-3), "unbiased-variance"),
    "correction=1": (
        lambda x: centred(x) * torch.rsqrt(var(x, correction=1) + 1e-3),
        "unbiased-variance",
    ),
    "std + eps": (lambda x: centred(x) / (x.std(-1, keepdim=True) + 1e-3), "eps-outside"),
    "sqrt + eps": (
        lambda x: centred(x) / (var(x, unbiased=False).sqrt() + 1e-3),
        "eps-outside",
    ),
    "E[x²]-E[x]²": (unstable, "unstable-variance"),
}
OTHERS = {
    "mean over tokens": mean_of_other_dim,
    "variance over tokens": lambda x: (
        centred(x) / torch.sqrt(x.var(-2, unbiased=False, keepdim=True) + 1e-3)
    ),
    "no keepdim in mean": lambda x: (x - x.mean(-1)) * torch.rsqrt(var(x, correction=0) + 1e-3),
    "no keepdim in var": lambda x: centred(x) * torch.rsqrt(x.var(-1, correction=0) + 1e-3),
    "not centred": lambda x: x * torch.rsqrt(var(x, correction=0) + 1e-3),
    "mean - x": lambda x: (x.mean(-1, keepdim=True) - x) * torch.rsqrt(var(x, correction=0) + 1e-3),
    "half the mean": lambda x: (
        torch.sub(x, x.mean(-1, keepdim=True), alpha=0.5) * torch.rsqrt(var(x, correction=0) + 1e-3)
    ),
    "variance of another": lambda x: centred(x) * torch.rsqrt(var(2 * x, correction=0) + 1e-3),
    "times the deviation": lambda x: centred(x) * torch.sqrt(var(x, correction=0) + 1e-3),
    "over the variance": lambda x: centred(x) / (var(x, correction=0) + 1e-3),
    "alpha on eps": lambda x: (
        centred(x) * torch.rsqrt(torch.add(var(x, correction=0), torch.tensor(1e-3), alpha=7))
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused(run_pass, name):
    function, code = NEAR_MISSES[name]
    x = inputs()[0]
    result = run_pass(PASSES, function, x)
    assert result.refused == [code]
    torch.testing.assert_close(result.value, function(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_stay(run_pass, name):
    function, x = OTHERS[name], torch.randn(D, D, dtype=torch.float64)
    result = run_pass([*PASSES, "raise-rmsnorm"], function, x)
    assert not result.applied["raise-layernorm"]
    assert not result.applied["raise-rmsnorm"]
    torch.testing.assert_close(result.value, function(x), rtol=0, atol=0)


def test_half_precision_is_refused(run_pass):
    tensors = inputs(torch.bfloat16)
    result = run_pass(PASSES, SPELLINGS["by hand"], *tensors)
    assert result.refused == ["half-precision"]


def test_casts_stay_where_they_are(run_pass):
    def function(x, w, b):
        wide = x.float()
        y = centred(wide) * torch.rsqrt(var(wide, correction=0) + 1e-5)
        return y.to(x.dtype) * w + b

    tensors = inputs(torch.bfloat16)
    result = run_pass(PASSES, function, *tensors)
    assert result.node(LAYER_NORM).args[2:4] == (None, None)
    torch.testing.assert_close(result.value, function(*tensors), rtol=2e-2, atol=2e-2)


def test_bias_without_weight(run_pass):
    def function(x, b):
        return centred(x) * torch.rsqrt(var(x, correction=0) + 1e-3) + b

    x, _, b = inputs()
    result = run_pass(PASSES, function, x, b)
    assert result.node(LAYER_NORM).args[2] is None
    assert result.node(LAYER_NORM).args[3] is not None
    torch.testing.assert_close(result.value, function(x, b), rtol=1e-12, atol=1e-12)


def test_residual_is_not_a_bias(run_pass):
    def function(x, w):
        y = centred(x) * torch.rsqrt(var(x, correction=0) + 1e-3) * w
        return y + x, y

    x, w, _ = inputs()
    result = run_pass(PASSES, function, x, w)
    assert result.node(LAYER_NORM).args[3] is None
    torch.testing.assert_close(result.value, function(x, w), rtol=1e-12, atol=1e-12)


def test_centred_values_may_have_other_readers(run_pass):
    def function(x, w, b):
        return by_hand(x, w, b), centred(x).abs()

    tensors = inputs()
    result = run_pass(PASSES, function, *tensors)
    assert result.applied["raise-layernorm"] == 1
    torch.testing.assert_close(result.value, function(*tensors), rtol=1e-12, atol=1e-12)


def test_detached_statistics_stay(run_pass):
    def function(x):
        return centred(x) * torch.rsqrt(var(x, correction=0).detach() + 1e-3)

    x = inputs()[0].requires_grad_()
    result = run_pass(PASSES, function, x, grad=True)
    assert not result.applied["raise-layernorm"]
    got = torch.autograd.grad(result.value.sin().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(function(x).sin().sum(), x))


def test_gradients(run_pass):
    tensors = [t.requires_grad_() for t in inputs()]
    result = run_pass(PASSES, by_hand, *tensors, grad=True)
    assert result.applied["raise-layernorm"] == 1
    got = torch.autograd.grad(result.value.sin().sum(), tensors)
    expected = torch.autograd.grad(by_hand(*tensors).sin().sum(), tensors)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_operator_is_left_alone(run_pass):
    def function(x, w, b):
        return torch.nn.functional.layer_norm(x, (D,), w, b)

    result = run_pass(PASSES, function, *inputs())
    assert not result.applied
