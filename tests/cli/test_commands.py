"""The commands on a small model, end to end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecc.cli.main import main
from sparsecc.passes import registry

REWRITE = "layernorm-to-rmsnorm"


@pytest.fixture
def spec(toys: Path) -> str:
    return f"{toys.stem}:make"


def succeeds(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must succeed; returns stdout."""
    code = main(args)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


# ---- explain -------------------------------------------------------------------------------------


def test_explain_counts_rewrites(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = succeeds(capsys, "explain", spec)
    assert text.startswith(f"sparsecc  {spec}\n")
    assert REWRITE in text
    data = json.loads(succeeds(capsys, "explain", spec, "--json"))
    assert data["model"] == spec
    assert data["summary"][REWRITE]["applied"] == 3


def test_explain_writes_the_form_of_the_suffix(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, start in (("r.html", "<!DOCTYPE html>"), ("r.json", "{"), ("r.txt", "sparsecc")):
        assert succeeds(capsys, "explain", spec, "-o", name) == ""
        assert Path(name).read_text(encoding="utf-8").startswith(start)


def test_options_and_passes_reach_the_pipeline(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["explain", spec, "--json", "--passes", REWRITE, "--option", "fuel=0"]
    (graph,) = json.loads(succeeds(capsys, *chosen))["graphs"]
    assert set(graph["passes"]) & set(registry.REWRITES) == {REWRITE}
    assert not any(m["status"] == "applied" for m in graph["passes"][REWRITE]["matches"])


def test_an_unmet_requirement_exits_with_1(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    require = json.dumps({REWRITE: "==99"})
    assert main(["explain", spec, "--option", f"require={require}"]) == 1
    assert "99" in capsys.readouterr().err


def test_verbose_logs_each_pass(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", spec, "-v"]) == 0
    assert REWRITE in capsys.readouterr().err


# ---- verify --------------------------------------------------------------------------------------


def test_verify_proves_and_exits_with_0(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(succeeds(capsys, "verify", spec, "--json"))
    verdicts = [verdict for graph in data["graphs"] for verdict in graph["verdicts"]]
    assert {v["stage"] for v in verdicts} >= {REWRITE, "final"}
    assert all(v["passed"] for v in verdicts)


def test_a_failed_proof_exits_with_1(
    spec: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecc import inspection
    from sparsecc.report.model import GraphReport, Report, Verdict

    verdicts = [Verdict("fold-norm-scale", False, algebra=0.5)]

    def verify(*_: Any, **__: Any) -> Report:
        return Report(graphs=[GraphReport(0, verdicts=verdicts)])

    monkeypatch.setattr(inspection, "verify", verify)
    assert main(["verify", spec]) == 1
    captured = capsys.readouterr()
    assert "✗ fold-norm-scale" in captured.out
    assert "error: FAILED verification at fold-norm-scale" in captured.err


def test_nothing_proved_is_no_success(
    spec: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecc import inspection
    from sparsecc.report.model import GraphReport, Report, Verdict

    verdicts = [Verdict("final", True, skipped="it draws random numbers")]

    def verify(*_: Any, **__: Any) -> Report:
        return Report(graphs=[GraphReport(0, verdicts=verdicts)])

    monkeypatch.setattr(inspection, "verify", verify)
    assert main(["verify", spec]) == 1
    assert "it draws random numbers" in capsys.readouterr().err


# ---- dump ----------------------------------------------------------------------------------------


def test_dump_writes_the_lowered_program_to_stdout(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = succeeds(capsys, "dump", spec)
    assert "aten.rms_norm" in text
    assert "aten.layer_norm" not in text
    captured = succeeds(capsys, "dump", spec, "--stage", "captured")
    assert "aten.layer_norm" in captured


@pytest.mark.parametrize("form", ["text", "python", "dot", "json", "html", "svg", "mlir"])
def test_dump_is_the_same_in_another_process(spec: str, form: str) -> None:
    if form == "mlir":
        pytest.importorskip("torch_mlir")
    command = [sys.executable, "-m", "sparsecc.cli.main", "dump", spec, "--format", form]
    runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != b""


def test_dump_json_holds_every_stage(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(succeeds(capsys, "dump", spec, "--json", "--stage", "all"))
    names = [stage["stage"] for stage in data["graphs"][0]["stages"]]
    assert names[0] == "captured"
    assert names[-1] == "lowered"
    assert REWRITE in names


def test_dump_into_a_folder_and_a_file(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert succeeds(capsys, "dump", spec, "-o", "stages") == ""
    index = Path("stages/index.md").read_text(encoding="utf-8")
    assert f"# {spec}" in index
    assert Path("stages/graph0/000_captured.txt").is_file()
    succeeds(capsys, "dump", spec, "-o", "one.svg", "--format", "svg")
    ET.fromstring(Path("one.svg").read_text(encoding="utf-8"))
    Path("stages/mine.txt").write_text("keep")
    assert main(["dump", spec, "-o", "stages"]) == 2
    assert "mine.txt" in capsys.readouterr().err


def test_dump_kernels_is_their_source(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = succeeds(capsys, "dump", spec, "--stage", "kernels")
    assert text.startswith("// graph 0: none | p0 + v0, [")
    assert "//   out0[m, n] = p0 + v0" in text
    kernels = json.loads(succeeds(capsys, "dump", spec, "--stage", "kernels", "--json"))
    assert {k["chosen"] for k in kernels} == {"cpp"}
    assert all(k["text"].startswith(("// few_rows_", "// sparse_ffn_")) for k in kernels)
    assert main(["dump", spec, "--stage", "kernels", "--format", "svg"]) == 2
    assert "--format text or json" in capsys.readouterr().err
    assert (
        json.loads(succeeds(capsys, "dump", spec, "--stage", "kernels", "--json", "--graph", "7"))
        == []
    )


def test_dump_names_the_stages_that_there_are(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dump", spec, "--stage", "capturd"]) == 2
    assert "Did you mean 'captured'?" in capsys.readouterr().err
    assert main(["dump", spec, "--graph", "5"]) == 2
    assert "no graph 5" in capsys.readouterr().err
    assert main(["dump", spec, "--format", "svg", "--stage", "all"]) == 2
    assert "holds one stage" in capsys.readouterr().err


def test_dump_mlir_before_and_after(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_mlir")
    before = succeeds(capsys, "dump", spec, "--format", "mlir", "--stage", "captured")
    after = succeeds(capsys, "dump", spec, "--format", "mlir")
    assert "torch.aten.layer_norm" in before
    assert "torch.aten.rms_norm" in after
    assert "torch.aten.layer_norm" not in after


def test_an_exported_program_can_be_explained_and_dumped(
    spec: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsecc.cli.models import load

    made = load(spec)
    torch.export.save(torch.export.export(made.model, made.args), "model.pt2")
    data = json.loads(succeeds(capsys, "explain", "model.pt2", "--json"))
    assert data["summary"][REWRITE]["applied"] == 3
    assert "aten.rms_norm" in succeeds(capsys, "dump", "model.pt2")


# ---- hf: and timm: -------------------------------------------------------------------------------


def test_a_transformers_directory_with_and_without_weights(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained("bare")
    transformers.LlamaForCausalLM(config).save_pretrained("full")
    from sparsecc.cli.models import load

    assert "random" in load("hf:bare").notes[0]
    assert load("hf:bare/config.json").kwargs["input_ids"].shape == (1, 32)
    full = load("hf:full")
    assert full.notes == []
    weight = transformers.LlamaForCausalLM.from_pretrained("full").lm_head.weight
    assert torch.equal(full.model.lm_head.weight, weight)
    assert "fold-norm-affine" in succeeds(capsys, "explain", "hf:full")


def test_a_config_that_transformers_does_not_know(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    Path("config.json").write_text('{"a": 1}')
    assert main(["explain", "hf:config.json"]) == 2
    assert "cannot make a model" in capsys.readouterr().err


needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)


@needs_timm
def test_a_timm_model(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(succeeds(capsys, "explain", "timm:vit_tiny_patch16_224", "--json"))
    assert data["summary"][REWRITE]["applied"] > 0


@needs_timm
def test_an_unknown_timm_model_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "timm:vit_tny_patch16_224"]) == 2
    assert "'vit_tiny_patch16_224'?" in capsys.readouterr().err


# ---- passes --------------------------------------------------------------------------------------


def test_passes_lists_the_whole_registry(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(succeeds(capsys, "passes", "--json"))
    assert [entry["name"] for entry in listed] == [*registry.CANONICAL, *registry.REWRITES]
    assert all(entry["law"] and entry["exactness"] for entry in listed)
    text = succeeds(capsys, "passes")
    assert all(name in text for name in registry.REWRITES)


def test_a_pass_has_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    text = succeeds(capsys, "passes", REWRITE)
    assert "refuses when" in text
    assert "stream-exit" in text
    data = json.loads(succeeds(capsys, "passes", REWRITE, "--json"))
    assert data["name"] == REWRITE
    assert data["refusals"]


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor_finds_a_working_installation(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(succeeds(capsys, "doctor", "--json"))
    checks = {check["name"]: check for check in data["checks"]}
    assert data["ok"] is True
    assert REWRITE in checks["trial compile"]["found"]


def test_doctor_without_a_compiler_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    text = " ".join(succeeds(capsys, "doctor").split())
    assert "! C++ compiler No working C++ compiler found" in text
    assert '"lower": "aot_eager"' in text
    assert "through aot_eager" in text


def test_doctor_exits_with_1_when_an_essential_check_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.3.1")
    assert main(["doctor", "--quick"]) == 1
    captured = capsys.readouterr()
    assert "2.11 <= torch < 2.15" in captured.out
    assert "torch failed" in captured.err


def test_doctor_and_the_package_name_the_same_torch_releases() -> None:
    import importlib.metadata
    import re

    from sparsecc.cli.doctor import SUPPORTED

    (line,) = [
        r for r in importlib.metadata.requires("sparsecc") or () if re.match(r"torch\b(?!-)", r)
    ]
    found = {sign: tuple(map(int, v.split("."))) for sign, v in re.findall(r"(>=|<)([\d.]+)", line)}
    assert (found[">="], found["<"]) == SUPPORTED
