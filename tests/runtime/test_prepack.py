"""Packed weights: every way of changing one shows at the next call, and nothing else of the model changes."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import error, fp64, randomise
from torch import nn

import sparsecc
from sparsecc import _torch

pytestmark = pytest.mark.skipif(
    not _torch.packs_weights({}), reason="this build of PyTorch has no oneDNN"
)


class Net(nn.Module):
    """Convolutions of every kind that is packed, with what is fused into them."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.depth = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.point(nn.functional.hardswish(self.depth(x))) + x)
        return self.head(torch.nn.functional.silu(self.up(x)).mean((2, 3)))


def images(batch: int = 2, size: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(norm: bool = True) -> nn.Module:
    return randomise(Net(norm)).eval()


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> tuple[Any, Any]:
    report = sparsecc.Report()
    options = {"strict": True, "report": report, **options}
    torch._dynamo.reset()
    return torch.compile(model, backend="sparsecc", options=options, dynamic=dynamic), report


def packed(report: Any) -> int:
    return sum(g.packed for g in report.graphs)


def check(fast: Any, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        assert error(fast(x), fp64(model)(x.double())) < 2e-6


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_packs_and_agrees(norm: bool, layout: torch.memory_format) -> None:
    model = build(norm).to(memory_format=layout)
    fast, report = compiled(model)
    x = images().to(memory_format=layout)
    check(fast, model, x)
    check(fast, model, x)
    assert packed(report) == 4
    with torch.no_grad():
        assert fast(x).stride() == model(x).stride()


# ---- freshness -----------------------------------------------------------------------------------


def load(model: nn.Module, seed: int = 1, assign: bool = False) -> None:
    model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict(), assign=assign)


def in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.3)


def new_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.7 + 0.01


def numpy_view(model: nn.Module) -> None:
    model.depth.weight.detach().numpy()[...] *= 0.5


def one_element(model: nn.Module) -> None:
    with torch.no_grad():
        model.up.weight[1, 1, 2, 2] += 3


def replaced(model: nn.Module) -> None:
    model.point.weight = nn.Parameter(model.point.weight.detach() * 2)


def swapped_module(model: nn.Module) -> None:
    model.depth = randomise(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), 5)


def statistics(model: nn.Module) -> None:
    if isinstance(model.norm, nn.BatchNorm2d):
        model.norm.running_var.data.mul_(3)
        model.norm.running_mean.add_(0.5)


def train_elsewhere(model: nn.Module) -> None:
    with torch.no_grad():
        model.train()(images(8, seed=3))
    model.eval()


def step(model: nn.Module, kind: type, **options: Any) -> None:
    with torch.enable_grad():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        kind(model.parameters(), lr=0.05, **options).step()
        model.zero_grad()


UPDATES: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": load,
    "load_state_dict assign": lambda m: load(m, 2, assign=True),
    "p.data.mul_": in_place,
    "p.data = new": new_data,
    "numpy": numpy_view,
    "one element": one_element,
    "replaced": replaced,
    "swapped module": swapped_module,
    "statistics": statistics,
    "train mode": train_elsewhere,
    "sgd": lambda m: step(m, torch.optim.SGD),
    "fused adamw": lambda m: step(m, torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_update_shows(mode: Any, norm: bool) -> None:
    """One after the other: each finds weights that were refreshed before."""
    model = build(norm)
    fast, report = compiled(model)
    x = images()
    with mode():
        fast(x)
    assert packed(report) == 4
    graphs = len(report.graphs)
    for name, update in UPDATES.items():
        before = model(x).detach()
        update(model)
        with mode():
            result = fast(x)
        assert error(result, fp64(model)(x.double()).detach()) < 2e-6, name
        if norm or name not in ("statistics", "train mode"):
            assert error(before, model(x).detach()) > 1e-4, f"{name} changes nothing"
    assert all(g.packed == 4 for g in report.graphs[graphs:]), "where Dynamo compiled again"


def test_packs_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecc.prepack import Prepack

    calls: list[int] = []
    evaluate = Prepack.evaluate
    monkeypatch.setattr(
        Prepack, "evaluate", lambda self, w: (calls.append(len(w)), evaluate(self, w))[1]
    )
    model = build()
    fast, _ = compiled(model)
    for _ in range(3):
        check(fast, model, images())
    assert len(calls) == 1
    with torch.no_grad():
        model.head.weight.add_(1)  # a linear layer's weight is not packed: nothing to do
    check(fast, model, images())
    assert len(calls) == 1
    with torch.no_grad():
        model.point.weight.add_(1)
    for _ in range(3):
        check(fast, model, images())
    assert len(calls) == 2


def test_one_graph_serves_several_sets_of_weights() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x

    model = randomise(Stack()).eval()
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="sparsecc", options={"strict": True})
    with torch.no_grad():
        for i in range(3):
            for m in (model, reference):
                m.blocks[i].weight.data.mul_(1.5)
            assert error(model(images()), reference(images())) < 1e-5


