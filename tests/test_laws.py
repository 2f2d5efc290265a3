"""The law of every registered pass: proved by SymPy where its operators allow, tried in fp64 by Hypothesis.

A pass without a law fails here, by construction.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws_symbolic import holds_symbolically

from sparsecc.passes import registry
from sparsecc.passes.base import Exactness, Example

PASSES = registry.all_passes()
EXAMPLES = [
    pytest.param(name, example, id=f"{name}-{i}")
    for name, cls in PASSES.items()
    for i, example in enumerate(cls.examples())
]


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_states_its_law(name: str) -> None:
    cls = PASSES[name]
    assert cls.name == name
    assert cls.law
    assert cls.source
    assert cls.examples(), "a pass without an executable law cannot be trusted"
    assert cls.__doc__
    assert cls.exactness is not Exactness.LOSSY or name not in registry.PRESETS["default"]


def choices(example: Example) -> list[dict[str, Any]]:
    return [
        dict(zip(example.options, values, strict=True))
        for values in itertools.product(*example.options.values())
    ]


@pytest.mark.parametrize(("name", "example"), [p for p in EXAMPLES if p.values[1].symbolic])
@pytest.mark.parametrize("d", [2, 3])
def test_symbolically(name: str, example: Example, d: int) -> None:
    sizes = {"n": 1, "d": d, "k": 2, "m": 1}
    assert all(holds_symbolically(example, sizes, options) for options in choices(example)[:1])


def test_every_rewrite_is_proved_symbolically() -> None:
    assert {n for n in registry.REWRITES if any(e.symbolic for e in PASSES[n].examples())} == set(
        registry.REWRITES
    )


def test_the_prover_sees_a_wrong_law() -> None:
    example = PASSES["fold-norm-affine"].examples()[0]

    def wrong(u: Any, W: Any, b: Any, V: Any, g: Any, c: Any) -> Any:
        first = u @ (W * g).transpose(0, 1) + (b + W.sum(-1))  # forgot c
        return first, u @ (V * g).transpose(0, 1) + (V * c).sum(-1)

    broken = Example(example.before, wrong, example.inputs, example.weights, symbolic=True)
    assert not holds_symbolically(broken, {"n": 1, "d": 2, "k": 2, "m": 1}, {})
    with pytest.raises(AssertionError):
        check_numerically(broken, 0, {"n": 2, "d": 4, "k": 3, "m": 2}, 0.0, False)


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 5),
    d=st.integers(2, 9),
    k=st.integers(1, 6),
    m=st.integers(1, 4),
    amplitude=st.sampled_from([-8.0, -3.0, 0.0, 3.0, 8.0]),
    strided=st.booleans(),
)
def test_numerically(
    name: str,
    example: Example,
    seed: int,
    n: int,
    d: int,
    k: int,
    m: int,
    amplitude: float,
    strided: bool,
) -> None:
    # Attention and gated examples name other sizes; an even feature size serves those that halve it.
    named = {s for shape in example.inputs.values() for s in shape}
    sizes = {s: {"n": n, "d": d, "k": k, "m": m}.get(s, 2 * k) for s in named}
    check_numerically(example, seed, sizes, amplitude, strided)


def check_numerically(
    example: Example, seed: int, sizes: dict[str, int], amplitude: float, strided: bool
) -> None:
    """Before and after in fp64: random inputs, huge and tiny ones, near-zero rows, odd strides."""
    generator = torch.Generator().manual_seed(seed)
    for options in choices(example):
        inputs = {}
        for name, shape in example.inputs.items():
            size = [sizes[s] for s in shape]
            value = torch.randn(size, generator=generator, dtype=torch.float64) * 10**amplitude
            if strided and len(size) > 1:
                value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
            if name not in example.weights and len(size) > 1:
                value[0] *= 1e-9
            inputs[name] = value
        before = example.before(*(v.clone() for v in inputs.values()), **options)
        after = example.after(*(v.clone() for v in inputs.values()), **options)
        befores = before if isinstance(before, tuple) else (before,)
        afters = after if isinstance(after, tuple) else (after,)
        for a, b in zip(befores, afters, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            scale = a.abs().max().clamp_min(1e-300)
            assert float((a - b).abs().max() / scale) < 1e-9
