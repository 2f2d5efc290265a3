"""Formats of weights: packing, quantization, and what their products mean, against plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.formats import Format

NAMES = formats.NAMES
INT4 = [name for name in NAMES if Format.of(name).kind == "int4"]
ROUNDING = [name for name in NAMES if Format.of(name).rounds_activations]


def parts(
    name: str, rows: int = 5, size: int = 256
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    weight = torch.randn(rows, size)
    return weight, formats.quantize(weight, name)


@pytest.mark.parametrize("group", formats.GROUPS)
def test_where_nibbles_lie(group: int) -> None:
    q = torch.randint(0, 16, (3, 3 * group))
    packed = formats.pack(q, group)
    assert packed.dtype is torch.uint8
    assert packed.shape == (3, 3 * group // 2)
    for g in range(3):
        for j in range(group // 2):
            byte = packed[:, g * group // 2 + j].int()
            assert torch.equal(byte & 15, q[:, g * group + j].int())
            assert torch.equal(byte >> 4, q[:, g * group + j + group // 2].int())
    assert torch.equal(formats.unpack(packed, group).long(), q)


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_as_described(name: str) -> None:
    _, tensors = parts(name)
    form = Format.of(name)
    assert [t.dtype for t in tensors] == [p.dtype or torch.float32 for p in form.parts]
    assert [tuple(t.shape) for t in tensors] == [p.shape(5, 256) for p in form.parts]
    formats.check(form, tensors, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dequantized_by_hand(name: str, dtype: torch.dtype) -> None:
    _, tensors = parts(name, 2, 128)
    form, found = Format.of(name), formats.dequantize(name, tensors, dtype)
    assert found.dtype is dtype
    for n in range(2):
        for k in range(128):
            if form.kind == "float":
                expected = tensors[0][n, k].double()
            elif form.kind == "int8":
                expected = tensors[0][n, k].double() * tensors[1][n].double()
            else:
                q = formats.unpack(tensors[0], form.group)[n, k].double()
                zero = tensors[2][n, k // form.group].double() if form.zero else 8
                expected = (q - zero) * tensors[1][n, k // form.group].double()
            bound = 1.5 * torch.finfo(dtype).eps * expected.abs()
            assert (found[n, k].double() - expected).abs() <= bound


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dense"])
def test_rounded_to_nearest(name: str) -> None:
    """Within half a step; scales in fp16 are rounded, so the greatest weight may lie behind the last step."""
    weight, tensors = parts(name)
    error = (formats.dequantize(name, tensors, torch.float64) - weight.double()).abs()
    form = Format.of(name)
    if form.kind == "float":
        assert (error <= weight.abs() * torch.finfo(torch.bfloat16).eps / 2).all()
        return
    steps = tensors[1].double().unsqueeze(-1)
    if form.kind == "int4":
        error = error.unflatten(-1, (-1, form.group))
    slack = 1e-6 if form.kind == "int8" else 15 * torch.finfo(torch.float16).eps
    assert (error <= steps * (0.5 + slack)).all()


@pytest.mark.parametrize("name", [n for n in NAMES if Format.of(n).kind != "float"])
def test_weights_that_the_format_has_stay_as_they_are(name: str) -> None:
    form = Format.of(name)
    if form.kind == "int8":
        levels = torch.randint(-127, 128, (4, 256)).double()
        levels[:, 7] = 127
    else:
        low, high = (-5, 10) if form.zero else (-7, 7)
        levels = torch.randint(low, high + 1, (4, 256)).double()
        levels[:, 3 :: form.group], levels[:, 5 :: form.group] = low, high
    weight = levels * 0.25
    tensors = formats.quantize(weight, name)
    assert torch.equal(formats.dequantize(name, tensors, torch.float64), weight)


@pytest.mark.parametrize("name", [n for n in NAMES if Format.of(n).kind != "float"])
def test_zeros_stay_zeros(name: str) -> None:
    weight = torch.randn(3, 256)
    weight[1] = 0
    weight[2, :128] = 0
    found = formats.dequantize(name, formats.quantize(weight, name), torch.float32)
    assert found.isfinite().all()
    assert found[weight == 0].eq(0).all()


@pytest.mark.parametrize("name", INT4)
def test_a_zero_stands_for_groups_on_one_side(name: str) -> None:
    """Weights that are all positive keep all sixteen levels where there is a zero."""
    weight = torch.rand(4, 256)
    tensors = formats.quantize(weight, name)
    q = formats.unpack(tensors[0], Format.of(name).group)
    assert int(q.min()) == (0 if Format.of(name).zero else 8)
    assert int(q.max()) == 15


@pytest.mark.parametrize("name", [n for n in INT4 if Format.of(n).zero])
@pytest.mark.parametrize("middle", [-900.0, 0.25, 7e-3])
def test_a_zero_need_not_be_a_level(name: str, middle: float) -> None:
    """Groups of one value, and groups far from zero: within half a step and what fp16 makes of the zero."""
    weight = torch.full((3, 256), middle)
    weight[1] += torch.rand(256) * 1e-3 * middle
    weight[2, ::2] += 0.01 * middle
    tensors = formats.quantize(weight, name)
    found = formats.dequantize(name, tensors, torch.float64)
    steps = tensors[1].double().repeat_interleave(Format.of(name).group, -1)
    assert ((found - weight.double()).abs() <= steps * (0.5 + 0.5)).all()
    assert found[0].sub(middle).abs().max() <= abs(middle) * 1e-3


@pytest.mark.parametrize("name", ROUNDING)
def test_products_by_integers(name: str) -> None:
    """y Wᵀ from integers that are added as such, for each group."""
    y = torch.randn(3, 256, dtype=torch.float64)
    _, tensors = parts(name)
    form = Format.of(name)
    y = y * 100 if form.static else y
    expected = torch.zeros(3, 5, dtype=torch.float64)
    width = form.together or 256
    for g in range(256 // width):
        at = slice(g * width, (g + 1) * width)
        scale = y.new_ones(3, 1) if form.static else y[:, at].abs().amax(-1, keepdim=True) / 127
        q = (y[:, at] / scale).round().clamp(-127, 127).long()
        if form.kind == "int8":
            sums, own = (q @ tensors[0][:, at].long().T).double(), tensors[1].double()
        else:
            levels = formats.unpack(tensors[0], form.group)[:, at].long()
            zero = tensors[2][:, g].double() if form.zero else torch.full((5,), 8.0).double()
            sums, own = (q @ levels.T).double() - q.sum(-1, keepdim=True) * zero, tensors[1][:, g]
        expected += sums * scale * own.double()
    torch.testing.assert_close(formats.product(y, name, tensors), expected, rtol=1e-13, atol=1e-13)


def test_groups_of_activations_keep_what_an_outlier_takes_from_a_row() -> None:
    y = torch.randn(4, 256, dtype=torch.float64)
    y[:, 40] = 3000.0
    weight = torch.randn(5, 256, dtype=torch.float64)
    exact, error = y @ weight.T, {}
    for name in ("int8", "int8x32"):
        form = Format.of(name)
        q, scale = formats.quantize_activations(y, form)
        error[name] = ((q * scale).flatten(-2) @ weight.T - exact).square().sum()
    assert (
        error["int8x32"] < error["int8"] / 4
    )  # an eighth of the features share the outlier's step


def test_rows_of_activations() -> None:
    y = torch.tensor([[254.0, 1.0, 3.0, -5.0], [0.0, 0.0, 0.0, 0.0], [float("nan"), 1, 2, 3]])
    q, scale = formats.quantize_rows(y)
    assert q[:2].tolist() == [[127.0, 0.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]]
    assert scale[:2].tolist() == [[2.0], [0.0]]
    assert q[2].isnan().all()
    infinite = torch.tensor([[float("inf"), 1.0]])
    assert formats.product(infinite, "int8", parts("int8", 5, 2)[1]).isnan().all()


def test_rows_of_activations_of_a_known_step() -> None:
    y = torch.tensor([[200.0, 0.5, 1.5, -300.0], [float("inf"), 0, 0, 0], [float("nan"), 1, 2, 3]])
    weights = torch.eye(4, dtype=torch.int8), torch.full((4,), 0.5)
    got = formats.product(y, "int8s", weights)
    assert got[:2].tolist() == [[63.5, 0.0, 1.0, -63.5], [63.5, 0.0, 0.0, 0.0]]
    assert got[2].isnan().all()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("int4g32", lambda t: (t[0].char(), t[1]), "packed is torch.int8, not torch.uint8"),
        ("int4g32", lambda t: (t[0], t[1][:, :3]), r"scale is \[5, 3\], not \[5, 8\]"),
        ("int4g32z", lambda t: t[:2], "2 tensors for 3"),
        ("int8", lambda t: (t[0][:, :9], t[1]), r"weight is \[5, 9\], not \[5, 256\]"),
        ("int8", lambda t: (t[0], t[1].int()), "scale is torch.int32, not torch.float32"),
    ],
)
def test_tensors_that_are_not_of_the_format(name: str, change, words: str) -> None:
    _, tensors = parts(name)
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        formats.product(torch.randn(2, 256), name, change(tensors))


@pytest.mark.parametrize("name", INT4)
def test_sizes_that_are_no_multiple_of_a_group(name: str) -> None:
    group = Format.of(name).group
    with pytest.raises(ValueError, match=f"{name}: {group + 16} features are no multiple"):
        formats.quantize(torch.randn(2, group + 16), name)
    with pytest.raises(ValueError, match="are no multiple"):
        formats.pack(torch.zeros(2, group + 16), group)
    with pytest.raises(ValueError, match="are no multiple"):
        formats.unpack(torch.zeros(2, group // 2 + 8), group)


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="'int4' is none of dense, bf16, int8, int8s, int8x32"):
        formats.quantize(torch.randn(2, 2), "int4")


# ---- grids that are given ------------------------------------------------------------------------------


def grid(name: str, rows: int = 5, size: int = 256) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales down to fp16's least, and zeros of any size, whole or not."""
    form = Format.of(name)
    shape = (rows, 1 if form.kind == "int8" else size // form.group)
    scale = (2.0 ** torch.randint(-24, 3, shape)).half()
    zero = (15 * torch.rand(shape)).half() if form.zero else None
    return scale, zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int8s", "int4g32", "int4g64z", "int4g128za8"])
def test_codes_come_back_from_their_values(name: str, dtype: torch.dtype) -> None:
    form = Format.of(name)
    scale, zero = grid(name)
    wide = scale.double().repeat_interleave(256 // scale.shape[1], 1)
    if form.kind == "int8":
        q = torch.randint(-128, 128, (5, 256))
        values = q * wide
    else:
        q = torch.randint(0, 16, (5, 256))
        origin = torch.tensor(8.0) if zero is None else zero.repeat_interleave(form.group, 1)
        values = (q - origin.double()) * wide
    tensors = formats.quantize_on(values.to(dtype), name, scale, zero)
    formats.check(form, tensors, 256)
    codes = tensors[0] if form.kind == "int8" else formats.unpack(tensors[0], form.group)
    assert torch.equal(codes.long(), q)
    assert torch.equal(tensors[1].reshape(scale.shape), scale.to(tensors[1].dtype))
    assert zero is None or torch.equal(tensors[2], zero)
    torch.testing.assert_close(
        formats.dequantize(name, tensors, torch.float64), values, rtol=0, atol=0
    )


def test_what_lies_outside_a_grid_is_clamped_and_dead_scales_mean_nothing() -> None:
    weight = torch.tensor([[-9.0, 9.0, 0.0] + [0.0] * 29, [1.0] * 32])
    scale = torch.tensor([[0.5], [0.0]]).half()
    q = formats.unpack(formats.quantize_on(weight, "int4g32", scale)[0], 32)
    assert q[0, :3].tolist() == [0, 15, 8]
    assert bool((q[1] == 8).all())
    q, _ = formats.quantize_on(20 * weight, "int8", scale)
    assert q[0, :3].tolist() == [-128, 127, 0]
    assert not bool(q[1].any())


def test_a_grid_that_is_none_of_the_format() -> None:
    weight, one = torch.randn(4, 64), torch.ones(4, 1)
    for name, scale, zero in (
        ("bf16", one, None),
        ("int8", one, one),
        ("int8", torch.ones(4, 2), None),
        ("int4g64z", one, None),
        ("int4g64", one, one),
        ("int4g32", one, None),
        ("int4g64z", one, torch.ones(1, 1)),
        ("int4g128", one, None),
    ):
        with pytest.raises(ValueError, match=name):
            formats.quantize_on(weight, name, scale, zero)
