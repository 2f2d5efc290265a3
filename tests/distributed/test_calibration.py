"""Calibration on two gloo ranks: the same recipe on each, that of one process with all the data."""

from __future__ import annotations

from distributed import calibration
from distributed.ranks import Ranks


def test_ranks_reduce_to_the_whole(ranks: Ranks) -> None:
    first, second = ranks(calibration.reduced)
    assert (first.pop("alone"), second.pop("alone")) == (2, 3)
    assert first == second
    assert first["batches"] == 5
    assert first["scales"] == first["single"]
