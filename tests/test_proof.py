"""The checkers are checked: planted faults must be caught, named and placed; sound rewrites must pass."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from support import PreNorm, ids, randomise
from torch import nn

import sparsecc
from sparsecc.inspection import verify
from sparsecc.passes.analysis.linear import Linear
from sparsecc.passes.norm import layernorm_to_rmsnorm
from sparsecc.proof import compare


def failing(model: nn.Module, *args, **options) -> sparsecc.Report:
    """The report of a proof that must fail."""
    report = verify(model, *args, options=options)
    assert not report.verified
    return report


def model() -> nn.Module:
    return randomise(PreNorm()).eval()


def test_a_sound_rewrite_passes_every_stage() -> None:
    report = verify(model(), ids())
    assert report.verified
    stages = [v.stage for v in report.verdicts]
    assert stages[-1] == "final"
    assert {"fold-norm-affine", "layernorm-to-rmsnorm"} <= set(stages)


# ---- planted faults ---------------------------------------------------------------------------------


def test_wrong_fold_is_caught_and_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.absorb

    def wrong(linear, program, scale, shift, origin):  # γ is lost
        real(linear, program, None, shift, origin)

    monkeypatch.setattr(Linear, "absorb", wrong)
    report = failing(model(), ids())
    failed = next(v for v in report.verdicts if not v.passed)
    assert failed.stage == "fold-norm-affine"
    assert failed.algebra > 1e-3
    assert failed.diverges
    assert "support.py" in failed.diverges_where
    assert "sparsecc verify" in failed.reproduce


def test_dropped_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.absorb

    def wrong(linear, program, scale, shift, origin):  # W c is forgotten
        real(linear, program, scale, None, origin)

    monkeypatch.setattr(Linear, "absorb", wrong)
    failed = next(v for v in failing(model(), ids()).verdicts if not v.passed)
    assert failed.stage == "fold-norm-affine"


@pytest.mark.parametrize("factor", [0.5, 1.1])
def test_wrong_eps_is_caught(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Five per cent of 1e-5, against a variance of about one: 5e-7, below fp32's rounding of the outputs."""
    real = layernorm_to_rmsnorm.rms_norm_like

    def wrong(program, norm, origin):
        return real(program, dataclasses.replace(norm, eps=norm.eps * factor), origin)

    monkeypatch.setattr(layernorm_to_rmsnorm, "rms_norm_like", wrong)
    failed = next(v for v in failing(model(), ids()).verdicts if not v.passed)
    assert failed.stage == "layernorm-to-rmsnorm"


def test_missing_recentring_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layernorm_to_rmsnorm.LayerNormToRMSNorm, "_recentre", lambda *args: None)
    failed = next(v for v in failing(model(), ids()).verdicts if not v.passed)
    assert failed.stage == "layernorm-to-rmsnorm"


