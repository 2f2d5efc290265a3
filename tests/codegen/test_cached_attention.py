"""Kernels of ``sparsecc::cached_attention`` against fp64: shapes, layouts, masks, special values, threads."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch

from sparsecc.codegen.cpp import cached_attention as generator
from sparsecc.runtime.ops.cached_attention import (
    Spec,
    cached_attention,
    cached_attention_native,
    meaning,
    rotate,
)

SPECS = {
    "llama": Spec(64, 64, 3, True),
    "one head each": Spec(32, 32, 1, True),
    "odd": Spec(33, 17, 2, False),
    "one": Spec(1, 1, 1, False),
    "values wider": Spec(48, 80, 4, True),
    "large": Spec(256, 256, 2, True),
}
MASKS = ("none", "causal", "padded", "added", "minus infinity", "by head")


def inputs(name: str, batch: int, tokens: int, length: int, mask: str, start: int = 0) -> list[Any]:
    spec, heads = SPECS[name], 3
    q = torch.randn(batch, tokens, heads * spec.groups, spec.size).transpose(1, 2)
    k = torch.randn(batch, tokens, heads, spec.size).transpose(1, 2)
    v = torch.randn(batch, tokens, heads, spec.value_size).transpose(1, 2)
    keys = torch.randn(batch, heads, length, spec.size)
    values = torch.randn(batch, heads, length, spec.value_size)
    positions = torch.arange(start, start + tokens)
    angles = torch.randn(1, 1, tokens, spec.size)
    rotation = [angles.cos(), angles.sin()] if spec.rotary else []
    args = [q, k, v, keys, values, positions, rotation, _mask(mask, q, keys, positions)]
    return [*args, spec.size**-0.5, spec.text()]


def _mask(kind: str, q: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> Any:
    batch, heads, tokens, _ = q.shape
    length = keys.shape[2]
    if kind == "none":
        return None
    causal = torch.arange(length)[None] <= positions[:, None]
    if kind == "causal":
        return causal[None, None]
    if kind == "padded":
        padding = torch.arange(length)[None] >= torch.arange(batch)[:, None]
        return (causal[None] & padding[:, None])[:, None].expand(batch, heads, tokens, length)
    if kind == "by head":
        return torch.randn(heads, 1, length)
    bias = torch.randn(batch, 1, tokens, length)
    return bias if kind == "added" else bias.masked_fill(~causal, -torch.inf)


def wide(args: list[Any]) -> list[Any]:
    return [own(a, torch.float64) for a in args]


def own(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with the same strides, so that the caches of another call stay as they were."""
    if isinstance(value, list):
        return [own(v, dtype) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value.clone()


def seen_only(*args: Any) -> torch.Tensor:
    """The meaning, query by query over the keys that its mask lets it see: what a kernel may read."""
    whole = meaning(*args)  # writes the cache
    q, _, _, keys, values, _, rotation, mask, scale, _ = args
    q = rotate(q, *rotation)
    groups = q.shape[1] // keys.shape[1]
    allowed = mask.expand(*q.shape[:3], keys.shape[2])
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        seen = allowed[b, h, t]
        scores = keys[b, h // groups, seen] @ q[b, h, t] * scale
        whole[b, t, h] = torch.softmax(scores, 0) @ values[b, h // groups, seen]
    return whole


def check(*cases: list[Any]) -> None:
    """Over all cases, the root mean square error is at most 1.5 times that of the meaning; caches are right."""
    ours, aten = [], []
    for args in cases:
        generator.load(Spec.of(args[-1]))
        mine, plain, exact = own(args), own(args), wide(args)
        got, expected, truth = cached_attention_native(*mine), meaning(*plain), meaning(*exact)
        assert got.shape == truth.shape
        assert got.is_contiguous()
        scale = truth.square().mean()
        ours.append((got - truth).square().mean() / scale)
        aten.append((expected - truth).square().mean() / scale)
        for i in (3, 4):
            unit = torch.finfo(torch.float32).eps * exact[i].abs().amax()
            assert (mine[i] - exact[i]).abs().amax() <= 2 * unit
            untouched = torch.ones(args[3].shape[2], dtype=torch.bool).index_fill(0, args[5], False)
            assert torch.equal(mine[i][:, :, untouched], args[i][:, :, untouched])
    bound = 1.5 * torch.stack(aten).mean().sqrt()
    assert torch.stack(ours).mean().sqrt() <= max(bound, 2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("mask", MASKS)
def test_as_near_to_fp64_as_aten(name: str, mask: str) -> None:
    sizes = itertools.product(
        (1, 3), ((1, 1, 0), (1, 64, 63), (1, 200, 70), (5, 77, 3), (16, 130, 99))
    )
    check(*(inputs(name, b, t, length, mask, start) for b, (t, length, start) in sizes))


def test_layouts() -> None:
    """A cache with tokens first, values inside a larger tensor, angles by sequence, queries not contiguous."""
    args = inputs("llama", 2, 2, 70, "causal", 5)
    args[3] = args[3].transpose(1, 2).contiguous().transpose(1, 2)
    args[0] = torch.stack([args[0], args[0]], -1)[..., 0]
    angles = torch.randn(2, 1, 2, 64)
    args[6] = [angles.cos(), torch.stack([angles.sin()] * 2, -1)[..., 1]]
    check(args)
    whole = torch.randn(2, 3, 70, 100)
    mine = own(args)
    mine[4] = whole[..., 3:67]
    copy = own(args)
    copy[4] = whole[..., 3:67].clone()
    assert torch.equal(cached_attention_native(*mine), cached_attention_native(*copy))
    assert torch.equal(mine[4], copy[4])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(5))
def test_special_values_propagate(special: float, place: int) -> None:
    args = inputs("llama", 2, 3, 70, "causal", 60)
    generator.load(SPECS["llama"])
    args[place][1, 2, 1, 3] = special
    got, expected = cached_attention_native(*own(args)), seen_only(*wide(args))
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isfinite(), expected.isfinite())


def test_what_the_mask_excludes_is_not_read() -> None:
    args = inputs("llama", 2, 1, 200, "causal", 70)
    generator.load(SPECS["llama"])
    clean = cached_attention_native(*own(args))
    args[3][:, :, 71:], args[4][:, :, 71:] = torch.nan, torch.nan
    assert torch.equal(cached_attention_native(*own(args)), clean)


def test_a_query_that_sees_nothing() -> None:
    generator.load(SPECS["llama"])
    args = inputs("llama", 1, 2, 9, "causal", 3)
    args[7] = args[7].clone()
    args[7][:, :, 0] = False
    got = cached_attention_native(*own(args))
    assert torch.equal(got[:, 0], torch.zeros_like(got[:, 0]))
    assert torch.equal(meaning(*own(args))[:, 0], got[:, 0])


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (2, 0)])
def test_empty(batch: int, tokens: int) -> None:
    generator.load(SPECS["llama"])
    args = inputs("llama", batch, tokens, 9, "none")
    assert cached_attention_native(*args).shape == (batch, tokens, 9, 64)


