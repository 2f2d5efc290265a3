"""Links of norms, gated networks, attention and whole models: random scales and shifts, and planted faults."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalent import (
    Two,
    X,
    check,
    codes,
    everywhere,
    found,
    legal,
    numbers,
    only,
    shifting,
)
from heads import Attention
from support import randomise
from torch import nn
from torch.nn import functional as F

from sparsecc.passes.analysis.channels import FREE
from sparsecc.passes.analysis.links import Link
from sparsecc.passes.quant._migrate import migrate_scale, migrate_shift
from sparsecc.program import Program

# ---- norms -----------------------------------------------------------------------------------------


class Gemma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Shifted(nn.Module):
    """A scale and a shift after the norm: t = norm(x) · (1 + a) + c."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return self.norm(x) * (1 + self.weight) * 0.5 + self.bias


class ShiftedTwice(Shifted):
    def forward(self, x):
        return (self.norm(x) + self.bias) * self.weight


class Gated(nn.Module):
    """norm → gate and up, product, down: D10's missed gate."""

    def __init__(self, norm: nn.Module, act: Callable[[Any], Any] = F.silu) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(16), True),
    "no bias": (lambda: nn.LayerNorm(16, bias=False), True),
    "no weights": (lambda: nn.LayerNorm(16, elementwise_affine=False), True),
    "rms norm": (lambda: nn.RMSNorm(16), False),
    "rms norm, no weight": (lambda: nn.RMSNorm(16, elementwise_affine=False), False),
    "gemma": (Gemma, False),
    "affine tail": (Shifted, True),
    "bias before the factor": (ShiftedTwice, False),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    build, shifts = NORMS[name]
    kinds = {"norm-linear": 1, "up-down": 1}
    seen = check(Gated(build()), X, scales=kinds, shifts=["norm-linear"] * shifts)
    link = only(seen, "norm-linear")
    assert len(link.consumers) == 2
    if not shifts:
        assert link.shift_refusal.code == "no-bias"
    assert "activation" in codes(seen)  # the gate


@pytest.mark.parametrize("kind", ["scale", "shift"])
def test_a_missed_gate_breaks_the_invariance(kind: str) -> None:
    def forced(program: Program, seen: list[Link]) -> None:
        whole = only(seen, "norm-linear")
        link = dataclasses.replace(whole, consumers=whole.consumers[1:])
        s, z = numbers(link.size, 0)
        migrate_scale(program, link, s, "test") if kind == "scale" else migrate_shift(
            program, link, z, "test"
        )

    assert found(randomise(Gated(nn.LayerNorm(16))), X, edit=forced)[1] > 1e-3


def test_the_shift_uses_the_weight_that_the_consumer_has() -> None:
    """After y ÷ s and W̃ = W diag(s), a shift z of y ÷ s needs W̃z behind it; Wz is another function."""

    def shifted(program: Program, seen: list[Link], stale: bool) -> None:
        link = only(seen, "linear-linear")
        s, z = numbers(link.size, 0)
        node = link.consumers[0].node
        before = node.args
        migrate_scale(program, link, s, "test")
        scaled = node.args
        if stale:
            node.args = before
        migrate_shift(program, link, z, "test")
        node.args = (*scaled[:2], node.args[2])

    model = randomise(Two(lambda y: y))
    assert found(model, X, edit=lambda p, seen: shifted(p, seen, False))[1] < 1e-12
    assert found(model, X, edit=lambda p, seen: shifted(p, seen, True))[1] > 1e-3


def test_a_norm_between_two_layers() -> None:
    between = nn.LayerNorm(12)
    seen = check(Two(between), X, scales=["norm-linear"], shifts=["norm-linear"])
    assert codes(seen) == ["reader", "output"]  # what the norm reads is not to be scaled


# ---- gated networks --------------------------------------------------------------------------------


