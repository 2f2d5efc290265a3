"""Activation sparsity on SmolLM2-135M: what leaving neurons out costs, and what it spares.

Prediction, written before measuring. A token reads 134 M weights, 80 M of them in feed-forward networks. CATS
at 30, 50 and 70% spares two thirds of that share of them: 16, 27 and 37 M, so at most 1.14x, 1.25x and 1.38x
over sparsecc's dense fp32, and half of that gain for what is not reading. TEAL at 25, 40 and 50% spares that
share of all layers but the head, 27, 42 and 53 M: at most 1.25x, 1.46x and 1.65x, and less than half of the
gain, as every layer becomes a call of its own and norms are fused no more. CoreInfer at 0.4 spares 48 M: at
most 1.55x, likely 1.35x. In int8 a layer's weights take 30 µs to read, and calls as much: 1.0x to 1.2x.
The papers' models have fifty times as many weights and lose 1-2% of perplexity at CATS 50% and TEAL 40%; here
10% and 10% are likely, and tens of percent above.

Papers' claims: CATS 50%: within 1-2% of the base model's accuracy, about 15% less latency for a token; TEAL
40-50%: 1.53x and 1.8x on GPUs; CoreInfer: 10.3x over transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from decode import Decoder
from decode_quantized import names_of
from torch import nn
from torch.nn import functional as F
from zoo import smollm2

import sparsecc
from sparsecc.methods import make
from sparsecc.observe import observe
from sparsecc.observe_ffn import observe_ffn
from sparsecc.recipe import Recipe
from sparsecc.sparsity import density
from sparsecc.timing import ratio, side_by_side

CONTEXT, TOKENS = 512, 8_192
CALIBRATION = 8  # windows, behind those that are measured
PROMPT, LENGTH, PROMPTS = 256, 320, 16  # of CoreInfer: read, read and answered, how many
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "CATS 30%": ("cats", {"sparsity": 0.3}),
    "CATS 50%": ("cats", {"sparsity": 0.5}),
    "CATS 70%": ("cats", {"sparsity": 0.7}),
    "CETT 0.2": ("cett", {"cett": 0.2}),
    "TEAL 25%": ("teal", {"sparsity": 0.25, "skip": ["*embed_tokens*"]}),
    "TEAL 40%": ("teal", {"sparsity": 0.4, "skip": ["*embed_tokens*"]}),
    "TEAL 50%": ("teal", {"sparsity": 0.5, "skip": ["*embed_tokens*"]}),
    "CoreInfer 0.4": ("coreinfer", {"beta": 0.4}),
}
INT8 = "int8x32"


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    model = smollm2.load()
    recipes = _recipes(model)
    data: dict[str, Any] = _qualities(model, recipes)
    torch._dynamo.reset()  # once: each decoder would be compiled again
    decoders = {"inductor": Decoder("inductor", model, 1, {"backend": "inductor"})}
    for name, recipe in recipes.items():
        row = data[name]
        row["density"] = density(recipe) if recipe.sparsity else 1.0
        row["megabytes"] = _megabytes(model, recipe)
        options = {"recipe": recipe, "report": (report := sparsecc.Report())}
        decoder = Decoder(name, model, 1, {"backend": "sparsecc", "options": options})
        decoder.one()
        decoders[name] = decoder
        row["kernels"] = [
            {"region": k.region, "chosen": k.chosen, "count": k.count, "seconds": k.seconds}
            for g in report.graphs
            for k in g.kernels
        ]
    timings = side_by_side({n: d.one for n, d in decoders.items()}, rounds=15, warmup=3)
    lines = [
        f"Perplexity of {TOKENS} tokens in windows of {CONTEXT}, by kernels; of CoreInfer, of the "
        f"{LENGTH - PROMPT} tokens behind each of {PROMPTS} prompts of {PROMPT}, decoded one by one, beside "
        "the dense model's on the same tokens. Floor: the bytes that a token reads at the stated density.",
        "",
        "| | density | perplexity | | ms a token | over Inductor | over dense of its format | floor ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data.items():
        dense = "dense int8" if "int8" in name else "dense"
        row |= {
            "median_ms": timings[name].median * 1e3,
            "spread": timings[name].spread,
            "over_inductor": ratio(timings, name, "inductor"),
            "over_dense": ratio(timings, name, dense),
            "floor_ms": row["megabytes"] / limits["gigabytes_per_second"],
        }
        lines.append(
            f"| {name} | {row['density']:.0%} | {row['perplexity']:.2f} | {row['increase']:+.1%} | "
            f"{row['median_ms']:.1f} ±{row['spread']:.0%} | {row['over_inductor']:.2f}x | "
            f"{row['over_dense']:.2f}x | {row['floor_ms']:.1f} |"
        )
    lines.append(f"\nInductor's fp32: {timings['inductor'].median * 1e3:.1f} ms a token.")
    data["files"] = {"sparsity.svg": _plot(data)}
    return data, "\n".join(lines)


def _recipes(model: nn.Module) -> dict[str, Recipe]:
    forward = smollm2.as_forward(model)
    windows = smollm2.windows(CALIBRATION * CONTEXT, context=CONTEXT, start=60_000).split(1)
    seen = {
        "ffn": observe_ffn(forward, windows, progress=False),
        "input": observe(forward, windows, progress=False),
    }
    found = {"dense": Recipe("none"), "dense int8": Recipe("int8")}
    for name, (method, options) in METHODS.items():
        of = seen["input" if method == "teal" else "ffn"]
        found[name] = make(method, of, **options)
        found[f"{name} int8"] = make(method, of, **options)
    for name, recipe in found.items():
        if "int8" in name:
            recipe.sites = dict.fromkeys(names_of(model), INT8)
    return found


def _megabytes(model: nn.Module, recipe: Recipe) -> float:
    """Of weights that a token reads, at the densities of the recipe."""
    total = 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        site = names[id(module.weight)]
        own = recipe.sparsity.get(site, {})
        network = recipe.sparsity.get(f"{name.rpartition('.')[0]}.down_proj.weight", {})
        share = own.get("density", 1.0) if own.get("law") == "input" else 1.0
        law = network.get("law", "input") if "mlp" in name else "input"
        if law == "core" or (law != "input" and "gate" not in name):
            share = network["density"]
        each = 1 if recipe.sites else module.weight.element_size()
        total += module.weight.numel() * share * each / 1e6
    return total


def _qualities(model: nn.Module, recipes: dict[str, Recipe]) -> dict[str, dict[str, float]]:
    """Perplexity under each recipe, and over that of the model as it is on the same tokens."""
    cores = {n for n, r in recipes.items() if any(e["law"] == "core" for e in r.sparsity.values())}
    whole = _windows(model, recipes["dense"])
    answered = _answered(model, recipes["dense"]) if cores else whole
    found = {"dense": {"perplexity": whole, "increase": 0.0}}
    for name, recipe in recipes.items():
        if name == "dense":
            continue
        core = name in cores
        value, base = (_answered if core else _windows)(model, recipe), answered if core else whole
        found[name] = {"perplexity": value, "increase": value / base - 1, "dense_on_these": base}
        print(name, found[name], flush=True)
    return found


def _windows(model: nn.Module, recipe: Recipe) -> float:
    """Perplexity of whole windows."""
    torch._dynamo.reset()
    forward = smollm2.as_forward(model)
    # Integer kernels run as they would; the rest need not be compiled to be judged.
    options = {"recipe": recipe, "lower": "aot_eager", "codegen": "cpp"}
    fast = torch.compile(lambda ids: forward(ids), backend="sparsecc", options=options)
    return smollm2.perplexity(fast, tokens=TOKENS, context=CONTEXT)


def _answered(model: nn.Module, recipe: Recipe) -> float:
    """Perplexity of what follows prompts, one token a call, with the core that the prompt chose."""
    from transformers import StaticCache

    torch._dynamo.reset()
    sparsecc.reset_cores()
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)

    def step(tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        for layer in cache.layers:
            if getattr(layer, "cumulative_length", None) is not None:
                layer.cumulative_length = position[0].clone()
        result: torch.Tensor = model(
            tokens, past_key_values=cache, cache_position=position, position_ids=position[None]
        ).logits
        return result

    fast: Callable[..., torch.Tensor] = torch.compile(
        step, backend="sparsecc", options={"recipe": recipe}, dynamic=False
    )
    loss, count = 0.0, 0
    for ids in smollm2.windows(PROMPTS * LENGTH, context=LENGTH).split(1):
        cache.reset()
        logits = fast(ids[:, :PROMPT], torch.arange(PROMPT))[:, -1]
        for i in range(PROMPT, LENGTH):
            loss += F.cross_entropy(logits.float(), ids[:, i]).item()
            count += 1
            logits = fast(ids[:, i : i + 1], torch.tensor([i]))[:, -1]
    return math.exp(loss / count)


def _plot(data: dict[str, Any]) -> str:
    """Perplexity against time, an SVG: one point a row."""
    rows = {n: r for n, r in data.items() if n != "files"}
    xs = [r["median_ms"] for r in rows.values()]
    ys = [max(r["increase"], 0.0) * 100 for r in rows.values()]
    wide, high, left, low = 640, 400, 60, 40
    most = max(*ys, 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / max(xs) * (wide - left - 120), high - low - math.log1p(y) / math.log1p(
            most
        ) * (high - low - 20)

    marks = []
    for (name, row), y in zip(rows.items(), ys, strict=True):
        px, py = at(row["median_ms"], y)
        colour = "#1f77b4" if "int8" in name else "#d62728"
        marks.append(
            f'<circle cx="{px:.0f}" cy="{py:.0f}" r="4" fill="{colour}"/>'
            f'<text x="{px + 7:.0f}" y="{py + 4:.0f}" font-size="10">{name}</text>'
        )
    ticks = [
        f'<text x="{left - 8}" y="{at(0, y)[1] + 4:.0f}" font-size="10" text-anchor="end">+{y:g}%</text>'
        for y in (0, 1, 3, 10, 30, 100, 300)
        if y <= most
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" font-family="sans-serif">'
        f'<rect width="{wide}" height="{high}" fill="white"/>'
        f'<line x1="{left}" y1="{high - low}" x2="{wide - 20}" y2="{high - low}" stroke="black"/>'
        f'<line x1="{left}" y1="10" x2="{left}" y2="{high - low}" stroke="black"/>'
        f'<text x="{wide / 2:.0f}" y="{high - 8}" font-size="12" text-anchor="middle">'
        f"ms a token (0 to {max(xs):.0f})</text>"
        f"{''.join(ticks)}{''.join(marks)}</svg>\n"
    )
