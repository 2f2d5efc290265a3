"""Feed-forward networks of 1×1 convolutions: what the view finds, and what becomes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalent import canonical
from support import capture, error, fp64, randomise, refusals, run
from torch import nn
from torch.nn import functional as F

from sparsecc.cli.timm_models import import_timm
from sparsecc.errors import CalibrationError
from sparsecc.methods.cfsp import cfsp
from sparsecc.networks import networks
from sparsecc.observe import observe
from sparsecc.observe_ffn import observe_ffn
from sparsecc.passes.analysis.ffn import FFN, find_ffns
from sparsecc.passes.base import Analyses
from sparsecc.recipe import Recipe
from sparsecc.sparsity import sparsify

NAME = "prune-neurons"
C, WIDTH, SIDE = 8, 12, 5
KEPT = torch.tensor([0, 2, 3, 7, 10])
IMAGE = torch.randn(2, C, SIDE, 6, generator=torch.Generator().manual_seed(1)).double()
LAST = torch.channels_last
FORMATS = pytest.mark.parametrize("order", [torch.contiguous_format, LAST], ids=["first", "last"])


class Net(nn.Module):
    """Layers of 1×1 convolutions, and a forward of them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.up = nn.Conv2d(C, WIDTH, 1), nn.Conv2d(C, WIDTH, 1, bias=False)
        self.both, self.down = nn.Conv2d(C, 2 * WIDTH, 1), nn.Conv2d(WIDTH, C, 1)
        self.gate1, self.down1 = nn.Conv1d(C, WIDTH, 1), nn.Conv1d(WIDTH, C, 1)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.wide, self.step = nn.Conv2d(C, WIDTH, 3, padding=1), nn.Conv2d(C, WIDTH, 1, stride=2)
        self.pad, self.pair = nn.Conv2d(C, WIDTH, 1, padding=1), nn.Conv2d(C, WIDTH, 1, groups=2)
        self.grouped = nn.Conv2d(WIDTH, C, 1, groups=2)
        self.back = nn.ConvTranspose2d(C, WIDTH, 1)
        self.rows, self.columns = nn.Linear(6, SIDE * 2), nn.Conv1d(C, C, 1)
        self.does = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.does(self, x)


def chunked(m: Net, x: torch.Tensor) -> torch.Tensor:
    up, gate = m.both(x).chunk(2, 1)
    return m.down(up * F.silu(gate))


