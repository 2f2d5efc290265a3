"""Products of many rows with a quantized weight: prefill. Beside fp32, and what PyTorch has for int8.

The limit is arithmetic: on one core of a shared AMD EPYC (Zen 4) a loop of nothing but VNNI instructions
makes 472 billion operations a second, one of fp32 multiply-adds 118 billion. ``torch._int_mm`` (oneDNN)
reaches 338 to 423 of them without rounding activations, 80 to 320 with, as ATen does that in passes of its
own; ``linear`` in fp32 reaches 60 to 99.

Prediction, written before the kernels for many rows: int8 reaches 85% of the limit (400) at 512 rows, 350
at 128, and 250 at 32, where laying out a tile of weights costs as much as multiplying it with ten rows.
That is 1.1 to 1.7 times ``_int_mm`` with activations rounded by ATen. A static step is as fast, less one
pass over the rows. int4 with int8 activations reaches 85% of int8, as each group has a scale of its own;
int4 with float activations what ``linear`` reaches in fp32, where dequantizing first loses a factor of 1.2
to 5. Kernels for few rows reached 100 to 270 (int8) and 60 (int4g32) at these sizes.

What came out, in the least disturbed runs: int8 350 to 407 at 512 rows, 290 to 347 at 128 and 267 to 302 at
32. That is 1.1 to 2 times ``_int_mm`` with rounding by ATen at every size; ``_int_mm`` alone, which rounds
and scales nothing, is 1.0 to 1.2 times as fast as int8, and 0.9 times with long rows at 32. The product of
tiles itself runs at 99% of the limit; rounding activations takes 6% of the time at 512 rows, and laying out
weights a quarter at 32. A static step is 1.02 to 1.15 times as fast as rounding by rows. Wrong: int4 with
int8 activations reaches 89 to 100% of int8; int4 with float activations (106 to 111 at 512 rows) is 1.1
times ``linear`` in fp32, and more against dequantizing first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from sparsecc.codegen.cpp import few_rows as generator
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec, few_rows_native
from sparsecc.runtime.ops.formats import Format
from sparsecc.timing import side_by_side

SIZES = ((576, 1536), (1536, 576), (2048, 5632))  # features, size
ROWS = (32, 128, 512)
FORMATS = ("int8", "int8s", "int8x32", "int8x64", "int4g64a8", "int4g32")
ROUNDS = 9


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    del limits
    data: dict[str, Any] = {}
    rows = [
        "| weight | rows | variant | time | 10⁹ operations/s | x linear fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for features, size in SIZES:
        for m in ROWS:
            timings = side_by_side(_variants(features, size, m), rounds=ROUNDS)
            # The least disturbed round: arithmetic in the cache has no other spread.
            best = {name: min(timing.seconds) for name, timing in timings.items()}
            entry = data[f"{features}x{size}, {m} rows"] = {}
            for name, seconds in best.items():
                rate = 2e-9 * m * features * size / seconds
                entry[name] = {"microseconds": seconds * 1e6, "gigaoperations_per_second": rate}
                gain = best["linear fp32"] / seconds
                rows.append(
                    f"| {features}x{size} | {m} | {name} | {seconds * 1e6:.0f} us | {rate:.0f} | {gain:.2f}x |"
                )
                print(rows[-1], flush=True)
    return data, "\n".join(rows)


def _variants(features: int, size: int, m: int) -> dict[str, Callable[[], Any]]:
    weight, x = torch.randn(features, size) / size**0.5, torch.randn(m, size)
    found: dict[str, Callable[[], Any]] = {"linear fp32": lambda: F.linear(x, weight)}
    q, scale = formats.quantize(weight, "int8")
    packed = formats.quantize(weight, "int4g32")

    def integers() -> torch.Tensor:
        y, step = formats.quantize_rows(x)
        return torch._int_mm(y.to(torch.int8), q.t()) * (step * scale)

    whole = torch.randint(-127, 128, (m, size), dtype=torch.int8)
    own = (
        q.clone()
    )  # each variant reads a weight of its own: no other has brought it into the cache
    found["_int_mm alone"] = lambda: torch._int_mm(whole, own.t())
    found["rounding, _int_mm"] = integers
    levels = q.clone()
    found["int8 to fp32, linear"] = lambda: F.linear(x, levels * scale[:, None])
    found["int4g32 to fp32, linear"] = lambda: F.linear(
        x, formats.dequantize("int4g32", packed, torch.float32)
    )
    for name in FORMATS:
        if size % Format.of(name).multiple == 0:
            spec = Spec("none", 0.0, ("p0",), (name,))
            generator.load(spec)
            tensors = list(formats.quantize(weight, name))
            found[name] = functools.partial(few_rows_native, x, tensors, [], spec.text())
    return found
