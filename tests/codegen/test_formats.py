"""Kernels over weights in every format against fp64: sizes and rows, extremes, instruction sets."""

from __future__ import annotations

import pathlib
import platform
from collections.abc import Sequence

import kernel_cases
import pytest
import torch
from kernel_cases import Case, equal, poisoned
from precision import same_special_values, wide

from sparsecc.codegen.cpp import few_rows as generator
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec, few_rows, few_rows_native, meaning, normalized
from sparsecc.runtime.ops.formats import Format

NAMES = formats.NAMES
ONE = {name: Spec("none", 0.0, ("t0 + silu(p0)",), (name,)) for name in NAMES}
MIXED = {
    "normed": Spec(
        "rms",
        1e-6,
        ("silu(p0) * p1 + v0", "p2", "p3 + t1"),
        ("int4g32a8", "int4g32a8", "int4g32z", "dense"),
    ),
    "all": Spec(
        "layer",
        1e-5,
        ("p0 * p1", "p2 * p3", "p4 - p5"),
        ("int8", "bf16", "int4g64", "int4g32za8", "int4g128a8", "int4g128z"),
    ),
    "both int8": Spec("none", 0.0, ("silu(p0) - p1",), ("int8s", "int8")),
    "groups": Spec("rms", 1e-6, ("p0 - p1", "p2"), ("int8x64", "int8", "int8x32")),
}
ROWS = [(1,), (2,), (3,), (5,), (16,), (2, 1, 3), (53,)]  # from 16, or 32 with int8, in tiles
FEATURES = 7  # a block of weights and three left over
# Instruction sets to build for, where this CPU has them.
SETS = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "f16c", "fma"},
    "skylake-avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
}


def sizes(spec: Spec) -> list[int]:
    group = max(form.multiple for form in spec.kept)
    return [n * group for n in (1, 2, 3, 5, 9)] if group > 1 else [1, 3, 16, 33, 64, 96, 577]


def settled(spec: Spec, x: torch.Tensor) -> torch.Tensor:
    """``x`` without rows where an activation in int8 lies so near to a tie that fp32 may round otherwise."""
    if not any(form.rounds_activations for form in spec.kept):
        return x
    while True:
        y = normalized(spec, x.double())
        levels = []
        for form in {form.together: form for form in spec.kept if form.rounds_activations}.values():
            split = y.unflatten(-1, (-1, form.together)) if form.together else y
            levels.append((split / (split.abs().amax(-1, keepdim=True) / 127)).reshape(y.shape))
        if "int8s" in spec.formats and spec.norm != "none":
            levels.append(y)
        ties = [((each - each.floor() - 0.5).abs() < 3e-4).any(-1) for each in levels]
        tie = torch.stack(ties).any(0)
        if not tie.any():
            return x
        x = torch.where(tie[..., None], drawn(spec, x.shape).to(x.dtype), x)


def drawn(spec: Spec, shape: Sequence[int]) -> torch.Tensor:
    """Activations; where they come divided by their step, some are larger than int8."""
    return torch.randn(shape) * (60 if "int8s" in spec.formats else 1)


def inputs(
    spec: Spec, rows: tuple[int, ...], size: int, dtype: torch.dtype = torch.float32
) -> Case:
    x = settled(spec, drawn(spec, (*rows, size)).to(dtype))
    weights: list[torch.Tensor] = []
    for form in spec.kept:
        weight = torch.randn(FEATURES, size) / size**0.5
        weights += formats.quantize(weight.to(dtype), form.name)
    operands = []
    for output in range(len(spec.outputs)):
        for operand in spec.operands(output):
            shape = (FEATURES,) if operand[0] == "v" else (*rows, FEATURES)
            operands.append(torch.randn(shape).to(dtype))
    return x, weights, operands


def call(spec: Spec, case: Case) -> list[torch.Tensor]:
    return few_rows_native(*case, spec.text())


def exact(spec: Spec, case: Case) -> list[torch.Tensor]:
    x, weights, operands = case
    return meaning(x.double(), wide(weights), wide(operands), spec.text())


