"""Kernels of ``sparsecc::sparse_ffn`` against fp64: densities, formats, selections, boundaries, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_cases import for_threads, poisoned
from precision import assert_as_near, squares, wide

from sparsecc.codegen.cpp import few_rows
from sparsecc.codegen.cpp import sparse_ffn as generator
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec as FewRows
from sparsecc.runtime.ops.few_rows import few_rows_native
from sparsecc.runtime.ops.sparse_ffn import Spec, meaning, sparse_ffn, sparse_ffn_native

NEURONS = 83  # several chunks, blocks of neurons and three left over
DENSE = {  # name -> spec, dtype, size of x, size of the output
    "relu": (Spec("relu(p0 + v0)", "a * (p1 + v1)"), torch.float32, 37, 53),
    "cats": (Spec("keep(silu(p0), v0)", "keep(a * p1, 0.02)"), torch.bfloat16, 37, 53),
    "gaussian": (
        Spec("p0", "a", select="gaussian 0.5", after="gelu_tanh(a)"),
        torch.float32,
        37,
        7,
    ),
    "top": (Spec("p0", "a * p1", select="top 20", after="gelu(a) + 0 * v0"), torch.float32, 37, 53),
    "input": (Spec("fatrelu(keep(p0, v0), v1)", "a", gate=False), torch.float32, NEURONS, 53),
}
KEPT = {
    "int8": ("int8", "int8x32", "int8"),
    "int4": ("int4g32za8", "int4g32", "int4g32z"),
    "others": ("bf16", "int4g64z", "int4g128"),
}
TOP = Spec("p0", "a", gate=False, select="top 3")


def kept(name: str) -> Spec:
    return Spec("relu(p0 + v0)", "a * p1", formats=KEPT[name])


def tensors(
    spec: Spec, size: int, out: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random weights in their formats, and operands."""
    shapes = [(NEURONS, size)] * (spec.gate + spec.up) + [(NEURONS, out)]
    weights = [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]
    parts = [
        part
        for weight, form in zip(weights, spec.kept, strict=True)
        for part in formats.quantize(weight, form.name)
    ]
    operands = [torch.rand(NEURONS).to(dtype) for _ in range(2)]
    return parts, operands


def exact(spec: Spec, x, weights, operands, only=None) -> torch.Tensor:
    return meaning(x.double(), wide(weights), wide(operands), only, spec.text())


def check(spec: Spec, cases: list[tuple]) -> None:
    """Over all cases, the error is at most 1.5 times that of the meaning; dead networks are exactly zero."""
    generator.load(spec, cases[0][0].dtype)
    ours, aten = [], []
    for case in cases:
        got = sparse_ffn_native(*case, spec.text())
        reference = exact(spec, *case)
        plain = meaning(*case, spec.text())
        assert got.shape == plain.shape
        assert got.dtype is case[0].dtype
        if not reference.any():
            assert not got.any()
        ours.append(squares([got], [reference]))
        aten.append(squares([plain], [reference]))
    assert_as_near(ours, aten, torch.finfo(cases[0][0].dtype).eps / 2)


@pytest.mark.parametrize("name", DENSE)
def test_as_near_to_fp64_as_aten(name: str) -> None:
    spec, dtype, size, out = DENSE[name]
    some = torch.arange(0, NEURONS, 3)
    cases = []
    for shape in ((1,), (2,), (3,), (5,), (16,), (2, 1, 3)):
        x = torch.randn(*shape, size).to(dtype)
        cases.append((x, *tensors(spec, size, out, dtype), None))
        if not spec.select:
            cases.append((x, *tensors(spec, size, out, dtype), some))
    check(spec, cases)


@pytest.mark.parametrize("name", KEPT)
def test_weights_in_every_kind_of_format(name: str) -> None:
    spec = kept(name)
    cases = []
    for rows in (1, 2, 7, 16):
        parts, operands = tensors(spec, 128, 384)
        x, some = torch.randn(rows, 128), torch.cat([torch.arange(5), torch.arange(40, NEURONS, 2)])
        cases += [(x, parts, [operands[0] - 0.5], only) for only in (None, some)]
    check(spec, cases)


