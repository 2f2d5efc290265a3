"""Tensor parallelism: cases that run on every rank."""

from __future__ import annotations

from typing import Any

import torch
from distributed.common import (
    ROUNDING,
    Tokens,
    adam,
    backend,
    batches,
    build,
    close,
    facts,
    loss,
    mesh,
    same_training,
)
from torch import distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def plan(sequence: bool, layers: int) -> dict[str, ParallelStyle]:
    """The usual plan of a transformer; with ``sequence``, norms run on each rank's own tokens."""
    enter: dict[str, Any] = {"input_layouts": Shard(1)} if sequence else {}
    leave: dict[str, Any] = {"output_layouts": Shard(1)} if sequence else {}
    found: dict[str, ParallelStyle] = {}
    for i in range(layers):
        found[f"blocks.{i}.mix"] = ColwiseParallel(**enter)
        found[f"blocks.{i}.out"] = RowwiseParallel(**leave)
        found[f"blocks.{i}.up"] = ColwiseParallel(**enter)
        found[f"blocks.{i}.down"] = RowwiseParallel(**leave)
        if sequence:
            found[f"blocks.{i}.norm1"] = found[f"blocks.{i}.norm2"] = SequenceParallel()
    if sequence:
        found["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        found["norm"] = SequenceParallel()
        found["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return found


def pair(sequence: bool) -> tuple[Tokens, Tokens]:
    model, reference = build(Tokens), build(Tokens)
    parallelize_module(model, mesh(), plan(sequence, len(model.blocks)))
    return model, reference


def train(sequence: bool, name: str, **options: Any) -> dict[str, Any]:
    model, reference = pair(sequence)
    chosen, report = backend(name, **options)
    same_training(torch.compile(model, **chosen), model, reference, lambda batch: batch)
    return facts(report)


def infer(sequence: bool, name: str, **options: Any) -> dict[str, Any]:
    model, reference = (m.eval() for m in pair(sequence))
    chosen, report = backend(name, **options)
    fast = torch.compile(model, **chosen)
    with torch.no_grad():
        for batch in batches():
            close(fast(batch), reference(batch))
    return {**facts(report), "opaque": sorted(set(report.graphs[0].opaque.values()))}


def fresh(name: str) -> dict[str, Any]:
    """Weights change on all ranks, sharded and plain; then a plain one on one rank alone."""
    model, reference = (m.eval() for m in pair(sequence=False))
    chosen, report = backend(name)
    fast = torch.compile(model, **chosen)
    batch = batches(1)[0]
    with torch.no_grad():
        close(fast(batch), reference(batch))
        other = {k: v * 1.25 for k, v in reference.state_dict().items()}
        reference.load_state_dict(other)
        model.load_state_dict(
            {
                k: distribute_tensor(other[k], v.device_mesh, v.placements)
                if hasattr(v, "placements")
                else other[k]
                for k, v in model.state_dict().items()
            }
        )
        close(fast(batch), reference(batch))
    ours, theirs = adam(model.parameters()), adam(reference.parameters())
    for optimizer, run in ((ours, model), (theirs, reference)):
        loss(run(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        close(fast(batch), reference(batch), ROUNDING * 10)
        # Folding again is one rank's own affair: nothing may wait for the other.
        if distributed.get_rank() == 0:
            model.norm.weight.data.mul_(3)
            reference.norm.weight.data.mul_(3)
        close(fast(batch), reference(batch), ROUNDING * 10)
    return facts(report)


def train_folding() -> dict[str, Any]:
    return train(False, "aot_eager", passes=["fold-norm-affine"])


def prove() -> dict[str, Any]:
    return infer(False, "aot_eager", verify="each")
