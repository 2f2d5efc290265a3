"""skip-zeros: which networks read the weights of live neurons alone, and which stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support import agree, agrees_with_fp64, check_training, randomise, refusals, run
from torch import nn
from torch.nn import functional as F

from sparsecc.errors import OptionsError
from sparsecc.options import Options
from sparsecc.recipe import Recipe

NAME = "skip-zeros"
ONLY = {"passes": [NAME]}
D, WIDE = 24, 56
X = torch.randn(2, 3, D)


def top(a: torch.Tensor, k: int = 7) -> torch.Tensor:
    values, indices = torch.topk(F.relu(a), k, dim=-1)
    return torch.zeros_like(a).scatter(-1, indices, values)


def gaussian(a: torch.Tensor) -> torch.Tensor:
    cutoff = a.mean(-1, keepdim=True) + a.std(-1, keepdim=True, unbiased=False) * 1.1
    return F.gelu(F.relu(a - cutoff), approximate="tanh")


class FFN(nn.Module):
    """A feed-forward network: ``up`` gates it where there is one, ``fused`` makes both in one layer."""

    def __init__(
        self, a: Callable, up: bool = False, fused: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.a, self.fused = a, fused
        self.gate = nn.Linear(D, WIDE * (1 + fused), bias=bias)
        self.up = nn.Linear(D, WIDE, bias=bias) if up else None
        self.down = nn.Linear(WIDE, D, bias=bias)

    def forward(self, x):
        if self.fused:
            gate, up = self.gate(x).chunk(2, -1)
            return self.down(up * self.a(gate))
        h = self.a(self.gate(x))
        return x + self.down(h if self.up is None else h * self.up(x))


def relu2(p):
    return F.relu(p).square()


def cats(p):
    a = F.silu(p)
    return torch.where(a.abs() > 0.2, a, 0.0)


SPELLINGS = {
    "relu": (F.relu, "relu(p0)"),
    "relu²": (relu2, "(relu(p0) * relu(p0))"),
    "relu, squared by pow": (lambda p: F.relu(p) ** 2, "(relu(p0) * relu(p0))"),
    "FATReLU": (lambda p: torch.where(p >= 0.3, p, 0.0), "fatrelu(p0, 0.3)"),
    "FATReLU by a product": (lambda p: p * (p >= 0.3), "fatrelu(p0, 0.3)"),
    "a threshold": (lambda p: F.threshold(p, 0.2, 0.0), "relu(keep(p0, 0.2))"),
    "CATS": (cats, "keep(silu(p0), 0.2)"),
    "shifted relu": (lambda p: F.relu(p - 0.3), "relu((p0 - 0.3))"),
    "top-k": (top, "relu(p0) | top 7 | a"),
    "statistical top-k": (gaussian, "p0 | gaussian 1.1 | gelu_tanh(a)"),
}


@pytest.mark.parametrize("up", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, up: bool) -> None:
    function, text = SPELLINGS[name]
    model = randomise(FFN(function, up)).eval()
    with torch.no_grad():
        result, report = run(model, X, **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1
    (match,) = report[NAME].matches
    assert match.note == text + (" | a * p1" if up else " | a")


@pytest.mark.parametrize("bias", [True, False])
def test_fused_gate_and_up(bias: bool) -> None:
    model = randomise(FFN(F.relu, fused=True, bias=bias)).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1
    assert [k.chosen for k in report.graphs[0].kernels] == ["cpp"]


def test_products_of_matrices_and_flat_tokens() -> None:
    """GPT-2's Conv1D."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((D, WIDE), (WIDE, D)))
            self.c, self.d = nn.Parameter(torch.randn(WIDE)), nn.Parameter(torch.randn(D))

        def forward(self, x):
            h = torch.addmm(self.c, x.view(-1, D), self.a).view(2, 3, WIDE)
            return torch.addmm(self.d, F.relu(h).view(-1, WIDE), self.b).view(2, 3, D)

    model = Net().eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1
    assert "relu" in report[NAME].matches[0].note


def test_a_hidden_value_that_others_read() -> None:
    """It stays; the down projection skips."""

    class Net(FFN):
        def forward(self, x):
            h = F.relu(self.gate(x))
            return self.down(h), h

    model = randomise(Net(F.relu)).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        expected = model.double()(X.double())
    for ours, reference in zip(result, expected, strict=True):
        agree(ours.double(), reference)
    assert [m.note for m in report[NAME].matches] == ["zeros of the input"]
    assert report[NAME].applied == 1


