"""Decoding with SmolLM2-135M: one token a call over a static cache, beside the time of reading the weights.

Prediction, written before measuring: a token reads 538 MB of weights, and PyTorch's products for one row reach
under half of the bandwidth. With every product in a generated kernel (four a layer, the norm and the residual
inside), the products should take 1.2 times the floor, and attention, rotation and Python the rest: about 2x
Inductor at batch 1, less as the batch grows and arithmetic counts, and never below 1x, as each region is
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo import smollm2

import sparsecc
from sparsecc.timing import ratio, side_by_side

BATCHES = (1, 2, 4, 8, 16)
PROMPT, LENGTH = 64, 256  # tokens in the cache before, and its size
TOKENS = 24  # decoded greedily and compared

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "inductor": {"backend": "inductor"},
    "freezing": {"backend": "inductor"},
    "aten": {"backend": "sparsecc"},
    "sparsecc": {"backend": "sparsecc", "options": {"codegen": "auto"}},
}


class Decoder:
    """One variant: a compiled step over a cache of its own."""

    def __init__(self, name: str, model: nn.Module, batch: int, how: dict[str, Any]) -> None:
        from transformers import StaticCache

        self.cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        prompt = smollm2.windows(PROMPT * batch, context=PROMPT)
        self.next = self._step(model, prompt, torch.arange(PROMPT))[:, -1:].argmax(-1)
        self.start = [(layer.keys.clone(), layer.values.clone()) for layer in self.cache.layers]

        def step(tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            return self._step(model, tokens, position)

        # Code of its own: Dynamo would run what it compiled for another variant.
        step.__code__ = step.__code__.replace(co_name=f"step_{name}")
        self.step: Callable[..., torch.Tensor] = torch.compile(step, **how) if how else step

    def _step(self, model: nn.Module, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        for layer in self.cache.layers:  # the cache counts calls; here the position says where
            if getattr(layer, "cumulative_length", None) is not None:
                layer.cumulative_length = position[0].clone()
        result: torch.Tensor = model(
            tokens, past_key_values=self.cache, cache_position=position, position_ids=position[None]
        ).logits
        return result

    def one(self) -> torch.Tensor:
        return self.step(self.next, torch.tensor([PROMPT]))

    def greedy(self) -> torch.Tensor:
        """The tokens [batch, TOKENS] that follow the prompt."""
        tokens = [self.next]
        for i in range(TOKENS):
            tokens.append(self.step(tokens[-1], torch.tensor([PROMPT + i]))[:, -1:].argmax(-1))
        return torch.cat(tokens, 1)


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    model = smollm2.load()
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    floor = weights / (limits["gigabytes_per_second"] * 1e9)
    data: dict[str, Any] = {"floor_ms": floor * 1e3, "weights_mb": weights / 1e6}
    names = [*VARIANTS]
    rows = [
        f"| batch | {' | '.join(names)} | sparsecc / Inductor | / better | share of the floor |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for batch in BATCHES:
        entry = data[f"batch {batch}"] = _measure(model, batch)
        entry["share_of_floor"] = data["floor_ms"] / entry["sparsecc"]["median_ms"]
        cells = [f"{entry[n]['median_ms']:.1f} ms ±{entry[n]['spread']:.0%}" for n in names]
        rows.append(
            f"| {batch} | {' | '.join(cells)} | {entry['over_inductor']:.2f}x | "
            f"{entry['over_better']:.2f}x | {entry['share_of_floor']:.0%} |"
        )
        print(rows[-1], flush=True)
    rows.append(f"\nReading {weights / 1e6:.0f} MB of weights once takes {floor * 1e3:.1f} ms.")
    return data, "\n".join(rows)


def _measure(model: nn.Module, batch: int) -> dict[str, Any]:
    torch._dynamo.reset()
    report = sparsecc.Report()
    VARIANTS["sparsecc"]["options"]["report"] = report
    decoders = {}
    for name, how in VARIANTS.items():
        with torch._inductor.config.patch(freezing=name == "freezing"):
            decoders[name] = Decoder(name, model, batch, how)
            decoders[name].one()
    expected = decoders["eager"].greedy()  # before anything is timed
    same = {name: bool(torch.equal(d.greedy(), expected)) for name, d in decoders.items()}
    timings = side_by_side({n: d.one for n, d in decoders.items()}, rounds=21, warmup=3)
    entry: dict[str, Any] = {
        n: {"median_ms": t.median * 1e3, "spread": t.spread} for n, t in timings.items()
    }
    entry["same_tokens"] = same
    entry["over_inductor"] = ratio(timings, "sparsecc", "inductor")
    entry["over_better"] = min(entry["over_inductor"], ratio(timings, "sparsecc", "freezing"))
    entry["kernels"] = [
        {"region": k.region, "chosen": k.chosen, "count": k.count, "seconds": k.seconds}
        for k in report.graphs[-1].kernels
    ]
    return entry
