"""prune-neurons: what is cut out of the weights is what a mask would make zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import capture, error, fp64, managed_by_fsdp, randomise, refusals, run
from torch import nn
from torch.nn import functional as F

from sparsecc.passes.base import Analyses, Context
from sparsecc.passes.ffn import prune_neurons
from sparsecc.passes.ffn.prune_neurons import PruneNeurons
from sparsecc.recipe import Recipe

NAME = "prune-neurons"
D, WIDTH = 8, 12
KEPT = torch.tensor([0, 2, 3, 7, 10])
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    """A network of each kind, each with a down projection ``down`` [D, WIDTH]."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH), nn.Linear(D, WIDTH, bias=False)
        self.both = nn.Linear(D, 2 * WIDTH)
        self.down, self.next = nn.Linear(WIDTH, D), nn.Linear(D, D)
        self.matrix, self.vector = (
            nn.Parameter(torch.ones(D, WIDTH)),
            nn.Parameter(torch.ones(WIDTH)),
        )
        self.does = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.does(self, x)


def gated(m: Net, x: torch.Tensor) -> torch.Tensor:
    return x + m.down(F.silu(m.gate(x)) * m.up(x))


def flattened(m: Net, x: torch.Tensor) -> torch.Tensor:
    """As GPT-2's Conv1D: tokens are flattened before each product, and the features spelled out."""
    y = torch.addmm(m.vector, x.view(-1, D), m.matrix).view(*x.shape[:-1], WIDTH)
    return m.down(F.gelu(y).view(-1, WIDTH)).view(x.shape)


def split(m: Net, x: torch.Tensor) -> torch.Tensor:
    gate, up = m.both(x).split(WIDTH, -1)
    return m.down(F.gelu(gate) * up)


def sliced(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.both(x)
    return m.down(y[..., :WIDTH] * F.relu(y[..., WIDTH:]))


def chunked(m: Net, x: torch.Tensor) -> torch.Tensor:
    up, gate = m.both(x).chunk(2, -1)
    return m.down(F.silu(gate) * up)


KINDS = {
    "gated": gated,
    "plain": lambda m, x: m.down(F.gelu(m.gate(x))),
    "flattened": flattened,
    "fused, split": split,
    "fused, slices": sliced,
    "fused, chunks, up first": chunked,
}


def recipe_of(kept: torch.Tensor = KEPT, site: str = "down.weight", size: int = WIDTH) -> Recipe:
    sparsity = {site: {"law": "prune", "keep": len(kept) / size}}
    return Recipe("by hand", sparsity=sparsity, neurons={site: kept})


def exactly(recipe: Recipe) -> dict[str, Any]:
    return {"passes": {NAME: {"recipe": recipe}}}


def masked(model: nn.Module, kept: torch.Tensor = KEPT) -> nn.Module:
    """The same function with zeros where neurons are pruned."""
    found = copy.deepcopy(model)
    dead = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, kept, False)
    with torch.no_grad():
        found.down.weight[:, dead] = 0
    return found


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sliced_equals_masked(kind: str, dynamic: bool | None) -> None:
    model = fp64(randomise(Net(KINDS[kind]))).eval()
    with torch.no_grad():
        result, report = run(model, X, dynamic=dynamic, **exactly(recipe_of()))
        assert report[NAME].applied == 1, refusals(report, NAME)
        assert error(result, masked(model)(X)) < 1e-12
        assert error(model(X), masked(model)(X)) > 1e-3  # a pass that does nothing would be seen
    assert report[NAME].matches[0].note == "down.weight: 5 of 12 neurons"
    assert report[NAME].flops_saved > 0


