"""balance-channels: equal ranges on both sides of every link, and the same function."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from heads import Attention
from quant_models import Net, Pair, Tokens
from support import (
    capture,
    check_exact,
    check_training,
    error,
    ids,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc import pipeline
from sparsecc.errors import OptionsError
from sparsecc.options import Options
from sparsecc.passes import registry
from sparsecc.passes.analysis.links import links
from sparsecc.passes.base import Analyses, Context
from sparsecc.passes.quant.balance_channels import BalanceChannels
from sparsecc.report.model import GraphReport

NAME = "balance-channels"
ONLY: dict[str, Any] = {"passes": [NAME]}
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


LINKS = 6


def test_applies_to_every_kind_of_link() -> None:
    report = check_exact(randomise(Net()), X, applied={NAME: LINKS}, **ONLY)
    kinds = Counter(m.note for m in report[NAME].matches if m.status == "applied")
    assert kinds == Counter(
        {"norm-linear": 2, "q-k": 1, "v-o": 1, "up-down": 1, "linear-linear": 1}
    )
    assert Counter(refusals(report, NAME)) == Counter(mixed=2, activation=1, output=1)


def test_with_all_other_passes() -> None:
    check_exact(randomise(Net()), X, applied={NAME: LINKS}, passes=list(registry.REWRITES))


def test_runs_only_when_named() -> None:
    with torch.no_grad():
        _, report = run(randomise(Net()).eval(), X)
    assert NAME not in {record.name for record in report}
    assert NAME not in registry.PRESETS["default"]
    assert NAME in registry.REWRITES


@pytest.mark.parametrize("limit", [0, 0.5, -1, float("inf"), float("nan"), True, "ten"])
def test_limit_is_validated(limit: Any) -> None:
    with pytest.raises(OptionsError, match="at least 1"):
        BalanceChannels.configure({"limit": limit})


def test_dynamic_shapes_add_no_guard() -> None:
    model = randomise(Net()).double().eval()
    report = sparsecc.Report()
    options = {"lower": "eager", "report": report, **ONLY}
    fast = torch.compile(model, backend="sparsecc", dynamic=True, options=options)
    with torch.no_grad():
        for batch, tokens in ((2, 3), (4, 9)):
            x = torch.randn(batch, tokens, 16, dtype=torch.float64)
            assert error(fast(x), model(x)) < 1e-12
    assert report[NAME].applied == LINKS
    with torch.no_grad():
        program = capture(randomise(Net()), X, dynamic=True)
    before = len(program.fake_mode.shape_env.guards)
    pipeline.run(program, Options.parse(ONLY), GraphReport(0))
    assert len(program.fake_mode.shape_env.guards) == before


def test_weights_updated_after_compile() -> None:
    model = randomise(Net()).double().eval()
    options = {"lower": "eager", "require": {NAME: LINKS}, **ONLY}
    fast = torch.compile(model, backend="sparsecc", options=options)
    x = X.double()
    with torch.no_grad():
        fast(x)
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(x), model(x)) < 1e-12
        model.down.weight.data.mul_(3)
        assert error(fast(x), model(x)) < 1e-12


def test_half_precision_rounds_once() -> None:
    model = randomise(Net()).bfloat16().eval()
    with torch.no_grad():
        _, report = run(model, X.bfloat16(), verify="final", **ONLY)
    assert report[NAME].applied == LINKS
    assert report.verified


def test_training_when_named() -> None:
    """The scales are constants of a step, and any constants leave every gradient as it is."""
    check_training(lambda: randomise(Tokens()), {NAME: LINKS}, **ONLY)


def test_gradients_are_those_of_eager() -> None:
    model = randomise(Net()).double()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(X.double()).square().sum(), parameters)
    result, report = run(model, X.double(), lower="aot_eager", **ONLY)
    got = torch.autograd.grad(result.square().sum(), parameters)
    assert report[NAME].applied == LINKS
    largest = max(
        float(b.abs().max()) for b in expected
    )  # that of k's bias is zero but for rounding
    pairs = zip(got, expected, strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-12 * largest


def test_training_is_refused_unless_named() -> None:
    program = capture(randomise(Pair()), X)
    assert program.trains
    pass_ = BalanceChannels()
    for explicit, code in ((False, "training"), (True, None)):
        context = Context(program, Analyses(program), explicit)
        match = next(m for m in pass_.find(context) if m.nodes["link"].carries_scale)
        refusal = pass_.check(match, context)
        assert (refusal.code if refusal else None) == code


def test_gathered_weights_when_named() -> None:
    model = managed_by_fsdp(randomise(Pair()).double().eval())
    with torch.no_grad():
        result, report = run(model, X.double(), **ONLY)
        assert error(result, model(X.double())) < 1e-12
    assert report[NAME].applied == 1
    assert sum(graph.folded for graph in report.graphs) == 0


# ---- ranges ----------------------------------------------------------------------------------------


def sizes(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    """The links after the pass, each with the ranges of its rows and columns per channel, and its weights."""
    with torch.no_grad():
        program = capture(model, x)
        pipeline.run(program, Options.parse({"passes": {NAME: options}}), GraphReport(0))
        program.module.recompile()
        parameters = dict(model.named_parameters())
        values: dict[str, Any] = {}

        class Keeping(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                values[n.name] = super().run_node(n)
                return values[n.name]

        slots = [program.slots[p.name] for p in program.placeholders()]
        result = Keeping(program.module).run(*(parameters.get(slot.fqn, x) for slot in slots))
        assert error(result[0], model(x)) < 1e-12

    def largest(sides: Any, size: int, rows: bool) -> torch.Tensor:
        found = torch.zeros(size, dtype=torch.float64)
        for side in sides:
            weight = values[side.of.weight.name].abs()
            for channel, value in zip(side.channels, weight.amax(int(rows)), strict=True):
                found[channel] = torch.maximum(found[channel], value)
        return found

    return [
        (
            link.kind,
            largest(link.producers, link.size, True),
            largest(link.consumers, link.size, link.kind == "q-k"),
            [values[side.of.weight.name] for side in (*link.producers, *link.consumers)],
        )
        for link in links(program, Analyses(program))
        if link.carries_scale
    ]


def folded(model: nn.Module, x: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The two weights of a ``Pair`` after the pass."""
    ((_, _, _, weights),) = sizes(model, x, **options)
    return weights


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("rope", ["", "half", "interleaved", "partial"])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_balanced_per_group_and_pair(kv: int, rope: str, fused: bool) -> None:
    model = randomise(Attention(kv, rope, fused)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                torch.logspace(-1, 1, parameter.shape[0]).view(-1, *[1] * (parameter.dim() - 1))
            )
    found = sizes(model, X.double())
    assert sorted(kind for kind, *_ in found) == ["q-k", "v-o"]
    for _, made, read, _ in found:
        assert error(made, read) < 1e-12


