"""RMSNorm: every spelling is raised, and nothing that only looks like one."""

from __future__ import annotations

import pytest
import torch
from support import refusals, run

PASSES = ["drop-identities", "functionalize-inplace", "raise-rmsnorm"]
RMS_NORM = torch.ops.aten.rms_norm.default
D = 8


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


SPELLINGS = {
    "llama": lambda x, w: w * (x * torch.rsqrt(mean_square(x) + 1e-3)),
    "weight last": lambda x, w: x * torch.rsqrt(mean_square(x) + 1e-3) * w,
    "weight first": lambda x, w: (w * x) * torch.rsqrt(mean_square(x) + 1e-3),
    "inverse first": lambda x, w: torch.rsqrt(1e-3 + mean_square(x)) * x * w,
    "x*x": lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * w,
    "square": lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w,
    "pow(2.0)": lambda x, w: x * torch.rsqrt((x**2.0).mean((-1,), keepdim=True) + 1e-3) * w,
    "pow(-0.5)": lambda x, w: x * (mean_square(x) + 1e-3) ** -0.5 * w,
    "pow(0.5)": lambda x, w: x / torch.pow(mean_square(x) + 1e-3, 0.5) * w,
    "1/sqrt": lambda x, w: x * (1 / torch.sqrt(mean_square(x) + 1e-3)) * w,
    "1.0/rsqrt": lambda x, w: x / (1.0 / torch.rsqrt(mean_square(x) + 1e-3)) * w,
    "reciprocal": lambda x, w: x * (mean_square(x) + 1e-3).sqrt().reciprocal() * w,
    "sum / d": lambda x, w: x * ((x * x).sum(-1, keepdim=True) / D + 1e-3).rsqrt() * w,
    "sum * 1/d": lambda x, w: x * ((x * x).sum(-1, keepdim=True) * (1 / D) + 1e-3).rsqrt() * w,
    "positive dim": lambda x, w: x * ((x * x).mean(2, keepdim=True) + 1e-3).rsqrt() * w,
    "unsqueeze": lambda x, w: x * ((x * x).mean(-1).unsqueeze(-1) + 1e-3).rsqrt() * w,
    "gemma": lambda x, w: x * torch.rsqrt(mean_square(x) + 1e-3) * (1.0 + w),
    "in place": lambda x, w: x * mean_square(x).add_(1e-3).rsqrt_() * w,
    "tensor eps": lambda x, w: x * torch.rsqrt(mean_square(x) + torch.tensor(1e-3)) * w,
    "no eps": lambda x, w: x * torch.rsqrt(mean_square(x)) * w,
}
STATIC_ONLY = {"sum / d", "sum * 1/d"}  # a symbolic width is not compared with a number


def inputs(dtype=torch.float64, rows=(2, 3)):
    return torch.randn(*rows, D, dtype=dtype), torch.randn(D, dtype=dtype) + 0.3


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(run_pass, name, dynamic):
    if dynamic and name in STATIC_ONLY:
        pytest.skip("a symbolic width is not compared with a number")
    function, (x, w) = SPELLINGS[name], inputs()
    result = run_pass(PASSES, function, x, w, dynamic=dynamic)
    assert result.applied["raise-rmsnorm"] == 1
    node = result.node(RMS_NORM)
    assert node.args[2] is not None, "the weight was left outside"
    torch.testing.assert_close(result.value, function(x, w), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "x*x", "pow(-0.5)", "gemma"])
def test_float32(run_pass, name):
    function, (x, w) = SPELLINGS[name], inputs(torch.float32)
    result = run_pass(PASSES, function, x, w)
    assert result.applied["raise-rmsnorm"] == 1
    torch.testing.assert_close(result.value, function(x, w), rtol=1e-5, atol=1e-6)


NOT_RMSNORM = {
    "mean over tokens": lambda x: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-3),
    "mean over both": lambda x: x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-3),
    "no keepdim": lambda x: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-3),
    "cube": lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-3),
    "mean of x": lambda x: x * torch.rsqrt(x.mean(-1, keepdim=True).abs() + 1e-3),
    "eps outside": lambda x: x / (mean_square(x).sqrt() + 1e-3),
    "eps in the square": lambda x: x * torch.rsqrt((x + 1e-3).pow(2).mean(-1, keepdim=True)),
    "times the root": lambda x: x * torch.sqrt(mean_square(x) + 1e-3),
    "over rsqrt": lambda x: x / torch.rsqrt(mean_square(x) + 1e-3),
    "full power": lambda x: x / (mean_square(x) + 1e-3),
    "sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-3),
    "sum / wrong d": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (D - 1) + 1e-3),
    "norm": lambda x: x * D**0.5 / x.norm(dim=-1, keepdim=True),
    "another x": lambda x: (x + 1) * torch.rsqrt(mean_square(x) + 1e-3),
    "eps twice": lambda x: x * torch.rsqrt(mean_square(x) + mean_square(x)),
    "scaled eps": lambda x: x * torch.rsqrt(torch.add(mean_square(x), torch.ones(1), alpha=3)),
}


