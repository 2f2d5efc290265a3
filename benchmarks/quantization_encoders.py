"""Encoders and a vision model in int8 and int4: what they are good at, their bytes and their latency.

Every recipe is judged with its kernels; Inductor's code around them (``TIMED``) is compiled for those whose
work differs, as a method that only chooses other numbers takes the same time. Bytes are of the weights that
are sites. torchao has no static int8 for linear layers and no int4 for CPUs without packing by hand: its
dynamic int8 is the nearest there is.

Prediction, written before measuring: int8 with activations for each token loses nothing that the metrics see.
One step for a tensor costs MiniLM a few hundredths of rank correlation and the ViT a few points. Scales reach
only v and q, k in MiniLM, a post-LayerNorm model whose residual reads every norm, so that RepQ, OutlierTune
and SmoothQuant repair little there; in the ViT and in Whisper they bring most back, and more with LayerNorms
kept, which leaves a place for shifts. int4 in groups of 128 costs a hundredth of rank correlation and AWQ half
of it. Latency: at 500 to 1,600 rows products are bound by arithmetic, of which AVX2 does twice as much in int8:
1.3x Inductor with freezing in int8, as attention, norms and rounding stay; int4 is slower than fp32, for its
weights are unpacked for nothing. torchao's dynamic int8 goes by operators and stays behind fp32.
Groups of 32 halve int8's error and cost a tenth of its time. EfficientNet-Lite0, in channels last: depthwise
convolutions and the memory between layers stay fp32, and rounding is paid at each pointwise one: level at best.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from encoders import ENCODERS, Encoder, Forward, relative_error
from quantization import megabytes

import sparsecc
from sparsecc.inspection import fresh_caller
from sparsecc.methods import make
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.recipe import Recipe
from sparsecc.timing import ratio, side_by_side

# What leaves a LayerNorm its place for a shift (docs/calibration.md).
KEPT = {"disable": ["layernorm-to-rmsnorm", "fold-norm-affine"]}
# name -> method, its options, options of the backend; "least": layers with fewer features or channels stay
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "int8, dynamic": ("int8", {"group": None}, {}),
    "int8, dynamic, groups of 32": ("int8", {}, {}),
    "int8, dynamic, from 80 channels": ("int8", {"group": None, "least": 80}, {}),
    "W8A8, one step": ("w8a8", {}, {}),
    "W8A8, SmoothQuant": ("smoothquant", {"static": True}, {}),
    "W8A8, OutlierTune": ("outliertune", {}, {}),
    "W8A8, RepQ": ("repq", {}, {}),
    "W8A8, OutlierTune, LayerNorms kept": ("outliertune", {}, KEPT),
    "W8A8, RepQ, LayerNorms kept": ("repq", {}, KEPT),
    "int4, to nearest": ("int4", {}, {}),
    "int4, AWQ": ("awq", {}, {}),
    "int4, AWQ and LoRC": ("lorc", {"base": "awq"}, {}),
}
TIMED = (
    "int8, dynamic",
    "int8, dynamic, groups of 32",
    "int8, dynamic, from 80 channels",
    "W8A8, SmoothQuant",
    "int4, AWQ",
)
EXACT = ("Inductor", "Inductor, freezing", "sparsecc")  # whose metric is eager's
ROUNDS = 9


def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    """All encoders, or those that SPARSECC_BENCH_ENCODERS names, separated by commas."""
    del limits
    names = os.environ.get("SPARSECC_BENCH_ENCODERS", ",".join(ENCODERS)).split(",")
    data: dict[str, Any] = {}
    tables = []
    for name in names:
        encoder = ENCODERS[name]()
        data[encoder.name] = measure(encoder)
        tables.append(_table(encoder, data[encoder.name]))
        print(tables[-1], flush=True)
    return data, "\n\n".join(tables)


@torch.no_grad()
def measure(encoder: Encoder, rounds: int = ROUNDS) -> dict[str, Any]:
    torch._dynamo.reset()
    forward = encoder.forward_of(encoder.network)
    expected = [forward(*batch) for batch in encoder.batches]
    calls: dict[str, Forward] = {
        "eager": forward,
        "Inductor": _compiled(forward, backend="inductor"),
        "Inductor, freezing": _compiled(forward, backend="inductor"),
        "sparsecc": _compiled(forward, backend="sparsecc"),
    }
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        peer = copy.deepcopy(encoder.network)
        quantize_(peer, Int8DynamicActivationInt8WeightConfig())
        calls["torchao int8, dynamic"] = _compiled(encoder.forward_of(peer), backend="inductor")
    data: dict[str, Any] = {}
    for name, call in calls.items():
        with _freezing("freezing" in name or "torchao" in name):
            call(*encoder.inputs)
        data[name] = _judged(encoder, call, expected, exact=name in EXACT)
        if name in EXACT:
            assert data[name]["relative_error"] < 1e-4, (name, data[name])
    data["eager"]["megabytes"] = megabytes(_seen(encoder, forward, {}), None)
    seen: dict[str, Observations] = {}
    for name, (method, options, passes) in METHODS.items():
        if passes and not encoder.pre_norm:
            continue
        observations = seen.get(str(passes))
        if observations is None:
            observations = seen[str(passes)] = _seen(encoder, forward, passes)
        least = options.get("least", 0)
        narrow = [n for n, site in observations.sites.items() if min(site.shape) < least]
        if least and not narrow:
            continue
        started = time.perf_counter()
        given = {key: value for key, value in options.items() if key != "least"}
        recipe = make(method, observations, **given, skip=narrow)
        made = time.perf_counter() - started
        call, report = _with(forward, recipe, passes, "inductor" if name in TIMED else "eager")
        call(*encoder.inputs)
        data[name] = _judged(encoder, call, expected)
        left = sum(step != 1.0 for step in recipe.activations.values())
        data[name] |= {
            "megabytes": megabytes(observations, recipe),
            "seconds_to_make": made,
            "sites": len(recipe.sites),
            "applied": report["quantize-linear"].applied,
            "refused": sorted({m.code for m in report["quantize-linear"].refusals}),
            "steps_multiplied": left,
        }
        if name in TIMED:
            calls[name] = call
        print(f"{encoder.name}: {name}: {data[name]}", flush=True)
    timings = side_by_side(
        {n: (lambda c=c: c(*encoder.inputs)) for n, c in calls.items()}, rounds, warmup=2
    )
    for name, timing in timings.items():
        data[name] |= {
            "median_ms": timing.median * 1e3,
            "spread": timing.spread,
            "over_inductor": ratio(timings, name, "Inductor"),
            "over_freezing": ratio(timings, name, "Inductor, freezing"),
        }
    return data


def _seen(encoder: Encoder, forward: Forward, passes: dict[str, Any]) -> Observations:
    return observe(forward, encoder.calibration, options=passes, progress=False)


def _compiled(forward: Forward, **how: Any) -> Forward:
    caller: Callable[..., Any] = torch.compile(fresh_caller(), **how)
    return lambda *given: caller(forward, given, {})


def _with(
    forward: Forward, recipe: Recipe, passes: dict[str, Any], lower: str
) -> tuple[Forward, Any]:
    report = sparsecc.Report()
    options = {**passes, "recipe": recipe, "report": report, "lower": lower}
    return _compiled(forward, backend="sparsecc", options=options), report


@contextlib.contextmanager
def _freezing(on: bool) -> Iterator[None]:
    """Dynamo asks the global configuration, at the first call."""
    with torch._inductor.config.patch(freezing=on):
        yield


def _judged(
    encoder: Encoder, call: Forward, expected: list[torch.Tensor], *, exact: bool = False
) -> dict[str, Any]:
    found = {"relative_error": relative_error(call, expected, encoder)}
    return found if exact else {"quality": encoder.quality(call), **found}


def _table(encoder: Encoder, data: dict[str, Any]) -> str:
    rows = [
        f"**{encoder.name}**; the metric: {encoder.metric}.",
        "",
        "| | metric | relative error | MB | ms | over Inductor | over freezing |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in data.items():
        cells = [
            name,
            f"{entry['quality']:.3f}" if "quality" in entry else "",
            f"{entry['relative_error']:.1e}",
            f"{entry['megabytes']:.1f}" if "megabytes" in entry else "",
        ]
        if "median_ms" in entry:
            cells.append(f"{entry['median_ms']:.1f} ±{entry['spread']:.0%}")
            cells += [f"{entry[key]:.2f}x" for key in ("over_inductor", "over_freezing")]
        cells += [""] * (7 - len(cells))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