# ---- the grid ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_as_near_to_fp64_as_aten(name: str, rows: tuple[int, ...]) -> None:
    generator.load(ONE[name])
    kernel_cases.check(ONE[name], *(inputs(ONE[name], rows, size) for size in sizes(ONE[name])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_several_formats_at_once(name: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    generator.load(MIXED[name], dtype)
    cases = [inputs(MIXED[name], rows, size, dtype) for size in sizes(MIXED[name])]
    kernel_cases.check(MIXED[name], *cases)


@pytest.mark.parametrize("name", MIXED)
def test_inputs_that_are_not_contiguous(name: str) -> None:
    generator.load(MIXED[name])
    x, weights, operands = inputs(MIXED[name], (3,), 256)
    strided = [torch.stack([w, w], -1)[..., 0] for w in weights]
    case = x.t().contiguous().t(), strided, [torch.stack([o, o], -1)[..., 0] for o in operands]
    assert not any(t.is_contiguous() for t in (case[0], *strided))
    assert equal(call(MIXED[name], case), call(MIXED[name], (x, weights, operands)))


@pytest.mark.parametrize("name", MIXED)
def test_addresses_that_are_not_aligned(name: str) -> None:
    generator.load(MIXED[name])
    x, weights, operands = inputs(MIXED[name], (2,), 256)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t)

    case = shifted(x), [shifted(w) for w in weights], operands
    assert equal(call(MIXED[name], case), call(MIXED[name], (x, weights, operands)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (65, 0), (2, 0, 128)])
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    generator.load(ONE[name])
    weights = list(formats.quantize(torch.randn(FEATURES, shape[-1]), name))
    case = torch.randn(shape), weights, [torch.randn(*shape[:-1], FEATURES)]
    assert equal(call(ONE[name], case), meaning(*case, ONE[name].text()))


# ---- special values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [(3,), (65,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_special_values_propagate(name: str, rows: tuple[int, ...], special: float) -> None:
    spec = Spec("none", 0.0, ("t0 + p0",), (name,))
    generator.load(spec)
    for place in ("x", "operand", "weight"):
        case = x, weights, operands = inputs(spec, rows, 256)
        if place == "x":
            x[1, 5] = special
        elif place == "operand":
            operands[0][1, 2] = special
        else:
            weights[0 if weights[0].is_floating_point() else 1][2].view(-1)[-1:] = special
        got, expected = call(spec, case), exact(spec, case)
        if place == "weight" and Format.of(name).kind == "int4":
            # Sums of a group's parts meet before or behind an infinite scale: inf - inf is NaN in some order.
            assert all(
                torch.equal(g.isfinite(), e.isfinite()) for g, e in zip(got, expected, strict=True)
            )
        else:
            same_special_values(got, expected)


@pytest.mark.parametrize("rows", [(3,), (65,)], ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if Format.of(n).rounds_activations])
def test_rows_without_a_scale(name: str, rows: tuple[int, ...]) -> None:
    """Zeros stay zeros; what is too small for a scale in fp32 is as if it were zero."""
    spec = Spec("none", 0.0, ("p0",), (name,))
    generator.load(spec)
    x, weights, _ = inputs(spec, rows, 256)
    x[0], x[1] = 0, 1e-45
    (got,) = call(spec, (x, weights, []))
    assert got[:2].eq(0).all()
    assert got[2].ne(0).any()


# ---- exactness -----------------------------------------------------------------------------------------


def extremes(name: str, size: int) -> Case:
    """Sums as large as they can be, with scales of 1: int32 and no step on the way may saturate."""
    x = torch.full((3, size), 127.0)
    x[1], x[2, ::2] = -127.0, -127.0
    if Format.of(name).kind == "int8":
        weight = torch.full((4, size), -128, dtype=torch.int8)
        weight[1], weight[2, ::2], weight[3, 1::3] = 127, 127, 0
        return x, [weight, torch.ones(4)], []
    form = Format.of(name)
    levels = torch.zeros(4, size, dtype=torch.uint8)
    levels[1], levels[2, ::2], levels[3, 1::3] = 15, 15, 9
    groups = torch.ones(4, size // form.group).half()
    zero = [groups * 3] if form.zero else []
    return x, [formats.pack(levels, form.group), groups, *zero], []


@pytest.mark.parametrize("name", [n for n in NAMES if Format.of(n).rounds_activations])
@pytest.mark.parametrize("size", [128, 640, 65536])
def test_integer_sums_are_exact(name: str, size: int) -> None:
    spec = Spec("none", 0.0, ("p0",), (name,))
    generator.load(spec)
    check_exact(spec, size)


def check_exact(spec: Spec, size: int) -> None:
    x, weights, _ = extremes(spec.formats[0], size)
    whole = formats.dequantize(spec.formats[0], weights, torch.float64)
    form, unit = Format.of(spec.formats[0]), torch.finfo(torch.float32).eps / 2
    # Sums of groups are added in fp32: those of nibbles are small integers, those of bytes round in each step.
    terms = 16 if form.kind == "int4" else size // form.together if form.together else 0
    limit = terms * unit
    for rows in (x, x.repeat(22, 1)):
        (got,) = call(spec, (rows, weights, []))
        expected = rows.double() @ whole.T
        error = (got.double() - expected.float().double()).abs()
        assert (error <= limit * (rows.double().abs() @ whole.abs().T)).all()


@pytest.mark.parametrize("name", ["int8", "int8s"])
def test_activations_round_to_nearest_ties_to_even(name: str) -> None:
    spec = Spec("none", 0.0, ("p0",), (name,))
    generator.load(spec)
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.49999997, 3.5000002]])
    one = torch.eye(9, dtype=torch.int8)
    (got,) = call(spec, (x, [one, torch.ones(9)], []))
    assert got.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 0.0, 4.0]]


