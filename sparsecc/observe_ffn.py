"""Looking at the neurons of a model's feed-forward networks while it runs over example data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sparsecc.errors import CalibrationError
from sparsecc.ffn_statistics import FFNObservations, FFNStatistics
from sparsecc.observe import arguments, facts, same_tensor
from sparsecc.progress import tracked
from sparsecc.statistics import Statistics
from sparsecc.watch import At, FFNAt, LinkFacts, watched


def observe_ffn(
    model: Any,
    batches: Iterable[Any],
    options: Mapping[str, Any] | None = None,
    *,
    progress: bool | None = None,
) -> FFNObservations:
    """Run ``model`` over ``batches``, eagerly and without gradients, and keep statistics of its neurons.

    Args:
        model: a module in eval mode, or a function.
        batches: tensors, tuples of arguments or dicts of keyword arguments.
        options: of the backend: passes that are left out there must be left out here.
        progress: a bar on stderr; None where that is a terminal.
    Raises:
        CalibrationError: there are no batches or no feed-forward networks, or a neuron was NaN or infinite.
    """
    seen = FFNObservations()
    with watched(model, _Observer(seen), unraised(options)) as run:
        for batch in tracked(batches, "observing", progress):
            run(*arguments(batch))
            seen.batches += 1
    if not seen.batches:
        raise CalibrationError("there are no batches to calibrate on.")
    if not seen.ffns:
        raise CalibrationError(
            "no feed-forward network (linear, activation, linear; or gated) with a weight of its own was found."
            + (f" Left out: {', '.join(seen.left_out)}." if seen.left_out else "")
        )
    for name, ffn in seen.ffns.items():
        if not ffn.h.rows:
            raise CalibrationError(f"{name}: it read no rows in any batch.")
    seen.about = facts(model)
    return seen


def unraised(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options with products left as the model spells them: a recipe of neurons raises none."""
    given = dict(options or {})
    return {**given, "disable": [*given.get("disable", ()), "raise-linear"]}


class _Observer:
    """Fills observations."""

    def __init__(self, seen: FFNObservations) -> None:
        self.seen = seen
        self.raw: dict[str, torch.Tensor] = {}

    def graph(self, found: Sequence[str], links: Mapping[str, LinkFacts]) -> None:
        """Of a visitor: nothing to learn."""

    def site(self, at: At, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> None:
        """Of a visitor: only whole networks are looked at."""

    def not_shown(self, site: str) -> None:
        if site and site not in self.seen.left_out:
            self.seen.left_out.append(site)

    def ffn(self, at: FFNAt, a: torch.Tensor, h: torch.Tensor, down: torch.Tensor) -> None:
        if at.site in self.seen.left_out:
            return
        ffn = self.seen.ffns.get(at.site)
        if ffn is None:
            size = h.shape[-1]
            hidden = Statistics(size)
            of_a = hidden if at.kind == "plain" else Statistics(size, most=0)
            weight = down.detach().float().cpu()
            ffn = FFNStatistics(at.kind, at.activation, weight, of_a, hidden)
            self.seen.ffns[at.site], self.raw[at.site] = ffn, down
        elif not same_tensor(self.raw[at.site], down):
            self.seen.left_out.append(at.site)
            del self.seen.ffns[at.site]
            return
        looked_at = [("hidden value", ffn.h, h)]
        if ffn.a is not ffn.h:
            looked_at.insert(0, ("activation", ffn.a, a))
        for name, statistics, value in looked_at:
            try:
                statistics.update(value)
            except ValueError as error:
                raise CalibrationError(f"the {name} before {at.site} holds {error}.") from error