def test_the_meaning_of_dense_weights_of_x_beside_others() -> None:
    spec = Spec("relu(p0)", "a * p1", formats=("dense", "int8", "dense"))
    weights, _ = tensors(spec, 32, 16, torch.bfloat16)
    x = torch.randn(3, 32).bfloat16()
    got, reference = meaning(x, weights, [], None, spec.text()), exact(spec, x, weights, [])
    assert got.dtype is torch.bfloat16
    assert (got - reference).norm() < 0.004 * reference.norm()  # rounded once


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("live", [0, 1, 9, 42, NEURONS])
def test_every_density(live: int, rows: int) -> None:
    """Neurons fire by a bias that decides: so many do, wherever they are, and no more are counted."""
    base, _, size, out = DENSE["relu"]
    spec = Spec(base.activation, base.hidden, label="density")
    generator.load(spec)
    weights, operands = tensors(spec, size, out)
    fires = torch.randperm(NEURONS) < live
    operands[0] = torch.where(fires, 100.0, -100.0)
    x = torch.randn(rows, size)
    generator.reset_counters()
    with poisoned():
        got = sparse_ffn_native(x, weights, operands, None, spec.text())
    # Masked dense products are the reference: the meaning is not asked.
    gate, up, down = wide(weights)
    h = torch.relu(x.double() @ gate.T + operands[0].double()) * (x.double() @ up.T + operands[1])
    reference = torch.where(fires, h, 0.0) @ down
    assert torch.equal(got, torch.zeros_like(got)) if not live else got.any()
    assert (got - reference).norm() <= 1e-6 * reference.norm()
    counted = generator.counters()["density"]
    assert counted == generator.Counts(1, rows, rows * live, live, NEURONS)


def test_what_is_dead_is_not_read() -> None:
    """NaN in the rows of up and down of dead neurons, and in the padding of lists, does not come out."""
    spec, _, size, out = DENSE["relu"]
    generator.load(spec)
    weights, operands = tensors(spec, size, out)
    fires = torch.randperm(NEURONS) < 20
    operands[0] = torch.where(fires, 100.0, -100.0)
    clean = sparse_ffn_native(torch.ones(2, size), weights, operands, None, spec.text())
    for weight in weights[1:]:
        weight[~fires] = float("nan")
    assert torch.equal(
        sparse_ffn_native(torch.ones(2, size), weights, operands, None, spec.text()), clean
    )


def test_the_union_over_rows_is_read_and_each_row_has_its_own_neurons() -> None:
    base, _, _, out = DENSE["relu"]
    spec = Spec(base.activation, base.hidden, label="union")
    generator.load(spec)
    weights, operands = tensors(spec, NEURONS, out)
    weights[0] = torch.eye(NEURONS)  # neuron i fires where x[i] does
    operands[0] = torch.zeros(NEURONS)
    x = -torch.ones(3, NEURONS)
    x[0, [3, 50]] = 1.0
    x[2, [50, 81]] = 2.0
    generator.reset_counters()
    got = sparse_ffn_native(x, weights, operands, None, spec.text())
    assert torch.equal(got[1], torch.zeros(out))
    assert (got - exact(spec, x, weights, operands)).norm() < 1e-5 * got.norm()
    assert generator.counters()["union"] == generator.Counts(1, 3, 4, 3, NEURONS)
    alone = torch.stack([sparse_ffn_native(r, weights, operands, None, spec.text()) for r in x])
    assert (got - alone).norm() < 1e-6 * got.norm()


# ---- boundaries ----------------------------------------------------------------------------------------


def through(values: torch.Tensor, *thresholds: float) -> torch.Tensor:
    """What is kept of each value: a network without gate and with D = 1."""
    spec = DENSE["input"][0]
    generator.load(spec)
    operands = [torch.full(values.shape, t) for t in thresholds]
    return sparse_ffn_native(values, [torch.eye(len(values))], operands, None, spec.text())


