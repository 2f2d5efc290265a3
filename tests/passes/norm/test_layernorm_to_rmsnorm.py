"""layernorm-to-rmsnorm: where it fires, where it must not, and that the numbers hold."""

from __future__ import annotations

import copy

import pytest
import torch
from support import (
    Block,
    PreNorm,
    capture,
    check_exact,
    check_training,
    error,
    ids,
    randomise,
    refusals,
    run,
)
from torch import nn

from sparsecc.passes.analysis.stream import carry
from sparsecc.passes.analysis.zero_mean import recentring_plan
from sparsecc.passes.base import Analyses
from sparsecc.proof import compare

NAME = "layernorm-to-rmsnorm"
ONLY = {"passes": [NAME]}
aten = torch.ops.aten


def pre_norm(**options) -> nn.Module:
    return randomise(PreNorm(**options))


class Stream(nn.Module):
    """A residual stream from a feature input; ``tail`` does what the test is about."""

    def __init__(self, d: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(d, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(blocks))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 5)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


def stream(cls: type[nn.Module] = Stream, **options) -> nn.Module:
    return randomise(cls(**options))


X = torch.randn(3, 5, 16)


# ---- fires ---------------------------------------------------------------------------------------


def test_every_norm_of_a_pre_norm_network() -> None:
    report = check_exact(pre_norm(), ids(), applied={NAME: 5}, **ONLY)
    assert all("support.py" in m.where for m in report[NAME].matches), (
        "the user's line, not torch's"
    )
    assert {m.module for m in report[NAME].matches} >= {"blocks.0.norm1", "norm"}


def test_no_layer_norm_is_left_and_no_run_time_mean() -> None:
    """At inference the mean is in the weights: nothing is subtracted from activations."""
    from sparsecc.inspection import stages

    with torch.no_grad():
        _, graphs = stages(stream().eval(), X, options=ONLY)
    lowered = graphs[0].stages[-1].program
    targets = [n.target for n in lowered.graph.nodes]
    assert targets.count(aten.rms_norm.default) == 5
    assert aten.layer_norm.default not in targets
    assert aten.mean.dim not in targets


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-2])
def test_eps_with_rows_near_zero(eps: float) -> None:
    """D13: rows whose mean square is about eps tell a wrong eps or a wrong divisor."""
    model = stream()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    check_exact(model, X * 1e-3, applied={NAME: 5}, **ONLY)


def test_two_norms_of_different_eps() -> None:
    model = stream()
    model.blocks[0].norm1.eps, model.norm.eps = 1e-2, 1e-10
    check_exact(model, X * 1e-2, applied={NAME: 5}, **ONLY)


@pytest.mark.parametrize("d", [2, 3, 17])
def test_small_and_odd_widths(d: int) -> None:
    check_exact(stream(d=d), torch.randn(4, d), applied={NAME: 5}, **ONLY)


@pytest.mark.parametrize("amplitude", [1e-4, 1.0, 6e4])
def test_amplitudes(amplitude: float) -> None:
    check_exact(stream(), X * amplitude, applied={NAME: 5}, **ONLY)


def test_a_constant_on_the_stream_changes_nothing() -> None:
    """Means planted in an embedding row, a bias and a branch are taken out (methods §1, test b)."""
    model = pre_norm()
    with torch.no_grad():
        model.embed.weight[3] += 7.0
        model.blocks[0].out.bias += 5.0
        model.blocks[1].down.weight += 2.0
    check_exact(model, ids(), applied={NAME: 5}, **ONLY)


def test_the_stream_has_no_mean_afterwards() -> None:
    from sparsecc.inspection import stages
    from sparsecc.shadow import fp64_copies, run_fp64

    model = stream().eval()
    with torch.no_grad():
        _, graphs = stages(model, X, options=ONLY)
        program = graphs[0].stages[-2].program
        seen: list[float] = []

        def check(node, value) -> None:
            if node in norms:
                seen.append(float((value.mean(-1).abs() / value.square().mean(-1).sqrt()).max()))

        norms = {n.args[0] for n in program.calls(aten.rms_norm.default)}
        values = {**dict(model.named_parameters())}
        inputs = [values.get(program.slots[p.name].fqn, X) for p in program.placeholders()]
        run_fp64(program.module, fp64_copies(inputs), check)
    assert len(seen) == 5
    assert max(seen) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_eager(dtype: torch.dtype) -> None:
    model = stream().to(dtype).eval()
    with torch.no_grad():
        _, report = run(model, X.to(dtype), verify="final", **ONLY)
    assert report[NAME].applied == 5
    assert report.verified


