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
from sparsecc.runtime.ops import cached_attention, few_rows

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

    def measure(kind, args) -> dict[str, float]:
        asked.append(args[-1])
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


@pytest.mark.parametrize("name", ["few rows", "cached attention"])
def test_a_measurement_measures(name: str) -> None:
    if name == "few rows":
        operator, text = few_rows.few_rows, few_rows.Spec("none", 0.0, ("p0",)).text()
        args = (torch.empty(1, 64), [torch.empty(4096, 64)], [], text)
    else:
        text = cached_attention.Spec(32, 32, 2, True).text()
        new, cache, angles = (
            torch.empty(1, 2, 3, 32),
            torch.empty(1, 2, 90, 32),
            torch.empty(1, 1, 3, 32),
        )
        rest = (
            torch.empty(3, dtype=torch.int64),
            [angles, angles],
            torch.empty(1, 90, dtype=torch.bool),
        )
        operator = cached_attention.cached_attention
        args = (torch.empty(1, 4, 3, 32), new, new, cache, cache, *rest, 0.25, text)
    kind = kernels.KINDS[operator]
    kind.load(text)
    found = kernels._measure(kind, args)
    assert set(found) == {"aten", "cpp"}
    assert all(1e-7 < seconds < 1 for seconds in found.values())


def test_no_compiler_is_one_line_in_the_log(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
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
