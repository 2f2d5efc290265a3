"""quantize-linear: which weights are rounded, what the rounded program computes, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from quant_models import Net, Pair, Tokens, recipe_of
from support import error, managed_by_fsdp, randomise, run
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import sparsecc
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats

NAME = "quantize-linear"
X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """A norm with two readers that make one region of a few rows, a bias, and a residual."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(size)
        self.gate, self.up = nn.Linear(size, 64, bias=False), nn.Linear(size, 64)
        self.down = nn.Linear(64, size)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def only(recipe: Recipe, codegen: str = "aten", **options: Any) -> dict[str, Any]:
    """The rounding alone; with kernels also the regions that it rounds."""
    names: dict[str, Any] = {NAME: {"recipe": replace(recipe, scales={}, shifts={})}}
    if codegen != "aten":
        names["fuse-few-rows"] = {}
    return {"passes": names, "codegen": codegen, **options}


def rounded(model: nn.Module, recipe: Recipe) -> nn.Module:
    """``model`` with every linear layer computed as its format means it, in fp64."""
    twin = copy.deepcopy(model).double()
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.Linear) and f"{name}.weight" in recipe.sites:
            form = recipe.sites[f"{name}.weight"]
            step = recipe.activations.get(f"{name}.weight", 1.0)
            kept = formats.quantize(layer.weight.detach() * step, form)

            def forward(x, form=form, kept=kept, bias=layer.bias, step=step):
                y = formats.product(x / step, form, kept)
                return y if bias is None else y + bias

            layer.forward = forward  # type: ignore[method-assign]
    return twin


FORMATS = ["int8", "int4g32", "int4g32z", "int4g32a8", "int4g32za8", "bf16"]


@pytest.mark.parametrize("codegen", ["aten", "cpp"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_rounded_program_is_what_its_format_means(form: str, codegen: str) -> None:
    """To fp32's rounding, which is far below what the format loses."""
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X, form=form)
    assert set(recipe.sites) == {"gate.weight", "up.weight", "down.weight"}
    with torch.no_grad():
        result, report = run(model, X, **only(recipe, codegen))
        meant, exact = rounded(model, recipe)(X.double()), copy.deepcopy(model).double()(X.double())
    assert report[NAME].applied == (3 if codegen == "aten" else 2)
    loss = error(meant, exact)
    assert 1e-4 < loss < 0.2
    # An activation that lies between two steps may be rounded to the other one.
    assert error(result, meant) < loss / 10
    assert {k.chosen for k in report.graphs[0].kernels} == {codegen}


def test_sites_that_the_recipe_leaves_out_stay_as_they_are() -> None:
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X)
    del recipe.sites["up.weight"]
    with torch.no_grad():
        result, report = run(model, X, **only(recipe, "cpp"))
        assert error(result, rounded(model, recipe)(X.double())) < 1e-3
    notes = [m.note for m in report[NAME].matches]
    assert notes == ["gate.weight: int8", "down.weight: int8"]
    words = [k.region for k in report.graphs[0].kernels]
    assert words[0] == "none | silu(p0) * (p1 + v0)"


@pytest.mark.parametrize("left", [(), ("up.weight",)])
@pytest.mark.parametrize(
    "codegen", ["aten", "cpp"]
)  # without the region's norm, and with it inside
def test_a_step_that_no_link_holds_goes_into_the_weights(
    left: tuple[str, ...], codegen: str
) -> None:
    """x / s is what the product reads, and s goes into every weight that reads it, rounded or not."""
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X, form="int8s")
    for site in left:
        del recipe.sites[site]
    with torch.no_grad():
        y = model.norm(X)
        hidden = F.silu(model.gate(y)) * model.up(y)
        for value, readers in ((y, ("gate.weight", "up.weight")), (hidden, ("down.weight",))):
            step = float(value.abs().max()) / 127
            recipe.activations |= {site: step for site in readers if site in recipe.sites}
        result, _ = run(model, X, **only(recipe, codegen))
        meant, exact = rounded(model, recipe)(X.double()), copy.deepcopy(model).double()(X.double())
    lost = error(meant, exact)
    assert 1e-4 < lost < 0.05
    # An activation that lies between two steps may be rounded to the other one.
    assert error(result, meant) < lost / 4