class Fused(nn.Module):
    """Gate and up in one matrix, taken apart in several ways."""

    def __init__(self, split: str, act: Callable[[Any], Any] = F.silu) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 48), nn.Linear(24, 16)
        self.split, self.act = split, act

    def forward(self, x):
        y = self.both(x)
        if self.split == "chunk":
            gate, up = y.chunk(2, -1)
        elif self.split == "split":
            gate, up = y.split([24, 24], -1)
        elif self.split == "slices":
            gate, up = y[..., :24], y[..., 24:]
        else:
            gate, up = y[..., ::2], y[..., 1::2]
        return self.down(self.act(gate) * up)


@pytest.mark.parametrize("split", ["chunk", "split", "slices", "interleaved"])
def test_the_up_half_of_a_fused_matrix(split: str) -> None:
    link = only(check(Fused(split), X, scales=["up-down"]), "up-down")
    rows = link.producers[0].channels
    assert link.size == 24
    gate = rows[::2] if split == "interleaved" else rows[:24]
    assert set(gate) == {FREE}


def test_a_fused_matrix_scaled_whole_breaks_the_invariance() -> None:
    def forced(program: Program, seen: list[Link]) -> None:
        link = only(seen, "up-down")
        rows = tuple(range(24)) * 2
        whole = dataclasses.replace(link.producers[0], channels=rows)
        link = dataclasses.replace(link, producers=(whole,))
        migrate_scale(program, link, numbers(24, 0)[0], "test")

    assert found(randomise(Fused("chunk")), X, edit=forced)[1] > 1e-3


def test_reglu_scales_both_branches_one_after_the_other() -> None:
    check(Gated(nn.RMSNorm(16), F.relu), X, scales={"norm-linear": 1, "up-down": 2})
    link = only(check(Fused("chunk", F.relu), X, scales=["up-down"]), "up-down")
    assert set(link.producers[0].channels[:24]) == {FREE}  # one factor of the two


def test_bilinear_layer() -> None:
    check(Gated(nn.RMSNorm(16), lambda y: y), X, scales={"norm-linear": 1, "up-down": 2})


# ---- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sdpa", [True, False])
@pytest.mark.parametrize("rope", ["", "half", "interleaved", "partial"])
def test_attention(kv: int, fused: bool, sdpa: bool, rope: str) -> None:
    """GQA in groups of 1, 2 and 4; the sizes are the numbers of scales that are free."""
    model = Attention(kv, rope, fused, sdpa)
    seen = check(model, X, scales=["v-o", "q-k"], shifts=["v-o"])
    assert only(seen, "v-o").size == 4 * kv
    assert only(seen, "q-k").size == {"": 4, "half": 2, "interleaved": 2, "partial": 3}[rope] * kv
    assert only(seen, "q-k").shift_refusal.code == "cancels"


def test_a_mask_may_leave_a_row_nothing() -> None:
    """Its output is zero then, not an average: no shift."""
    seen = check(Attention(mask=True), X, scales=["v-o", "q-k"])
    assert only(seen, "v-o").shift_refusal.code == "shift"


def test_a_fused_qkv_scaled_whole_breaks_the_invariance() -> None:
    """D8's second half: v's rows alone, not q's and k's."""

    def forced(program: Program, seen: list[Link]) -> None:
        link = only(seen, "v-o")
        rows = dataclasses.replace(link.producers[0], channels=tuple(range(16)) * 3)
        migrate_scale(
            program, dataclasses.replace(link, producers=(rows,)), numbers(16, 0)[0], "test"
        )

    assert found(randomise(Attention(fused=True)), X, edit=forced)[1] > 1e-3


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial"])
def test_a_scale_that_splits_a_rotary_pair_breaks_the_invariance(rope: str) -> None:
    def forced(program: Program, seen: list[Link]) -> None:
        link = only(seen, "q-k")
        sides = [
            [dataclasses.replace(s, channels=tuple(range(16))) for s in ends]
            for ends in (link.producers, link.consumers)
        ]
        apart = dataclasses.replace(
            link, producers=tuple(sides[0]), consumers=tuple(sides[1]), size=16
        )
        migrate_scale(program, apart, numbers(16, 0)[0], "test")

    assert found(randomise(Attention(rope=rope)), X, edit=forced)[1] > 1e-3
    assert found(randomise(Attention()), X, edit=forced)[1] < 1e-12  # without it they are free


