"""The fixed sample at breadth, the list of known failures, and the harness itself against planted faults."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from conformance import judge as judging
from conformance import runner, sample, table
from conformance.case import Case, NotBuildable
from conformance.judge import Outcome, judge, merge
from conformance.runner import Limits, Row
from support import PreNorm, ids, randomise
from torch import nn

from sparsecc import driver
from sparsecc.errors import CaptureError

BREADTH = ("opinfo", "moduleinfo", "transformers", pytest.param("timm", marks=pytest.mark.models))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suite", BREADTH)
def test_sample(suite: str) -> None:
    chosen = sample.names(suite, "aot_eager")
    listed = sample.expected_failures(suite)
    rows = runner.run(suite, sorted({*chosen, *listed}), "aot_eager", Limits(seconds=500, jobs=2))
    failing = {row["name"]: row.get("words", "") for row in rows if table.fails(row)}
    assert {n: w for n, w in failing.items() if n not in listed} == {}
    sure = [n for n, reason in listed.items() if not reason.startswith("by CPU")]
    assert [n for n in sure if n not in failing] == [], "passes now: take it off the list"
    compared = [r for r in rows if r["status"] not in ("eager fails", "not built")]
    assert len(compared) >= 0.9 * len(chosen)


def test_sample_is_of_the_promised_size() -> None:
    for suite, least in (("opinfo", 60), ("moduleinfo", 20), ("transformers", 8), ("timm", 6)):
        assert len(set(sample.names(suite, "aot_eager"))) >= least
    assert len(set(sample.names("opinfo", "inductor"))) >= 100
    models = {(s, n) for s in ("transformers", "timm") for n in sample.names(s, "inductor")}
    assert len(models) >= 40


def test_results_hold_no_unlisted_failure() -> None:
    failing = [(r["suite"], r["name"]) for r in runner.all_results() if table.fails(r)]
    assert [f for f in failing if f[1] not in sample.expected_failures(f[0])] == []


def test_page_is_the_results() -> None:
    """docs/conformance.md is written from the committed results, and not by hand."""
    written = table.PAGE.read_text(encoding="utf-8")
    assert written == table.page(list(runner.all_results()))


# ---- the judge against planted faults ------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.out = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.norm(self.linear(x))))


def small(**more: Any) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=generator)
    return Case(randomise(Small()).eval(), (x,), **more)


def plant(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """Make what sparsecc compiles, and not the peer, go through ``fault(compiled, args)``."""
    real = driver._compile

    def compile_with_fault(*given: Any) -> Any:
        compiled = real(*given)
        return lambda *args: fault(compiled, args)

    monkeypatch.setattr(driver, "_compile", compile_with_fault)


def test_a_right_case_passes_and_counts() -> None:
    outcome = judge(Case(randomise(PreNorm()).eval(), (ids(),)))
    assert (outcome.status, outcome.peer, outcome.words) == ("pass", "pass", "")
    assert (outcome.norms, outcome.rewritten, outcome.graphs) == (5, 5, 1)
    assert outcome.rewrites["layernorm-to-rmsnorm"] == 5
    assert outcome.train_rewrites["layernorm-to-rmsnorm"] == 5


def _scaled(compiled: Any, args: Any) -> Any:
    return [r * (1 + 1e-4) for r in compiled(*args)]


def _wider(compiled: Any, args: Any) -> Any:
    return [r.double() for r in compiled(*args)]


def _longer(compiled: Any, args: Any) -> Any:
    return [torch.cat([r, r]) for r in compiled(*args)]


def _writes_an_input(compiled: Any, args: Any) -> Any:
    result = compiled(*args)
    with torch.no_grad():
        next(a for a in args if a.shape == (16, 8)).add_(1)
    return result


def _writes_a_statistic(compiled: Any, args: Any) -> Any:
    result = compiled(*args)
    with torch.no_grad():
        next(a for a in args if a.shape == (8,) and not a.requires_grad).mul_(1.001)
    return result


def _not_a_number(compiled: Any, args: Any) -> Any:
    return [torch.where(r == r.max(), torch.nan, r) for r in compiled(*args)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_scaled, "output: rmse"),
        (_wider, "torch.float64"),
        (_longer, "(32, 8)"),
        (_writes_an_input, "input[0][0], after"),
        (_writes_a_statistic, "buffer norm.running_mean"),
        (_not_a_number, "NaN"),
    ],
)
def test_a_wrong_result_is_seen(monkeypatch: Any, fault: Any, words: str) -> None:
    plant(monkeypatch, fault)
    outcome = judge(small(train=False))
    assert (outcome.status, outcome.peer, outcome.inductor) == ("wrong", "pass", "pass")
    assert words in outcome.words


class _Tilted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.001


def test_a_wrong_gradient_is_seen(monkeypatch: Any) -> None:
    plant(monkeypatch, lambda compiled, args: [_Tilted.apply(r) for r in compiled(*args)])
    outcome = judge(small())
    assert (outcome.status, outcome.peer) == ("wrong", "pass")
    assert outcome.words.startswith("training: gradient of ")


class Attention(nn.Module):
    """The gradient of the key's bias is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ x


