"""How the weights of ``sparsecc::few_rows`` are kept: floats, bytes, or nibbles with a scale for each group.

A weight ``[N, K]`` is one or more tensors (:func:`parts`), which stand in a row in the operator's list:

- ``dense``: floats of x's dtype. ``bf16``: bfloat16 under any x.
- ``int8``: q int8 ``[N, K]`` and scale fp32 ``[N]``; W = scale q. Activations are int8 for each row, too.
- ``int8x<G>``, G = 32, 64 or 128: the same weights; activations are int8 for each G features of a row.
- ``int8s``: the same weights; activations are int8 with a step that is known before, and come divided by it.
- ``int4g<G>``: packed uint8 ``[N, K/2]`` and scale fp16 ``[N, K/G]``; W = scale (q - 8) with q in 0 … 15.
  Suffix ``z``: also zero fp16 ``[N, K/G]``, and W = scale (q - zero). Suffix ``a8``: activations are int8 for
  each G features of a row.
- ``fp4``, ``fp4w``: packed uint8 ``[N, K/2]``, codes of E2M1 (``minifloat.py``), and scale fp32 ``[N]``, 2^-b
  of a row's exponent bias b; W = scale number. Activations of ``fp4`` are E2M1 with one bias that is known
  before: they come divided by 2^-b. No kernel reads these: they are emulated in ATen, with exact sums.

Nibbles: in a group of G weights, byte j holds weight j in its low and weight j + G/2 in its high half, so that
a vector of bytes becomes two vectors of weights in their own order. Those of E2M1 are packed in pairs (G = 2).

Activations in int8: s = max|y| / 127 over the row or the group, q = y / s rounded to nearest, ties to even;
zeros stay zeros, and a row with a NaN or an infinity becomes NaN. Those of ``int8s`` are q = y rounded in
the same way and clamped to -127 … 127: their step is part of the weights' scales, and a row with a NaN becomes
NaN. Sums of products of integers are exact; one multiplication by the scales follows, for each group if there
are some.

Sources: symmetric and affine quantization as in Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference" (arXiv:1712.05877); groups as in Frantar et al. 2022,
"GPTQ" (arXiv:2210.17323); activations for each token as in Yao et al. 2022, "ZeroQuant" (arXiv:2206.01861);
E2M1 with real-valued biases as in Liu et al. 2023, "LLM-FP4" (arXiv:2310.16836).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecc.runtime.ops.minifloat import E2M1

GROUPS = (32, 64, 128)
NAMES = (
    "dense",
    "bf16",
    "int8",
    "int8s",
    *(f"int8x{g}" for g in GROUPS),
    *(f"int4g{g}{zero}{act}" for g in GROUPS for zero in ("", "z") for act in ("", "a8")),
)
EMULATED = ("fp4", "fp4w")  # without a kernel
# Sums of this many products of int8 stay within int32.
MOST_INT8 = 2**17


@dataclass(frozen=True)
class Part:
    """One tensor of a weight ``[N, K]``: ``[N, K / per]``, or ``[N]`` where ``per`` is 0.

    Attributes:
        name: what it is called in errors.
        dtype: None for that of x.
        per: how many weights of a row share one element.
    """

    name: str
    dtype: torch.dtype | None
    per: int

    def shape(self, features: int, size: int) -> tuple[int, ...]:
        return (features, size // self.per) if self.per else (features,)


@dataclass(frozen=True)
class Format:
    """A format by its parts: ``kind`` is "float", "int8", "int4" or "fp4".

    Attributes:
        group: how many weights of a row stand together, by scale or by packing.
        rounds_activations: they are int8, or E2M1.
        static: they come divided by their step.
        together: how many features of a row have one scale of activations; 0 for all.
    """

    name: str
    kind: str
    group: int = 1
    zero: bool = False
    rounds_activations: bool = False
    static: bool = False
    together: int = 0

    @classmethod
    @functools.cache
    def of(cls, name: str) -> Format:
        """The format of a name.

        Raises:
            ValueError: there is none.
        """
        if name not in (*NAMES, *EMULATED):
            raise ValueError(f"weight format {name!r} is none of {', '.join((*NAMES, *EMULATED))}")
        if name in EMULATED:
            return cls(name, "fp4", 2, rounds_activations=name == "fp4", static=name == "fp4")
        if name in ("int8", "int8s"):
            return cls(name, "int8", rounds_activations=True, static=name == "int8s")
        found = re.fullmatch(r"int8x(\d+)", name)
        if found is not None:
            return cls(name, "int8", rounds_activations=True, together=int(found[1]))
        found = re.fullmatch(r"int4g(\d+)(z?)(a8)?", name)
        if found is None:
            return cls(name, "float")
        group, rounds = int(found[1]), bool(found[3])
        return cls(name, "int4", group, bool(found[2]), rounds, together=group if rounds else 0)

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """The tensors of a weight, in order."""
        if self.kind == "float":
            return (Part("weight", torch.bfloat16 if self.name == "bf16" else None, 1),)
        if self.kind == "int8":
            return (Part("weight", torch.int8, 1), Part("scale", torch.float32, 0))
        if self.kind == "fp4":
            return (Part("packed", torch.uint8, 2), Part("scale", torch.float32, 0))
        groups = [Part("scale", torch.float16, self.group)]
        if self.zero:
            groups.append(Part("zero", torch.float16, self.group))
        return (Part("packed", torch.uint8, 2), *groups)

    @property
    def multiple(self) -> int:
        """What the number of features must be a multiple of."""
        return max(self.group, self.together)

    def nbytes(self, features: int, size: int, own: int) -> int:
        """Bytes of a weight ``[features, size]``; ``own``: of one element of x's dtype."""
        return sum(
            math.prod(part.shape(features, size))
            * (own if part.dtype is None else part.dtype.itemsize)
            for part in self.parts
        )

    def check_size(self, size: int) -> None:
        """Whether a row may have ``size`` weights.

        Raises:
            ValueError: groups do not fit, or sums may overflow.
        """
        if size % self.multiple:
            raise ValueError(f"{self.name}: {size} features are no multiple of {self.multiple}")
        if self.rounds_activations and self.kind != "fp4" and size > MOST_INT8:
            raise ValueError(
                f"{self.name}: {size} features are more than {MOST_INT8}: int32 overflows"
            )