def test_fault_in_what_really_runs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The algebra is right, the folded weights are not: one element of one of them."""
    from sparsecc import hoist

    real = hoist.Hoisted.evaluate

    def wrong(self, sources):
        folded = real(self, sources)
        folded[0].view(-1)[3] += 0.1
        return folded

    monkeypatch.setattr(hoist.Hoisted, "evaluate", wrong)
    report = failing(model(), ids(), verify="final")
    (verdict,) = report.verdicts
    assert verdict.algebra < 1e-12
    assert not all(t.passed for t in verdict.tensors)


def test_backend_raises_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear.absorb
    monkeypatch.setattr(
        Linear,
        "absorb",
        lambda linear, program, scale, shift, origin: real(linear, program, None, shift, origin),
    )
    fast = torch.compile(model(), backend="sparsecc", options={"lower": "eager", "verify": "each"})
    with torch.no_grad(), pytest.raises(sparsecc.VerificationError) as caught:
        fast(ids())
    text = str(caught.value)
    assert "fold-norm-affine" in text
    assert "support.py" in text
    assert len(text.splitlines()) < 20


# ---- the rule itself --------------------------------------------------------------------------------


def test_rule_on_single_tensors() -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    eager = exact.float()
    assert compare("x", eager.clone(), eager, exact).passed
    noisy = (exact * (1 + 1e-7 * torch.randn(64, 64, dtype=torch.float64))).float()
    assert compare("x", noisy, eager, exact).passed
    assert not compare("x", eager * (1 + 2e-6), eager, exact).passed
    one = eager.clone()
    one[5, 7] += 1e-3
    assert not compare("x", one, eager, exact).passed
    assert not compare("x", eager[:, :32], eager, exact).passed
    assert not compare("x", eager.half(), eager, exact).passed
    poisoned = eager.clone()
    poisoned[0, 0] = float("nan")
    assert not compare("x", poisoned, eager, exact).passed


def test_fp64_is_its_own_reference() -> None:
    """Eager in fp64 has no error; another order of its sums moves more than two units where terms cancel."""
    eager = torch.randn(64, 8, dtype=torch.float64)
    assert compare("x", eager * (1 + 1e-13), eager, eager).passed
    assert not compare("x", eager * (1 + 1e-8), eager, eager).passed
    assert not compare("x", eager.float().double(), eager, eager).passed


def test_non_finite_outputs_must_agree() -> None:
    exact = torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64)
    eager = exact.float()
    assert compare("x", eager.clone(), eager, exact).passed
    assert not compare("x", torch.tensor([1.0, 2.0, float("nan")]), eager, exact).passed


def test_integers_must_be_equal() -> None:
    value = torch.arange(5)
    assert compare("x", value.clone(), value, value).passed
    assert not compare("x", value + 1, value, value).passed


# ---- what is proved -----------------------------------------------------------------------------------


class Cached(nn.Module):
    """Writes one of its inputs: the written input is a result that the proof looks at too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x, cache):
        y = self.linear(self.norm(x))
        cache[:, 1:3] = y
        return y.sum(-1)


def test_imaginary_parts_are_compared() -> None:
    exact = torch.randn(64, 8, dtype=torch.complex128)
    eager = exact.to(torch.complex64)
    assert compare("y", eager, eager, exact).passed
    assert not compare("y", torch.complex(eager.real, eager.imag * 1.001), eager, exact).passed
    assert not compare("y", eager.real, eager, exact).passed


def test_complex_programs_are_proved_in_complex128() -> None:
    class Rotary(nn.Module):
        def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
            return torch.view_as_complex(x) * turn.to(torch.complex64)

    x, turn = torch.randn(8, 4, 2), torch.randn(4, dtype=torch.complex64)
    report = verify(Rotary(), x, turn, options={"floor": False})
    final = report.verdicts[-1]
    assert final.passed
    assert final.tensors[0].eager_rmse > 0  # complex64 against complex128


def test_written_inputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomise(Cached()).eval()
    report = verify(network, torch.randn(2, 2, 16), torch.zeros(2, 4, 16))
    assert report.verified
    assert [t.name for t in report.verdicts[-1].tensors][-1].endswith("after it was written")


class Cast(nn.Module):
    """Writes what a cast returned: a copy of the input, also in fp64, where there is nothing to cast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        y = x.to(torch.bfloat16)
        y.add_(1.0)
        return self.last(self.norm(self.first(y.float() + x)))


def test_the_reference_copies_where_a_cast_does() -> None:
    report = verify(randomise(Cast()).eval(), torch.randn(4, 8))
    assert report.verified
    assert report["layernorm-to-rmsnorm"].applied == 1
    tensor = report.verdicts[-1].tensors[0]  # eager is near to the reference
    assert tensor.eager_rmse < 1e-2


def test_the_proof_does_not_disturb_the_call() -> None:
    """Inputs are written once, random state moves as without a proof."""
    network = randomise(Cached()).eval()
    x, cache, other = torch.randn(2, 2, 16), torch.zeros(2, 4, 16), torch.zeros(2, 4, 16)
    with torch.no_grad():
        expected = network(x, other)
        fast = torch.compile(
            network, backend="sparsecc", options={"lower": "eager", "verify": "each"}
        )
        torch.manual_seed(3)
        result = fast(x, cache)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(1))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(cache, other)


def test_random_programs_are_skipped_and_say_so() -> None:
    network = copy.deepcopy(model()).train()
    network.norm = nn.Sequential(nn.Dropout(0.5), network.norm)
    report = verify(network, ids(), options={"lower": "aot_eager"})
    assert not report.verified
    assert all("random" in v.skipped for v in report.verdicts)


def test_training_graphs_are_proved_forward() -> None:
    report = verify(copy.deepcopy(model()).train(), ids(), options={"lower": "aot_eager"})
    assert report.graphs[0].trains
    assert report.verified