@pytest.mark.parametrize("kv", [2, 1])
def test_unequal_scales_in_a_group_break_the_invariance(kv: int) -> None:
    def forced(program: Program, seen: list[Link]) -> None:
        link = only(seen, "v-o")
        columns = dataclasses.replace(link.consumers[0], channels=tuple(range(16)))
        rows = dataclasses.replace(link.producers[0], channels=tuple(range(4 * kv)))
        apart = dataclasses.replace(link, producers=(rows,), consumers=(columns,), size=16)
        migrate_scale(program, apart, numbers(16, 0)[0], "test")

    assert found(randomise(Attention(kv)), X, edit=forced)[1] > 1e-3


class NormedHeads(Attention):
    """RMSNorm over each head of q and k (Qwen3, OLMo 2): its weights carry the scale."""

    def __init__(self, **options: Any) -> None:
        super().__init__(rope="half", **options)
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)
        self.turns = 0

    def rotated(self, x):
        norm = self.q_norm if x.shape[1] == 4 else self.k_norm
        return super().rotated(norm(x))


def test_norms_of_q_and_k() -> None:
    seen = check(NormedHeads(kv=2), X, scales=["v-o", "q-k"], shifts=["v-o"])
    assert only(seen, "q-k").size == 2  # the heads share the norm, the rotation pairs its channels
    assert codes(seen).count("reader") == 2  # the projections of q and k, before the norms


def test_k_read_as_something_else_too() -> None:
    class Cached(Attention):
        def forward(self, x):
            return super().forward(x), self.qkv[1](x)

    seen, worst = found_pair(Cached())
    assert legal(seen) == Counter(["v-o"])
    assert worst == 0


def found_pair(model: nn.Module) -> Any:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            y, k = self.model(x)
            return torch.cat([y.flatten(), k.flatten()])

    def scales(program: Program, seen: list[Link]) -> None:
        for link in seen:
            if link.carries_scale and link.kind == "q-k":
                migrate_scale(program, link, numbers(link.size, 0)[0], "test")

    return found(randomise(First()), X, edit=scales)


# ---- whole models ----------------------------------------------------------------------------------

TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "vocab_size": 40}
MODELS = {
    "GPT2": (
        {"n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 40},
        {"norm-linear": 5, "q-k": 2, "v-o": 2},
    ),
    "OPT": (
        {**TINY, "ffn_dim": 24, "word_embed_proj_dim": 16},
        {"norm-linear": 5, "q-k": 2, "v-o": 2, "linear-linear": 2},
    ),
}


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "attention"), [("GPT2", "sdpa"), ("GPT2", "eager"), ("OPT", "sdpa")]
)
def test_models_under_random_scales_and_shifts(name: str, attention: str) -> None:
    """Those whose arithmetic stays in fp64; the others are counted and proved with balance-channels."""
    transformers = pytest.importorskip("transformers")
    configuration, scales = MODELS[name]
    config = getattr(transformers, f"{name}Config")(
        **configuration, tie_word_embeddings=False, attn_implementation=attention
    )
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = getattr(transformers, f"{name}{suffix}")(config)

        def forward(self, tokens):
            return self.model(tokens, use_cache=False).logits

    tokens = torch.randint(3, 40, (2, 6))
    seen, worst = found(randomise(Logits()), tokens, edit=everywhere)
    assert legal(seen) == Counter(scales)
    assert worst < 1e-12
    assert shifting(seen)["norm-linear"] == 5
