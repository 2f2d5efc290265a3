"""TEAL's greedy search: sizes add up, it beats one sparsity for all layers, and what it cannot search."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from calibration.models import Block, decoder, rows, token_batches
from support import error, randomise, run
from torch import nn

import sparsecc
from sparsecc.errors import CalibrationError, OptionsError
from sparsecc.greedy import Greedy
from sparsecc.observations import Observations
from sparsecc.observe import observe
from sparsecc.observe_ffn import unraised
from sparsecc.recipe import Recipe
from sparsecc.simulate_sparse import simulated_sparse

BATCHES = [rows(48, 32, seed).unflatten(0, (2, 24)) for seed in range(3)]


@cache
def _one_block() -> nn.Module:
    """Its output is the model's; what attention adds hardly matters."""
    model = nn.Sequential(randomise(Block(32, 64, 4, 2, nn.RMSNorm))).eval()
    with torch.no_grad():
        model[0].o.weight *= 0.05
    return model


@cache
def _seen() -> Observations:
    return observe(_one_block(), BATCHES, unraised(None))


def _greedy(**given: Any) -> Greedy:
    return Greedy(
        _one_block(), BATCHES, given.pop("blocks", "0"), given.pop("seen", _seen()), **given
    )


def _weighted(shares: dict[str, float]) -> tuple[float, int]:
    sizes = {s: site.shape[0] * site.shape[1] for s, site in _seen().sites.items() if s in shares}
    return sum(shares[s] * sizes[s] for s in sizes), sum(sizes.values())


def test_the_sum_is_the_target() -> None:
    greedy = _greedy()
    found = {}
    for target in (0.5, 0.0, 0.03, 0.3, 1.0):  # not in order: a way is gone once
        shares = found[target] = greedy(target)
        assert shares.keys() == _seen().sites.keys()
        got, whole = _weighted(shares)
        assert got == pytest.approx(target * whole, rel=1e-9)
        assert all(0 <= share <= 1 for share in shares.values())
    assert all(found[0.3][site] <= found[0.5][site] for site in found[0.3])
    assert len(set(found[0.5].values())) > 1
    assert greedy(0.5) == found[0.5]
    # q is half of gate, and rises by two of its steps; k by four.
    (path,) = (block.path for block in greedy.blocks)
    first = dict(reversed(path))
    assert first["0.gate.weight"] == pytest.approx(0.05)
    assert first["0.q.weight"] == pytest.approx(0.1)
    assert first["0.k.weight"] == pytest.approx(0.2)


def _errors(sparsity: float, **given: Any) -> tuple[float, Recipe]:
    model = _one_block()
    recipe = sparsecc.sparsify(model, BATCHES, "teal", sparsity=sparsity, **given)
    with simulated_sparse(model) as simulation:
        exact = [simulation(batch) for batch in BATCHES]
        simulation.use(recipe)
        pairs = [(simulation(batch), wanted) for batch, wanted in zip(BATCHES, exact, strict=True)]
    return sum(float((got - y).double().square().sum()) for got, y in pairs), recipe


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_greedy_is_nearer_than_one_sparsity(sparsity: float) -> None:
    uniform, _ = _errors(sparsity)
    greedy, recipe = _errors(sparsity, blocks="0", step=0.1)
    assert 0 < greedy < 0.95 * uniform
    assert recipe.options == {"sparsity": sparsity, "skip": [], "blocks": ["0"], "step": 0.1}
    for site, entry in recipe.sparsity.items():
        own = 1 - float(entry["density"])
        limit = float(recipe.thresholds[site])
        assert limit == pytest.approx(_seen().input(site).percentile(own), rel=1e-5)