def test_statistics_that_no_pass_folds() -> None:
    """BatchNorm before a convolution: what is computed of its variance is kept, and follows it."""
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))).eval()
    fast, report = compiled(model)
    for _ in range(3):
        check(fast, model, images())
        model[0].running_var.data.mul_(3)
        check(fast, model, images())
        with torch.no_grad():
            model.train()(images(8, seed=4))
        model.eval()
    assert packed(report) == 2


def test_tied_weights_at_two_sizes() -> None:
    """One weight, packed once for each size of its input; and a reader that takes it as it is."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.conv(x)
            y = self.conv(nn.functional.avg_pool2d(x, 2))
            return y, self.conv.weight.square().sum()

    model = randomise(Tied()).eval()
    fast, report = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            for a, b in zip(fast(images()), model(images()), strict=True):
                assert error(a, b) < 1e-5
            model.conv.weight.data.mul_(1.5)
    assert packed(report) == 2


def test_results_that_the_caller_may_write() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scaled = self.conv.weight * 2
            y = nn.functional.conv2d(x, scaled)
            return y, scaled, scaled.transpose(0, 1), self.conv.weight

    model = randomise(Returns()).eval()
    fast, _ = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            got = fast(images())
            for a, b in zip(got, model(images()), strict=True):
                assert error(a, b) < 1e-5
            for given in got[1:3]:
                given.fill_(9)
        assert got[3] is model.conv.weight


def test_a_weight_that_the_model_writes_is_not_packed() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.other(self.conv(x))
            self.conv.weight.mul_(1.1)
            return y

    model = randomise(Writes()).eval()
    reference = copy.deepcopy(model)
    fast, report = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            assert error(fast(images()), reference(images())) < 1e-5
    assert packed(report) == 1


def test_a_buffer_as_weight_is_not_packed() -> None:
    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(3, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.kernel)

    model = Buffer()
    fast, report = compiled(model)
    check(fast, model, images())
    model.kernel.data.view(-1)[5] += 1  # nothing shows such a write, and nothing has to
    check(fast, model, images())
    assert packed(report) == 0


def test_threads_see_their_own_update() -> None:
    model = build()
    fast, _ = compiled(model)
    x = images()
    with torch.no_grad():
        fast(x)
        model.point.weight.data.mul_(2)
        expected = model(x)
    errors: list[float] = []

    def work() -> None:
        with torch.no_grad():
            errors.extend(error(fast(x), expected) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    assert max(errors) < 1e-5


def test_the_model_is_not_touched_and_let_go() -> None:
    model = build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    fast, _ = compiled(model)
    check(fast, model, images())
    assert versions == [p._version for p in model.parameters()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    old = weakref.ref(model.depth.weight)
    load(model, assign=True)
    check(fast, model, images())
    assert old() is None


# ---- sizes, types, regions -----------------------------------------------------------------------


def test_dynamic_batch() -> None:
    """Inductor packs nothing for unknown sizes, but fuses and lays out; and the weights stay fresh."""
    model = build()
    model.up = nn.Identity()
    model.head = randomise(nn.Linear(8, 5))
    fast, report = compiled(model, dynamic=True)
    for batch in (2, 3, 5):
        check(fast, model, images(batch))
        in_place(model)
        check(fast, model, images(batch))
    assert len(report.graphs) == 1


def test_dynamic_batch_with_a_transposed_convolution() -> None:
    model = build()
    fast, _ = compiled(model, dynamic=True)
    for batch in (2, 3):
        check(fast, model, images(batch))


def test_three_dimensions() -> None:
    model = randomise(nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU())).eval()
    fast, report = compiled(model)
    x = torch.randn(1, 2, 5, 6, 7)
    for _ in range(2):
        check(fast, model, x)
        in_place(model)
    assert packed(report) == 1


def test_fp64_is_not_harmed() -> None:
    model = build().double()
    fast, _ = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            assert error(fast(images().double()), model(images().double())) < 1e-12
            in_place(model)


def test_autocast() -> None:
    model = build()
    fast, _ = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert error(fast(images()), fp64(model)(images().double())) < 5e-2
            in_place(model)


# ---- where nothing is packed ---------------------------------------------------------------------


def test_training_packs_nothing() -> None:
    model = build().train()
    fast, report = compiled(model)
    fast(images()).sum().backward()
    assert packed(report) == 0
    assert model.point.weight.grad is not None


def test_gradients_enabled_packs_nothing() -> None:
    model = build().requires_grad_(False)
    fast, report = compiled(model)
    assert error(fast(images()), model(images())) < 1e-5
    assert packed(report) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"prepack": False},
        {"inductor": {"freezing": True}},
        {"inductor": {"cpp_wrapper": True}},
        {"inductor": {"layout_optimization": False}},
    ],
    ids=str,
)
def test_options_that_pack_nothing(options: dict[str, Any]) -> None:
    model = build()
    fast, report = compiled(model, **options)
    check(fast, model, images())
    assert packed(report) == 0


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_DISABLE", "1")
    model = build()
    fast, report = compiled(model)
    check(fast, model, images())
    assert packed(report) == 0


def test_a_network_without_convolutions_is_left_alone() -> None:
    model = randomise(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))).eval()
    fast, report = compiled(model)
    check(fast, model, torch.randn(2, 8))
    assert packed(report) == 0


@pytest.mark.parametrize("name", ["packing_patterns", "compile_inner", "position"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_failure_falls_back(name: str, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(_torch, name, fail)
    model = build(norm)
    fast, report = compiled(model, strict=False)
    for _ in range(2):
        check(fast, model, images())
        in_place(model)
    assert packed(report) == 0
    fast, _ = compiled(model)
    with torch.no_grad(), pytest.raises(Exception, match="out of order"):
        fast(images())


def test_verify_takes_it() -> None:
    model = build()
    fast, report = compiled(model, verify="final")
    check(fast, model, images())
    assert packed(report) == 4
    assert all(v.passed for v in report.graphs[0].verdicts)


# ---- the cache -----------------------------------------------------------------------------------

CHILD = """
import json, sys, torch
sys.path[:0] = sys.argv[1:3]
from torch._dynamo.utils import counters
from test_prepack import build, check, compiled, images, in_place, packed
model = build()
if sys.argv[3] == "other":
    in_place(model)
fast, report = compiled(model)
check(fast, model, images())
in_place(model)
check(fast, model, images())
print(json.dumps({"packed": packed(report), **counters["inductor"]}))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: pathlib.Path) -> None:
    here = pathlib.Path(__file__).parent

    def child(weights: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(here), str(here.parent), weights],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        assert found["packed"] == 4
        return found

    assert child("same")["fxgraph_cache_miss"] == 1
    for weights in ("same", "other"):
        again = child(weights)
        assert again["fxgraph_cache_hit"] == 1
        assert again.get("fxgraph_cache_miss", 0) == again.get("fxgraph_cache_bypass", 0) == 0
