"""Dynamo's backend patterns that concern whole modules, through Inductor: tensor subclasses, modes, options,
threads, hooks, computed weights.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import no_worse, ours, train_alike
from hard import FOLD, TO_RMS, Doubled, Tiny, tiny, x32, x64
from support import randomise
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsecc

pytestmark = pytest.mark.slow

ONE = {TO_RMS: 1}
FOLDED = {TO_RMS: 1, FOLD: 1}


# ---- subclasses ----------------------------------------------------------------------------------


def test_subclass_parameters() -> None:
    """A graph over tensor subclasses goes through Inductor untouched; the one beside it is rewritten."""
    model = nn.ModuleList([tiny(), tiny()]).requires_grad_(False).eval()
    model[0].leave.weight = nn.Parameter(Doubled(model[0].leave.weight), requires_grad=False)
    reports = [sparsecc.Report(), sparsecc.Report()]
    for one, report in zip(model, reports, strict=True):
        fast = torch.compile(one, backend="sparsecc", options={"report": report, "floor": False})
        with torch.no_grad():
            torch.testing.assert_close(fast(x32(5, 8)), one(x32(5, 8)))
    assert "tensor subclass, Doubled" in reports[0].fallbacks[0]
    assert reports[1][TO_RMS].applied == 1


TORCHAO = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", TORCHAO)
def test_quantized_by_torchao(config: str, caplog: pytest.LogCaptureFixture) -> None:
    """Weights of torchao pass through: Inductor's numbers bit for bit, a reason in the report, no pass."""
    quantization = pytest.importorskip(
        "torchao.quantization", reason="make assets installs torchao"
    )
    model = nn.Sequential(tiny(), nn.Linear(4, 64), nn.LayerNorm(64), nn.Linear(64, 64)).eval()
    quantization.quantize_(randomise(model), getattr(quantization, config)())
    report = sparsecc.Report()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "sparsecc"):
        for options in ({"report": report, "floor": False}, {}):  # {}: as a user has it
            torch._dynamo.reset()
            fast = torch.compile(model, backend="sparsecc", options=options)(x32(5, 8))
            torch._dynamo.reset()
            assert torch.equal(fast, torch.compile(model, backend="inductor")(x32(5, 8)))
    assert ["tensor subclass" in reason for reason in report.fallbacks] == [True]
    assert not any(p.applied for p in report)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("sparsecc")]
    assert all("tensor subclass" in message for message in ours)


# ---- settings of torch.compile -------------------------------------------------------------------

