"""What a graph can hold that a compiler breaks easily, through Inductor: values, gradients and the property
that each thing exists for, with the norms around it rewritten.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree, copies, judge, no_worse, ours
from hard import (
    FOLD,
    TO_RMS,
    D,
    Small,
    Wrong,
    branches,
    counted,
    log_into,
    loop,
    opaque_sign,
    saved_bytes,
    scanned,
    small,
    tallies,
    tally,
    x32,
    x64,
)
from support import PreNorm, ids, randomise
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import sparsecc

pytestmark = pytest.mark.slow

INDUCTOR = {"backend": "inductor", "fullgraph": True}


SMALL = {TO_RMS: 2}
SMALL_FOLDED = {TO_RMS: 2, FOLD: 1}  # the hard thing reads the other norm


# ---- activation checkpointing --------------------------------------------------------------------

KINDS = ("kept", "full", "selective", "asked")


def save_tally(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.sparsecc_test.tally.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def redo_tally(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.sparsecc_test.tally.default:
        return CheckpointPolicy.MUST_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


POLICIES = {"selective": save_tally, "asked": redo_tally}


class Recomputed(nn.Module):
    """The same costly region four times: kept, checkpointed, and under two selective policies."""

    def __init__(self, use: bool = True) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({k: nn.Parameter(torch.randn(D, D)) for k in KINDS})
        self.use = use

    def region(self, name: str, h: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            h = torch.sin(tally(h @ self.weights[name], name))  # sin's backward reads its input
        return h

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for name in KINDS:
            run = functools.partial(self.region, name)
            if name == "kept" or not self.use:
                h = h + run(h)
            elif name == "full":
                h = h + checkpoint(run, h, use_reentrant=False)
            else:
                contexts = functools.partial(create_selective_checkpoint_contexts, POLICIES[name])
                h = h + checkpoint(run, h, use_reentrant=False, context_fn=contexts)
        return h


def recomputed(function: Any, *args: Any) -> dict[str, int]:
    """How often each region's operator runs in the backward pass."""
    result = function(*args)
    tallies.clear()
    result.square().sum().backward()
    return {name: tallies[name] for name in KINDS}


def test_checkpointing_recomputes_what_inductor_does() -> None:
    """Tags survive: as many calls again in backward, as many bytes kept, as Inductor alone."""
    model = small(Recomputed())
    x = x32(8, 16, 8)
    fast, report = judge(model, x, applied=SMALL)
    names = " ".join(report.graphs[0].opaque.values())
    assert names.count("tag_activation_checkpoint") == 3
    theirs = torch.compile(copy.deepcopy(model), **INDUCTOR)
    found = recomputed(fast, x)
    assert found == {"kept": 0, "full": 2, "selective": 0, "asked": 2}
    assert found == recomputed(theirs, x)
    kept = saved_bytes(fast, x)
    assert kept <= 1.01 * saved_bytes(theirs, x)
    plain = copy.deepcopy(model)
    plain.hard.use = False
    without = torch.compile(plain, **ours())
    assert set(recomputed(without, x).values()) == {0}
    activation = 8 * 16 * D * 4  # bytes; a checkpointed region keeps none of its four
    assert kept <= saved_bytes(without, x) - 4 * activation


# ---- code that brings its own derivative, and operators of the user ------------------------------


