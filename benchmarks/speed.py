"""Latency side by side in one run: eager, Inductor, Inductor with freezing, sparsecc; and the floor.

Prediction, written before measuring: exact norm rewrites save one reduction and a few vector reads per norm,
which Inductor already fuses into its neighbours. On CPU, where matrix products take over 90% of the time, the
gain is at most 1-2%; what must hold is the floor, 0.97x Inductor. Freezing also packs the weights of linear
layers, which sparsecc does not do, so it may win.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from limits import counted
from torch import nn
from zoo import smollm2, vit_focus, whisper_tiny

import sparsecc
from sparsecc.timing import ratio, side_by_side

MODELS: dict[
    str, Callable[[], tuple[nn.Module | Callable[..., Any], tuple[Any, ...], nn.Module]]
] = {}


def model(name: str) -> Callable[[Any], Any]:
    def add(build: Any) -> Any:
        MODELS[name] = build
        return build

    return add


@model("DINOv2 ViT-S/14, batch 1, 224 px")
def _vit() -> Any:
    network = vit_focus.load_backbone()
    return vit_focus.as_forward(network), (torch.randn(1, 3, 224, 224),), network


@model("DINOv2 ViT-S/14, batch 8, 112 px")
def _vit_batch() -> Any:
    network = vit_focus.load_backbone()
    return vit_focus.as_forward(network), (vit_focus.digits(8)[0],), network


@model("SmolLM2-135M, 128 tokens")
def _smollm2() -> Any:
    network = smollm2.load()
    return smollm2.as_forward(network), (smollm2.windows(128, context=128),), network


@model("SmolLM2-135M, 1 token")
def _smollm2_token() -> Any:
    network = smollm2.load()
    return smollm2.as_forward(network), (smollm2.windows(128, context=128)[:, :1],), network


@model("Whisper tiny.en decoder and encoder, one clip")
def _whisper() -> Any:
    network = whisper_tiny.load()
    features = whisper_tiny.features(whisper_tiny.clips()[0][0])
    return whisper_tiny.as_forward(network), (features, torch.full((1, 64), 50256)), network


def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    data = {}
    rows = [
        "| model | eager | Inductor | freezing | sparsecc | floor | sparsecc / Inductor | fp64 ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, build in MODELS.items():
        torch._dynamo.reset()
        data[name] = measure(build, limits)
        entry = data[name]
        cells = [f"{entry[k]['median_ms']:.1f} ms ±{entry[k]['spread']:.0%}" for k in VARIANTS]
        rows.append(
            f"| {name} | {' | '.join(cells)} | {entry['floor_ms']:.1f} ms | "
            f"{entry['sparsecc_over_inductor']:.3f}x | {entry['fp64_ratio']:.2f} |"
        )
        print(rows[-1], flush=True)
    return data, "\n".join(rows)


VARIANTS = ("eager", "inductor", "freezing", "sparsecc")


@torch.no_grad()
def measure(build: Callable[[], Any], limits: dict[str, float]) -> dict[str, Any]:
    forward, inputs, network = build()
    report = sparsecc.Report()
    options = {"report": report, "verify": "final"}
    calls = {
        "eager": forward,
        "inductor": torch.compile(forward),
        "freezing": torch.compile(lambda *given: forward(*given)),
        "sparsecc": torch.compile(forward, backend="sparsecc", options=options),
    }
    expected = forward(*inputs)
    for name, call in calls.items():  # outputs are checked before anything is timed
        # Dynamo asks the global configuration; `options={"freezing": True}` was measured to freeze nothing.
        with torch._inductor.config.patch(freezing=name == "freezing"):
            result = call(*inputs)
        difference = float((result - expected).abs().max() / expected.abs().max())
        assert difference < 1e-3, (name, difference)
    assert report.verified or not any(p.applied for p in report if p.family != "canonical")
    timings = side_by_side(
        {n: (lambda c=c: c(*inputs)) for n, c in calls.items()}, rounds=15, warmup=3
    )
    weights = sum(p.nbytes for p in network.parameters())
    floor = max(
        counted(forward, *inputs) / (limits["fp32_gigaflops"] * 1e9),
        weights / (limits["gigabytes_per_second"] * 1e9),
    )
    entry: dict[str, Any] = {
        n: {"median_ms": t.median * 1e3, "spread": t.spread} for n, t in timings.items()
    }
    entry["floor_ms"] = floor * 1e3
    entry["sparsecc_over_inductor"] = ratio(timings, "sparsecc", "inductor")
    entry["sparsecc_over_freezing"] = ratio(timings, "sparsecc", "freezing")
    entry["fp64_ratio"] = max((v.worst_ratio for v in report.verdicts), default=1.0)
    entry["applied"] = {p.name: p.applied for p in report if p.applied}
    entry["folded_mib"] = sum(g.folded_bytes for g in report.graphs) / 2**20
    return entry