def test_thresholds_at_their_boundary() -> None:
    """|a| == t is dropped by ``keep``; a == t is kept by ``fatrelu``; negative values stay beyond t."""
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    values = torch.tensor([0.5, -0.5, above, -above, below, 0.0] * 4)
    none = -float("inf")
    assert torch.equal(
        through(values, 0.5, none), torch.tensor([0.0, 0.0, above, -above, 0.0, 0.0] * 4)
    )
    assert torch.equal(
        through(values, none, 0.5), torch.tensor([0.5, 0.0, above, 0.0, 0.0, 0.0] * 4)
    )


@pytest.mark.parametrize(
    ("values", "stays"),
    [
        ([1.0, 4.0, 2.0, 3.0, 0.5], [0.0, 4.0, 2.0, 3.0, 0.0]),
        ([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]),
        ([0.0, 2.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 1.0, 0.0]),
        ([-1.0, -4.0, -2.0, -2.0, 0.5], [-1.0, 0.0, -2.0, 0.0, 0.5]),
        ([-0.0, 0.0, -1.0, -1.0, 7.0], [0.0, 0.0, 0.0, 0.0, 7.0]),
        ([3e38, -3e38, 1e-40, 2e-40, 3e-40], [3e38, 0.0, 0.0, 2e-40, 3e-40]),
    ],
)
def test_of_equal_ones_the_first_stay(values: list[float], stays: list[float]) -> None:
    generator.load(TOP)
    got = sparse_ffn_native(torch.tensor(values), [torch.eye(5)], [], None, TOP.text())
    assert torch.equal(got, torch.tensor(stays))
    assert torch.equal(got, meaning(torch.tensor(values), [torch.eye(5)], [], None, TOP.text()))


def test_top_k_of_few_and_of_nan() -> None:
    generator.load(TOP)
    two = torch.tensor([[5.0, -1.0]])
    assert torch.equal(sparse_ffn_native(two, [torch.eye(2)], [], None, TOP.text()), two)
    nan = torch.full((2, 100), float("nan"))
    nan[1] = torch.arange(100.0)
    nan[1, 7] = float("nan")
    down = torch.ones(100, 1)
    got = sparse_ffn_native(nan, [down], [], None, TOP.text())
    assert got.isnan().all()
    nan[1, 7] = 0
    got = sparse_ffn_native(nan, [down], [], None, TOP.text())
    assert got[0].isnan()
    assert got[1].item() == 97 + 98 + 99


def test_top_k_is_that_of_a_stable_sort() -> None:
    """Among many equal activations the meaning's are chosen."""
    spec, _, size, out = DENSE["top"]
    generator.load(spec)
    weights, operands = tensors(spec, size, out)
    weights[0] = weights[0].sign() * 0.25
    x = torch.randint(-2, 3, (5, size)).float()  # sums are exact: equal ones are equal
    got = sparse_ffn_native(x, weights, operands, None, spec.text())
    reference = exact(spec, x, weights, operands)
    assert (got - reference).norm() < 1e-6 * reference.norm()


def test_gaussian_with_a_mean_far_from_zero() -> None:
    """The variance is that of the centred values: squares alone would cancel."""
    spec = DENSE["gaussian"][0]
    generator.load(spec)
    x = 4096 + torch.randn(2, 301)
    weights = [torch.eye(301), torch.ones(301, 1)]
    got = sparse_ffn_native(x, weights, [], None, spec.text())
    reference = exact(spec, x, weights, [])
    assert (reference > 30).all()  # some 93 neurons
    assert (got - reference).abs().max() < 301 * 2**-12  # a threshold is rounded to half of 2^-11


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["relu", "gaussian", "top"])
def test_special_values_stay_in_their_row(name: str, special: float) -> None:
    spec, _, size, out = DENSE[name]
    generator.load(spec)
    weights, operands = tensors(spec, size, out)
    x = torch.randn(3, size)
    clean = sparse_ffn_native(x, weights, operands, None, spec.text())
    x[1, 5] = special
    got = sparse_ffn_native(x, weights, operands, None, spec.text())
    assert not got[1].isfinite().any()
    for row in (0, 2):
        assert (got[row] - clean[row]).norm() <= 1e-6 * clean[row].norm()
    if special != special:
        assert got[1].isnan().all()


