"""What the cases share. Everything here runs on the ranks; the reference is the same model in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from support import PreNorm, error, ids, randomise
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import sparsecc

TO_RMS, FOLD = "layernorm-to-rmsnorm", "fold-norm-affine"
ROUNDING = 1e-12  # relative, in fp64, of one forward or backward
STEPS = 3
TRAINED = 1e-9  # relative, in fp64, after STEPS optimizer steps: AdamW divides by small numbers


class Tokens(PreNorm):
    """Without positions: under sequence parallelism each rank has its own part of the tokens."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        del self.position

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(kind: type[PreNorm] = PreNorm, **sizes: Any) -> PreNorm:
    model = randomise(kind(**sizes)).double()
    assert isinstance(model, PreNorm)
    return model


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def backend(name: str, **options: Any) -> tuple[dict[str, Any], sparsecc.Report]:
    """Arguments for ``torch.compile``; ``name`` is a peer, or how sparsecc is to lower."""
    report = sparsecc.Report()
    if name.startswith("peer-"):
        return {"backend": name.removeprefix("peer-")}, report
    chosen = {"lower": name, "report": report, "floor": False, **options}
    return {"backend": "sparsecc", "options": chosen}, report


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor, wherever its parts are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part(batch: torch.Tensor) -> torch.Tensor:
    """This rank's rows."""
    return batch.chunk(distributed.get_world_size())[distributed.get_rank()]


def batches(steps: int = STEPS) -> list[torch.Tensor]:
    return [ids(batch=4, tokens=6, seed=seed) for seed in range(steps)]


def close(got: torch.Tensor, expected: torch.Tensor, bound: float = ROUNDING) -> None:
    found = error(whole(got.detach()), expected.detach())
    assert found <= bound, f"differs by {found:.1e}, at most {bound:.0e} is rounding"


def same_parameters(
    model: nn.Module, reference: nn.Module, bound: float, gradients: bool = False
) -> None:
    """All parameters (or their gradients) of a distributed model against those of the plain one."""
    pairs = zip(model.parameters(), reference.named_parameters(), strict=True)
    for got, (name, expected) in pairs:
        a, b = (got.grad, expected.grad) if gradients else (got, expected)
        assert a is not None, name
        assert b is not None, name
        found = error(whole(a.detach()), b.detach())
        assert found <= bound, f"{name} differs by {found:.1e}, at most {bound:.0e} is rounding"


def loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    # Not foreach: plain and sharded parameters do not mix in one list.
    return torch.optim.AdamW(list(parameters), lr=1e-2, weight_decay=0.1, foreach=False)


def same_training(
    fast: Callable[..., torch.Tensor],
    model: nn.Module,
    reference: nn.Module,
    share: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """STEPS of AdamW, distributed and in one process: outputs, gradients and parameters agree.

    Args:
        fast: the compiled model. Gradients are those of the mean over ranks (what DDP and FSDP give).
        share: this rank's part of a batch (and of its outputs).
    """
    ours, theirs = adam(model.parameters()), adam(reference.parameters())
    for step, batch in enumerate(batches()):
        output, expected = fast(share(batch)), reference(batch)
        close(output, share(expected), TRAINED if step else ROUNDING)
        for optimizer, result in ((ours, output), (theirs, expected)):
            optimizer.zero_grad()
            loss(result).backward()
        same_parameters(model, reference, TRAINED if step else 1e-11, gradients=True)
        ours.step()
        theirs.step()
    same_parameters(model, reference, TRAINED)


def counts(report: sparsecc.Report, *names: str) -> dict[str, int]:
    return {name: report[name].applied for name in names if name in report}


def codes(report: sparsecc.Report, name: str) -> set[str]:
    return {r.code for r in report[name].refusals} if name in report else set()


def facts(report: sparsecc.Report) -> dict[str, Any]:
    """What a test wants to know of a report, as plain data."""
    return {
        "graphs": len(report.graphs),
        "applied": counts(report, TO_RMS, FOLD),
        "refused": {n: sorted(codes(report, n)) for n in (TO_RMS, FOLD)},
        "folded": sum(g.folded for g in report.graphs),
        "fallbacks": list(report.fallbacks),
    }