def test_activations_of_a_known_step_are_clamped() -> None:
    spec = Spec("none", 0.0, ("p0",), ("int8s",))
    generator.load(spec)
    inf = float("inf")
    x = torch.tensor([[127.4, 127.5, -127.5, -128.0, 1e9, -3e38, inf, -inf, 3.0]])
    one, step = torch.eye(9, dtype=torch.int8), torch.full((9,), 0.25)
    for rows in (x, x.repeat(70, 1)):
        got = call(spec, (rows, [one, step], []))
        levels = torch.tensor([127.0, 127, -127, -127, 127, -127, 127, -127, 3])
        assert got[0].eq(levels * 0.25).all()
        assert equal(got, meaning(rows, [one, step], [], spec.text()))


@pytest.mark.parametrize("name", ["int8", "int8s"])
@pytest.mark.parametrize("features", [7, 200])
def test_few_and_many_rows_have_the_same_bits(name: str, features: int) -> None:
    spec = Spec("none", 0.0, ("p0",), (name,))
    generator.load(spec)
    x = drawn(spec, (100, 5001))
    weights = list(formats.quantize(torch.randn(features, 5001), name))
    (many,) = call(spec, (x, weights, []))
    few = [call(spec, (rows, weights, []))[0] for rows in x.split(7)]
    assert torch.equal(many, torch.cat(few))


@pytest.mark.parametrize("name", ["dense", "bf16", "int8s", "int4g32", "int4g32a8", "int4g128za8"])
def test_many_rows_features_and_sizes(name: str) -> None:
    """Several tiles, several pieces of the sums."""
    spec = Spec("none", 0.0, ("p0 + v0",), (name,))
    generator.load(spec)
    cases = []
    for rows, features, size in ((67, 150, 4480), (32, 64, 640), (97, 65, 128)):
        x = settled(spec, drawn(spec, (rows, size)))
        weights = formats.quantize(torch.randn(features, size) / size**0.5, name)
        cases.append((x, list(weights), [torch.randn(features)]))
    kernel_cases.check(spec, *cases)


def every_half() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)


def check_every_half(spec: Spec) -> None:
    """Each scale that fp16 has comes out as it is."""
    scale = every_half()[:, None]
    levels = torch.full((len(scale), 32), 8, dtype=torch.uint8)
    levels[:, 3] = 9
    finite = scale.isfinite().squeeze(-1)
    for rows in (1, 16):
        x = torch.zeros(rows, 32)
        x[:, 3] = 1
        (got,) = call(spec, (x, [formats.pack(levels, 32), scale], []))
        assert torch.equal(got[-1][finite], scale.float().squeeze(-1)[finite])
        assert not got[-1][~finite].isfinite().any()


def test_every_half() -> None:
    spec = Spec("none", 0.0, ("p0",), ("int4g32",))
    generator.load(spec)
    check_every_half(spec)


def test_every_bfloat16_and_its_rounding() -> None:
    spec = Spec("none", 0.0, ("p0",))
    generator.load(spec, torch.bfloat16)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    (same,) = call(spec, (x[:, None], [torch.ones(1, 1).bfloat16()], []))
    assert torch.equal(same.isnan().squeeze(-1), x.isnan())
    assert torch.equal(same.squeeze(-1)[~x.isnan()], x[~x.isnan()])
    pairs = torch.stack([x, x.roll(101)], -1)[x.isfinite() & x.roll(101).isfinite()]
    (sums,) = call(spec, (pairs, [torch.ones(1, 2).bfloat16()], []))
    assert torch.equal(sums.squeeze(-1), pairs.float().sum(-1).bfloat16())


# ---- instruction sets ----------------------------------------------------------------------------------


