"""What PyTorch's own tests ask of a Dynamo backend, through Inductor: aliases, mutations, layouts, dtypes,
containers, graph breaks, recompilation, hooks, parametrized weights, modes, threads.

A pattern stands behind a linear layer and a norm, which are rewritten each time.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from agreement import copies, follow, judge, no_worse, ours, train_alike
from hard import FOLD, TO_RMS, Tiny, tiny, x32, x64
from support import randomise
from torch import nn

import sparsecc

pytestmark = pytest.mark.slow

ONE = {TO_RMS: 1}
FOLDED = {TO_RMS: 1, FOLD: 1}


# ---- aliases and mutations (D18) -----------------------------------------------------------------


def kinship(values: list[Any]) -> list[list[str]]:
    """For each pair of tensors: the same object, the same memory, or neither."""

    def relation(a: torch.Tensor, b: torch.Tensor) -> str:
        if a is b:
            return "same"
        if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel():
            return "alias"
        return "-"

    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    return [[relation(a, b) for b in tensors] for a in tensors]


def outputs_alias(y: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> Any:
    halves = y.chunk(2, -1)
    return y, y, y.view(-1), *halves, x, x.view(-1), x[0], z, z.t(), z.expand(2, 3, 4), y.detach()


@pytest.mark.parametrize("train", [True, False])
def test_outputs_that_alias(train: bool) -> None:
    """Inputs returned, views of them, views of one result, one result twice."""
    fast, _ = judge(
        tiny(outputs_alias),
        x32(5, 8, grad=train),
        x32(3, 4),
        applied=ONE if train else FOLDED,
        train=train,
    )
    x, z = x32(5, 8, grad=train), x32(3, 4)
    with torch.set_grad_enabled(train):
        got = kinship([x, z, *fast(x, z)])
        torch._dynamo.reset()  # Inductor hands back detach() under no_grad as the same object
        theirs = torch.compile(fast._orig_mod, backend="inductor")
        assert got == kinship([x, z, *theirs(x, z)])
    assert sum(row.count("same") for row in got) > len(got)


def writes(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    """Two inputs are written, each from the other, and read between."""
    before = a.sum() + b.sum()
    a.add_(y.detach().sum())
    b[1:].mul_(2)
    b[0] = a.sum()
    a.copy_(b[: a.shape[0], : a.shape[1]] + 1)
    b.t_().mul_(1) if False else b.clamp_(max=9)
    return y * before + a.sum(), b, a.view(-1)


@pytest.mark.parametrize("train", [True, False])
def test_two_inputs_written(train: bool) -> None:
    judge(
        tiny(writes),
        x32(5, 8, grad=train),
        x32(3, 4),
        x32(5, 6),
        applied=ONE if train else FOLDED,
        train=train,
    )


def test_written_inputs_that_alias() -> None:
    """Views of one base, overlapping, one of them written: the others see it."""

    def pattern(y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, c: Any) -> Any:
        before = b.sum() * c.sum()
        a.add_(1)
        return y * before + b.sum(), c * 2

    model = tiny(pattern).eval()
    fast = torch.compile(model, **ours(require={TO_RMS: 1, FOLD: 1}))

    def step(one: Any) -> Any:
        x = x32(5, 8).to(next(one.parameters()))
        base = x32(4, 4).to(x)
        found = []
        with torch.no_grad():
            for _ in range(2):
                found += [*one(x, base[:2], base.view(-1)[2:8], base.t()), base.clone()]
        return found

    follow(model, fast, step)


def test_written_input_in_the_autograd_graph() -> None:
    """Not a leaf: the gradient flows through what was written."""

    def pattern(y: torch.Tensor, x: torch.Tensor, state: torch.Tensor) -> Any:
        state.add_(y.mean()).mul_(3)
        return y + state.mean()

    model = tiny(pattern)
    fast = torch.compile(model, **ours(require={TO_RMS: 1}))

    def step(one: Any) -> Any:
        like = next(one.parameters())
        leaf = x32(2, 2).to(like).requires_grad_()
        state = leaf * 2
        result = one(x32(5, 8).to(like), state)
        (result.sum() + state.pow(2).sum()).backward()
        return result.detach(), state.detach(), leaf.grad

    follow(model, fast, step)


def test_memory_handed_out_is_the_models() -> None:
    """A buffer returned is written by the caller, and the next call sees it."""

    class Stateful(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.ones(4))
            self.calls, self.seen = 0, None

        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x) * self.state
            self.state.add_(0.5)
            self.calls += 1
            self.seen = y
            return y, self.state, self.leave.bias

    model = randomise(Stateful()).eval()
    fast = torch.compile(model, **ours(require={TO_RMS: 1}))

    def step(one: Any) -> Any:
        found = []
        with torch.no_grad():
            for _ in range(3):
                y, state, bias = one(x32(5, 8).to(next(one.parameters())))
                assert one.seen is y
                found.append((y, state.clone()))
                state.mul_(2)
                bias.add_(0.25)
        return found, one.calls

    follow(model, fast, step)
    assert model.calls == 3


# ---- layouts, sizes, dtypes ----------------------------------------------------------------------


def layouts() -> list[torch.Tensor]:
    base = x32(6, 8)
    return [
        x32(4, 3).t(),
        x32(6, 8)[::2, 1::3],
        x32(1, 4).expand(3, 4),
        x32(3, 1).expand(3, 4),
        base.as_strided((4, 3), (1, 1)),
        base.as_strided((3, 4), (0, 2), 5),
        x32(2, 3, 4, 5).to(memory_format=torch.channels_last),
        x32(2, 3, 4, 5)[:, :, ::2].permute(0, 2, 3, 1),
        x32(1)[0],
        x32(0, 4),
        x32(3, 0, 2),
    ]


def on_layouts(y: torch.Tensor, x: torch.Tensor, *rest: torch.Tensor) -> Any:
    found = [r * 2 + y.mean() for r in rest]
    images = rest[6]
    kernel = y.sum() * torch.ones(2, 3, 3, 3, dtype=x.dtype)
    found += [F.conv2d(images, kernel, padding=1), F.avg_pool2d(images, 2), torch.cat(rest[:1] * 2)]
    return found + [r.sum() for r in rest] + [torch.cat([rest[9], y]), rest[10].transpose(0, 2)]


@pytest.mark.parametrize("train", [True, False])
def test_layouts(train: bool) -> None:
    """Transposed, strided, expanded, overlapping, channels last, scalar and empty inputs."""
    judge(
        tiny(on_layouts),
        x32(5, 8, grad=train),
        *layouts(),
        applied=ONE if train else FOLDED,
        train=train,
    )


def test_empty_batch() -> None:
    judge(tiny(lambda y, x: (y, y.sum(0))), x32(0, 8, grad=True), applied=ONE)


def test_non_contiguous_stream() -> None:
    judge(tiny(), x32(8, 5).t(), applied=FOLDED, train=False)


def integers(a: torch.Tensor, b: torch.Tensor, flags: torch.Tensor) -> Any:
    bits = (a & 3) ^ (b.to(torch.int64) << 1)
    return (
        bits,
        a // 3,
        a % 3,
        F.one_hot(a % 5, 5),
        a.cumsum(0),
        torch.where(flags, a, -a),
        ~flags,
        b + b,
        a.sort().indices,
        torch.bincount(a, minlength=12),
        (a.float() / 3).to(torch.uint8),
    )


def test_integers_alone() -> None:
    args = (torch.arange(9), torch.arange(9, dtype=torch.uint8) * 29, torch.arange(9) % 2 == 0)
    _, report = judge(integers, *args, applied={}, train=False)
    assert not report.graphs[0].trains


def complex_numbers(y: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> Any:
    pairs = torch.view_as_complex(y.reshape(-1, 2)) * z
    spectrum = torch.fft.fft(pairs)
    return (
        pairs,
        spectrum.abs(),
        torch.view_as_real(z.conj().resolve_conj()),
        spectrum.real,
        z.imag * 2,
    )


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_complex_numbers() -> None:
    z = torch.complex(x32(10), x32(10).flip(0))
    judge(tiny(complex_numbers), x32(5, 8, grad=True), z, applied=ONE)


def test_no_parameters() -> None:
    """Functions: norms with weights as arguments, and no tensor argument at all."""

    def function(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return F.layer_norm(F.linear(x, weight), (3,)), None

    judge(function, x32(5, 8, grad=True), x32(3, 8, grad=True), applied={})
    report = sparsecc.Report()
    nothing = torch.compile(lambda: torch.arange(5) * 2, **ours(report))
    assert torch.equal(nothing(), torch.arange(5) * 2)
    assert torch.compile(lambda x: None, **ours(report))(x32(5, 8)) is None


# ---- containers ----------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


@dataclasses.dataclass
class Record:
    value: torch.Tensor
    scale: float = 1.0
    note: str | None = None


def containers(
    y: torch.Tensor, x: torch.Tensor, pair: Pair, *, record: Record, table: dict[str, Any]
) -> Any:
    table["log"].append(y)  # an effect that the caller sees
    table["n"] += 1
    value = y * record.value + pair.left + pair.right[0]["deep"][1]
    return OrderedDict(
        pair=Pair(value, [None, (value + 1,)]),
        record=Record(value * record.scale, 3.0, "done"),
        n=table["n"],
        none=None,
    )


def test_containers() -> None:
    """NamedTuples and dataclasses in and out, nested, by keyword; a list that the model appends to."""
    model = tiny(containers).eval()
    report = sparsecc.Report()
    fast = torch.compile(model, **ours(report), fullgraph=True)

    def step(one: Any) -> Any:
        like = next(one.parameters())
        pair = Pair(x32(5, 4).to(like), ({"deep": [None, x32(4).to(like)]},))
        table: dict[str, Any] = {"log": [], "n": 1}
        record = Record(x32(5, 1).to(like), 0.5)
        with torch.no_grad():
            out = one(x32(5, 8).to(like), pair, record=record, table=table)
        assert (type(out), type(out["pair"]), type(out["record"])) == (OrderedDict, Pair, Record)
        assert len(table["log"]) == 1
        assert (out["n"], out["none"], out["record"].note) == (2, None, "done")
        return table["log"], out["pair"], out["record"].value, out["record"].scale

    follow(model, fast, step, step)
    assert report[FOLD].applied == 1


# ---- several graphs, and several versions of one -------------------------------------------------


@torch.compiler.disable
def outside(value: torch.Tensor) -> float:
    return float(value.abs().max() > 0)


def test_graph_breaks() -> None:
    """Several pieces; what they hand on, views and written tensors, stays what it is."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Tiny() for _ in range(2))
            self.turn = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.parts[0](x)
            view = y[:2]
            y = y * outside(y)
            view.add_(1)
            torch._dynamo.graph_break()
            z = self.parts[1](self.turn(y) + view.sum())
            if z.sum() > 1e6:
                z = -z
            return z, view

    report = sparsecc.Report()
    model = randomise(Broken())
    fast = torch.compile(model, **ours(report))
    train_alike(fast, model, *copies(model), x32(5, 8, grad=True))
    assert len(report.graphs) >= 3
    assert report[TO_RMS].applied == 2


