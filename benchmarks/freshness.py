"""What checking the weights costs at each call.

Prediction: 150 sources need one identity tuple (4 µs), versions and addresses (18 µs) and one concatenation
of samples (45 µs): about 70 µs, under 2% of a call of 4 ms or more.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

import sparsecc


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def network(d: int = 256, layers: int = 25) -> nn.Module:
    """25 blocks of 6 parameters: 150, all of them sources of a fold."""
    return nn.Sequential(
        nn.Linear(d, d), *(Block(d) for _ in range(layers)), nn.LayerNorm(d), nn.Linear(d, d)
    )


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    del limits
    data: dict[str, Any] = {}
    rows = ["| freshness | sources | check | call | share |", "|---|---|---|---|---|"]
    x = torch.randn(256, 256)
    for mode in ("version", "probe", "hash"):
        torch._dynamo.reset()
        model = network().eval()
        options = {"freshness": mode, "report": (report := sparsecc.Report())}
        made = _record_fresh_weights()
        fast = torch.compile(model, backend="sparsecc", options=options)
        fast(x)
        (weights,) = made
        sources = next(iter(weights._entries.values())).refs
        tensors = [r() for r in sources]
        check = _median(lambda w=weights, t=tensors: w.get(t))
        call = _median(lambda f=fast: f(x), rounds=60)
        assert weights.folds == 1
        assert report["layernorm-to-rmsnorm"].applied == 26
        data[mode] = {"sources": len(tensors), "check_us": check * 1e6, "call_us": call * 1e6}
        rows.append(
            f"| {mode} | {len(tensors)} | {check * 1e6:.0f} µs | {call * 1e6:.0f} µs | {check / call:.1%} |"
        )
    return data, "\n".join(rows)


def _record_fresh_weights() -> list[Any]:
    from sparsecc import driver
    from sparsecc.runtime.fresh import FreshWeights

    made: list[Any] = []

    class Recorded(FreshWeights):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    driver.FreshWeights = Recorded  # type: ignore[misc]
    return made


def _median(call: Any, rounds: int = 300) -> float:
    for _ in range(10):
        call()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
