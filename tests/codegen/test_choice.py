"""Which regions run by a kernel: by measurement, by the user's word, or not at all."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from support import agree, capture, randomise, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from sparsecc import kernels, measurement, pipeline, regions
from sparsecc.errors import BuildError, OptionsError
from sparsecc.options import Options
from sparsecc.passes import registry
from sparsecc.regions import Variant
from sparsecc.report.model import GraphReport, KernelChoice
from sparsecc.runtime.ops import cached_attention, catalogue, few_rows, formats, rows

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

    def measure(variants, args, prepare) -> tuple[dict[str, float], bool]:
        asked.append(args[-1])
        return seconds, True

    monkeypatch.setattr(kernels, "measure", measure)
    return asked


def variants(operator, args) -> dict[str, Variant]:
    kind = regions.KINDS[operator]
    return {"aten": Variant(kind.meaning, "aten"), **kind.kernels(args)}


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


@pytest.mark.parametrize(
    ("features", "refused"), [(512, 0), (256, 1)], ids=["2 MiB of weights", "half a MiB"]
)
def test_by_default_a_region_must_read_enough(
    features: int, refused: int, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small one stays Inductor's, and its graph untouched."""
    asked = measured(monkeypatch, aten=2.0, cpp=1.0)
    layer = randomise(nn.Linear(features, 2 * features))
    x = torch.randn(2, features)
    with torch.no_grad():
        result, report = run(layer, x, lower="inductor")
        agree(result, layer(x))
    record = report["fuse-few-rows"]
    assert [m.code for m in record.refusals] == ["small"] * refused
    assert len(asked) == len(report.graphs[0].kernels) == record.applied == 1 - refused


@pytest.mark.parametrize("lower", ["aot_eager", "eager"])
def test_by_default_regions_are_made_for_inductor_alone(lower: str) -> None:
    names = {rewrite.name for rewrite in Options.parse({"lower": lower}).pipeline()}
    assert not names & set(registry.FOR_KERNELS)
    assert set(registry.FOR_KERNELS) <= {p.name for p in Options().pipeline()}


def test_regions_on_devices_that_are_left_out(model: nn.Module) -> None:
    with torch.no_grad():
        _, report = run(model, X, passes={"fuse-few-rows": {"devices": ["cuda"]}})
    assert {m.code for m in report["fuse-few-rows"].refusals} == {"device"}


@pytest.mark.parametrize("name", registry.FOR_KERNELS)
@pytest.mark.parametrize(
    ("given", "words"),
    [({"least": -1}, "in bytes, not -1"), ({"devices": ["gpu"]}, "gpu"), ({"last": 1}, "least")],
    ids=str,
)
def test_options_of_the_passes(name: str, given: dict, words: str) -> None:
    with pytest.raises(OptionsError, match=words):
        Options.parse({"passes": {name: given}})


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


def test_a_measurement_of_a_busy_machine_is_not_kept(
    model: nn.Module, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "measure", lambda *_: ({"aten": 2.0, "cpp": 1.0}, False))
    with torch.no_grad():
        _, report = run(model, X, codegen="auto", **OPTIONS)
    assert {kernel.chosen for kernel in report.graphs[0].kernels} == {"cpp"}
    assert not list(folder.glob("choice-*.json"))


@pytest.mark.parametrize("quiet", [True, False])
def test_what_stops_calls_for_long_does_not_decide(
    quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the faster calls two in three wait for a scheduler's turn of 16 ms; the clock is a made-up one."""
    now, calls = [0.0], [0]

    def fast(*_: torch.Tensor) -> None:
        calls[0] += 1
        now[0] += 1e-4 + (16e-3 if calls[0] % 3 else 0.0)

    def slow(*_: torch.Tensor) -> None:
        now[0] += 2e-4

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measurement, "_stopped", lambda: 0 if quiet else calls[0])
    found = {"aten": Variant(slow, "aten"), "cpp": Variant(fast, "cpp")}
    seconds, settled = measurement.measure(found, (torch.empty(2**20),))
    assert seconds == pytest.approx({"aten": 2e-4, "cpp": 1e-4})
    assert settled is quiet


def test_what_gets_slower_by_and_by_does_not_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], [1e-4]

    def call(*_: torch.Tensor) -> None:
        took[0] *= 1.001
        now[0] += took[0]

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    found = {name: Variant(call, "cpp") for name in ("aten", "cpp")}
    seconds, settled = measurement.measure(found, (torch.empty(2**20),))
    assert not settled
    assert min(seconds.values()) < 1.1e-4  # the first calls


@pytest.mark.parametrize("name", ["few rows", "cached attention", "rows"])
def test_a_measurement_measures(name: str) -> None:
    if name == "few rows":
        operator, text = few_rows.few_rows, few_rows.Spec("none", 0.0, ("p0",)).text()
        args = (torch.empty(1, 64), [torch.empty(4096, 64)], [], text)
    elif name == "rows":
        operator, text = rows.rows, catalogue.statistical_top_k(0.25).text()
        args = ([torch.empty(64, 256)], [], [], text)
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
    found, _ = measurement.measure(variants(operator, args), args)
    assert set(found) == {"aten", "cpp"}
    assert all(1e-7 < seconds < 1 for seconds in found.values())


