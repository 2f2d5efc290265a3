"""sparsify-input: products with what is left of their input, for few rows and for many, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quant_models import recipe_of
from sparse_models import sizes_of_outputs
from support import error, fp64, managed_by_fsdp, randomise, run
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from sparsecc.errors import RecipeError
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats

NAME = "sparsify-input"
D = 32
GENERATOR = torch.Generator().manual_seed(1)
FEW, MANY = torch.randn(2, 1, D, generator=GENERATOR), torch.randn(3, 7, D, generator=GENERATOR)
INPUTS = pytest.mark.parametrize("x", [FEW, MANY], ids=["few", "many"])
LIMITS = {
    "q.weight": torch.tensor([0.3]),
    "k.weight": torch.tensor([0.9]),
    "o.weight": torch.rand(D),
}


class Layers(nn.Module):
    """Two layers of one input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.o = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x)) * torch.tanh(self.k(x)))


def recipe(limits: dict[str, torch.Tensor] = LIMITS, **fields: Any) -> Recipe:
    found = Recipe("by hand", thresholds=dict(limits), **fields)
    found.sparsity = {site: {"law": "input", "density": 0.5} for site in limits}
    return found


def sparse(model: nn.Module, limits: dict[str, torch.Tensor], form: str | None = None) -> nn.Module:
    """``model`` in fp64 with small inputs set to zero, and weights in a format by input feature."""
    twin = copy.deepcopy(model).double()
    for name, layer in twin.named_children():
        t = limits[f"{name}.weight"].double()
        weight = layer.weight.detach()
        if form is not None:
            scale = sizes_of_outputs(weight)
            kept = formats.quantize((weight.t() / scale).contiguous(), form)
            weight = (formats.dequantize(form, kept, torch.float64) * scale).t()

        def forward(x: Any, t: Any = t, weight: Any = weight, bias: Any = layer.bias) -> Any:
            return nn.functional.linear(x * (x.abs() > t), weight, bias)

        layer.forward = forward  # type: ignore[method-assign]
    return twin


def only(given: Recipe) -> dict[str, Any]:
    return {"passes": {NAME: {"recipe": given}}, "codegen": "aten"}


@INPUTS
@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_of_one_input_have_thresholds_of_their_own(x: torch.Tensor, dynamic: bool) -> None:
    model = randomise(Layers()).eval()
    with torch.no_grad():
        result, report = run(model, x, dynamic=dynamic, **only(recipe()))
        meant, exact = sparse(model, LIMITS)(x.double()), fp64(model)(x.double())
    assert report[NAME].applied == 3
    assert error(result, meant) < 1e-6
    assert error(exact, meant) > 0.01


@INPUTS
def test_zero_leaves_the_model_as_it_is(x: torch.Tensor) -> None:
    model = randomise(Layers()).eval()
    with torch.no_grad():
        result, report = run(model, x, **only(recipe(dict.fromkeys(LIMITS, torch.zeros(1)))))
        exact = fp64(model)(x.double())
    assert report[NAME].applied == 3
    assert error(result, exact) < 1e-6


@INPUTS
def test_rounded_weights(x: torch.Tensor) -> None:
    model = randomise(Layers()).eval()
    found = recipe_of(model, x, form="int8")
    given = recipe(sites=found.sites, shapes=found.shapes)
    with torch.no_grad():
        result, report = run(model, x, recipe=given, codegen="aten")
        expected = sparse(model, LIMITS, "int8")(x.double())
        exact = sparse(model, LIMITS)(x.double())
    assert report[NAME].applied == 3
    assert report["quantize-linear"].applied == 0
    assert error(result, expected) < error(exact, expected) / 100


class Narrowed(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Written(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = self.q(y)
        y.transpose(0, 1).mul_(3)
        return y + z


def refused(model: nn.Module, given: Recipe, x: torch.Tensor = FEW) -> set[str]:
    model = randomise(model).eval()
    with torch.no_grad():
        _, report = run(model, x, **only(given))
    assert report[NAME].applied == 0
    return {r.code for r in report[NAME].refusals}


def test_what_is_refused() -> None:
    _, report = run(randomise(Layers()), FEW.clone().requires_grad_(), **only(recipe()))
    assert [r.code for r in report[NAME].refusals] == ["training"] * 3
    assert refused(managed_by_fsdp(Layers()), recipe()) == {"gathered"}
    assert refused(Narrowed(), recipe()) == {"region"}
    assert refused(Written(), recipe()) == {"written"}
    assert refused(Layers().to(torch.complex64), recipe(), FEW + 0j) == {"dtype"}
    one = {"o.weight": torch.ones(1)}
    link = "linear-linear: o.weight"
    assert refused(Layers(), recipe(one, scales={link: torch.ones(D)})) == {"moved"}
    assert refused(Layers(), recipe(one, sites={"o.weight": "int4g64"})) == {"size"}
    step = recipe(one, sites={"o.weight": "int8s"}, activations={"o.weight": 0.5})
    assert refused(Layers(), step) == {"step"}
    grid = {"o.weight": (torch.ones(D, 1), None)}
    assert refused(Layers(), recipe(one, sites={"o.weight": "int8"}, grids=grid)) == {"given"}


def test_recipes_that_do_not_fit() -> None:
    model = randomise(Layers()).eval()
    for given, words in (
        (recipe({"q.weight": torch.ones(7)}), "needs thresholds"),
        (recipe(shapes={"q.weight": [D, 7]}), "of another model"),
    ):
        torch._dynamo.reset()
        with pytest.raises((RecipeError, BackendCompilerFailed), match=words), torch.no_grad():
            run(model, FEW, **only(given))


def test_nothing_is_left_out_unasked() -> None:
    with torch.no_grad():
        _, report = run(randomise(Layers()).eval(), FEW, recipe=Recipe("by hand"))
    assert report[NAME].applied == report[NAME].refused == 0
