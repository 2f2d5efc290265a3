"""The main job on real models with real weights: what is rewritten, how exact it is, what it costs and gains.

    make demo

Two models: a vision transformer with pre-LayerNorm and LayerScale (DINOv2's ViT-S/14, scored by a linear
probe on handwritten digits), and a small language model (SmolLM2-135M, RMSNorm, scored by its perplexity on
Wikipedia). Writes ``out/demo-*.html``. Takes a few minutes on two cores, most of it Inductor's compile time.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from zoo import smollm2, vit_focus

import sparsecc
from sparsecc.timing import ratio, side_by_side

console = Console(width=100)
OUT = pathlib.Path(__file__).resolve().parent.parent / "out"


@dataclass
class Job:
    """A model, an input to time it on, and the metric of its task."""

    name: str
    load: Callable[[], torch.nn.Module]
    forward: Callable[[Any], Callable[..., torch.Tensor]]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    metric: Callable[[Callable[..., torch.Tensor]], float]
    unit: str
    passes: tuple[str, ...]


JOBS = (
    Job(
        "DINOv2 ViT-S/14 (LayerNorm, LayerScale)",
        vit_focus.load_backbone,
        vit_focus.as_forward,
        lambda: (vit_focus.digits(25)[0],),
        lambda forward: vit_focus.probe_accuracy(forward, train=400, test=200, batch=25),
        "accuracy of a linear probe on digits",
        ("fold-layerscale", "fold-norm-affine", "layernorm-to-rmsnorm"),
    ),
    Job(
        "SmolLM2-135M (RMSNorm)",
        smollm2.load,
        smollm2.as_forward,
        lambda: (smollm2.windows(256, context=256),),
        lambda forward: smollm2.perplexity(forward, tokens=2048, context=256),
        "perplexity on Wikipedia",
        ("fold-norm-affine",),
    ),
)


def step(words: str) -> Callable[[], None]:
    """Say what is running; the function returned says how long it took."""
    console.print(f"  [dim]… {words}[/dim]")
    started = time.perf_counter()
    return lambda: console.print(f"    [dim]{time.perf_counter() - started:.0f} s[/dim]")


def run(job: Job) -> None:
    console.rule(f"[bold]{job.name}")
    done = step("loading the weights")
    model = job.load()
    inputs = job.inputs()
    report = sparsecc.Report(model=job.name)
    eager = job.forward(model)
    done()

    done = step("compiling with sparsecc, and proving the result against fp64 at its first call")
    options = {"report": report, "verify": "final", "require": dict.fromkeys(job.passes, 1)}
    fast = torch.compile(eager, backend="sparsecc", options=options)
    fast(*inputs)
    done()
    done = step("compiling with Inductor")
    inductor = torch.compile(eager)
    inductor(*inputs)
    done()
    console.print(report)
    if not report.verified:
        raise SystemExit("the rewritten model failed its proof")

    done = step(f"{job.unit}, eager and rewritten")
    before, after = job.metric(eager), job.metric(fast)
    done()
    console.print(
        f"  {job.unit}: eager [bold]{before:.4f}[/bold], sparsecc [bold]{after:.4f}[/bold]"
    )

    done = step("timing side by side")
    timings = side_by_side(
        {
            "eager": lambda: eager(*inputs),
            "Inductor": lambda: inductor(*inputs),
            "sparsecc": lambda: fast(*inputs),
        },
        rounds=9,
    )
    done()
    table = Table("variant", "median", "spread", "against Inductor", box=None, padding=(0, 3))
    for name, timing in timings.items():
        table.add_row(
            name,
            f"{timing.median * 1e3:.1f} ms",
            f"±{timing.spread:.1%}",
            f"{ratio(timings, name, 'Inductor'):.3f}x",
        )
    console.print(table)
    page = OUT / f"demo-{job.name.split()[0].lower()}.html"
    OUT.mkdir(exist_ok=True)
    report.to_html(page)
    console.print(f"  report: {page.relative_to(OUT.parent)}\n")


def main() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for job in JOBS:
            run(job)


if __name__ == "__main__":
    main()
