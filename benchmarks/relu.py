"""Exact skipping on SmolLM2-135M with ReLU, fine-tuned by ``examples/sparse_finetune.py``: dense beside sparse.

Prediction, written before measuring: at the natural density of about a third, a token reads a third of up and
down: 35 of 134 M weights are spared, at most 1.36x over the dense kernels, likely 1.15x, for a network is one
operator without the norm before it. The greedy tokens are those of eager. Top-k at half of the natural density
spares 18 M more; CETT 0.2 spares less of down than top-k, and nothing more of up; Spark's selection shifts what
stays by the mean and the deviation, which the model was not trained for: its perplexity is ruined.
"""

from __future__ import annotations

from typing import Any

import torch
from decode import TOKENS as GREEDY
from decode import Decoder
from decode_quantized import names_of
from sparse_finetune import load
from zoo import smollm2

import sparsecc
from sparsecc.recipe import Recipe
from sparsecc.sparsity import density
from sparsecc.timing import ratio, side_by_side

STEPS, LENGTH_OF_STEP, WEIGHT = 300, 128, 2.0  # of the fine-tuning
TOKENS, CONTEXT = 10_240, 512
FORMAT = "int8x32"


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    del limits
    model = load(STEPS, LENGTH_OF_STEP, WEIGHT)
    forward = smollm2.as_forward(model)
    behind = smollm2.windows(4 * CONTEXT, context=CONTEXT, start=TOKENS + CONTEXT).split(1)
    natural = sparsecc.sparsify(forward, behind, "cats", sparsity=0.01, progress=False)
    assert not any(float(t) for t in natural.thresholds.values())  # zeros alone are skipped
    natural_density = density(natural)
    half = 1 - natural_density / 2
    lossy = {
        "top-k, half of it": ("top", {"sparsity": half}),
        "CETT 0.2": ("cett", {"cett": 0.2}),
        "Spark, half of it": ("gaussian", {"sparsity": half, "on": "output"}),
    }
    recipes = {"int8": Recipe("int8"), "int8, zeros skipped": natural}
    for name, (method, given) in lossy.items():
        for form in ("", "int8, "):
            recipes[form + name] = sparsecc.sparsify(
                forward, behind, method, progress=False, **given
            )
    for name, recipe in recipes.items():
        if "int8" in name:
            recipe.sites = dict.fromkeys(names_of(model), FORMAT)
    settings: dict[str, dict[str, Any]] = {
        "eager": {},
        "inductor": {"backend": "inductor"},
        "dense": {"backend": "sparsecc", "options": {"disable": ["skip-zeros"]}},
        "zeros skipped": {
            "backend": "sparsecc",
            "options": {"count": True, "report": (report := sparsecc.Report())},
        },
        **{n: {"backend": "sparsecc", "options": {"recipe": r}} for n, r in recipes.items()},
    }
    decoders = {}
    sparsecc.reset_live_neurons()
    for name, how in settings.items():
        decoders[name] = Decoder(name.replace(" ", "_").replace(",", ""), model, 1, how)
        decoders[name].one()
    expected = decoders["eager"].greedy()
    same = {n: int((d.greedy() == expected).int().cumprod(-1).sum()) for n, d in decoders.items()}
    live = sparsecc.live_neurons()
    timings = side_by_side({n: d.one for n, d in decoders.items()}, rounds=15, warmup=3)
    data: dict[str, Any] = {
        "density": natural_density,
        "counted": sum(live.values()) / max(len(live), 1),
        "applied": report["skip-zeros"].applied,
    }
    lines = [
        f"ReLU, fine-tuned in {STEPS} steps of {LENGTH_OF_STEP} tokens. "
        f"Natural density {natural_density:.1%} on text, {data['counted']:.1%} counted while decoding; "
        f"skip-zeros applied {data['applied']} times.",
        "",
        "| | ms a token | over Inductor | over dense | first tokens as eager's | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for name, timing in timings.items():
        row = data[name] = {
            "median_ms": timing.median * 1e3,
            "spread": timing.spread,
            "same": same[name],
        }
        row["over_inductor"] = ratio(timings, name, "inductor")
        dense = "int8" if "int8" in name else "dense"
        row["over_dense"] = ratio(timings, name, dense)
        row["perplexity"] = _perplexity(forward, settings[name])
        lines.append(
            f"| {name} | {row['median_ms']:.1f} ±{row['spread']:.0%} | {row['over_inductor']:.2f}x | "
            f"{row['over_dense']:.2f}x | {row['same']} of {GREEDY + 1} | {row['perplexity']:.3f} |"
        )
    return data, "\n".join(lines)


def _perplexity(forward: Any, how: dict[str, Any]) -> float:
    torch._dynamo.reset()
    fast = torch.compile(lambda ids: forward(ids), **how) if how else forward
    return smollm2.perplexity(fast, tokens=TOKENS, context=CONTEXT)