def test_the_first_rise_is_the_one_of_least_error() -> None:
    """By hand, with masks in the block itself: its norms are ones, so that nothing is folded."""
    torch.manual_seed(0)
    block = randomise(Block(32, 64, 4, 2, nn.RMSNorm)).eval()
    with torch.no_grad():
        block.norm1.weight.fill_(1)
        block.norm2.weight.fill_(1)
    model = nn.Sequential(block)
    seen = observe(model, BATCHES, unraised(None))
    greedy = Greedy(model, BATCHES, "0", seen)
    greedy(0.001)
    (path,) = (b.path for b in greedy.blocks)
    x, errors = torch.cat(BATCHES), {}
    with torch.no_grad():
        exact = block(x)
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            site, layer = f"0.{name}.weight", getattr(block, name)
            raised = 0.05 * 64 * 32 / layer.weight.numel()
            limit = seen.input(site).percentile(raised)
            handle = layer.register_forward_pre_hook(
                lambda _, args, limit=limit: (args[0].masked_fill(args[0].abs() <= limit, 0),)
            )
            errors[site] = float((block(x) - exact).double().norm())
            handle.remove()
    assert path[0][0] == min(errors, key=errors.__getitem__)


def test_a_decoder_runs_by_it_and_its_head_keeps_the_target() -> None:
    net, batches = decoder(outliers=(), layers=2), token_batches(3)
    given = {"blocks": ["blocks.*"], "step": 0.2, "rows": 64}
    recipe = sparsecc.sparsify(net, batches, "teal", sparsity=0.4, **given)
    assert recipe.sparsity["head.weight"]["density"] == pytest.approx(0.6)
    assert {k: recipe.options[k] for k in given} == given
    assert len({round(e["density"], 6) for e in recipe.sparsity.values()}) > 2
    with torch.no_grad(), simulated_sparse(net) as simulation:
        simulation.use(recipe)
        got, report = run(net, batches[0], recipe=recipe)
        assert report["sparsify-input"].applied == 15
        assert error(got, simulation(batches[0])) < 1e-5
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_budget_searches_the_target() -> None:
    recipe = sparsecc.sparsify(
        _one_block(), BATCHES, "teal", budget=0.1, metric="rmse", blocks="0", step=0.3
    )
    assert recipe.budget["held"]
    assert 0 < recipe.budget["measured"] <= 0.1
    assert 0 < recipe.options["sparsity"] < 1


def test_rows_are_bounded() -> None:
    assert [[c[0][0].shape[0] for c in b.calls] for b in _greedy(rows=100).blocks] == [[2, 2]]
    assert [len(b.calls) for b in _greedy(rows=1).blocks] == [1]
    assert [len(b.calls) for b in _greedy().blocks] == [3]


def test_what_is_skipped_does_not_rise() -> None:
    shares = _greedy(skip=["*.gate.*", "*.up.*"])(0.5)
    assert len(shares) == 5
    got, whole = _weighted(shares)
    assert got == pytest.approx(0.5 * whole)


class _Forgetful(nn.Module):
    """Gives another result at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(32, 32), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.bias.add_(1.0)
        return self.layer(x)


class _Lent(nn.Module):
    """A block whose layer is called by the model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
        self.block.lent = nn.Linear(32, 32)
        self.block.forward = self._block

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        return self.block[1](self.block[0](x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.lent(self.block(x))


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (_one_block, {"blocks": "1"}, "unknown Module"),
        (_one_block, {"blocks": "0.norm1"}, "norm1 holds no linear layer"),
        (_one_block, {"blocks": "0", "skip": ["0.*"]}, "0 holds no linear layer"),
        (_one_block, {"blocks": "0", "step": 0}, "step is a number above 0"),
        (_one_block, {"blocks": "0", "step": "x"}, "step is a number above 0"),
        (_one_block, {"blocks": "0", "rows": -1}, "rows is a number above 0"),
        (_one_block, {"blocks": "0", "sparsity": 2}, "share of 0 to 1"),
        (lambda: _one_block().forward, {"blocks": "0"}, "the model is a method"),
        (lambda: _Lent().eval(), {"blocks": "block"}, "block.lent.weight: no layer of block"),
        (lambda: nn.Sequential(_Forgetful()).eval(), {"blocks": "0"}, "another result"),
    ],
)
def test_what_cannot_be_searched(model: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises((CalibrationError, OptionsError), match=words):
        sparsecc.sparsify(model(), BATCHES[:2], "teal", **given)
