"""How far a model under a recipe is from itself: one number, 0 for no difference, larger for worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sparsecc.errors import CalibrationError
from sparsecc.observe import arguments

# Two sums of a batch: of candidate logits, the model's own, and the batch.
Sums = Callable[[torch.Tensor, torch.Tensor, Any], tuple[float, float]]


@dataclass(frozen=True)
class Metric:
    """A number of two sums over the batches.

    Attributes:
        words: what it is.
        sums: of one batch.
        of: the number, of the two sums over all batches.
    """

    words: str
    sums: Sums
    of: Callable[[float, float], float]


def _kl(got: torch.Tensor, exact: torch.Tensor, batch: Any) -> tuple[float, float]:
    p, q = exact.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum()), float(p[..., 0].numel())


def _rmse(got: torch.Tensor, exact: torch.Tensor, batch: Any) -> tuple[float, float]:
    wide = exact.double()
    return float((got.double() - wide).square().sum()), float(wide.square().sum())


def _agreement(got: torch.Tensor, exact: torch.Tensor, batch: Any) -> tuple[float, float]:
    differ = got.argmax(-1) != exact.argmax(-1)
    return float(differ.sum()), float(differ.numel())


def _perplexity(got: torch.Tensor, exact: torch.Tensor, batch: Any) -> tuple[float, float]:
    wanted, shifted = _labels(batch, exact)
    losses = []
    for logits in (got, exact):
        rows = logits[..., :-1, :] if shifted else logits
        flat = rows.flatten(0, -2).double()
        losses.append(float(F.cross_entropy(flat, wanted, ignore_index=-100, reduction="sum")))
    return losses[0] - losses[1], float((wanted != -100).sum())


def _mean(total: float, count: float) -> float:
    return total / count if count else 0.0


METRICS: Mapping[str, Metric] = {
    "kl": Metric("Kullback–Leibler divergence of the outputs, per position", _kl, _mean),
    "rmse": Metric("root of Σ difference² / Σ output²", _rmse, lambda a, b: math.sqrt(_mean(a, b))),
    "agreement": Metric("share of positions with another largest output", _agreement, _mean),
    "perplexity": Metric(
        "relative increase of the perplexity", _perplexity, lambda a, b: math.expm1(_mean(a, b))
    ),
}


def logits(output: Any) -> torch.Tensor:
    """The tensor to be judged: the output, its ``logits``, or the first tensor in it.

    Raises:
        CalibrationError: there is none.
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits", next(iter(output.values()), None))
    elif found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    found = output if found is None else found
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or not found.dim():
        raise CalibrationError(
            f"the model returns {type(output).__name__}, in which no tensor of logits was found."
        )
    return found


def _labels(batch: Any, exact: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The class that each row of logits should name, and whether it is that of the next position.

    As in transformers: labels of one number a position of a sequence name the next one's.
    """
    args, kwargs = arguments(batch)
    given: Any = kwargs.get("labels")
    if given is None:
        tokens = [kwargs.get("input_ids"), *args]
        given = next((t for t in tokens if _is_ids(t) and t.shape == exact.shape[:-1]), None)
    if not _is_ids(given) or given.shape != exact.shape[:-1]:
        raise CalibrationError(
            "metric 'perplexity' needs labels in the batch, or tokens whose next ones the logits "
            f"{list(exact.shape)} name."
        )
    if given.dim() < 2:
        return given.flatten().long(), False
    return given[..., 1:].flatten().long(), True


def _is_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dim() > 0
