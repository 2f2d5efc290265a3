"""What the machine can do at most: measured streaming bandwidth and matrix throughput."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def limits() -> dict[str, float]:
    """Bytes per second of a streaming read, FLOP per second of large fp32 products or convolutions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = torch.ones(64 * 2**20, device=device)
    matrix = torch.randn(2048, 2048, device=device)
    image = torch.randn(4, 256, 56, 56, device=device).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device).to(memory_format=torch.channels_last)
    read = _best(lambda: stream.sum())
    products = 2 * 2048**3 / _best(lambda: matrix @ matrix)
    # Another library than that of matrix products, and on some processors a faster one.
    flops = 2 * kernel.numel() * 4 * 56 * 56
    convolutions = flops / _best(lambda: torch.nn.functional.conv2d(image, kernel, padding=1))
    return {
        "gigabytes_per_second": round(stream.nbytes / read / 1e9, 1),
        "fp32_gigaflops": round(max(products, convolutions) / 1e9, 1),
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