def slots(forms: Sequence[Format]) -> tuple[slice, ...]:
    """Where the tensors of each weight stand among those of all, in a row."""
    ends = list(itertools.accumulate((len(form.parts) for form in forms), initial=0))
    return tuple(itertools.starmap(slice, itertools.pairwise(ends)))


def check(form: Format, tensors: Sequence[torch.Tensor], size: int) -> None:
    """Whether ``tensors`` are a weight of ``size`` features in this format; the dtypes of scales may be wider.

    Raises:
        ValueError: a shape or a dtype is not the format's.
    """
    form.check_size(size)
    if len(tensors) != len(form.parts):
        raise ValueError(f"{form.name}: {len(tensors)} tensors for {len(form.parts)}")
    features = tensors[0].shape[0] if tensors[0].dim() else -1
    for part, tensor in zip(form.parts, tensors, strict=True):
        shape = part.shape(features, size)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{form.name}: {part.name} is {list(tensor.shape)}, not {list(shape)}")
        exact = part.dtype in (torch.int8, torch.uint8)
        if tensor.dtype != part.dtype if exact else not tensor.dtype.is_floating_point:
            raise ValueError(f"{form.name}: {part.name} is {tensor.dtype}, not {part.dtype}")


# ---- nibbles -------------------------------------------------------------------------------------------


