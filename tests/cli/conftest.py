"""A small program, stages and a report made by hand, so that these tests need no compile."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsecc.dump.stages import GraphStages, Stage
from sparsecc.program import Program, Role, Slot
from sparsecc.report.model import (
    GraphReport,
    MatchRecord,
    PassReport,
    Report,
    TensorError,
    Verdict,
)

aten = torch.ops.aten


def made_program() -> Program:
    """``linear(layer_norm(x))``, with names and a source line that need escaping everywhere."""
    mode, graph = FakeTensorMode(), fx.Graph()
    shapes = {"x": (2, 8), "w": (4, 8), "unused": (3,)}
    nodes = {name: graph.placeholder(name) for name in shapes}
    with mode:
        for name, node in nodes.items():
            node.meta["val"] = torch.empty(shapes[name])
    slots = {
        "x": Slot("x", Role.INPUT, "L['x']"),
        "w": Slot("w", Role.PARAMETER, 'layers.0.<"fc" & co>.weight'),
        "unused": Slot("unused", Role.BUFFER, "scale"),
    }
    norm = graph.call_function(aten.layer_norm.default, (nodes["x"], [8], None, None, 1e-5))
    linear = graph.call_function(aten.linear.default, (norm, nodes["w"]))
    halves = graph.call_function(aten.split.Tensor, (linear, 2, -1))
    first = graph.call_function(operator.getitem, (halves, 0))
    with mode:
        norm.meta["val"] = torch.empty(2, 8)
        linear.meta["val"] = torch.empty(2, 4)
        halves.meta["val"] = (torch.empty(2, 2), torch.empty(2, 2))
        first.meta["val"] = torch.empty(2, 2)
    norm.meta["stack_trace"] = 'File "/home/me/a<b>&c.py", line 7, in forward\n  x\x00y\n'
    norm.meta["nn_module_stack"] = {"norm": ("L['self'].layers.0.norm", torch.nn.LayerNorm)}
    graph.output((first,))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Program(module, slots, mode, opaque={"split_tensor": "a <reason>"})


def made_stages() -> list[GraphStages]:
    """Captured, an unchanged canonical stage, and one where a pass wrote two nodes."""
    captured = made_program()
    rewritten = captured.copy()
    (norm,) = rewritten.calls(aten.layer_norm.default)
    x, w = rewritten.placeholders()[:2]
    rms = rewritten.call(
        aten.rms_norm.default, (x, [8], None, 1e-5), like=norm, origin="to-rms", after=norm
    )
    rewritten.replace(norm, rms)
    (linear,) = rewritten.calls(aten.linear.default)
    linear.update_arg(1, rewritten.weight("to-rms", linear).mul(w, 2.0))
    rewritten.sweep()
    stages = [
        Stage("captured", captured),
        Stage("canonical", captured.copy()),
        Stage("to-rms", rewritten),
    ]
    return [GraphStages(0, stages)]


def made_report() -> Report:
    """Everything that a report can hold, with text that HTML must escape."""
    where = "/site-packages/some/model/modeling.py:{}, in forward"
    norm = PassReport("to-rms", "norm", "LN(x) = RMS(Πx) <if> mean & all", "exact", seconds=0.012)
    norm.flops_saved, norm.launches_saved = 1_234_567, 3
    norm.matches = [
        *(MatchRecord("applied", f"ln_{i}", f"blocks.{i}", where.format(i)) for i in range(4)),
        *(
            MatchRecord(
                "refused", f"q_{i}", f"blocks.{i}.q", where.format(90 + i), "", "stream-exit",
                "a head <script>alert(1)</script> reads it", f"add_{i}", where.format(200 + i),
            )
            for i in range(5)
        ),
        MatchRecord("refused", "z", "", "", code="other", reason="something else"),
        MatchRecord("skipped", "ln_9"),
    ]  # fmt: skip
    idle = PassReport("drop-identities", "canonical", "x·1 = x", "bitwise")
    raised = PassReport("raise-rmsnorm", "canonical", "", "exact")
    raised.matches = [MatchRecord("applied", "mul_3")]
    good = TensorError("output 0", 1e-7, 1.2e-7, 8e-7, 9e-7, 1.5e-7, 1.2e-6, True)
    bad = TensorError("output 0", 1e-7, 9e-7, 8e-7, 9e-6, 1.5e-7, 1.2e-6, False)
    first = GraphReport(
        0,
        nodes=40,
        opaque={f"cond_{i}": "higher-order operator" for i in range(5)},
        folded=4,
        folded_bytes=5 << 20,
        seconds={"capture": 0.2, "passes": 0.05, "sparsecc": 0.25},
        passes={p.name: p for p in (idle, raised, norm)},
        verdicts=[
            Verdict("to-rms", True, [good], 2e-16),
            Verdict("final", False, [bad], 1e-9, diverges="mul", diverges_where=where.format(5),
                    reproduce="sparsecc verify toy:make --seed 0"),
        ],
    )  # fmt: skip
    second = GraphReport(1, nodes=8, trains=True, fell_through="capture: a tensor subclass")
    second.verdicts = [Verdict("final", True, skipped="it draws random numbers")]
    return Report(
        "toy:<make>",
        [first, second],
        ["model.py:3, in forward: Tensor.item()"],
        {"torch": "2.13.0"},
        {"verify": "each", "require": {"to-rms": [">=", 1]}},
    )


@pytest.fixture
def program() -> Program:
    return made_program()


@pytest.fixture
def stages() -> list[GraphStages]:
    return made_stages()


@pytest.fixture
def make_stages() -> Callable[[], list[GraphStages]]:
    """Builds the stages anew at each call."""
    return made_stages


@pytest.fixture
def report() -> Report:
    return made_report()


TOY = """
import torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

def network():
    ends = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(ends[0], Block(), Block(), *ends[1:]).eval()

def make():
    return network(), (torch.randn(4, 8),)

def named():
    return Block().eval(), {"x": torch.randn(2, 8)}

def single():
    return network(), torch.randn(4, 8)

def training():
    return network().train(), (torch.randn(4, 8),)

def empty():
    return network()

def wrong():
    return 3, "four"

def broken():
    raise ValueError("the weights are lost")

ready = network()
number = 3
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module of factories whose name no other test has imported."""
    name = f"toy_{os.urandom(4).hex()}"
    (tmp_path / f"{name}.py").write_text(TOY)
    (tmp_path / f"half_{name}.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / f"{name}.py"