@pytest.mark.parametrize(("added", "status"), [(1e-9, "pass"), (1e-4, "wrong")])
def test_a_vanishing_gradient_must_vanish(monkeypatch: Any, added: float, status: str) -> None:
    def ours(case: Case, lower: str, **more: Any) -> Any:
        def wrap(model: nn.Module) -> nn.Module:
            model.k.bias.register_hook(lambda grad: grad + added)
            return model

        return wrap

    monkeypatch.setattr(judging, "_ours", ours)
    assert judge(Case(randomise(Attention()), (torch.randn(2, 5, 8),))).status == status


def test_a_missing_gradient_is_seen(monkeypatch: Any) -> None:
    plant(monkeypatch, lambda compiled, args: [r.detach() for r in compiled(*args)])
    assert judge(small()).status == "wrong"


def test_an_exception_is_an_error_beside_what_the_peer_gave(monkeypatch: Any) -> None:
    def fault(compiled: Any, args: Any) -> Any:
        raise ValueError("planted\nmore")

    plant(monkeypatch, fault)
    outcome = judge(small())
    assert (outcome.status, outcome.words) == ("error", "ValueError: planted")
    assert (outcome.peer, outcome.inductor) == ("pass", "pass")
    assert table.fails(outcome.to_json())


def test_a_fall_through_is_told_from_a_pass(monkeypatch: Any) -> None:
    def refuse(*_: Any) -> Any:
        raise CaptureError("planted")

    monkeypatch.setattr(driver, "from_dynamo", refuse)
    outcome = judge(small())
    assert (outcome.status, outcome.words) == ("fell through", "capture: planted")


def test_what_eager_refuses_is_no_fault() -> None:
    outcome = judge(Case(torch.add, (torch.ones(2), torch.ones(3))))
    assert outcome.status == "eager fails"
    assert outcome.words.startswith("RuntimeError: The size of tensor")


def test_random_numbers_come_from_the_same_seed() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)

    outcome = judge(Case(noisy, (torch.zeros(8),), train=False))
    assert outcome.status == "pass"
    assert outcome.words == "random numbers, from the same seed"


def test_as_wrong_as_the_peer_is_a_pass_that_says_so(monkeypatch: Any) -> None:
    """A defect of PyTorch's own is not held against a backend that stands on it."""
    from torch._dynamo.backends import registry

    def off(gm: Any, inputs: Any) -> Any:
        compiled = real(gm, inputs)
        return lambda *args: [r * 1.01 for r in compiled(*args)]

    real = registry.lookup_backend("aot_eager")
    monkeypatch.setitem(registry._COMPILER_FNS, "aot_eager", off)
    outcome = judge(small(train=False))
    assert outcome.status == "pass"
    assert outcome.words.startswith("as the peer: output")
    assert outcome.peer.startswith("wrong: output")


