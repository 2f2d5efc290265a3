"""``sparsecc::rows``: its meaning against the papers' formulas, its C++ kernels against fp64."""

from __future__ import annotations

import platform
import threading

import pytest
import torch
from precision import squares, wide
from row_cases import (
    ALL,
    CASES,
    Case,
    assert_rounded,
    check,
    check_special_values,
    doubled,
    rational,
    sizes,
    walsh,
)

from sparsecc.codegen.cpp import rows as generator
from sparsecc.runtime.ops import catalogue
from sparsecc.runtime.ops.rows import Output, Spec, meaning, rows, rows_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [(1,), (2, 3), (7,)]


def run(t: list[torch.Tensor], v, s, text: str) -> list[torch.Tensor]:
    """The operator by the kernel that is generated for these tensors."""
    generator.load(Spec.of(text), t[0].dtype)
    result: list[torch.Tensor] = rows_native(t, v, s, text)
    return result


def native(case: Case, *operands: list[torch.Tensor]) -> list[torch.Tensor]:
    return run(*operands, case.spec.text())


@pytest.mark.parametrize("name", ALL)
def test_the_meaning_is_the_formula(name: str) -> None:
    case = ALL[name]
    for size in sizes(name):
        operands = doubled(case.operands((2, 3, size)))
        got, exact = meaning(*operands, case.spec.text()), case.formula(*operands)
        for g, e in zip(got, exact, strict=True):
            if g.dtype.itemsize == 1:
                assert_rounded(g, e)
            else:
                torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_as_near_to_fp64_as_aten(name: str, dtype: torch.dtype) -> None:
    case = ALL[name]
    check(run, case, *(case.operands((*r, n), dtype) for r in ROWS for n in sizes(name)))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize(
    ("dtype", "instructions"), [(torch.float32, "x86-64-v3"), (torch.float16, "x86-64")], ids=str
)
def test_narrower_vectors(dtype: torch.dtype, instructions: str) -> None:
    """What this processor would not choose: SSE2, and AVX2 where it has AVX-512."""
    if instructions.endswith("v3") and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor has no AVX2")
    flags = (f"-march={instructions}", *generator.FLAGS[1:])

    def narrow(t: list[torch.Tensor], v, s, text: str) -> list[torch.Tensor]:
        generator.load(Spec.of(text), dtype, flags)
        result: list[torch.Tensor] = rows_native(t, v, s, text)
        return result

    for name in (
        "residual, layer, int8 by token",
        "rms, fp8 by token",
        "softmax",
        "functions",
        "group rational, backward",
        "hadamard 2",
        "hadamard 32",
    ):
        check(narrow, ALL[name], *(ALL[name].operands((3, n), dtype) for n in sizes(name, 577)))


@pytest.mark.parametrize("amplitude", [1e-4, 1e-2, 1e2, 6e4])
@pytest.mark.parametrize("name", ["residual, layer, int8 by token", "crms", "poly norm"])
def test_small_and_large_rows(name: str, amplitude: float) -> None:
    for dtype in (torch.float16, torch.float32):
        operands = CASES[name].operands((5, 96))
        tensors = [t.clamp(-1, 1).mul(amplitude).to(dtype) for t in operands[0]]
        if tensors[0].dtype is torch.float16 and len(tensors) > 1:
            tensors[1] = -tensors[1].abs().copysign(tensors[0])  # whose sum fits float16
        check(run, CASES[name], (tensors, *operands[1:]))


def test_a_variance_beside_a_large_mean() -> None:
    case = CASES["evonorm b0"]
    (x,), v, s = case.operands((6, 577))
    check(run, case, ([x + 1000], v, s))


def test_powers_that_would_overflow() -> None:
    case = CASES["poly norm"]
    (x,), v, s = case.operands((6, 577))
    (got,) = native(case, [x * 1e30], v, s)
    (exact,) = case.formula([x.double() * 1e30], [], wide(s))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["residual, layer, int8 by token", "evonorm s0", "simple gate"])
def test_inputs_that_are_not_contiguous(name: str) -> None:
    case = CASES[name]
    t, v, s = case.operands((4, 6, 20))
    layouts = {
        "channels of an image": [torch.cat([x, x], 1)[:, 6:] for x in t],
        "transposed": [x.transpose(0, 1).contiguous().transpose(0, 1) for x in t],
        "features apart": [torch.stack([x, x], -1)[..., 1] for x in t],
        "not aligned": [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in t],
        "one row for all": [x[:1, :1].expand_as(x) for x in t],
    }
    for tensors in layouts.values():
        check(run, case, (tensors, [torch.stack([w, w], -1)[..., 0] for w in v], s))