def pack(q: torch.Tensor, group: int) -> torch.Tensor:
    """Integers 0 … 15, ``[N, K]``, as uint8 ``[N, K/2]``.

    Raises:
        ValueError: K is no multiple of ``group``.
    """
    if q.shape[-1] % group:
        raise ValueError(f"{q.shape[-1]} features are no multiple of {group}")
    groups = q.shape[-1] // group
    low, high = q.to(torch.uint8).unflatten(-1, (groups, 2, group // 2)).unbind(-2)
    packed: torch.Tensor = (low | (high << 4)).flatten(-2)
    return packed


def unpack(packed: torch.Tensor, group: int) -> torch.Tensor:
    """The inverse of :func:`pack`: uint8 ``[N, K]`` of uint8 ``[N, K/2]``.

    Raises:
        ValueError: K is no multiple of ``group``.
    """
    if 2 * packed.shape[-1] % group:
        raise ValueError(f"{2 * packed.shape[-1]} features are no multiple of {group}")
    halves = packed.unflatten(-1, (2 * packed.shape[-1] // group, group // 2))
    return torch.stack([halves & 15, halves >> 4], -2).flatten(-3)


# ---- quantization --------------------------------------------------------------------------------------


def quantize(
    weight: torch.Tensor, name: str, share: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The tensors of ``weight`` in a format, each weight rounded to the nearest value that it has.

    Scales: int8 max|w| / 127 of a row; int4 max|w| / 7 of a group; with a zero, (max - min) / 15 of a group
    that is widened to hold 0, and zero = -min / scale, an integer; or the same of the group as it is, with any
    zero, where that halves the squared error (the scale is at least max|w| / 1024: fp16 then holds the zero).
    fp4: share max|w| / 12 of a row. They are rounded to their dtype before weights are divided by them. A scale
    that fp16 cannot hold is infinite.

    Args:
        weight: ``[N, K]``, of any float dtype.
        name: of the format.
        share: of fp4: of the largest magnitude, what the largest code stands for, ``[N, 1]``; None for all.

    Raises:
        ValueError: the format is unknown, or K is not one of its sizes.
    """
    form = Format.of(name)
    form.check_size(weight.shape[-1])
    if form.kind == "float":
        return (weight.to(form.parts[0].dtype or weight.dtype),)
    w = weight if weight.dtype is torch.float64 else weight.float()
    if form.kind == "int8":
        q, scale = quantize_rows(w, torch.float32)
        return q.to(torch.int8), scale.squeeze(-1)
    if form.kind == "fp4":
        largest = w.abs().amax(-1, keepdim=True) if w.shape[-1] else w.new_zeros((len(w), 1))
        largest = largest if share is None else largest * share.to(w.dtype)
        scale = (largest / E2M1.largest).float()
        codes = E2M1.codes(E2M1.rounded(_divided(w, scale.to(w.dtype))))
        return pack(codes, form.group), scale.squeeze(-1)
    groups = _grouped(w, form)
    low, high = groups.amin(-1), groups.amax(-1)
    if not form.zero:
        scale = (torch.maximum(high, -low) / 7).half()
        levels = _levels(groups, scale, torch.full_like(scale, 8))
        return pack(levels.flatten(-2), form.group), scale
    # Where 0 is a level, tiny weights stay tiny, which large activations may meet.
    first = _with_zero(groups, low.clamp(max=0), high.clamp(min=0), whole=True)
    second = _with_zero(groups, low, high, whole=False)
    better = _squared(groups, *second) < _squared(groups, *first) / 2
    scale, zero = (torch.where(better, b, a) for a, b in zip(first, second, strict=True))
    return pack(_levels(groups, scale, zero).flatten(-2), form.group), scale, zero


def _with_zero(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, *, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, fp16, of levels from ``low`` to ``high``; ``whole``: the zero is an integer."""
    scale = torch.maximum((high - low) / 15, torch.maximum(high, -low) / 1024).half()
    zero = _divided(-low, scale.to(low.dtype))
    return scale, (zero.round() if whole else zero).half()


def _levels(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """0 … 15, as floats."""
    levels = _divided(groups, scale.to(groups.dtype)[..., None]) + zero.to(groups.dtype)[..., None]
    return levels.round().clamp(0, 15)


def _squared(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The squared error of each group."""
    kept = _levels(groups, scale, zero) - zero.to(groups.dtype)[..., None]
    return (kept * scale.to(groups.dtype)[..., None] - groups).square().sum(-1)


def quantize_on(
    weight: torch.Tensor, name: str, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The tensors of ``weight`` in a format whose scales and zeros are given: q = round(w / scale + zero).

    Of a weight that codes on this grid mean, these codes come back, whatever float dtype it was rounded to in
    between (unless their scale is 0: all of them mean 0). Codes of int8 are -128 … 127 here.

    Args:
        weight: ``[N, K]``, of any float dtype.
        name: of the format, int8 or int4.
        scale: ``[N, 1]`` of int8, ``[N, K/G]`` of int4.
        zero: ``[N, K/G]`` for a format with zeros, None for others.

    Raises:
        ValueError: the format is unknown or has no scales, K is not one of its sizes, or the grid does not fit.
    """
    form = Format.of(name)
    features, size = weight.shape
    form.check_size(size)
    if form.kind == "float" or (zero is None) == form.zero:
        raise ValueError(f"{name} is no format of a grid with{'out' if zero is None else ''} zeros")
    wanted = (features, 1 if form.kind == "int8" else size // form.group)
    for part in (scale, zero):
        if part is not None and tuple(part.shape) != wanted:
            raise ValueError(f"{name}: a grid {list(part.shape)} for {list(wanted)}")
    w = weight if weight.dtype is torch.float64 else weight.float()
    if form.kind == "int8":
        kept = scale.float()
        q = _divided(w, kept.to(w.dtype)).round().clamp(-128, 127)
        return q.to(torch.int8), kept.squeeze(-1)
    kept = scale.half()
    origin = torch.full_like(kept, 8) if zero is None else zero.half()
    shifted = _divided(_grouped(w, form), kept.to(w.dtype)[..., None])
    levels = (shifted + origin.to(w.dtype)[..., None]).round().clamp(0, 15)
    packed = pack(levels.flatten(-2), form.group)
    return (packed, kept, origin) if form.zero else (packed, kept)


def dequantize(name: str, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[N, K]`` that ``tensors`` mean, computed in ``dtype``.

    Raises:
        ValueError: the format is unknown, or the tensors are none of its.
    """
    form = Format.of(name)
    first = tensors[0]
    check(form, tensors, first.shape[-1] * form.parts[0].per if first.dim() else 0)
    if form.kind == "float":
        return first.to(dtype)
    if form.kind == "int8":
        return first.to(dtype) * tensors[1].to(dtype)[:, None]
    if form.kind == "fp4":
        return E2M1.numbers(unpack(first, form.group), dtype) * tensors[1].to(dtype)[:, None]
    wide = dtype if dtype is torch.float64 else torch.float32  # q - zero may cancel
    centred = _centred(form, tensors, wide) * tensors[1].to(wide)[..., None]
    return centred.flatten(-2).to(dtype)


def quantize_rows(
    y: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 for each row: ``y ≈ scale q``.

    Args:
        y: ``[..., K]``.
        dtype: of the scale; None for that of y.

    Returns:
        q ``[..., K]``, whole numbers of -127 … 127 in y's dtype, and the scale ``[..., 1]``. A row of zeros has
        the scale 0 and q = 0; a row with a NaN or an infinity has q = NaN in it.
    """
    scale = (
        y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))
    ) / 127
    scale = scale.to(dtype or y.dtype)
    return _whole(_divided(y, scale.to(y.dtype))), scale


def quantize_activations(y: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as a format rounds them: those of each row, or of each ``together`` features of it.

    Args:
        y: ``[..., K]``.

    Returns:
        q ``[..., groups, K / groups]``, whole numbers in y's dtype, and the scale ``[..., groups, 1]``.
    """
    groups = y.shape[-1] // form.together if form.together else 1
    split = y.unflatten(-1, (groups, form.together or y.shape[-1]))
    if form.static:
        return _whole(split), split.new_ones((*split.shape[:-1], 1))
    return quantize_rows(split)


def product(y: torch.Tensor, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """y Wᵀ as the format means it, ``[..., N]``, in y's dtype.

    Args:
        y: ``[..., K]``, float32 or float64.
        name: of the format.
        tensors: its parts.

    Raises:
        ValueError: the format is unknown, or the tensors are none of its.
    """
    form = Format.of(name)
    check(form, tensors, y.shape[-1])
    if not form.rounds_activations:
        return torch.nn.functional.linear(y, dequantize(name, tensors, y.dtype))
    if form.kind == "fp4":
        numbers = E2M1.numbers(unpack(tensors[0], form.group), torch.float64)
        sums = torch.nn.functional.linear(E2M1.rounded(y).double(), numbers)
        return sums.to(y.dtype) * tensors[1].to(y.dtype)
    q, scale = quantize_activations(y, form)
    whole = form.kind == "int8"  # one scale for all of a row
    if whole:
        weights = tensors[0].double().unflatten(-1, q.shape[-2:])
        own = y.new_ones(weights.shape[:-1])
    else:
        weights, own = _centred(form, tensors, torch.float64), tensors[1].to(y.dtype)
    total = y.new_zeros((*y.shape[:-1], len(own)))
    for g in range(q.shape[-2]):  # in fp64, sums of products of integers are exact
        sums = torch.nn.functional.linear(q[..., g, :].double(), weights[:, g])
        total = total + sums.to(y.dtype) * (scale[..., g, :] * own[:, g])
    return total * tensors[1].to(y.dtype) if whole else total


def _whole(levels: torch.Tensor) -> torch.Tensor:
    """What int8 has of them; NaN stays."""
    return levels.round().clamp(-127, 127)


def _grouped(values: torch.Tensor, form: Format) -> torch.Tensor:
    grouped: torch.Tensor = values.unflatten(-1, (values.shape[-1] // form.group, form.group))
    return grouped


def _centred(form: Format, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """q minus its zero, ``[N, K/G, G]``."""
    q = _grouped(unpack(tensors[0], form.group).to(dtype), form)
    return q - tensors[2].to(dtype)[..., None] if form.zero else q - 8


def _divided(a: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """a / by, and 0 where ``by`` is 0."""
    return torch.where(by == 0, torch.zeros((), dtype=a.dtype, device=a.device), a / by)
