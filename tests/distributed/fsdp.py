"""FSDP2 (``fully_shard``): cases that run on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed.common import (
    FOLD,
    ROUNDING,
    TRAINED,
    PreNorm,
    adam,
    backend,
    batches,
    build,
    close,
    facts,
    loss,
    mesh,
    part,
    same_training,
)
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(model: PreNorm, how: str, reshard: bool = True) -> PreNorm:
    """``how``: "root" (one group, one graph) or "blocks" (a group for each block, as one uses it)."""
    if how == "blocks":
        for block in model.blocks:
            fully_shard(block, mesh=mesh(), reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh(), reshard_after_forward=reshard)
    return model


def put_back(model: PreNorm) -> None:
    """Free what was gathered: parameters are the shards again, also where calls keep it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def train(how: str, reshard: bool, name: str, **options: Any) -> dict[str, Any]:
    model, reference = shard(build(), how, reshard), build()
    chosen, report = backend(name, **options)
    same_training(torch.compile(model, **chosen), model, reference, part)
    return facts(report)


def train_folding(how: str) -> dict[str, Any]:
    """The pass named: it folds inside the graph, and is differentiated."""
    return train(how, True, "aot_eager", passes=[FOLD])


def infer(how: str, reshard: bool, inner: bool, name: str, **options: Any) -> dict[str, Any]:
    """Three calls from the same weights; ``inner``: the blocks are compiled, not the model."""
    model, reference = shard(build().eval(), how, reshard), build().eval()
    chosen, report = backend(name, **options)
    fast: Callable[..., torch.Tensor] = model
    if inner:
        for block in model.blocks:
            block.compile(**chosen)
    else:
        fast = torch.compile(model, **chosen)
    with torch.no_grad():
        for batch in batches():
            close(fast(batch), reference(batch))
    return facts(report)


def fresh(how: str, reshard: bool, name: str) -> dict[str, Any]:
    """Every way of changing the sharded weights that we know of; a call after each."""
    model, reference = shard(build().eval(), how, reshard), build().eval()
    chosen, report = backend(name)
    fast = torch.compile(model, **chosen)
    batch = batches(1)[0]

    def check(bound: float = ROUNDING) -> None:
        with torch.no_grad():
            close(fast(batch), reference(batch), bound)
        put_back(model)

    check()
    # A whole checkpoint, scattered by PyTorch.
    other = build().state_dict()
    for value in other.values():
        value.mul_(1.25)
    reference.load_state_dict(other)
    set_model_state_dict(model, other, options=StateDictOptions(full_state_dict=True))
    check()
    # A sharded one, as a rank saved it.
    sharded = {k: v.clone() * 0.75 for k, v in get_model_state_dict(model).items()}
    model.load_state_dict(sharded)
    reference.load_state_dict({k: v * 0.75 for k, v in reference.state_dict().items()})
    check()
    # One element on one rank: no sample sees it, and the version of the gathered weight does not move.
    for _ in range(4):
        with torch.no_grad():
            if distributed.get_rank() == 0:
                model.blocks[0].up.weight.to_local()[1, 3] += 5
            reference.blocks[0].up.weight[1, 3] += 5
        check()
    # Optimizer steps.
    ours, theirs = adam(model.parameters()), adam(reference.parameters())
    for step in batches():
        for optimizer, run, share in ((ours, fast, part), (theirs, reference, lambda b: b)):
            optimizer.zero_grad()
            loss(run(share(step))).backward()
            optimizer.step()
        check(TRAINED)
    return facts(report)