def test_the_same_bits_run_to_run_and_for_any_number_of_threads() -> None:
    generator.load(SPECS["llama"])
    args = inputs("llama", 4, 2, 500, "causal", 400)
    before, results = torch.get_num_threads(), []
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(cached_attention_native(*own(args)))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    assert results[0].isfinite().all()
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_two_threads_at_once() -> None:
    names = list(SPECS)
    cases = {name: inputs(name, 2, 1, 100, "causal", 40) for name in names}
    for spec in SPECS.values():
        generator.load(spec)
    alone = {name: cached_attention_native(*own(args)) for name, args in cases.items()}
    wrong: list[str] = []

    def work(order: list[str]) -> None:
        wrong.extend(
            name
            for name in order * 20
            if not torch.equal(cached_attention_native(*own(cases[name])), alone[name])
        )

    threads = [threading.Thread(target=work, args=(o,)) for o in (names, names[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("operator", [cached_attention, cached_attention_native], ids=str)
def test_opcheck(operator: Any) -> None:
    generator.load(SPECS["llama"])
    args = inputs("llama", 2, 1, 9, "causal", 3)
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def _without_last(a: list[Any], i: int) -> list[Any]:
    return [*a[:i], a[i][..., :-1], *a[i + 1 :]]


WRONG = {
    "position 70 is outside the cache of 70": lambda a: [*a[:5], a[5] + 67, *a[6:]],
    "position -1 is outside": lambda a: [*a[:5], a[5] - 4, *a[6:]],
    "sizes of keys": lambda a: _without_last(a, 3),
    "sizes of v ": lambda a: _without_last(a, 2),
    "not of the sizes that the kernel was made for": lambda a: _without_last(
        _without_last(a, 2), 4
    ),
    "a rotation is missing": lambda a: [*a[:6], [], *a[7:]],
    "a rotation is cos and sin": lambda a: [*a[:6], a[6][:1], *a[7:]],
    "does not broadcast": lambda a: [*a[:7], a[7][..., :-1], *a[8:]],
    "must be float32": lambda a: [a[0].double(), *a[1:]],
    "mask must be bool or float32": lambda a: [*a[:7], a[7].double(), *a[8:]],
    "features of keys must be contiguous": lambda a: [*a[:3], a[3].mT.contiguous().mT, *a[4:]],
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    generator.load(SPECS["llama"])
    args = inputs("llama", 1, 1, 70, "causal", 3)
    before = own(args)
    with pytest.raises(RuntimeError, match=words):
        cached_attention_native(*WRONG[words](args))
    assert torch.equal(args[3], before[3])  # nothing was written
    assert torch.equal(args[4], before[4])


@pytest.mark.parametrize(
    "text", ["{", '{"size": 2}', Spec(3, 1, 1, True).text(), Spec(0, 1, 1, False).text()]
)
def test_a_text_that_is_no_spec(text: str) -> None:
    with pytest.raises(ValueError, match="cached_attention"):
        Spec.of(text)


def test_the_source_says_what_it_computes() -> None:
    text = generator.source(SPECS["llama"])
    head = text.split("#include")[0]
    assert "64 features of a key, 64 of a value, 3 query heads a head of the cache" in head
    assert "softmax over s of (scale R q[t] . keys[s] + mask[t, s]) times values[s]" in head
    assert generator.load(SPECS["llama"]).with_suffix(".cpp").read_text() == text