def test_without_affine_and_without_bias() -> None:
    def norm(d: int) -> nn.Module:
        return nn.LayerNorm(d, elementwise_affine=False)

    check_exact(pre_norm(norm=norm), ids(), applied={NAME: 5}, **ONLY)
    check_exact(
        pre_norm(norm=lambda d: nn.LayerNorm(d, bias=False)), ids(), applied={NAME: 5}, **ONLY
    )


def test_convolution_and_class_token() -> None:
    """A ViT's stem: the channel axis becomes the last one through flatten and transpose."""

    class Stem(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.position = nn.Parameter(torch.randn(1, 5, 16))

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    check_exact(randomise(Stem()), torch.randn(2, 3, 8, 8), applied={NAME: 5}, **ONLY)


@pytest.mark.parametrize(("groups", "applied"), [(1, 1), (2, 0), (16, 0)])
def test_grouped_convolutions_keep_their_mean(groups: int, applied: int) -> None:
    """ConvNeXt's block: a depthwise convolution's outputs read other inputs each; ΠW is not a convolution."""

    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)))

    x = torch.randn(2, 16, 5, 5)
    report = check_exact(randomise(Depthwise()), x, applied={NAME: applied}, **ONLY)
    assert refusals(report, NAME) == ["costs-more"] * (1 - applied)


def test_token_operations_inside_the_stream() -> None:
    """Slices, rolls, window reshapes, token mixing by averages, padding, per-sample factors."""

    class Tokens(Stream):
        def forward(self, x, keep):
            x = self.first(x)
            x = self.blocks[0](torch.roll(x, 2, 1)[:, 1:])
            x = torch.cat([x, x.mean(1, keepdim=True)], 1) * keep[:, None, None] / 0.9
            x = nn.functional.pad(x, (0, 0, 1, 0)).view(3, 2, 3, 16).permute(0, 2, 1, 3)
            x = torch.where(keep[:, None, None, None] > 0, x, torch.zeros_like(x))
            x = self.blocks[1](x.reshape(3, 6, 16)[torch.arange(3), torch.tensor([0, 2, 4])])
            return self.head(self.norm(x))

    keep = torch.tensor([1.0, 0.0, 1.0])
    check_exact(stream(Tokens), X, keep, applied={NAME: 5}, **ONLY)


def test_frozen_parameters_and_views_of_parameters() -> None:
    class Viewed(Stream):
        def forward(self, x):
            x = nn.functional.linear(x, self.first.weight.t().t(), self.first.bias * 2)
            return self.head(self.norm(self.blocks[1](self.blocks[0](x))))

    check_exact(stream(Viewed).requires_grad_(False), X, applied={NAME: 5}, **ONLY)


def test_matmul_and_addmm_spellings() -> None:
    class Spelled(Stream):
        def forward(self, x):
            x = torch.addmm(self.first.bias, x.reshape(-1, 16), self.first.weight.t())
            x = x + torch.relu(self.norm(x)) @ self.blocks[0].mix.weight
            x = x + torch.mm(torch.relu(self.norm(x)), self.blocks[0].out.weight.t())
            return self.head(self.norm(x))

    check_exact(stream(Spelled), X, applied={NAME: 3}, **ONLY)


def test_run_time_recentring_where_nothing_can_be_folded() -> None:
    """Whisper's encoder: GELU(conv) starts the stream; one subtraction serves all norms."""

    class Activated(Stream):
        def body(self, x):
            x = nn.functional.gelu(self.first(x))
            return self.blocks[1](self.blocks[0](x))

    from sparsecc.inspection import stages

    check_exact(stream(Activated), X, applied={NAME: 5}, **ONLY)
    with torch.no_grad():
        _, graphs = stages(stream(Activated).eval(), X, options=ONLY)
    lowered = graphs[0].stages[-1].program
    assert len(list(lowered.calls(aten.mean.dim))) == 1


def test_a_large_table_is_not_copied() -> None:
    """A tied or large embedding: one subtraction per token instead of a second table."""
    model = pre_norm(vocabulary=140_000, tied=True).eval()
    with torch.no_grad():
        result, report = run(model, ids(), **ONLY)
        assert error(result, model(ids())) < 1e-5
    assert report[NAME].applied == 5
    assert report.graphs[0].folded_bytes < 2**20


# ---- tied weights, dynamic shapes, updates, training ----------------------------------------------


def test_tied_embedding_keeps_the_head_as_it_was() -> None:
    model = pre_norm(tied=True)
    check_exact(model, ids(), applied={NAME: 5}, **ONLY)
    assert model.head.weight is model.embed.weight


