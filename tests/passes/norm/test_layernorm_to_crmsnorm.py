"""layernorm-to-crmsnorm: one feature less on the whole stream, where that is legal, and the numbers hold."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws_symbolic import holds_symbolically
from support import (
    Block,
    PreNorm,
    check_exact,
    check_training,
    error,
    fp64,
    ids,
    managed_by_fsdp,
    randomise,
    refusals,
    run,
)
from torch import nn

import sparsecc
from sparsecc.errors import OptionsError, VerificationError
from sparsecc.inspection import stages
from sparsecc.passes import registry
from sparsecc.passes.base import Example
from sparsecc.passes.norm.layernorm_to_crmsnorm import LayerNormToCRMSNorm

NAME = "layernorm-to-crmsnorm"
AFFINE, TO_RMS = "fold-norm-affine", "layernorm-to-rmsnorm"
aten = torch.ops.aten


def passes(drop: int = -1, **affine: bool) -> dict[str, Any]:
    """All three, in the order in which they need each other."""
    return {"passes": {AFFINE: affine, TO_RMS: {}, NAME: {"drop": drop}}}


ONLY = passes()


def pre_norm(**options) -> nn.Module:
    return randomise(PreNorm(**options))


class Stream(nn.Module):
    """A residual stream from a feature input."""

    def __init__(self, d: int = 16, blocks: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(d, d, bias=bias)
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


class OneNorm(Stream):
    """Without biases its rows are as small as its input's."""

    def __init__(self) -> None:
        super().__init__(bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)))


def stream(cls: type[nn.Module] = Stream, **options) -> nn.Module:
    return randomise(cls(**options))


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


def lowered(model: nn.Module, *args: Any, **options: Any) -> Any:
    with torch.no_grad():
        _, graphs = stages(model.eval(), *args, options=options or ONLY)
    return graphs[0].stages[-1].program


# ---- fires ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [0, 1, 8, 15, -1, -16])
def test_any_feature(drop: int) -> None:
    report = check_exact(pre_norm(), ids(), applied={TO_RMS: 5, NAME: 1}, **passes(drop))
    (match,) = report[NAME].matches
    assert match.note == "5 norms, 16 -> 15 features"
    assert "support.py" in match.where


def test_the_stream_is_narrower_and_nothing_is_copied_at_run_time() -> None:
    program = lowered(pre_norm(), ids(), **passes(3))
    text = program.text()
    assert "rms_norm" not in text.replace(NAME, "").replace(TO_RMS, "")
    for target in (aten.cat.default, aten.clone.default, aten.mean.dim, aten.layer_norm.default):
        assert not list(program.calls(target))
    widths = {n.meta["val"].shape[-1] for n in program.calls(aten.add.Tensor, aten.rsqrt.default)}
    assert widths == {15, 1}
    head = program.output().args[0][0]
    assert head.args[1].meta["val"].shape == (20, 15)


@pytest.mark.parametrize("drop", [0, 1, -1])
@pytest.mark.parametrize("d", [2, 3, 17])
def test_small_and_odd_widths(d: int, drop: int) -> None:
    check_exact(stream(d=d), torch.randn(4, d), applied={NAME: 1}, **passes(drop))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-2])
@pytest.mark.parametrize("drop", [0, -1])
def test_rows_whose_mean_square_is_about_eps(eps: float, drop: int) -> None:
    """They tell a wrong ε, and the divisor d from d − 1."""
    model = stream(OneNorm)
    model.norm.eps = eps
    rows = torch.nn.functional.normalize(X, dim=-1) * (16 * eps) ** 0.5
    check_exact(model, rows, applied={NAME: 1}, **passes(drop))


def test_two_norms_of_different_eps() -> None:
    model = stream()
    model.blocks[0].norm1.eps, model.norm.eps = 1e-2, 1e-10
    check_exact(model, X * 1e-2, applied={NAME: 1}, **ONLY)