def test_operands_in_half_precision() -> None:
    case = CASES["evonorm b0"]
    t, v, s = case.operands((2, 3, 40), torch.bfloat16)
    check(
        run,
        case,
        (t, v, [each.to(dtype) for each, dtype in zip(s, DTYPES + DTYPES[:1], strict=True)]),
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    for name in ("crms", "group rational, backward"):
        operands = CASES[name].operands(shape)
        got = native(CASES[name], *operands)
        plain = meaning(*operands, CASES[name].spec.text())
        assert all(torch.equal(g, p) for g, p in zip(got, plain, strict=True))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [n for n in ALL if "int8" not in n])
def test_special_values_propagate(name: str, special: float) -> None:
    check_special_values(run, name, special)


def test_a_row_of_zeros_and_one_of_nan_in_int8() -> None:
    case = CASES["rms, int8 by token"]
    x = torch.zeros(3, 40)
    x[1, 3], x[2, 39] = 1.0, float("nan")
    q, scale = native(case, [x], [torch.ones(40)], [])
    assert q[0].eq(0).all()
    assert q[1].nonzero().tolist() == [[3]]
    assert q[1, 3] == 127
    assert scale[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_number_is_narrowed_as_pytorch_narrows_it(dtype: torch.dtype) -> None:
    """All numbers of the narrow dtype, all midpoints between them, and their neighbours in float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    each = bits.view(dtype) if dtype.itemsize == 2 else bits[:256].to(torch.int8).view(dtype)
    each = each.float()
    each = each[each.isfinite()].unique()
    middle = (each[1:].double() + each[:-1].double()).div(2).float()
    some = torch.cat([each, middle, torch.tensor([65519, 65520, 3e38, 1e-40])])
    inf = torch.full_like(some, torch.inf)
    x = torch.cat([some, torch.nextafter(some, inf), torch.nextafter(some, -inf), inf[:1]])
    if dtype is torch.float8_e4m3fn:
        x = x.clamp(-448, 448)  # beyond, PyTorch's versions differ
        spec = Spec((), (Output("t0 * 1", "float8_e4m3fn"),))
        generator.load(spec)
        (got,) = rows_native([x[None]], [], [], spec.text())
        expected = x[None].to(dtype)
    else:
        spec = Spec((), (Output("t0 * s0 * 1"),))  # a factor of float32 makes any number of it
        generator.load(spec, dtype)
        one = torch.ones(len(x), 1, dtype=dtype)
        (got,) = rows_native([one], [], [x[:, None]], spec.text())
        expected = x[:, None].to(dtype)
    assert torch.equal(got.float().nan_to_num(7), expected.float().nan_to_num(7))
    assert torch.equal(got.float().isnan(), expected.float().isnan())
    if dtype.itemsize == 2:  # and read
        spec = Spec((), (Output("t0 * 1", "wide"),))
        generator.load(spec, dtype)
        (read,) = rows_native([bits.view(dtype)[None]], [], [], spec.text())
        torch.testing.assert_close(
            read, bits.view(dtype).float()[None], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("function", ["exp", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh"])
def test_functions_over_their_whole_range(function: str) -> None:
    x = torch.cat([torch.linspace(-110, 95, 400_001), torch.linspace(-1, 1, 200_001)])
    spec = Spec((), (Output(f"{function}(t0)"),))
    generator.load(spec)
    (got,) = rows_native([x[None]], [], [], spec.text())
    (exact,) = meaning([x.double()[None]], [], [], spec.text())
    if function == "gelu":  # 1 + erf cancels, in fp64 too
        exact = 0.5 * x.double()[None] * torch.special.erfc(-x.double()[None] / 2**0.5)
    (aten,) = meaning([x[None]], [], [], spec.text())
    normal = exact.abs() > torch.finfo(torch.float32).tiny
    normal &= exact.abs() < torch.finfo(torch.float32).max

    def error(result: torch.Tensor) -> float:
        return ((result.double() - exact) / exact)[normal].square().mean().sqrt().item()

    def small(result: torch.Tensor) -> float:
        errors = (result.double() - exact)[~normal & (exact.abs() < 1)].abs()
        return errors.max().item() if len(errors) else 0.0

    assert error(got) <= 1.5 * max(error(aten), 0.5 * torch.finfo(torch.float32).eps)
    assert small(got) <= max(small(aten), 2e-45)
    assert torch.equal(got.isfinite(), aten.isfinite())


# ---- gradients ---------------------------------------------------------------------------------------


class Rational(torch.autograd.Function):
    """The activation by its spec, its gradients by theirs."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, *coefficients: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *coefficients)
        (y,) = meaning([x], coefficients, [], catalogue.group_rational().text())
        return y

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, *coefficients = ctx.saved_tensors
        text = catalogue.group_rational_backward().text()
        return tuple(meaning([x, gradient], coefficients, [], text))


def test_the_backward_of_the_rational_activation() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    v = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(10)]
    assert torch.autograd.gradcheck(Rational.apply, (x, *v))


