"""Generated kernels of ``sparsecc::few_rows`` beside ATen, region by region of a decoder, over cold weights.

On a GPU the Triton kernels, in every way they are cut that is worth measuring; without one the C++ kernel.

Prediction for GPUs, written before any was measured: at one row ATen's products of 16-bit weights reach 60 to
85 % of the memory's bandwidth where the weights are large, and launches rule where they are small; the kernels
win by the launches and the passes they save (norm, gate, residual), 1.1 to 1.5x a region, and lose at 16 rows
of float32, where ``tl.dot`` has no matrix units to use.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsecc.measurement import measure
from sparsecc.regions import KINDS, Variant
from sparsecc.runtime.ops.few_rows import Spec, few_rows

# Name, spec, features of each weight and size k, as shares of the width; those of Llama-like layers.
REGIONS = {
    "norm, q, k, v": (Spec("rms", 1e-5, ("p0", "p1", "p2")), (1.0, 0.25, 0.25), 1.0),
    "output and residual": (Spec("none", 0.0, ("t0 + p0",)), (1.0,), 1.0),
    "norm, gate, up": (Spec("rms", 1e-5, ("silu(p0) * p1",)), (3.5, 3.5), 1.0),
    "down and residual": (Spec("none", 0.0, ("t0 + p0",)), (1.0,), 3.5),
}


def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    on_gpu = torch.cuda.is_available()
    device, width = ("cuda", 4096) if on_gpu else ("cpu", 1024)
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if on_gpu else [torch.float32]
    data: dict[str, Any] = {}
    lines = [
        "| region | dtype | rows | ATen | kernel | faster by | of the bandwidth | variant |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (spec, shares, size) in REGIONS.items():
        for dtype in dtypes:
            for rows in (1, 4, 16):
                like = {"dtype": dtype, "device": device}
                k = int(size * width)
                weights = [torch.empty(int(n * width), k, **like) for n in shares]
                operands = [torch.empty(rows, width, **like)] if "t0" in spec.outputs[0] else []
                args = (torch.empty(rows, k, **like), weights, operands, spec.text())
                kind = KINDS[few_rows]
                variants = {"aten": Variant(kind.meaning, "aten"), **kind.kernels(args)}
                seconds, _ = measure(variants, args)
                best = min((n for n in seconds if n != "aten"), key=lambda n: seconds[n])
                floor = sum(w.nbytes for w in weights) / (limits["gigabytes_per_second"] * 1e9)
                kind = str(dtype).removeprefix("torch.")
                data[f"{name}, {kind}, {rows} rows"] = {"seconds": seconds, "floor": floor}
                lines.append(
                    f"| {name} | {kind} | {rows} | {seconds['aten'] * 1e6:.0f} µs | "
                    f"{seconds[best] * 1e6:.0f} µs | {seconds['aten'] / seconds[best]:.2f}x | "
                    f"{floor / seconds[best]:.0%} | {best} |"
                )
                print(lines[-1], flush=True)
    return data, "\n".join(lines)
