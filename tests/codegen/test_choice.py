"""Which regions run by a kernel: by measurement, by the user's word, or not at all."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from support import agree, randomise, run
from torch import nn

from sparsecc import kernels
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec

OPTIONS = {"passes": ["fuse-few-rows"], "lower": "inductor"}
X = torch.randn(2, 24)


@pytest.fixture
def model() -> nn.Module:
    layers = nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5)
    return randomise(nn.Sequential(*layers)).eval()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """Where measurements are kept; libraries stay where they are."""

    class Native:
        machine = staticmethod(kernels.native.machine)
        folder = staticmethod(lambda: tmp_path)

    monkeypatch.setattr(kernels, "native", Native)
    return tmp_path


def measured(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[str]:
    asked: list[str] = []

    def measure(text: str, fakes) -> dict[str, float]:
        asked.append(text)
        return seconds

    monkeypatch.setattr(kernels, "_measure", measure)
    return asked


@pytest.mark.parametrize("faster", ["aten", "cpp"])
def test_the_faster_one_runs(
    faster: str, model: nn.Module, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, **{"aten": 2.0, "cpp": 2.0, faster: 1.0})
    with torch.no_grad():
        result, report = run(model, X, codegen="auto", **OPTIONS)
        agree(result, model(X))
    assert [(k.region, k.chosen, k.count) for k in report.graphs[0].kernels] == [
        ("none | tanh(p0 + v0)", faster, 2),
        ("none | p0 + v0", faster, 1),
    ]


def test_a_measurement_is_remembered(
    model: nn.Module, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, aten=2.0, cpp=1.0)
    with torch.no_grad():
        for _ in range(2):
            run(model, X, codegen="auto", **OPTIONS)
        assert len(asked) == 2
        for path in folder.glob("choice-*.json"):  # a file that is damaged is measured anew
            path.write_text(path.read_text()[:7])
        run(model, X, codegen="auto", **OPTIONS)
    assert len(asked) == 4
    assert all(json.loads(p.read_text())["cpp"] == 1.0 for p in folder.glob("choice-*.json"))


def test_a_measurement_measures() -> None:
    spec = kernels.Spec("none", 0.0, ("p0",))
    kernels.cpp.few_rows.load(spec)
    found = kernels._measure(spec.text(), [torch.empty(1, 64), [torch.empty(4096, 64)], []])
    assert set(found) == {"aten", "cpp"}
    assert all(1e-7 < seconds < 1 for seconds in found.values())


def test_no_compiler_is_one_line_in_the_log(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise BuildError("no compiler")

    monkeypatch.setattr(kernels.cpp.few_rows, "load", fail)
    with torch.no_grad(), caplog.at_level("WARNING", "sparsecc"):
        result, report = run(model[:1], X, codegen="cpp", **OPTIONS)
        torch.testing.assert_close(result, model[:1](X))
    assert [k.chosen for k in report.graphs[0].kernels] == ["aten"]
    assert [r.message for r in caplog.records if "kernel" in r.message] == [
        "no kernel is generated (none | p0 + v0): no compiler"
    ]


def test_without_code_generation_nothing_is_measured(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch)
    with torch.no_grad():
        for options in ({"codegen": "aten"}, {"codegen": "auto", "lower": "eager"}):
            _, report = run(model, X, **{**OPTIONS, **options})
            assert {k.chosen for k in report.graphs[0].kernels} == {"aten"}
            assert all(k.reason for k in report.graphs[0].kernels)
    assert asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_any_format_are_measured(dtype: torch.dtype) -> None:
    spec = Spec("none", 0.0, ("p0 * p1 + v0",), ("int4g32za8", "int8"))
    kernels.cpp.few_rows.load(spec, dtype)
    weights = [t for name in spec.formats for t in formats.quantize(torch.randn(512, 8192), name)]
    fakes = [torch.empty(1, 8192, dtype=dtype), weights, [torch.empty(512, dtype=dtype)]]
    seconds = kernels._measure(spec.text(), fakes)
    assert set(seconds) == {"aten", "cpp"}
    assert all(value > 0 for value in seconds.values())