def test_gradients_of_groups() -> None:
    x, g = torch.randn(2, 300, 48), torch.randn(2, 300, 48)
    a, b = torch.randn(8, 6), torch.randn(8, 4)
    case = CASES["group rational, backward"]
    v = [*catalogue.by_feature(a, 48), *catalogue.by_feature(b, 48)]
    dx, *rest = native(case, [x, g], v, [])
    leaves = [each.double().requires_grad_() for each in (x, a, b)]
    y = rational(leaves[0], [w for c in leaves[1:] for w in catalogue.by_feature(c, 48)])
    exact = torch.autograd.grad(y, leaves, g.double())
    ours = dx, catalogue.by_group(rest[:6], 8), catalogue.by_group(rest[6:], 8)
    assert (squares(ours, exact).sqrt() < 1e-6).all()


def test_sums_over_many_rows() -> None:
    case = CASES["group rational, backward"]
    check(run, case, *(case.operands((n, 33)) for n in (31, 32, 33, 64 * 32 + 1, 9000)))


def test_the_operator_is_differentiable() -> None:
    case = CASES["crms"]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rows([t], [], [], case.spec.text()), (x,))


# ---- bits, threads, memory -----------------------------------------------------------------------------


def test_every_element_is_written() -> None:
    """Memory that is full of NaN when the kernel gets it is not there when it returns."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for name, case in ALL.items():
            for shape in ((1,), (2, 3), (70,)):
                results = native(case, *case.operands((*shape, sizes(name)[-1])))
                assert all(r.float().isfinite().all() for r in results)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["residual, layer, int8 by token", "group rational, backward"])
def test_the_same_bits_run_to_run_and_for_any_number_of_threads(name: str) -> None:
    operands = CASES[name].operands((300, 577))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(CASES[name], *operands))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    for name in ("residual, layer, int8 by token", "softmax"):
        t, v, s = CASES[name].operands((9, 100))
        whole = native(CASES[name], t, v, s)
        one = native(CASES[name], [x[4:5] for x in t], v, s)
        assert all(torch.equal(w[4:5], o) for w, o in zip(whole, one, strict=True))


def test_two_threads_at_once() -> None:
    """Each gets the bits that it gets alone."""
    cases = {name: case.operands((40, sizes(name, 577)[-1])) for name, case in ALL.items()}
    alone = {name: native(ALL[name], *operands) for name, operands in cases.items()}
    wrong: list[str] = []

    def work(names: list[str]) -> None:
        for name in names:
            for _ in range(10):
                got = rows_native(*cases[name], ALL[name].spec.text())
                if not all(
                    torch.equal(g.view(torch.int8), e.view(torch.int8))
                    for g, e in zip(got, alone[name], strict=True)
                ):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(o,)) for o in (list(cases), list(cases)[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_opcheck() -> None:
    for name in ("residual, layer, int8 by token", "group rational, backward", "evonorm s0"):
        case = CASES[name]
        generator.load(case.spec)
        args = (*case.operands((2, 3, 16)), case.spec.text())
        torch.library.opcheck(rows_native, args, test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(rows, args, test_utils=("test_schema", "test_faketensor"))


# ---- laws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64, 1024])
def test_the_walsh_hadamard_transform_is_its_own_inverse(size: int) -> None:
    spec = Spec((), (Output("hadamard(t0)"),))
    generator.load(spec)
    x = torch.randint(-8, 9, (3, size)).float()  # whole numbers: exact
    once = rows_native([x], [], [], spec.text())
    torch.testing.assert_close(once[0].double(), x.double() @ walsh(size), rtol=0, atol=0)
    twice = rows_native(once, [], [], spec.text())
    assert torch.equal(twice[0] / size, x)


def test_statistical_top_k_ignores_shifts_and_keeps_its_share() -> None:
    case = CASES["statistical top-k"]
    x = torch.randn(50, 4096)
    (y,) = native(case, [x], [], [])
    (shifted,) = native(case, [x + 4], [], [])
    (scaled,) = native(case, [x * 8], [], [])
    torch.testing.assert_close(shifted, y, rtol=1e-4, atol=1e-5)
    assert torch.equal(scaled, y * 8)
    assert 0.24 < (y > 0).double().mean() < 0.26


def test_evonorm_on_images() -> None:
    x = torch.randn(2, 12, 5, 7)
    v, gamma, beta = torch.randn(12), torch.randn(12), torch.randn(12)
    groups = x.view(2, 4, -1)
    vectors = [catalogue.by_position(each, 4, 35) for each in (v, gamma, beta)]
    (got,) = native(CASES["evonorm s0"], [groups], vectors, [])
    wide_x, *c = (each.double() for each in (x, *(w.view(12, 1, 1) for w in (v, gamma, beta))))
    variance = wide_x.view(2, 4, -1).var(-1, correction=0).repeat_interleave(3, 1)[..., None, None]
    exact = wide_x * torch.sigmoid(c[0] * wide_x) / (variance + 1e-5).sqrt() * c[1] + c[2]
    torch.testing.assert_close(got.view_as(x).double(), exact, rtol=1e-5, atol=1e-5)
