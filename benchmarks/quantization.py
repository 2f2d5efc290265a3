"""What rounding costs SmolLM2-135M: perplexity on Wikipedia, bytes and the time of a window, by method.

Prediction, written before measuring: int8 with activations for each token costs below 0.5% of perplexity
(outcome: 5.4%; with a scale for each 32 features, written before measuring on this text: 1%, and 0.6% behind
SmoothQuant's scales). One
static step for a tensor costs tens of percent, as this family has outlier channels; scales that move those
into the weights (SmoothQuant, OutlierTune, RepQ) bring most of it back. The carrier's weights lie on a grid of
4 bits in groups of 32, so int4 in groups of 128 is judged fairly by its own error only: a few percent to
nearest, less with AWQ, less again with a correction of rank 8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from zoo import smollm2

import sparsecc
from sparsecc.budget import DENSE, nbytes
from sparsecc.methods import make
from sparsecc.observe import observe
from sparsecc.recipe import Recipe

CALIBRATION = 16  # windows, behind those that perplexity is measured on
TOKENS, CONTEXT = 50_176, 512
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8, whole tokens": ("int8", {"group": None}),
    "int8": ("int8", {}),
    "int8, SmoothQuant": ("smoothquant", {}),
    "W8A8, one step": ("w8a8", {}),
    "W8A8, SmoothQuant": ("smoothquant", {"static": True}),
    "W8A8, OutlierTune": ("outliertune", {}),
    "W8A8, RepQ": ("repq", {}),
    "int4, to nearest": ("int4", {}),
    "int4, AWQ": ("awq", {}),
    "int4, AWQ and LoRC": ("lorc", {"base": "awq"}),
}


@torch.no_grad()
def run(limits: dict[str, float], tokens: int = TOKENS) -> tuple[dict[str, Any], str]:
    del limits
    model = smollm2.load()
    forward = smollm2.as_forward(model)
    behind = smollm2.windows(CALIBRATION * CONTEXT, context=CONTEXT, start=TOKENS + CONTEXT)
    seen = observe(forward, behind.split(1), progress=False)
    data: dict[str, Any] = {"tokens": tokens}
    dense = entry(forward, None, tokens)
    data["fp32"] = dense
    rows = [
        f"Perplexity of {tokens} tokens in windows of {CONTEXT}; weights that a call reads.",
        "",
        "| | perplexity | | MB | steps multiplied |",
        "|---|---|---|---|---|",
        f"| fp32 | {dense['perplexity']:.3f} | | {megabytes(seen, None):.0f} | |",
    ]
    for name, (method, options) in METHODS.items():
        started = time.perf_counter()
        recipe = make(method, seen, **options)
        made = time.perf_counter() - started
        row = data[name] = entry(forward, recipe, tokens)
        row |= {"seconds_to_make": made, "megabytes": megabytes(seen, recipe)}
        row["increase"] = row["perplexity"] / dense["perplexity"] - 1
        left = sum(step != 1.0 for step in recipe.activations.values())
        row["steps_multiplied"] = left
        rows.append(
            f"| {name} | {row['perplexity']:.3f} | {row['increase']:+.2%} | {row['megabytes']:.0f} | "
            f"{left if recipe.activations else ''} |"
        )
        print(rows[-1], flush=True)
    return data, "\n".join(rows)


def entry(forward: Callable[..., Any], recipe: Recipe | None, tokens: int) -> dict[str, Any]:
    torch._dynamo.reset()
    report = sparsecc.Report()
    options = {"recipe": recipe, "report": report}
    fast = torch.compile(lambda ids: forward(ids), backend="sparsecc", options=options)
    found: dict[str, Any] = {"perplexity": smollm2.perplexity(fast, tokens=tokens, context=CONTEXT)}
    if recipe is not None:
        found["applied"] = report["quantize-linear"].applied
        found["refused"] = sorted({m.code for m in report["quantize-linear"].refusals})
    return found


def megabytes(seen: Any, recipe: Recipe | None) -> float:
    """What a call reads of the weights of all sites that were seen, in MB."""
    chosen = recipe or Recipe("none")
    return sum(nbytes(seen, chosen, n, chosen.sites.get(n, DENSE)) for n in seen.sites) / 1e6
