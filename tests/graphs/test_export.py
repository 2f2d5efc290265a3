"""``sparsecc.rewrite`` and ``sparsecc.bake``: the same passes on ``torch.export`` programs."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PreNorm, error, ids, randomise
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

import sparsecc
from sparsecc.errors import CaptureError, PassError
from sparsecc.passes.norm.fold_norm_affine import FoldNormAffine

TO_RMS = "layernorm-to-rmsnorm"
FOLD = "fold-norm-affine"


def export(model: nn.Module, *args: Any, **options: Any) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, args, **options)


def rewritten(
    exported: ExportedProgram, applied: dict[str, int], **options: Any
) -> ExportedProgram:
    """Rewrite; the counts must be as given and the program given must stay as it was."""
    before = image(exported)
    report = sparsecc.Report()
    result = sparsecc.rewrite(exported, options or None, report)
    assert {name: report[name].applied for name in applied} == applied
    assert report.graphs[0].folded == sum("sparsecc_folded" in name for name in result.state_dict)
    assert image(exported) == before
    return result


def image(exported: ExportedProgram) -> list[Any]:
    """All of a program, in a form that compares."""
    weights = {**exported.state_dict, **exported.constants}
    return [
        str(exported.graph),
        str(exported.graph_signature),
        [(name, id(value), value._version) for name, value in weights.items()],
        [value.clone().flatten().tolist() for value in weights.values()],
        [(n.name, sorted(n.meta), str(n.meta.get("val"))) for n in exported.graph.nodes],
        str(exported.range_constraints),
    ]


def differs(got: Any, wanted: Any) -> float:
    got, wanted = tree_leaves(got), tree_leaves(wanted)
    assert len(got) == len(wanted)
    pairs = list(zip(got, wanted, strict=True))
    assert all((a.dtype, a.shape) == (b.dtype, b.shape) for a, b in pairs)
    return max(error(a.detach(), b.detach()) for a, b in pairs)


def reloaded(exported: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_equal_to_the_original(dtype: torch.dtype, dynamic: bool) -> None:
    model = randomise(PreNorm()).to(dtype).eval()
    shapes = {"ids": {0: Dim("batch"), 1: Dim("length", max=32)}} if dynamic else None
    exported = export(model, ids(), dynamic_shapes=shapes)
    result = rewritten(exported, {TO_RMS: 5, FOLD: 5})
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for batch, length in [(3, 5), (2, 7), (9, 2)] if dynamic else [(3, 5)]:
        tokens = ids(batch, length)
        assert differs(result.module()(tokens), model(tokens)) < tolerance
        assert differs(reloaded(result).module()(tokens), model(tokens)) < tolerance
    assert str(result.range_constraints) == str(exported.range_constraints)


def test_half_precision_folds_round_once() -> None:
    """Against fp64, the folded bf16 program is no worse than the bf16 model itself."""
    model = randomise(PreNorm()).to(torch.bfloat16).eval()
    exact = copy.deepcopy(model).double()(ids())
    result = rewritten(export(model, ids()), {TO_RMS: 5, FOLD: 5}).module()(ids())
    assert error(result, exact) < 1.5 * error(model(ids()), exact)


def test_state_dict() -> None:
    """The folded weights are there, the weights that only they read are not, the rest is the same."""
    model = randomise(PreNorm(layers=1)).eval()
    result = rewritten(export(model, ids()), {TO_RMS: 3, FOLD: 3})
    folded = {n: v for n, v in result.state_dict.items() if "sparsecc_folded" in n}
    # mix, out, up, down, head and their biases, the embedding and the positions
    assert len(folded) == len(result.state_dict) == 5 + 3 + 1 + 2
    assert all(isinstance(v, nn.Parameter) and not v.requires_grad for v in folded.values())
    assert set(result.graph_signature.parameters) == set(result.state_dict)
    assert [n for n, _ in result.named_parameters()] == list(result.graph_signature.parameters)
    # What no pass touches keeps its name and its very tensor.
    kept = rewritten(export(model, ids()), {TO_RMS: 3}, passes=[TO_RMS]).state_dict
    assert kept["norm.weight"] is export(model, ids()).state_dict["norm.weight"]
    assert "blocks.0.down.weight" not in kept


def test_round_trip_keeps_weights_bit_for_bit() -> None:
    result = rewritten(export(randomise(PreNorm()).eval(), ids()), {TO_RMS: 5})
    again = reloaded(result)
    assert list(again.state_dict) == list(result.state_dict)
    assert all(torch.equal(again.state_dict[n], v) for n, v in result.state_dict.items())
    assert torch.equal(again.module()(ids()), result.module()(ids()))


def test_decompositions_afterwards() -> None:
    model = randomise(PreNorm()).double().eval()
    result = rewritten(export(model, ids()), {TO_RMS: 5, FOLD: 5})
    core = result.run_decompositions()
    assert differs(core.module()(ids()), model(ids())) < 1e-12
    # The norms stay RMSNorms all the way down.
    assert not any("native_layer_norm" in str(n.target) for n in core.graph.nodes)


def test_decomposed_programs_are_refused() -> None:
    exported = export(randomise(PreNorm()).eval(), ids()).run_decompositions()
    with pytest.raises(CaptureError, match="rewrite it before run_decompositions"):
        sparsecc.rewrite(exported)


def test_functionalized_programs_are_taken() -> None:
    """``run_decompositions({})`` only makes mutation explicit; norms and linears are whole."""
    model = randomise(Everything()).double().eval()
    exported = export(model, x64(), kwargs={"extra": [x64(), {"scale": torch.ones(1)}]})
    wanted = copy.deepcopy(model)(x64(), extra=[x64(), {"scale": torch.ones(1)}])
    result = rewritten(exported.run_decompositions({}), {TO_RMS: 3})
    module = result.module()
    got = module(x64(), extra=[x64(), {"scale": torch.ones(1)}])
    assert differs(got[0], wanted[0]) < 1e-12
    assert module.state_dict()["calls"] == 1


def test_export_again() -> None:
    model = randomise(PreNorm()).double().eval()
    result = rewritten(export(model, ids()), {TO_RMS: 5})
    again = export(result.module(), ids())
    assert differs(again.module()(ids()), model(ids())) < 1e-12


def test_rewrite_again() -> None:
    """Rewriting a rewritten program folds folded weights under names of their own."""
    model = randomise(PreNorm()).double().eval()
    once = rewritten(export(model, ids()), {FOLD: 5}, passes=[FOLD])
    report = sparsecc.Report()
    twice = sparsecc.rewrite(once, {"passes": [TO_RMS]}, report)
    assert report[TO_RMS].applied == 5
    assert differs(twice.module()(ids()), model(ids())) < 1e-12
    assert differs(reloaded(twice).module()(ids()), model(ids())) < 1e-12


class Everything(nn.Module):
    """Buffers of every kind, keyword arguments, nested outputs, an input handed back, a norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 16)
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)
        self.plain = nn.LayerNorm(16, elementwise_affine=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("hidden", torch.rand(16), persistent=False)

    def forward(self, x: torch.Tensor, *, extra: list[Any]) -> Any:
        self.calls.add_(1)
        y = self.enter(x) + self.enter(extra[0])
        y = y + self.leave(torch.tanh(self.norm(y) * self.scale + self.hidden))
        y = y + self.leave(self.plain(y)) * extra[1]["scale"]
        return {"y": self.last(y), "more": (x, [self.scale * 2, torch.tensor([1, 2])])}, y.shape[0]


def x64() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_inputs_buffers_and_outputs_survive() -> None:
    model = randomise(Everything()).double().eval()
    extra = [x64() + 1, {"scale": torch.ones(1, dtype=torch.float64)}]
    exported = export(model, x64(), kwargs={"extra": extra})
    result = rewritten(exported, {TO_RMS: 3})
    assert {"calls", "scale"} <= set(result.state_dict)
    assert "hidden" in result.constants
    for program in (result, reloaded(result)):
        reference = copy.deepcopy(model)
        module = program.module()
        start = int(module.calls)
        for _ in range(2):
            (got, n), (wanted, m) = module(x64(), extra=extra), reference(x64(), extra=extra)
            assert list(got) == list(wanted)
            assert isinstance(got["more"], tuple)
            assert isinstance(got["more"][1], list)
            assert n == m
            assert differs(got, wanted) < 1e-12
        assert int(module.calls) == start + 2
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        result.module()(x64(), wrong=extra)


def test_tied_parameters() -> None:
    """Export lists both names of a tied weight but reads it through one; no copy of it is made."""
    model = randomise(PreNorm(tied=True)).double().eval()
    exported = export(model, ids())
    report = sparsecc.Report()
    result = sparsecc.rewrite(exported, None, report)
    assert report[FOLD].applied == 4
    assert [r.code for r in report[FOLD].refusals] == ["tied"]
    assert differs(result.module()(ids()), model(ids())) < 1e-12
    forced = rewritten(exported, {FOLD: 5}, passes={FOLD: {"untie": True}})
    assert differs(forced.module()(ids()), model(ids())) < 1e-12
    assert differs(reloaded(forced).module()(ids()), model(ids())) < 1e-12


def test_control_flow_stays() -> None:
    class Branching(PreNorm):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            h = self.norm(self.blocks[0](x))
            h = torch.cond(h.sum() > 0, lambda v: v * 2, lambda v: v - 1, (h,))
            return self.head(h)

    model = randomise(Branching()).double().eval()
    report = sparsecc.Report()
    result = sparsecc.rewrite(export(model, ids()), None, report)
    assert report[TO_RMS].applied == 3
    assert report.graphs[0].opaque == {"cond": "higher-order operator cond"}
    assert differs(result.module()(ids()), model(ids())) < 1e-12
    assert differs(reloaded(result).module()(ids()), model(ids())) < 1e-12


def test_nothing_to_do() -> None:
    exported = export(nn.Linear(4, 4), torch.rand(2, 4))
    report = sparsecc.Report()
    assert sparsecc.rewrite(exported, None, report) is exported
    assert report.fallbacks == ["graph 0: no rewrite applied"]
    with pytest.raises(sparsecc.RequirementError):
        sparsecc.rewrite(exported, {"require": [TO_RMS]})


@pytest.mark.parametrize("verify", ["final", "each"])
def test_verify(verify: str) -> None:
    """The proof runs the program, on copies: counters in it do not move."""
    model = randomise(Everything()).double().eval()
    extra = [x64(), {"scale": torch.ones(1, dtype=torch.float64)}]
    exported = export(model, x64(), kwargs={"extra": extra})
    report = sparsecc.Report()
    sparsecc.rewrite(exported, {"verify": verify}, report)
    assert report.verified
    assert len(report.verdicts) > 1 or verify == "final"
    assert model.calls == 0


def test_verify_catches_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecc.hoist import Hoisted

    real = Hoisted.evaluate
    monkeypatch.setattr(Hoisted, "evaluate", lambda self, s: [v * 1.01 for v in real(self, s)])
    exported = export(randomise(PreNorm()).eval(), ids())
    with pytest.raises(sparsecc.VerificationError, match="final"):
        sparsecc.rewrite(exported, {"verify": "final"})


def test_a_pass_that_fails_inside(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(FoldNormAffine, "rewrite", broken)
    exported = export(randomise(PreNorm()).eval(), ids())
    report = sparsecc.Report()
    with caplog.at_level(logging.WARNING, "sparsecc"):
        assert sparsecc.rewrite(exported, None, report) is exported
    assert FOLD in caplog.text
    assert FOLD in report.fallbacks[0]
    with pytest.raises(PassError, match=FOLD):
        sparsecc.rewrite(exported, {"strict": True})


def test_bake_leaves_sparsecc(tmp_path: Path) -> None:
    """A baked model runs in a process that cannot import sparsecc, from a file that torch wrote."""
    model = randomise(PreNorm()).double().eval()
    baked = sparsecc.bake(model, (ids(),), options={"require": {TO_RMS: "==5", FOLD: "==5"}})
    assert isinstance(baked, nn.Module)
    assert not any("norm" in name for name in baked.state_dict())
    assert differs(baked(ids()), model(ids())) < 1e-12
    torch.export.save(export(baked, ids()), tmp_path / "model.pt2")
    torch.save((ids(), model(ids()).detach()), tmp_path / "expected.pt")
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsecc":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch
folder = sys.argv[1]
tokens, expected = torch.load(folder + "/expected.pt")
result = torch.export.load(folder + "/model.pt2").module()(tokens)
assert (result - expected).abs().max() < 1e-10
assert "sparsecc" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


def test_bake_with_dynamic_shapes_and_keywords() -> None:
    model = randomise(Everything()).double().eval()
    extra = [x64(), {"scale": torch.ones(1, dtype=torch.float64)}]
    batch = {0: Dim("batch")}
    baked = sparsecc.bake(
        model,
        (x64(),),
        {"extra": extra},
        dynamic_shapes={"x": batch, "extra": [batch, {"scale": None}]},
    )
    three = x64()[:1].expand(3, -1, -1).contiguous()
    got, _ = baked(three, extra=[three, extra[1]])
    wanted, _ = model(three, extra=[three, extra[1]])
    assert differs(got, wanted) < 1e-12


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    model = randomise(PreNorm()).eval()
    shapes = {"ids": {0: Dim("batch", max=64)}}
    result = rewritten(export(model, ids(), dynamic_shapes=shapes), {TO_RMS: 5, FOLD: 5})
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(result, package_path=path)
    compiled = torch._inductor.aoti_load_package(path)
    for batch in (3, 7):
        assert differs(compiled(ids(batch)), model(ids(batch))) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
def test_onnx(tmp_path: Path) -> None:
    result = rewritten(export(randomise(PreNorm()).eval(), ids()), {TO_RMS: 5})
    torch.onnx.export(result, dynamo=True).save(str(tmp_path / "model.onnx"))
    assert (tmp_path / "model.onnx").stat().st_size > 0
