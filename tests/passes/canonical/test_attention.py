"""Attention: every spelling is raised, and nothing that only looks like one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

PASSES = ["drop-identities", "functionalize-inplace", "raise-attention"]
aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
B, H, L, S, E = 2, 3, 5, 7, 4


def inputs(dtype=torch.float64):
    q = torch.randn(B, H, L, E, dtype=dtype)
    k, v = torch.randn(2, B, H, S, E, dtype=dtype)
    return q, k, v, torch.randn(B, 1, L, S, dtype=dtype)


def softmax(x):
    return torch.softmax(x, dim=-1)


def in_float32(q, k, v, m):
    weights = F.softmax(q @ k.mT * 0.3 + m, dim=-1, dtype=q.dtype).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v


def in_place(q, k, v, m):
    scores = q @ k.transpose(-1, -2)
    scores /= 2.0
    scores += m
    return softmax(scores) @ v


def old_gpt2(q, k, v, m):
    scores = q @ k.transpose(-1, -2)
    scores = scores / torch.full([], v.size(-1) ** 0.5, dtype=scores.dtype)
    return softmax(scores + m) @ v


def heads_last(q, k, v, m):
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # [B, L, H, E], as in memory
    scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)
    return softmax(scores * 0.5 + m) @ v.permute(0, 2, 1, 3)


SPELLINGS = {
    "llama": lambda q, k, v, m: softmax(torch.matmul(q, k.transpose(2, 3)) * 0.3 + m) @ v,
    "divided": lambda q, k, v, m: softmax(q @ k.transpose(-1, -2) / math.sqrt(E) + m) @ v,
    "mask first": lambda q, k, v, m: softmax(m + 0.3 * (q @ k.transpose(-2, -1))) @ v,
    "permute": lambda q, k, v, m: softmax(q @ k.permute(0, 1, 3, 2) * 0.3 + m) @ v,
    "mT": lambda q, k, v, m: softmax(q @ k.mT * 0.3 + m) @ v,
    "swapaxes": lambda q, k, v, m: softmax(q @ k.swapaxes(-1, -2) * 0.3 + m) @ v,
    "q scaled": lambda q, k, v, m: softmax((q * 0.3) @ k.mT + m) @ v,
    "q and k scaled": lambda q, k, v, m: softmax((q / 2) @ (k * 0.5).mT + m) @ v,
    "no scale": lambda q, k, v, m: softmax(q @ k.mT + m) @ v,
    "scaled twice": lambda q, k, v, m: softmax((q * 0.7) @ k.mT / 3 * 2 + m) @ v,
    "no mask": lambda q, k, v, m: softmax(q @ k.mT * 0.3) @ v,
    "two masks": lambda q, k, v, m: softmax(q @ k.mT * 0.3 + m + m[:1]) @ v,
    "mask [L, S]": lambda q, k, v, m: softmax(q @ k.mT * 0.3 + m[0, 0]) @ v,
    "mask [S]": lambda q, k, v, m: softmax(q @ k.mT * 0.3 + m[0, 0, 0]) @ v,
    "mask [1, L, S]": lambda q, k, v, m: softmax(q @ k.mT * 0.3 + m[0]) @ v,
    "softmax in the dtype": in_float32,
    "in place": in_place,
    "full scale": old_gpt2,
    "heads last": heads_last,
    "bmm": lambda q, k, v, m: torch.bmm(softmax(torch.bmm(q[0], k[0].mT) * 0.3 + m[0]), v[0]),
    "three dimensions": lambda q, k, v, m: softmax(q[0] @ k[0].mT * 0.3 + m[0]) @ v[0],
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(run_pass, name, dynamic):
    function, tensors = SPELLINGS[name], inputs()
    result = run_pass(PASSES, function, *tensors, dynamic=dynamic)
    if dynamic and name == "full scale":
        return  # the width of the heads is symbolic here, and so is the scale
    assert result.applied["raise-attention"] == 1, result.program.text()
    node = result.node(SDPA)
    assert isinstance(node.kwargs["scale"], float)
    assert not set(result.targets) & {"aten.softmax.int", "aten.matmul.default", "aten.bmm.default"}
    torch.testing.assert_close(result.value, function(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "q scaled", "two masks", "three dimensions"])
def test_float32(run_pass, name):
    function, tensors = SPELLINGS[name], inputs(torch.float32)
    result = run_pass(PASSES, function, *tensors)
    assert result.applied["raise-attention"] == 1
    torch.testing.assert_close(result.value, function(*tensors), rtol=1e-5, atol=1e-5)


def weights_returned(q, k, v, m):
    weights = softmax(q @ k.mT * 0.3 + m)
    return weights @ v, weights


def scores_returned(q, k, v, m):
    scores = q @ k.mT
    return softmax(scores * 0.3 + m) @ v, scores


def dropped_out(q, k, v, m):
    return F.dropout(softmax(q @ k.mT * 0.3 + m), 1.0, training=True) @ v


def key_stored_transposed(q, k, v, m):
    return softmax(q @ k.mT.contiguous() * 0.3 + m) @ v


REFUSED = {
    "mask before scale": (
        lambda q, k, v, m: softmax((q @ k.mT + m) * 0.3) @ v,
        "mask-before-scale",
    ),
    "over queries": (
        lambda q, k, v, m: torch.softmax(q @ k.mT * 0.3 + m, -2) @ v,
        "softmax-dim",
    ),
    "masked_fill": (
        lambda q, k, v, m: softmax((q @ k.mT * 0.3).masked_fill(m > 1, -torch.inf)) @ v,
        "masked-fill",
    ),
    "where": (
        lambda q, k, v, m: softmax(torch.where(m > 1, q @ k.mT * 0.3, -1e9)) @ v,
        "masked-fill",
    ),
    "weights returned": (weights_returned, "probabilities-used"),
    "scores returned": (scores_returned, "probabilities-used"),
    "active dropout": (dropped_out, "dropout"),
    "one key head": (lambda q, k, v, m: softmax(q @ k[:, :1].mT + m) @ v, "broadcast"),
    "one value head": (lambda q, k, v, m: softmax(q @ k.mT + m) @ v[:, :1], "broadcast"),
    "mask enlarges": (
        lambda q, k, v, m: softmax(q[:1] @ k[:1].mT + m) @ v[:1],
        "broadcast",
    ),
    "key stored transposed": (key_stored_transposed, "key-layout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(run_pass, name):
    function, code = REFUSED[name]
    tensors = inputs()
    result = run_pass(PASSES, function, *tensors)
    assert result.refused == [code]
    torch.testing.assert_close(result.value, function(*tensors), rtol=0, atol=0)


def square_inputs():
    """All dimensions alike, so that every wrong permutation has a valid shape."""
    return torch.randn(4, 3, 3, 3, 3, dtype=torch.float64).unbind(0)


OTHERS = {
    "wrong permute": lambda q, k, v, m: softmax(q @ k.permute(1, 0, 3, 2) * 0.3 + m) @ v,
    "rotated": lambda q, k, v, m: softmax(q @ k.permute(0, 3, 1, 2) * 0.3 + m) @ v,
    "heads and width": lambda q, k, v, m: softmax(q @ k.transpose(1, 3) * 0.3 + m) @ v,
    "not transposed": lambda q, k, v, m: softmax(q @ k * 0.3 + m) @ v,
    "no softmax": lambda q, k, v, m: (q @ k.mT * 0.3 + m) @ v,
    "v first": lambda q, k, v, m: v @ softmax(q @ k.mT * 0.3 + m),
    "transposed weights": lambda q, k, v, m: softmax(q @ k.mT * 0.3 + m).mT @ v,
    "scaled weights": lambda q, k, v, m: (softmax(q @ k.mT + m) * 0.3) @ v,
    "capped": lambda q, k, v, m: softmax(torch.tanh(q @ k.mT * 0.3) + m) @ v,
    "mask times": lambda q, k, v, m: softmax((q @ k.mT * 0.3) * m) @ v,
    "mask minus": lambda q, k, v, m: softmax(m - q @ k.mT * 0.3) @ v,
    "mask alpha": lambda q, k, v, m: softmax(torch.add(q @ k.mT * 0.3, m, alpha=2)) @ v,
    "log_softmax": lambda q, k, v, m: torch.log_softmax(q @ k.mT * 0.3 + m, -1) @ v,
    "scale / scores": lambda q, k, v, m: softmax(0.3 / (q @ k.mT).abs() + m) @ v,
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_matches_is_equal(run_pass, name):
    """The right operand of the first product is k transposed, whatever permutation made it."""
    function, tensors = OTHERS[name], square_inputs()
    result = run_pass(PASSES, function, *tensors)
    torch.testing.assert_close(result.value, function(*tensors), rtol=1e-12, atol=1e-12)
    if name not in ("wrong permute", "rotated", "heads and width", "not transposed"):
        assert not result.applied["raise-attention"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(run_pass, dtype):
    function, tensors = SPELLINGS["llama"], inputs(dtype)
    result = run_pass(PASSES, function, *tensors)
    assert result.refused == ["half-precision"]


def test_half_scores_with_a_float32_softmax_are_refused(run_pass):
    def function(q, k, v, m):
        weights = F.softmax(q @ k.mT * 0.3 + m, dim=-1, dtype=torch.float32).to(q.dtype)
        return weights @ v

    result = run_pass(PASSES, function, *inputs(torch.bfloat16))
    assert result.refused == ["half-precision"]


def test_symbolic_scale_is_passed_through(run_pass):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling = 0.3

        def forward(self, q, k, v, m):
            return softmax(q @ k.mT * self.scaling + m) @ v + softmax(q @ k.mT / self.scaling) @ v

    model, tensors = Model(), inputs()
    result = run_pass(PASSES, model, *tensors, dynamic=True)
    assert result.applied["raise-attention"] == 2
    torch.testing.assert_close(result.value, model(*tensors), rtol=1e-12, atol=1e-12)


def test_rows_masked_by_the_minimum(run_pass):
    """A row whose keys are all masked by the dtype's minimum is uniform in both forms."""
    q, k, v, m = inputs(torch.float32)
    m = torch.where(m > 0, 0.0, torch.finfo(torch.float32).min)
    m[:, :, 2] = torch.finfo(torch.float32).min
    function = SPELLINGS["llama"]
    result = run_pass(PASSES, function, q, k, v, m)
    assert result.applied["raise-attention"] == 1
    torch.testing.assert_close(result.value, function(q, k, v, m), rtol=1e-5, atol=1e-5)


