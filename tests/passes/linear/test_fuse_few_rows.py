"""fuse-few-rows: what becomes one operator in decoding, and what stays apart."""

from __future__ import annotations

import copy

import pytest
import torch
from support import agrees_with_fp64, capture, error, randomise, refusals, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from sparsecc import pipeline
from sparsecc.options import Options
from sparsecc.recipe import Recipe
from sparsecc.report.model import GraphReport

NAME = "fuse-few-rows"
ONLY = {"passes": [NAME]}
D, WIDE = 24, 56
X = torch.randn(2, 8, D)


class Block(nn.Module):
    """A layer of a decoder without its attention, and a head."""

    def __init__(self, norm: str = "rms", bias: bool = True, tied: bool = False) -> None:
        super().__init__()
        kinds = {
            "rms": lambda: nn.RMSNorm(D, elementwise_affine=False),
            "layer": lambda: nn.LayerNorm(D, elementwise_affine=False),
            "none": nn.Identity,
        }
        self.norm1, self.norm2, self.norm3 = (kinds[norm]() for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(D, n, bias=bias) for n in (D, 8, 8))
        self.out, self.down = nn.Linear(D, D, bias=bias), nn.Linear(WIDE, D, bias=bias)
        self.gate, self.up = nn.Linear(D, WIDE, bias=bias), nn.Linear(D, WIDE, bias=bias)
        self.head = nn.Linear(D, 40, bias=False)
        if tied:
            self.up.weight = self.gate.weight

    def attend(self, q, k, v):
        return q * torch.cat([k, v, k], -1).cumsum(-1)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.out(self.attend(self.q(h), self.k(h), self.v(h)))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.norm3(x))


def specs(report) -> list[str]:
    return [m.note for m in report[NAME].matches if m.status == "applied"]


