"""Experts whose weights are one stack of matrices: each that is selected by a number is a site of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quant_models import recipe_of
from support import capture, error, randomise, run
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc.passes.analysis.sites import sites
from sparsecc.passes.base import Analyses
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats

E, D, INNER = 3, 32, 64
X = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
SITES = sorted(f"experts.{name}.{e}" for name in ("gate_up_proj", "down_proj") for e in range(E))


class Experts(nn.Module):
    """Every expert on every token, weighted by the router: no shape depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * INNER, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, INNER))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for e in range(E):
            gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, -1)
            result = result + share[:, e, None] * F.linear(F.silu(gate) * up, self.down_proj[e])
        return result


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.RMSNorm(D), nn.Linear(D, E), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.experts(y, self.router(y).softmax(-1))


def rounded(model: nn.Module, recipe: Recipe, x: torch.Tensor) -> torch.Tensor:
    """The model in fp64 with each expert's product as its format means it; norms and routers as they are."""
    wide = copy.deepcopy(model).double()

    def product(y: torch.Tensor, name: str, e: int) -> torch.Tensor:
        weight, form = getattr(wide.experts, name)[e], recipe.sites.get(f"experts.{name}.{e}")
        if form is None:
            return F.linear(y, weight)
        return formats.product(y, form, formats.quantize(weight.detach(), form))

    y = wide.norm(x.double())
    share, result = wide.router(y).softmax(-1), torch.zeros_like(y)
    for e in range(E):
        gate, up = product(y, "gate_up_proj", e).chunk(2, -1)
        result = result + share[:, e, None] * product(F.silu(gate) * up, "down_proj", e)
    return x + result


def test_each_expert_has_a_name() -> None:
    with torch.no_grad():
        program = capture(randomise(Layer()).eval(), X)
    names = [site.name for site in Analyses(program).get(sites)]
    assert sorted(names) == sorted([*SITES, "router.weight"])


@pytest.mark.parametrize("codegen", ["aten", "cpp"])
def test_experts_have_formats_of_their_own(codegen: str) -> None:
    """Two formats and none, by the number of the expert; changed weights are rounded again."""
    model = randomise(Layer()).eval()
    recipe = recipe_of(model, X)
    recipe.scales.clear()
    recipe.sites = {s: "int8" if s.endswith("0") else "int4g32" for s in SITES if s[-1] != "2"}
    names: dict[str, Any] = {"quantize-linear": {"recipe": recipe}}
    names |= {"fuse-few-rows": {}} if codegen == "cpp" else {}
    report = sparsecc.Report()
    options = {"passes": names, "codegen": codegen, "lower": "eager", "report": report}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        for _ in range(2):
            result = fast(X)
            lost = error(rounded(model, recipe, X), copy.deepcopy(model).double()(X.double()))
            # An activation that lies between two steps may be rounded to the other one.
            assert error(result, rounded(model, recipe, X)) < lost / 10
            model.experts.down_proj[1, 3] *= -2
    notes = ", ".join(m.note for m in report["quantize-linear"].matches)
    assert report["quantize-linear"].refused == 0
    assert all(f"{site}: {form}" in notes for site, form in recipe.sites.items())


def test_calibrated() -> None:
    model = randomise(Layer()).eval()
    skip = ["router.weight", "*.2"]
    recipe = sparsecc.calibrate(model, [X, X + 1], methods={"awq": {"group": 32, "skip": skip}})
    assert sorted(recipe.sites) == [s for s in SITES if s[-1] != "2"]
    with torch.no_grad():
        result, report = run(model, X, recipe=recipe, verify="each")
        exact = copy.deepcopy(model).double()(X.double())
    assert report.verified
    assert report["quantize-linear"].refused == 0
    assert 1e-4 < error(result, exact) < 0.1


class Routed(nn.Module):
    """The weight of each token's own expert: it depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.weight[(x[:, 0] > 0).long()]
        return F.linear(torch.bmm(chosen, x[..., None])[..., 0], self.weight[-2])


class Slices(nn.Module):
    """Of a stack two matrices at once, and a column of each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            F.linear(x, self.weight[0] + self.weight[-1]) + F.linear(x, self.weight[:2, 0])[:, :1]
        )


@pytest.mark.parametrize(
    ("model", "names"), [(Routed(), ["weight.1"]), (Slices(), ["weight", "weight"])]
)
def test_what_is_no_single_matrix(model: nn.Module, names: list[str]) -> None:
    with torch.no_grad():
        program = capture(randomise(model).eval(), X)
    assert [site.name for site in Analyses(program).get(sites)] == names