def test_rows_masked_by_infinity(run_pass):
    """The one known difference: 0/0 is NaN when spelled, 0 in the operator. Other rows agree."""
    q, k, v, m = inputs(torch.float32)
    m[:, :, 2] = -torch.inf
    function = SPELLINGS["llama"]
    result, expected = run_pass(PASSES, function, q, k, v, m), function(q, k, v, m)
    assert expected[:, :, 2].isnan().all()
    assert not result.value.isnan().any()
    rows = [0, 1, 3, 4]
    torch.testing.assert_close(result.value[:, :, rows], expected[:, :, rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["view", "view after transpose", "returned", "written"])
def test_strides_of_the_result(run_pass, kind):
    """The kernels return other strides than matmul; whoever reads strides must not notice."""

    def function(q, k, v, m):
        y = softmax(q @ k.mT * 0.3 + m) @ v
        if kind == "view":
            return y.view(B * H, L, E) + 1
        if kind == "view after transpose":
            return y.transpose(1, 2).reshape(B, L, H * E).view(-1, E) + 1
        if kind == "written":
            y.view(-1, E).add_(1)
        return y

    tensors = inputs(torch.float32)
    result, expected = run_pass(PASSES, function, *tensors), function(*tensors)
    assert result.applied["raise-attention"] == 1
    assert result.value.stride() == expected.stride()
    torch.testing.assert_close(result.value, expected, rtol=1e-5, atol=1e-5)


def test_attention_of_attention(run_pass):
    def function(q, k, v, m):
        y = softmax(q @ k.mT * 0.3 + m) @ v
        return softmax(y @ k.mT * 0.3 + m) @ v

    tensors = inputs()
    result = run_pass(PASSES, function, *tensors)
    assert result.applied["raise-attention"] == 2
    torch.testing.assert_close(result.value, function(*tensors), rtol=1e-12, atol=1e-12)


def test_not_where_gradients_flow(run_pass):
    tensors = [t.requires_grad_() for t in inputs()]
    function = SPELLINGS["llama"]
    result = run_pass(PASSES, function, *tensors, grad=True)
    assert not result.applied["raise-attention"]
    assert result.refused == ["training"]
    got = torch.autograd.grad(result.value.sin().sum(), tensors)
    expected = torch.autograd.grad(function(*tensors).sin().sum(), tensors)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with torch.no_grad():
        assert run_pass(PASSES, function, *tensors).applied["raise-attention"] == 1
