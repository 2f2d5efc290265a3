"""Specs of ``sparsecc::rows``, and how what is wrong with one or with its operands is named."""

from __future__ import annotations

import pytest
import torch
from row_cases import CASES, HADAMARD

from sparsecc.codegen.cpp import rows as generator
from sparsecc.runtime.ops import catalogue
from sparsecc.runtime.ops.rows import Output, Spec, meaning, rows_native


def test_a_spec_is_its_text() -> None:
    for case in {**CASES, **HADAMARD}.values():
        assert Spec.of(case.spec.text()) == case.spec


@pytest.mark.parametrize(
    ("statements", "outputs", "words"),
    [
        (["h"], ["h"], "is no `name = expression`"),
        (["t1 = t0 + 1"], ["t1"], "is no `name = expression`"),
        (["h = t0"], ["h + 1"], "another name of 't0'"),
        (["h = t0 + 1", "h = t0 + 2"], ["h"], "a second time"),
        (["h = g + t0"], ["h"], "'g' in 'g \\+ t0' is not known"),
        (["h = mean(s0)"], ["h"], "not one value for each element"),
        (["h = mean(v0)"], ["h"], "not one value for each element"),
        (["h = sqrt(2)"], ["h * t0"], "a function of numbers alone"),
        (["h = t0 @ t1"], ["h"], "is not of the grammar"),
        (["h = max(t0, t1)"], ["h"], "is not of the grammar"),
        ([], ["t0"], "is no result"),
        ([], ["v0 + 1"], "the same for every row"),
        ([], ["s0 + 1"], "no tensor is read"),
        ([], [], "no output"),
        ([], ["t0 + 1", "t0 + 1"], "or one twice"),
    ],
)
def test_what_is_no_spec(statements: list[str], outputs: list[str], words: str) -> None:
    spec = Spec(tuple(statements), tuple(map(Output, outputs)))
    for use in (lambda: Spec.of(spec.text()), lambda: generator.source(spec)):
        with pytest.raises(ValueError, match=words):
            use()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no spec"),
        ('{"statements": []}', "is no spec"),
        ('{"statements": [], "outputs": [{"txt": "t0 + 1"}]}', "is no spec"),
        (
            '{"statements": [], "outputs": [{"text": "t0 + 1", "dtype": "int4"}]}',
            "'int4' .* none of",
        ),
        ('{"statements": [], "outputs": [{"text": "t0 + 1", "summed": true}]}', 'must be "wide"'),
    ],
)
def test_a_text_that_is_no_spec(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Spec.of(text)


WRONG = {
    "there is no tensor": lambda t, v, s: ([], v, s),
    "reads 2 tensors, not 1": lambda t, v, s: (t[:1], v, s),
    "reads 1 vectors, not 0": lambda t, v, s: (t, [], s),
    "reads 1 scalars, not 2": lambda t, v, s: (t, v, s * 2),
    "t1 and t0 differ in shape": lambda t, v, s: ([t[0], t[1][:1]], v, s),
    "t1 must be on CPU and have t0's dtype": lambda t, v, s: ([t[0], t[1].half()], v, s),
    "t0 must be float32, bfloat16 or float16": lambda t, v, s: ([x.double() for x in t], v, s),
    "v0 must be on CPU and have the tensors' last axes": lambda t, v, s: (t, [v[0][1:]], s),
    "v0 must be float32, bfloat16 or float16": lambda t, v, s: (t, [v[0].double()], s),
    "s0 .* the last one being 1": lambda t, v, s: (t, v, [s[0].expand(2)]),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    spec = Spec((), (Output("t0 * v0 + t1 * s0"),))
    generator.load(spec)
    operands = [torch.randn(2, 5), torch.randn(2, 5)], [torch.randn(5)], [torch.randn(1)]
    with pytest.raises(RuntimeError, match=words):
        rows_native(*WRONG[words](*operands), spec.text())


def test_rows_that_an_operation_cannot_take_are_named() -> None:
    spec = Spec((), (Output("hadamard(t0)"),))
    generator.load(spec)
    with pytest.raises(RuntimeError, match="a power of two"):
        rows_native([torch.randn(2, 12)], [], [], spec.text())
    with pytest.raises(ValueError, match="a power of two, not rows of 12"):
        meaning([torch.randn(2, 12)], [], [], spec.text())
    spec = Spec((), (Output("max(t0)"),))
    generator.load(spec)
    with pytest.raises(RuntimeError, match="has no maximum"):
        rows_native([torch.randn(2, 0)], [], [], spec.text())


def test_a_kernel_that_is_not_loaded_is_named() -> None:
    spec = Spec((), (Output("t0 * 3.25"),))
    generator.load(spec)
    with pytest.raises(RuntimeError, match=r"no kernel is loaded for bfloat16 and .*3\.25"):
        rows_native([torch.randn(1, 4).bfloat16()], [], [], spec.text())
    with pytest.raises(ValueError, match=r"tensors of torch\.int8 have no kernel; float32"):
        generator.load(spec, torch.int8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: catalogue.norm("batch", 0.0),
        lambda: catalogue.quantized("t0", "int4"),
        lambda: catalogue.statistical_top_k(1.0),
    ],
)
def test_a_catalogue_names_what_it_cannot_make(make) -> None:
    with pytest.raises(ValueError, match=r"is none of|is neither|is not between"):
        make()


def test_the_source_says_what_it_computes() -> None:
    case = CASES["residual, layer, int8 by token"]
    head = generator.source(case.spec, torch.bfloat16).split("#include")[0]
    assert "bfloat16 on CPU, for any number of rows m, and N features" in head
    assert "//   y = c * rsqrt(mean(c * c) + 1e-05)" in head
    assert "//   out0[m, n] = clamp(round(z / scale), -127, 127), as int8" in head
    assert "//   out1[m] = scale, as wide" in head
    assert generator.load(case.spec).with_suffix(".cpp").read_text() == generator.source(case.spec)
