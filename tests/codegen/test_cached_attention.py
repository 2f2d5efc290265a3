"""Kernels of ``sparsecc::cached_attention`` against fp64: shapes, layouts, masks, special values, threads."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from cached_attention_cases import (
    MASKS,
    SPECS,
    WRONG,
    check,
    check_special_values,
    inputs,
    own,
)

from sparsecc.codegen.cpp import cached_attention as generator
from sparsecc.runtime.ops.cached_attention import (
    Spec,
    cached_attention,
    cached_attention_native,
    meaning,
)


def run(*args: Any) -> torch.Tensor:
    generator.load(Spec.of(args[-1]))
    return cached_attention_native(*args)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("mask", MASKS)
def test_as_near_to_fp64_as_aten(name: str, mask: str) -> None:
    sizes = itertools.product(
        (1, 3), ((1, 1, 0), (1, 64, 63), (1, 200, 70), (5, 77, 3), (16, 130, 99))
    )
    check(run, *(inputs(name, b, t, length, mask, start) for b, (t, length, start) in sizes))


def test_layouts() -> None:
    """A cache with tokens first, values inside a larger tensor, angles by sequence, queries not contiguous."""
    args = inputs("llama", 2, 2, 70, "causal", 5)
    args[3] = args[3].transpose(1, 2).contiguous().transpose(1, 2)
    args[0] = torch.stack([args[0], args[0]], -1)[..., 0]
    angles = torch.randn(2, 1, 2, 64)
    args[6] = [angles.cos(), torch.stack([angles.sin()] * 2, -1)[..., 1]]
    check(run, args)
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
    check_special_values(run, args, place, special)


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


ONLY_HERE = {
    "position 70 is outside the cache of 70": lambda a: [*a[:5], a[5] + 67, *a[6:]],
    "position -1 is outside": lambda a: [*a[:5], a[5] - 4, *a[6:]],
    "must be float32": lambda a: [a[0].double(), *a[1:]],
}


@pytest.mark.parametrize("words", [*WRONG, *ONLY_HERE])
def test_wrong_arguments_are_named(words: str) -> None:
    generator.load(SPECS["llama"])
    args = inputs("llama", 1, 1, 70, "causal", 3)
    before = own(args)
    with pytest.raises(RuntimeError, match=words):
        cached_attention_native(*{**WRONG, **ONLY_HERE}[words](args))
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