def test_steps_of_one_input_must_be_one() -> None:
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X)
    recipe.activations = {"gate.weight": 0.25, "up.weight": 0.5}
    with (
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match=r"read one input.*0\.25, 0\.5"),
    ):
        run(model, X, strict=False, **only(recipe, "cpp"))


@pytest.mark.parametrize("codegen", ["aten", "cpp"])
def test_clips_and_corrections(codegen: str) -> None:
    """With U V = W − W' the rounded product is exact again; a clipped weight is that of its bound."""
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X, form="int4g32")
    exact = copy.deepcopy(model).double()
    for name in recipe.sites:
        weight = exact.get_parameter(name)
        recipe.clips[name] = torch.full((weight.shape[0], weight.shape[1] // 32), 0.75)
        bound = (0.75 * weight.abs().unflatten(1, (-1, 32)).amax(-1)).repeat_interleave(32, 1)
        kept = formats.quantize(weight.detach().clamp(-bound, bound), "int4g32")
        left = weight - formats.dequantize("int4g32", kept, torch.float64)
        u, s, v = torch.linalg.svd(left.detach(), full_matrices=False)
        recipe.corrections[name] = ((u * s).float(), v.float())
    with torch.no_grad():
        result, report = run(model, X, **only(recipe, codegen))
        assert error(result, exact(X.double())) < 1e-6
        recipe.corrections.clear()
        lossy, _ = run(model, X, **only(recipe, codegen))
        assert error(lossy, exact(X.double())) > 1e-2
    assert report[NAME].refused == 0


def test_updated_after_compile() -> None:
    """To the bits of a fresh compile, with the scales that the recipe migrates."""
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X)
    assert recipe.scales
    options = {"recipe": recipe, "lower": "eager", "strict": True}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        before = fast(X)
        model.down.weight.data.mul_(3)
        model.up.weight[3, 4] += 0.5
        after = fast(X)
        fresh, _ = run(model, X, recipe=recipe)
    assert torch.equal(after, fresh)
    assert error(after, before) > 0.1


def test_a_tied_head_is_rounded_as_a_copy() -> None:
    """The embedding reads the original."""
    model = randomise(Tokens()).eval()
    model.head = nn.Linear(12, 16, bias=False)
    model = nn.Sequential(model, nn.Linear(16, 20, bias=False)).eval()
    model[1].weight = model[0].embed.weight
    ids = torch.randint(0, 20, (2, 5))
    recipe = recipe_of(model, ids)
    (tied,) = [name for name in recipe.sites if "embed" in name]
    recipe.sites, recipe.scales, recipe.shifts = {tied: "int8"}, {}, {}
    with torch.no_grad():
        result, report = run(model, ids, **only(recipe))
        assert report[NAME].applied == 1
        body = model[0](ids).double()
        kept = formats.quantize(model[1].weight.detach().double(), "int8")
        assert error(result, formats.product(body, "int8", kept)) < 1e-3


def test_any_batch() -> None:
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X)
    torch._dynamo.reset()
    fast = torch.compile(
        model, backend="sparsecc", dynamic=True, options={"lower": "eager", **only(recipe)}
    )
    with torch.no_grad():
        for batch in (3, 1, 40):
            x = torch.randn(batch, 5, 32)
            assert error(fast(x), rounded(model, recipe)(x.double())) < 1e-3


def test_exact_passes_are_proved_before_anything_is_rounded() -> None:
    """The algebra of a recipe's migration in fp64; what runs is held to the error of the rounding."""
    model = randomise(Net()).eval()
    x = torch.randn(3, 5, 16)
    recipe = recipe_of(model, x)
    with torch.no_grad():
        result, report = run(model, x, recipe=recipe, lower="inductor", verify="each")
        exact = copy.deepcopy(model).double()(x.double())
    assert report.verified
    stages = [v.stage for v in report.verdicts]
    assert "migrate-channels" in stages
    assert NAME not in stages
    final = report.verdicts[-1]
    assert final.algebra < 1e-12
    assert 1e-4 < final.loss < 0.2
    assert error(result, exact) < 0.2


