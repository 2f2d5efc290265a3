"""raise-linear: products and convolutions as linear layers, what rounds them, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import capture, check_exact, error, fp64, managed_by_fsdp, randomise, refusals, run
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc import pipeline
from sparsecc.methods import make
from sparsecc.observe import observe
from sparsecc.options import Options
from sparsecc.recipe import Recipe
from sparsecc.report.model import GraphReport
from sparsecc.runtime.ops import formats
from sparsecc.simulate import simulate

NAME = "raise-linear"
ROUND = "quantize-linear"
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
PHOTOS = torch.randn(4, 6, 16, 12, generator=torch.Generator().manual_seed(2))


def asked(recipe: Recipe | None = None, **options: Any) -> dict[str, Any]:
    """The pass alone, for the sites of a recipe or for all."""
    return {"passes": {NAME: {"recipe": recipe}}, **options}


class Products(nn.Module):
    """Every spelling of a product with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(16, 8)), nn.Parameter(torch.empty(8, 12))
        self.c, self.d = nn.Parameter(torch.empty(12, 8)), nn.Parameter(torch.empty(6, 8))
        self.bias = nn.Parameter(torch.empty(8))

    def forward(self, x):
        rows = torch.addmm(self.bias, x.flatten(0, 1), self.a).relu()
        rows = torch.mm(rows, self.b).relu()
        y = torch.matmul(rows.unflatten(0, x.shape[:2]), self.c)
        return y @ self.d.t()