def test_both_ranges_are_the_geometric_mean() -> None:
    """Eq. 11: r₁/s = r₂ s = √(r₁ r₂), so the products of the precisions are as large as they can be."""
    model = randomise(Pair()).double().eval()
    with torch.no_grad():
        model.a.weight[2].mul_(50)
        model.b.weight[:, 5].mul_(1e-2)
    rows, columns = model.a.weight.abs().amax(1), model.b.weight.abs().amax(0)
    first, second = folded(model, X[0].double())
    assert error(first.abs().amax(1), (rows * columns).sqrt()) < 1e-12
    assert error(second.abs().amax(0), (rows * columns).sqrt()) < 1e-12


def test_dead_channels_stay() -> None:
    """G4: a range of zero on either side gives s = 1, and nothing is NaN."""
    model = randomise(Pair()).double().eval()
    with torch.no_grad():
        model.a.weight[0], model.b.weight[:, 1] = 0, 0
        model.a.weight[2], model.b.weight[:, 2] = 0, 0
    first, second = folded(model, X[0].double())
    for row in (0, 1, 2):
        assert torch.equal(first[row], model.a.weight[row])
        assert torch.equal(second[:, row], model.b.weight[:, row])
    assert first.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("tiny", [1e-200, 1e-300])
def test_the_scale_is_bounded(tiny: float) -> None:
    model = randomise(Pair()).double().eval()
    with torch.no_grad():
        model.a.weight[3] = tiny
        model.b.weight[:, 4] = tiny
    first, second = folded(model, X[0].double(), limit=8)
    assert error(first[3] / 8, model.a.weight[3]) < 1e-12
    assert error(second[:, 3] * 8, model.b.weight[:, 3]) < 1e-12
    assert error(first[4] * 8, model.a.weight[4]) < 1e-12
    same, _ = folded(model, X[0].double(), limit=1)
    assert error(same, model.a.weight) < 1e-15


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [F.gelu, F.silu, torch.tanh, torch.sigmoid, F.elu])
def test_refuses_activations_that_are_not_homogeneous(act: Any) -> None:
    report = check_exact(randomise(Pair(act)), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["activation", "output"]


def test_refuses_a_tied_weight() -> None:
    class Tied(Net):
        def forward(self, x):
            y = F.relu(self.hidden(x))
            return self.head(y) + F.linear(
                x.sum(-1, keepdim=True).expand(3, 5, 12), self.head.weight
            )

    report = check_exact(randomise(Tied()), X, applied={NAME: 0}, **ONLY)
    assert "tied" in refusals(report, NAME)


def test_refuses_a_tied_head() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)

        def forward(self, tokens):
            return F.linear(self.norm(self.embed(tokens)), self.embed.weight)

    report = check_exact(randomise(Head()), ids(), applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME)[0] == "tied"