@pytest.mark.parametrize("amplitude", [1e-4, 6e4])
def test_amplitudes(amplitude: float) -> None:
    check_exact(stream(), X * amplitude, applied={NAME: 1}, **ONLY)


def test_a_constant_on_the_stream_changes_nothing() -> None:
    """Means planted in an embedding row, a bias and a branch are out before a feature is."""
    model = pre_norm().double().eval()
    with torch.no_grad():
        plain = model(ids())
    with torch.no_grad():
        model.embed.weight[3] += 7.0
        model.blocks[0].out.bias += 5.0
        model.blocks[1].down.weight += 2.0
    check_exact(model, ids(), applied={NAME: 1}, **ONLY)
    with torch.no_grad():
        result, _ = run(model, ids(), **ONLY)
    assert error(result, plain) < 1e-12


def test_norms_without_weights() -> None:
    def norm(d: int) -> nn.Module:
        return nn.LayerNorm(d, elementwise_affine=False)

    check_exact(pre_norm(norm=norm), ids(), applied={AFFINE: 0, NAME: 1}, **ONLY)


def test_convolution_and_class_token() -> None:
    """A ViT's stem, and a convolution that reads the stream (ConvNeXt's downsampling)."""

    class Stem(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.position = nn.Parameter(torch.randn(1, 5, 16))
            self.down = nn.Conv2d(16, 6, 2, padding=1)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
            return self.head(x[:, 0]), self.down(x[:, 1:].transpose(1, 2).reshape(-1, 16, 2, 2))

    affine_free = randomise(Stem())
    affine_free.norm = nn.LayerNorm(16, elementwise_affine=False)
    check_exact(affine_free, torch.randn(2, 3, 8, 8), applied={TO_RMS: 5, NAME: 1}, **passes(2))


def test_token_operations_inside_the_stream() -> None:
    """Sizes that views spell out, rolls, averages, padding, masks, splits, zeros, index."""

    class Tokens(Stream):
        def forward(self, x, keep):
            x = self.first(x)
            x = self.blocks[0](torch.roll(x, 2, 1)[:, 1:])
            x = torch.cat([x, x.mean(1, keepdim=True)], 1) * keep[:, None, None] / 0.9
            x = nn.functional.pad(x, (0, 0, 1, 0)).view(3, 2, 3, 16).permute(0, 2, 1, 3)
            x = torch.where(keep[:, None, None, None] > 0, x, torch.zeros_like(x))
            x = self.blocks[1](x.reshape(3, -1, 16)[torch.arange(3), torch.tensor([0, 2, 4])])
            first, second = x.unflatten(1, (1, 16)).expand(3, 4, 16).split(2, 1)
            x = torch.stack([first, -second], 1).transpose(0, 1).contiguous().transpose(0, 1)
            return self.head(self.norm(x.flatten(1, 2).squeeze().unsqueeze(0)))

    keep = torch.tensor([1.0, 0.0, 1.0])
    check_exact(stream(Tokens), X, keep, applied={TO_RMS: 5, NAME: 1}, **passes(7))


def test_width_one_is_not_squeezed_away() -> None:
    class Squeezed(Stream):
        def forward(self, x):
            return self.head(self.norm(self.first(x[:1]).squeeze()))

    check_exact(stream(Squeezed, d=3), torch.randn(4, 5, 3), applied={NAME: 1}, **ONLY)
    report = check_exact(stream(Squeezed, d=2), torch.randn(4, 5, 2), applied={NAME: 0}, **ONLY)
    assert refusals(report, NAME) == ["sizes"]


def test_every_spelling_of_a_linear_map() -> None:
    class Spelled(Stream):
        def forward(self, x):
            x = torch.addmm(self.first.bias, x.reshape(-1, 16), self.first.weight.t())
            x = x + torch.relu(self.norm(x) @ self.blocks[1].mix.weight) @ self.blocks[0].mix.weight
            x = x + torch.mm(self.norm(x), self.blocks[0].out.weight.t())  # reads and writes it
            return self.head(self.norm(x))

    model = stream(Spelled)
    model.norm = nn.LayerNorm(16, elementwise_affine=False)
    check_exact(model, X, applied={TO_RMS: 3, NAME: 1}, **passes(4))


@pytest.mark.parametrize("drop", [0, 5, -1])
def test_a_mean_that_is_taken_out_at_run_time(drop: int) -> None:
    """Whisper's encoder: GELU starts the stream; one copy of the subtraction serves all of it."""

    class Activated(Stream):
        def body(self, x):
            x = nn.functional.gelu(self.first(x))
            return self.blocks[1](self.blocks[0](x))

    report = check_exact(stream(Activated), X, applied={TO_RMS: 5, NAME: 1}, **passes(drop))
    assert report[NAME].bytes_saved < 8 * 2 * 16 * 16 * 8, "the copy is counted"
    program = lowered(stream(Activated), X, **passes(drop))
    assert len(list(program.calls(aten.cat.default, aten.clone.default))) == 1


@pytest.mark.parametrize("drop", [0, 5, -1])
def test_what_is_cut_at_run_time_and_read_by_a_linear_layer(drop: int) -> None:
    """A LayerNorm without weights that stays one (its input is no stream) writes the stream."""

    class Sandwich(Stream):
        def forward(self, x):
            y = self.norm(torch.relu(self.first(x)))
            z = self.first(x) + y
            z = self.blocks[0](z)
            return self.head(self.norm(z)) + self.head(y)

    model = stream(Sandwich)
    model.norm = nn.LayerNorm(16, elementwise_affine=False)
    report = check_exact(model, X, applied={TO_RMS: 3, NAME: 1}, **passes(drop))
    assert refusals(report, NAME) == ["not-recentred"]


def test_two_streams_and_what_reads_one_and_writes_the_other() -> None:
    class Bridge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = Stream(16), Stream(8)
            self.bridge = nn.Linear(16, 8)

        def forward(self, x):
            memory = self.bridge(self.wide.norm(self.wide.body(x)))
            y = self.narrow.blocks[0](memory)
            return self.narrow.head(self.narrow.norm(y))

    check_exact(randomise(Bridge()), X, applied={TO_RMS: 8, NAME: 2}, **passes(3))


def test_shared_block_applied_twice() -> None:
    class Shared(Stream):
        def body(self, x):
            return self.blocks[0](self.blocks[0](self.first(x)))

    model = stream(Shared)
    for block in model.blocks:  # γ cannot be folded into weights that are read twice
        block.norm1 = block.norm2 = nn.LayerNorm(16, elementwise_affine=False)
    check_exact(model, X, applied={NAME: 1}, **ONLY)


# ---- networks ------------------------------------------------------------------------------------

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize("drop", [0, -1])
def test_gpt2_and_vit(drop: int) -> None:
    transformers = pytest.importorskip("transformers")
    gpt = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=20, use_cache=False)
    vit = transformers.ViTConfig(**TINY, intermediate_size=64, image_size=32, patch_size=8)

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).logits

    gpt = Logits(randomise(transformers.GPT2LMHeadModel(gpt)))
    check_exact(gpt, ids(), applied={TO_RMS: 5, NAME: 1}, **passes(drop, untie=True))
    report = check_exact(gpt, ids(), applied={TO_RMS: 5, NAME: 0}, **passes(drop))
    assert set(refusals(report, NAME)) == {"affine"}, (
        "the tied head leaves the last norm its weight"
    )
    vit = Logits(randomise(transformers.ViTForImageClassification(vit)))
    check_exact(vit, torch.randn(2, 3, 32, 32), applied={TO_RMS: 5, NAME: 1}, **passes(drop))