SETTINGS = [
    {"mode": "reduce-overhead", "fullgraph": True},
    {"mode": "max-autotune-no-cudagraphs", "dynamic": True},
    {"mode": "default", "fullgraph": True, "dynamic": False},
    {"mode": "reduce-overhead", "dynamic": True, "fullgraph": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_settings(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Repeated calls, as CUDA graphs would replay them: results that were kept stay what they were."""
    model = tiny().eval()
    with caplog.at_level(logging.INFO, "sparsecc"):
        fast = torch.compile(model, backend="sparsecc", **settings)
        plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
        x, kept = x32(5, 8), []
        with torch.no_grad():
            for i in range(6):
                x.mul_(-1.1)
                kept.append((fast(x), plain(x), wide(x.double())))
                if i == 3:
                    model.norm.weight.mul_(1.5)
                    plain.norm.weight.mul_(1.5)
                    wide.norm.weight.mul_(1.5)
    for got, eager, exact in kept:
        no_worse({"y": got}, {"y": eager}, {"y": exact})
    assert any(TO_RMS in r.getMessage() for r in caplog.records)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_models_with_different_options() -> None:
    """Interleaved in one process, one option set each; and one model compiled under two of them."""
    model, other = tiny().eval(), randomise(Tiny(), 1).eval()
    reports = [sparsecc.Report() for _ in range(3)]
    chosen: list[dict[str, Any]] = [
        {"inductor": {"max_autotune_gemm": False}},
        {"passes": [FOLD]},
        {"preset": "none"},
    ]
    fast = [
        torch.compile(m, **ours(r, **o))
        for m, r, o in zip((model, other, model), reports, chosen, strict=True)
    ]
    plain = [copy.deepcopy(m) for m in (model, other, model)]
    wide = [copy.deepcopy(m).double() for m in (model, other, model)]
    with torch.no_grad():
        for _ in range(2):
            for a, b, c in zip(fast, plain, wide, strict=True):
                no_worse({"y": a(x32(5, 8))}, {"y": b(x32(5, 8))}, {"y": c(x64(5, 8))})
    assert reports[0][TO_RMS].applied == reports[0][FOLD].applied == reports[1][FOLD].applied == 1
    assert TO_RMS not in reports[1]
    assert FOLD not in reports[2]


def test_threads() -> None:
    """Several threads compile and call two models at once, and change weights of one in between."""
    models = [tiny().eval(), randomise(Tiny(), 1).eval()]
    fast = [torch.compile(m, **ours(require={TO_RMS: 1})) for m in models]
    wide = [copy.deepcopy(m).double() for m in models]
    problems: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    for i in (index % 2, 1 - index % 2):
                        got, eager = fast[i](x32(3 + index, 8)), models[i](x32(3 + index, 8))
                        exact = wide[i](x64(3 + index, 8))
                        no_worse({"y": got}, {"y": eager}, {"y": exact})
        except BaseException as error:
            problems.append(error)

    for _ in range(2):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        with torch.no_grad():
            for one in (models[0], wide[0]):
                one.norm.bias.add_(0.5)


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks() -> None:
    """Forward, backward and tensor hooks that change values; they run as often as in eager."""

    def hooked() -> tuple[nn.Module, list[str]]:
        model, seen = tiny(), []

        def note(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
            def hook(module: Any, *values: Any) -> Any:
                seen.append(name)
                return change(values)

            return hook

        model.norm.register_forward_pre_hook(note("pre", lambda v: (v[0][0] * 2,)))
        model.norm.register_forward_hook(note("forward", lambda v: v[1] + 1))
        model.leave.register_full_backward_hook(note("backward", lambda v: (v[0][0] * 3,)))
        model.enter.weight.register_hook(lambda g: g * 0.5)
        model.register_forward_hook(note("outer", lambda v: v[1] * 2))
        return model, seen

    (model, seen), (plain, plain_seen), (wide, _) = (hooked() for _ in range(3))
    report = sparsecc.Report()
    fast = torch.compile(model, **ours(report))
    train_alike(fast, model, plain, wide.double(), x32(5, 8, grad=True))
    assert report.graphs
    assert sorted(seen) == sorted(plain_seen)
    assert {"pre", "forward", "outer", "backward"} == set(seen)


# ---- weights that are computed -------------------------------------------------------------------


def parametrized() -> nn.Module:
    model = tiny()
    torch.manual_seed(0)  # of the power iteration's first vectors
    parametrizations.weight_norm(model.enter)
    parametrizations.spectral_norm(model.leave)
    return model


def pruned() -> nn.Module:
    model = tiny()
    prune.l1_unstructured(model.enter, "weight", amount=0.4)
    prune.ln_structured(model.leave, "weight", amount=2, n=2, dim=1)
    return model


@pytest.mark.parametrize("build", [parametrized, pruned])
def test_computed_weights(build: Callable[[], nn.Module]) -> None:
    """Training, where the power iteration writes its buffers, then inference, then other weights."""
    model, plain, wide = build(), build(), build().double()
    report = sparsecc.Report()
    fast = torch.compile(model, **ours(report))
    train_alike(fast, model, plain, wide, x32(5, 8, grad=True))
    for one in (model, plain, wide):
        one.eval()
    for round_number in range(3):
        with torch.no_grad():
            no_worse({"y": fast(x32(5, 8))}, {"y": plain(x32(5, 8))}, {"y": wide(x64(5, 8))})
            for one in (model, plain, wide):
                for parameter in one.parameters():
                    parameter.mul_(1.0 + 0.125 * (round_number + 1))
    assert all(g.passes[TO_RMS].applied == 1 for g in report.graphs)