def test_recompilation() -> None:
    """Sizes, flags, numbers, dtypes, ranks and gradient modes change between calls."""

    def pattern(y: torch.Tensor, x: torch.Tensor, negate: bool = False, power: int = 1) -> Any:
        return (-y if negate else y) ** power

    model = tiny(pattern)
    report = sparsecc.Report()
    fast = torch.compile(model, **ours(report))

    def step(*shape: int, grad: bool = False, **kwargs: Any) -> Callable[[Any], Any]:
        def run(one: Any) -> Any:
            x = x32(*shape).to(next(one.parameters())).requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                y = one(x, **kwargs)
            gradients = torch.autograd.grad(y.square().sum(), x) if grad else ()
            return y.detach(), gradients

        return run

    follow(
        model,
        fast,
        step(5, 8),
        step(7, 8),
        step(5, 8, negate=True),
        step(9, 8, power=2),
        step(2, 3, 8),
        step(40, 8, grad=True),
        step(5, 8),
    )
    assert 5 <= len(report.graphs) <= 7
    assert all(g.passes[TO_RMS].applied == 1 for g in report.graphs)


def test_what_needs_gradients_changes() -> None:
    """Frozen, thawed, frozen in part; gradients of what asks for them alone; inference in between."""
    model = tiny()
    report = sparsecc.Report()
    fast = torch.compile(model, **ours(report))
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()

    def round_of(frozen: tuple[str, ...], grad: bool) -> None:
        for one in (model, plain, wide):
            for name, parameter in one.named_parameters():
                parameter.requires_grad_(not (frozen and name.startswith(frozen)))
        train_alike(fast, model, plain, wide, x32(5, 8, grad=grad))

    names = tuple(n for n, _ in model.named_parameters())
    round_of((), False)
    round_of(names, False)  # nothing: this is inference, and weights fold
    round_of(("enter", "norm"), True)
    with torch.inference_mode():
        no_worse(
            *({"y": m(x)} for m, x in ((fast, x32(5, 8)), (plain, x32(5, 8)), (wide, x64(5, 8))))
        )
    round_of((), True)
    assert [g.trains for g in report.graphs].count(False) >= 2
    assert all(g.passes[TO_RMS].applied == 1 for g in report.graphs)


def test_gradient_modes_inside() -> None:
    def pattern(y: torch.Tensor, x: torch.Tensor) -> Any:
        with torch.no_grad():
            gate = torch.sigmoid(y)
            with torch.enable_grad():
                again = y * 2
        with torch.set_grad_enabled(False):
            gate = gate * y.detach()
        return y * gate + again, gate

    judge(tiny(pattern), x32(5, 8, grad=True), applied=ONE)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_modes(mode: Any) -> None:
    """Tensors made in inference mode go in and come out; training after it still works."""
    model = tiny().eval()
    fast = torch.compile(model, **ours(require={TO_RMS: 1}))
    with mode():
        x = x32(5, 8) * 1
        for _ in range(2):
            got = fast(x)
        no_worse({"y": got}, {"y": model(x)}, {"y": copy.deepcopy(model).double()(x.double())})
        assert got.is_inference() == (mode is torch.inference_mode)
    train_alike(fast, model, *copies(model), x32(5, 8, grad=True))