@pytest.mark.skipif(__import__("importlib").util.find_spec("timm") is None, reason="no timm")
def test_timm() -> None:
    from sparsecc.cli.timm_models import import_timm

    options = {"depth": 2, "img_size": 32, "num_classes": 7}
    model = randomise(import_timm().create_model("vit_tiny_patch16_224", **options))
    check_exact(model, torch.randn(2, 3, 32, 32), applied={TO_RMS: 5, NAME: 1}, **passes(100))


# ---- dynamic shapes, updates, training, precision ------------------------------------------------


def test_dynamic_batch_and_length() -> None:
    model = pre_norm().double().eval()
    report = sparsecc.Report()
    fast = torch.compile(
        model,
        backend="sparsecc",
        dynamic=True,
        options={"lower": "eager", "report": report, "strict": True, **passes(2)},
    )
    with torch.no_grad():
        for batch, tokens in ((2, 3), (5, 7), (1, 1), (16, 32)):
            x = ids(batch, tokens)
            assert error(fast(x), model(x)) < 1e-12
    assert all(g.passes[NAME].applied == 1 for g in report.graphs)
    assert len(report.graphs) <= 2  # one for batches of one, as without the pass


def test_views_with_symbolic_sizes_leave_no_guard() -> None:
    class Sizes(Stream):
        def forward(self, x):
            b, t, d = x.shape
            x = self.first(x).view(b * t, 1, d).expand(b * t, 2, d).reshape(b, 2 * t, d)
            x = torch.cat([x, x.new_zeros(b, 1, d)], 1)
            x = self.blocks[0](x).transpose(0, 1).flatten(0, 1)
            return self.head(self.norm(x.view(2 * t + 1, b, d)))

    model = stream(Sizes).double().eval()
    report = sparsecc.Report()
    options = {"lower": "eager", "report": report, "strict": True, **passes(0)}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        for batch, tokens in ((2, 6), (5, 8), (3, 20), (7, 4)):
            x = torch.randn(batch, tokens, 16, dtype=torch.float64)
            torch._dynamo.maybe_mark_dynamic(x, [0, 1])
            assert error(fast(x), model(x)) < 1e-12
    assert [g.passes[NAME].applied for g in report.graphs] == [1]


