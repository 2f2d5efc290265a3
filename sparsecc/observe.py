"""Looking at a model while it runs over example data: the first half of calibration."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sparsecc.errors import CalibrationError
from sparsecc.inspection import versions
from sparsecc.observations import Observations, ObservedSite
from sparsecc.progress import tracked
from sparsecc.statistics import Statistics
from sparsecc.watch import At, LinkFacts, watched

_EVERY = 32  # batches between two writes of the state


def observe(
    model: Any,
    batches: Iterable[Any],
    options: Mapping[str, Any] | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    shard: int | None = None,
    progress: bool | None = None,
) -> Observations:
    """Run ``model`` over ``batches``, eagerly and without gradients, and keep statistics of its linear layers.

    Args:
        model: a module in eval mode, or a function.
        batches: tensors, tuples of arguments or dicts of keyword arguments. The result does not depend on how
            the rows are cut into batches.
        options: of the backend: passes that are left out there must be left out here.
        resume: where the state is kept (``.json``): what is there is taken up, its batches are skipped, and
            it is written again every 32 batches and at the end.
        shard: which part of the data this is; None for the rank of this process.
        progress: a bar on stderr; None where that is a terminal.
    Raises:
        CalibrationError: there are no batches or no linear layers, or a layer read a NaN or an infinity.
    """
    seen = Observations(shard=_rank() if shard is None else shard)
    if resume is not None and pathlib.Path(resume).exists():
        seen = Observations.load(resume)
    skip, observer = seen.batches, _Observer(seen)
    with watched(model, observer, options) as run:
        for i, batch in enumerate(tracked(batches, "observing", progress)):
            if i < skip:
                if i == 0 and any(site.weight is None for site in seen.sites.values()):
                    observer.counts = False  # a state that was left in the middle has no weights
                    run(*arguments(batch))
                    observer.counts = True
                continue
            run(*arguments(batch))
            seen.batches += 1
            if resume is not None and seen.batches % _EVERY == 0:
                seen.save(resume, weights=False)
    if not seen.batches:
        raise CalibrationError("there are no batches to calibrate on.")
    if not seen.sites:
        raise CalibrationError(
            "no linear layer with a weight of its own was found: there is nothing to calibrate."
            + (f" Left out: {', '.join(seen.left_out)}." if seen.left_out else "")
        )
    for name, site in seen.sites.items():
        if not all(seen.inputs[group].rows for group in site.groups):
            raise CalibrationError(f"{name}: its input has no rows in any batch.")
    seen.about |= facts(model)
    if resume is not None:
        seen.save(resume)
    return seen


def facts(model: Any) -> dict[str, Any]:
    """What observations note of a model."""
    whole = isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))
    return {
        "parameters": sum(p.numel() for p in model.parameters()) if whole else 0,
        "tied": _tied(model),
        "versions": {k: v for k, v in versions().items() if k in ("sparsecc", "torch")},
    }


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for.

    Raises:
        CalibrationError: it is no tensor, tuple or dict.
    """
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(key): value for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise CalibrationError(
        f"a batch is a tensor, a tuple of arguments or a dict of them, not {type(batch).__name__}."
    )


class _Observer:
    """Fills observations."""

    def __init__(self, seen: Observations) -> None:
        self.seen = seen
        self.raw: dict[str, torch.Tensor] = {}
        self.counts = True

    def graph(self, found: Sequence[str], links: Mapping[str, LinkFacts]) -> None:
        self.seen.add_graph(found, links)

    def site(self, at: At, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> None:
        self._weight(at, weight)
        if at.site in self.seen.sites and at.group not in self.seen.sites[at.site].groups:
            self.seen.sites[at.site].groups.append(at.group)
        if at.first and self.counts:
            self._input(at, x)

    def _weight(self, at: At, weight: torch.Tensor) -> None:
        known = self.raw.get(at.site)
        if known is weight or at.site in self.seen.left_out:
            return
        if known is not None and not same_tensor(known, weight):
            self.seen.left_out.append(at.site)
            del self.seen.sites[at.site]
            return
        site = self.seen.sites.get(at.site)
        if site is None:
            site = self.seen.sites[at.site] = ObservedSite(list(weight.shape), [])
        elif site.shape != list(weight.shape):
            raise CalibrationError(
                f"{at.site} is {list(weight.shape)} and was {site.shape}: another model's observations."
            )
        if known is None:
            self.raw[at.site] = weight
            site.weight, site.dtype = (
                weight.detach().float().cpu(),
                str(weight.dtype).partition(".")[2],
            )

    def _input(self, at: At, x: torch.Tensor) -> None:
        statistics = self.seen.inputs.get(at.group)
        if statistics is None:
            statistics = Statistics(x.shape[-1], self.seen.shard)
            self.seen.inputs[at.group] = statistics
        try:
            statistics.update(x)
        except ValueError as error:
            raise CalibrationError(f"the input of {at.group} holds {error}.") from error


def _tied(model: Any) -> dict[str, list[str]]:
    """Each name of a parameter that has several -> the others."""
    if not isinstance(model, torch.nn.Module):
        return {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: [other for other in tied if other != name]
        for tied in names.values()
        if len(tied) > 1
        for name in tied
    }


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights are one, or hold the same numbers."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return same_memory or torch.equal(a, b)


def _rank() -> int:
    from torch import distributed

    return (
        distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    )