class Convolutions(nn.Module):
    """Patches, one position with and without a step, BatchNorm and ReLU6, a depthwise one and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1 = nn.Conv2d(6, 16, (4, 2), (4, 2)), nn.BatchNorm2d(16)
        self.wide, self.norm2 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.step = nn.Conv2d(24, 8, 1, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu6(self.norm1(self.patches(x)))
        y = F.relu6(self.norm2(self.wide(y)))
        return self.head(self.step(self.depthwise(y).relu()).mean((2, 3)))


RAISED = ["patches.weight", "step.weight", "wide.weight"]


def test_every_spelling_of_a_product_is_a_linear_layer() -> None:
    report = check_exact(randomise(Products()).eval(), X, applied={NAME: 4}, **asked())
    assert [m.note for m in report[NAME].matches] == ["a", "b", "c", "d"]


LAYERS = {
    "one position": (nn.Conv2d(6, 8, 1), PHOTOS),
    "a step": (nn.Conv2d(6, 8, 1, stride=(3, 2), bias=False), PHOTOS),
    "patches": (nn.Conv2d(6, 8, (4, 2), (4, 2)), PHOTOS),
    "patches that leave a rest": (nn.Conv2d(6, 8, (3, 5), (3, 5)), PHOTOS),
    "overlapping patches": (nn.Conv2d(6, 8, 3, 2, padding=(1, 0)), PHOTOS),
    "spread taps": (nn.Conv2d(6, 8, (3, 2), padding=2, dilation=(2, 3)), PHOTOS),
    "one position, padded": (nn.Conv2d(6, 8, 1, padding=1), PHOTOS),
    "padded to its size": (nn.Conv2d(6, 8, 3, padding="same"), PHOTOS),
    "1d": (nn.Conv1d(6, 8, 4, 4), PHOTOS[..., 0]),
    "3d": (nn.Conv3d(6, 8, (1, 2, 2), (1, 2, 2)), PHOTOS.unflatten(2, (4, 4))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_is_a_linear_layer_on_its_patches(name: str) -> None:
    layer, x = LAYERS[name]
    model = randomise(copy.deepcopy(layer)).eval()
    recipe = Recipe("by hand", sites={"weight": "int8"})
    check_exact(model, x, applied={NAME: 1}, **asked(recipe))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_result_has_the_strides_of_the_convolutions(layout: torch.memory_format) -> None:
    """Channels last without a copy."""
    model = randomise(nn.Conv2d(6, 8, 1)).eval().to(memory_format=layout)
    x = PHOTOS.contiguous(memory_format=layout)
    with torch.no_grad():
        program = capture(model, x)
        pipeline.run(program, Options.parse(asked()), GraphReport(0))
        result, expected = program.output().args[0][0].meta["val"], model(x)
    assert result.stride() == expected.stride()
    activations = [
        n for n in program.calls(torch.ops.aten.clone.default) if n.meta["val"].dim() == 4
    ]
    assert len(activations) == (layout is torch.contiguous_format)


def test_sizes_that_change() -> None:
    """Not known, and of another number than the first time."""
    model = randomise(nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, 2))).eval()
    report = sparsecc.Report()
    options = asked(report=report, lower="eager", floor=False)
    fast = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    with torch.no_grad():
        for x in (PHOTOS, PHOTOS[:3, :, :9, :7].contiguous()):
            assert error(fast(x), fp64(model)(x.double())) < 1e-6
    assert (report[NAME].applied, refusals(report, NAME)) == (1, ["size"])


def test_only_the_sites_of_a_recipe_are_raised() -> None:
    recipe = Recipe("by hand", sites={"wide.weight": "int8"})
    model = randomise(Convolutions()).eval()
    report = check_exact(model, PHOTOS, applied={NAME: 1}, **asked(recipe))
    assert [m.note for m in report[NAME].matches] == ["wide.weight"]


def observed(model: nn.Module) -> list[str]:
    """The refusals of the pass where no recipe says what it asks for."""
    with torch.no_grad():
        _, report = run(randomise(copy.deepcopy(model)).eval(), PHOTOS, **asked())
    return refusals(report, NAME)


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (nn.Conv2d(6, 6, 1, groups=2), "grouped"),
        (nn.ConvTranspose2d(6, 6, 1), "transposed"),
        (nn.Conv2d(6, 6, (4, 2), padding="same"), "padding"),
    ],
)
def test_what_is_no_product_is_refused(layer: nn.Module, code: str) -> None:
    assert observed(layer) == [code]
    model = randomise(copy.deepcopy(layer)).eval()
    recipe = Recipe("by hand", sites={"weight": "int8"})
    with torch.no_grad():
        result, report = run(model, PHOTOS, recipe=recipe)
        assert error(result, fp64(model)(PHOTOS.double())) < 1e-6
    assert refusals(report, NAME) == [code]


def test_patches_that_overlap_are_not_observed() -> None:
    assert observed(nn.Conv2d(6, 6, 3)) == ["overlap"]
    assert observed(nn.Conv2d(6, 6, 1, padding=1)) == ["overlap"]
    assert observed(nn.Conv2d(6, 6, 2, 2, dilation=2)) == ["overlap"]


def test_an_overlapping_convolution_that_a_recipe_names_is_rounded() -> None:
    """As the format means it, on patches: int8 for each output position and each output channel."""
    model = randomise(nn.Conv2d(6, 8, 3, padding=1)).eval()
    recipe = Recipe("by hand", sites={"weight": "int8"}, shapes={"weight": [8, 54]})
    with torch.no_grad():
        result, report = run(model, PHOTOS, recipe=recipe)
        rows = F.unfold(PHOTOS, 3, padding=1).transpose(1, 2).double()
        kept = formats.quantize(model.weight.flatten(1), "int8")
        meant = formats.product(rows, "int8", kept) + model.bias.double()
        meant, exact = meant.transpose(1, 2).view(result.shape), fp64(model)(PHOTOS.double())
    assert (report[NAME].applied, report[ROUND].applied) == (1, 1)
    loss = error(meant, exact)
    assert 1e-4 < loss < 0.02
    assert error(result, meant) < loss / 4


def test_what_is_computed_anew_in_each_call_is_refused() -> None:
    recipe = Recipe("by hand", sites={"weight": "int8"})
    layer = randomise(nn.Conv2d(6, 8, 1))
    _, report = run(copy.deepcopy(layer).train(), PHOTOS, recipe=recipe)
    assert refusals(report, NAME) == ["training"]
    with torch.no_grad():
        _, report = run(managed_by_fsdp(copy.deepcopy(layer).eval()), PHOTOS, recipe=recipe)
    assert refusals(report, NAME) == ["gathered"]


@pytest.mark.parametrize("method", ["int8", "repq", "int4"])
def test_convolutions_are_rounded_like_linear_layers(method: str) -> None:
    """Under the names of their weights, BatchNorm folded; the depthwise one stays."""
    model = randomise(Convolutions()).eval()
    seen = observe(model, [PHOTOS], progress=False)
    assert sorted(seen.sites) == ["head.weight", *RAISED]
    recipe = make(method, seen)
    with torch.no_grad():
        result, report = run(model, PHOTOS, recipe=recipe)
        (meant,), exact = simulate(model, recipe, seen, [PHOTOS]), fp64(model)(PHOTOS.double())
    assert (report[NAME].applied, report[ROUND].applied, report[ROUND].refused) == (3, 4, 0)
    loss = error(meant, exact)
    assert 1e-4 < loss < (0.1 if method == "int4" else 0.02)
    # An activation that lies between two steps may be rounded to the other one.
    assert error(result, meant) < loss / 4


@pytest.mark.parametrize(
    "skip", [[], ["0.weight"]]
)  # a producer that is raised, and one that is not
def test_scales_move_between_convolutions(skip: list[str]) -> None:
    layers = (nn.Conv2d(6, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 1))
    model = randomise(nn.Sequential(*layers)).eval()
    seen = observe(model, [PHOTOS], progress=False)
    recipe = make("smoothquant", seen, skip=skip)
    assert set(recipe.scales) == {"linear-linear: 2.weight", "linear-linear: 4.weight"}
    with torch.no_grad():
        result, report = run(model, PHOTOS, recipe=recipe)
        (meant,), exact = simulate(model, recipe, seen, [PHOTOS]), fp64(model)(PHOTOS.double())
    assert (report["migrate-channels"].applied, report[ROUND].applied) == (2, 3 - len(skip))
    loss = error(meant, exact)
    assert 1e-4 < loss < 0.02
    assert error(result, meant) < loss / 4


def test_observation_sees_the_patches_in_the_order_of_the_weight() -> None:
    model = randomise(Convolutions()).eval()
    other = nn.Conv2d(3, 4, 2, 2).eval()  # of other sizes: they must not be dynamic in the next
    observe(other, [torch.randn(2, 3, 8, 8)], progress=False)
    seen = observe(model, [PHOTOS[:2], PHOTOS[2:]], progress=False)
    patches = PHOTOS.unfold(2, 4, 4).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
    rows = patches.flatten(0, 2).flatten(1).double()
    statistics = seen.input("patches.weight")
    assert seen.sites["patches.weight"].shape == [16, 48]
    assert statistics.rows == len(rows) == 4 * 4 * 6
    assert torch.equal(statistics.low, rows.amin(0))
    assert torch.equal(statistics.high, rows.amax(0))
    assert seen.input("step.weight").rows == 4 * 2 * 3
    with torch.no_grad():  # the folded weight, flattened in the same order
        scale = (model.norm1.running_var.double() + model.norm1.eps).rsqrt() * model.norm1.weight
        expected = F.conv2d(PHOTOS.double(), model.patches.weight.double(), None, (4, 2))
        expected = (expected * scale[:, None, None]).transpose(0, 1).flatten(1)
    assert error(seen.weight("patches.weight").double() @ rows.T, expected) < 1e-6


def test_gpt2_is_rounded_under_the_names_of_its_parameters() -> None:
    """transformers' Conv1D keeps its weight as [K, N] and multiplies by addmm."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = randomise(transformers.GPT2LMHeadModel(config)).eval()
    tokens = torch.arange(24).reshape(3, 8)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits

    seen = observe(forward, [tokens], progress=False)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = {f"transformer.h.0.{layer}.weight" for layer in layers}
    assert set(seen.sites) == {*names, "transformer.wte.weight"}
    assert seen.sites["transformer.h.0.attn.c_attn.weight"].shape == [96, 32]
    recipe = make("int8", seen, skip=["*wte*"])
    with torch.no_grad():
        result, report = run(forward, tokens, recipe=recipe)
        (meant,), exact = simulate(forward, recipe, seen, [tokens]), forward(tokens)
        assert {m.note for m in report[NAME].matches} == names
        assert (report[NAME].applied, report[ROUND].applied) == (4, 4)
        loss = error(meant, exact.double())
        assert 1e-4 < loss < 0.05
        assert error(result, meant) < loss / 2