def test_weights_updated_after_compile() -> None:
    model = pre_norm().double().eval()
    options = {"lower": "eager", "require": {NAME: 1}, **ONLY}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        fast(ids())
        model.load_state_dict(randomise(copy.deepcopy(model), 1).state_dict())
        assert error(fast(ids()), model(ids())) < 1e-12


def test_tied_table_keeps_the_head_as_it_was() -> None:
    model = pre_norm(tied=True)
    kept = copy.deepcopy(model.state_dict())
    check_exact(model, ids(), applied={NAME: 1}, **passes(1, untie=True))
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("drop", [0, 7, -1])
def test_training_walks_the_same_path(drop: int) -> None:
    check_training(lambda: pre_norm(), {TO_RMS: 5, NAME: 1}, **passes(drop))


def test_training_with_a_tied_table() -> None:
    check_training(lambda: pre_norm(tied=True), {NAME: 1}, **passes(untie=True))


def test_gradients_equal_in_fp64() -> None:
    model = stream().double()
    x = X.double().requires_grad_()
    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    result, report = run(model, x, lower="aot_eager", **passes(3))
    got = torch.autograd.grad(result.square().sum(), wanted)
    assert report[NAME].applied == 1
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-10


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def ratio(model: nn.Module, x: torch.Tensor, **options: Any) -> float:
    """Root mean square error beside eager's own, both against fp64."""
    exact = fp64(model)(x)
    with torch.no_grad():
        result, report = run(model, x, **options)
        errors = [(r.double() - exact).square().mean().sqrt() for r in (result, model(x))]
    assert report[NAME].applied == 1
    return float(errors[0] / errors[1])


