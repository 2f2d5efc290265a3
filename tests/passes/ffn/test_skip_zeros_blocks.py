"""skip-zeros of blocks behind a router (BlockFFN): which spellings are found, what holds, what stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support import agrees_with_fp64, check_training, randomise, refusals, run
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.recipe import Recipe

NAME = "skip-zeros"
ONLY = {"passes": [NAME]}
CPP = {"codegen": "cpp", **ONLY}
D, COUNT, BLOCK = 24, 6, 7
WIDE = COUNT * BLOCK
X = torch.randn(2, 3, D)


class Written(nn.Module):
    """RMSNorm, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(COUNT))

    def forward(self, r):
        return self.weight * (r * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + 1e-6))


def viewed(r, h):
    h = F.silu(h)
    return (h.view(*h.shape[:-1], COUNT, BLOCK) * r.unsqueeze(-1)).flatten(-2)


def activated_behind_the_view(r, h):
    return (r[..., None] * F.silu(h.unflatten(-1, (COUNT, BLOCK)))).reshape(h.shape)


def repeated(r, h):
    return F.silu(h) * r.repeat_interleave(BLOCK, -1)


def expanded(r, h):
    return r.unsqueeze(-1).expand(*r.shape, BLOCK).reshape(h.shape) * F.silu(h)


class BlockFFN(nn.Module):
    """Song et al. 2025, without what is around it."""

    def __init__(
        self, norm: Callable = lambda: nn.RMSNorm(COUNT), form: Callable = viewed, act=F.relu
    ) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(D, COUNT), nn.Linear(D, WIDE)
        self.norm, self.form, self.act = norm(), form, act
        self.down = nn.Linear(WIDE, D)

    def forward(self, x):
        r = self.norm(self.act(self.router(x)))
        return x + self.down(self.form(r, self.up(x)))


def model_of(*args, **kwargs) -> BlockFFN:
    """With random parameters, of which RMSNorm's are of both signs."""
    model = randomise(BlockFFN(*args, **kwargs)).eval()
    weight = getattr(model.norm, "weight", None)
    if weight is not None:
        with torch.no_grad():
            weight[::2] *= -1
            assert (weight < 0).any()
    return model


SPELLINGS = {
    "views": (lambda: nn.RMSNorm(COUNT), viewed),
    "RMSNorm written out": (Written, viewed),
    "no norm": (nn.Identity, activated_behind_the_view),
    "repeat_interleave": (lambda: nn.RMSNorm(COUNT), repeated),
    "expand": (nn.Identity, expanded),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    model = model_of(*SPELLINGS[name])
    with torch.no_grad():
        model.router.bias.sub_(1)
        assert 0 < (F.relu(model.router(X)) > 0).float().mean() < 0.9
        result, report = run(model, X, **CPP)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1
    assert [m.note for m in report[NAME].matches] == ["blocks of 7 | a * silu(p1)"]
    assert [k.chosen for k in report.graphs[0].kernels] == ["cpp"]


def test_tokens_without_a_live_block_and_what_was_live() -> None:
    """Their networks give the bias of down, and no NaN."""
    model = model_of()
    with torch.no_grad():
        model.router.bias.fill_(-100.0)
        model.router.bias[2] = 100.0
        sparsecc.reset_live_neurons()
        result, report = run(model, X, count=True, **CPP)
        agrees_with_fp64(model, X, result)
        assert sparsecc.live_neurons()["down.weight"] == 1 / COUNT
        model.router.bias[2] = -100.0
        result, report = run(model, X, **CPP)
    assert report[NAME].applied == 1
    assert torch.equal(result, X + model.down.bias)


def test_verified_in_fp64_and_through_inductor() -> None:
    """Beside it a network of ReLU neurons: they are found apart, and a layer that reads another's result."""
    model = nn.Sequential(model_of(), nn.Linear(D, WIDE), nn.ReLU(), nn.Linear(WIDE, D), model_of())
    model = randomise(model).eval()
    with torch.no_grad():
        result, report = run(model, X, lower="inductor", verify="each", **CPP)
        agrees_with_fp64(model, X, result)
    assert report.verified
    notes = [m.note for m in report[NAME].matches]
    assert notes == ["blocks of 7 | a * silu(p1)", "relu(p0) | a", "blocks of 7 | a * silu(p1)"]
    assert report[NAME].applied == 3


def test_bfloat16() -> None:
    model, x = model_of().bfloat16(), X.bfloat16()
    with torch.no_grad():
        result, report = run(model, x, **CPP)
        agrees_with_fp64(model, x, result)
    assert report[NAME].applied == 1


def test_updated_after_compile_and_tied() -> None:
    """One up projection in two networks."""
    model = nn.Sequential(model_of(), model_of(nn.Identity, repeated))
    model[1].up.weight = model[0].up.weight
    report = sparsecc.Report()
    options = {"lower": "eager", "strict": True, "floor": False, "report": report, **CPP}
    with torch.no_grad():
        fast = torch.compile(model, backend="sparsecc", options=options)
        agrees_with_fp64(model, X, fast(X))
        for seed in (1, 2):
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
            agrees_with_fp64(model, X, fast(X))
    assert report[NAME].applied == 2
    assert model[1].up.weight is model[0].up.weight


def test_training_is_left_alone() -> None:
    def words() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, D), BlockFFN(), nn.Linear(D, 20))

    check_training(words, {NAME: 0}, **ONLY)
    model = randomise(BlockFFN())
    result, report = run(model, X, **CPP)
    assert refusals(report, NAME) == ["training"]
    result.sum().backward()
    assert model.router.weight.grad is not None


