"""Triton kernels of ``sparsecc::rows`` against fp64, over shapes, dtypes, layouts, special values.

Not collected by itself: ``test_rows_triton.py`` runs it in a process of its own, interpreted or on a GPU.
"""

from __future__ import annotations

import threading

import pytest
import torch
from row_cases import ALL, CASES, Operands, check, check_special_values, sizes
from triton_interpreter import DEVICE, INTERPRETED, as_on_a_gpu, in_turn  # noqa: F401

from sparsecc.codegen.triton import launch_rows
from sparsecc.codegen.triton import rows as generator
from sparsecc.runtime.ops.rows import Output, Spec, meaning, rows_native

NATIVE = launch_rows.run if INTERPRETED else rows_native
LONG = generator.MOST_IN_REGISTERS + 7


def here(operands: Operands) -> Operands:
    t, v, s = ([each.to(DEVICE) for each in some] for some in operands)
    return t, v, s


def run(t: list[torch.Tensor], v, s, text: str) -> list[torch.Tensor]:
    """The kernel's results, brought to the CPU, as the formulas are there."""
    result: list[torch.Tensor] = NATIVE(*here((t, v, s)), text)
    return [each.cpu() for each in result]


# The interpreter is slow: there, fewer rows, and half precision in turn.
GRID = [(name, torch.float32) for name in ALL]
GRID += in_turn([(name,) for name in ALL], list(generator.DTYPES)[1:])


@pytest.mark.parametrize(("name", "dtype"), GRID, ids=str)
def test_as_near_to_fp64_as_aten(name: str, dtype: torch.dtype) -> None:
    case = ALL[name]
    some = sizes(name, 577)
    if INTERPRETED:
        half = dtype is not torch.float32
        cases = [((1,) if half or i % 2 else (2, 1), n) for i, n in enumerate(some)]
    else:
        cases = [(rows, n) for rows in ((1,), (2, 3)) for n in some]
    check(run, case, *(case.operands((*rows, n), dtype) for rows, n in cases))


@pytest.mark.parametrize("name", CASES)
def test_long_rows(name: str) -> None:
    """Those that do not fit the registers, in passes."""
    case = CASES[name]
    check(run, case, case.operands((1 if INTERPRETED else 2, LONG)))


def test_sums_over_many_rows() -> None:
    case = CASES["group rational, backward"]
    counts = (64, 65) if INTERPRETED else (63, 64, 65, 300)
    check(run, case, *(case.operands((n, 33)) for n in counts))
    both = Spec(("c = t0 - mean(t0)",), (Output("c * v0"), Output("c", "wide", summed=True)))
    t = torch.randn(2, 40, 50)
    got = run([t], [torch.ones(50)], [], both.text())
    exact = meaning([t.double()], [torch.ones(50)], [], both.text())
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["residual, layer, int8 by token", "evonorm s0", "simple gate"])
def test_inputs_that_are_not_contiguous(name: str) -> None:
    case = CASES[name]
    t, v, s = case.operands((4, 6, 20))
    for tensors in (
        [torch.cat([x, x], 1)[:, 6:] for x in t],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in t],
        [torch.stack([x, x], -1)[..., 1] for x in t],
        [x[:1, :1].expand_as(x) for x in t],
    ):
        check(run, case, (tensors, [torch.stack([w, w], -1)[..., 0] for w in v], s))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [n for n in ALL if "int8" not in n])
def test_special_values_propagate(name: str, special: float) -> None:
    check_special_values(run, name, special, 100)


def test_special_values_in_passes() -> None:
    for name in ("softmax", "rms, fp8 by token"):
        check_special_values(run, name, float("nan"), LONG)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    for name in ("crms", "group rational, backward"):
        operands = CASES[name].operands(shape)
        got = run(*operands, CASES[name].spec.text())
        plain = meaning(*operands, CASES[name].spec.text())
        assert all(torch.equal(g, p) for g, p in zip(got, plain, strict=True))


def test_every_number_is_rounded() -> None:
    spec = Spec((), (Output("round(t0)"), Output("t0 * 1", "float8_e4m3fn")))
    halves = torch.arange(-40, 41) / 2
    large = torch.tensor([2.0**22 + 0.5, 2.0**22 + 1.5, 2.0**23 - 0.5, 2.0**24, 3e38])
    small = torch.linspace(-0.1, 0.1, 2001)
    x = torch.cat([halves, large, -large, small])[None]
    whole, _ = run([x], [], [], spec.text())
    assert torch.equal(whole, x.round())
    x = x.clamp(-448, 448)
    _, eight = run([x], [], [], spec.text())
    assert torch.equal(eight.float(), x.to(torch.float8_e4m3fn).float())


def test_every_element_is_written() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for name, case in ALL.items():
            results = run(*case.operands((2, 3, sizes(name, 100)[-1])), case.spec.text())
            assert all(r.float().isfinite().all() for r in results)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_same_bits_run_to_run() -> None:
    for name in ("residual, layer, int8 by token", "group rational, backward"):
        operands = CASES[name].operands((70, 20) if INTERPRETED else (130, 100))
        first, second = (run(*operands, CASES[name].spec.text()) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one kernel at a time")
def test_two_threads_at_once() -> None:
    operands = CASES["softmax"].operands((130, 100))
    alone = run(*operands, CASES["softmax"].spec.text())
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            got = run(*operands, CASES["softmax"].spec.text())
            if not all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


WRONG = {
    "reads 2 tensors, not 1": lambda t, v, s: (t[:1], v, s),
    "t1 and t0 differ in shape": lambda t, v, s: ([t[0], t[1][:1]], v, s),
    "t1 must be on .* and have t0's dtype": lambda t, v, s: ([t[0], t[1].half()], v, s),
    "t0 must be float32, bfloat16 or float16": lambda t, v, s: ([x.double() for x in t], v, s),
    "v0 .* the tensors' last axes": lambda t, v, s: (t, [v[0][1:]], s),
    "v0 must be float32, bfloat16 or float16": lambda t, v, s: (t, [v[0].double()], s),
    "s0 .* the last one being 1": lambda t, v, s: (t, v, [s[0].expand(2)]),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    spec = Spec((), (Output("t0 * v0 + t1 * s0"),))
    operands = [torch.randn(2, 5), torch.randn(2, 5)], [torch.randn(5)], [torch.randn(1)]
    with pytest.raises(RuntimeError, match=words):
        launch_rows.run(*here(WRONG[words](*operands)), spec.text())
