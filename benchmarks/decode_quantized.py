"""Decoding with SmolLM2-135M in int8 and int4, beside torchao and llama.cpp in their nearest formats.

Prediction, written before measuring: int8 reads 134 MB for a token and int4 in groups of 32 reads 84 MB, which
takes 4.3 and 2.7 ms at 31 GB/s. Kernels reach 75% of the bandwidth in int8 and half of it in int4; attention,
the norms of 181 regions and the way into the compiled graph take 2.5 ms more. So 8 ms in int8, six times
Inductor's fp32, and 7.5 ms in int4. llama.cpp's Q8_0 and Q4_1 stand at about the same, as its kernels are as
near to the bandwidth and its way is shorter. torchao's weight-only int8 under Inductor stays behind fp32's
kernels but for freezing.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import llama
import torch
from decode import LENGTH, TOKENS, Decoder, prompt_of
from torch import nn
from zoo import smollm2

from sparsecc.methods import make
from sparsecc.observe import observe
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.formats import Format
from sparsecc.timing import ratio, side_by_side

FORMATS = ("int8", "int8x32", "int4g32a8", "int4g64a8")
CALIBRATION = 8  # windows of 512 tokens
PEERS = {"llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_1": "Q4_1"}


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    model = smollm2.load()
    made: dict[str, Decoder] = {}
    for name, (network, how, freezing) in _variants(model).items():
        torch._dynamo.reset()
        with torch._inductor.config.patch(freezing=freezing):
            made[name] = Decoder(name.replace(" ", "_"), network, 1, how)
            made[name].one()
    expected = made["eager"].greedy()
    agreeing = {
        name: int((d.greedy() == expected).int().cumprod(-1).sum()) for name, d in made.items()
    }
    timed: dict[str, Callable[[], Any]] = {name: d.one for name, d in made.items()}
    if llama.is_there():
        for name, kind in PEERS.items():
            peer = llama.Decoder(kind, prompt_of(made["eager"]), LENGTH, torch.get_num_threads())
            timed[name] = peer.one
    timings = side_by_side(timed, rounds=21, warmup=3)
    data: dict[str, Any] = {}
    rows = [
        "| | ms a token | tokens/s over Inductor's fp32 | first tokens as eager's |",
        "|---|---|---|---|",
    ]
    for name, timing in timings.items():
        over = ratio(timings, name, "inductor")
        data[name] = {
            "median_ms": timing.median * 1e3,
            "spread": timing.spread,
            "over_inductor": over,
        }
        same = f"{agreeing[name]} of {TOKENS + 1}" if name in agreeing else ""
        rows.append(
            f"| {name} | {timing.median * 1e3:.1f} ±{timing.spread:.0%} | {over:.2f}x | {same} |"
        )
    gigabytes = limits["gigabytes_per_second"]
    for form in FORMATS:
        shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
        size = sum(Format.of(form).nbytes(*shape, 4) for shape in shapes)
        data[form]["weights_mb"], data[form]["floor_ms"] = size / 1e6, size / gigabytes / 1e6
        rows.append(
            f"\nReading {size / 1e6:.0f} MB of {form} weights once takes {size / gigabytes / 1e6:.1f} ms."
        )
    return data, "\n".join(rows)


def _variants(model: nn.Module) -> dict[str, tuple[nn.Module, dict[str, Any], bool]]:
    """Name -> the model, settings of ``torch.compile``, and whether Inductor freezes."""
    found: dict[str, tuple[nn.Module, dict[str, Any], bool]] = {
        "eager": (model, {}, False),
        "inductor": (model, {"backend": "inductor"}, False),
        "freezing": (model, {"backend": "inductor"}, True),
        "sparsecc": (model, {"backend": "sparsecc"}, False),
    }
    for form in FORMATS:
        recipe = Recipe(form, sites=dict.fromkeys(names_of(model), form))
        found[form] = (model, {"backend": "sparsecc", "options": {"recipe": recipe}}, False)
    recipe = _smoothed(model)
    found["int8x32, SmoothQuant"] = (
        model,
        {"backend": "sparsecc", "options": {"recipe": recipe}},
        False,
    )
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        peer = copy.deepcopy(model)
        quantize_(peer, Int8WeightOnlyConfig())
        found["torchao int8"] = (peer, {"backend": "inductor"}, False)
        found["torchao int8, freezing"] = (peer, {"backend": "inductor"}, True)
    return found


def _smoothed(model: nn.Module) -> Recipe:
    """int8 behind the scales of norms and of up; v is written into a cache, and no scale moves through that."""
    windows = smollm2.windows(CALIBRATION * 512, context=512, start=60_000)
    seen = observe(smollm2.as_forward(model), windows.split(1), progress=False)
    recipe = make("smoothquant", seen)
    recipe.scales = {n: s for n, s in recipe.scales.items() if not n.startswith("v-o")}
    return recipe


def names_of(model: nn.Module) -> list[str]:
    """Every linear layer; the tied head goes by the embedding's name, and is rounded as a copy."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(m.weight)] for m in model.modules() if isinstance(m, nn.Linear)]