# ---- threads, memory, arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "top"])
def test_the_same_bits_run_to_run_and_for_any_number_of_threads(name: str) -> None:
    spec, _, size, out = DENSE[name]
    generator.load(spec)
    for rows in (1, 5):
        case = (torch.randn(rows, size), *tensors(spec, size, out), None, spec.text())
        results = for_threads(lambda case=case: [sparse_ffn_native(*case)])
        assert all(torch.equal(result[0], results[0][0]) for result in results)


def test_every_element_is_written() -> None:
    with poisoned():
        for name in ("relu", "gaussian"):
            spec, _, size, out = DENSE[name]
            generator.load(spec)
            weights, operands = tensors(spec, size, out)
            assert (
                sparse_ffn_native(torch.randn(3, size), weights, operands, None, spec.text())
                .isfinite()
                .all()
            )
            dead = sparse_ffn_native(
                torch.zeros(3, size), weights, [-o for o in operands], None, spec.text()
            )
            assert torch.equal(dead, torch.zeros(3, out))
            none = sparse_ffn_native(torch.randn(0, size), weights, operands, None, spec.text())
            assert none.shape == (0, out)
        spec, _, size, out = DENSE["relu"]
        weights, operands = tensors(spec, size, out)
        nobody = torch.empty(0, dtype=torch.int64)
        got = sparse_ffn_native(torch.randn(2, size), weights, operands, nobody, spec.text())
        assert torch.equal(got, torch.zeros(2, out))


def test_strides_and_opcheck() -> None:
    spec, _, size, out = DENSE["relu"]
    generator.load(spec)
    weights, operands = tensors(spec, size, out)
    x = torch.randn(4, size)
    plain = sparse_ffn_native(x, weights, operands, None, spec.text())
    strided = (
        x.t().contiguous().t(),
        [w.t().contiguous().t() for w in weights],
        [torch.stack([o, o], -1)[:, 0] for o in operands],
    )
    assert torch.equal(sparse_ffn_native(*strided, None, spec.text()), plain)
    only = torch.arange(0, NEURONS, 2).repeat_interleave(2)[::2]
    for operator in (sparse_ffn, sparse_ffn_native):
        torch.library.opcheck(
            operator,
            (x, weights, operands, only, spec.text()),
            test_utils=("test_schema", "test_faketensor"),
        )


