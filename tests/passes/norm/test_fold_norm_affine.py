"""fold-norm-affine: all consumers or none, every spelling of the weight, biases created where needed."""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    PreNorm,
    capture,
    check_exact,
    check_training,
    error,
    ids,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn

import sparsecc
from sparsecc import pipeline
from sparsecc.inspection import stages
from sparsecc.options import Options
from sparsecc.report.model import GraphReport

NAME = "fold-norm-affine"
ONLY = {"passes": [NAME]}
X = torch.randn(3, 5, 16)
aten = torch.ops.aten


class Gated(nn.Module):
    """A norm read by a gated FFN: both gate and up must be folded (D10)."""

    def __init__(self, norm: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.gate, self.up = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias)
        self.down = nn.Linear(24, 16, bias=bias)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class LlamaNorm(nn.Module):
    def __init__(self, d: int = 16, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class GemmaNorm(LlamaNorm):
    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class ScaledNorm(nn.Module):
    """LayerNorm Scaling: the output of the norm times 1/sqrt(layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x) * 3**-0.5


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(16),
    "LayerNorm without bias": lambda: nn.LayerNorm(16, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(16, eps=1e-6),
    "Llama": LlamaNorm,
    "Gemma 1+w": GemmaNorm,
    "LayerNorm Scaling": ScaledNorm,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_into_both_readers(norm: str, bias: bool) -> None:
    """D7, D10. The hand-written norms compute in fp32 by design, so fp64 tests them through their own casts."""
    model = randomise(Gated(NORMS[norm](), bias)).eval()
    with torch.no_grad():
        result, report = run(model, X, verify="each", **ONLY)
        assert error(result, model(X)) < 1e-6
    assert report[NAME].applied == 1
    assert report.verified
    assert all(v.algebra < 1e-12 for v in report.verdicts)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(norm: str, dtype: torch.dtype) -> None:
    model = randomise(Gated(NORMS[norm]())).to(dtype).eval()
    with torch.no_grad():
        result, report = run(model, X.to(dtype), verify="final", **ONLY)
    assert result.dtype == dtype
    assert report[NAME].applied == 1
    assert report.verified


def test_nothing_of_the_affine_is_left() -> None:
    model = randomise(Gated(nn.LayerNorm(16))).eval()
    with torch.no_grad():
        _, graphs = stages(model, X, options=ONLY)
    lowered = graphs[0].stages[-1].program
    (norm,) = lowered.calls(aten.layer_norm.default)
    assert norm.args[2] is None
    assert norm.args[3] is None
    readers = [n for n in lowered.calls(aten.linear.default) if n.args[0] is norm]
    assert [len(n.args) for n in readers] == [3, 3], "a bias was created in each"


def test_through_reshapes_slices_and_addmm() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            y = self.norm(x)
            z = torch.addmm(self.a.bias, y.view(-1, 16), self.a.weight.t()).view(3, 5, 4)
            last = y[:, -1:] @ self.b.weight.t()
            return z + last + torch.mm(y[:, 0], self.b.weight.t())[:, None]

    check_exact(randomise(Shaped()), X, applied={NAME: 1}, passes={NAME: {"untie": True}})


def test_whole_pre_norm_network() -> None:
    check_exact(randomise(PreNorm()), ids(), applied={NAME: 5}, **ONLY)


def test_together_with_recentring() -> None:
    check_exact(randomise(PreNorm()), ids(), applied={NAME: 5, "layernorm-to-rmsnorm": 5})


def test_shared_weight_vector() -> None:
    """One γ for two norms: each consumer folds it for itself."""
    model = PreNorm()
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    check_exact(randomise(model), ids(), applied={NAME: 5}, **ONLY)


# ---- tied weights, dynamic shapes, updates, training ----------------------------------------------


def test_tied_head_is_refused_and_untied_on_request() -> None:
    model = randomise(PreNorm(tied=True))
    report = check_exact(model, ids(), applied={NAME: 4}, **ONLY)
    assert refusals(report, NAME) == ["tied"]
    check_exact(model, ids(), applied={NAME: 5}, passes={NAME: {"untie": True}})
    assert model.head.weight is model.embed.weight


def test_linear_used_twice() -> None:
    """D4's cousin: the folded reader is also applied to something else."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(self.norm(x)) + self.linear(x)

    report = check_exact(randomise(Twice()), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["tied"]
    check_exact(randomise(Twice()), X, applied={NAME: 1}, passes={NAME: {"untie": True}})


def test_dynamic_shapes() -> None:
    model = randomise(PreNorm()).double().eval()
    report = sparsecc.Report()
    options = {"lower": "eager", "report": report, **ONLY}
    fast = torch.compile(model, backend="sparsecc", dynamic=True, options=options)
    with torch.no_grad():
        for batch, tokens in ((2, 3), (4, 9)):
            assert error(fast(ids(batch, tokens)), model(ids(batch, tokens))) < 1e-12
    assert report[NAME].applied == 5


def test_comparing_shapes_adds_no_guard() -> None:
    """A normalized weight [5, 16] is added to x [b, 5, 16]: b may be 5, or not."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.norm = nn.Parameter(torch.randn(5, 16)), nn.LayerNorm(16)

        def forward(self, x):
            return self.norm(self.positions) + x

    program = capture(randomise(Positions()), X, dynamic=True)
    before = len(program.fake_mode.shape_env.guards)
    pipeline.run(program, Options.parse(ONLY), GraphReport(0))
    assert len(program.fake_mode.shape_env.guards) == before


def test_weights_updated_after_compile() -> None:
    model = randomise(Gated(GemmaNorm())).eval()
    fast = torch.compile(model, backend="sparsecc", options={"lower": "eager", "require": [NAME]})
    with torch.no_grad():
        fast(X)
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(X), model(X)) < 1e-6


def test_training_when_named() -> None:
    check_training(lambda: randomise(PreNorm()), {NAME: 5}, **ONLY)


def test_training_is_refused_by_default() -> None:
    model = randomise(PreNorm())
    _, report = run(model, ids(), lower="aot_eager")
    assert set(refusals(report, NAME)) == {"training"}
    assert report["layernorm-to-rmsnorm"].applied == 5


def test_weights_taken_without_gradients_keep_those_of_the_norm() -> None:
    """A frozen slice of a projection: the fold may not stand in its no_grad region."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.full = nn.LayerNorm(16), nn.Linear(16, 20, bias=False)

        def forward(self, x):
            y = self.norm(x)
            with torch.no_grad():
                weight = self.full.weight[:8]
            return nn.functional.linear(y, weight)

    model = randomise(Sliced()).double()
    expected = torch.autograd.grad(model(X.double()).square().sum(), list(model.norm.parameters()))
    result, report = run(model, X.double(), lower="aot_eager", passes={NAME: {"untie": True}})
    assert report[NAME].applied == 0
    got = torch.autograd.grad(result.square().sum(), list(model.norm.parameters()))
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-12


def test_a_factor_without_gradients_detaches() -> None:
    class Detaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, x):
            y = self.norm(x)
            with torch.no_grad():
                y = y * 0.5
            return self.linear(y)

    model = randomise(Detaching())
    result, report = run(model, X, lower="aot_eager", **ONLY)
    assert refusals(report, NAME) == ["region"]
    result.sum().backward()
    assert model.norm.weight.grad is None or not model.norm.weight.grad.any()


# ---- refuses ---------------------------------------------------------------------------------------


class Returned(Gated):
    def forward(self, x):
        y = self.norm(x)
        return self.gate(y), y


class OtherReader(Gated):
    def forward(self, x):
        y = self.norm(x)
        return self.gate(y).sum() + torch.tanh(y)


class WrongAxis(Gated):
    def forward(self, x):
        y = self.norm(x)
        return y.transpose(1, 2) @ torch.ones(5, 4).to(x) + self.gate(y).sum()


class FromInput(Gated):
    def forward(self, x):
        return self.gate(nn.functional.layer_norm(x, (16,), x[0, 0], self.norm.bias))


class ConvReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(16), nn.Conv1d(5, 4, 1)

    def forward(self, x):
        return self.conv(self.norm(x))


class Padded(Gated):
    """Zero rows added after the norm: β would reach them through the folded bias."""

    def forward(self, x):
        return self.gate(nn.functional.pad(self.norm(x), (0, 0, 1, 1)))


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (Returned, "output"),
        (OtherReader, "reader"),
        (WrongAxis, "reader"),
        (FromInput, "not-a-weight"),
        (Padded, "reader"),
    ],
)
def test_refuses(cls: type[nn.Module], code: str) -> None:
    model = randomise(cls(nn.LayerNorm(16)))
    report = check_exact(model, X, applied={NAME: 0}, **ONLY)
    assert code in refusals(report, NAME)


