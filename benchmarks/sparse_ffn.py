"""A gated feed-forward network that reads live neurons alone, by density, beside its dense twin.

Of 2048 x 5632 weights thrice, the gate is read whole, and of up and down the share that is live: which neurons,
a bias decides at random. The ideal is the bytes that are needed, at the bandwidth of a streaming read in the
same run. Dense: Inductor in fp32, and few_rows' kernels in the same format.

Prediction, written before measuring: in fp32 memory is the limit, and rows that are gathered cost what rows in
a stream do, for they are 8 KiB long and asked for ahead: 85 % of the ideal at all densities, so 2.2 times dense
Inductor at 10 % density, where a third and a fifteenth are read. int8 and int4 are bound by arithmetic, as
their dense products are (75 and 55 % of the bandwidth), and rows of 1 or 2 KiB lie each on pages of their own:
60 and 45 %. All neurons live cost as much as dense ones. In batches the same neurons are live for all rows
here; the crossover moves from 100 % at one row to 60 % at 16: arithmetic is the limit of fp32 there, and ATen's
blocks of products are better than four rows at a time.

Weights take turns so that no cache holds them. A round's best time counts: other processes only add to it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from sparsecc.codegen.cpp import few_rows, sparse_ffn
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec as FewRows
from sparsecc.runtime.ops.few_rows import few_rows_native
from sparsecc.runtime.ops.sparse_ffn import Spec, sparse_ffn_native

SIZE, NEURONS = 2048, 5632
DENSITIES = (1.0, 0.75, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01)
ROWS = (1, 2, 4, 8, 16)
COLD = 96 * 2**20  # bytes that no cache holds
FORMATS = {
    "fp32": ("dense", "dense", "dense"),
    "int8x32": ("int8x32", "int8x32", "int8"),
    "int4g32za8": ("int4g32za8",) * 3,
}
CROSSED = ("fp32", "int8x32")  # at every number of rows
Call = Callable[[], Any]


@torch.no_grad()
def run(
    limits: dict[str, float], seconds: float = 20.0, rows: tuple[int, ...] = ROWS
) -> tuple[dict[str, Any], str]:
    """Times and crossovers.

    Args:
        limits: of the machine; its bandwidth is that of a quiet one, the run's own stands beside it.
        seconds: for each format and number of rows.
        rows: of x.
    """
    data: dict[str, Any] = {"gigabytes_per_second": limits["gigabytes_per_second"]}
    lines = [
        "| weights | rows | density | time | ideal | of the ideal | x dense Inductor fp32 | x dense few_rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in FORMATS:
        for m in rows if name in CROSSED else (1,):
            entry = data[f"{name}, {m} rows"] = _measure(name, m, seconds)
            for density, got in entry["densities"].items():
                cells = [
                    name,
                    f"{m}",
                    f"{density:.0%}",
                    f"{got['microseconds']:.0f} us",
                    f"{got['ideal_microseconds']:.0f} us",
                    f"{got['ideal_microseconds'] / got['microseconds']:.0%}",
                    f"{entry['inductor_microseconds'] / got['microseconds']:.2f}x",
                    f"{entry['few_rows_microseconds'] / got['microseconds']:.2f}x",
                ]
                lines.append(f"| {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    lines += [
        "",
        "Crossover: the density up to which it is faster than dense Inductor in fp32.",
        "",
    ]
    lines += ["| weights | rows | crossover |", "|---|---|---|"]
    for name in CROSSED:
        for m in rows:
            crossed = data[f"{name}, {m} rows"]["crossover"]
            lines.append(f"| {name} | {m} | {'never' if crossed is None else f'{crossed:.0%}'} |")
            print(lines[-1], flush=True)
    return data, "\n".join(lines)


def _measure(name: str, m: int, seconds: float) -> dict[str, Any]:
    """Of one format and ``m`` rows, everything in turn."""
    torch.manual_seed(0)
    forms = FORMATS[name]
    gate, up = (torch.randn(NEURONS, SIZE) / SIZE**0.5 for _ in range(2))
    down = torch.randn(NEURONS, SIZE) / NEURONS**0.5
    x = torch.randn(m, SIZE)
    kept = [formats.quantize(w, form) for w, form in zip((gate, up, down), forms, strict=True)]
    sizes = [sum(part.nbytes for part in parts) for parts in kept]
    turns: dict[Any, list[Call]] = {
        "read": [torch.ones(sum(sizes) // 4).sum for _ in _copies(sum(sizes))]
    }
    turns["inductor"] = _inductor(x, gate, up, down)
    turns["few_rows"] = _few_rows(
        x, forms, kept[:2], formats.quantize(down.t().contiguous(), forms[2])
    )
    turns |= _sparse(x, Spec("relu(p0 + v0)", "a * p1", formats=forms), kept)
    best = _best(turns, seconds)
    bandwidth = sum(sizes) / best["read"]
    densities = {
        density: {
            "microseconds": best[density] * 1e6,
            "ideal_microseconds": (sizes[0] + density * (sizes[1] + sizes[2])) / bandwidth * 1e6,
        }
        for density in DENSITIES
    }
    return {
        "gigabytes_per_second": bandwidth / 1e9,
        "inductor_microseconds": best["inductor"] * 1e6,
        "few_rows_microseconds": best["few_rows"] * 1e6,
        "densities": densities,
        "crossover": _crossover([(d, best[d]) for d in DENSITIES], best["inductor"]),
    }


def _best(turns: dict[Any, list[Call]], seconds: float) -> dict[Any, float]:
    """The best time of each, over rounds in which all take turns."""
    best = dict.fromkeys(turns, math.inf)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, calls in turns.items():
            for call in calls:
                started = time.perf_counter()
                call()
                if rounds:  # the first one warms up
                    best[name] = min(best[name], time.perf_counter() - started)
        rounds += 1
    return best


def _crossover(times: list[tuple[float, float]], dense: float) -> float | None:
    """The density at which ``dense`` seconds are needed, between those measured; None: none is faster."""
    for (above, slow), (below, fast) in itertools.pairwise(times):
        if slow <= dense:
            return above
        if fast < dense:
            return below + (above - below) * (dense - fast) / (slow - fast)
    return None


def _copies(nbytes: int) -> range:
    return range(math.ceil(COLD / nbytes))


def _inductor(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> list[Call]:
    torch._dynamo.reset()

    def dense(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.relu(F.linear(x, g)) * F.linear(x, u), d)

    compiled = torch.compile(dense, backend="inductor", dynamic=False)
    weights = (gate, up, down.t().contiguous())
    copies = [[w.clone() for w in weights] for _ in _copies(3 * gate.nbytes)]
    return [lambda each=each: compiled(x, *each) for each in copies]  # type: ignore[misc]


def _few_rows(
    x: torch.Tensor,
    forms: tuple[str, ...],
    first: list[tuple[torch.Tensor, ...]],
    down: tuple[torch.Tensor, ...],
) -> list[Call]:
    """All neurons by the kernels that the sparse one is made of."""
    specs = (
        FewRows("none", 0.0, ("relu(p0) * p1",), forms[:2]),
        FewRows("none", 0.0, ("p0",), forms[2:]),
    )
    for spec in specs:
        few_rows.load(spec)
    texts = [spec.text() for spec in specs]
    parts = [part for each in first for part in each]
    nbytes = sum(part.nbytes for part in (*parts, *down))

    def dense(pair: list[torch.Tensor], last: list[torch.Tensor]) -> Any:
        (h,) = few_rows_native(x, pair, [], texts[0])
        return few_rows_native(h, last, [], texts[1])

    copies = [([p.clone() for p in parts], [p.clone() for p in down]) for _ in _copies(nbytes)]
    return [lambda each=each: dense(*each) for each in copies]  # type: ignore[misc]


def _sparse(
    x: torch.Tensor, spec: Spec, kept: list[tuple[torch.Tensor, ...]]
) -> dict[float, list[Call]]:
    """Calls by density; as many neurons as it says are live for every row, wherever they are."""
    sparse_ffn.load(spec)
    text = spec.text()
    parts = [part for each in kept for part in each]
    copies = [[p.clone() for p in parts] for _ in _copies(sum(p.nbytes for p in parts))]
    found: dict[float, list[Call]] = {}
    for density in DENSITIES:
        live = torch.randperm(NEURONS) < round(density * NEURONS)
        bias = torch.where(live, 100.0, -100.0)

        def call(weights: list[torch.Tensor], bias: torch.Tensor = bias) -> torch.Tensor:
            result: torch.Tensor = sparse_ffn_native(x, weights, [bias], None, text)
            return result

        # Before anything is timed: what is computed is what was meant.
        gate, up, down = (
            formats.dequantize(form, tensors, torch.float64)
            for form, tensors in zip(spec.formats, kept, strict=True)
        )
        wide = x.double()
        h = torch.relu(wide @ gate.T + bias) * (wide @ up.T)
        got, exact = call(parts), h @ down
        assert (got - exact).norm() < 0.02 * exact.norm(), (
            density
        )  # activations are rounded to int8
        found[density] = [lambda each=each, call=call: call(each) for each in copies]  # type: ignore[misc]
    return found
