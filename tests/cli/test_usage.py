"""Wrong input: one clear message on stderr, nothing on stdout, its exit code, no traceback."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsecc.cli import models
from sparsecc.cli.main import app, main
from sparsecc.errors import ModelError, SparseccError, VerificationError


def fails(capsys: pytest.CaptureFixture[str], code: int, *args: str) -> str:
    """Run a command that must fail so; returns stderr as one line."""
    assert main(args) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) < 20
    return " ".join(captured.err.split())


# ---- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--frmat"], "No such option: --frmat"),
        (["explian", "x:y"], "explian"),
        (["explain"], "MODEL"),
        (["explain", "x:y", "--seed", "two"], "integer"),
        (["dump", "x:y", "--format", "svgg"], "Did you mean 'svg'?"),
        (["dump", "x:y", "--json", "--format", "svg"], "exclude each other"),
        (["explain", "x:y", "--option", "lower"], "KEY=VALUE, not 'lower'"),
        (["explain", "x:y", "--option", "lowr=eager"], "Did you mean 'lower'?"),
        (["explain", "x:y", "--option", "lower=eagr"], "Did you mean 'eager'?"),
        (["verify", "x:y", "--option", "fuel=many"], "whole number"),
        (["explain", "x:y", "--passes", "layernorm-to-rmsnrm"], "'layernorm-to-rmsnorm'?"),
        (["explain", "x:y", "--option", 'disable=["fold-norm-scal"]'], "'fold-norm-scale'?"),
        (["passes", "layernorm-to-rms"], "'layernorm-to-rmsnorm'?"),
    ],
)
def test_wrong_usage_exits_with_2(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails(capsys, 2, *args)


def test_help_and_version_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparsecc ")
    for command in ("", "explain", "verify", "dump", "calibrate", "sparsify", "passes", "doctor"):
        assert main([*filter(None, [command]), "-h"]) == 0
        assert "Usage" in capsys.readouterr().out


# ---- models --------------------------------------------------------------------------------------


def test_missing_module_names_the_nearest(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = fails(capsys, 2, "explain", f"{toys.stem}x:make")
    assert f"there is no module '{toys.stem}x'. Did you mean '{toys.stem}'?" in words


def test_missing_dependency_is_not_a_missing_module(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = fails(capsys, 2, "explain", f"half_{toys.stem}:make")
    assert f"importing 'half_{toys.stem}' failed" in words
    assert "no_such_dependency" in words


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("mak", "has no 'mak'. Did you mean 'make'?"),
        ("number", "is of type int, which cannot be called"),
        ("wrong", "returned (int, str). It must return a model"),
        ("broken", "failed: ValueError: the weights are lost"),
        ("empty", "gives no inputs, but the model's forward needs"),
    ],
)
def test_a_factory_that_cannot_serve(
    toys: Path, attribute: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails(capsys, 2, "explain", f"{toys.stem}:{attribute}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nonsense", "'nonsense' is not a model. Give module:factory, timm:NAME"),
        ("a/b.py:make", "is a path; write the module's name, as in 'a.b'"),
        ("weights.pth", "a checkpoint holds no program"),
        ("model.onnx", "ONNX files are not read"),
        ("missing.pt2", "there is no file 'missing.pt2'"),
        ("hf:missing", "neither a directory nor a JSON file"),
        ("hf:.", "has no config.json"),
    ],
)
def test_what_is_no_model(
    toys: Path, spec: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails(capsys, 2, "explain", spec)


def test_a_file_that_is_no_export(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.pt2").write_text("junk")
    words = fails(capsys, 2, "explain", "model.pt2")
    assert "'model.pt2' is not a file that torch.export.save wrote" in words
    torch.save({"weight": torch.ones(1)}, "state.pt2")  # a zip archive of another kind
    with pytest.raises(ModelError, match="not a program"):
        models.load("state.pt2")


def test_a_directory_is_offered_as_hf(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("weights").mkdir()
    assert "Did you mean 'hf:weights'?" in fails(capsys, 2, "explain", "weights")


def test_the_forms_of_a_factory(toys: Path) -> None:
    name = toys.stem
    assert models.load(f"{name}:make").args[0].shape == (4, 8)
    assert models.load(f"{name}:single").args[0].shape == (4, 8)
    assert models.load(f"{name}:named").kwargs["x"].shape == (2, 8)
    assert "training mode" in models.load(f"{name}:training").notes[0]
    with pytest.raises(ModelError, match="needs input"):
        models.load(f"{name}:ready")  # a module itself, not a factory


def test_the_seed_decides_weights_and_inputs(toys: Path) -> None:
    spec = f"{toys.stem}:make"
    first, again, other = (models.load(spec, seed) for seed in (0, 0, 1))
    weights = [next(m.model.parameters()) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(first.args[0], again.args[0])
    assert not torch.equal(weights[0], weights[2])


def test_an_export_brings_its_inputs(toys: Path) -> None:
    made = models.load(f"{toys.stem}:make")
    torch.export.save(torch.export.export(made.model, made.args), "model.pt2")
    loaded = models.load("model.pt2")
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    assert torch.equal(loaded.args[0], made.args[0])


# ---- the last line of defence --------------------------------------------------------------------


class Surprise(SparseccError):
    exit_code = 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Surprise("[bold]not markup[/bold]"), 1, "error: [bold]not markup[/bold]"),
        (VerificationError("worse than eager"), 1, "error: worse than eager"),
        (SparseccError("x"), 3, "error: x"),
        (ZeroDivisionError("by zero"), 3, "internal error: ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_has_its_exit_code(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(spec: str, seed: int) -> None:
        raise error

    monkeypatch.setattr(models, "load", load)
    assert words in fails(capsys, code, "explain", "x:y")
    if code not in (130,):
        assert main(["explain", "x:y", "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_long_message_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(spec: str, seed: int) -> None:
        raise SparseccError("\n".join(f"line {i}" for i in range(100)))

    monkeypatch.setattr(models, "load", load)
    assert main(["explain", "x:y"]) == 3
    assert "… 70 more lines" in capsys.readouterr().err


def test_an_unwritable_file_is_named(tmp_path: Path) -> None:
    from sparsecc.cli.common import emit

    with pytest.raises(SparseccError, match="No such file or directory"):
        emit("text", tmp_path / "no" / "file.txt")


def test_verbose_leaves_logging_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("sparsecc")
    before = (logger.level, list(logger.handlers))
    main(["explain", "nonsense", "-v"])
    assert (logger.level, logger.handlers) == before


def test_every_command_takes_json() -> None:
    from typer.main import get_command

    group = get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {"--json", "--debug"} <= flags, name


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, sparsecc.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cache_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nowhere")
    assert "Set TORCHINDUCTOR_CACHE_DIR" in fails(capsys, 2, "explain", "json:loads")