def test_shared_block_applied_twice() -> None:
    class Shared(Stream):
        def body(self, x):
            return self.blocks[0](self.blocks[0](self.first(x)))

    check_exact(stream(Shared), X, applied={NAME: 5}, **ONLY)


def test_dynamic_batch_and_length() -> None:
    model = pre_norm().double().eval()
    import sparsecc

    report = sparsecc.Report()
    fast = torch.compile(
        model,
        backend="sparsecc",
        dynamic=True,
        options={"lower": "eager", "report": report, **ONLY},
    )
    with torch.no_grad():
        for batch, tokens in ((2, 3), (5, 7), (1, 1), (16, 32)):
            x = ids(batch, tokens)
            assert error(fast(x), model(x)) < 1e-12
    assert all(g.passes[NAME].applied == 5 for g in report.graphs)
    assert len(report.graphs) <= 2


def test_eps_changed_after_a_dynamic_compile() -> None:
    """Dynamo hands module floats over as inputs; taking one as a constant must come with a guard."""
    model = stream().double().eval()
    fast = torch.compile(
        model, backend="sparsecc", dynamic=True, options={"lower": "eager", **ONLY}
    )
    with torch.no_grad():
        assert error(fast(X.double()), model(X.double())) < 1e-12
        model.norm.eps = model.blocks[0].norm1.eps = 0.5
        assert error(fast(X.double()), model(X.double())) < 1e-12


def test_weights_updated_after_compile() -> None:
    model = pre_norm().eval()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "eager", "require": {NAME: 5}}
    )
    with torch.no_grad():
        fast(ids())
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(ids()), model(ids())) < 1e-5


def test_training_walks_the_same_path() -> None:
    check_training(lambda: pre_norm(), {NAME: 5})
    check_training(lambda: pre_norm(tied=True), {NAME: 5})


def test_gradients_equal_in_fp64() -> None:
    model = stream().double()
    x = X.double()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    result, report = run(model, x, lower="aot_eager", **ONLY)
    got = torch.autograd.grad(result.square().sum(), list(model.parameters()))
    assert report[NAME].applied == 5
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-10


# ---- refuses ---------------------------------------------------------------------------------------


class Returned(Stream):
    def forward(self, x):
        x = self.body(x)
        return self.head(self.norm(x)), x


class RawHead(Stream):
    def forward(self, x):
        x = self.body(x)
        return self.head(self.norm(x)) + self.head(x)


class MixedNorms(Stream):
    def forward(self, x):
        x = self.body(x)
        return self.head(self.norm(x)) + nn.functional.rms_norm(x, (16,)).sum(-1, keepdim=True)


class Scaled(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(16))

    def forward(self, x):
        x = self.first(x) * self.gamma
        for block in self.blocks:
            x = x + self.gamma * block.out(block.norm1(x))
        return self.head(self.norm(x))


class PostNorm(Stream):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block.norm1(x + block.out(x))
        return self.head(x)


class Sandwich(Stream):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block.norm2(torch.relu(block.out(block.norm1(x))))
        return self.head(self.norm(x))


class TwoAxes(Stream):
    def forward(self, x):
        return self.head(nn.functional.layer_norm(self.body(x), (5, 16)))


class Written(Stream):
    def forward(self, x):
        x = self.first(x)
        y = self.norm(x)
        x[..., 0] = 1.0
        return self.head(y) + self.head(self.norm(x))


class SkipConcat(Stream):
    def forward(self, x):
        x = self.body(x)
        return torch.cat([self.norm(x), x], -1)


REFUSED = {
    Returned: ("stream-exit", 0),
    RawHead: ("stream-exit", 0),
    MixedNorms: ("stream-exit", 0),
    SkipConcat: ("stream-exit", 0),
    Scaled: ("layer-scale", 0),
    PostNorm: ("post-norm", 0),
    Sandwich: ("post-norm", 0),
    TwoAxes: ("normalized-shape", 0),
    Written: ("mutated", 0),
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Module]) -> None:
    code, applied = REFUSED[cls]
    model = stream(cls)
    report = check_exact(model, X, applied={NAME: applied}, **ONLY)
    found = report[NAME].refusals
    assert code in [r.code for r in found]
    assert all(r.reason and r.blame for r in found)


def test_active_dropout_refuses_and_inactive_does_not() -> None:
    class Dropped(Stream):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + nn.functional.dropout(block.out(block.norm1(x)), 0.5, self.training)
            return self.head(self.norm(x))

    model = stream(Dropped)
    check_exact(copy.deepcopy(model), X, applied={NAME: 3}, **ONLY)
    _, report = run(model.train(), X, lower="aot_eager", **ONLY)
    assert report[NAME].applied == 0
    assert set(refusals(report, NAME)) == {"dropout"}


