"""A stream of d features beside the same stream with one of them left out: what an odd width costs.

Prediction, written before measuring: the products lose 1/d of their work, 0.1% to 0.4% here, and each norm
gains one sum, which Inductor fuses. Rows of d − 1 numbers do not begin on a cache line where rows of d do, so
from an even d the narrower stream is slower by some percent; from d + 1 to d it is faster by as much. So the
pass pays only for widths that are just too wide, which no published network has: not by default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sparsecc
from sparsecc.timing import ratio, side_by_side

TO_RMS = ("fold-norm-affine", "layernorm-to-rmsnorm")
TO_CRMS = (*TO_RMS, "layernorm-to-crmsnorm")
WIDTHS = (256, 768)
TOKENS = 128


class Block(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def network(d: int, hidden: int, blocks: int = 4) -> nn.Module:
    """Pre-norm blocks between two layers of the same even width, all parameters random."""
    layers = [Block(d, hidden) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(64, d), *layers, nn.LayerNorm(d), nn.Linear(d, 64)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    del limits
    x = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(1))
    data: dict[str, Any] = {}
    rows = [
        "| stream | RMSNorm | CRMSNorm | CRMSNorm / RMSNorm | counted FLOPs saved |",
        "|---|---|---|---|---|",
    ]
    for base in WIDTHS:
        torch._dynamo.reset()
        calls, reports = {}, {}
        for d in (base, base + 1):
            model = network(d, 4 * base)
            for name, passes in (("rms", TO_RMS), ("crms", TO_CRMS)):
                report = sparsecc.Report()
                options = {"passes": list(passes), "report": report}
                fast = torch.compile(model, backend="sparsecc", options=options)
                result, expected = fast(x), model(x)  # outputs are checked before anything is timed
                assert float((result - expected).abs().max() / expected.abs().max()) < 1e-4
                calls[f"{name} {d}"] = lambda f=fast: f(x)
                reports[f"{name} {d}"] = report
        timings = side_by_side(calls, rounds=101, warmup=5)
        for d in (base, base + 1):
            assert reports[f"crms {d}"]["layernorm-to-crmsnorm"].applied == 1
            pair = {n: timings[f"{n} {d}"] for n in ("rms", "crms")}
            entry: dict[str, Any] = {
                n: {"median_ms": t.median * 1e3, "spread": t.spread} for n, t in pair.items()
            }
            entry["crms_over_rms"] = ratio(pair, "crms", "rms")
            counted = sum(2 * TOKENS * p.numel() for p in network(d, 4 * base).parameters())
            saved = reports[f"crms {d}"]["layernorm-to-crmsnorm"].flops_saved
            entry["flops_saved"] = saved / counted
            data[f"{d} to {d - 1}"] = entry
            cells = [f"{entry[n]['median_ms']:.2f} ms ±{entry[n]['spread']:.0%}" for n in pair]
            rows.append(
                f"| {d} → {d - 1} | {' | '.join(cells)} | {entry['crms_over_rms']:.3f}x | "
                f"{entry['flops_saved']:.2%} |"
            )
            print(rows[-1], flush=True)
    rows += ["", f"{TOKENS} tokens, 4 blocks, fp32, through Inductor; all of one width in one run."]
    return data, "\n".join(rows)
