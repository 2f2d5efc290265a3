"""DistributedDataParallel: cases that run on every rank."""

from __future__ import annotations

from typing import Any

import torch
from distributed.common import (
    ROUNDING,
    backend,
    batches,
    build,
    close,
    facts,
    loss,
    part,
    same_parameters,
    same_training,
)
from torch.nn.parallel import DistributedDataParallel

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket-view": {"gradient_as_bucket_view": True},
    "static-graph": {"static_graph": True},
    # Two buckets: Dynamo's DDPOptimizer splits the graph.
    "split": {"bucket_cap_mb": 1, "gradient_as_bucket_view": True},
}


def train(kind: str, name: str) -> dict[str, Any]:
    sizes = {"d": 128} if kind == "split" else {}
    model, reference = build(**sizes), build(**sizes)
    parallel = DistributedDataParallel(model, **KINDS[kind])
    chosen, report = backend(name)
    same_training(torch.compile(parallel, **chosen), model, reference, part)
    return facts(report)


def train_inside(name: str) -> dict[str, Any]:
    """The other order: a compiled module, wrapped."""
    model, reference = build(), build()
    chosen, report = backend(name)
    model.compile(**chosen)
    same_training(DistributedDataParallel(model), model, reference, part)
    return facts(report)


def accumulate(name: str) -> dict[str, Any]:
    """Two batches under ``no_sync``, the third one synchronises: the sum of three gradients."""
    model, reference = build(), build()
    parallel = DistributedDataParallel(model)
    chosen, report = backend(name)
    fast = torch.compile(parallel, **chosen)
    *first, last = batches(3)
    with parallel.no_sync():
        for batch in first:
            loss(fast(part(batch))).backward()
    loss(fast(part(last))).backward()
    for batch in (*first, last):
        loss(reference(batch)).backward()
    same_parameters(model, reference, 1e-11, gradients=True)
    return facts(report)


def infer_between_steps(name: str) -> dict[str, Any]:
    """Evaluation during training: folded weights follow the optimizer."""
    model, reference = build(), build()
    parallel = DistributedDataParallel(model)
    chosen, report = backend(name)
    fast = torch.compile(parallel, **chosen)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for batch in batches():
        with torch.no_grad():
            close(fast(part(batch)), part(reference(batch)), ROUNDING * 10)
        for optimizer, result in zip(
            optimizers, (parallel(part(batch)), reference(batch)), strict=True
        ):
            optimizer.zero_grad()
            loss(result).backward()
            optimizer.step()
    return facts(report)
