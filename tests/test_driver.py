"""What a user sees of the backend: options, requirements, warnings, the kill switch, explain."""

from __future__ import annotations

import copy
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from support import PreNorm, error, ids, randomise
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import sparsecc


def model() -> nn.Module:
    return randomise(PreNorm()).eval()


def call(network: nn.Module, **options):
    with torch.no_grad():
        return torch.compile(network, backend="sparsecc", options={"lower": "eager", **options})(
            ids()
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"verfy": "each"}, "Did you mean 'verify'"),
        ({"verify": "eech"}, "Did you mean 'each'"),
        ({"passes": ["layernorm-to-rms"]}, "Did you mean 'layernorm-to-rmsnorm'"),
        ({"passes": "fold-norm-affine"}, "list of pass names"),
        ({"passes": {"fold-norm-affine": 3}}, "must be a mapping"),
        ({"disable": ["fold"]}, "unknown pass 'fold'"),
        ({"require": {"fold-norm-affine": "many"}}, "give 1, '>=1' or '==12'"),
        ({"require": 3}, "must map pass names"),
        ({"strict": 1}, "True or False"),
        ({"fuel": -1}, "whole number"),
        ({"preset": "fastest"}, "Valid: default, none"),
        ({"codegen": "cuda"}, "Valid: aten, auto, cpp, triton"),
        ({"lower": "inductr"}, "Did you mean 'inductor'"),
        ({"report": "out.txt"}, ".json or .html"),
        ({"recipe": "x.recipe"}, "must end in .json"),
        ({"inductor": 3}, "must be a mapping"),
        ({"freshness": "never"}, "Valid: hash, probe, version"),
    ],
)
def test_wrong_options_say_what_is_right(options, words: str) -> None:
    with pytest.raises(sparsecc.OptionsError) as caught:
        sparsecc.Options.parse(options)
    assert words in str(caught.value)
    assert "keep_stages" not in str(caught.value)
    with pytest.raises(BackendCompilerFailed) as wrapped:
        call(model(), **options)
    assert isinstance(wrapped.value.inner_exception, sparsecc.OptionsError)


@pytest.mark.parametrize("count", [5, ">=5", "==5"])
def test_requirement_met(count) -> None:
    call(model(), require={"layernorm-to-rmsnorm": count})


@pytest.mark.parametrize("count", [6, ">=6", "==4"])
def test_requirement_missed(count) -> None:
    with pytest.raises(BackendCompilerFailed, match="applied 5 times"):
        call(model(), require={"layernorm-to-rmsnorm": count})


def test_asked_for_and_applied_nowhere_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sparsecc"):
        call(model(), passes=["fold-layerscale"])
    assert "'fold-layerscale' was asked for and applied nowhere" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sparsecc"):
        call(model())
    assert caplog.text == "", "a preset's pass that matches nothing is no news"


def test_counts_and_refusals_at_info(caplog: pytest.LogCaptureFixture) -> None:
    network = randomise(PreNorm(tied=True)).eval()
    with caplog.at_level(logging.INFO, "sparsecc"):
        call(network)
    assert "layernorm-to-rmsnorm applied 5, refused 0" in caplog.text
    assert "refused [tied]" in caplog.text
    assert "support.py" in caplog.text


def test_nothing_applied_means_inductor_gets_dynamos_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecc import driver

    seen = []
    real = driver._lower

    def lower(module, *args):
        seen.append(module)
        return real(module, *args)

    monkeypatch.setattr(driver, "_lower", lower)
    report = sparsecc.Report()
    call(nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4)), report=report)
    assert report.fallbacks == ["graph 0: no rewrite applied"]
    assert "backend_id" in seen[0].meta
    assert any(n.target is torch.nn.functional.embedding for n in seen[0].graph.nodes)


