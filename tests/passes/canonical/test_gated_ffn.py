"""Feed-forward networks: one view of every kind, one operand order of the gated ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsecc.passes.analysis.ffn import find_ffns
from sparsecc.passes.base import Analyses

PASSES = ["drop-identities", "functionalize-inplace", "raise-activation", "raise-gated-ffn"]
aten = torch.ops.aten
D, K = 4, 6


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, K), nn.Linear(K, D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.down(self.dropout(F.gelu(self.up(x))))


class Conv1D(nn.Module):
    """GPT-2's: the weight is [in, out], and tokens are flattened."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(D, K)), nn.Parameter(torch.randn(K))
        self.w2, self.b2 = nn.Parameter(torch.randn(K, D)), nn.Parameter(torch.randn(D))

    def forward(self, x):
        h = torch.addmm(self.b1, x.view(-1, D), self.w1).view(*x.shape[:-1], K)
        h = h * torch.sigmoid(h)
        return torch.addmm(self.b2, h.view(-1, K), self.w2).view(x.shape)


class Gated(nn.Module):
    def __init__(self, spell):
        super().__init__()
        self.gate, self.up = nn.Linear(D, K, bias=False), nn.Linear(D, K)
        self.down, self.spell = nn.Linear(K, D), spell

    def forward(self, x):
        return self.down(self.spell(self.gate(x), self.up(x)))


class Fused(nn.Module):
    def __init__(self, spell):
        super().__init__()
        self.both, self.down, self.spell = nn.Linear(D, 2 * K), nn.Linear(K, D), spell

    def forward(self, x):
        return self.down(self.spell(self.both(x)))


def chunked(y):
    gate, up = y.chunk(2, dim=-1)
    return up * F.silu(gate)


def split(y):
    up, gate = y.split(K, dim=-1)
    return F.silu(gate) * up


def split_sizes(y):
    gate, up = torch.split(y, [K, K], 2)
    return F.gelu(gate) * up


def sliced(y):
    return y[..., K:] * F.silu(y[..., :K])


def unequal(y):
    return F.silu(y[..., :K]) * y[..., K - 1 : -1]


def twice_the_gate(y):
    return F.silu(y[..., :K]) * y[..., :K]


def over_tokens(y):
    gate, up = torch.cat([y, y], 1).chunk(2, dim=1)
    return (F.silu(gate) * up)[..., :K]


FFNS = {
    "plain": (Plain(), "plain", 0),
    "conv1d": (Conv1D(), "plain", 0),
    "act first": (Gated(lambda g, u: F.silu(g) * u), "gated", 0),
    "act last": (Gated(lambda g, u: u * F.silu(g)), "gated", 1),
    "relu": (Gated(lambda g, u: u * F.relu(g)), "gated", 1),
    "spelled silu": (Gated(lambda g, u: u * (g * torch.sigmoid(g))), "gated", 1),
    "mul_": (Gated(lambda g, u: F.silu(g).mul_(u)), "gated", 0),
    "sigmoid": (Gated(lambda g, u: torch.sigmoid(g) * u), "gated", 0),
    "chunk": (Fused(chunked), "fused", 1),
    "split": (Fused(split), "fused", 0),
    "split sizes": (Fused(split_sizes), "fused", 0),
    "slices": (Fused(sliced), "fused", 1),
}
OTHERS = {
    "sum": Gated(lambda g, u: F.silu(g) + u),
    "activated product": Gated(lambda g, u: F.silu(g * u)),
    "no activation": Gated(lambda g, u: g * u),
    "unequal halves": Fused(unequal),
    "one half twice": Fused(twice_the_gate),
    "halves of tokens": Fused(over_tokens),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FFNS)
def test_found(run_pass, randomise, name, dynamic):
    model, kind, swapped = FFNS[name]
    model, x = randomise(model.double()), torch.randn(2, 3, D, dtype=torch.float64)
    result = run_pass(PASSES, model, x, dynamic=dynamic)
    assert result.applied["raise-gated-ffn"] == swapped
    (ffn,) = find_ffns(result.program, Analyses(result.program))
    assert ffn.kind == kind
    assert ffn.x.op == "placeholder"
    assert (ffn.gate is None) == (kind == "plain")
    if kind != "plain":
        assert ffn.hidden.args[0] is ffn.activation
    if kind == "fused":
        assert ffn.halves[0] is ffn.activation.args[0]
    torch.testing.assert_close(result.value, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_not_found(run_pass, name):
    model, x = OTHERS[name].double(), torch.randn(2, 3, D, dtype=torch.float64)
    result = run_pass(PASSES, model, x)
    assert find_ffns(result.program, Analyses(result.program)) == []
    torch.testing.assert_close(result.value, model(x), rtol=1e-12, atol=1e-12)


def test_swapping_is_bitwise(run_pass):
    model, x = Gated(lambda g, u: u * F.gelu(g)), torch.randn(2, 3, D)
    result = run_pass(["raise-gated-ffn"], model, x)
    assert result.applied["raise-gated-ffn"] == 1
    torch.testing.assert_close(result.value, model(x), rtol=0, atol=0)


def test_active_dropout_hides_the_network(run_pass):
    model, x = Plain().train(), torch.randn(2, 3, D)
    result = run_pass(PASSES, model, x)
    assert find_ffns(result.program, Analyses(result.program)) == []


def test_branches_of_two_inputs_are_no_ffn(run_pass):
    class Cross(Gated):
        def forward(self, x):
            return self.down(self.spell(self.gate(x), self.up(x + 1)))

    model, x = Cross(lambda g, u: u * F.silu(g)), torch.randn(2, 3, D)
    result = run_pass(PASSES, model, x)
    assert find_ffns(result.program, Analyses(result.program)) == []
    assert not result.applied["raise-gated-ffn"]


def test_of_convolutions(run_pass, randomise):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = (nn.Conv2d(D, 12, 1) for _ in range(2))

        def forward(self, x):
            return self.up(x) * F.silu(self.gate(x))

    model, x = randomise(Pixels().double()), torch.randn(2, D, 3, 4, dtype=torch.float64)
    result = run_pass(PASSES, model, x)
    assert result.applied["raise-gated-ffn"] == 1
    torch.testing.assert_close(result.value, model(x), rtol=0, atol=0)