def cpu() -> set[str]:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("march", SETS)
def test_every_instruction_set(march: str) -> None:
    """What other CPUs run, built for them and run here."""
    if not SETS[march] <= cpu():
        pytest.skip(f"this CPU is no {march}")
    flags = (f"-march={march}", *(f for f in generator.FLAGS if not f.startswith("-march")))
    spec = MIXED["all"]
    names = ("int8", "int4g32za8", "int4g32", "int8s")
    loaded = [Spec("none", 0.0, ("p0",), (name,)) for name in names]
    try:
        generator.load(spec, flags=flags)
        for rows in ROWS:
            kernel_cases.check(spec, *(inputs(spec, rows, n) for n in sizes(spec)))
        for each in loaded:
            generator.load(each, flags=flags)
        check_exact(loaded[0], 65536)
        check_exact(loaded[0], 65536 + 77)
        check_exact(loaded[3], 640)
        check_exact(loaded[1], 640)
        check_every_half(loaded[2])
    finally:
        for each in (spec, *loaded):
            generator.load(each)


# ---- memory and threads --------------------------------------------------------------------------------


def test_every_element_is_written() -> None:
    with poisoned():
        for spec in (*ONE.values(), *MIXED.values()):
            generator.load(spec)
            for rows in ROWS:
                assert all(r.isfinite().all() for r in call(spec, inputs(spec, rows, 128)))


@pytest.mark.parametrize("rows", [(5,), (200,)], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_the_same_bits_run_to_run_and_for_any_number_of_threads(
    name: str, rows: tuple[int, ...]
) -> None:
    generator.load(MIXED[name])
    case = inputs(MIXED[name], rows, 640)
    first, *others = kernel_cases.for_threads(lambda: call(MIXED[name], case))
    assert all(equal(result, first) for result in others)


def test_two_threads_at_once() -> None:
    """Each gets the bits that it gets alone."""
    specs = {**ONE, **MIXED}
    for spec in specs.values():
        generator.load(spec)
    for rows in ((2,), (65,)):
        cases = {name: (*inputs(spec, rows, 256), spec.text()) for name, spec in specs.items()}
        assert kernel_cases.wrong_at_once(cases, times=10) == []


@pytest.mark.parametrize("name", MIXED)
def test_opcheck(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        generator.load(MIXED[name], dtype)
        args = (*inputs(MIXED[name], (2, 3), 128, dtype), MIXED[name].text())
        for op in (few_rows_native, few_rows):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# ---- wrong arguments -----------------------------------------------------------------------------------

WRONG = {
    r"W0's packed \(int4g32z\) must be uint8 on CPU": lambda x, w: (x, [w[0].char(), *w[1:]]),
    r"W0's scale \(int4g32z\) must be float16": lambda x, w: (x, [w[0], w[1].float(), *w[2:]]),
    r"W0's packed \(int4g32z\) is not \[7, 16\], as x": lambda x, w: (x[:, :32], w),
    r"W0's zero \(int4g32z\) is not \[7, 2\], as x": lambda x, w: (x, [*w[:2], w[2][:5], *w[3:]]),
    r"W1's scale \(int8\) is not \[7\], as x": lambda x, w: (x, [*w[:4], w[4][:, None]]),
    r"4 weight tensors, not 5": lambda x, w: (x, w[:-1]),
    r"int4g32z: the features of x are no multiple of 32": lambda x, w: (
        torch.zeros(2, 48),
        [w[0][:, :24].clone(), w[1][:, :1], w[2][:, :1], w[3][:, :48], w[4]],
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    spec = Spec("none", 0.0, ("p0 * p1",), ("int4g32z", "int8"))
    generator.load(spec)
    x, weights, _ = inputs(spec, (2,), 64)
    x, weights = WRONG[words](x, weights)
    with pytest.raises(RuntimeError, match=words):
        few_rows_native(x, weights, [], spec.text())


def test_sums_that_may_overflow_are_refused() -> None:
    spec = Spec("none", 0.0, ("p0",), ("int8",))
    generator.load(spec)
    size = formats.MOST_INT8 + 1
    case = torch.ones(1, size), [torch.ones(1, size, dtype=torch.int8), torch.ones(1)], []
    with pytest.raises(RuntimeError, match=r"int8: x has more than 131072 features"):
        call(spec, case)
    with pytest.raises(ValueError, match=r"int8: 131073 features are more than 131072"):
        meaning(*case, spec.text())


def test_a_dtype_without_kernels_is_named() -> None:
    with pytest.raises(BuildError, match=r"no kernel for torch.float16, but for float32, bfloat16"):
        generator.load(ONE["int8"], torch.float16)


def test_the_source_says_how_weights_are_kept() -> None:
    head = generator.source(MIXED["normed"], torch.bfloat16).split("#include")[0]
    assert "bfloat16 on CPU" in head
    assert "Weights: W0 int4g32a8, W1 int4g32a8, W2 int4g32z, W3 dense" in head
