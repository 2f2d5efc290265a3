"""merge-concatenated: parallel layers whose results are joined, as one, and where they must stay apart."""

from __future__ import annotations

import copy

import pytest
import torch
from support import check_exact, check_training, error, managed_by_fsdp, randomise, refusals, run
from torch import nn

NAME = "merge-concatenated"
ONLY = {"passes": [NAME]}
SPACE = torch.randn(2, 4, 7, 6)


class Joined(nn.Module):
    def __init__(self, *layers: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.layers, self.dim = nn.ModuleList(layers), dim

    def forward(self, x):
        return torch.relu(torch.cat([layer(x) for layer in self.layers], self.dim))


def conv(out: int, kernel: int = 3, **options) -> nn.Module:
    return nn.Conv2d(4, out, kernel, **{"padding": kernel // 2, **options})


PARTS = {
    "two": (conv(6), conv(3)),
    "three, one without bias": (conv(6), conv(3, bias=False), conv(4)),
    "strided, without bias": (
        conv(6, stride=2, bias=False),
        conv(2, stride=2, bias=False),
    ),
    "transposed": (nn.ConvTranspose2d(4, 3, 2), nn.ConvTranspose2d(4, 5, 2)),
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_convolutions(parts: str, dynamic: bool | None) -> None:
    model = randomise(Joined(*PARTS[parts]))
    check_exact(model, SPACE, applied={NAME: 1}, dynamic=dynamic, **ONLY)


@pytest.mark.parametrize("dim", [-1, 2])
def test_linear_layers(dim: int) -> None:
    layers = nn.Linear(4, 5), nn.Linear(4, 3, bias=False), nn.Linear(4, 8)
    model = randomise(Joined(*layers, dim=dim))
    check_exact(model, torch.randn(2, 5, 4), applied={NAME: 1}, **ONLY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_eager(dtype: torch.dtype) -> None:
    model = randomise(Joined(conv(6), conv(3))).to(dtype)
    x = SPACE.to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        result, report = run(model, x, **ONLY)
        eager = model(x)
    assert report[NAME].applied == 1
    assert error(result, exact) <= 1.5 * error(eager, exact)


def test_updated_after_compile() -> None:
    model = randomise(Joined(conv(6), conv(3, bias=False)))
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 1}}
    )
    with torch.no_grad():
        for seed in (1, 2):
            assert error(fast(SPACE), model(SPACE)) < 1e-5
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
        model.layers[1].weight.data.mul_(2)
        assert error(fast(SPACE), model(SPACE)) < 1e-5


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.parts = Joined(nn.Linear(4, 5), nn.Linear(4, 3, bias=False), dim=-1)

    def forward(self, ids):
        return torch.tanh(self.parts(self.embed(ids)))


def test_training_walks_the_same_path() -> None:
    check_training(lambda: randomise(Trained()), applied={NAME: 1}, passes=[NAME])


# ---- refuses -------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(6), conv(3)


class Read(Pair):
    def forward(self, x):
        y = self.a(x)
        return torch.cat((y, self.b(x)), 1).sum() * y


class Returned(Pair):
    def forward(self, x):
        y = self.a(x)
        return torch.cat((y, self.b(x)), 1), y


class Shared(Pair):
    def forward(self, x):
        return torch.cat((self.a(x), self.b(x)), 1).sum() + self.b(x + 1)


class Written(Pair):
    def forward(self, x):
        y, z = self.a(x), self.b(x)
        x[0] += 1
        return torch.cat((y, z), 1)


class Region(Pair):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        return torch.cat((y, self.b(x)), 1)


class Unlike(Pair):
    def forward(self, x):
        return torch.cat((self.a(x), nn.functional.conv2d(x, self.b.weight, padding="same")), 1)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(6, groups=2), conv(4, groups=2)

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x)), 1)


class Last(Pair):
    def forward(self, x):
        x = x.to(memory_format=torch.channels_last)
        return torch.cat((self.a(x), self.b(x)), 1)


REFUSED = {
    Read: ["fan-out"],
    Returned: ["fan-out"],
    Shared: ["tied"],
    Written: ["written"],
    Region: ["region"],
    Unlike: ["arguments"],
    Grouped: ["grouped"],
    Last: ["layout"],
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Module]) -> None:
    model = randomise(cls()).eval()
    with torch.no_grad():
        result, report = run(model, SPACE.clone(), **ONLY)
        expected = model(SPACE.clone())
    for a, b in zip(
        result if isinstance(result, tuple) else (result,),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        assert error(a, b) < 1e-6
        assert a.stride() == b.stride()
    assert refusals(report, NAME) == REFUSED[cls]


def test_other_axes_and_inputs_are_not_matched() -> None:
    a, b = randomise(conv(3)), randomise(conv(3))
    with torch.no_grad():
        for model in (
            lambda x: torch.cat((a(x), b(x)), 2),
            lambda x: torch.cat((a(x), b(torch.tanh(x))), 1),
            lambda x: torch.cat((a(x), x), 1),
        ):
            result, report = run(model, SPACE, **ONLY)
            assert error(result, model(SPACE)) < 1e-6
            assert not report[NAME].matches


def test_training_and_gathered_weights_are_refused_unless_named() -> None:
    model = randomise(Joined(conv(6), conv(3)))
    _, report = run(model, SPACE)
    assert "training" in refusals(report, NAME)
    with torch.no_grad():
        _, report = run(managed_by_fsdp(model), SPACE)
    assert "gathered" in refusals(report, NAME)
