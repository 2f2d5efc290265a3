"""Structured layers: their operator is their merged weight, projections are the best, guidance fades."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import check_exact, refusals, run
from torch import nn

from sparsecc.training.structured import (
    BlockDense,
    BlockShuffle,
    LowRank,
    SelfGuided,
    Structured,
    from_linear,
    rho_at,
)

IN, OUT = 12, 18
MAKE: dict[str, Callable[[], Structured]] = {
    "low-rank": lambda: LowRank(IN, OUT, 4),
    "block-dense": lambda: BlockDense(IN, OUT, 3, 4),
    "block-shuffle": lambda: BlockShuffle(IN, OUT, 2, 3),
    "block-shuffle, one feature a pair": lambda: BlockShuffle(IN, OUT, 1, 6, bias=False),
}
ARGUMENTS: dict[str, tuple[int, int | None]] = {
    "low-rank": (4, None),
    "block-dense": (2, 4),
    "block-shuffle": (2, 3),
}


def _made(name: str) -> Structured:
    torch.manual_seed(0)
    made = MAKE[name]().double()
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made


def _dense(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(IN, OUT, bias=bias).double()


@pytest.mark.parametrize("name", MAKE)
def test_the_operator_is_its_merged_weight(name: str) -> None:
    made, x = _made(name), torch.randn(3, 5, IN, dtype=torch.float64)
    expected = nn.functional.linear(x, made.merged(), made.bias)
    assert torch.allclose(made(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(made.to_linear()(x), expected)
    identity = made.product(torch.eye(IN, dtype=torch.float64)).T
    assert torch.allclose(identity, made.merged(), rtol=1e-12, atol=1e-12)


def test_the_shuffle_by_hand() -> None:
    """Output feature s l + i reads element s of block i, which reads every l-th element of z."""
    made, x = _made("block-shuffle"), torch.randn(IN, dtype=torch.float64)
    k = l = 3  # noqa: E741
    z = torch.stack([made.first[b] @ x.view(k, -1)[b] for b in range(k)]).flatten()
    y = torch.empty(OUT, dtype=torch.float64)
    for i in range(l):
        for s in range(OUT // l):
            y[s * l + i] = made.second[i, s] @ z[i::l]
    assert torch.allclose(made.product(x), y, rtol=1e-12)
    unshuffled = torch.cat([made.second[i] @ z.view(l, -1)[i] for i in range(l)])
    assert not torch.allclose(
        made.product(x), unshuffled
    )  # without the permutation it is another function


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_projections_are_the_best_of_their_kind(kind: str, bias: bool) -> None:
    rank, blocks = ARGUMENTS[kind]
    linear = _dense(bias)
    made = from_linear(linear, kind, rank, blocks)
    assert (made.bias is None) == (not bias)
    assert not bias or torch.equal(made.bias, linear.bias)
    best = _distance(made, linear)
    assert 0 < best < float(linear.weight.detach().norm())
    # A projection is a projection: it gives its own weight back …
    again = from_linear(made.to_linear(), kind, rank, blocks)
    assert torch.allclose(again.merged(), made.merged(), atol=1e-12)
    # … and no step along the gradient of the distance comes nearer.
    (made.merged() - linear.weight).square().sum().backward()
    for parameter in (made.first, made.second):
        assert float(parameter.grad.abs().max()) < 1e-10
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (made.first, made.second):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 1e-3 * noise
    assert _distance(made, linear) > best


def _distance(made: Structured, linear: nn.Linear) -> float:
    return float((made.merged() - linear.weight).detach().norm())


def test_the_whole_rank_loses_nothing() -> None:
    linear, x = _dense(), torch.randn(7, IN, dtype=torch.float64)
    for kind, rank, blocks in (
        ("low-rank", 12, None),
        ("block-dense", 3, 4),
        ("block-shuffle", 4, 3),
    ):
        assert torch.allclose(from_linear(linear, kind, rank, blocks)(x), linear(x), atol=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_guidance_fades_from_the_dense_layer_to_the_factors(name: str) -> None:
    made, x = _made(name), torch.randn(4, IN, dtype=torch.float64)
    guided = SelfGuided(made)
    for rho in (1.0, 0.3, 0.0):
        guided.rho = rho  # nothing changes at the start
        assert torch.allclose(guided(x), made(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        guided.dense += 0.1
    dense = nn.functional.linear(x, guided.dense, made.bias)
    for rho in (1.0, 0.25, 0.0):
        guided.rho = rho
        assert torch.allclose(guided(x), rho * dense + (1 - rho) * made(x), rtol=1e-12, atol=1e-12)
    assert guided.finished() is made
    guided.rho = 0.5
    with pytest.raises(RuntimeError, match="still takes part"):
        guided.finished()


def test_rho_falls_from_one_to_zero() -> None:
    for kind in ("cosine", "linear"):
        values = [rho_at(t, 10, kind) for t in range(12)]
        assert values[0] == 1.0
        assert values[10:] == [0.0, 0.0]
        assert values == sorted(values, reverse=True)
        assert values[5] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="cosine, linear"):
        rho_at(1, 2, "cosinus")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LowRank(4, 6, 5), "between 1 and 4"),
        (lambda: BlockDense(10, 6, 1, 4), "4 blocks do not divide 10"),
        (lambda: BlockShuffle(12, 10, 1, 3), "3 blocks do not divide 10"),
        (lambda: BlockShuffle(12, 6, 3, 3), "between 1 and 2"),
        (lambda: from_linear(_dense(), "monarch", 1), "unknown kind 'monarch'"),
        (lambda: from_linear(_dense(), "low-rank", 1, 2), "takes no blocks"),
        (lambda: from_linear(_dense(), "block-dense", 1), "takes a number of blocks"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_compiled_low_rank_pair_is_multiplied_back_where_that_is_smaller() -> None:
    """r (in + out) numbers and in · out: 8 · 24 > 8 · 16, and 4 · 24 < 8 · 16."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    check_exact(LowRank(8, 16, 8), x, applied={"collapse-linear": 1}, passes=["collapse-linear"])
    with torch.no_grad():
        _, report = run(LowRank(8, 16, 4).eval(), x, passes=["collapse-linear"])
    assert refusals(report, "collapse-linear") == ["costs-more"]