def test_refuses_a_value_that_is_returned_too() -> None:
    class Both(Pair):
        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y), y

    report = check_exact(randomise(Both()), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["output", "output"]


def test_refuses_a_second_reader() -> None:
    class Second(Pair):
        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y) + y.softmax(-1)[..., :8]

    report = check_exact(randomise(Second()), X, applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["reader", "mixed"]


def test_refuses_to_cross_a_no_grad_region() -> None:
    class Partly(Pair):
        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
            return self.b(F.relu(y))

    model = randomise(Partly())
    result, report = run(model, X, lower="aot_eager", **ONLY)
    assert report[NAME].applied == 0
    result.sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None


def test_detached_values_keep_their_gradients() -> None:
    class Detached(Pair):
        def forward(self, x):
            return self.b(F.relu(self.a(x).detach())) + self.a(x).mean()

    model = randomise(Detached()).double()
    expected = torch.autograd.grad(model(X.double()).square().sum(), list(model.parameters()))
    result, _ = run(model, X.double(), lower="aot_eager", **ONLY)
    got = torch.autograd.grad(result.square().sum(), list(model.parameters()))
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-12


# ---- whole models ----------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": False}
LLAMA = {**SMALL, **SPECIAL, "intermediate_size": 24, "num_key_value_heads": 2}
FULL = {"norm-linear": 5, "q-k": 2, "v-o": 2}
GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 40, "use_cache": False}
# configuration -> links of each kind in two layers; the head counts as a reader of the last norm
MODELS = {
    "Llama": (LLAMA, {**FULL, "up-down": 2}),
    "Mistral": (LLAMA, {**FULL, "up-down": 2}),
    "Qwen2": (LLAMA, {**FULL, "up-down": 2}),
    "Qwen3": ({**LLAMA, "head_dim": 4}, {**FULL, "up-down": 2}),
    "Gemma": ({**LLAMA, "head_dim": 4}, {**FULL, "up-down": 2}),
    "Phi3": (LLAMA, {**FULL, "up-down": 2}),
    "OPT": (
        {**SMALL, **SPECIAL, "ffn_dim": 24, "word_embed_proj_dim": 16},
        {**FULL, "linear-linear": 2},
    ),
    "GPT2": (GPT2, FULL),
}


@pytest.mark.models
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, attention: str) -> None:
    """GELU keeps GPT-2's FFN apart, ReLU joins OPT's; rotary embeddings pair the channels of q and k."""
    transformers = pytest.importorskip("transformers")
    configuration, expected = MODELS[name]
    config = getattr(transformers, f"{name}Config")(
        **configuration, tie_word_embeddings=False, attn_implementation=attention
    )
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = randomise(getattr(transformers, f"{name}{suffix}")(config)).eval()
    tokens = torch.randint(3, 40, (2, 6))
    options = {"strict": True, "verify": "final", **ONLY}
    report = sparsecc.verify(model, input_ids=tokens, use_cache=False, options=options)
    kinds = Counter(m.note for m in report[NAME].matches if m.status == "applied")
    assert kinds == Counter(expected)
    assert report.graph_breaks == []
    assert report.verified
    assert all(v.algebra < 1e-11 for v in report.verdicts)


def test_a_factor_that_the_program_widens_is_not_rounded() -> None:
    """A norm's factor kept in fp32 in a program in fp64."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.rand(16) + 0.5)
            self.weight = nn.Parameter(torch.randn(3, 16, dtype=torch.float64))

        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return F.linear(y * self.factor, self.weight)

    with torch.no_grad():
        model = Model()
        result, report = run(model, X.double(), **ONLY)
        assert report[NAME].applied == 1
        assert error(result, model(X.double())) < 1e-12
