"""Capture keeps the model's meaning: everything hard that Dynamo's graph can hold, compared with eager.

Each hard thing stands in the branch of a residual block, with LayerNorms before, around and after it, so
that the norm passes rewrite the same graph; the number of rewrites is asserted each time. Values, gradients,
mutated inputs and buffers are compared in fp64.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import run_backward
from hard import (
    ALL_BUT_HARD,
    BOTH,
    FOLD,
    NORMS,
    RMS,
    TO_RMS,
    TRANSFORMS,
    Around,
    Cache,
    Checkpointed,
    D,
    Doubled,
    Noisy,
    StaticCache,
    Wrong,
    around,
    branches,
    checkpointed,
    counted,
    frozen_branch,
    half_region,
    loop,
    rotate_in_place,
    runs,
    saved_bytes,
    scanned,
    shaped,
    x64,
)
from support import PreNorm, capture, error, fails_on_211, ids, randomise
from torch import nn
from torch.utils._pytree import tree_leaves

import sparsecc
from sparsecc import _torch, driver, lowering
from sparsecc.errors import CaptureError, PassError
from sparsecc.passes.norm.fold_norm_affine import FoldNormAffine


def same(
    model: Any,
    *args: Any,
    applied: dict[str, int],
    train: bool = True,
    tolerance: float = 1e-9,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    calls: int = 2,
    fullgraph: bool = True,
    **kwargs: Any,
) -> sparsecc.Report:
    """Compile ``model`` and compare it with an untouched copy; assert the number of rewrites."""
    report = sparsecc.Report()
    if isinstance(model, nn.Module):
        model.zero_grad()
        model.train(train)
    reference = copy.deepcopy(model)
    # Autograd ahead of time is what costs time; in inference the rewritten graph itself shows as much.
    chosen = {"lower": "aot_eager" if train else "eager", **(options or {}), "report": report}
    fast = torch.compile(
        model, backend="sparsecc", options=chosen, dynamic=dynamic, fullgraph=fullgraph
    )
    for _ in range(calls):
        got = call(fast, args, kwargs, train)
        wanted = call(reference, args, kwargs, train)
        close(got, wanted, tolerance)
    if isinstance(model, nn.Module):
        close(list(model.buffers()), list(reference.buffers()), tolerance)
        gradients = [[p.grad for p in m.parameters()] for m in (model, reference)]
        close(*gradients, tolerance, floor=1e-9)
    counts = {name: report[name].applied for name in applied}
    refusals = [f"{r.code}: {r.reason}" for name in applied for r in report[name].refusals]
    assert counts == applied, "\n".join([*report.fallbacks, *refusals])
    return report


def call(function: Any, args: Any, kwargs: Any, train: bool) -> list[Any]:
    """Outputs, then the inputs after the call, then the gradients of the inputs."""
    outputs, inputs = run_backward(function, args, kwargs, train)
    inputs = tree_leaves(inputs)
    grads = [i.grad for i in inputs if isinstance(i, torch.Tensor)]
    return [*tree_leaves(outputs), *inputs, *grads]


def close(got: Sequence[Any], wanted: Sequence[Any], tolerance: float, floor: float = 0.0) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert type(a) is type(b)
        if not isinstance(b, torch.Tensor):
            assert a == b
            continue
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        assert a.stride() == b.stride() or a.numel() == 0 or floor
        if b.numel() and (b.abs().max() > floor or a.abs().max() > 2 * floor):
            assert distance(a, b) < tolerance


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return error(a.detach(), b.detach())


# ---- regions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_autocast_inside(train: bool) -> None:
    """The cast products are rounded to bf16 as in eager: same bits where nothing was rewritten."""
    report = same(
        around(half_region, torch.float32),
        x64().float(),
        applied=RMS if train else ALL_BUT_HARD,
        train=train,
        tolerance=2e-2,
    )
    assert not report.graphs[0].opaque


class WholeInAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = PreNorm()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(tokens)


def against_fp64(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> list[float]:
    """Errors of the output and of every gradient against the model in fp64."""
    exact = copy.deepcopy(model).double()
    for m in (model, exact):
        m.zero_grad()
    plain = exact.inner if isinstance(exact, WholeInAutocast) else exact
    reference = plain(ids())
    found = [error(run(model).detach(), reference.detach())]
    if model.training:
        run(model).float().pow(2).sum().backward()
        reference.pow(2).sum().backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        found += [error(p.grad, q.grad) for p, q in pairs]
    return found


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_autocast_around_all(ambient: bool, train: bool) -> None:
    """No further from fp64 than eager's own autocast is, values and gradients."""
    model = randomise(PreNorm() if ambient else WholeInAutocast()).train(train)
    report = sparsecc.Report()
    named = {"layernorm-to-rmsnorm": {}, "fold-norm-affine": {}}  # also in training
    options = {"lower": "aot_eager", "report": report, "passes": named}
    fast = torch.compile(model, backend="sparsecc", options=options, fullgraph=True)

    def run(function: Any) -> torch.Tensor:
        with (
            torch.set_grad_enabled(train),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient),
        ):
            result = function(ids())
        assert result.dtype == torch.bfloat16
        return result

    eager = against_fp64(model, run)
    ours = against_fp64(model, lambda _: run(fast))
    assert report[TO_RMS].applied == report[FOLD].applied == 5
    assert max(ours) < 2 * max(eager)
    assert sum(ours) < 1.5 * sum(eager)