@pytest.mark.parametrize("codegen", ["aten", "cpp"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_five_operators(norm: str, bias: bool, codegen: str) -> None:
    model = randomise(Block(norm, bias)).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen=codegen, **ONLY)
        agrees_with_fp64(model, X, result)
    v = " + v0" if bias else ""
    assert report[NAME].applied == 5
    assert specs(report)[0] == f"{norm} | p0{v} | p1{v and ' + v1'} | p2{v and ' + v2'}"
    assert specs(report)[2] == f"{norm} | silu(p0{v}) * " + ("(p1 + v1)" if bias else "p1")
    assert {k.chosen for k in report.graphs[0].kernels} == {codegen}


@pytest.mark.parametrize("codegen", ["aten", "cpp"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_a_layer_in_bfloat16(norm: str, codegen: str) -> None:
    model, x = randomise(Block(norm)).eval().bfloat16(), X.bfloat16()
    with torch.no_grad():
        result, report = run(model, x, codegen=codegen, **ONLY)
        assert result.dtype is torch.bfloat16
        agrees_with_fp64(model, x, result)
    assert report[NAME].applied == 5
    assert specs(report)[2] == f"{norm} | silu(p0 + v0) * (p1 + v1)"
    assert {k.chosen for k in report.graphs[0].kernels} == {codegen}


def test_verified_in_fp64_and_through_inductor() -> None:
    model = randomise(Block()).eval()
    options = {"lower": "inductor", "codegen": "cpp", "verify": "each"}
    with torch.no_grad():
        result, report = run(model, X, **options, **ONLY)
        agrees_with_fp64(model, X, result)
    assert report.verified
    assert report[NAME].applied == 5


def test_a_preset_takes_it_where_kernels_are_asked_for() -> None:
    model = randomise(Block()).eval()
    with torch.no_grad():
        for codegen, applied in (("aten", 0), ("cpp", 5)):
            result, report = run(model, X, codegen=codegen)
            agrees_with_fp64(model, X, result)
            assert (NAME in report.pass_names()) == bool(applied)
            if applied:
                assert report[NAME].applied == applied


def test_updated_after_compile() -> None:
    model = randomise(Block()).eval()
    with torch.no_grad():
        fast = torch.compile(model, backend="sparsecc", options={"codegen": "cpp", **LOWER, **ONLY})
        fast(X)
        for seed in (1, 2):
            model.load_state_dict(randomise(copy.deepcopy(model), seed).state_dict())
            agrees_with_fp64(model, X, fast(X))


LOWER = {"lower": "eager", "strict": True, "floor": False}


def test_tied_weights() -> None:
    model = randomise(Block(tied=True)).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        agrees_with_fp64(model, X, result)
    assert report[NAME].applied == 5
    assert model.up.weight is model.gate.weight


def test_after_folds() -> None:
    """Weights that other passes folded are read like any other."""
    model = nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 5))
    model = randomise(model).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", passes=["fold-norm-affine", NAME])
        agrees_with_fp64(model, X, result)
    assert report["fold-norm-affine"].applied == 2
    assert specs(report) == ["rms | p0 + v0", "layer | p0 + v0"]


# ---- how far a region grows -------------------------------------------------------------------------


class Grown(nn.Module):
    def __init__(self, rest) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.vector, self.rest = nn.Parameter(torch.ones(D)), rest

    def forward(self, x):
        return self.rest(self, x)


GROWN = {
    "numbers and functions": (
        lambda m, x: torch.tanh(F.gelu(m.b(x)) * 2 - 0.5) / 3,
        ["none | tanh(gelu(p0) * 2 - 0.5) / 3"],
    ),
    "a vector of weights": (lambda m, x: m.b(x) * m.vector, ["none | p0 * v0"]),
    "a tensor from before": (
        lambda m, x: torch.cos(x) - torch.relu(m.b(x)),
        ["none | t0 - relu(p0)"],
    ),
    "the input itself": (lambda m, x: x * torch.sigmoid(m.b(x)), ["none | t0 * sigmoid(p0)"]),
    "two products of one input": (lambda m, x: m.a(x) + m.b(x), ["none | p0 + v0 + p1"]),
    "not what comes later": (lambda m, x: m.b(x) + torch.cos(m.a(x)), ["none | p0 | p1 + v0"]),
    "not an infinite number": (lambda m, x: m.b(x) * float("inf"), ["none | p0"]),
    "not past another reader": (
        lambda m, x: (y := m.b(x)) + torch.relu(y),
        ["none | p0"],
    ),
    "not what broadcasts": (lambda m, x: m.b(x) + x[:, :1], ["none | p0"]),
    "not what widens": (lambda m, x: m.b(x) * x.double(), ["none | p0"]),
    "not past a cast": (lambda m, x: torch.relu(m.b(x).double()), ["none | p0"]),
    "not another gelu": (lambda m, x: F.gelu(m.b(x), approximate="tanh"), ["none | p0"]),
    "not a view": (lambda m, x: torch.relu(m.b(x).view(-1, D)), ["none | p0"]),
    "not a norm that others read": (
        lambda m, x: m.b(h := F.rms_norm(x, (D,))) + h,
        ["none | p0 + t0"],
    ),
    "not a norm over two axes": (lambda m, x: m.b(F.layer_norm(x, x.shape[1:])), ["none | p0"]),
    "two that wait for each other": (
        lambda m, x: m.b(torch.relu(m.b(x)) + x),
        ["none | relu(p0) + t0", "none | p0"],
    ),
}


@pytest.mark.parametrize("name", GROWN)
def test_how_far_a_region_grows(name: str) -> None:
    rest, expected = GROWN[name]
    model = randomise(Grown(rest)).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", **ONLY)
        assert result.dtype == model(X).dtype
        agrees_with_fp64(model, X, result)
    assert specs(report) == expected


# ---- refusals -----------------------------------------------------------------------------------------


def written(model: Grown, x: torch.Tensor) -> torch.Tensor:
    y = model.b(x)
    x.add_(y)
    return y + model.a(x)


REFUSED = {
    "rows": (lambda m, x: m.b(x.repeat(2, 1, 1)), torch.float32),
    "dtype": (lambda m, x: m.b(x), torch.float64),
    "written": (written, torch.float32),
    "layout": (lambda m, x: F.linear(x, m.b.weight.t()), torch.float32),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refuses(code: str) -> None:
    rest, dtype = REFUSED[code]
    model = randomise(Grown(rest)).eval().to(dtype)
    x = X.to(dtype)
    with torch.no_grad():
        result, report = run(model, x.clone(), codegen="cpp", **ONLY)
        assert error(result, model(x.clone())) < 1e-5
    assert set(refusals(report, NAME)) == {code}


def test_refuses_where_gradients_flow() -> None:
    model = randomise(Block())
    result, report = run(model, X, codegen="cpp", **{**LOWER, "lower": "aot_eager"}, **ONLY)
    assert set(refusals(report, NAME)) == {"training"}
    result.sum().backward()
    assert model.q.weight.grad is not None


def test_refuses_a_region_of_autocast() -> None:
    model = randomise(Block()).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, report = run(model, X, codegen="cpp", **ONLY)
    assert report[NAME].applied == 0
    assert set(refusals(report, NAME)) == {"dtype"}


def test_refuses_rows_that_are_not_known() -> None:
    model = randomise(Block()).eval()
    with torch.no_grad():
        result, report = run(model, X, codegen="cpp", dynamic=True, **ONLY)
        agrees_with_fp64(model, X, result)
    assert set(refusals(report, NAME)) == {"rows"}


class OnGPU(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.empty(*shape, device="cuda", dtype=dtype))
            for shape in ((D, D), (D,))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(F.linear(F.layer_norm(x, (D,)), self.weight, self.bias) * 2)


@pytest.mark.parametrize(
    ("dtype", "applied"),
    [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 1), (torch.float64, 0)],
)
def test_on_a_gpu(dtype: torch.dtype, applied: int) -> None:
    """By shapes and types alone: no GPU is needed to see what becomes an operator."""
    record = GraphReport(0)
    with FakeTensorMode(), torch.no_grad():
        program = capture(OnGPU(dtype), torch.empty(2, D, device="cuda", dtype=dtype))
        pipeline.run(program, Options.parse(ONLY), record)
    (match,) = record.passes[NAME].matches
    assert record.passes[NAME].applied == applied
    assert (match.note if applied else match.code) == (
        "layer | t1 + silu((p0 + v0) * 2)" if applied else "dtype"
    )


def test_the_kernel_is_what_runs() -> None:
    model = randomise(Block()).eval()
    options = {"codegen": "cpp", **LOWER, **ONLY}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        fast(X)
        with torch.profiler.profile() as profile:
            fast(X)
    calls = [event.name for event in profile.events()]
    assert calls.count("sparsecc::few_rows_native") == 5
    assert not [c for c in calls if "linear" in c or "norm" in c]


@pytest.mark.parametrize("dynamic", [False, True])
def test_any_number_of_rows_where_a_recipe_rounds_all_weights(dynamic: bool) -> None:
    model = randomise(Block()).eval()
    names = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    recipe = Recipe("by hand", sites={f"{name}.weight": "int8" for name in names - {"head"}})
    passes = {NAME: {"recipe": recipe}}
    with torch.no_grad():
        for rows in (17, 40):
            x = torch.randn(2, rows, D)
            result, report = run(model, x, passes=passes, dynamic=dynamic)
            agrees_with_fp64(model, x, result)
            assert report[NAME].applied == 4
            assert [m.code for m in report[NAME].refusals] == ["rows"]  # the head's