# ---- what stays ------------------------------------------------------------------------------------


class Shifted(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(COUNT)
        self.bias = nn.Parameter(torch.ones(COUNT))

    def forward(self, r):
        return super().forward(r) + self.bias


def across_blocks(r, h):
    """Neuron i is of block i % COUNT."""
    return (F.silu(h).unflatten(-1, (BLOCK, COUNT)) * r.unsqueeze(-2)).flatten(-2)


def transposed(r, h):
    return (F.silu(h).unflatten(-1, (BLOCK, COUNT)).mT * r.unsqueeze(-1)).flatten(-2)


class OfABlock(nn.Module):
    """A vector that is not over all neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(BLOCK))

    def forward(self, r, h):
        h = F.silu(h.unflatten(-1, (COUNT, BLOCK)) + self.shift)
        return (h * r.unsqueeze(-1)).flatten(-2)


def of_the_first_row(r, h):
    return viewed(r[:1], h)


OTHERS = {
    "LayerNorm": {"norm": lambda: nn.LayerNorm(COUNT)},
    "a shift": {"norm": Shifted},
    "sigmoid": {"act": torch.sigmoid},
    "another order": {"form": across_blocks},
    "transposed": {"form": transposed},
    "a vector over a block": {"form": OfABlock()},
    "broadcast over rows": {"form": of_the_first_row},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name: str) -> None:
    model = model_of(**OTHERS[name])
    with torch.no_grad():
        result, report = run(model, X, **ONLY)
        agrees_with_fp64(model, X, result)
    assert not report[NAME].matches


def test_gated_experts_and_others_that_read_what_is_inside() -> None:
    class Gated(BlockFFN):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(D, WIDE)

        def forward(self, x):
            r = self.norm(F.relu(self.router(x)))
            h = F.silu(self.gate(x)) * self.up(x)
            return self.down((h.view(*h.shape[:-1], COUNT, BLOCK) * r.unsqueeze(-1)).flatten(-2))

    class Net(BlockFFN):
        def forward(self, x):
            h = self.up(x)
            return self.down(repeated(F.relu(self.router(x)), h)) + h[..., :D]

    class Routed(BlockFFN):
        def forward(self, x):
            r = self.norm(F.relu(self.router(x)))
            return self.down(self.form(r, self.up(x))) + r.sum(-1, keepdim=True)

    with torch.no_grad():
        for build, applied in (
            (Gated, 0),
            (Net, 0),
            (Routed, 1),
        ):  # the router's values are there anyway
            model = randomise(build()).eval()
            result, report = run(model, X, **CPP)
            agrees_with_fp64(model, X, result)
            assert report[NAME].applied == applied


def test_refusals() -> None:
    class InPlace(BlockFFN):
        def forward(self, x):
            r = self.norm(F.relu(self.router(x)))
            h = self.form(r, self.up(x))
            x.add_(self.down.bias)
            return self.down(h) + x

    class Region(BlockFFN):
        def forward(self, x):
            h = self.form(self.norm(F.relu(self.router(x))), self.up(x))
            with torch.autocast("cpu", enabled=False):
                return self.down(h)

    recipe = Recipe("int8", sites={"up.weight": "int8"}, shapes={"up.weight": [WIDE, D]})
    cases = [
        (BlockFFN, torch.randn(17, D), {}, "rows"),
        (BlockFFN, torch.randn(5, D), {"dynamic": True}, "rows"),
        (BlockFFN, X, {"passes": {NAME: {"recipe": recipe}}}, "rounded"),
        (BlockFFN, X, {"passes": {NAME: {"least": 10**6}}}, "small"),
        (BlockFFN, X, {"passes": {NAME: {"devices": ["cuda"]}}}, "device"),
        (BlockFFN, X.double(), {}, "dtype"),
        (InPlace, X, {}, "written"),
        (Region, X, {}, "region"),
    ]
    with torch.no_grad():
        for build, x, options, code in cases:
            model = randomise(build()).eval().to(x.dtype)
            _, report = run(model, x.clone(), **{**ONLY, **options})
            assert refusals(report, NAME) == [code], code