def test_a_norm_is_refused_alone_when_only_its_stream_leaks() -> None:
    """The cut goes elsewhere: the leaking stream keeps its LayerNorms, the other loses them."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.safe, self.leaky = Stream(), Returned()

        def forward(self, x):
            a, b = self.leaky(x)
            return self.safe(x) + a, b

    report = check_exact(randomise(Two()), X, applied={NAME: 5}, **ONLY)
    assert refusals(report, NAME) == ["stream-exit"] * 5


def test_branch_norms_of_a_post_norm_model_still_convert() -> None:
    """A norm that reads a linear layer directly is legal wherever it stands (OLMo-2's q and k norms)."""

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.norm = nn.Linear(16, 8, bias=False), nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(self.project(x))

    check_exact(randomise(Direct()), X, applied={NAME: 1}, **ONLY)


def test_group_norm_is_left_alone() -> None:
    model = randomise(nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(2, 8)))
    with torch.no_grad():
        _, report = run(model.eval(), torch.randn(2, 4, 6), **ONLY)
    assert report[NAME].matches == []


# ---- the analyses behind it ------------------------------------------------------------------------


def test_plan_moves_only_what_is_needed() -> None:
    program = capture(stream().eval().requires_grad_(False), X)
    plan = recentring_plan(program, Analyses(program))
    assert len(plan.norms) == 5
    assert {p.kind for p in plan.producers.values()} == {"linear"}
    assert len(plan.producers) == 5  # first, and two producers a block


@pytest.mark.parametrize(
    ("function", "axis", "carried"),
    [
        (lambda x, y: x + y, 2, [2, 2]),
        (lambda x, y: x * y[..., :1], 2, [2]),
        (lambda x, y: x * y, 2, None),
        (lambda x, y: x + y[..., :1], 2, None),
        (lambda x, y: x + 1.0, 2, None),
        (lambda x, y: x.transpose(1, 2), 1, [2]),
        (lambda x, y: x.transpose(1, 2), 2, [1]),
        (lambda x, y: x.reshape(15, 16), 1, [2]),
        (lambda x, y: x.reshape(3, 80), 1, None),
        (lambda x, y: x.reshape(3, 5, 4, 4), 3, None),
        (lambda x, y: x.mean(1), 1, [2]),
        (lambda x, y: x.mean(2, keepdim=True), 1, [1]),
        (lambda x, y: torch.cat([x, y], 1), 2, [2, 2]),
        (lambda x, y: torch.cat([x, y], 2), 2, None),
        (lambda x, y: torch.stack([x, y], 1), 3, [2, 2]),
        (lambda x, y: x[:, 2], 1, [2]),
        (lambda x, y: x[..., 2], 1, [1]),
        (lambda x, y: x[:, :, ::2], 2, None),
        (lambda x, y: torch.softmax(x, 1), 2, None),
        (lambda x, y: nn.functional.pad(x, (0, 0, 1, 1)), 2, [2]),
        (lambda x, y: nn.functional.pad(x, (1, 1)), 2, None),
        (lambda x, y: nn.functional.pad(x, (0, 0, 1, 1), value=1.0), 2, None),
        (lambda x, y: x.masked_fill(y[..., :1] > 0, 0.0), 2, [2]),
        (lambda x, y: x.masked_fill(y[..., :1] > 0, 2.0), 2, None),
        (lambda x, y: x.masked_fill(y > 0, 0.0), 2, None),
        (lambda x, y: torch.roll(x, 1, 1), 2, [2]),
        (lambda x, y: torch.roll(x, 1, 2), 2, None),
        (lambda x, y: x.flip(2), 2, None),
    ],
)
def test_what_carries_the_features(function, axis, carried) -> None:
    """A carried axis commutes with every matrix on it; checked against the numbers."""
    x, y = torch.randn(3, 5, 16).double(), torch.randn(3, 5, 16).double()
    program = capture(function, x, y)
    result = program.output().args[0][0]
    found = carry(result, axis)
    assert (None if found is None else [a for _, a in found.operands]) == carried
    if found is None:
        return
    inputs = {"x": x, "y": y}
    names = {p.name: program.slots[p.name].fqn[3] for p in program.placeholders()}
    carried_inputs = {names[o.name] for o, _ in found.operands if o.name in names}
    if len(carried_inputs) < len({o for o, _ in found.operands}):
        return
    for operand, at in found.operands:
        value = inputs[names[operand.name]]
        inputs[names[operand.name]] = value - value.mean(at, keepdim=True)
    expected = function(x, y)
    torch.testing.assert_close(
        function(inputs["x"], inputs["y"]), expected - expected.mean(axis, keepdim=True)
    )


