"""Observation on ranks: each sees its part of the data, all have the statistics of the whole."""

from __future__ import annotations

from typing import Any

import torch
from calibration.models import decoder, token_batches
from torch import distributed

from sparsecc.methods import make
from sparsecc.observe import observe


def reduced() -> dict[str, Any]:
    """What this rank holds after its part (one batch more on the last rank) and ``all_reduce``."""
    model, batches = decoder(), token_batches(5)
    part = batches[:2] if distributed.get_rank() == 0 else batches[2:]
    seen = observe(model, part)
    alone = seen.batches
    whole, single = seen.all_reduce(), observe(model, batches, shard=0)
    for name in single.sites:
        a, b = whole.input(name), single.input(name)
        assert a.rows == b.rows
        for vector in ("low", "high", "total", "squares"):
            assert torch.allclose(getattr(a, vector), getattr(b, vector), rtol=1e-12), vector
        assert torch.equal(a.bins, b.bins)
    recipe = make("smoothquant", whole)
    return {
        "alone": alone,
        "batches": whole.batches,
        "fingerprint": whole.fingerprint,
        "sample": whole.input("head.weight").sample.tolist(),
        "scales": {name: s.tolist() for name, s in recipe.scales.items()},
        "single": {name: s.tolist() for name, s in make("smoothquant", single).scales.items()},
    }