@pytest.mark.parametrize("written", [False, True])
def test_networks_that_share_a_layer(written: bool) -> None:
    """The last layer of one is the first one of the next."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(*s) for s in ((D, 30), (30, WIDE), (WIDE, D)))

        def forward(self, x):
            a, b, c = self.layers
            h = a(x)
            h = h.relu_() if written else F.relu(h)
            return c(F.relu(b(h)))

    model = randomise(Chain()).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 2


class Steps(nn.Module):
    """Many steps, each of which reads the value before it twice, in front of a layer."""

    def __init__(self, step: Callable, count: int) -> None:
        super().__init__()
        self.step, self.count = step, count
        self.down = nn.Linear(WIDE, D)

    def forward(self, x):
        for _ in range(self.count):
            x = self.step(x)
        return self.down(F.relu(x))


@pytest.mark.parametrize("step", [lambda x: x + F.relu(x) / 8, torch.tanh], ids=["sum", "tanh"])
def test_long_ways_to_a_layer(step: Callable) -> None:
    """Reading them whole would take for ever, or deeper recursion than there is."""
    model, x = randomise(Steps(step, 300)).eval(), torch.randn(3, WIDE)
    with torch.no_grad():
        result, report = run(model, x, **ONLY)
        agrees_with_fp64(model, x, result)
    assert [m.note for m in report[NAME].matches] == ["zeros of the input"]


def test_verified_in_fp64_and_through_inductor() -> None:
    model = randomise(FFN(relu2, up=True)).eval()
    options = {"lower": "inductor", "codegen": "cpp", "verify": "each"}
    with torch.no_grad():
        result, report = run(model, X, **options, **ONLY)
        agrees_with_fp64(model, X, result)
    assert report.verified
    assert report[NAME].applied == 1


def test_bfloat16() -> None:
    model, x = randomise(FFN(F.relu, up=True)).eval().bfloat16(), X.bfloat16()
    with torch.no_grad():
        result, report = run(model, x, codegen="cpp", **ONLY)
        agrees_with_fp64(model, x, result)
    assert report[NAME].applied == 1


def test_updated_after_compile() -> None:
    model = randomise(FFN(F.relu, up=True)).eval()
    options = {"codegen": "cpp", "lower": "eager", "strict": True, "floor": False, **ONLY}
    with torch.no_grad():
        fast = torch.compile(model, backend="sparsecc", options=options)
        fast(X)
        for seed in (1, 2):
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
            agrees_with_fp64(model, X, fast(X))


def test_tied_weights() -> None:
    model = randomise(FFN(F.relu, up=True)).eval()
    model.up.weight = model.gate.weight
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1
    assert model.up.weight is model.gate.weight


class Words(nn.Module):
    """An embedding, a network and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.ffn, self.head = (
            nn.Embedding(20, D),
            FFN(F.relu, up=True),
            nn.Linear(D, 20),
        )

    def forward(self, ids):
        return self.head(self.ffn(self.embed(ids)))


def test_training_is_left_alone() -> None:
    check_training(Words, {NAME: 0}, **ONLY)
    model = randomise(FFN(F.relu, up=True))
    result, report = run(model, X, codegen="cpp", **ONLY)
    assert refusals(report, NAME) == ["training"]
    result.sum().backward()
    assert model.up.weight.grad is not None


# ---- what stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [F.silu, F.gelu, torch.sigmoid, lambda p: F.relu(p) + 1],
    ids=["silu", "gelu", "sigmoid", "relu + 1"],
)
def test_activations_that_make_no_zeros(function: Callable) -> None:
    model = randomise(FFN(function, up=True)).eval()
    with torch.no_grad():
        _, report = run(model, X, **ONLY)
    assert not report[NAME].matches


def test_top_of_negative_numbers_is_as_it_says() -> None:
    """torch.topk of values that are no ReLU's: those that stay may be negative."""
    model = randomise(
        FFN(lambda p: torch.zeros_like(p).scatter(-1, *reversed(torch.topk(p, 50, -1))))
    ).eval()
    with torch.no_grad():
        result, report = run(model, X, **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 1


def test_rows() -> None:
    model = randomise(FFN(F.relu)).eval()
    with torch.no_grad():
        _, report = run(model, torch.randn(17, D), **ONLY)
        assert refusals(report, NAME) == ["rows"]
        _, report = run(model, torch.randn(5, D), dynamic=True, **ONLY)
        assert refusals(report, NAME) == ["rows"]


def test_dtype() -> None:
    model = randomise(FFN(F.relu)).eval()
    with torch.no_grad():
        _, report = run(model.double(), X.double(), **ONLY)
        assert refusals(report, NAME) == ["dtype"]


def test_what_a_recipe_rounds() -> None:
    model = randomise(FFN(F.relu)).eval()
    recipe = Recipe("int8", sites={"down.weight": "int8"}, shapes={"down.weight": [D, WIDE]})
    with torch.no_grad():
        _, report = run(model, X, passes={NAME: {"recipe": recipe}})
    assert refusals(report, NAME) == ["rounded"]


def test_written_and_region() -> None:
    class Written(FFN):
        def forward(self, x):
            h = F.relu(self.gate(x))
            x.add_(self.down.bias)
            return self.down(h) + x

    class Region(FFN):
        def forward(self, x):
            h = F.relu(self.gate(x))
            with torch.autocast("cpu", enabled=False):
                return self.down(h)

    with torch.no_grad():
        for build, code in ((Written, "written"), (Region, "region")):
            model = randomise(build(F.relu)).eval()
            result, report = run(model, X.clone(), **ONLY)
            agrees_with_fp64(model, X.clone(), result)
            assert refusals(report, NAME) == [code]


def test_small_and_device() -> None:
    model = randomise(FFN(F.relu)).eval()
    with torch.no_grad():
        for options, code in (({"least": 10**6}, "small"), ({"devices": ["cuda"]}, "device")):
            _, report = run(model, X, passes={NAME: options})
            assert refusals(report, NAME) == [code]


def test_density_is_a_share() -> None:
    for wrong in (0, 1.5, True, "all"):
        with pytest.raises(OptionsError, match="density"):
            Options.parse({"passes": {NAME: {"density": wrong}}})