def without_means(seed: int, d: int) -> nn.Module:
    """Planted means cost eager digits; without them it is at its best."""
    model = randomise(PreNorm(d=d), seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.sub_(0.05)
    return model


def test_half_precision_is_as_near_to_fp64_as_eager() -> None:
    """Linear layers in bf16 over fp32 weights: sums are in fp32, weights round once."""
    x = ids(8, 32)
    found = [ratio(without_means(seed, 64), x, **ONLY) for seed in range(3)]
    assert statistics.median(found) < 1.5
    found = [ratio(Autocast(without_means(seed, 64)), x, **ONLY) for seed in range(5)]
    assert statistics.median(found) < 1.5


def test_autocast_passes_the_proof() -> None:
    with torch.no_grad():
        _, report = run(Autocast(pre_norm(d=64).eval()), ids(8, 32), verify="final", **ONLY)
    assert report[NAME].applied == 1
    assert report.verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    """Less a mean that is finer than their grid they round alike, and −Σx′ adds that up."""
    model = without_means(0, 64).to(dtype)
    with torch.no_grad():
        result, report = run(model, ids(), verify="final", **ONLY)
    assert (report[TO_RMS].applied, report[NAME].applied) == (5, 0)
    assert refusals(report, NAME) == ["rounded"]
    assert result.dtype == dtype


# ---- the proof sees mistakes -----------------------------------------------------------------------


def law(**wrong: Callable[..., Any]) -> Example:
    """The law for the last feature, with parts of it exchanged."""
    example = LayerNormToCRMSNorm.examples()[0]
    mean = wrong.get("mean", lambda squares, total, d: (squares + total * total) / d)
    bias = wrong.get("bias", lambda c, V: c)
    reader = wrong.get("reader", lambda V: V[:, :-1] - V[:, -1:])

    def after(x: Any, h: Any, W: Any, b: Any, V: Any, c: Any, *, eps: float, j: int) -> Any:
        del j
        d = x.shape[-1]
        x = (x - x.mean(-1, keepdim=True))[:, :-1]
        W, b = W - W.mean(0, keepdim=True), b - b.mean(0, keepdim=True)
        x = x + (h @ W[:-1].transpose(0, 1) + b[:-1])
        squares, total = (x * x).sum(-1, keepdim=True), x.sum(-1, keepdim=True)
        y = x / (mean(squares, total, d) + eps) ** 0.5
        return y @ reader(V).transpose(0, 1) + bias(c, V)

    options = {"eps": (1e-5,), "j": (-1,)}
    return Example(example.before, after, example.inputs, example.weights, options, symbolic=True)


WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "divisor d - 1": {"mean": lambda squares, total, d: (squares + total * total) / (d - 1)},
    "the square of x_j is forgotten": {"mean": lambda squares, total, d: squares / d},
    "the bias is changed, too": {"bias": lambda c, V: c - V.sum(-1)},
    "the column stays": {"reader": lambda V: V[:, :-1]},
}
SIZES = {"n": 1, "d": 2, "k": 1, "m": 1}


def test_the_law_as_written_here_holds() -> None:
    assert holds_symbolically(law(), SIZES, {"eps": 1e-5, "j": -1})


@pytest.mark.parametrize("wrong", WRONG)
def test_the_prover_sees_a_wrong_law(wrong: str) -> None:
    from test_laws import check_numerically

    broken = law(**WRONG[wrong])
    if "bias" in wrong:  # SymPy takes minutes to give up on the others
        assert not holds_symbolically(broken, SIZES, {"eps": 1e-5, "j": -1})
    with pytest.raises(AssertionError):
        check_numerically(broken, 0, {"n": 3, "d": 6, "k": 2, "m": 2}, 0.0, False)


