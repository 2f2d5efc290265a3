"""Triton kernels of ``sparsecc::sparse_ffn`` against fp64, over specs, rows, dtypes, densities, cuts.

Not collected by itself: ``test_sparse_ffn_triton.py`` runs it in a process of its own, interpreted or on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import poisoned
from precision import assert_as_near, same_special_values, squares, wide
from triton_interpreter import DEVICE, INTERPRETED, as_on_a_gpu  # noqa: F401

import sparsecc
from sparsecc.codegen.triton import launch_sparse_ffn as launch
from sparsecc.codegen.triton import live_counts
from sparsecc.codegen.triton import sparse_ffn as generator
from sparsecc.codegen.triton.few_rows import DTYPES
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.sparse_ffn import Spec, hidden, meaning, sparse_ffn_native

CUT = generator.Config(32, 16, 64, 16, 64)  # few programs: the interpreter is slow
SIZE, FEATURES, WIDTH = 37, 70, 41
SPECS = {
    "relu": Spec("relu(p0 + v0)", "a"),
    "cats": Spec("keep(silu(p0), 0.3)", "a * p1"),
    "fatrelu": Spec("fatrelu(p0 / 2, 0.25)", "a * (p1 + v0)"),
    "top": Spec("relu(p0)", "a * p1", select="top 9"),
    "top of squares": Spec("p0", "keep(a * p1, v0)", select="top 9", after="relu(a) * a"),
    "gaussian": Spec("p0", "a * p1", select="gaussian 0.8", after="gelu_tanh(a)"),
    "inputs": Spec("keep(p0, v0)", "a", gate=False),
    "top inputs": Spec("abs(p0)", "a", gate=False, select="top 9"),
}
Case = tuple[Any, ...]


def run(*args: Any) -> torch.Tensor:
    return launch.run(*args, config=CUT) if INTERPRETED else sparse_ffn_native(*args)


def inputs(name: str, rows: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    spec = SPECS[name]
    x = torch.randn(*rows, SIZE if spec.gate else FEATURES)
    weights = [torch.randn(FEATURES, SIZE) / SIZE**0.5 for _ in range(spec.gate + spec.up)]
    weights.append(torch.randn(FEATURES, WIDTH) / FEATURES**0.5)
    operands = [torch.rand(FEATURES) for _ in spec.vectors]

    def cast(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.to(DEVICE, dtype) for t in tensors]

    return *cast([x]), cast(weights), cast(operands), None, spec.text()


def exact(case: Case) -> torch.Tensor:
    x, weights, operands, only, text = case
    return meaning(x.double(), wide(weights), wide(operands), only, text)


def density(case: Case) -> float:
    x, weights, operands, only, text = case
    h = hidden(Spec.of(text), x.double(), wide(weights), wide(operands), only)
    return float((h != 0).double().mean())


def check(*cases: Case, call: Any = run) -> None:
    """Over all ``cases``, the root mean square error is at most 1.5 times that of the meaning."""
    ours, aten = [], []
    for case in cases:
        got, plain, truth = call(*case), meaning(*case), exact(case)
        assert got.shape == plain.shape
        assert got.is_contiguous()
        assert got.dtype is case[0].dtype
        ours.append(squares([got], [truth]))
        aten.append(squares([plain], [truth]))
    assert_as_near(ours, aten, torch.finfo(cases[0][0].dtype).eps / 2)


ROWS = [(1,), (3,), (2, 8)]
GRID = [(name, rows, torch.float32) for name in SPECS for rows in ROWS]
HALF = [(1,), torch.bfloat16], [(3,), torch.float16], [(5,), torch.bfloat16], [(16,), torch.float16]
# Selections are not among them: where two are as near as bfloat16's rounding, others stay.
GRID += [(n, *each) for n, each in zip(("cats", "relu", "fatrelu", "inputs"), HALF, strict=True)]


@pytest.mark.parametrize(("name", "rows", "dtype"), GRID, ids=str)
def test_as_near_to_fp64_as_aten(name: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    case = inputs(name, rows, dtype)
    assert 0.02 < density(case) < 0.98
    check(case)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_every_and_no_neuron_is_live(rows: int) -> None:
    spec = Spec("keep(silu(p0), v0)", "a * p1")
    for threshold, share in ((-1.0, 1.0), (1e6, 0.0)):
        x, weights, *_ = inputs("cats", (rows,))
        case = x, weights, [torch.full((FEATURES,), threshold, device=DEVICE)], None, spec.text()
        assert density(case) == share
        with poisoned():
            check(case)
            assert share or torch.equal(run(*case), torch.zeros(rows, WIDTH, device=DEVICE))


# The interpreter is slow: there, two dtypes of pairs that differ.
PAIRS = [(1, torch.bfloat16), (3, torch.float32), (16, torch.float32), (16, torch.float16)]
PAIRS += [] if INTERPRETED else [(rows, dtype) for rows in (1, 2, 4) for dtype in DTYPES]


@pytest.mark.parametrize(("rows", "dtype"), PAIRS, ids=str)
def test_what_is_measured_is_right_however_it_is_cut(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = inputs("relu", (rows,), dtype)
    found = launch.Problem.of(case[0], case[1], None, case[-1]).configs()
    assert len(found) >= 2
    for config in found:
        check(case, call=lambda *a, c=config: launch.run(*a, config=c))
    monkeypatch.setattr(generator, "_PROGRAMS", 2)  # more than one chunk for a part
    assert generator.parts(3, WIDTH, CUT) == (2, 2)
    check(case, call=lambda *a: launch.run(*a, config=CUT))
    monkeypatch.setattr(generator, "_PROGRAMS", 1)  # and nothing to be combined
    assert generator.parts(3, WIDTH, CUT) == (1, 3)
    check(case, call=lambda *a: launch.run(*a, config=CUT))


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("name", ["cats", "inputs"])
def test_a_core(name: str, rows: int) -> None:
    x, weights, operands, _, text = inputs(name, (rows,))
    core = torch.randperm(FEATURES)[:33].sort().values.to(DEVICE)
    check((x, weights, operands, core, text))
    outside = torch.cat([core, torch.tensor([FEATURES, 2**40], device=DEVICE)])
    got = run(x, weights, operands, outside, text)
    assert torch.equal(got, run(x, weights, operands, core, text))
    none = core[:0]
    assert torch.equal(run(x, weights, operands, none, text), got.new_zeros(got.shape))


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("name", ["cats", "inputs"])
def test_dead_neurons_are_not_read(name: str, rows: int) -> None:
    """Rows of up and down full of NaN, memory full of NaN, and the same bits."""
    x, weights, operands, _, text = inputs(name, (rows,))
    spec, dead = SPECS[name], torch.arange(0, FEATURES, 3)
    if spec.gate:
        weights[0][dead] = 0  # silu(0) is below the threshold
    else:
        x[:, dead] = 0
    clean = run(x, weights, operands, None, text)
    assert (clean != 0).all()
    for weight in weights[spec.gate :]:
        weight[dead] = torch.nan
    with poisoned():
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.equal(run(x, weights, operands, None, text), clean)


def identity(name: str, values: list[float]) -> Case:
    """Where p0 is ``values``, for one row, and the result is h, without rounding."""
    spec, count = (
        Spec(*({"keep": "keep(p0, 0.5)", "fatrelu": "fatrelu(p0, 0.5)"}[name], "a")),
        len(values),
    )
    weight = torch.tensor(values, device=DEVICE)[:, None]
    return (
        torch.ones(1, 1, device=DEVICE),
        [weight, torch.eye(count, device=DEVICE)],
        [],
        None,
        spec.text(),
    )


def test_thresholds_at_their_boundaries() -> None:
    values = [0.5, -0.5, 0.75, -0.75, 0.25, 0.0]
    kept = {"keep": [0, 0, 0.75, -0.75, 0, 0], "fatrelu": [0.5, 0, 0.75, 0, 0, 0]}
    for name, expected in kept.items():
        assert run(*identity(name, values))[0].tolist() == expected


@pytest.mark.parametrize("k", [1, 3, 4, 6, 99])
def test_of_equal_activations_the_first_stay(k: int) -> None:
    values = [1.0, 2.0, 1.0, 3.0, 1.0, -1.0]
    x, weights, *_ = identity("keep", values)
    text = Spec("p0", "a", select=f"top {k}").text()
    got = run(x, weights, [], None, text)
    assert torch.equal(got, exact((x, weights, [], None, text)).float())
    assert int((got != 0).sum()) == min(k, 6)


def test_nan_is_among_the_largest() -> None:
    x, weights, *_ = identity("keep", [1.0, 3.0, torch.nan, 2.0])
    for k in (1, 2):
        text = Spec("p0", "a", select=f"top {k}").text()
        assert run(x, weights, [], None, text).isnan().all()
        assert exact((x, weights, [], None, text)).isnan().all()


SPECIAL = [(name, torch.nan) for name in ("relu", "cats", "gaussian", "top", "inputs")]
SPECIAL += [(name, sign * torch.inf) for name, sign in (("relu", 1), ("inputs", -1))]


@pytest.mark.parametrize(("name", "special"), SPECIAL)
def test_special_values_propagate(name: str, special: float) -> None:
    """Infinities where the meaning does not multiply those of dead neurons with zero."""
    case = inputs(name, (3,))
    case[0][1, 5] = special
    got = run(*case)
    same_special_values([got], [exact(case)])
    assert not got[1].isfinite().all()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", SPECS)
def test_the_same_bits_run_to_run_whatever_is_in_memory(name: str) -> None:
    case = inputs(name, (6,) if "p1" in SPECS[name].hidden else (2,))
    first = run(*case)
    with poisoned():
        assert torch.equal(run(*case), first)
        assert first.isfinite().all()


def test_inputs_that_are_not_contiguous() -> None:
    x, weights, operands, _, text = inputs("fatrelu", (3,))
    x, weights = (
        x.t().contiguous().t(),
        [w.repeat(1, 2)[:, ::2].t().contiguous().t() for w in weights],
    )
    check((x, weights, [torch.stack([o, o], -1)[..., 0] for o in operands], None, text))


@pytest.mark.parametrize(
    ("rows", "size", "features", "width"), [(0, 8, 5, 3), (2, 8, 0, 3), (2, 8, 5, 0)]
)
def test_empty(rows: int, size: int, features: int, width: int) -> None:
    weights = [torch.randn(features, size), torch.randn(features, width)]
    args = torch.randn(rows, size).to(DEVICE), [w.to(DEVICE) for w in weights], [], None
    text = Spec("relu(p0)", "a").text()
    assert torch.equal(run(*args, text), meaning(*args, text))


WRONG = {
    "gate is not .* 70 neurons": lambda x, w, o, c: (x, [w[0][:, 1:], *w[1:]], o, c),
    "up is not .* 70 neurons": lambda x, w, o, c: (x, [w[0], w[1][1:], w[2]], o, c),
    "the spec has 3 weights, not 2": lambda x, w, o, c: (x, w[1:], o, c),
    "all tensors must be torch.bfloat16": lambda x, w, o, c: (x.bfloat16(), w, o, c),
    "x is torch.float64, not float32": lambda x, w, o, c: (x.double(), w, o, c),
    "v0 has not 70 elements": lambda x, w, o, c: (x, w, [o[0][1:]], c),
    "v0 is not given": lambda x, w, o, c: (x, w, [], c),
    "18 rows; a kernel takes 16": lambda x, w, o, c: (x.repeat(9, 1), w, o, c),
    "may be live must be int64": lambda x, w, o, c: (x, w, o, torch.ones(3, device=x.device)),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    *given, text = inputs("fatrelu", (2,))
    with pytest.raises(RuntimeError, match=words):
        run(*WRONG[words](*given), text)


def test_a_core_beside_a_selection_is_refused() -> None:
    x, weights, operands, _, text = inputs("top", (2,))
    with pytest.raises(ValueError, match="a core beside a selection"):
        run(x, weights, operands, torch.arange(5, device=DEVICE), text)


ROUNDED = {  # how gate, up and down are kept, and rows; F is 70, as above
    "int8 int8 int8": 1,
    "int8s int8s int4g32": 3,
    "int8x32 int8x64 int8": 16,
    "int8x32 int8x32 int4g64z": 3,
    "int4g32z int4g32 int4g32": 16,
    "int4g64 int4g32z dense": 1,
    "int4g32a8 int4g64za8 int4g32z": 3,
    "int4g32za8 int4g32a8 int8": 16,
    "int4g64za8 int8 bf16": 1,
    "dense dense int8": 3,
    "dense int8 int4g32": 16,
}


def rounded(
    kept: str, rows: int, dtype: torch.dtype = torch.float32, threshold: float = 0.3
) -> Case:
    """Weights of 128 inputs or, where no format has groups, of an odd number; every other neuron biased."""
    names = tuple(kept.split())
    size = 128 if any("x" in n or "4" in n for n in names[:2]) else 37
    width = 192 if "int4" in names[2] else 41
    shapes = [(FEATURES, size), (FEATURES, size), (FEATURES, width)]
    weights: list[torch.Tensor] = []
    for name, shape in zip(names, shapes, strict=True):
        weight = torch.randn(shape) / shape[1] ** 0.5
        parts = formats.quantize(weight, name)
        weights += [p.to(DEVICE, dtype if name == "dense" else p.dtype) for p in parts]
    x = torch.randn(rows, size) * (30 if "int8s" in names else 1)
    spec = Spec(f"keep(silu(p0), {threshold})", "a * (p1 + v0)", formats=names)
    return x.to(DEVICE, dtype), weights, [torch.rand(FEATURES).to(DEVICE, dtype)], None, spec.text()


def exact_of_rounded(case: Case) -> torch.Tensor:
    """In fp64, but for scales, which are what they are."""
    x, weights, operands, only, text = case
    kept = [w.double() if w.dtype is x.dtype and w.dim() == 2 else w for w in weights]
    return meaning(x.double(), kept, wide(operands), only, text)


def check_rounded(case: Case) -> None:
    got, plain, truth = run(*case), meaning(*case), exact_of_rounded(case)
    eps = torch.finfo(case[0].dtype).eps / 2
    assert_as_near([squares([got], [truth])], [squares([plain], [truth])], eps)


@pytest.mark.parametrize(("kept", "rows"), ROUNDED.items())
def test_rounded_weights(kept: str, rows: int) -> None:
    case = rounded(kept, rows)
    assert (exact_of_rounded(case) != 0).any()
    check_rounded(case)
    first = run(*case)
    with poisoned():
        assert torch.equal(run(*case), first)


@pytest.mark.parametrize(
    ("kept", "rows", "dtype"),
    [
        ("int4g32 int4g32z int4g32z", 16, torch.bfloat16),
        ("int8 int8x32 int8", 3, torch.float16),
        ("bf16 bf16 bf16", 16, torch.float16),
    ],
)
def test_rounded_weights_under_half_precision(kept: str, rows: int, dtype: torch.dtype) -> None:
    check_rounded(rounded(kept, rows, dtype))


@pytest.mark.parametrize("rows", [1, 16])
def test_every_and_no_neuron_with_rounded_weights_is_live(rows: int) -> None:
    kept = "int4g32za8 int8 int4g32z"
    check_rounded(rounded(kept, rows, threshold=-1.0))
    case = rounded(kept, rows, threshold=1e6)
    assert not run(*case).any()


@pytest.mark.parametrize("kept", ["int8 int8 int8", "int8s int8s int8", "int8x32 int4g32a8 int8"])
def test_special_values_stay_in_their_row(kept: str) -> None:
    case = rounded(kept, 3)
    case[0][1, 5] = torch.nan
    got = run(*case)
    same_special_values([got], [exact_of_rounded(case)])
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_rounded_weights_that_do_not_fit_are_named() -> None:
    x, weights, operands, _, text = rounded("int8 int8 int8", 2)
    for i, wrong, words in (
        (1, weights[1][1:], "gate: int8: scale is"),
        (2, weights[2].float(), "up: int8: weight is torch.float32"),
    ):
        given = [*weights[:i], wrong, *weights[i + 1 :]]
        with pytest.raises(RuntimeError, match=words):
            run(x, given, operands, None, text)


def test_live_neurons_are_counted_where_a_label_is() -> None:
    sparsecc.reset_live_neurons()
    x, weights, operands, _, text = rounded("int8 int8 int8", 3)
    plain = run(x, weights, operands, None, text)
    assert sparsecc.live_neurons() == {}
    labelled = replace(Spec.of(text), label="a layer")
    live = hidden(Spec.of(text), x, weights, operands) != 0
    for _ in range(2):
        assert torch.equal(run(x, weights, operands, None, labelled.text()), plain)
    counts = live_counts.counters()["a layer"]
    assert counts == [(2, 6, 2 * int(live.sum()), 2 * int(live.any(0).sum()), FEATURES)]
    assert sparsecc.live_neurons() == {"a layer": float(live.sum()) / live.numel()}
    sparsecc.reset_live_neurons()
    assert sparsecc.live_neurons() == {}
