"""Tensor parallelism on two gloo ranks, with and without sequence parallelism.

What touches a sharded tensor stays opaque to the passes; what does not is rewritten.
"""

from __future__ import annotations

import pytest
from distributed import tensor_parallel
from distributed.common import FOLD, TO_RMS
from distributed.ranks import Ranks

BOTH = [False, True]


@pytest.mark.parametrize("sequence", BOTH)
def test_training(ranks: Ranks, sequence: bool) -> None:
    for found in ranks(tensor_parallel.train, sequence, "aot_eager"):
        assert found["fallbacks"] == []


def test_training_with_a_fold_in_the_graph(ranks: Ranks) -> None:
    """The final norm and the head are whole on each rank."""
    for found in ranks(tensor_parallel.train_folding):
        assert found["applied"][FOLD] == 1


@pytest.mark.parametrize("sequence", BOTH)
def test_inference(ranks: Ranks, sequence: bool) -> None:
    for found in ranks(tensor_parallel.infer, sequence, "aot_eager"):
        assert found["fallbacks"] == []
        assert "tensor subclass DTensor" in found["opaque"]
        # Norms before sharded layers keep their weights; the head is plain, but for sequence parallelism.
        assert found["applied"] == {TO_RMS: 0, FOLD: 0 if sequence else 1}
        assert found["refused"][FOLD] == ([] if sequence else ["reader"])


@pytest.mark.slow
def test_inference_through_inductor(ranks: Ranks) -> None:
    ranks(tensor_parallel.infer, True, "inductor")


@pytest.mark.slow
def test_training_through_inductor(ranks: Ranks) -> None:
    ranks(tensor_parallel.train, False, "inductor")


def test_proof(ranks: Ranks) -> None:
    ranks(tensor_parallel.prove)


def test_weights_are_fresh(ranks: Ranks) -> None:
    for found in ranks(tensor_parallel.fresh, "aot_eager"):
        assert found["folded"] > 0


def test_the_peer_agrees(ranks: Ranks) -> None:
    ranks(tensor_parallel.train, True, "peer-aot_eager")
