"""Kernels of ``sparsecc::few_rows`` against fp64, over shapes, layouts, special values and threads."""

from __future__ import annotations

import few_rows_cases
import kernel_cases
import pytest
import torch
from few_rows_cases import ROWS, SIZES, SPECS, check_special_values, inputs
from kernel_cases import equal, poisoned

from sparsecc.codegen.cpp import few_rows as generator
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.few_rows import Spec, few_rows, few_rows_native, meaning


def check(name: str, *cases) -> None:
    generator.load(SPECS[name], cases[0][0].dtype)
    few_rows_cases.check(few_rows_native, name, *cases)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_as_near_to_fp64_as_aten(name: str, rows: tuple[int, ...]) -> None:
    check(name, *(inputs(name, rows, size) for size in SIZES))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_bfloat16_as_near_to_fp64_as_aten(name: str, rows: tuple[int, ...]) -> None:
    check(name, *(inputs(name, rows, size, torch.bfloat16) for size in SIZES))


@pytest.mark.parametrize("name", SPECS)
def test_inputs_that_are_not_contiguous(name: str) -> None:
    x, weights, operands = inputs(name, (3,), 20)
    x = x.t().contiguous().t()
    weights = [w.repeat(1, 2)[:, ::2] for w in weights]
    operands = [torch.stack([o, o], -1)[..., 0] for o in operands]
    check(name, (x, weights, operands))


def test_addresses_that_are_not_aligned() -> None:
    x, weights, operands = inputs("one", (2,), 33)
    shifted = [torch.cat([torch.zeros(1), w.flatten()])[1:].view_as(w) for w in weights]
    x = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    check("one", (x, shifted, operands))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (17, 0), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    generator.load(SPECS["one"])
    text = SPECS["one"].text()
    x, weight = torch.randn(shape), torch.randn(7, shape[-1])
    (got,) = few_rows_native(x, [weight], [], text)
    assert torch.equal(got, meaning(x, [weight], [], text)[0])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [(3,), (17,)], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_special_values_propagate(name: str, rows: tuple[int, ...], special: float) -> None:
    generator.load(SPECS[name])
    check_special_values(few_rows_native, name, special, rows)


def test_every_element_is_written() -> None:
    """Memory that is full of NaN when the kernel gets it is not there when it returns."""
    with poisoned():
        for name, spec in SPECS.items():
            generator.load(spec)
            for rows in ROWS:
                results = few_rows_native(*inputs(name, rows, 17), spec.text())
                assert all(r.isfinite().all() for r in results)


def test_the_same_bits_run_to_run_and_for_any_number_of_threads() -> None:
    generator.load(SPECS["q, k, v"])
    text = SPECS["q, k, v"].text()
    for rows in ((3,), (200,)):
        case = inputs("q, k, v", rows, 577, times=20)
        results = kernel_cases.for_threads(lambda case=case: few_rows_native(*case, text))
        assert all(equal(result, results[0]) for result in results)


def test_two_threads_at_once() -> None:
    """Each gets the bits that it gets alone."""
    for spec in SPECS.values():
        generator.load(spec)
    for rows in ((2,), (20,)):
        cases = {name: (*inputs(name, rows, 65), spec.text()) for name, spec in SPECS.items()}
        assert kernel_cases.wrong_at_once(cases, times=25) == []


def test_opcheck() -> None:
    generator.load(SPECS["q, k, v"])
    args = (*inputs("q, k, v", (2, 3), 16), SPECS["q, k, v"].text())
    torch.library.opcheck(few_rows_native, args, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(few_rows, args, test_utils=("test_schema", "test_faketensor"))


WRONG = {
    "W0's weight \\(dense\\) is not \\[5, 8\\], as x needs it": lambda x, w, o: (
        x,
        [w[0][:, 1:], *w[1:]],
        o,
    ),
    "differ in features": lambda x, w, o: (x, [w[0], w[1][1:]], o),
    "x must be float32 or bfloat16 on CPU": lambda x, w, o: (x.double(), w, o),
    "W1's weight \\(dense\\) must be float32 on CPU": lambda x, w, o: (x, [w[0], w[1].half()], o),
    "operand 0 must be float32 on CPU": lambda x, w, o: (x, w, [o[0].double()]),
    "1 weight tensors, not 2": lambda x, w, o: (x, w[:1], o),
    "no kernel is loaded for bfloat16": lambda x, w, o: (x.bfloat16(), w, o),
    "not as large": lambda x, w, o: (x, w, [o[0][1:]]),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    spec = Spec("none", 0.0, ("p0 * p1 + v0",))
    generator.load(spec)
    x, weights = torch.randn(2, 8), [torch.randn(5, 8), torch.randn(5, 8)]
    args = WRONG[words](x, weights, [torch.randn(5)])
    with pytest.raises(RuntimeError, match=words):
        few_rows_native(*args, spec.text())


def test_a_kernel_that_is_not_loaded_is_named() -> None:
    generator.load(SPECS["one"])  # the operator is there
    spec = Spec("none", 0.0, ("p0 * 3.25",))
    with pytest.raises(RuntimeError, match=r"no kernel is loaded for float32 and .*3\.25"):
        few_rows_native(torch.randn(1, 4), [torch.randn(2, 4)], [], spec.text())


# ---- specs and expressions ---------------------------------------------------------------------------


def test_a_spec_is_its_text() -> None:
    for spec in SPECS.values():
        assert Spec.of(spec.text()) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no spec"),
        ('{"norm": "rms"}', "is no spec"),
        ('{"norm": "batch", "eps": 0, "outputs": ["p0"]}', "norm 'batch' is none of"),
        ('{"norm": "rms", "eps": 0, "outputs": ["v0"]}', "reads no product"),
        ('{"norm": "rms", "eps": 0, "outputs": ["p0 +"]}', "invalid syntax"),
        (
            '{"norm": "rms", "eps": 0, "outputs": ["p1"], "formats": ["int8"]}',
            "a weight without a format",
        ),
        (
            '{"norm": "rms", "eps": 0, "outputs": ["p0"], "formats": ["int5"]}',
            "weight format 'int5' is none of dense, bf16, int8, int8s, int8x32",
        ),
    ],
)
def test_a_text_that_is_no_spec(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Spec.of(text)


@pytest.mark.parametrize(
    "text",
    [
        "p0 ** 2",
        "open(p0)",
        "p0.real",
        "relu(p0, p1)",
        "[p0]",
        "lambda: 0",
        "True",
        "'p0'",
        "p0 if p1 else 0",
    ],
)
def test_what_is_not_of_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the grammar"):
        expressions.parse(text)


def test_the_source_says_what_it_computes() -> None:
    text = generator.source(SPECS["gate and up"])
    head = text.split("#include")[0]
    assert "out0[m, n] = silu(p0) * p1" in head
    assert "y = (x - mean(x)) / sqrt(var(x) + 1e-05)" in head
    assert "float32 on CPU, for any number of rows m, features n and size k" in head
    assert generator.load(SPECS["gate and up"]).with_suffix(".cpp").read_text() == text
