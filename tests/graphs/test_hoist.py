"""What is cut out of a program in inference, what is not, and that folding rounds once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import PreNorm, capture, error, ids, randomise
from torch import nn

import sparsecc
from sparsecc import pipeline
from sparsecc.hoist import Hoisted, hoist
from sparsecc.options import Options
from sparsecc.program import Program, Role
from sparsecc.report.model import GraphReport

aten = torch.ops.aten
TO_RMS = "layernorm-to-rmsnorm"
FOLD = "fold-norm-affine"


def cut(
    model: nn.Module, *args: Any, passes: Sequence[str] = (), applied: int = 0, **options: Any
) -> tuple[Program, Hoisted | None]:
    """The program as captured and rewritten, and what hoisting makes of it."""
    with torch.no_grad():
        program = capture(model, *args, **options)
    report = GraphReport(0)
    pipeline.run(program, Options.parse({"passes": list(passes)}), report)
    assert sum(report.passes[name].applied for name in passes) == applied
    return program, hoist(program)


def weights(model: nn.Module, names: Sequence[str]) -> list[torch.Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [found[name] for name in names]


def folded(model: nn.Module, hoisted: Hoisted) -> dict[str, torch.Tensor]:
    """Folded weights by the name of their input."""
    values = hoisted.evaluate(weights(model, hoisted.names))
    names = [p.name for p in hoisted.main.placeholders()]
    return dict(zip(names[len(names) - len(values) :], values, strict=True))


class Pair(nn.Module):
    """A LayerNorm and the one linear layer that reads it."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(d), nn.Linear(d, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x))


# ---- how it is evaluated -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fold_in_fp64_rounded_once(dtype: torch.dtype) -> None:
    """Bit for bit the fp64 fold, cast once (D6): W diag(γ) and b + Wβ."""
    model = randomise(Pair()).to(dtype).eval()
    _, hoisted = cut(model, torch.randn(2, 16).to(dtype), passes=[FOLD], applied=1)
    assert hoisted is not None
    exact = {n: p.detach().double() for n, p in model.named_parameters()}
    matrix = (exact["fc.weight"] * exact["norm.weight"]).to(dtype)
    bias = (exact["fc.bias"] + (exact["fc.weight"] * exact["norm.bias"]).sum(1)).to(dtype)
    got = folded(model, hoisted)
    (ours,) = [v for v in got.values() if v.dim() == 2]
    (shift,) = [v for v in got.values() if v.dim() == 1]
    assert torch.equal(ours, matrix)
    assert torch.equal(shift, bias)
    if dtype != torch.float32:  # and not what arithmetic in that dtype gives
        narrow = model.fc.bias + (model.fc.weight * model.norm.bias).sum(1)
        assert not torch.equal(shift, narrow)


def test_chains_of_folds_round_once() -> None:
    """γ folded, then the mean taken out of the same matrix: one cast at the end of both."""
    model = randomise(PreNorm()).to(torch.bfloat16).eval()
    _, hoisted = cut(model, ids(), passes=[FOLD, TO_RMS], applied=10)
    assert hoisted is not None
    got = folded(model, hoisted)
    w = model.blocks[0].down.weight.detach().double()
    centred = (w - w.mean(0, keepdim=True)).to(torch.bfloat16)
    assert any(torch.equal(v, centred) for v in got.values() if v.shape == centred.shape)
    assert all(v.dtype == torch.bfloat16 for v in got.values())


def test_results_are_rounded_one_by_one() -> None:
    """Each folded weight is cast right after it is computed, so fp64 copies do not pile up."""
    _, hoisted = cut(randomise(PreNorm()).eval(), ids(), passes=[FOLD, TO_RMS], applied=10)
    assert hoisted is not None
    results = next(iter(hoisted.expressions.graph.find_nodes(op="output"))).args[0]
    assert len(results) == 18
    assert all(r.args[0] is r.prev for r in results)


def test_evaluation_changes_no_state() -> None:
    """Under inference mode, autocast and no_grad alike; sources keep their bits and versions."""
    model = randomise(Pair()).eval()
    _, hoisted = cut(model, torch.randn(2, 16), passes=[FOLD], applied=1)
    assert hoisted is not None
    sources = weights(model, hoisted.names)
    before = [(s._version, s.clone()) for s in sources]
    plain = hoisted.evaluate(sources)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        other = hoisted.evaluate(sources)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert not any(v.is_inference() or v.requires_grad for v in (*plain, *other))
    for source, (version, value) in zip(sources, before, strict=True):
        assert source._version == version
        assert torch.equal(source, value)