def test_merged_outcomes_keep_the_worst_and_sum_the_counts() -> None:
    one = Outcome("pass", peer="pass", norms=2, rewrites={"a": 1})
    two = Outcome("wrong", "far off", "pass", norms=1, rewrites={"a": 2, "b": 1})
    total = merge([one, two, Outcome("eager fails", "cannot")])
    assert (total.status, total.words, total.norms, total.cases) == ("wrong", "far off", 3, 3)
    assert total.rewrites == {"a": 3, "b": 1}
    assert merge([one, Outcome("eager fails", "cannot")]).status == "pass"


# ---- the runner against children that misbehave --------------------------------------------------


class Unruly:
    """A suite whose names do what they say."""

    @staticmethod
    def names() -> list[str]:
        return ["dies", "exits", "fine", "grows", "hangs", "raises", "unbuildable"]

    @staticmethod
    def build(name: str) -> list[Case]:
        if name == "unbuildable":
            raise NotBuildable("no such thing")
        if name == "raises":
            raise ValueError("in build")
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "exits":
            os._exit(7)
        if name == "hangs":
            time.sleep(600)
        if name == "grows":
            held = bytearray(3 << 30)
            for start in range(0, len(held), 4096):
                held[start] = 1
            time.sleep(600)
        return [Case(torch.add, (torch.ones(2), torch.ones(2)), train=False)]


@pytest.mark.slow
def test_runner_outlives_its_children() -> None:
    seen: list[Row] = []
    # A child begins with the memory of this process, which has run other tests.
    most = round(runner._rss(os.getpid())) + 2500
    limits = Limits(seconds=20, mib=most, jobs=2)
    runner.run("unruly", Unruly.names(), "aot_eager", limits, seen.append, Unruly)
    found = {row["name"]: (row["status"], row.get("words", "")) for row in seen}
    assert found == {
        "dies": ("error", "killed by SIGKILL"),
        "exits": ("error", "the process ended with 7 and no result"),
        "fine": ("pass", ""),
        "grows": ("error", f"memory: more than {most} MiB"),
        "hangs": ("error", "time-out: more than 20 s"),
        "raises": ("error", "harness: ValueError: in build"),
        "unbuildable": ("not built", "no such thing"),
    }


def test_results_resume_and_compact(tmp_path: Any) -> None:
    path = tmp_path / "new" / "r.jsonl"
    head = {"suite": "s", "lower": "aot_eager"}
    for name, status in (("b", "error"), ("a", "pass"), ("b", "pass")):
        runner.append(path, {**head, "name": name, "status": status})
    assert {k[1]: r["status"] for k, r in runner.read(path).items()} == {"a": "pass", "b": "pass"}
    runner.compact(path)
    assert [line.split('"name": ')[1][:3] for line in path.read_text().splitlines()] == [
        '"a"',
        '"b"',
    ]


def test_page_counts_and_escapes() -> None:
    rows = [
        {"suite": "s", "lower": "aot_eager", "name": "a|b", "status": "pass", "peer": "pass"},
        {"suite": "s", "lower": "aot_eager", "name": "c", "status": "error", "peer": "error: x"},
        {
            "suite": "s",
            "lower": "aot_eager",
            "name": "d",
            "status": "fell through",
            "peer": "pass",
            "words": "capture: input l_x_ is a tensor subclass, Two",
            "norms": 3,
        },
    ]
    page = table.page(rows)
    assert "| s | aot_eager | 3 | 1 | 1 | 1 | 0 | 1 | 2 | 0 | 1 | 0 | 0 | 3 | 0 | 1 | 0 |" in page
    assert "| 1 | capture: input … is a tensor subclass, Two |" in page
    assert "a\\|b" in page