def divisor(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LayerNormToCRMSNorm._crms

    def crms(self: Any, program: Any, node: Any, d: int) -> Any:
        return right(self, program, node, d - 1)

    monkeypatch.setattr(LayerNormToCRMSNorm, "_crms", crms)


def changed_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LayerNormToCRMSNorm._linear

    def linear(self: Any, program: Any, linear: Any, *rest: Any) -> None:
        right(self, program, linear, *rest)
        build = program.weight(self.name, linear.node)
        if linear.bias is not None:
            column = build.sum(build.mul(linear.weight, 1e-3), linear.in_axis)
            new = linear.node.args[2]
            same = new.meta["val"].shape == column.meta["val"].shape
            linear.node.update_arg(2, build.sub(new, column) if same else new)

    monkeypatch.setattr(LayerNormToCRMSNorm, "_linear", linear)


@pytest.mark.parametrize("plant", [divisor, changed_bias])
def test_the_proof_sees_a_planted_mistake(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        run(stream().eval(), X, verify="each", **ONLY)
        plant(monkeypatch)
        with pytest.raises(VerificationError, match=NAME):
            run(stream().eval(), X, verify="each", **ONLY)
    with pytest.raises(AssertionError):
        check_exact(stream(), X, applied={NAME: 1}, **ONLY)


# ---- refuses ---------------------------------------------------------------------------------------


class Returned(Stream):
    def forward(self, x):
        x = self.norm(self.body(x))
        return self.head(x), x


class Reduced(Stream):
    def forward(self, x):
        x = self.norm(self.body(x))
        return self.head(x) + x.amax(-1, keepdim=True)


class Gated(Stream):
    """An operator that needs every feature, behind one that carries them."""

    def forward(self, x):
        x = self.norm(self.body(x))
        return self.head(torch.relu(x[:, 1:]))


class Heads(Stream):
    """Attention on the stream itself: its features are split."""

    def forward(self, x):
        x = self.norm(self.body(x))
        return self.head(x) + x.view(3, 5, 4, 4).sum(-1).sum(-1, keepdim=True)


class Widths(Stream):
    def forward(self, x):
        x = self.norm(self.body(x))
        return self.head(x) + torch.ones_like(x).sum(-1, keepdim=True)


class Grouped(Stream):
    """Each of its outputs reads some features only."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(16, 16, 1, groups=4)

    def forward(self, x):
        return self.grouped(self.norm(self.body(x)).transpose(1, 2))


class WithoutEps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        return self.head(nn.functional.rms_norm(x - x.mean(-1, keepdim=True), (16,)))


class Transposed(WithoutEps):
    """A square value with a stream on each of its axes."""

    def forward(self, x):
        x = self.first(x[0, :1].expand(16, 16))
        x = x - x.mean(-1, keepdim=True)
        return self.head(nn.functional.rms_norm(x + x.t(), (16,), eps=1e-5))


class Native(WithoutEps):
    """A stream with a mean, read by a bare RMSNorm of the user's own."""

    def forward(self, x):
        return self.head(nn.functional.rms_norm(self.first(x), (16,), eps=1e-5))


class TwoAxes(WithoutEps):
    def forward(self, x):
        x = self.first(x)
        x = x - x.mean(-1, keepdim=True)
        return self.head(nn.functional.rms_norm(x, (5, 16), eps=1e-5))


class Written(WithoutEps):
    def forward(self, x):
        x = self.first(x)
        x = x - x.mean(-1, keepdim=True)
        y = self.head(nn.functional.rms_norm(x, (16,), eps=1e-5))
        x[..., 0] = 1.0
        return y, x.sum()


class Weighted(WithoutEps):
    def forward(self, x):
        x = self.first(x)
        x = x - x.mean(-1, keepdim=True)
        return nn.functional.rms_norm(x, (16,), self.first.bias, 1e-5).relu()


class Vector(WithoutEps):
    def forward(self, x):
        x = self.first(x)
        x = nn.functional.rms_norm(x - x.mean(-1, keepdim=True), (16,), eps=1e-5)
        return self.head(x), torch.relu(x * self.first.bias)


class Switched(Stream):
    def forward(self, x):
        x = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.blocks[0].mix(self.blocks[0].norm1(x))
        return self.head(y)


class TiedHead(Stream):
    """Without weights on the norm nothing keeps γ from folding; the head's weight is read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=False)

    def forward(self, x):
        return self.head(self.norm(self.body(x))) @ self.head.weight


REFUSED: dict[type[nn.Module], str] = {
    Returned: "stream-exit",
    Reduced: "operator",
    Gated: "operator",
    Heads: "operator",
    Widths: "operator",
    Grouped: "operator",
    Transposed: "operator",
    Native: "not-centred",
    WithoutEps: "eps",
    TwoAxes: "operator",
    Written: "mutated",
    Weighted: "affine",
    Vector: "affine",
    Switched: "region",
    TiedHead: "tied",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refuses(cls: type[nn.Module]) -> None:
    model = randomise(cls())
    if hasattr(model, "norm"):
        model.norm = nn.LayerNorm(16, elementwise_affine=False)
    report = check_exact(model, X, applied={NAME: 0}, floor=False, **ONLY)
    found = report[NAME].refusals
    assert REFUSED[cls] in [r.code for r in found], [(r.code, r.reason) for r in found]
    assert all(r.reason and r.blame for r in found)


def test_refuses_layer_norms_that_were_not_recentred() -> None:
    report = check_exact(stream(), X, applied={NAME: 0}, passes=[NAME])
    assert refusals(report, NAME) == ["not-recentred"] * 5


def test_refuses_norms_whose_weight_was_not_folded() -> None:
    report = check_exact(stream(), X, applied={NAME: 0}, passes=[TO_RMS, NAME])
    assert refusals(report, NAME) == ["affine"] * 5


def test_refuses_a_symbolic_feature_axis() -> None:
    def free(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x - x.mean(-1, keepdim=True), (x.shape[-1],), eps=1e-5)

    x = torch.randn(4, 6)
    torch._dynamo.mark_dynamic(x, 1)
    result, report = run(free, x, passes=[NAME])
    assert error(result, free(x)) < 1e-6
    assert refusals(report, NAME) == ["symbolic-features"]


@pytest.mark.parametrize("drop", [16, -17])
def test_refuses_a_feature_that_is_not_there(drop: int) -> None:
    report = check_exact(stream(), X, applied={NAME: 0}, **passes(drop))
    assert refusals(report, NAME) == ["drop"]


@pytest.mark.parametrize("drop", [True, 1.0, "last", None])
def test_the_option_takes_whole_numbers(drop: Any) -> None:
    with pytest.raises(OptionsError, match="drop must be a whole number"):
        LayerNormToCRMSNorm.configure({"drop": drop})


def test_it_runs_only_when_named() -> None:
    assert NAME in registry.REWRITES
    assert NAME not in registry.PRESETS["default"]
    with torch.no_grad():
        _, report = run(stream().eval(), X)
    assert NAME not in {p.name for p in report}
    assert report[TO_RMS].applied == 5


def test_where_weights_would_be_folded_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a preset it would refuse; named, it runs (and named it is today)."""
    presets = {**registry.PRESETS, "default": (TO_RMS, NAME)}
    monkeypatch.setattr(registry, "PRESETS", presets)

    def bare() -> nn.Module:
        return pre_norm(norm=lambda d: nn.LayerNorm(d, elementwise_affine=False)).double()

    _, report = run(bare().train(), ids(), lower="aot_eager")
    assert refusals(report, NAME) == ["training"]
    model = managed_by_fsdp(bare().eval())
    with torch.no_grad():
        _, report = run(model, ids())
        assert refusals(report, NAME) == ["gathered"]
        result, report = run(model, ids(), **ONLY)
        assert error(result, model(ids())) < 1e-12
    assert report[NAME].applied == 1


def test_out_of_fuel_it_is_skipped_whole() -> None:
    report = check_exact(stream(), X, applied={AFFINE: 5, TO_RMS: 5, NAME: 0}, fuel=10, **ONLY)
    assert [m.status for m in report[NAME].matches] == ["skipped"]


def test_what_it_saves() -> None:
    """Products lose 1/16 of each side that the stream has; norms gain a sum."""
    report = check_exact(pre_norm(layers=1), ids(), applied={NAME: 1}, **ONLY)
    tokens, d = 15, 16
    spared = [d, d, 3 * d, 3 * d, 20]  # mix, out, up, down, head
    assert report[NAME].flops_saved == 2 * tokens * sum(spared) - 3 * tokens * (d - 3)
    assert report[NAME].bytes_saved == 8 * sum(spared)