def test_folded_weights_share_no_memory() -> None:
    """An expression that is only a view, in a model that needs no cast, is copied all the same."""
    model = UserFold(lambda w, _: w).double()
    with torch.no_grad():
        program = capture(model, torch.randn(2, 16, dtype=torch.float64))
    (linear,) = program.calls(aten.linear.default)
    build = program.weight("test", linear)
    view = build.call(aten.squeeze.dim, build.call(aten.unsqueeze.default, linear.args[1], 0), 0)
    linear.update_arg(1, view)
    hoisted = hoist(program)
    assert hoisted is not None
    (ours,) = folded(model, hoisted).values()
    assert torch.equal(ours, model.weight)
    assert ours.data_ptr() != model.weight.data_ptr()


# ---- the user's own arithmetic -------------------------------------------------------------------


def quantized(w: torch.Tensor) -> torch.Tensor:
    """Fake quantization: it rounds on purpose, in the dtype of the weight."""
    scale = w.abs().amax(1, keepdim=True) / 7
    return (w / scale).round().clamp(-8, 7) * scale


class UserFold(nn.Module):
    def __init__(self, function: Any, shape: tuple[int, int] = (8, 16)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.register_buffer("scale", torch.rand(8, 1) + 0.5)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.function(self.weight, self.scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_users_quantization_keeps_its_dtype(dtype: torch.dtype) -> None:
    """Half of the values of w/scale sit near a rounding edge: fp64 would round some otherwise."""
    model = UserFold(lambda w, _: quantized(w), (64, 64)).to(dtype)
    _, hoisted = cut(model, torch.randn(2, 64).to(dtype))
    assert hoisted is not None
    (ours,) = folded(model, hoisted).values()
    with torch.no_grad():
        assert torch.equal(ours, quantized(model.weight))
    wide = quantized(model.weight.detach().double()).to(dtype)
    assert not torch.equal(ours, wide), "the test shows nothing"


def test_fold_over_users_quantization() -> None:
    """A pass folds γ into a quantized weight: what the user rounded stays rounded, the rest is fp64."""

    class Quantized(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.norm(x), quantized(self.fc.weight))

    model = randomise(Quantized()).to(torch.bfloat16).eval()
    _, hoisted = cut(model, torch.randn(2, 16).bfloat16(), passes=[FOLD], applied=1)
    assert hoisted is not None
    wanted = quantized(model.fc.weight.detach()).double() * model.norm.weight.detach().double()
    (ours,) = [v for v in folded(model, hoisted).values() if v.dim() == 2]
    assert torch.equal(ours, wanted.bfloat16())


def test_users_arithmetic_on_what_a_pass_folded() -> None:
    """A learned query (as in BLIP-2) is a stream of weights: the user's linear reads a recentred one."""

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 5, 8))
            self.fc = nn.Linear(8, 8)
            self.first = nn.LayerNorm(8, elementwise_affine=False)
            self.last = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = self.query.expand(x.shape[0], -1, -1)
            return self.last(query + self.fc(self.first(query))) * x

    model = randomise(Query()).eval()
    _, hoisted = cut(model, torch.randn(2, 1, 1), passes=[TO_RMS], applied=2)
    assert hoisted is not None
    expressions = hoisted.expressions.graph.find_nodes(
        op="call_function", target=aten.linear.default
    )
    assert expressions, "the test shows nothing"
    assert all(v.dtype == torch.float32 for v in folded(model, hoisted).values())


NOT_HOISTED = {
    "larger than its source": (lambda w, _: w.repeat(2, 1)),
    "reads only the shape": (lambda w, _: torch.ones_like(w)),
    "only a view": (lambda w, _: w.view(16, 8).t()),
    "expanded": (lambda w, _: w[:1].expand(8, -1)),
    "reads a buffer": (lambda w, scale: w * scale),
    "buffer only": (lambda _, scale: (scale * 2).expand(-1, 16)),
    "random": (lambda w, _: w * torch.bernoulli(torch.full_like(w, 0.5))),
}