class Cancelling(nn.Module):
    """Float arithmetic loses three digits here, whoever multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)

    def forward(self, x):
        return self.layer(x) + 1000 - 1000


def test_weights_on_their_grid_are_held_to_the_error_of_float_products() -> None:
    """Rounding loses nothing of them: what is left is eager's own error, not none."""
    model = randomise(Cancelling()).eval()
    recipe = recipe_of(model, X, form="int4g32")
    kept = formats.quantize(model.layer.weight.detach().double(), "int4g32")
    recipe.grids["layer.weight"] = (kept[1], None)
    with torch.no_grad():
        model.layer.weight.copy_(formats.dequantize("int4g32", kept, torch.float64))
        _, report = run(model, X, recipe=recipe, verify="final")
    (verdict,) = report.verdicts
    assert report[NAME].applied == 1
    assert verdict.passed
    assert verdict.loss is not None
    assert verdict.loss < 1e-12


def test_a_kernel_that_rounds_more_than_the_recipe_is_caught(monkeypatch) -> None:
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X)
    monkeypatch.setattr(
        "sparsecc.proof.Reference._run_eager", lambda self: list(self.program.module(*self.inputs))
    )
    from sparsecc import driver

    real = driver.FirstCall

    def wrong(compiled, *rest):
        return real(lambda *args: tuple(v * 1.05 for v in compiled(*args)), *rest)

    monkeypatch.setattr(driver, "FirstCall", wrong)
    with torch.no_grad(), pytest.raises(sparsecc.VerificationError, match="lossy by"):
        run(model, X, verify="final", **only(recipe))


def test_refuses_what_was_rounded_behind_scales_that_this_graph_does_not_carry() -> None:
    """Steps and ranges were chosen for scaled values; without the scales they would be another model's."""
    model = randomise(Layers()).eval()
    recipe = recipe_of(model, X)
    behind_up_and_down = {"up-down: down.weight"}
    assert behind_up_and_down < {*recipe.scales}
    with torch.no_grad():
        _, report = run(model, X, passes={NAME: {"recipe": recipe}})
        assert {m.code for m in report[NAME].refusals} == {"unmigrated"}
        assert report[NAME].applied == 0

        def shown(x):  # the value between up and down is an output: no link
            h = model.norm(x)
            y = F.silu(model.gate(h)) * model.up(h)
            return model.down(y), y

        named = {f"model.{n}": f for n, f in recipe.sites.items()} | recipe.sites
        recipe = replace(recipe, sites=named)
        _, report = run(shown, X, recipe=recipe)
    assert [m.code for m in report[NAME].refusals] == ["unmigrated"]
    assert report[NAME].applied == 2


REFUSED: dict[str, tuple[nn.Module, torch.Tensor, str]] = {
    "size": (Pair(), torch.randn(2, 16), "int4g32"),
    "dtype": (Layers().double(), X.double(), "int8"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    model, x, form = REFUSED[code]
    model = randomise(model).eval()
    with torch.no_grad():
        result, report = run(model, x, **only(recipe_of(model, x, form=form)))
        assert error(result, model(x)) < 1e-6
    assert {m.code for m in report[NAME].refusals} == {code}
    assert report[NAME].applied == 0


def test_refuses_in_training_when_gathered_and_under_autocast() -> None:
    model = randomise(Layers())
    recipe = recipe_of(model, X)
    _, report = run(model.train(), X, **only(recipe))
    assert {m.code for m in report[NAME].refusals} == {"training"}
    model.eval()
    with torch.no_grad():
        _, report = run(managed_by_fsdp(copy.deepcopy(model)), X, **only(recipe))
        assert {m.code for m in report[NAME].refusals} == {"gathered"}

        def narrowed(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        names = {f"model.{n}": f for n, f in recipe.sites.items()} | recipe.sites
        _, report = run(narrowed, X, **only(Recipe("by hand", sites=names)))
    assert {m.code for m in report[NAME].refusals} == {"region"}


def test_a_recipe_of_another_model_is_an_error() -> None:
    recipe = recipe_of(randomise(Layers()).eval(), X)
    other = randomise(Layers(48)).eval()
    with (
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match=r"gate.weight is \[64, 48\] here"),
    ):
        run(other, torch.randn(2, 48), strict=False, **only(recipe))
