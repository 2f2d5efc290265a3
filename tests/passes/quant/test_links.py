"""Links: what is found, and that random scales and shifts along them change nothing; planted faults do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalent import (
    IMAGE,
    Two,
    X,
    check,
    codes,
    everywhere,
    found,
    legal,
    numbers,
    only,
)
from support import randomise
from torch import nn
from torch.nn import functional as F

from sparsecc.passes.analysis.channels import FREE
from sparsecc.passes.analysis.linear import Linear
from sparsecc.passes.analysis.links import Link
from sparsecc.passes.quant._migrate import migrate_scale, migrate_shift
from sparsecc.program import Program

# ---- linear-linear ---------------------------------------------------------------------------------


BOTH = {
    "nothing": lambda y: y,
    "reshape": lambda y: y.reshape(y.shape[0], -1, 3, 4).transpose(1, 2).transpose(1, 2).flatten(2),
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "mean over tokens": lambda y: y.mean(1),
    "slice of tokens": lambda y: y[:, 1:],
    "cast": lambda y: y.to(torch.float64),
    "permuted channels": lambda y: y.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2),
    "halves swapped": lambda y: torch.cat([y[..., 6:], y[..., :6]], -1),
    "more tokens": lambda y: torch.cat([y, y[:, :1]], 1),
    "repeated tokens": lambda y: y.repeat_interleave(2, 1),
    "repeated channels": lambda y: y[..., :6].repeat_interleave(2, -1),
    "every other": lambda y: torch.stack([y[..., ::2], y[..., 1::2]], -1).flatten(-2),
}
SCALE = {
    "relu": F.relu,
    "leaky relu": lambda y: F.leaky_relu(y, 0.1),
    "abs": torch.abs,
    "prelu": lambda y: F.prelu(y, y.new_ones(1) * 0.2),
    "masked tokens": lambda y: y.masked_fill(y.new_ones(5, 1).cumsum(0) > 3, 0),
    "chosen": lambda y: torch.where(y.new_ones(12).cumsum(0) > 5, y, F.relu(y)),
    "clamp": lambda y: y.clamp(min=0),
    "negative": lambda y: -y,
    "number": lambda y: y * 0.5,
    "one number a token": lambda y: y * y.detach().new_ones(5, 1).cumsum(0),
    "sum over tokens": lambda y: y.sum(1),
    "a sum with itself": lambda y: y + F.relu(y),
    "a sum of channels": lambda y: y + y.flip(1),
}
NEITHER = {
    "gelu": (F.gelu, "activation"),
    "silu": (F.silu, "activation"),
    "sigmoid": (torch.sigmoid, "activation"),
    "tanh": (torch.tanh, "activation"),
    "relu6": (F.relu6, "activation"),
    "softmax": (lambda y: y.softmax(-1), "reader"),
    "clamp": (lambda y: y.clamp(min=0.1), "reader"),
    "clamped twice": (lambda y: y.clamp(min=0, max=1), "reader"),
    "square": (lambda y: y * y, "reader"),
    "one minus": (lambda y: 1 - y, "reader"),
    "constant": (lambda y: y + 1, "mixed"),
    "residual": (lambda y: y + torch.ones_like(y[:, :1]), "mixed"),
    "flipped": (lambda y: y.flip(-1), "reader"),
    "rolled": (lambda y: y.roll(1, -1), "reader"),
    "sorted": (lambda y: y.sort(-1)[0], "reader"),
    "dropout": (lambda y: F.dropout(y, 0.5, training=True) * 0 + y.sigmoid(), "reader"),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("bias", [True, False])
def test_what_carries_both(name: str, bias: bool) -> None:
    check(Two(BOTH[name], bias), X, scales=["linear-linear"], shifts=["linear-linear"])


@pytest.mark.parametrize("name", SCALE)
def test_what_carries_a_scale_alone(name: str) -> None:
    seen = check(Two(SCALE[name]), X, scales=["linear-linear"])
    assert only(seen, "linear-linear").shift_refusal.code == "shift"


@pytest.mark.parametrize("name", NEITHER)
def test_what_carries_neither(name: str) -> None:
    """D8: a scale through GELU, and its like."""
    between, code = NEITHER[name]
    seen, worst = found(randomise(Two(between)), X, edit=everywhere)
    assert legal(seen) == Counter()
    assert code in codes(seen)
    assert worst == 0


def test_a_scale_forced_through_gelu_breaks_the_invariance() -> None:
    def forced(program: Program, seen: list[Link]) -> None:
        (refused,) = [link for link in seen if link.refusal.code == "activation"]
        second = next(link for link in seen if link is not refused).producers[0]
        columns = dataclasses.replace(second, channels=tuple(range(12)))
        link = dataclasses.replace(refused, consumers=(columns,), size=12, refusal=None)
        migrate_scale(program, link, numbers(12, 0)[0], "test")

    assert found(randomise(Two(F.gelu)), X, edit=forced)[1] > 1e-3


@pytest.mark.parametrize("name", ["relu", "abs", "number", "a sum with itself"])
def test_a_shift_forced_through_breaks_the_invariance(name: str) -> None:
    def forced(program: Program, seen: list[Link]) -> None:
        link = dataclasses.replace(only(seen, "linear-linear"), shift_refusal=None)
        migrate_shift(program, link, numbers(link.size, 0)[1], "test")

    assert found(randomise(Two(SCALE[name])), X, edit=forced)[1] > 1e-3


def test_wrong_numbers_are_refused() -> None:
    def edit(program: Program, seen: list[Link]) -> None:
        link = only(seen, "linear-linear")
        for bad in ([1.0] * 11, [0.0] * 12, [-1.0] * 12, [float("inf")] * 12, [float("nan")] * 12):
            with pytest.raises(ValueError, match=r"needed|positive"):
                migrate_scale(program, link, bad, "test")
        with pytest.raises(ValueError, match="no shift"):
            migrate_shift(program, link, [0.0] * 12, "test")
        (refused,) = [link for link in seen if not link.carries_scale]
        with pytest.raises(ValueError, match="no scale"):
            migrate_scale(program, refused, [1.0] * 8, "test")

    assert found(randomise(Two(F.relu)), X, edit=edit)[1] == 0


def test_one_channel() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 1), nn.Linear(1, 1), nn.Linear(1, 4)

        def forward(self, x):
            return self.c(F.gelu(self.b(F.relu(self.a(x)))))

    seen = check(One(), X, scales=["linear-linear"])
    assert codes(seen) == ["activation", "output"]


def test_conv1d_of_gpt2_and_matmul_without_bias() -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(16, 12)), nn.Parameter(torch.ones(12, 8))
            self.c, self.d = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(6))

        def forward(self, x):
            y = (x @ self.a @ self.b).flatten(0, 1)
            return torch.addmm(self.d, F.relu(y), self.c)

    check(Spelled(), X, scales={"linear-linear": 2}, shifts={"linear-linear": 1})


# ---- convolutions ----------------------------------------------------------------------------------


class Convs(nn.Module):
    def __init__(self, between: Callable[[Any], Any], first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


SECONDS = {
    "plain": lambda: nn.Conv2d(8, 6, 3),
    "padded": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "same": lambda: nn.Conv2d(8, 6, 3, padding="same"),
    "valid": lambda: nn.Conv2d(8, 6, 3, padding="valid", bias=False),
    "groups": lambda: nn.Conv2d(8, 6, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(8, 16, 3, groups=8, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2),
    "transposed groups": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False),
}
PADDED = {"padded", "same", "transposed", "transposed groups"}


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("first", ["conv", "transposed"])
def test_convolutions(name: str, first: str) -> None:
    """A shift stays out of zero padding; every axis of every layout is scaled where it should be."""
    made = {
        "conv": nn.Conv2d(3, 8, 3, padding=1),
        "transposed": nn.ConvTranspose2d(3, 8, 3, groups=1, bias=False),
    }
    shifts = [] if name in PADDED else ["linear-linear"]
    model = Convs(lambda y: y, made[first], SECONDS[name]())
    seen = check(model, IMAGE, scales=["linear-linear"], shifts=shifts, dynamic=False)
    if name in PADDED:
        assert only(seen, "linear-linear").shift_refusal.code == "padding"


def test_grouped_transposed_producer() -> None:
    first = nn.ConvTranspose2d(3, 12, 2, groups=3)
    check(Convs(F.relu, first, nn.Conv2d(12, 4, 3)), IMAGE, scales=["linear-linear"], dynamic=False)


def test_a_shift_forced_into_zero_padding_breaks_the_invariance() -> None:
    def forced(program: Program, seen: list[Link]) -> None:
        link = dataclasses.replace(only(seen, "linear-linear"), shift_refusal=None)
        migrate_shift(program, link, numbers(link.size, 0)[1], "test")

    model = Convs(lambda y: y, nn.Conv2d(3, 8, 3), SECONDS["padded"]())
    assert found(randomise(model), IMAGE, edit=forced)[1] > 1e-3


POOLS = {
    "max": (lambda y: F.max_pool2d(y, 2), True),
    "max padded": (lambda y: F.max_pool2d(y, 3, padding=1, ceil_mode=True), True),
    "average": (lambda y: F.avg_pool2d(y, 2), True),
    "average padded": (lambda y: F.avg_pool2d(y, 2, padding=1), False),
    "average of what is there": (
        lambda y: F.avg_pool2d(y, 2, padding=1, count_include_pad=False),
        True,
    ),
    "divisor": (lambda y: F.avg_pool2d(y, 2, divisor_override=3), False),
    "global": (lambda y: F.adaptive_avg_pool2d(y, 4), True),
    "nearest": (lambda y: F.interpolate(y, scale_factor=2), True),
    "bilinear": (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), True),
    "zero padding": (lambda y: F.pad(y, (1, 1, 1, 1)), False),
    "channels last": (lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2), True),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_and_resizing(name: str) -> None:
    between, shifts = POOLS[name]
    model = Convs(between, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 2))
    check(
        model,
        IMAGE,
        scales=["linear-linear"],
        shifts=["linear-linear"] * shifts,
        dynamic=False,
    )


def test_flattened_feature_map() -> None:
    """One channel of a convolution is many columns of the linear layer."""
    between = lambda y: F.max_pool2d(F.relu(y), 2).flatten(1)  # noqa: E731
    model = Convs(between, nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 4))
    link = only(check(model, IMAGE, scales=["linear-linear"], dynamic=False), "linear-linear")
    assert link.consumers[0].channels == tuple(c for c in range(8) for _ in range(16))


# ---- refusals --------------------------------------------------------------------------------------


class Refused(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(16, 12),
            nn.Linear(12, 8),
            nn.Linear(12, 8),
        )
        self.back = nn.Linear(16, 12, bias=False)
        self.square = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(16)
        self.buffer: torch.Tensor
        self.register_buffer("buffer", torch.ones(8, 12))
        self.how = how

    def forward(self, x):
        y = F.relu(self.first(x))
        if self.how == "second reader":
            return self.second(y) + self.third(y).softmax(-1) + y.mean()
        if self.how == "returned":
            return torch.cat([self.second(y), y], -1)
        if self.how == "output":
            return y
        if self.how == "consumer twice":
            return self.second(y) + self.second(self.back(x).tanh())
        if self.how == "producer twice":
            return self.second(y) + self.first(x.tanh()).softmax(-1)[..., :8]
        if self.how == "written":
            y = self.first(x)
            z = y[..., :4]
            w = self.second(y)
            z.add_(1)
            return w + y.sum(-1, keepdim=True)
        if self.how == "written weight":
            self.buffer.fill_(0.5)
            return F.linear(y, self.buffer)
        if self.how == "not a weight":
            return self.back(F.layer_norm(x, (16,), x[0, 0]))
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                y = F.relu(self.first(x))
            return self.second(y)
        raise AssertionError(self.how)


REFUSED = {
    "second reader": "reader",
    "returned": "output",
    "output": "output",
    "consumer twice": "tied",
    "producer twice": "tied",
    "written": "written",
    "written weight": "reader",
    "autocast": "region",
    "not a weight": "not-a-weight",
}


@pytest.mark.parametrize("how", REFUSED)
def test_refusals(how: str) -> None:
    seen, worst = found(randomise(Refused(how)), X, edit=everywhere)
    assert REFUSED[how] in codes(seen)
    assert legal(seen) == Counter()
    assert worst == 0


def test_no_reader() -> None:
    class Dropped(Refused):
        def forward(self, x):
            y = self.first(x)
            return self.back(x) + y.new_zeros(y.shape)

    seen, _ = found(randomise(Dropped("")), X)
    assert codes(seen) == ["no-reader", "mixed"]


def test_an_order_without_a_short_form() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 2000), nn.Linear(2000, 4)

        def forward(self, x):
            y = self.first(x)
            order = sorted(range(1000), key=lambda i: i * 7919 % 1009)
            parts = y.split(2, -1)
            return self.second(torch.cat([parts[i] for i in order], -1))

    seen, worst = found(randomise(Shuffled()), X, edit=everywhere)
    assert codes(seen) == ["layout", "output"]
    assert worst == 0


def test_parts_beside_channels_that_stay() -> None:
    """One part of a concatenation carries, the other does not: its columns stay."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(12, 4)

        def forward(self, x):
            return self.out(torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], -1))

    link = only(check(Joined(), X, scales=["linear-linear"]), "linear-linear")
    assert link.consumers[0].channels == (*range(6), *[FREE] * 6)
    assert isinstance(link.consumers[0].of, Linear)