@pytest.mark.parametrize("case", NOT_HOISTED)
def test_left_in_the_graph(case: str) -> None:
    function = NOT_HOISTED[case]
    _, hoisted = cut(UserFold(lambda w, s: function(w, s)), torch.randn(2, 16))
    assert hoisted is None


HOISTED = {
    "sum of parts": (lambda w, _: w[:, :8] + w[:, 8:]),
    "product of halves": (lambda w, _: w @ w.t() @ w),
    "softmax": (lambda w, _: w.softmax(-1)),
    "weight norm": (lambda w, _: torch._weight_norm(w, w.norm(dim=1, keepdim=True), 0)),
}


@pytest.mark.parametrize("case", HOISTED)
def test_users_arithmetic_is_hoisted(case: str) -> None:
    function = HOISTED[case]
    model = UserFold(lambda w, s: function(w, s))
    x = torch.randn(2, 8 if case == "sum of parts" else 16)
    _, hoisted = cut(model, x)
    assert hoisted is not None
    (ours,) = folded(model, hoisted).values()
    with torch.no_grad():
        assert torch.equal(ours, function(model.weight, model.scale))
    targets = [n.target for n in hoisted.main.graph.nodes if n.op == "call_function"]
    assert targets == [aten.linear.default]


@pytest.mark.parametrize("ambient", [True, False])
def test_not_under_autocast(ambient: bool) -> None:
    """Autocast narrows the user's product of weights; a fold without autocast would not."""

    def product(w: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (w @ w.t() @ w).float()

    function = (lambda w, _: (w @ w.t() @ w).float()) if ambient else product
    model = UserFold(function)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        program, hoisted = cut(model, torch.randn(2, 16))
        assert hoisted is None
    assert any(n.meta["val"].dtype == torch.bfloat16 for n in program.calls(aten.matmul.default))


def test_buffers_are_folded_when_a_pass_says_so() -> None:
    """A norm whose scale is a buffer: the pass decided to fold it, and its changes are watched."""

    class Scaled(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16, elementwise_affine=False)
            self.register_buffer("gain", torch.rand(16) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(x) * self.gain)

    model = randomise(Scaled()).eval()
    program, hoisted = cut(model, torch.randn(2, 16), passes=[FOLD], applied=1)
    assert hoisted is not None
    assert {s.role for s in program.slots.values() if s.fqn in hoisted.names} == {
        Role.PARAMETER,
        Role.BUFFER,
    }
    (ours,) = folded(model, hoisted).values()
    assert torch.equal(ours, (model.fc.weight.double() * model.gain.double()).float())


def clear_rows(model: Any) -> None:
    model.fc.weight[:2] = 0.0


WRITES = {
    "weight": lambda m: m.fc.weight.mul_(1.5),
    "weight through data": lambda m: m.fc.weight.data.add_(1),
    "part of the weight": clear_rows,
    "view of the weight": lambda m: m.fc.weight.t()[1].zero_(),
    "norm": lambda m: m.norm.weight.copy_(m.norm.bias),
}


@pytest.mark.parametrize("case", WRITES)
def test_weights_that_the_program_writes(case: str) -> None:
    class Writing(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            WRITES[case](self)
            return y + super().forward(x)

    model = randomise(Writing()).eval()
    with torch.no_grad():
        program = capture(model, torch.randn(2, 16))
    pipeline.run(program, Options.parse({"passes": [FOLD]}), GraphReport(0))
    hoisted = hoist(program)
    assert hoisted is None or "norm.weight" not in hoisted.names
    assert hoisted is None or "fc.weight" not in hoisted.names


# ---- the program that is left --------------------------------------------------------------------


def test_inputs_of_the_program_that_is_left() -> None:
    """Folded weights come last; dead weights leave the call, inputs and live weights keep their order."""
    model = randomise(PreNorm()).eval()
    program, hoisted = cut(model, ids(), passes=[FOLD, TO_RMS], applied=10)
    assert hoisted is not None
    old, new = program.placeholders(), hoisted.main.placeholders()
    assert [p.name for p in new[: len(hoisted.keep)]] == [old[i].name for i in hoisted.keep]
    assert [p.name for p in new[len(hoisted.keep) :]] == [f"folded_{i}" for i in range(18)]
    assert set(hoisted.main.slots) == {p.name for p in new}
    kept = {program.slots[old[i].name].fqn for i in hoisted.keep}
    assert kept == {"L['ids']"}, "all weights of this model are folded"
    assert len(hoisted.sources) == len(set(hoisted.sources)) == len(old) - 1
    assert not any("sparsecc_weight" in n.meta for n in hoisted.main.graph.nodes)


def test_the_program_given_is_left_as_it_was() -> None:
    with torch.no_grad():
        program = capture(randomise(PreNorm()).eval(), ids())
    pipeline.run(program, Options.parse({}), GraphReport(0))
    before = program.text()
    assert hoist(program) is not None
    assert program.text() == before


def test_unused_inputs_stay_in_the_call() -> None:
    """Only weights may leave: the caller passes every input, used or not."""

    class Unused(Pair):
        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            other = other + 1
            return super().forward(x)

    model = randomise(Unused()).eval()
    program, hoisted = cut(model, torch.randn(2, 16), torch.randn(3), passes=[FOLD], applied=1)
    assert hoisted is not None
    inputs = [s.fqn for s in hoisted.main.slots.values() if s.role is Role.INPUT]
    assert inputs == [s.fqn for s in program.slots.values() if s.role is Role.INPUT]


def test_sizes_stay_inputs() -> None:
    model = randomise(PreNorm()).eval()
    program, hoisted = cut(model, ids(), passes=[FOLD, TO_RMS], applied=10, dynamic=True)
    assert hoisted is not None
    sizes = [n for n, s in program.slots.items() if s.role is Role.SYMBOL]
    assert sizes
    assert [n for n, s in hoisted.main.slots.items() if s.role is Role.SYMBOL] == sizes


def test_strides_are_kept() -> None:
    """A folded weight has the strides that the graph was compiled for, transposed ones too."""

    class Transposed(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.fc.weight = nn.Parameter(torch.randn(16, 8).t())

    model = Transposed().eval()
    _, hoisted = cut(model, torch.randn(2, 16), passes=[FOLD], applied=1)
    assert hoisted is not None
    expected = {p.name: p.meta["val"].stride() for p in hoisted.main.placeholders()}
    got = folded(model, hoisted)
    assert {n: v.stride() for n, v in got.items()} == {n: expected[n] for n in got}
    assert (1, 8) in {v.stride() for v in got.values()}


def test_expanded_expressions() -> None:
    """A recentred class token, expanded over the batch: the token is folded, not its copies."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.enter, self.pair = nn.Linear(4, 16), Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            token = self.token.expand(x.shape[0], -1, -1)
            return self.pair(torch.cat([token, self.enter(x)], 1))

    model = randomise(Tokens()).eval()
    _, hoisted = cut(model, torch.randn(3, 5, 4), passes=[TO_RMS], applied=1)
    assert hoisted is not None
    assert (1, 1, 16) in {tuple(v.shape) for v in folded(model, hoisted).values()}


def test_shared_expressions_are_folded_once() -> None:
    """Two layers that share one weight share one folded weight."""

    class Shared(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return self.fc(h) + self.fc(h.flip(0))

    report = sparsecc.Report()
    model = randomise(Shared()).eval()
    fast = torch.compile(model, backend="sparsecc", options={"lower": "eager", "report": report})
    x = torch.randn(4, 16)
    with torch.no_grad():
        assert error(fast(x), model(x)) < 1e-6


def test_training_folds_nothing() -> None:
    report = sparsecc.Report()
    model = randomise(PreNorm())
    options = {"lower": "eager", "report": report, "require": {TO_RMS: 5}}
    torch.compile(model, backend="sparsecc", options=options)(ids())
    assert report.graphs[0].trains
    assert report.graphs[0].folded == 0


def test_returned_weight_arithmetic_is_made_anew_at_each_call() -> None:
    """The caller may write what it gets; a folded weight handed out would be spoilt for the next call."""

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return self.linear(self.norm(x)), self.weight * 2, (self.weight * 3).t()

    model = randomise(Returns()).eval()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "aot_eager", "require": ["fold-norm-affine"]}
    )
    with torch.no_grad():
        first = fast(torch.ones(2, 8))
        kept = [value.clone() for value in first]
        for value in first:
            value.zero_()
        for a, b in zip(fast(torch.ones(2, 8)), kept, strict=True):
            assert torch.equal(a, b)