class Operators(nn.Module):
    """A wrong backward, operators with and without a formula, and one that writes two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("store", torch.zeros(2, 5, D))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = Wrong.apply(h)
        log_into(h, self.store, self.total)
        with torch.no_grad():
            sign = opaque_sign(h)
        return tally(counted(h), "operators") * sign + self.store.mean() * self.total


@pytest.mark.parametrize("train", [True, False])
def test_operators_of_the_user(train: bool) -> None:
    model = small(Operators())
    tallies.clear()
    _, report = judge(model, x32(grad=train), applied=SMALL if train else SMALL_FOLDED, train=train)
    assert tallies["operators"] == 3 * 4  # as often in ours as in eager and fp64
    assert model.hard.total != 0
    if train:
        assert "autograd_function_apply" in report.graphs[0].opaque


def test_a_wrong_backward_stays_wrong() -> None:
    """The function doubles, and its backward multiplies by seven: that is what must be done."""
    x = x32(grad=True)
    observed = []
    for hard in (lambda h: Wrong.apply(h), lambda h: h * 2):
        torch._dynamo.reset()
        model = nn.Sequential(nn.LayerNorm(8), Small(hard))
        fast = torch.compile(randomise(model), **ours(require=SMALL))
        fast(x).sum().backward()
        observed.append([model[1].norm.bias.grad, model[1].last.bias.grad])
    (wrong, last), (right, same_last) = observed
    torch.testing.assert_close(wrong, right * 3.5)
    torch.testing.assert_close(last, same_last)


# ---- control flow --------------------------------------------------------------------------------


def branch_and_scan(h: torch.Tensor) -> torch.Tensor:
    return scanned(branches(h))


def test_control_flow_in_training() -> None:
    _, report = judge(small(branch_and_scan), x32(2, 3, 8), applied=SMALL)
    kinds = " ".join(report.graphs[0].opaque.values())
    assert "cond" in kinds
    assert "scan" in kinds


def test_control_flow_takes_both_branches() -> None:
    """Loops as well; the branch is chosen at run time, by the sign of what comes in."""
    model = small(lambda h: loop(branch_and_scan(h)))
    with torch.no_grad():
        model.norm.bias.sub_(model.norm.bias.mean())  # or one branch is always taken
    fast, report = judge(model, x32(2, 3, 8), applied=SMALL_FOLDED, train=False)
    assert "while_loop" in " ".join(report.graphs[0].opaque.values())
    wide, taken = copy.deepcopy(model).double(), set()
    for seed in range(8):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            taken.add(bool(model.norm(model.enter(x)).sum() > 0))
            no_worse({"y": fast(x)}, {"y": model(x)}, {"y": wide(x.double())})
    assert taken == {True, False}


# ---- attention with a program inside -------------------------------------------------------------


def flexible(h: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """A causal mask in blocks and a score modification, over fp32 whatever ``h`` is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = queries.shape[2]
    mask = create_block_mask(lambda b, i, q, k: q >= k, None, None, n, n, device="cpu")
    mixed = flex_attention(
        queries, queries, queries, score_mod=lambda s, b, i, q, k: s + (q - k), block_mask=mask
    )
    return h + mixed.mean()