def test_one_part_of_a_pinned_stream() -> None:
    """The whole stream is read raw, one part of it is normalized: the part is recentred on its own."""

    class Part(Stream):
        def forward(self, x):
            x = self.first(x)
            part = x.unbind(1)[1]
            y = part + self.blocks[0].mix(self.blocks[0].norm1(part))
            return self.head(self.norm(y)), x.sum()

    check_exact(stream(Part), X, applied={NAME: 2}, **ONLY)


def test_zeros_that_are_filled_have_a_mean() -> None:
    class Filled(Stream):
        def body(self, x):
            x = self.first(x)
            buffer = torch.zeros_like(x)
            buffer[:, 1:] = x[:, 1:]
            return buffer

    report = check_exact(stream(Filled), X, applied={NAME: 0}, floor=False, **ONLY)
    assert refusals(report, NAME) == ["mutated"]


# ---- what is widened on its way into the stream keeps its digits --------------------------------------


class Widened(Stream):
    """A stored value enters a wider stream, read by ``readers`` LayerNorms of the stream's dtype."""

    def __init__(self, kind: str, narrow: torch.dtype, wide: torch.dtype, readers: int) -> None:
        super().__init__(16)
        self.kind, self.wide = kind, wide
        self.table = nn.Embedding(20, 16)
        self.query = nn.Parameter(torch.randn(5, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(readers))
        randomise(self).to(narrow)
        self.norms.to(wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "weight":
            x = self.query.to(self.wide)
        elif self.kind == "table":
            x = self.table(x) + self.query.to(self.wide)
        elif self.kind == "linear":  # for small inputs its result is its bias, which is exact
            x = self.first(x).to(self.wide) + self.query.to(self.wide)
        elif self.kind == "input":
            x = x.to(self.wide)
        elif self.kind == "sum":
            x = (x + x // 3).to(self.wide)
        return sum(norm(x) * (i + 1) for i, norm in enumerate(self.norms))


TOKENS = torch.randint(0, 20, (3, 5))
PAIRS = [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("narrow", "wide"), PAIRS)
@pytest.mark.parametrize(
    ("kind", "x", "readers", "applied"),
    [
        ("weight", X, 1, 1),
        ("table", TOKENS, 1, 0),
        ("table", TOKENS, 3, 3),
        ("linear", X / 1e30, 1, 0),
        ("linear", X / 1e30, 2, 2),
        ("input", X, 1, 0),
        ("input", X, 2, 2),
        ("input", TOKENS[..., None] * torch.arange(16), 2, 2),
        ("sum", TOKENS[..., None] * torch.arange(16), 2, 2),
    ],
)
def test_widened_values_keep_their_digits(kind, x, readers, applied, narrow, wide) -> None:
    model = Widened(kind, narrow, wide, readers)
    x = x.to(narrow) if x.is_floating_point() else x
    expected = copy.deepcopy(model).double()
    expected.wide = torch.float64
    exact = expected(x.double() if x.is_floating_point() else x)
    result, report = run(model, x, **ONLY)
    assert report[NAME].applied == applied
    assert result.dtype == wide
    assert error(result, exact) < 16 * torch.finfo(wide).eps
    if not applied:
        assert {r.code for r in report[NAME].refusals} == {"widened"}


def test_autocast_narrows_with_and_without_recentring() -> None:
    """Linear layers in bf16 with fp32 weights, added to an fp32 stream: the usual training setup."""

    class Mixed(Stream):
        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                with torch.autocast("cpu", torch.bfloat16):
                    y = block.out(block.norm1(x))
                x = x + y
            return self.head(self.norm(x))

    model = stream(Mixed)
    exact = copy.deepcopy(model).double()
    x = torch.randn(200, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result, report = run(model, x, **ONLY)
        verdict = compare("output", result, model(x), exact(x.double()))
    assert report[NAME].applied == 3
    assert verdict.passed, verdict


def test_a_widened_weight_that_is_also_read_as_it_is() -> None:
    """Its other reader sees the mean."""

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(5, 16))
            self.norm = nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = self.query.float()
            y = nn.functional.rms_norm(wide, (16,)).to(self.query.dtype)
            return self.norm(self.query + y) + x

    model = randomise(Query()).bfloat16()
    x = torch.zeros(5, 16, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()(x.double())
    result, report = run(model, x, **ONLY)
    assert report[NAME].applied == 0
    assert [r.code for r in report[NAME].refusals] == ["widened"]
    assert error(result, exact) < 2**-6