def test_a_wrong_index_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a fused network that are not found again at their new place."""
    real = prune_neurons.half_of
    monkeypatch.setattr(prune_neurons, "half_of", lambda *given: (real(*given)[0], 0))
    model = fp64(randomise(Net(split))).eval()
    with torch.no_grad():
        result, report = run(model, X, **exactly(recipe_of()))
        assert report[NAME].applied == 1
        assert error(result, masked(model)(X)) > 1e-3


def test_a_layer_that_ends_one_network_and_begins_the_next() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = fp64(randomise(nn.Sequential(*layers, nn.Linear(WIDTH, D)))).eval()
    recipe, other = recipe_of(site="2.weight"), recipe_of(KEPT[1:], site="4.weight")
    recipe.sparsity |= other.sparsity
    recipe.neurons |= other.neurons
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for layer, kept in ((2, KEPT), (4, KEPT[1:])):
            mask = torch.zeros(WIDTH, dtype=torch.float64).index_fill(0, kept, 1)
            expected[layer].weight *= mask
        result, report = run(model, X, **exactly(recipe))
        assert report[NAME].applied == 2
        assert error(result, expected(X)) < 1e-12


def test_as_a_recipe_any_batch_and_updates_after_compile() -> None:
    model = fp64(randomise(Net(gated))).eval()
    options = {"lower": "eager", "recipe": recipe_of(), "require": {NAME: 1}}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsecc", dynamic=True, options=options)
    with torch.no_grad():
        for batch in (3, 1, 7):
            x = torch.randn(batch, 5, D, dtype=torch.float64)
            assert error(fast(x), masked(model)(x)) < 1e-12
        randomise(model, seed=5)
        assert error(fast(x), masked(model)(x)) < 1e-12


def test_under_autocast() -> None:
    model = randomise(Net(gated)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, report = run(model, X.float(), **exactly(recipe_of()))
        expected = masked(model)(X.float())
    assert report[NAME].applied == 1
    assert result.dtype == expected.dtype
    assert error(result, expected) < 2e-2


def test_training_is_refused() -> None:
    model = randomise(Net(gated)).double()
    result, report = run(model, X, **exactly(recipe_of()))
    assert refusals(report, NAME) == ["training"]
    assert error(result.detach(), model(X).detach()) < 1e-12


def test_gathered_weights_are_refused() -> None:
    model = managed_by_fsdp(randomise(Net(gated)).double().eval())
    with torch.no_grad():
        _, report = run(model, X, recipe=recipe_of())
    assert refusals(report, NAME) == ["gathered"]


def _read_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    h = F.silu(m.gate(x)) * m.up(x)
    return m.down(h) + h.sum(-1, keepdim=True)


def _asks_for_its_size(m: Net, x: torch.Tensor) -> torch.Tensor:
    gate = m.gate(x)
    return m.down(F.silu(gate) * m.up(x)) + gate[..., :D]


def _tied_with_a_reader(m: Net, x: torch.Tensor) -> torch.Tensor:
    return gated(m, x) + F.linear(x, m.up.weight)[..., :D]


def _called_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    return gated(m, gated(m, x))


def _transposed(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = torch.addmm(m.vector, x.view(-1, D), m.matrix).view(3, -1)  # 5 tokens' neurons in a row
    return m.down(F.gelu(y.view(3, 5, WIDTH)))


REFUSED = {
    "fan-out": _read_twice,
    "fan-out of the gate": _asks_for_its_size,
    "tied": _tied_with_a_reader,
    "tied twice": _called_twice,
    "not-ffn": lambda m, x: m.down(torch.cat([x, x[..., :4]], -1)),
    "not-ffn through a view": _transposed,
}


@pytest.mark.parametrize("how", REFUSED)
def test_refuses(how: str) -> None:
    model = fp64(randomise(Net(REFUSED[how]))).eval()
    with torch.no_grad():
        result, report = run(model, X, **exactly(recipe_of()))
        assert set(refusals(report, NAME)) == {how.partition(" ")[0]}
        assert report[NAME].applied == 0
        assert error(result, model(X)) < 1e-12


def test_refuses_strides_that_need_not_hold() -> None:
    model = fp64(randomise(Net(gated))).eval()
    with torch.no_grad():
        program = capture(model, X)
    context, rewriting = Context(program, Analyses(program)), PruneNeurons(recipe_of())
    (match,) = rewriting.find(context)
    assert rewriting.check(match, context) is None
    node = match.nodes["ffn"].hidden
    node.meta["val"] = node.meta["val"].transpose(0, 1).contiguous().transpose(0, 1)
    refusal = rewriting.check(match, context)
    assert refusal is not None
    assert (refusal.code, refusal.node) == ("layout", node.name)


@pytest.mark.parametrize("site", ["down.weight", "up.weight"])
def test_refuses_what_has_given_codes(site: str) -> None:
    model = randomise(Net(gated)).eval()
    recipe = recipe_of()
    recipe.sites[site] = "int8"
    rows = dict(model.named_parameters())[site].shape[0]
    recipe.grids[site] = (torch.full((rows, 1), 0.01), None)
    with torch.no_grad():
        _, report = run(model, X.float(), recipe=recipe)
    assert refusals(report, NAME) == ["given"]


@pytest.mark.parametrize(
    ("kept", "size"),
    [([0, 12], WIDTH), ([3, 2], WIDTH), ([0, 1], 24), ([], WIDTH)],
    ids=["out of range", "not ascending", "of a wider model", "none"],
)
def test_a_recipe_of_another_model_is_an_error(kept: list[int], size: int) -> None:
    model = randomise(Net(gated)).eval()
    recipe = recipe_of(torch.tensor(kept, dtype=torch.int64), size=size)
    with torch.no_grad(), pytest.raises(Exception, match=r"RecipeError.*down\.weight"):
        run(model, X.float(), **exactly(recipe))


def test_other_laws_and_whole_networks_are_left_alone() -> None:
    model = fp64(randomise(Net(gated))).eval()
    core = recipe_of()
    core.sparsity["down.weight"]["law"] = "core"
    with torch.no_grad():
        for recipe in (core, recipe_of(torch.arange(WIDTH))):
            _, report = run(model, X, **exactly(recipe))
            assert not report[NAME].matches


def test_a_network_under_another_name() -> None:
    """A module with two names is captured under one and may be exported under the other."""
    recipe = recipe_of(site="first.down.weight")
    recipe.about["tied"] = {"first.down.weight": ["second.down.weight"]}
    renamed = recipe.under({"second.down.weight"})
    assert renamed.sparsity.keys() == renamed.neurons.keys() == {"second.down.weight"}
    model = nn.Module()
    model.second = fp64(randomise(Net(gated))).eval()
    model.forward = lambda x: model.second(x)
    with torch.no_grad():
        _, report = run(model.eval(), X, **exactly(recipe))
    assert report[NAME].applied == 1