def test_a_graph_that_dynamo_splits_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    """In training, index_put by a mask cannot be compiled: Dynamo hands over what is around it."""

    def function(x: torch.Tensor, mask: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.index_put(x.sin(), (mask,), v).cos()

    x, v = torch.randn(5, requires_grad=True), torch.randn(2, requires_grad=True)
    mask = torch.tensor([True, False, True, False, False])
    report = sparsecc.Report()
    options = {"lower": "aot_eager", "floor": False, "report": report}
    fast = torch.compile(function, backend="sparsecc", options=options)
    with caplog.at_level(logging.WARNING, logger="sparsecc"):
        result = fast(x, mask, v)
    torch.testing.assert_close(result, function(x, mask, v))
    assert not report.fallbacks
    assert not [r for r in caplog.records if r.name == "sparsecc"]


def test_kill_switch_and_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    report = sparsecc.Report()
    call(model(), report=report, disable=["layernorm-to-rmsnorm"])
    assert "layernorm-to-rmsnorm" not in report
    assert report["fold-norm-affine"].applied == 5
    monkeypatch.setenv("SPARSECC_DISABLE", "1")
    torch._dynamo.reset()
    network = model()
    with torch.no_grad():
        assert torch.equal(call(network, require=["layernorm-to-rmsnorm"]), network(ids()))


@pytest.mark.parametrize("fuel", [0, 1, 4, 7, 100])
def test_fuel_stops_after_so_many_rewrites(fuel: int) -> None:
    report = sparsecc.Report()
    network = model()
    result = call(network, fuel=fuel, report=report, verify="each")
    with torch.no_grad():
        assert error(result, network(ids())) < 1e-5
    assert sum(p.applied for p in report if p.family != "canonical") == min(fuel, 10)
    assert sum(m.status == "skipped" for p in report for m in p.matches) == 10 - min(fuel, 10)


def test_report_as_file(tmp_path: pathlib.Path) -> None:
    import json

    for name in ("report.json", "report.html"):
        torch._dynamo.reset()
        call(model(), report=str(tmp_path / name))
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["summary"]["layernorm-to-rmsnorm"]["applied"] == 5
    assert "layernorm-to-rmsnorm" in (tmp_path / "report.html").read_text()


def test_copied_options_fill_the_report_given() -> None:
    """transformers' ``generate`` copies its ``CompileConfig`` deeply, twice."""
    report = sparsecc.Report()
    call(model(), **copy.deepcopy({"report": report}))
    assert report["layernorm-to-rmsnorm"].applied == 5


def test_dump_option_writes_every_stage(tmp_path: pathlib.Path) -> None:
    call(model(), dump=str(tmp_path / "stages"))
    names = [p.name for p in sorted((tmp_path / "stages" / "graph0").iterdir())]
    assert next(n.partition("_")[2].partition(".")[0] for n in names) == "captured"
    assert any("layernorm-to-rmsnorm" in n for n in names)


def test_explaining_leaves_nothing_behind() -> None:
    """Looks must not use up Dynamo's recompile limit, which serves real compiles."""
    network = model()
    for _ in range(12):
        assert sparsecc.explain(network, ids())["layernorm-to-rmsnorm"].applied == 5
    report = sparsecc.Report()
    call(network, report=report)
    assert len(report.graphs) == 1


def test_explain_adds_up_requirements_over_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = model(), nn.LayerNorm(20)

        def forward(self, x):
            y = self.a(x)
            torch._dynamo.graph_break()
            return self.b(y)

    report = sparsecc.explain(
        Broken().eval(), ids(), options={"require": {"layernorm-to-rmsnorm": 5}}
    )
    assert len(report.graphs) == 2
    assert len(report.graph_breaks) == 1
    with pytest.raises(sparsecc.RequirementError):
        sparsecc.explain(Broken().eval(), ids(), options={"require": {"layernorm-to-rmsnorm": 9}})


def test_two_models_with_other_options_do_not_meet() -> None:
    first, second = sparsecc.Report(), sparsecc.Report()
    call(model(), report=first)
    call(model(), report=second, passes=["fold-norm-affine"])
    assert "layernorm-to-rmsnorm" in first
    assert "layernorm-to-rmsnorm" not in second


def test_torch_logs_and_tlparse_artifacts(tmp_path: pathlib.Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import torch\nfrom support import PreNorm, ids, randomise\n"
        "with torch.no_grad(): torch.compile(randomise(PreNorm()).eval(), backend='sparsecc', "
        "options={'lower': 'eager'})(ids())"
    )
    environment = {**os.environ, "TORCH_LOGS": "+sparsecc", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "layernorm-to-rmsnorm applied 5" in done.stderr
    trace = "".join(p.read_text() for p in tmp_path.rglob("*.log"))
    assert "sparsecc_0_layernorm-to-rmsnorm" in trace
    assert "sparsecc_0_report" in trace


def test_missing_compiler_runs_without_generated_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparsecc import _torch

    class InvalidCxxCompiler(RuntimeError):
        pass

    def broken(*args):
        raise RuntimeError("inductor") from InvalidCxxCompiler("no g++")

    monkeypatch.setattr(_torch, "inductor", broken)
    network = model()
    with caplog.at_level(logging.WARNING, "sparsecc"):
        result = call(network, lower="inductor")
    with torch.no_grad():
        assert error(result, network(ids())) < 1e-5
    assert "without generated code" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed):
        call(network, lower="inductor", strict=True)
