"""Operators that hand back their input are dropped, unless somebody could tell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

PASSES = ["drop-identities"]

DROPPED = {
    "dropout, eval": lambda x: F.dropout(x, 0.5, training=False),
    "dropout, p=0": lambda x: torch.dropout(x, 0.0, True),
    "dropout2d": lambda x: F.dropout2d(x[None, None], 0.5, training=False)[0, 0],
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "to dtype": lambda x: x.to(torch.float64),
    "to device": lambda x: x.to("cpu"),
    "double": lambda x: x.double(),
    "type_as": lambda x: x.type_as(x),
    "* 1": lambda x: x * 1,
    "1.0 *": lambda x: 1.0 * x,
    "/ 1": lambda x: x / 1.0,
    "- 0": lambda x: x - 0,
    "x[:]": lambda x: x[:],
    "x[0:]": lambda x: x[0:],
}
KEPT = {
    "dropout, training": lambda x: F.dropout(x, 0.0 + 1.0, training=True),
    "to float": lambda x: x.to(torch.float32),
    "copy": lambda x: x.to(torch.float64, copy=True),
    "channels last": lambda x: x[None, None].to(memory_format=torch.channels_last)[0, 0],
    "clone": lambda x: x.clone(),
    "+ 0.0": lambda x: x + 0.0,
    "* 2": lambda x: x * 2,
    "2 /": lambda x: 2 / x,
    "slice": lambda x: x[1:],
    "step": lambda x: x[::2],
    "0 -": lambda x: 0 - x,
    "- 0, alpha": lambda x: torch.sub(x, x, alpha=0),
    "promotes": lambda x: x.long() / 1,
    "broadcasts": lambda x: x[0] * torch.ones(3, 4, dtype=torch.float64),
    "contiguous": lambda x: x.t().contiguous().t(),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropped(run_pass, name):
    identity = DROPPED[name]

    def function(x):
        return identity(x.sin()).cos()

    x = torch.randn(3, 4, dtype=torch.float64)
    result = run_pass(PASSES, function, x)
    assert result.applied["drop-identities"] >= 1, result.program.text()
    torch.testing.assert_close(result.value, function(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", KEPT)
def test_kept(run_pass, name):
    kept = KEPT[name]

    def function(x):
        return kept(x.sin()).cos()

    x = torch.randn(3, 4, dtype=torch.float64)
    torch.manual_seed(1)
    result = run_pass(PASSES, function, x)
    torch.manual_seed(1)
    expected = function(x)
    assert result.applied["drop-identities"] == 0, result.program.text()
    torch.testing.assert_close(result.value, expected, rtol=0, atol=0)


def test_negative_zero_survives(run_pass):
    def function(x):
        return 1 / (x * 1 - 0), 1 / (x + 0.0)

    x = torch.tensor([-0.0, 0.0])
    got = run_pass(PASSES, function, x).value
    assert got[0].tolist() == [-torch.inf, torch.inf]
    assert got[1].tolist() == [torch.inf, torch.inf]


def test_complex_products_stay(run_pass):
    def function(x):
        return (x.exp() * 1).abs()

    x = torch.randn(3, dtype=torch.complex64)
    assert not run_pass(PASSES, function, x).applied


def test_a_returned_copy_stays_a_copy(run_pass):
    def function(x):
        return x * 1

    x = torch.randn(3)
    result = run_pass(PASSES, function, x)
    assert result.refused == ["escapes"]
    assert result.value.data_ptr() != x.data_ptr()


def test_a_returned_view_of_a_copy_stays_a_copy(run_pass):
    def function(x):
        return (x * 1).view(-1)

    x = torch.randn(3, 2)
    result = run_pass(PASSES, function, x)
    assert result.refused == ["escapes"]
    assert result.value.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("write", ["copy", "source"])
def test_a_written_copy_stays(run_pass, write):
    def function(x):
        y = x.sin()
        z = y * 1
        (z if write == "copy" else y).view(-1).add_(1)
        return y.cos(), z.cos()

    x = torch.randn(3, 2)
    result = run_pass(PASSES, function, x)
    assert result.refused == ["written"]
    torch.testing.assert_close(result.value, function(x), rtol=0, atol=0)


def test_self_returning_operators_keep_aliasing(run_pass):
    """Dropout in eval mode and a cast to the same dtype return the tensor itself."""

    def function(x):
        y = x.sin()
        F.dropout(y, 0.5, training=False).add_(1)
        y.to(torch.float32).mul_(2)
        return y

    x = torch.randn(3, 2)
    result = run_pass(PASSES, function, x)
    torch.testing.assert_close(result.value, function(x), rtol=0, atol=0)


def test_strides_of_a_copy_may_matter(run_pass):
    def function(x):
        return (x[:, :2] * 1).cos().sum(), (x[:, :2] * 1).view(-1).sin()

    x = torch.randn(3, 4)
    result = run_pass(PASSES, function, x)
    assert set(result.refused) == {"layout"}
    torch.testing.assert_close(result.value, function(x))


def test_detach_is_dropped_without_gradients_only(run_pass):
    def function(x):
        return (x.sin().detach() * x).sum()

    x = torch.randn(3, dtype=torch.float64)
    assert run_pass(PASSES, function, x).applied["drop-identities"] == 1
    x.requires_grad_()
    result = run_pass(PASSES, function, x, grad=True)
    assert result.refused == ["gradient"]
    got = torch.autograd.grad(result.value, x)
    torch.testing.assert_close(got, torch.autograd.grad(function(x), x))


def test_symbolic_dropout(run_pass):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.1)

        def forward(self, x):
            return self.dropout(x.sin()).cos()

    model, x = Model().eval(), torch.randn(3, 2)
    result = run_pass(PASSES, model, x, dynamic=True)
    assert result.applied["drop-identities"] == 1
    torch.testing.assert_close(result.value, model(x), rtol=0, atol=0)
