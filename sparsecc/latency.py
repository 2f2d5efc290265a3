"""How long a product with each layer takes in each format here: the table for ``target="latency"``.

A layer is timed alone, over copies of its weight that no cache holds: a model reads its other layers between
two readings of one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from sparsecc.budget import DENSE
from sparsecc.codegen.cpp import few_rows as generator
from sparsecc.errors import BuildError, CalibrationError
from sparsecc.measurement import COLD
from sparsecc.observations import Observations
from sparsecc.runtime.ops.few_rows import Spec, few_rows_native
from sparsecc.runtime.ops.formats import quantize
from sparsecc.timing import side_by_side

_ROUNDS = 5


class _Measured(dict[str, float]):
    """Seconds by format, measured where they are asked for; layers of one shape share them."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
        self.shape, self.dtype, self.rows = shape, dtype, rows

    def __missing__(self, form: str) -> float:
        self[form] = found = _seconds(self.shape, self.dtype, self.rows, form)
        return found


def measured(observations: Observations, rows: int = 1) -> dict[str, Mapping[str, float]]:
    """Site -> format ("dense": as it is) -> seconds of one product, on this machine's CPU.

    Args:
        rows: of the input: 1 where a model decodes one token at a time.
    Raises:
        CalibrationError: rows is none; and, at a lookup, kernels cannot be built here.
    """
    if rows < 1:
        raise CalibrationError(f"rows is a number of at least 1, not {rows}.")
    known: dict[Any, _Measured] = {}
    found: dict[str, Mapping[str, float]] = {}
    for name, site in observations.sites.items():
        key = (site.shape[0], site.shape[1]), getattr(torch, site.dtype)
        found[name] = known.setdefault(key, _Measured(*key, rows))
    return found


def _seconds(shape: tuple[int, int], dtype: torch.dtype, rows: int, form: str) -> float:
    weight, x = torch.randn(shape, dtype=dtype), torch.randn(rows, shape[1], dtype=dtype)
    spec = Spec("none", 0.0, ("p0",), ("dense" if form == DENSE else form,))
    built = True
    try:
        generator.load(spec, dtype)
    except BuildError as error:
        built = False
        if form != DENSE:
            raise CalibrationError(
                f"latency of {form!r} cannot be measured here ({error}). Give a table, or save bytes."
            ) from error
    tensors = [weight] if form == DENSE else list(quantize(weight, form))
    copies = [
        [t.clone() for t in tensors]
        for _ in range(math.ceil(COLD / sum(t.nbytes for t in tensors)))
    ]

    def over(call: Any) -> None:
        for each in copies:
            call(each)

    calls = {}
    if built:
        text = spec.text()
        calls["kernel"] = functools.partial(over, lambda w: few_rows_native(x, w, [], text))
    if form == DENSE:
        calls["linear"] = functools.partial(over, lambda w: F.linear(x, w[0]))
    timings = side_by_side(calls, rounds=_ROUNDS, warmup=1)
    return min(timing.median for timing in timings.values()) / len(copies)