def test_rows_are_measured_beside_inductors_code(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is made in the middle of another compile, and only once for one region."""
    compiled: list[object] = []
    real = regions._torch.inductor_alone

    def alone(module, inputs):
        compiled.append(module)
        return real(module, inputs)

    monkeypatch.setattr(regions._torch, "inductor_alone", alone)
    options = {**OPTIONS, "passes": ["fuse-rows"], "codegen": "auto"}

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1.25)

    x = torch.randn(6, 40)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        result, report = run(function, x, **options)
        agree(result, function(x))
    (choice,) = report.graphs[0].kernels
    assert set(choice.seconds) == {"aten", "cpp"}
    assert len(compiled) == 1


def test_no_compiler_is_one_line_in_the_log(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise BuildError("no compiler")

    monkeypatch.setattr(regions.cpp.few_rows, "load", fail)
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


# ---- on GPUs, as far as that is decided without one ----------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(24, 24, device="cuda", dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(F.linear(x, self.weight))


def choose_on_cuda(codegen: str) -> tuple[KernelChoice, bool]:
    """What is chosen for a layer on a GPU that is not here, and whether the kernel is in the program."""
    options, record = Options.parse({**OPTIONS, "codegen": codegen}), GraphReport(0)
    with FakeTensorMode(), torch.no_grad():
        program = capture(Layer(), torch.empty(2, 24, device="cuda", dtype=torch.bfloat16))
        pipeline.run(program, options, record)
        kernels.select(program, options, record)
    (choice,) = record.kernels
    return choice, bool(list(program.calls(few_rows.few_rows_native)))


@pytest.fixture
def gpu(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A GPU by name alone, and how kernels for it were told to be cut."""
    chosen: dict = {}
    monkeypatch.setattr(kernels, "_device", lambda device: "a GPU")
    monkeypatch.setattr(regions.triton.build, "available", lambda: "")
    monkeypatch.setattr(regions.triton.launch.cuts, "chosen", chosen)
    return chosen


CUTS = {"aten": 3.0, "triton 4x32, 4 warps, 1 stages": 2.0, "triton 8x32, 4 warps, 1 stages": 1.0}


def test_the_fastest_cut_runs(gpu: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, **CUTS)
    for _ in range(2):  # the second time by what is remembered
        gpu.clear()
        choice, runs = choose_on_cuda("auto")
        assert (choice.chosen, choice.seconds, runs) == ("triton", CUTS, True)
        ((problem, config),) = gpu.items()
        assert (problem.rows, problem.size, problem.features) == (2, 24, (24,))
        assert problem.dtype is torch.bfloat16
        assert str(config) == "8x32, 4 warps, 1 stages"
    assert len(asked) == 1


def test_a_cut_that_is_not_known_any_more_is_measured_anew(
    gpu: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, **CUTS, **{"triton 3x3, 3 warps, 3 stages": 4.0})
    choose_on_cuda("auto")
    asked = measured(monkeypatch, **CUTS)
    assert choose_on_cuda("auto")[0].seconds == CUTS
    assert len(asked) == 1


def test_aten_where_it_is_faster(gpu: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, **{**CUTS, "aten": 0.5})
    choice, runs = choose_on_cuda("auto")
    assert (choice.chosen, runs, gpu) == ("aten", False, {})


def test_without_triton_one_line_in_the_log(
    gpu: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(regions.triton.build, "available", lambda: "Triton is not installed")
    with caplog.at_level("WARNING", "sparsecc"):
        choice, runs = choose_on_cuda("triton")
    assert (choice.chosen, choice.reason, runs) == ("aten", "Triton is not installed", False)
    assert [r.message for r in caplog.records] == [
        "no kernel is generated (none | silu(p0)): Triton is not installed"
    ]


def test_a_language_of_another_device(gpu: dict, model: nn.Module) -> None:
    choice, runs = choose_on_cuda("cpp")
    assert (choice.chosen, runs) == ("aten", False)
    assert choice.reason == "codegen='cpp' has no kernels on cuda"
    with torch.no_grad():
        _, report = run(model, X, codegen="triton", **OPTIONS)
    assert {k.reason for k in report.graphs[0].kernels} == {
        "codegen='triton' has no kernels on cpu"
    }


def test_a_cut_that_does_not_run_is_no_candidate() -> None:
    def fail(*args: object) -> None:
        raise MemoryError("too much shared memory")

    arguments = torch.ones(1, 1), [torch.ones(1, 1)], [], few_rows.Spec("none", 0.0, ("p0",)).text()
    aten, runs = Variant(few_rows.meaning, "aten"), Variant(few_rows.meaning, "triton")
    found = {"aten": aten, "triton a": Variant(fail, "triton"), "triton b": runs}
    assert list(measurement.running(found, arguments)) == ["aten", "triton b"]
    del found["triton b"]
    with pytest.raises(BuildError, match="triton a: MemoryError: too much shared memory"):
        list(measurement.running(found, arguments))


@pytest.mark.gpu
def test_a_measurement_measures_on_a_gpu() -> None:
    text = few_rows.Spec("none", 0.0, ("p0",)).text()
    x, weight = torch.empty(1, 64, device="cuda"), torch.empty(4096, 64, device="cuda")
    args = (x, [weight], [], text)
    found, _ = measurement.measure(variants(few_rows.few_rows, args), args)
    assert "aten" in found
    assert len(found) > 2
    assert all(1e-7 < seconds < 1 for seconds in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_any_format_are_measured(dtype: torch.dtype) -> None:
    spec = few_rows.Spec("none", 0.0, ("p0 * p1 + v0",), ("int4g32za8", "int8"))
    weights = [t for name in spec.formats for t in formats.quantize(torch.randn(512, 8192), name)]
    operands = [torch.empty(512, dtype=dtype)]
    args = (torch.empty(1, 8192, dtype=dtype), weights, operands, spec.text())
    seconds, _ = measurement.measure(variants(few_rows.few_rows, args), args)
    assert set(seconds) == {"aten", "cpp"}
    assert all(value > 0 for value in seconds.values())