def sliced(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.both(x)
    return m.down(F.gelu(y[:, :WIDTH]) * y[:, WIDTH:])


def flattened(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Pixels in a row: the channels stay on axis 1."""
    y = F.relu(m.gate(x).reshape(len(x), WIDTH, -1))
    return m.down1(y).reshape(x.shape)


def squeezed(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Squeeze and excitation, whose rows are the images."""
    return x * torch.sigmoid(m.down(F.relu(m.gate(x.mean((2, 3), keepdim=True)))))


FOUND: dict[str, tuple[str, Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "plain": ("plain", lambda m, x: x + m.down(F.gelu(m.gate(x)))),
    "gated": ("gated", lambda m, x: m.down(m.up(x) * torch.sigmoid(m.gate(x)))),
    "fused, chunks": ("fused", chunked),
    "fused, slices": ("fused", sliced),
    "flattened": ("plain", flattened),
    "squeezed": ("plain", squeezed),
}
OTHERS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "depthwise": lambda m, x: m.down(F.relu(m.depthwise(F.relu(m.gate(x))))),
    "batchnorm before": lambda m, x: m.down(F.relu(m.norm(m.gate(x)))),
    "batchnorm behind": lambda m, x: m.down(m.norm(F.relu(m.gate(x)))),
    "3×3": lambda m, x: m.down(F.relu(m.wide(x))),
    "strided": lambda m, x: m.down(F.relu(m.step(x))),
    "padded": lambda m, x: m.down(F.relu(m.pad(x))),
    "grouped up": lambda m, x: m.down(F.relu(m.pair(x))),
    "grouped down": lambda m, x: m.grouped(F.relu(m.gate(x))),
    "transposed": lambda m, x: m.down(F.relu(m.back(x))),
    "halves of rows": lambda m, x: m.down(
        F.relu(m.gate(x).chunk(2, -1)[0]) * m.gate(x).chunk(2, -1)[1]
    ),
    "a product along rows": lambda m, x: m.columns(F.relu(m.rows(x[:, :, 0]))),
    "pixels as channels": lambda m, x: m.down1(F.relu(m.gate(x).view(-1, WIDTH, SIDE))),
    "two inputs": lambda m, x: m.down(F.relu(m.gate(x)) * m.up(x + 1)),
}


def find(model: nn.Module, x: torch.Tensor) -> list[FFN]:
    with torch.no_grad():
        program = capture(model, x)
    canonical(program)
    return find_ffns(program, Analyses(program))


def recipe_of(site: str, kept: torch.Tensor = KEPT, size: int = WIDTH) -> Recipe:
    keep = {"law": "prune", "keep": len(kept) / size}
    return Recipe("by hand", sparsity={site: keep}, neurons={site: kept})


def masked(model: nn.Module, kept: dict[str, torch.Tensor]) -> nn.Module:
    """The same function with zeros where the neurons that weights read are pruned."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for site, neurons in kept.items():
            weight = found.get_parameter(site)
            live = torch.zeros(weight.shape[1], dtype=torch.bool).index_fill(0, neurons, True)
            weight[:, ~live] = 0
    return found


@FORMATS
@pytest.mark.parametrize("name", FOUND)
def test_sliced_equals_masked(name: str, order: torch.memory_format) -> None:
    kind, forward = FOUND[name]
    model, x = fp64(randomise(Net(forward))).eval(), IMAGE.to(memory_format=order)
    assert [(f.kind, f.axis, f.neurons) for f in find(model, x)] == [(kind, 1, WIDTH)]
    site = "down1.weight" if name == "flattened" else "down.weight"
    passes = {NAME: {"recipe": recipe_of(site)}}
    with torch.no_grad():
        result, report = run(model, x, passes=passes)
        expected = masked(model, {site: KEPT})(x)
        assert report[NAME].applied == 1, refusals(report, NAME)
        assert error(result, expected) < 1e-12
        assert error(model(x), expected) > 1e-3
        assert result.stride() == expected.stride()
    assert report[NAME].matches[0].note == f"{site}: 5 of 12 neurons"


def test_weights_say_where_channels_are() -> None:
    """Channels last by the weights alone: what is cut keeps their format."""
    model = fp64(randomise(Net(FOUND["gated"][1]))).eval().to(memory_format=LAST)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return model(x).permute(0, 2, 3, 1).view(-1, C)

    with torch.no_grad():
        passes = {NAME: {"recipe": recipe_of("down.weight")}}
        result, report = run(rows, IMAGE, passes=passes)
        assert report[NAME].applied == 1, refusals(report, NAME)
        expected = masked(model, {"down.weight": KEPT})(IMAGE).permute(0, 2, 3, 1).reshape(-1, C)
    assert error(result, expected) < 1e-12


@pytest.mark.parametrize("name", OTHERS)
def test_not_found(name: str) -> None:
    model = fp64(randomise(Net(OTHERS[name]))).eval()
    with torch.no_grad():
        model(IMAGE)
    assert find(model, IMAGE) == []


def test_broadcasting_pairs_no_neurons() -> None:
    """[1, F, W] times [1, F, 1, W]: the neurons of one factor meet those of the other."""

    def outer(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.down(F.relu(m.gate1(x.view(1, C, -1))) * m.up(x))

    assert find(fp64(randomise(Net(outer))).eval(), IMAGE[:1, :, :1]) == []


def test_any_size() -> None:
    model = fp64(randomise(Net(chunked))).eval()
    options = {"recipe": recipe_of("down.weight"), "require": {NAME: 1}, "lower": "eager"}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsecc", dynamic=True, options=options)
    with torch.no_grad():
        for size in ((2, 5, 6), (3, 4, 4)):
            x = torch.randn(size[0], C, *size[1:], dtype=torch.float64)
            assert error(fast(x), masked(model, {"down.weight": KEPT})(x)) < 1e-12


def _read_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(m.gate(x))
    return m.down(h) + h.sum(1, keepdim=True)


REFUSED: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "fan-out": _read_twice,
    "tied": lambda m, x: m.down(F.relu(m.gate(m.down(F.relu(m.gate(x)))))),
    "not-ffn": OTHERS["depthwise"],
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    model = fp64(randomise(Net(REFUSED[code]))).eval()
    with torch.no_grad():
        result, report = run(model, IMAGE, passes={NAME: {"recipe": recipe_of("down.weight")}})
        assert set(refusals(report, NAME)) == {code}
        assert error(result, model(IMAGE)) < 1e-12


def test_refuses_weights_in_another_order() -> None:
    model = fp64(randomise(Net(FOUND["plain"][1]))).eval()
    wide = torch.zeros(C, 2 * WIDTH, 1, 1, dtype=torch.float64)
    wide[:, ::2] = model.down.weight.detach()
    model.down.weight = nn.Parameter(wide[:, ::2])
    with torch.no_grad():
        _, report = run(model, IMAGE, passes={NAME: {"recipe": recipe_of("down.weight")}})
    assert refusals(report, NAME) == ["layout"]


@pytest.mark.parametrize("law", ["activation", "top", "core"])
def test_sparsify_ffn_refuses(law: str) -> None:
    given = Recipe("by hand", neurons={"down.weight": KEPT})
    given.sparsity["down.weight"] = {"law": law, "k": 3, "alpha": 0.5}
    given.thresholds["down.weight"] = torch.tensor([0.1])
    pixel = IMAGE[:1, :, :1, :1].float()  # of one row
    model = randomise(Net(FOUND["squeezed"][1])).eval()
    with torch.no_grad():
        result, report = run(model, pixel, passes={"sparsify-ffn": {"recipe": given}})
        assert refusals(report, "sparsify-ffn") == ["conv"]
        assert error(result, model(pixel)) < 1e-6


def test_skip_zeros_leaves_squeeze_and_excitation() -> None:
    model = randomise(Net(squeezed)).eval()
    with torch.no_grad():
        result, report = run(model, IMAGE.float(), passes=["skip-zeros"])
        assert not report["skip-zeros"].matches
        assert error(result, model(IMAGE.float())) < 1e-6


def test_observation_says_what_it_leaves_out() -> None:
    model = randomise(Net(FOUND["gated"][1])).eval()
    with pytest.raises(CalibrationError, match=r"Left out: down\.weight"):
        observe_ffn(model, [IMAGE.float()])
    both = nn.Sequential(
        model, nn.Flatten(), nn.Linear(C * SIDE * 6, 9), nn.ReLU(), nn.Linear(9, 4)
    )
    seen = observe_ffn(both.eval(), [IMAGE.float()] * 2)
    assert seen.left_out == ["0.down.weight"]
    assert list(seen.ffns) == ["4.weight"]
    recipe = sparsify(both, [IMAGE.float()] * 2, "cats", sparsity=0.5, budget=None)
    assert list(recipe.sparsity) == ["4.weight"]


# ---- timm's models, tiny ---------------------------------------------------------------------------


def poolformer() -> nn.Module:
    metaformer = import_timm().models.metaformer
    sizes = {"depths": (1, 1), "dims": (8, 12), "num_classes": 5, "use_mlp_head": False}
    return metaformer.MetaFormer(mlp_act=nn.GELU, **sizes)


def convnext() -> nn.Module:
    """LayerNorm2d leaves channels last between."""
    convnext = import_timm().models.convnext
    whole = convnext.ConvNeXt(depths=(1,) * 4, dims=(8,) * 4, conv_mlp=True, ls_init_value=None)
    return nn.Sequential(whole.stem, whole.stages[0])


def glu() -> nn.Module:
    from timm.layers import GluMlp

    return nn.Sequential(nn.Conv2d(3, 8, 3), GluMlp(8, 24, use_conv=True))


MODELS = {
    "poolformer": (poolformer, ["plain"] * 2),
    "convnext": (convnext, ["plain"]),
    "glu": (glu, ["fused"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_of_timm(name: str) -> None:
    build, kinds = MODELS[name]
    model = randomise(build()).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert [ffn.kind for ffn in find(model, x) if ffn.is_conv] == kinds
    known = networks(model, x)
    assert len(known) == len(kinds)
    recipe = cfsp(observe(model, [x]), known, 0.5, multiple=1)
    assert len(recipe.neurons) == len(kinds)
    model = fp64(model)
    options = {"recipe": recipe, "require": {NAME: len(kinds)}, "lower": "eager", "strict": True}
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend="sparsecc", options=options)(x.double())
        expected = masked(model, recipe.neurons)(x.double())
        assert error(result, expected) < 1e-12
        assert error(model(x.double()), expected) > 1e-6