@pytest.mark.parametrize("name", NOT_RMSNORM)
def test_near_misses_stay(run_pass, name):
    function = NOT_RMSNORM[name]
    x = torch.randn(D, D, dtype=torch.float64)
    result = run_pass(PASSES, function, x)
    assert result.applied["raise-rmsnorm"] == 0
    torch.testing.assert_close(result.value, function(x), rtol=0, atol=0)


def test_each_norm_keeps_its_eps(run_pass):
    def function(x, w):
        first = x * torch.rsqrt(mean_square(x) + 1e-12) * w
        second = first + 1
        return first, second * torch.rsqrt(mean_square(second) + 1e-2) * w

    x, w = inputs()
    x[0] *= 1e-8  # a nearly empty row: here the wrong eps shows
    result = run_pass(PASSES, function, x, w)
    assert [n.args[3] for n in result.program.calls(RMS_NORM)] == [1e-12, 1e-2]
    torch.testing.assert_close(result.value, function(x, w), rtol=1e-12, atol=1e-12)


def test_a_norm_of_a_norm(run_pass):
    def function(x, w):
        y = SPELLINGS["llama"](x, w)
        return SPELLINGS["llama"](y, w)

    x, w = inputs()
    result = run_pass(PASSES, function, x, w)
    assert result.applied["raise-rmsnorm"] == 2
    torch.testing.assert_close(result.value, function(x, w), rtol=1e-12, atol=1e-12)


def test_symbolic_eps_is_passed_through(run_pass):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-2

        def forward(self, x):
            return x * torch.rsqrt(mean_square(x) + self.eps)

    x, _ = inputs()
    result = run_pass(PASSES, Norm(), x, dynamic=True)
    assert isinstance(result.node(RMS_NORM).args[3], torch.fx.Node)
    torch.testing.assert_close(result.value, Norm()(x), rtol=1e-12, atol=1e-12)


def test_casts_stay_where_they_are(run_pass):
    def function(x, w):
        wide = x.float()
        return w * (wide * torch.rsqrt(mean_square(wide) + 1e-5)).to(x.dtype)

    x, w = inputs(torch.bfloat16)
    result = run_pass(PASSES, function, x, w)
    node = result.node(RMS_NORM)
    assert node.args[2] is None, "the weight multiplies after the cast"
    assert node.meta["val"].dtype == torch.float32
    torch.testing.assert_close(result.value, function(x, w), rtol=0, atol=0)


def test_product_with_the_narrow_input(run_pass):
    def function(x):
        return x * torch.rsqrt(mean_square(x.float()) + 1e-5)

    x, _ = inputs(torch.bfloat16)
    result = run_pass(PASSES, function, x * 3)
    assert result.applied["raise-rmsnorm"] == 1
    torch.testing.assert_close(result.value, function(x * 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e2])
def test_half_precision_is_refused(run_pass, scale):
    # The squares overflow in float16 from 256 on; the operator would compute in float32 and not
    # overflow.
    x = torch.randn(4, D).half() * scale
    function = SPELLINGS["llama"]
    result = run_pass(PASSES, function, x, torch.ones(D).half())
    assert result.refused == ["half-precision"]
    torch.testing.assert_close(
        result.value, function(x, torch.ones(D).half()), rtol=0, atol=0, equal_nan=True
    )


def test_weight_stays_out_when_something_else_reads_the_norm(run_pass):
    def function(x, w):
        y = x * torch.rsqrt(mean_square(x) + 1e-3)
        return y * w, y

    x, w = inputs()
    result = run_pass(PASSES, function, x, w)
    assert result.node(RMS_NORM).args[2] is None
    torch.testing.assert_close(result.value, function(x, w), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, D), (2, 3, D), (1,)])
def test_other_factors_stay_out(run_pass, shape):
    def function(x, w):
        return x * torch.rsqrt(mean_square(x) + 1e-3) * w

    x, _ = inputs()
    w = torch.randn(shape, dtype=x.dtype)
    result = run_pass(PASSES, function, x, w)
    assert result.node(RMS_NORM).args[2] is None
    torch.testing.assert_close(result.value, function(x, w), rtol=1e-12, atol=1e-12)