WRONG = {
    "more than 16 rows": lambda x, w, o, n: (x.repeat(6, 1), w, o, n),
    r"gate's weight \(dense\) is not \[83, 37\]": lambda x, w, o, n: (
        x,
        [w[0][:, 1:], *w[1:]],
        o,
        n,
    ),
    r"up's weight \(dense\) is not \[83, 37\], as x and down": lambda x, w, o, n: (
        x,
        [w[0], w[1][1:], w[2]],
        o,
        n,
    ),
    "down's weight .* is no matrix": lambda x, w, o, n: (x, [*w[:2], w[2][0]], o, n),
    "x must be float32 or bfloat16 on CPU": lambda x, w, o, n: (x.double(), w, o, n),
    "down's weight .* must be float32 on CPU": lambda x, w, o, n: (x, [*w[:2], w[2].half()], o, n),
    "2 weight tensors, not 3": lambda x, w, o, n: (x, w[:2], o, n),
    "1 operands, not 2": lambda x, w, o, n: (x, w, o[:1], n),
    r"operand 1 is not \[83\]": lambda x, w, o, n: (x, w, [o[0], o[1][1:]], n),
    "operand 0 must be float32 on CPU": lambda x, w, o, n: (x, w, [o[0].double(), o[1]], n),
    "no kernel is loaded for bfloat16": lambda x, w, o, n: (x.bfloat16(), w, o, n),
    "only must be int64": lambda x, w, o, n: (x, w, o, n.int()),
    "only must be ascending numbers of the 83": lambda x, w, o, n: (x, w, o, n.flip(0)),
    "only must be ascending": lambda x, w, o, n: (x, w, o, n + 81),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    base, _, size, out = DENSE["relu"]
    spec = Spec(
        base.activation, base.hidden, label="wrong"
    )  # not loaded for bfloat16 by other tests
    generator.load(spec)
    case = WRONG[words](torch.randn(3, size), *tensors(spec, size, out), torch.tensor([1, 2]))
    generator.reset_counters()
    with pytest.raises(RuntimeError, match=words):
        sparse_ffn_native(*case, spec.text())
    assert generator.counters()["wrong"].calls == 0


def test_sizes_that_do_not_fit_are_named() -> None:
    spec = kept("int4")
    generator.load(spec)
    for size, out, words in ((48, 64, "features of x are no"), (64, 48, "features of down are no")):
        weights = [
            torch.zeros(part.shape(NEURONS, n), dtype=part.dtype)
            for form, n in zip(spec.kept, (size, size, out), strict=True)
            for part in form.parts
        ]
        with pytest.raises(RuntimeError, match=words):
            sparse_ffn_native(
                torch.randn(1, size), weights, [torch.zeros(NEURONS)], None, spec.text()
            )
    generator.load(TOP)
    with pytest.raises(RuntimeError, match="a core beside a selection"):
        sparse_ffn_native(torch.randn(1, 4), [torch.eye(4)], [], torch.tensor([1]), TOP.text())
    with pytest.raises(RuntimeError, match="not a value for each neuron"):
        sparse_ffn_native(torch.randn(1, 3), [torch.eye(4)], [], None, TOP.text())


def test_what_cannot_be_built_is_named() -> None:
    with pytest.raises(BuildError, match=r"no kernel for torch\.float16"):
        generator.load(DENSE["relu"][0], torch.float16)
    with pytest.raises(BuildError, match="fp4w: emulated in ATen"):
        generator.load(Spec("relu(p0)", "a", formats=("fp4w", "dense")))


# ---- labels --------------------------------------------------------------------------------------------


def test_labels_share_a_library_and_count_apart() -> None:
    base, _, size, out = DENSE["relu"]
    first, second = (Spec(base.activation, base.hidden, label=name) for name in ("first", "second"))
    assert generator.source(first) == generator.source(second) == generator.source(base)
    assert generator.load(first) == generator.load(second) == generator.load(base)
    weights, operands = tensors(base, size, out)
    x = torch.randn(2, size)
    generator.reset_counters()

    def work() -> None:
        for _ in range(50):
            sparse_ffn_native(x, weights, operands, None, first.text())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sparse_ffn_native(x, weights, operands, None, base.text())  # not counted
    counted = generator.counters()
    assert counted["first"].calls == 100
    assert counted["second"] == generator.Counts(0, 0, 0, 0, 0)
    gate = x.double() @ weights[0].double().T + operands[0].double()
    assert counted["first"].live == 100 * int((gate > 0).sum())
    assert counted["first"].union_live == 100 * int((gate > 0).any(0).sum())
    generator.reset_counters()
    assert generator.counters()["first"].calls == 0


def test_the_gate_is_that_of_few_rows() -> None:
    """The same sums of products, in the same order: a threshold falls on the same side in both."""
    spec, _, size, _ = DENSE["relu"]
    generator.load(spec)
    weights, operands = tensors(spec, size, NEURONS)
    weights[1] = torch.zeros_like(weights[1])
    weights[2] = torch.eye(NEURONS)
    operands = [torch.zeros(NEURONS), torch.ones(NEURONS)]
    same = FewRows("none", 0.0, ("relu(p0)",))
    few_rows.load(same)
    for rows in (1, 3, 5):
        x = torch.randn(rows, size)
        (gate,) = few_rows_native(x, weights[:1], [], same.text())
        assert torch.equal(sparse_ffn_native(x, weights, operands, None, spec.text()), gate)