def test_autocast_state_is_restored() -> None:
    same(around(half_region, torch.float32), x64().float(), applied=RMS, tolerance=2e-2, calls=1)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("train", [True, False])
def test_grad_mode_inside(train: bool) -> None:
    same(
        around(frozen_branch), x64(grad=train), applied=RMS if train else ALL_BUT_HARD, train=train
    )


def test_frozen_blocks() -> None:
    """A whole block under no_grad in the middle of training: its weights get no gradient."""

    class Frozen(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.enter(x)
                x = x + self.leave(self.norm(x))
            return self.head(self.last(self.after(x)))

    model = randomise(Frozen(torch.neg)).double()
    same(model, x64(), applied=RMS)
    assert model.enter.weight.grad is None
    assert model.after.up.weight.grad is not None


def test_enable_grad_in_training() -> None:
    def hard(h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(h)
            with torch.enable_grad():
                h = h * 2
        return h * gate

    same(around(hard), x64(grad=True), applied=RMS)


def test_enable_grad_under_no_grad() -> None:
    """Gradients flow although the call stands under no_grad; such a graph is left alone."""

    class Enabled(PreNorm):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return super().forward(tokens)

    model = randomise(Enabled()).double()
    report = same(model, ids(), applied={}, train=False)
    assert "gradients are switched on inside" in report.fallbacks[0]
    assert model.blocks[0].up.weight.grad is not None
    model.requires_grad_(False)  # then there are none, and the weights fold
    torch._dynamo.reset()
    same(model, ids(), applied={TO_RMS: 5, FOLD: 5}, train=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_around_the_call(mode: Any) -> None:
    model = randomise(PreNorm()).double().eval()
    report = sparsecc.Report()
    options = {"lower": "aot_eager", "report": report}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with mode():
        result = fast(ids())
        assert error(result, model(ids())) < 1e-12
        assert result.is_inference() == (mode is torch.inference_mode)
    assert report[TO_RMS].applied == report[FOLD].applied == 5
    # The same callable in training is another graph, with gradients.
    fast(ids()).sum().backward()
    assert model.norm.weight.grad is not None
    assert [g.trains for g in report.graphs] == [False, True]


# ---- higher-order operators ----------------------------------------------------------------------


def test_checkpoint_recomputes() -> None:
    """The region runs once forward and once more in the backward pass."""
    report = same(around(checkpointed), x64(grad=True), applied=RMS)
    (reason,) = report.graphs[0].opaque.values()
    assert reason == "higher-order operator tag_activation_checkpoint"
    model = around(checkpointed)
    fast = torch.compile(model, backend="sparsecc", options={"lower": "aot_eager"})
    result = fast(x64())
    before = runs["count"]
    result.sum().backward()
    assert runs["count"] == before + 1


@pytest.mark.parametrize("train", [True, False])
def test_checkpointed_blocks(train: bool) -> None:
    """Norms inside the region stay as they are, those outside are rewritten; memory stays saved."""
    model = randomise(Checkpointed(layers=4)).double()
    # The second region sees the mean of the stream, so only what comes after it is recentred.
    same(model, ids(8, 20), applied={TO_RMS: 3}, train=train)
    if train:
        options = {"lower": "aot_eager"}
        with_region = saved_bytes(
            torch.compile(model, backend="sparsecc", options=options), ids(8, 20)
        )
        plain = saved_bytes(
            torch.compile(model, backend="sparsecc", options=options), ids(8, 20), False
        )
        assert with_region < 0.75 * plain


def test_custom_backward_is_called() -> None:
    report = same(around(lambda h: Wrong.apply(h)), x64(grad=True), applied=RMS)
    assert "autograd_function_apply" in report.graphs[0].opaque
    same(around(lambda h: Wrong.apply(h)), x64(), applied=BOTH, train=False)  # a plain product


@pytest.mark.parametrize("train", [True, False])
def test_cond(train: bool) -> None:
    report = same(around(branches), x64(), applied=RMS if train else ALL_BUT_HARD, train=train)
    assert "cond" in report.graphs[0].opaque


def test_while_loop() -> None:
    report = same(around(loop), x64(), applied=ALL_BUT_HARD, train=False)
    assert "while_loop" in report.graphs[0].opaque


ALIASED = fails_on_211("scan's gradient aliases its input, aot_eager says")


@pytest.mark.parametrize("train", [pytest.param(True, marks=ALIASED), False])
def test_scan(train: bool) -> None:
    report = same(around(scanned), x64(), applied=RMS if train else ALL_BUT_HARD, train=train)
    assert "scan" in " ".join(report.graphs[0].opaque.values())


def flexible(h: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, n = h[:, None], h.shape[1]
    mask = create_block_mask(lambda b, i, q, k: q >= k, None, None, n, n, device="cpu")
    biased = flex_attention(q, q, q, score_mod=lambda s, b, i, q, k: s + (q - k))
    return (biased + flex_attention(q, q, q, block_mask=mask))[:, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention() -> None:
    """Forward only: PyTorch has no backward of flex_attention on CPU."""
    report = same(
        around(flexible, torch.float32),
        x64().float(),
        applied=ALL_BUT_HARD,
        train=False,
        tolerance=1e-5,
        calls=1,
    )
    assert "higher-order operator flex_attention" in report.graphs[0].opaque.values()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch_inside(transform: str, train: bool) -> None:
    hard = TRANSFORMS[transform]
    applied = RMS if train else ALL_BUT_HARD
    report = same(around(lambda h: hard(h)), x64(), applied=applied, train=train, calls=1)
    assert "inside a functorch transform" in report.graphs[0].opaque.values()


def test_functorch_around() -> None:
    """PyTorch runs a compiled function eagerly inside a transform; the result must be right."""
    model = around(torch.neg).eval()
    fast = torch.compile(model, backend="sparsecc", options={"lower": "aot_eager"})
    x = x64(3, 2, 5, 8)
    with torch.no_grad():
        assert error(torch.vmap(fast)(x), torch.vmap(model)(x)) < 1e-12
    ours = torch.func.grad(lambda v: fast(v).sum())(x[0])
    assert error(ours, torch.func.grad(lambda v: model(v).sum())(x[0])) < 1e-12


# ---- mutation and aliasing (D18) -----------------------------------------------------------------


def test_cache_written_in_place() -> None:
    """The writes survive, in order, and are seen by the reads after them, at every call."""
    report = same(
        around(Cache()),
        x64(),
        torch.arange(1, 6),
        x64(2, 9, D),
        applied=ALL_BUT_HARD,
        train=False,
        options={"lower": "aot_eager"},
        calls=3,
    )
    assert not report.graphs[0].opaque


def test_static_cache_object() -> None:
    model = around(lambda h, cache, position: h + cache.update(h, position).sum(1, keepdim=True))
    model.eval()
    report = sparsecc.Report()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "aot_eager", "report": report}, fullgraph=True
    )
    ours, reference = StaticCache(), StaticCache()
    with torch.no_grad():
        for step in range(4):
            x, position = x64(2, 1, 8) + step, torch.tensor([step])
            assert error(fast(x, ours, position), model(x, reference, position)) < 1e-12
    assert error(ours.keys, reference.keys) < 1e-12
    assert report[TO_RMS].applied == NORMS
    assert len(report.graphs) == 1


@pytest.mark.parametrize("train", [True, False])
def test_inputs_written_in_place(train: bool) -> None:
    options = {"lower": "aot_eager"}
    applied = RMS if train else ALL_BUT_HARD
    same(around(rotate_in_place), x64(), x64(2, 3), applied=applied, train=train, options=options)


def test_aliased_inputs() -> None:
    """Two inputs share memory and one is written: the other sees it."""

    def hard(h: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        before = b.sum()
        a.add_(1)
        return h * before + b.sum()

    model = around(hard).eval()
    report = sparsecc.Report()
    fast = torch.compile(
        model, backend="sparsecc", options={"lower": "aot_eager", "report": report}
    )
    bases = [x64(4, 4) for _ in range(2)]
    with torch.no_grad():
        for _ in range(2):
            results = [
                function(x64(), base[:2], base.view(-1)[2:8])
                for function, base in zip((fast, model), bases, strict=True)
            ]
            assert error(*results) < 1e-12
    assert error(*bases) == 0
    assert report[TO_RMS].applied == NORMS


def test_outputs_alias_inputs() -> None:
    class Views(Around):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return super().forward(x), y, y.view(-1), x[0], self.enter.weight, self.enter.weight.t()

    model = randomise(Views(torch.neg)).double().eval()
    options = {"lower": "aot_eager", "require": [TO_RMS]}
    fast = torch.compile(model, backend="sparsecc", options=options)
    x, y = x64(), x64(3, 4)
    with torch.no_grad():
        for _ in range(2):
            out, same_y, flat, first, weight, turned = fast(x, y)
    assert same_y is y
    assert flat.data_ptr() == y.data_ptr()
    assert first.data_ptr() == x.data_ptr()
    assert weight is model.enter.weight
    assert turned.data_ptr() == weight.data_ptr()
    assert torch.equal(turned, weight.detach().t())
    assert error(out, model(x, y)[0]) < 1e-12


def test_shapes_changed_in_place_fall_through() -> None:
    """``transpose_`` gives one value two shapes; such a graph is left to Inductor."""

    def hard(h: torch.Tensor) -> torch.Tensor:
        h = h * 2
        h.transpose_(0, 1)
        return h.transpose(0, 1)

    report = same(around(hard), x64(), applied={}, train=False)
    assert "changes the shape" in report.fallbacks[0]


@pytest.mark.parametrize("train", [True, False])
def test_detached_in_place(train: bool) -> None:
    """``detach_`` is tagged as a change of shape in place, and is none: the graph is captured."""

    def hard(h: torch.Tensor) -> torch.Tensor:
        held = h * 2
        held.detach_()
        return h + held * torch.signal.windows.hamming(D, dtype=h.dtype)

    same(around(hard), x64(), applied=RMS if train else ALL_BUT_HARD, train=train)


def test_weights_written_by_the_program() -> None:
    """A weight that the forward pass changes (a power iteration, an EMA) is never folded."""

    class Drifting(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last.weight.mul_(1.1)
            self.after.up.weight.data.add_(0.01)
            return super().forward(x)

    model = randomise(Drifting(torch.neg)).double()
    same(model, x64(), applied={FOLD: 1}, train=False, calls=3)


# ---- randomness and statistics -------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_batchnorm_and_dropout(train: bool) -> None:
    """Running statistics as in eager; the same random numbers as aot_eager without us (and as eager)."""
    model = around(Noisy())
    before = model.hard.norm.running_mean.clone()
    same(model, x64(), applied=RMS if train else ALL_BUT_HARD, train=train)
    assert torch.equal(before, model.hard.norm.running_mean) != train
    assert model.hard.norm.num_batches_tracked == (2 if train else 0)


def test_moved_statistics_are_writes() -> None:
    """BatchNorm's schema does not say that it writes: its result unused it still must, and what it writes is no
    weight to fold."""

    class Calibrated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch, self.layer, self.head = nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.batch(x)
            normal = nn.functional.layer_norm(x, (4,), bias=self.batch.running_mean)
            return self.head(self.layer(x)) + self.head(normal)

    model, x = randomise(Calibrated()).train(), torch.randn(5, 4)
    plain = copy.deepcopy(model)
    report = sparsecc.Report()
    fast = torch.compile(
        model,
        backend="sparsecc",
        options={"lower": "eager", "report": report, "passes": {FOLD: {"untie": True}}},
    )
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), plain(x))
            torch.testing.assert_close(model.batch.running_mean, plain.batch.running_mean)
            torch.testing.assert_close(model.batch.running_var, plain.batch.running_var)
    assert report[FOLD].applied == 1
    assert [r.code for r in report[FOLD].refusals] == ["not-a-weight"]


@pytest.mark.slow
def test_random_numbers_are_inductors() -> None:
    """Inductor draws from seeds of its own; with the same seed, sparsecc gives the same dropout masks."""
    model = around(Noisy(), torch.float32)
    results = []
    for backend in ("inductor", "sparsecc"):
        torch._dynamo.reset()
        options = {"require": [TO_RMS]} if backend == "sparsecc" else None
        fast = torch.compile(copy.deepcopy(model), backend=backend, options=options)
        torch.manual_seed(3)
        results.append([fast(x64().float()) for _ in range(2)])
    for ours, theirs in zip(*results, strict=True):
        assert error(ours.detach(), theirs.detach()) < 1e-5
    assert error(results[0][0].detach(), results[0][1].detach()) > 1e-3, "two draws differ"


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_batch_sizes_compile_twice(train: bool) -> None:
    """One static and one dynamic graph serve every batch size (pain 10)."""
    model = randomise(PreNorm()).double().train(train)
    report = sparsecc.Report()
    options = {"lower": "aot_eager" if train else "eager", "report": report}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.set_grad_enabled(train):
        for batch in range(1, 17):
            assert error(fast(ids(batch)).detach(), model(ids(batch)).detach()) < 1e-12
    assert len(report.graphs) == 2
    assert all(g.passes[TO_RMS].applied == 5 for g in report.graphs)


def test_no_more_graphs_than_dynamo_alone() -> None:
    """Batch and length both vary: a rewrite adds no guard."""
    model = randomise(PreNorm()).eval()
    counter = torch._dynamo.testing.CompileCounter()
    report = sparsecc.Report()
    options = {"lower": "eager", "report": report}
    plain = torch.compile(model, backend=counter)
    shapes = [(2, 3), (2, 4), (3, 4), (7, 9), (1, 5), (16, 2)]
    with torch.no_grad():
        for shape in shapes:
            plain(ids(*shape))
        torch._dynamo.reset()
        fast = torch.compile(model, backend="sparsecc", options=options)
        for shape in shapes:
            assert error(fast(ids(*shape)), model(ids(*shape))) < 1e-5
    assert len(report.graphs) == counter.frame_count


@pytest.mark.parametrize("train", [True, False])
def test_marked_dynamic(train: bool) -> None:
    model = randomise(PreNorm()).double().train(train)
    report = sparsecc.Report()
    options = {"lower": "aot_eager", "report": report}
    fast = torch.compile(model, backend="sparsecc", options=options, fullgraph=True)
    with torch.set_grad_enabled(train):
        for batch, tokens in ((4, 6), (2, 3), (9, 12)):
            tokens_in = ids(batch, tokens)
            torch._dynamo.mark_dynamic(tokens_in, 0)
            torch._dynamo.mark_dynamic(tokens_in, 1)
            assert error(fast(tokens_in).detach(), model(tokens_in).detach()) < 1e-12
    assert len(report.graphs) == 1
    assert report[TO_RMS].applied == 5


@pytest.mark.parametrize("train", [True, False])
def test_dynamic_shapes_in_arithmetic(train: bool) -> None:
    applied = RMS if train else ALL_BUT_HARD
    report = same(around(shaped), x64(), applied=applied, train=train, dynamic=True)
    assert not report.graphs[-1].opaque


def test_wrapped_floats() -> None:
    """With dynamic=True Dynamo turns an ε and a dropout probability that change into inputs."""

    def hard(h: torch.Tensor, eps: float, p: float, scale: float) -> torch.Tensor:
        h = F.layer_norm(h, (D,), eps=eps)
        return F.dropout(h, p) * scale

    model = around(hard)
    reference = copy.deepcopy(model)
    report = sparsecc.Report()
    options = {"lower": "aot_eager", "report": report}
    fast = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    for eps, p, scale in ((1e-5, 0.1, 2.0), (1e-2, 0.4, 3.0), (1.0, 0.5, 0.5)):
        torch.manual_seed(1)
        ours = fast(x64(), eps, p, scale)
        torch.manual_seed(1)
        assert error(ours.detach(), reference(x64(), eps, p, scale).detach()) < 1e-12
    assert all(g.passes[TO_RMS].applied >= NORMS for g in report.graphs)


def test_zero_size() -> None:
    model = around(lambda h: h * 2)
    for shape in ((0, 5, 8), (2, 0, 8)):
        torch._dynamo.reset()
        same(model, x64(*shape), applied=RMS)
        torch._dynamo.reset()
        same(model, x64(*shape), applied=BOTH, train=False)


LAYOUTS = {
    "transposed": lambda: x64(5, 2, 8).transpose(0, 1),
    "strided": lambda: x64(2, 10, 16)[:, ::2, ::2],
    "expanded": lambda: x64(1, 5, 8).expand(2, -1, -1),
    "expanded features": lambda: x64(2, 5, 1).expand(-1, -1, 8),
    "offset": lambda: x64(3, 6, 8)[1:, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs(layout: str) -> None:
    same(
        around(lambda h: h.transpose(0, 1).flip(0).transpose(0, 1)), LAYOUTS[layout](), applied=RMS
    )


def test_strides_of_weights() -> None:
    """Parameters that are transposed or sliced views."""
    model = around(lambda h: h * 2)
    model.leave.weight = nn.Parameter(x64(D, D).t())
    model.after.up.weight = nn.Parameter(x64(3 * D, 2 * D)[:, ::2])
    same(copy.deepcopy(model), x64(), applied=RMS)
    same(model, x64(), applied=BOTH, train=False)


# ---- inputs and outputs --------------------------------------------------------------------------


def test_integers_and_nested_containers() -> None:
    class Nested(Around):
        def forward(self, batch: dict[str, Any], *, flags: tuple[bool, int]) -> dict[str, Any]:
            x = super().forward(batch["inputs"][0], batch["ids"])
            return {"out": (x, [x.argmax(-1)]), "n": flags[1], "none": None}

    def hard(h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return h + tokens[..., None] * F.one_hot(tokens, D)

    model = randomise(Nested(hard)).double()
    batch = {"inputs": [x64()], "ids": torch.arange(10).view(2, 5)}
    report = same(model, batch, applied=RMS, flags=(True, 3))
    assert report.graphs[0].trains


def test_tied_and_viewed_parameters() -> None:
    """Tied weights get the sum of both gradients; a fused weight is used through its views."""

    class Tied(PreNorm):
        def __init__(self) -> None:
            super().__init__(tied=True)
            self.fused = nn.Parameter(torch.randn(2 * D, D))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                h = block.norm1(x)
                x = x + F.linear(torch.tanh(F.linear(h, self.fused[:D])), self.fused[D:])
                x = block(x)
            return self.head(self.norm(x))

    model = randomise(Tied()).double()
    same(copy.deepcopy(model), ids(), applied={TO_RMS: 7})
    # Of the weights, two views share a matrix with each other, and the head is the embedding.
    same(model, ids(), applied={FOLD: 4}, train=False)


def test_constants_in_forward() -> None:
    def hard(h: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([[1.0, 2.0]] * 8, dtype=torch.float64).flatten()
        return h * table + torch.tensor(0.5) + torch.full((D,), 3.0) - torch.eye(D)[0]

    same(around(hard), x64(), applied=RMS)
    same(around(hard), x64(), applied=ALL_BUT_HARD, train=False)


def test_complex() -> None:
    def hard(h: torch.Tensor) -> torch.Tensor:
        turned = torch.polar(torch.ones(D // 2), torch.arange(D // 2).float()).to(torch.complex128)
        pairs = torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2)) * turned
        spectrum = torch.fft.rfft(torch.view_as_real(pairs).flatten(-2))
        return torch.fft.irfft(spectrum * spectrum.abs())

    same(around(hard), x64(), applied=RMS)


def test_custom_operator() -> None:
    same(around(lambda h: counted(h)), x64(grad=True), applied=RMS)


def test_data_dependent_sizes_stay_opaque() -> None:
    def hard(h: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        longest = lengths.max().item()
        torch._check(longest <= h.shape[1])
        mask = torch.arange(h.shape[1]) < longest
        chosen = torch.nonzero(lengths > 1)
        return h * mask[:, None] + h.new_ones(longest).sum() + chosen.sum()

    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        report = same(
            around(hard), x64(), torch.tensor([3, 1, 2]), applied=ALL_BUT_HARD, train=False
        )
    assert "data-dependent size" in report.graphs[0].opaque.values()


def test_graph_breaks() -> None:
    """Several graphs, each rewritten on its own; the pieces agree."""

    class Broken(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            x = x + self.leave(self.norm(x))
            torch._dynamo.graph_break()
            scale = float(x.abs().max() > 0)
            return self.head(self.last(self.after(x) * scale))

    model = randomise(Broken(torch.neg)).double()
    report = same(model, x64(), applied={}, fullgraph=False)
    assert len(report.graphs) >= 2
    # The stream leaves each graph, so nothing may recentre it; the folds do not care.
    torch._dynamo.reset()
    same(model, x64(), applied={FOLD: 4}, train=False, fullgraph=False)


def test_two_models_two_option_sets() -> None:
    """Nothing is global (pain 16)."""
    model, other = randomise(PreNorm()).double().eval(), randomise(PreNorm(), 1).double().eval()
    reports = [sparsecc.Report(), sparsecc.Report()]
    options = {"lower": "aot_eager"}
    first = torch.compile(model, backend="sparsecc", options={**options, "report": reports[0]})
    second = torch.compile(
        other, backend="sparsecc", options={**options, "report": reports[1], "passes": [FOLD]}
    )
    with torch.no_grad():
        for _ in range(2):
            assert error(first(ids()), model(ids())) < 1e-12
            assert error(second(ids()), other(ids())) < 1e-12
    assert reports[0][TO_RMS].applied == reports[0][FOLD].applied == reports[1][FOLD].applied == 5
    assert TO_RMS not in reports[1]


def test_subclass_parameters_fall_through() -> None:
    model = around(lambda h: h * 2).requires_grad_(False)
    model.leave.weight = nn.Parameter(Doubled(model.leave.weight.detach()), requires_grad=False)
    report = sparsecc.Report()
    options = {"lower": "aot_eager", "report": report}
    fast = torch.compile(model, backend="sparsecc", options=options)
    with torch.no_grad():
        assert error(fast(x64()), model(x64())) < 1e-12
    assert "tensor subclass, Doubled" in report.fallbacks[0]


# ---- what the report needs -----------------------------------------------------------------------


def test_source_lines_and_module_paths() -> None:
    report = same(randomise(PreNorm()).double(), ids(), applied={TO_RMS: 5}, calls=1)
    matches = report[TO_RMS].matches
    assert [m.module for m in matches][:2] == ["blocks.0.norm1", "blocks.0.norm2"]
    assert matches[-1].module == "norm"
    assert all("support.py" in m.where and "in forward" in m.where for m in matches)
    assert len({m.where for m in matches}) == 3  # two lines of the block, one of the model


def test_every_value_is_known() -> None:
    """Every node that makes a tensor has a fake value of the backend's mode and a source line."""
    program = capture(around(TRANSFORMS["grad"]), x64())
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        for leaf in tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch.Tensor):
                assert leaf.fake_mode is program.fake_mode
    layers = list(program.calls(torch.ops.aten.linear.default))
    assert len(layers) == 7
    assert all(n.meta["stack_trace"] and n.meta["nn_module_stack"] for n in layers)


def test_annotations_survive() -> None:
    """``torch.fx.traceback.annotate`` marks nodes for later compilers."""

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.fx.traceback.annotate({"stage": 1}):
            x = x.sin()
        return x.cos()

    program = capture(function, torch.randn(3))
    (sine,) = program.calls(torch.ops.aten.sin.default)
    (cosine,) = program.calls(torch.ops.aten.cos.default)
    assert sine.meta["custom"] == {"stage": 1}
    assert not cosine.meta.get("custom")


def test_the_graph_given_is_not_changed() -> None:
    """Nothing of Dynamo's graph module is written, so a reference run on it is a reference (D22)."""
    found: list[tuple[str, str]] = []

    def image(gm: torch.fx.GraphModule) -> str:
        lines = [gm.code]
        for node in gm.graph.nodes:
            metas = {k: (id(v), str(v)) for k, v in sorted(node.meta.items())}
            lines.append(f"{node.format_node()} {metas}")
        for name, body in gm.named_modules():
            if name and isinstance(body, torch.fx.GraphModule):
                lines.append(image(body))
        return "\n".join(lines)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        options = sparsecc.Options.parse({"lower": "eager"})
        before = image(gm)
        compiled = driver.compile_graph(gm, inputs, options, None)
        found.append((before, image(gm)))
        return compiled

    def hard(h: torch.Tensor) -> torch.Tensor:
        return branches(half_region(h.float()).double()) + torch.tensor(1.0)

    for grad in (True, False):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            torch.compile(around(hard), backend=backend)(x64())
    assert len(found) == 2
    assert all(before == after for before, after in found)


# ---- what fails falls through --------------------------------------------------------------------


def broken(*_: Any) -> None:
    raise KeyError("planted")


@contextlib.contextmanager
def raises_inside(kind: type[Exception], words: str) -> Iterator[None]:
    """Dynamo wraps what a backend raises."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=words) as info:
        yield
    assert isinstance(info.value.inner_exception, kind)


def refuse_ours(real: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    """A lowering that refuses the first graph it is given."""

    def lower(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == 1:
            raise NotImplementedError("planted")
        return real(*args)

    return lower


@pytest.mark.parametrize("where", ["rewrite", "find", "check"])
def test_a_pass_that_fails_inside(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FoldNormAffine, where, broken)
    with caplog.at_level(logging.WARNING, "sparsecc"):
        report = same(around(torch.neg), x64(), applied={}, train=False)
    assert any(FOLD in r.getMessage() and "untouched" in r.getMessage() for r in caplog.records)
    (reason,) = report.fallbacks
    assert FOLD in reason
    assert "KeyError" in reason
    assert "disable" in reason
    torch._dynamo.reset()
    with raises_inside(PassError, FOLD):
        same(around(torch.neg), x64(), applied={}, train=False, options={"strict": True})


def test_capture_that_fails_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering.Lowering, "_splice", broken)
    report = same(around(torch.neg), x64(), applied={})
    assert "planted" in report.fallbacks[0]
    torch._dynamo.reset()
    with raises_inside(PassError, "planted"):
        same(around(torch.neg), x64(), applied={}, options={"strict": True})


@pytest.mark.parametrize("train", [True, False])
def test_a_rewritten_graph_that_lowering_refuses(
    train: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(_torch, "aot_eager", refuse_ours(_torch.aot_eager, seen))
    options = {"lower": "aot_eager"}
    with caplog.at_level(logging.WARNING, "sparsecc"):
        report = same(around(torch.neg), x64(), applied=RMS, train=train, options=options)
    assert len(seen) == 2
    assert "refused the rewritten graph" in caplog.text
    assert report.fallbacks == ["graph 0: lowering: NotImplementedError: planted"]


def test_an_unreadable_node_stays_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that cannot be traced alone is copied; the run around it is still lowered."""
    real = lowering._execute

    def execute(module: Any, node: torch.fx.Node, env: Any) -> Any:
        if node.target in (torch.cumsum, "cumsum"):
            raise RuntimeError("planted")
        return real(module, node, env)

    monkeypatch.setattr(lowering, "_execute", execute)
    report = same(around(lambda h: torch.cumsum(h, 1)), x64(), applied=RMS)
    (reason,) = report.graphs[0].opaque.values()
    assert reason == "not traceable: RuntimeError: planted"


def test_strict_names_the_capture() -> None:
    def hard(h: torch.Tensor) -> torch.Tensor:
        h = h * 2
        h.t_() if h.dim() == 2 else h.swapaxes_(0, 1)
        return h.swapaxes(0, 1)

    with raises_inside(CaptureError, "in place"):
        same(around(hard), x64(), applied={}, options={"strict": True})


# ---- through Inductor ----------------------------------------------------------------------------

INDUCTOR: dict[str, tuple[Callable[..., Any], bool]] = {
    "autocast, training": (half_region, True),
    "checkpoint, training": (checkpointed, True),
    "custom backward, training": (lambda h: Wrong.apply(h), True),
    "grad transform": (TRANSFORMS["grad"], False),
    "dynamic sizes": (shaped, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", INDUCTOR)
def test_inductor(case: str) -> None:
    hard, train = INDUCTOR[case]
    same(
        around(lambda h: hard(h), torch.float32),
        x64().float(),
        applied=RMS,
        train=train,
        tolerance=2e-2 if hard is half_region else 1e-4,
        dynamic=True if hard is shaped else None,
        options={"lower": "inductor"},
    )


@pytest.mark.slow
def test_inductor_cache_and_tokens() -> None:
    """A cache written in place, and a class token expanded over the batch."""

    class Tokens(Around):
        def __init__(self) -> None:
            super().__init__(Cache())
            self.token = nn.Parameter(torch.randn(1, 1, D))

        def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.enter(x)], 1)
            x = x + self.leave(self.hard(self.norm(x), *rest))
            return self.head(self.last(self.after(x)))

    same(
        randomise(Tokens()),
        x64(2, 4, 8).float(),
        torch.arange(1, 6),
        x64(2, 9, D).float(),
        applied=ALL_BUT_HARD,
        train=False,
        tolerance=1e-4,
        options={"lower": "inductor"},
    )
