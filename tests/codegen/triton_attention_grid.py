"""Triton kernels of ``sparsecc::cached_attention`` against fp64, over sizes, masks, dtypes, special values.

Not collected by itself: ``test_triton.py`` runs it in a process of its own, in Triton's interpreter, which must
be chosen before Triton is imported, or on a GPU.
"""

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
from triton_interpreter import DEVICE, INTERPRETED, as_on_a_gpu, in_turn

from sparsecc.codegen.triton import cached_attention as generator
from sparsecc.codegen.triton import launch_attention as launch
from sparsecc.codegen.triton.few_rows import DTYPES
from sparsecc.runtime.ops.cached_attention import cached_attention_native, meaning

__all__ = ["as_on_a_gpu"]  # a fixture of this module, too

run = launch.run if INTERPRETED else cached_attention_native
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def case(name: str, *sizes: Any, **rest: Any) -> list[Any]:
    return inputs(name, *sizes, **{"device": DEVICE, "heads": 2, **rest})


# The interpreter is slow: there, each spec with the causal mask and two more, and half precision in turn where
# its loads and masks differ from float32's.
PAIRS = list(itertools.product(SPECS, MASKS))
if INTERPRETED:
    others = [mask for mask in MASKS if mask != "causal"]
    PAIRS = [(name, "causal") for name in SPECS]
    PAIRS += [(name, others[(i + k) % 5]) for i, name in enumerate(SPECS) for k in (0, 2)]
HALF = (
    [*itertools.product(("llama", "odd"), ("causal", "minus infinity"))] if INTERPRETED else PAIRS
)
GRID = [(*pair, torch.float32) for pair in PAIRS] + in_turn(HALF, list(DTYPES)[1:])


@pytest.mark.parametrize(("name", "mask", "dtype"), GRID)
def test_as_near_to_fp64_as_aten(name: str, mask: str, dtype: torch.dtype) -> None:
    sizes = ((2, 1, 64, 63), (1, 1, 140, 70), (2, 5, 70, 3))
    if not INTERPRETED or (mask, dtype) == ("causal", torch.float32):
        sizes += ((1, 1, 1, 0), (1, 9, 100, 80))
    check(run, *(case(name, b, t, s, mask, start, dtype=dtype) for b, t, s, start in sizes))


@pytest.mark.parametrize(
    ("mask", "dtype"), in_turn([("none",), ("causal",), ("added",)], list(DTYPES))
)
def test_more_tokens_and_longer_caches_than_one_program_takes(
    mask: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (1, 34, 70, 36), (26, 1, 300, 250)
    if INTERPRETED:  # as few programs, of several tiles each, for one sequence as there are for 26
        sizes = (1, 34, 70, 36), (1, 1, 300, 250)
        monkeypatch.setattr(generator, "_PROGRAMS", 8)
    args = [case("odd", b, t, s, mask, start, dtype=dtype) for b, t, s, start in sizes]
    cut = launch.Problem.of(args[1][0], args[1][7], args[1][9]).configs()[0]
    assert cut.block_s < generator.chunk(2 * sizes[1][0], 300, cut) < 300
    check(run, *args)


CUTS = in_turn([(1,), (7,), (7,), (1,)] if INTERPRETED else [(1,), (7,)], list(DTYPES))


@pytest.mark.parametrize(("tokens", "dtype"), CUTS)
def test_however_it_is_cut(tokens: int, dtype: torch.dtype) -> None:
    args = case("llama", 1, tokens, 300, "minus infinity", 290, dtype=dtype)
    found = launch.Problem.of(args[0], args[7], args[9]).configs()
    assert len(found) >= 3
    for config in found:
        check(lambda *a, c=config: launch.run(*a, config=c), args)


@pytest.mark.parametrize(("tokens", "dtype"), in_turn([(1,), (2,)], list(DTYPES)))
def test_layouts(tokens: int, dtype: torch.dtype) -> None:
    """A cache with tokens first, values inside a larger tensor, angles by sequence, queries not contiguous."""
    args = case("llama", 2, tokens, 70, "causal", 5, dtype=dtype)
    args[3] = args[3].transpose(1, 2).contiguous().transpose(1, 2)
    args[0] = torch.stack([args[0], args[0]], -1)[..., 0]
    angles = torch.randn(2, 1, tokens, 64).to(DEVICE, dtype)
    args[6] = [angles.cos(), torch.stack([angles.sin()] * 2, -1)[..., 1]]
    check(run, args)
    whole = torch.randn(2, 2, 70, 100).to(DEVICE, dtype)
    mine, copy = own(args), own(args)
    mine[4], copy[4] = whole[..., 3:67], whole[..., 3:67].clone()
    outside = whole[..., 67:].clone()
    assert torch.equal(run(*mine), run(*copy))
    assert torch.equal(mine[4], copy[4])
    assert torch.equal(whole[..., 67:], outside)


@dtypes
@pytest.mark.parametrize("mask_dtype", [torch.float32, None])
def test_added_masks_of_both_dtypes(dtype: torch.dtype, mask_dtype: torch.dtype | None) -> None:
    batch = 1 if INTERPRETED else 2
    for tokens in (1, 6):
        args = case("llama", batch, tokens, 40, "minus infinity", 30, dtype=dtype)
        args[7] = args[7].to(mask_dtype or dtype)
        check(run, args)


SPECIAL = float("nan"), float("inf"), -float("inf")
OTHERS = [("one head each", "causal"), ("llama", "minus infinity")]


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else list(DTYPES))
@pytest.mark.parametrize(
    ("place", "special", "pair"), in_turn(itertools.product(range(5), SPECIAL), OTHERS), ids=str
)
def test_special_values_propagate(
    place: int, special: float, pair: tuple[str, str], dtype: torch.dtype
) -> None:
    name, mask = pair
    args = case(name, 2, 3, 70, mask, 60, dtype=dtype, heads=3)
    check_special_values(run, args, place, special)


