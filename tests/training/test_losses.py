"""What trains a model towards sparsity: gradients against fp64 differences, hooks, schedules, ReLU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsecc.errors import OptionsError
from sparsecc.training import (
    FATReLU,
    FFNActivations,
    SineSchedule,
    chunk_loss,
    density,
    density_loss,
    l1,
    locality_loss,
    relufy,
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- losses ----------------------------------------------------------------------------------------------


LOSSES = {
    "l1": (l1, _random(2, 3, 5)),
    "density": (lambda a: density_loss(a, 0.3), _random(2, 3, 5)),
    "chunk": (lambda p: chunk_loss(p, 4), _random(2, 8, 3).sigmoid() * 0.8),
    "locality": (lambda u: locality_loss(u, 3.0), _random(2, 5, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss, x = LOSSES[name]
    x = x.clone().requires_grad_()
    loss(x).backward()
    step = 1e-6
    for index in (0, 7, x.numel() - 1):
        moved = x.detach().clone().flatten()
        moved[index] += step
        high = loss(moved.view_as(x))
        moved[index] -= 2 * step
        low = loss(moved.view_as(x))
        assert float(x.grad.flatten()[index]) == pytest.approx(
            float(high - low) / (2 * step), rel=1e-6
        )


def test_losses_by_hand() -> None:
    a, b = torch.tensor([[1.0, -3.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert float(l1(a)) == pytest.approx(4 / 3)
    assert float(l1([a, b])) == pytest.approx((4 / 3 + 0.5) / 2)  # layers count alike
    assert density([a, b]) == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert float(density_loss(a, 1.0)) == pytest.approx((1 / 2 + 9 / 10) / 3)
    assert float(density_loss([a, b], 1e-12)) == pytest.approx(density([a, b]))
    p = torch.tensor([[[0.5], [0.5], [0.0], [0.25]]])
    assert float(chunk_loss(p, 2)) == pytest.approx((0.75 + 0.25) / 2, abs=1e-4)
    assert float(chunk_loss(p, 4)) == pytest.approx(1 - 0.5 * 0.5 * 0.75, abs=1e-4)
    u = torch.tensor([[2.0], [-1.0]])
    expected = F.binary_cross_entropy(u[:1].sigmoid(), u[1:].sigmoid())
    assert float(locality_loss(u, 1.0)) == pytest.approx(float(expected), rel=1e-5)
    assert (
        float(locality_loss(u * 50)) > 100 > float(locality_loss(u.abs() * 50))
    )  # and it is finite


def test_half_precision_does_not_lose_small_activations() -> None:
    a = torch.full((4, 8), 3e-4, dtype=torch.float16)  # its square is 0 in fp16
    assert float(density_loss(a, 1e-7)) == pytest.approx(9 / 19, rel=1e-2)
    assert l1(a).dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: l1([]), "no activations"),
        (lambda: density_loss(torch.ones(2), 0.0), "above 0"),
        (lambda: chunk_loss(torch.ones(1, 7, 2), 4), "7 tokens .* chunks of 4"),
        (lambda: locality_loss(torch.ones(1, 2)), "one token"),
    ],
)
def test_wrong_losses(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# ---- the schedule ----------------------------------------------------------------------------------------


def test_the_schedule_is_constant_then_continuous_and_flat_at_borders() -> None:
    schedule = SineSchedule([1e-3, 5e-3, 2e-2], [10, 30, 40])
    assert {schedule(t) for t in range(10)} == {1e-3}
    assert schedule(0) == 1e-3
    for end, weight in ((10, 1e-3), (30, 5e-3), (40, 2e-2)):
        for near in (-1e-6, 0.0, 1e-6):
            assert schedule(end + near) == pytest.approx(weight, rel=1e-9)
    assert schedule(20) == pytest.approx(3e-3)  # half of a stage
    assert schedule(35) == pytest.approx(12.5e-3)
    assert schedule(15) == pytest.approx(1e-3 + 2e-3 * (math.sin(-math.pi / 4) + 1))
    values = [schedule(t) for t in range(60)]
    assert values == sorted(values)
    assert schedule(10**6) == 2e-2


@pytest.mark.parametrize(
    ("weights", "ends"), [([], []), ([1.0], [1, 2]), ([1, 2], [5, 5]), ([1], [0]), ([-1], [3])]
)
def test_wrong_schedules(weights: list[float], ends: list[int]) -> None:
    with pytest.raises(ValueError, match="SineSchedule"):
        SineSchedule(weights, ends)


# ---- activations -----------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention whose layers widen as a feed-forward network's do, and a network."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        for name in "qkv":
            self.attention.add_module(name, nn.Linear(4, 6))
        self.attention.o = nn.Linear(6, 4)
        self.mlp, self.plain = Gated(), nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4))
        self.fn = F.gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention.o(self.fn(self.attention.q(x)))
        return self.plain(x + self.mlp(x))


def test_down_projections_are_caught_with_their_gradients() -> None:
    torch.manual_seed(0)
    model, x = Block().double(), _random(2, 3, 4)
    expected: list[torch.Tensor] = []
    handle = model.mlp.down.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with FFNActivations(model) as seen:
        assert list(seen.modules) == ["mlp.down", "plain.2"]
        model(_random(5, 4, seed=1))
        model(x)
        loss = l1(seen.values)
        loss.backward()
    handle.remove()
    assert [value.shape[-1] for value in seen.values] == [6, 9]  # of the last call alone
    assert seen.caught["mlp.down"][0] is expected[-1]
    weight, step = model.mlp.up.weight, 1e-6
    gradient = float(weight.grad[2, 1])
    around = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[2, 1] += sign * step
        with FFNActivations(model) as seen:
            model(x)
        around.append(float(l1(seen.values).detach()))
        with torch.no_grad():
            weight[2, 1] -= sign * step
    assert gradient == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-6)


def test_a_layer_called_twice_is_caught_twice() -> None:
    model = nn.Sequential(gated := Gated(), gated)
    with FFNActivations(model, "0.down") as seen:
        model(torch.randn(2, 4))
    assert len(seen.values) == 2


def test_hooks_go_however_the_block_ends() -> None:
    model = Block()
    caught = FFNActivations(model)
    model.plain[2].register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), caught as seen:
        model(torch.randn(2, 4))
    model.plain[2]._forward_hooks.clear()
    assert len(seen.values) == 2  # what was caught stays
    model(torch.randn(3, 4))
    assert {len(value) for value in seen.values} == {2}
    assert not any(module._forward_pre_hooks for module in model.modules())
    with caught:
        with pytest.raises(RuntimeError, match="entered already"):
            caught.__enter__()
        model(torch.randn(3, 4))
    assert {len(value) for value in seen.values} == {3}


def test_what_is_no_network_is_said() -> None:
    with pytest.raises(OptionsError, match=r"by structure.*linear layers: 0"):
        FFNActivations(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(OptionsError, match=r"Linear of the model: 'mpl\.down'.*mlp\.down"):
        FFNActivations(Block(), "mpl.down")


# ---- ReLU ------------------------------------------------------------------------------------------------


def test_fatrelu_keeps_the_threshold_and_shifts_nothing() -> None:
    x = torch.tensor(
        [-1.0, 0.0, 0.25, 0.5, torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)), 2.0]
    )
    assert FATReLU(0.5)(x).tolist() == [0, 0, 0, 0.5, 0, 2.0]
    assert torch.equal(FATReLU(0.0)(x), x.relu())
    assert FATReLU(0.5)(x.bfloat16()).dtype is torch.bfloat16
    wide = x.double().requires_grad_()
    FATReLU(0.5)(wide).sum().backward()
    assert wide.grad.tolist() == [0, 0, 0, 1, 0, 1]
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="FATReLU"):
            FATReLU(wrong)


def test_relufy_exchanges_modules_and_functions() -> None:
    model, x = Block(), torch.randn(2, 4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert relufy(model, ["mlp.*"]) == 1
    assert isinstance(model.mlp.act, nn.ReLU)
    assert isinstance(model.plain[1], nn.GELU)
    assert relufy(model, threshold=0.1) == 2
    assert isinstance(model.fn, FATReLU)
    assert isinstance(model.plain[1], FATReLU)
    y = model.attention.q(x)
    h = model.attention.o(torch.where(y >= 0.1, y, 0))
    h = h + model.mlp.down(model.mlp.gate(h).relu() * model.mlp.up(h))
    y = model.plain[0](h)
    assert torch.allclose(model(x), model.plain[2](torch.where(y >= 0.1, y, 0)))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(OptionsError, match=r"activation of the model.*'\*'.*\(none\)"):
        relufy(model)


def test_relufy_refuses_what_matches_nothing_and_changes_nothing() -> None:
    model = Block()
    with pytest.raises(OptionsError, match=r"'\*\.act_fn'.*mlp\.act"):
        relufy(model, ["mlp.act", "*.act_fn"])
    assert isinstance(model.mlp.act, nn.SiLU)


def test_relufy_makes_zeros_that_density_counts() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(64, 4)
    counts = []
    for exchange in (False, True):
        if exchange:
            relufy(model, "mlp.act")
        with torch.no_grad(), FFNActivations(model, "mlp.down") as seen:
            model(x)
        counts.append(density(seen.values))
    assert counts[0] == 1.0
    assert 0.2 < counts[1] < 0.8