def flexible_exact(h: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    place = torch.arange(queries.shape[2])
    distance = place[:, None] - place
    scores = queries @ queries.transpose(-1, -2) / queries.shape[-1] ** 0.5 + distance
    return h + (scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ queries).mean()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention() -> None:
    """Forward alone: PyTorch has no backward of flex_attention on CPU."""
    queries = torch.randn(1, 2, 32, 16)
    model, exact = small(flexible), small(flexible_exact)
    _, report = judge(
        model,
        x32(),
        queries,
        applied=SMALL_FOLDED,
        train=False,
        exact=exact,
    )
    assert "higher-order operator flex_attention" in report.graphs[0].opaque.values()


# ---- random numbers ------------------------------------------------------------------------------


def draws(h: torch.Tensor, kept: torch.Tensor | None = None) -> Any:
    """Every mask is returned beside the result; one stands in a checkpointed region (``kept``: given)."""
    ones = torch.ones_like(h)
    masks = [F.dropout(ones, 0.3), torch.rand_like(h), torch.bernoulli(ones / 3)]
    masks.append(torch.randint(0, 9, h.shape))

    def region(v: torch.Tensor) -> Any:
        mask = F.dropout(torch.ones_like(v), 0.4) if kept is None else kept.to(v)
        return torch.sin(v * mask), mask

    h, mask = checkpoint(region, h, use_reentrant=False)
    return h, *masks, torch.randn(3), mask


class Drawing(Small):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.enter(x)
        h, *masks = self.hard(self.norm(x))
        mask = F.dropout(torch.ones_like(x), 0.5, self.training)
        return self.head(self.last(x + self.leave(h))), mask, *masks


def trained(function: Any, model: nn.Module, x: torch.Tensor, masks: Any = ()) -> tuple[Any, Any]:
    """The results of two calls, with the masks given to eager; and what is compared of them."""
    torch.manual_seed(3)
    results = []
    for kept in masks or (None, None):
        if kept is not None:
            model.hard = functools.partial(draws, kept=kept)
        results.append(function(x))
    sum(r[0].square().sum() for r in results).backward()
    found = {f"output {i}": r[0].detach() for i, r in enumerate(results)}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return results, found


def test_random_numbers_are_inductors_bit_for_bit() -> None:
    model = randomise(Drawing(draws))
    x = x32(grad=True)
    report = sparsecc.Report()
    torch._dynamo.reset()
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    theirs, _ = trained(torch.compile(one, **INDUCTOR), one, x)
    torch._dynamo.reset()
    mine, got = trained(torch.compile(two, **ours(report)), two, x)
    assert report[TO_RMS].applied == 2
    for a, b in zip(mine, theirs, strict=True):
        assert len(a) == 8
        for mask, other in zip(a[1:], b[1:], strict=True):
            assert torch.equal(mask, other)
    assert not torch.equal(mine[0][1], mine[1][1])
    # The dropped elements of the checkpointed region are the same again in backward.
    kept = [r[-1].detach() for r in mine]
    assert not torch.equal(*kept)
    plain, wide = copies(model)
    _, eager = trained(plain, plain, x, kept)
    _, exact = trained(wide, wide, x.detach().double(), kept)
    no_worse(got, eager, exact, tensors=2 + len(list(model.parameters())))


# ---- autocast ------------------------------------------------------------------------------------


def half_product(h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = h @ h.transpose(-1, -2) @ h
        with torch.autocast("cpu", enabled=False):
            product = product.to(h.dtype) @ torch.eye(D, dtype=h.dtype)
        return F.linear(product, torch.eye(D, dtype=h.dtype)).to(h.dtype)


def test_autocast_inside() -> None:
    judge(small(half_product), x32(grad=True), applied=SMALL)


def test_autocast_around() -> None:
    """The call stands in the region; its gradients are taken outside, as PyTorch advises."""
    model = small(torch.sin)
    report = sparsecc.Report()
    fast = torch.compile(model, **ours(report))

    def under(function: Any) -> Any:
        def call(*args: Any) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result: torch.Tensor = function(*args)
            return result

        return call

    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    agree([(under(fast), model), (under(plain), plain), (wide, wide)], (x32(),), draws=2)
    assert under(fast)(x32()).dtype == torch.bfloat16
    assert report[TO_RMS].applied == 2


# ---- training loops ------------------------------------------------------------------------------


def test_gradient_accumulation() -> None:
    """Four micro-batches, one step, twice; the losses and the weights follow eager's."""
    model = small(torch.sin)
    report = sparsecc.Report()

    def fit(one: nn.Module, function: Any) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        found = {}
        for step in range(2):
            optimizer.zero_grad()
            for micro in range(4):
                generator = torch.Generator().manual_seed(4 * step + micro)
                x = torch.randn(12, 8, generator=generator).to(one.norm.weight)
                loss = function(x).square().mean() / 4
                found[f"loss {step} {micro}"] = loss.detach()
                loss.backward()
            optimizer.step()
        return found | {n: p.detach() for n, p in one.named_parameters()}

    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    fast = torch.compile(model, **ours(report), fullgraph=True)
    no_worse(fit(model, fast), fit(plain, plain), fit(wide, wide), tensors=18)
    assert report[TO_RMS].applied == 2
    assert len(report.graphs) == 1


# ---- where torch.compile stands ------------------------------------------------------------------


def test_compiled_twice() -> None:
    """A compiled module compiled again, by another backend and by ours: one graph, the outer one's."""

    def compile_twice(model: Any, **settings: Any) -> Any:
        inner = torch.compile(model, backend="inductor")
        return torch.compile(torch.compile(inner, **settings), **settings)

    _, report = judge(
        small(torch.sin),
        x32(),
        applied=SMALL_FOLDED,
        train=False,
        compile=compile_twice,
    )
    assert len(report.graphs) == 1


def test_on_a_submodule_a_function_and_in_place() -> None:
    """A layer, a free function over a module, and ``nn.Module.compile()``, all within one model."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = small(torch.sin)
            self.middle = small(torch.cos)
            self.last = small(torch.tanh)
            self.second = self.third = lambda x, inner: inner(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = [self.first(x), self.second(x, self.middle), self.third(x, self.last)]
            return torch.cat(wide, -1)

    model = randomise(Parts()).eval()
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    reports = [sparsecc.Report() for _ in range(3)]
    model.first = torch.compile(model.first, **ours(reports[0]))
    model.second = torch.compile(model.second, **ours(reports[1]))
    model.last.compile(**ours(reports[2]))
    with torch.no_grad():
        for _ in range(2):
            no_worse({"y": model(x32())}, {"y": plain(x32())}, {"y": wide(x64())})
    assert [len(r.graphs) for r in reports] == [1, 1, 1]
    assert [r[TO_RMS].applied for r in reports] == [2] * 3
    assert [r[FOLD].applied for r in reports] == [1] * 3
    assert model.state_dict().keys() != plain.state_dict().keys()  # torch.compile's own prefix
    assert model.last.state_dict().keys() == plain.last.state_dict().keys()


def test_one_compiled_block_serves_all_layers() -> None:
    """Regional compilation: one graph, and folded weights for each layer of its own."""
    model = randomise(PreNorm(layers=3)).eval()
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    report = sparsecc.Report()
    for block in model.blocks:
        block.compile(**ours(report))
    with torch.no_grad():
        for _ in range(2):
            no_worse({"y": model(ids())}, {"y": plain(ids())}, {"y": wide(ids())})
    assert len(report.graphs) == 1
    assert report[FOLD].applied == 2


# ---- torch.func ----------------------------------------------------------------------------------


def per_sample_gradients(model: nn.Module, x: torch.Tensor) -> Any:
    parameters = dict(model.named_parameters())

    def loss(weights: Any, sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (sample[None],)).square().mean()

    return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)


def test_transforms_inside_the_graph() -> None:
    """Gradients of each sample of one network, beside an untransformed run of another."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, D), nn.LayerNorm(D), nn.Linear(D, 2))
            self.outer = small(torch.sin)

        def forward(self, x: torch.Tensor) -> Any:
            value, tangent = torch.func.jvp(lambda v: torch.tanh(v) * v, (x,), (x,))
            return self.outer(x), per_sample_gradients(self.inner, x[:, 0]), value + tangent

    _, report = judge(randomise(Both()), x32(), applied=SMALL, train=False)
    assert "inside a functorch transform" in report.graphs[0].opaque.values()


def test_transforms_around_the_graph() -> None:
    """grad, vmap, jvp and functional_call of a compiled module: PyTorch's answers."""
    model = small(torch.sin).eval()
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    report = sparsecc.Report()
    fast = torch.compile(model, **ours(report))
    fast(x32())  # inside a transform nothing is compiled, but what was compiled is not used either
    swapped = {n: p.detach() * 1.5 for n, p in plain.named_parameters()}

    def views(function: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = {n: p.to(x) for n, p in swapped.items()}
        module = getattr(function, "_orig_mod", function)
        with torch.no_grad():
            found = {"vmap": torch.vmap(function)(x[:, None])}
        found["grad"] = torch.func.grad(lambda v: function(v).square().sum())(x)
        found["jvp"] = torch.func.jvp(module.forward, (x,), (x,))[1]
        name = "_orig_mod." if function is fast else ""
        named = {name + n: w for n, w in weights.items()}
        found["functional_call"] = torch.func.functional_call(function, named, (x,))
        found["after"] = function(x)
        return {n: v.detach() for n, v in found.items()}

    no_worse(views(fast, x32()), views(plain, x32()), views(wide, x64()), tensors=5)
    assert all(g.passes[TO_RMS].applied == 2 for g in report.graphs)


# ---- compiled autograd ---------------------------------------------------------------------------


def test_under_compiled_autograd() -> None:
    """The backward graph comes to the backend as one more graph, and nothing is lost."""
    report = sparsecc.Report()
    model = small(torch.sin)
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    fast = torch.compile(model, **ours(report))
    with torch._dynamo.config.patch(compiled_autograd=True):
        agree([(fast, model), (plain, plain), (wide, wide)], (x32(),))
    assert report.graphs[0].passes[TO_RMS].applied == 2