def test_a_write_between_the_reads_is_refused(run_pass):
    def function(x):
        y = x + 1
        inverse = torch.rsqrt(mean_square(y) + 1e-3)
        y.view(-1).add_(1)
        return y * inverse

    x, _ = inputs()
    result = run_pass(PASSES, function, x)
    assert result.applied["raise-rmsnorm"] == 0
    assert "written" in result.refused
    torch.testing.assert_close(result.value, function(x))


def test_a_grad_mode_switch_is_refused(run_pass):
    def function(x):
        with torch.no_grad():
            inverse = torch.rsqrt(mean_square(x) + 1e-3)
        return x * inverse

    x, _ = inputs()
    x.requires_grad_()
    result = run_pass(PASSES, function, x, grad=True)
    assert result.refused == ["region"]
    got = torch.autograd.grad(result.value.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(function(x).sum(), x))


def test_permuted_input_whose_strides_are_read(run_pass):
    def function(x):
        x = x.transpose(0, 1)
        y = x * torch.rsqrt(mean_square(x) + 1e-3)
        return y.transpose(0, 1).view(-1)

    x, _ = inputs()
    result = run_pass(PASSES, function, x)
    assert result.refused == ["layout"]
    torch.testing.assert_close(result.value, function(x))


def test_strides_pass_through_elementwise_operators(run_pass):
    """What the caller gets is permuted because the norm's input was."""

    def function(x):
        x = x.transpose(0, 1)
        y = x * torch.rsqrt(mean_square(x) + 1e-3)
        return torch.tanh(y) + 1

    x, _ = inputs()
    result = run_pass(PASSES, function, x)
    assert result.refused == ["layout"]
    assert result.value.stride() == function(x).stride()


@pytest.mark.parametrize("name", ["llama", "gemma", "pow(-0.5)"])
def test_gradients(run_pass, name):
    function, (x, w) = SPELLINGS[name], inputs()
    x.requires_grad_()
    w.requires_grad_()
    result = run_pass(PASSES, function, x, w, grad=True)
    assert result.applied["raise-rmsnorm"] == 1
    got = torch.autograd.grad(result.value.sin().sum(), (x, w))
    expected = torch.autograd.grad(function(x, w).sin().sum(), (x, w))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


MODELS = (
    "llama.modeling_llama.LlamaRMSNorm",
    "mistral.modeling_mistral.MistralRMSNorm",
    "qwen2.modeling_qwen2.Qwen2RMSNorm",
    "qwen3.modeling_qwen3.Qwen3RMSNorm",
    "gemma.modeling_gemma.GemmaRMSNorm",
    "gemma2.modeling_gemma2.Gemma2RMSNorm",
    "phi3.modeling_phi3.Phi3RMSNorm",
    "olmo2.modeling_olmo2.Olmo2RMSNorm",
    "t5.modeling_t5.T5LayerNorm",
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_transformers(run_pass, transformers, name, dtype):
    path, _, attribute = name.rpartition(".")
    module = __import__(f"transformers.models.{path}", fromlist=[attribute])
    norm = getattr(module, attribute)(D).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, D, dtype=dtype) * 3
    with torch.no_grad():
        expected = norm(x)
    # T5 multiplies the float64 input by a float32 inverse root: that rounds, and stays as written.
    is_mixed = dtype == torch.float64 and attribute == "T5LayerNorm"
    for dynamic in (False, True) if dtype == torch.float32 else (False,):
        result = run_pass(PASSES, norm, x, dynamic=dynamic)
        assert result.applied["raise-rmsnorm"] == (0 if is_mixed else 1), result.program.text()
        assert result.value.dtype == expected.dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(result.value, expected, rtol=tolerance, atol=tolerance)


class WrittenLater(torch.nn.Module):
    """The normalized tensor is added to in place, from another autocast region than it was made in."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = x.clone()
        y = h * torch.rsqrt(mean_square(h) + 1e-3) * self.weight
        return h.add_(y)


def test_in_training_a_write_after_the_reads_keeps_the_spelling():
    """The operator would save its operand for the gradient, and find it changed."""
    x, model = torch.randn(2, 5, D), WrittenLater()
    result, report = run(model, x, passes=["layernorm-to-rmsnorm"], floor=False)
    result.square().sum().backward()
    got, model.weight.grad = model.weight.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(got, model.weight.grad)
    assert refusals(report, "raise-rmsnorm") == ["written"]
    with torch.no_grad():
        _, report = run(model, x, passes=["layernorm-to-rmsnorm"], floor=False)
    assert report["raise-rmsnorm"].applied == 1
