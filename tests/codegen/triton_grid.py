"""Triton kernels of ``sparsecc::few_rows`` against fp64, over shapes, dtypes, layouts, special values.

Not collected by itself: ``test_triton.py`` runs it in a process of its own, in Triton's interpreter, which must
be chosen before Triton is imported, or on a GPU.
"""

from __future__ import annotations

import itertools
import threading

import few_rows_cases
import pytest
import torch
from few_rows_cases import SIZES, SPECS, check, check_special_values, inputs
from triton_interpreter import DEVICE, INTERPRETED, as_on_a_gpu, in_turn  # noqa: F401

from sparsecc.codegen.triton import few_rows as generator
from sparsecc.codegen.triton import launch
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.few_rows import Spec, few_rows_native, meaning

run = launch.run if INTERPRETED else few_rows_native

DTYPES = list(generator.DTYPES)
ROWS = [(1,), (3,), (2, 1, 2), (5,), (16,)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
names = pytest.mark.parametrize("name", SPECS)


# The interpreter is slow: there, fewer sizes (with more features, so that the errors' means are as sharp), and
# half precision in turn, for one row and those of ``tl.dot``.
GRID = [(*each, torch.float32) for each in itertools.product(SPECS, ROWS)]
GRID += in_turn(itertools.product(SPECS, ROWS if not INTERPRETED else ((1,), (5,))), DTYPES[1:])
TRIED, TIMES = ([1, 16, 33, 577], 2) if INTERPRETED else (SIZES, 1)


@pytest.mark.parametrize(("name", "rows", "dtype"), GRID, ids=str)
def test_as_near_to_fp64_as_aten(name: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    check(run, name, *(inputs(name, rows, size, dtype, DEVICE, TIMES) for size in TRIED))


@pytest.mark.parametrize(("rows", "dtype"), in_turn([((1,),), ((3,),), ((16,),)], DTYPES), ids=str)
def test_more_features_than_a_tile(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    times = 1 if INTERPRETED else 3
    for name in ("q, k, v", "everything"):
        check(run, name, *(inputs(name, rows, 65, dtype, DEVICE, times=6) for _ in range(times)))


@dtypes
@pytest.mark.parametrize("rows", [(1,), (16,)], ids=str)
def test_a_mean_that_is_large(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """What is left of x by a layer norm is small beside what the norm takes away."""
    cases = [inputs("gate and up", rows, 300, dtype, DEVICE) for _ in range(3)]
    check(run, "gate and up", *((x + 50, weights, operands) for x, weights, operands in cases))


CUTS = in_turn([((2,),), ((7,),), ((7,),), ((2,),)] if INTERPRETED else [((2,),), ((7,),)], DTYPES)


@pytest.mark.parametrize(("rows", "dtype"), CUTS, ids=str)
def test_however_it_is_cut(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    case = inputs("everything", rows, 577, dtype, DEVICE, times=2 if INTERPRETED else 3)
    configs = launch.Problem.of(*case[:2], SPECS["everything"].text()).configs()
    assert len(configs) >= 3
    for config in configs:
        check(lambda *args, c=config: launch.run(*args, config=c), "everything", case)


@dtypes
@names
def test_inputs_that_are_not_contiguous(name: str, dtype: torch.dtype) -> None:
    x, weights, operands = inputs(name, (3,), 20, dtype, DEVICE)
    x = x.t().contiguous().t()
    weights = [w.repeat(1, 2)[:, ::2] for w in weights]
    operands = [torch.stack([o, o], -1)[..., 0] for o in operands]
    check(run, name, (x, weights, operands))


@dtypes
def test_addresses_that_are_not_aligned(dtype: torch.dtype) -> None:
    x, weights, operands = inputs("one", (2,), 33, dtype, DEVICE)

    def shift(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)

    check(run, "one", (shift(x), [shift(w) for w in weights], operands))


@dtypes
@pytest.mark.parametrize(("shape", "features"), [((0, 8), 7), ((3, 0), 7), ((2, 8), 0)])
def test_empty(shape: tuple[int, ...], features: int, dtype: torch.dtype) -> None:
    for name in ("one", "gate and up"):
        x, weights, operands = inputs(name, shape[:-1], shape[-1] or 1, dtype, DEVICE)
        x, weights = x[..., : shape[-1]], [w[:features, : shape[-1]] for w in weights]
        text = SPECS[name].text()
        for got, expected in zip(
            run(x, weights, operands, text), meaning(x, weights, operands, text), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [(3,), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else DTYPES, ids=str)
@names
def test_special_values_propagate(
    name: str, rows: tuple[int, ...], special: float, dtype: torch.dtype
) -> None:
    check_special_values(run, name, special, rows, dtype=dtype, device=DEVICE)


EACH = pytest.mark.parametrize(("name", "dtype"), in_turn([(n,) for n in SPECS], DTYPES), ids=str)


@EACH
def test_every_element_is_written(name: str, dtype: torch.dtype) -> None:
    """Memory that is full of NaN when the kernel gets it is not there when it returns."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, dtype=dtype, device=DEVICE).isnan().all()
        for rows in ROWS:
            results = run(*inputs(name, rows, 17, dtype, DEVICE), SPECS[name].text())
            assert all(r.isfinite().all() for r in results)
    finally:
        torch.use_deterministic_algorithms(False)


@EACH
def test_the_same_bits_run_to_run(name: str, dtype: torch.dtype) -> None:
    for rows in ((2,), (6,)):
        case = inputs(name, rows, 577, dtype, DEVICE)
        first, second = (run(*case, SPECS[name].text()) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces Triton's functions in place")
def test_two_threads_at_once() -> None:
    """Each gets the bits that it gets alone."""
    cases = {name: (*inputs(name, (2,), 65, device=DEVICE), SPECS[name].text()) for name in SPECS}
    alone = {name: run(*case) for name, case in cases.items()}
    wrong: list[str] = []

    def work(order: list[str]) -> None:
        for name in order:
            for _ in range(50):
                pairs = zip(run(*cases[name]), alone[name], strict=True)
                if not all(torch.equal(g, e) for g, e in pairs):
                    wrong.append(name)

    orders = list(cases), list(cases)[::-1]
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("function", expressions.FUNCTIONS)
def test_functions_of_numbers_of_all_sizes(function: str) -> None:
    """A product of 1 and a number hands it on as it is."""
    edges = torch.tensor([0.2499999, 0.25, 0.2500001, 88.0, 89.0, 104.0, 1e4, 1e30])
    numbers = torch.cat([torch.logspace(-30, 2, 80 if INTERPRETED else 400), edges])
    weight = torch.cat([numbers, -numbers])[:, None].to(DEVICE)
    text = Spec("none", 0.0, (f"{function}(p0)",)).text()
    case = torch.ones(1, 1, device=DEVICE), [weight], []
    (got,), (truth,) = run(*case, text), few_rows_cases.exact(case, text)
    x = weight[:, 0].double().abs()
    size = truth[0].abs()
    if function in ("silu", "gelu", "gelu_tanh"):  # x times what is rounded as 1 + something is
        size = size.maximum(x.clamp(max=8))
    if function == "sigmoid":  # exp turns the rounding of its argument into a relative error
        size = size * (1 + x)
    rounding = torch.finfo(torch.float32)
    assert ((got[0].double() - truth[0]).abs() <= 4 * rounding.eps * size + rounding.tiny).all()


WRONG = {
    r"W0 is not \[features, size of x\]": lambda x, w, o: (x, [w[0][:, 1:], *w[1:]], o),
    "W1 and W0 differ in features": lambda x, w, o: (x, [w[0], w[1][1:]], o),
    "all tensors must be torch.bfloat16": lambda x, w, o: (x.bfloat16(), w, o),
    "x is torch.float64, not float32": lambda x, w, o: (x.double(), w, o),
    "v0 is not as large as output 0 needs it": lambda x, w, o: (x, w, [o[0][1:]]),
    "v0 is not given": lambda x, w, o: (x, w, []),
    "W1 is not given": lambda x, w, o: (x, w[:1], o),
    "18 rows; a kernel takes 16": lambda x, w, o: (x.repeat(9, 1), w, o),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words: str) -> None:
    x, weights = torch.randn(2, 8), [torch.randn(5, 8), torch.randn(5, 8)]
    x, w, o = WRONG[words](x, weights, [torch.randn(5)])
    given = x.to(DEVICE), [t.to(DEVICE) for t in w], [t.to(DEVICE) for t in o]
    with pytest.raises(RuntimeError, match=words):
        run(*given, Spec("none", 0.0, ("p0 * p1 + v0",)).text())
