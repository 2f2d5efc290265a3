"""FSDP2 on two gloo ranks.

The weights that a graph sees are gathered for each call and freed after it. Their version counter is held
still, and their addresses may be used again, so no folded weight is ever kept.
"""

from __future__ import annotations

import pytest
from distributed import fsdp
from distributed.common import FOLD, TO_RMS
from distributed.ranks import Ranks

BOTH = [True, False]


@pytest.mark.parametrize("reshard", BOTH)
@pytest.mark.parametrize("how", ["root", "blocks"])
def test_training(ranks: Ranks, how: str, reshard: bool) -> None:
    for found in ranks(fsdp.train, how, reshard, "aot_eager"):
        assert found["fallbacks"] == []
        # Hooks around each block break the graph, so the stream leaves it.
        assert found["applied"][TO_RMS] == (5 if how == "root" else 0)
        assert found["refused"][FOLD] == ["training"]


def test_training_through_inductor(ranks: Ranks) -> None:
    for found in ranks(fsdp.train, "root", True, "inductor"):
        assert found["applied"][TO_RMS] == 5


def test_training_with_a_fold_in_the_graph(ranks: Ranks) -> None:
    for found in ranks(fsdp.train_folding, "root"):
        assert found["applied"][FOLD] == 5
        assert found["folded"] == 0


@pytest.mark.parametrize("inner", BOTH)
@pytest.mark.parametrize("reshard", BOTH)
def test_inference(ranks: Ranks, reshard: bool, inner: bool) -> None:
    for found in ranks(fsdp.infer, "blocks", reshard, inner, "aot_eager"):
        assert found["fallbacks"] == []
        assert found["folded"] == 0
        assert found["refused"][FOLD] == ["gathered"]


def test_inference_of_one_graph(ranks: Ranks) -> None:
    for found in ranks(fsdp.infer, "root", True, False, "inductor"):
        assert found["applied"] == {TO_RMS: 5, FOLD: 0}
        assert found["folded"] == 0


@pytest.mark.parametrize(("how", "reshard"), [("root", True), ("blocks", False)])
def test_weights_are_fresh(ranks: Ranks, how: str, reshard: bool) -> None:
    for found in ranks(fsdp.fresh, how, reshard, "aot_eager"):
        assert found["fallbacks"] == []
        assert found["folded"] == 0


def test_the_peer_agrees(ranks: Ranks) -> None:
    ranks(fsdp.train, "blocks", True, "peer-aot_eager")
