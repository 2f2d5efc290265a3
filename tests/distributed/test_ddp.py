"""DDP on two gloo ranks: the same outputs, gradients and parameters as one process on the whole batch."""

from __future__ import annotations

import pytest
from distributed import ddp
from distributed.common import FOLD, TO_RMS
from distributed.ranks import Ranks


@pytest.mark.parametrize("kind", ["plain", "bucket-view", "static-graph"])
def test_training(ranks: Ranks, kind: str) -> None:
    for found in ranks(ddp.train, kind, "aot_eager"):
        assert found["fallbacks"] == []
        assert found["applied"] == {TO_RMS: 5, FOLD: 0}
        assert found["refused"][FOLD] == ["training"]


def test_training_in_split_graphs(ranks: Ranks) -> None:
    """The stream crosses from graph to graph, so its mean must stay; each graph is compiled by us."""
    for found in ranks(ddp.train, "split", "aot_eager"):
        assert found["graphs"] > 1
        assert found["fallbacks"] == []


def test_training_through_inductor(ranks: Ranks) -> None:
    for found in ranks(ddp.train, "plain", "inductor"):
        assert found["applied"][TO_RMS] == 5


def test_a_compiled_module_inside(ranks: Ranks) -> None:
    for found in ranks(ddp.train_inside, "aot_eager"):
        assert found["applied"][TO_RMS] == 5


def test_gradient_accumulation(ranks: Ranks) -> None:
    for found in ranks(ddp.accumulate, "aot_eager"):
        assert found["applied"][TO_RMS] == 5


def test_inference_between_steps(ranks: Ranks) -> None:
    for found in ranks(ddp.infer_between_steps, "aot_eager"):
        assert found["applied"] == {TO_RMS: 5, FOLD: 5}
        assert found["folded"] > 0


def test_the_peer_agrees(ranks: Ranks) -> None:
    ranks(ddp.train, "plain", "peer-aot_eager")