@pytest.mark.parametrize(
    ("tokens", "special", "dtype"), in_turn(itertools.product((2, 5), SPECIAL), list(DTYPES))
)
def test_special_values_that_later_tokens_alone_see(
    tokens: int, special: float, dtype: torch.dtype
) -> None:
    args = case("llama", 2, tokens, 70, "causal", 60, dtype=dtype, heads=3)
    check_special_values(run, args, 2, special)  # of v at token 1
    got = run(*args)
    assert got[:, 0].isfinite().all()
    assert not got[1, 1:, 6:9, 3].isfinite().any()


@pytest.mark.parametrize(("tokens", "dtype"), in_turn([(1,), (3,)], list(DTYPES)))
def test_what_the_mask_excludes_is_not_read(tokens: int, dtype: torch.dtype) -> None:
    args = case("llama", 2, tokens, 200, "causal", 70, dtype=dtype)
    clean = run(*own(args))
    args[3][:, :, 70 + tokens :], args[4][:, :, 70 + tokens :] = torch.nan, torch.nan
    assert torch.equal(run(*own(args)), clean)


@dtypes
@pytest.mark.parametrize("mask", ["causal", "minus infinity"])
@pytest.mark.parametrize("name", ["one head each", "llama"])
def test_a_query_that_sees_nothing(name: str, mask: str, dtype: torch.dtype) -> None:
    args = case(name, 1, 2, 9, mask, 3, dtype=dtype)
    args[7][:, :, 0] = False if mask == "causal" else -torch.inf
    got = run(*own(args))
    assert torch.equal(got[:, 0], torch.zeros_like(got[:, 0]))
    assert (got[:, 1] != 0).all()
    assert torch.equal(meaning(*own(args))[:, 0], got[:, 0])


@dtypes
@pytest.mark.parametrize("position", [-1, 9, 2**40])
def test_a_position_outside_writes_nothing(position: int, dtype: torch.dtype) -> None:
    args = case("one head each", 2, 2, 9, "none", dtype=dtype)
    args[5] = torch.tensor([4, position], device=DEVICE)
    mine, other = own(args), own(args)
    other[5], other[:3] = other[5][:1], [x[:, :, :1] for x in other[:3]]
    other[6] = [x[:, :, :1] for x in other[6]]
    run(*mine)
    run(*other)
    assert torch.equal(mine[3], other[3])
    assert torch.equal(mine[4], other[4])


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (2, 0)])
def test_empty(batch: int, tokens: int) -> None:
    assert run(*case("llama", batch, tokens, 9, "none")).shape == (batch, tokens, 6, 64)


@pytest.mark.parametrize(("name", "dtype"), in_turn([(n,) for n in SPECS], list(DTYPES)))
def test_every_element_is_written_and_the_same_bits_come(name: str, dtype: torch.dtype) -> None:
    """Memory that is full of NaN when the kernels get it is not there when they return."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, dtype=dtype, device=DEVICE).isnan().all()
        for tokens in (1, 6):
            args = case(name, 1 if INTERPRETED else 2, tokens, 150, "causal", 60, dtype=dtype)
            first, second = (run(*own(args)) for _ in range(2))
            assert first.isfinite().all()
            assert torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces Triton's functions in place")
def test_two_threads_at_once() -> None:
    """Each gets the bits that it gets alone."""
    cases = {name: case(name, 2, 1, 100, "causal", 40) for name in SPECS}
    alone = {name: run(*own(args)) for name, args in cases.items()}
    wrong: list[str] = []

    def work(order: list[str]) -> None:
        found = (
            name for name in order * 20 if not torch.equal(run(*own(cases[name])), alone[name])
        )
        wrong.extend(found)

    threads = [threading.Thread(target=work, args=(o,)) for o in (list(SPECS), list(SPECS)[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


ONLY_HERE = {
    "q is torch.float64, not float32, bfloat16 or float16": lambda a: [a[0].double(), *a[1:]],
    "keys must be torch.float32 on": lambda a: [*a[:3], a[3].bfloat16(), *a[4:]],
    "positions must be int64": lambda a: [*a[:5], a[5].int(), *a[6:]],
    "cos and sin do not fit the batch": lambda a: [
        *a[:6],
        [x.repeat(3, 1, 1, 1) for x in a[6]],
        *a[7:],
    ],
}


@pytest.mark.parametrize("words", [*WRONG, *ONLY_HERE])
def test_wrong_arguments_are_named(words: str) -> None:
    args = case("llama", 1, 1, 70, "causal", 3)
    before = own(args)
    with pytest.raises(RuntimeError, match=words):
        run(*{**WRONG, **ONLY_HERE}[words](args))
    assert torch.equal(args[3], before[3])  # nothing was written
    assert torch.equal(args[4], before[4])