def test_a_convolution_is_not_a_reader() -> None:
    report = check_exact(randomise(ConvReader()), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["reader"]


def test_weight_written_by_the_program_is_refused() -> None:
    class Writes(Gated):
        def forward(self, x):
            with torch.no_grad():
                self.norm.weight.mul_(0.9)
            return self.gate(self.norm(x))

    model = randomise(Writes(nn.LayerNorm(16))).requires_grad_(False).eval()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        fast = torch.compile(model, backend="sparsecc", options={"lower": "eager", **ONLY})
        for _ in range(3):
            assert error(fast(X), reference(X)) < 1e-6


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_addmm_with_alpha_and_beta(alpha: float) -> None:
    """D26: defaults that are not 1 must not be dropped."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x):
            y = self.norm(x).view(-1, 16)
            return torch.addmm(self.linear.bias, y, self.linear.weight.t(), alpha=alpha, beta=alpha)

    check_exact(randomise(Scaled()), X, applied={NAME: int(alpha == 1.0)}, **ONLY)


class NormWithoutGradients(Gated):
    def forward(self, x):
        with torch.no_grad():
            y = self.norm(x)
        return self.gate(y)


class NormOutsideAutocast(Gated):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.norm(x)
        return self.gate(y)


def test_a_fold_does_not_leave_a_no_grad_region() -> None:
    """γ and β get no gradient in eager; folded into a weight outside the region they would."""
    model = randomise(NormWithoutGradients(nn.LayerNorm(16)))
    result, report = run(model, X, lower="aot_eager", **ONLY)
    assert refusals(report, NAME) == ["region"]
    result.sum().backward()
    assert model.norm.weight.grad is None
    assert model.gate.weight.grad is not None
    # Without gradients there is nothing to leave.
    check_exact(model, X, applied={NAME: 1}, **ONLY)


def test_a_fold_does_not_cross_autocast() -> None:
    model = randomise(NormOutsideAutocast(nn.LayerNorm(16))).eval()
    with torch.no_grad():
        result, report = run(model, X, **ONLY)
        assert torch.equal(result, model(X))
    assert refusals(report, NAME) == ["region"]


def test_option_is_checked() -> None:
    with pytest.raises(sparsecc.OptionsError, match="untie"):
        sparsecc.Options.parse({"passes": {NAME: {"untie": 3}}})
    with pytest.raises(sparsecc.OptionsError, match="Did you mean 'untie'"):
        sparsecc.Options.parse({"passes": {NAME: {"unti": True}}})


def test_gathered_weights_are_refused() -> None:
    """FSDP gathers them anew for each call, and no signal tells whether they have changed."""
    model = managed_by_fsdp(randomise(PreNorm()).double().eval())
    with torch.no_grad():
        _, report = run(model, ids())
        assert set(refusals(report, NAME)) == {"gathered"}
        assert report["layernorm-to-rmsnorm"].applied == 5
        result, report = run(model, ids(), **ONLY)
        assert error(result, model(ids())) < 1e-12
    assert report[NAME].applied == 5
    assert sum(graph.folded for graph in report.graphs) == 0


class Downsample(nn.Module):
    """ConvNeXt: a norm over channels that stand last, then a convolution over them."""

    def __init__(self, padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv2d(16, 8, 2, stride=2, padding=padding, groups=groups)

    def forward(self, x):
        return self.conv(self.norm(x).permute(0, 3, 1, 2))


@pytest.mark.parametrize("groups", [1, 4])
def test_into_a_convolution(groups: int) -> None:
    model = randomise(Downsample(groups=groups))
    check_exact(model, torch.randn(2, 6, 6, 16), applied={NAME: 1}, passes=[NAME])


def test_a_padded_convolution_would_miss_the_shift_at_its_border() -> None:
    model = randomise(Downsample(padding=1))
    with torch.no_grad():
        _, report = run(model, torch.randn(2, 6, 6, 16), passes=[NAME])
    assert refusals(report, NAME) == ["reader"]


def test_through_pooling_to_a_head() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x):
            y = self.norm(x).permute(0, 3, 1, 2)
            return self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))

    check_exact(randomise(Head()), torch.randn(2, 6, 6, 16), applied={NAME: 1}, passes=[NAME])
