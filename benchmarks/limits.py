"""What the machine can do at most: measured streaming bandwidth and matrix throughput."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def limits() -> dict[str, float]:
    """Bytes per second of a streaming read and FLOP per second of a large fp32 product (best of several)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = torch.ones(64 * 2**20, device=device)
    matrix = torch.randn(2048, 2048, device=device)
    read = _best(lambda: stream.sum())
    product = _best(lambda: matrix @ matrix)
    return {
        "gigabytes_per_second": round(stream.nbytes / read / 1e9, 1),
        "fp32_gigaflops": round(2 * 2048**3 / product / 1e9, 1),
    }


def _best(call: Callable[[], object], rounds: int = 31) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def counted(forward: Callable[..., object], *inputs: object) -> float:
    """FLOPs of the matrix products and convolutions of one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        forward(*inputs)
    return float(counter.get_total_flops())
