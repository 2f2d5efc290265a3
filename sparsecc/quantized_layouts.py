"""How other projects lay out quantized linear layers in a checkpoint, and what these numbers mean.

Law.   W[n, k] = s[n, g] (q[n, k] − z[n, g]), g the group of column k, whatever the layout. Nibble i of a word
       is its bits 4i … 4i + 3.
Source ``awq``: AutoAWQ's "gemm" (Lin et al. 2023). qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales
       [K/g, N]; nibble i of a word is output (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight.
       ``llm-awq``: its kernels of version 2. qweight int16 [N/4, K]; scales, scaled_zeros = −s z [≥ K/g, N].
       ``gptq``: AutoGPTQ, GPTQModel (Frantar et al. 2022). qweight int32 [K/8, N], nibble i is input i of its
       eight; qzeros int32 [K/g, N/8], nibble i is output i, stored minus one but in gptq_v2; scales [K/g, N];
       g_idx int32 [K], the group of each input.
       ``pack-quantized``: compressed-tensors. weight_packed int32 [N, ⌈K/8⌉], nibble i is input i; weight_scale
       [N, K/g]; weight_zero_point int32 [⌈N/8⌉, K/g], nibble i is output i; weight_shape; weight_g_idx [K].
       ``int-quantized``: compressed-tensors. weight int8 [N, K], weight_scale [N, 1] or [1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.errors import CheckpointError

_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)

# The tensors of each layout, those that it cannot be without first.
PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "awq": (("qweight", "qzeros", "scales"), ()),
    "llm-awq": (("qweight", "scales", "scaled_zeros"), ()),
    "gptq": (("qweight", "qzeros", "scales"), ("g_idx",)),
    "pack-quantized": (
        ("weight_packed", "weight_scale"),
        ("weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point"),
    ),
    "int-quantized": (
        ("weight", "weight_scale"),
        ("weight_zero_point", "input_scale", "input_zero_point"),
    ),
}


@dataclass
class Layer:
    """The tensors of one linear layer in a checkpoint.

    Attributes:
        name: of the module.
        tensors: suffix -> tensor.
        features, size: N and K of the model's own weight.
        config: of the checkpoint's quantization.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    features: int
    size: int
    config: Mapping[str, Any]

    def take(self, suffix: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        """One tensor; ``dtype`` None: any floating one.

        Raises:
            CheckpointError: it is missing, or has another shape or dtype.
        """
        full = f"{self.name}.{suffix}"
        if suffix not in self.tensors:
            raise CheckpointError(f"the checkpoint has no {full}, which its layout wants.")
        found = self.tensors[suffix]
        if tuple(found.shape) != shape:
            raise CheckpointError(
                f"{full} is {list(found.shape)}, not {list(shape)}: the model's weight is "
                f"{[self.features, self.size]}."
            )
        if (found.dtype is not dtype) if dtype else not found.dtype.is_floating_point:
            raise CheckpointError(f"{full} is {found.dtype}, not {dtype or 'floating'}.")
        if dtype is None and not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{full} has a NaN or an infinity.")
        return found

    def rows(self, suffix: str) -> int:
        """The size of a tensor's first axis.

        Raises:
            CheckpointError: it is missing, or is no matrix.
        """
        found = self.tensors.get(suffix)
        if found is None or found.dim() != 2 or not found.shape[0]:
            words = "missing" if found is None else f"{list(found.shape)}, no matrix"
            raise CheckpointError(f"{self.name}.{suffix} is {words}.")
        return int(found.shape[0])


@dataclass
class Codes:
    """What a quantized layer is: W[n, k] = scale[n, g] q[n, k] + start[n, g], g = k // (K/groups) or index[k].

    Attributes:
        bits: 4 or 8.
        q: 0 … 15 uint8, or −128 … 127 int8, [N, K].
        scale: [N, groups], as stored.
        zero: [N, groups] fp64: the code that means 0; 8 (of int8: 0) where there is none of its own.
        start: [N, groups] fp64: −scale · zero; of ``llm-awq`` as stored.
        index: the group of every column, int64 [K], where groups are not in order.
    """

    bits: int
    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    start: torch.Tensor
    index: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """W, fp64 [N, K]: exact."""
        scale, start = self.scale.double(), self.start
        if self.index is not None:
            return scale[:, self.index] * self.q + start[:, self.index]
        grouped = self.q.unflatten(1, (scale.shape[1], -1))
        found: torch.Tensor = (scale[..., None] * grouped + start[..., None]).flatten(1)
        return found


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """The eight nibbles of each int32, lowest first: uint8 [..., 8]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8)


def awq(layer: Layer) -> Codes:
    """AutoAWQ, "gemm"."""
    n, k = layer.features, layer.size
    groups = layer.rows("scales")
    order = torch.tensor(_AWQ_OUTPUTS).argsort()  # output -> its nibble
    levels = [
        nibbles(layer.take(suffix, (rows, n // 8), torch.int32))[..., order].flatten(1).T
        for suffix, rows in (("qweight", k), ("qzeros", groups))
    ]
    scale = layer.take("scales", (groups, n), None).T
    return _with_zeros(levels[0], scale, levels[1])


def llm_awq(layer: Layer) -> Codes:
    """llm-awq, kernels of version 2. Rows of scales behind the last group are padding.

    Weight (n, k) is in word [n // 4, (k // 64) 64 + (n % 4) 16 + (k % 64 // 32) 8 + (k % 8 // 2) 2 + k % 2], as
    nibble (k % 32) // 8.
    """
    n, k = layer.features, layer.size
    if n % 4 or k % 64:
        raise CheckpointError(
            f"{layer.name}.qweight: llm-awq packs 4 outputs and 64 inputs, not {[n, k]}."
        )
    size = _int(layer, ("q_group_size", "group_size"), 128)
    groups = 1 if size == -1 else k // size
    if size != -1 and (size < 1 or k % size):
        raise CheckpointError(f"{layer.name}.scales: groups of {size} do not divide {k} inputs.")
    words = layer.take("qweight", (n // 4, k), torch.int16).to(torch.int32)
    rows = layer.rows("scales")
    if rows < groups:
        raise CheckpointError(f"{layer.name}.scales has {rows} groups, not {groups}.")
    scale, start = (
        layer.take(suffix, (rows, n), None)[:groups].T for suffix in ("scales", "scaled_zeros")
    )
    # [n // 4, k // 64, n % 4, k % 64 // 32, k % 8 // 2, k % 2], and the nibble: k % 32 // 8.
    blocks = words.reshape(n // 4, k // 64, 4, 2, 4, 2)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32)
    q = ((blocks[..., None] >> shifts) & 15).to(torch.uint8)
    q = q.permute(0, 2, 1, 3, 6, 4, 5).reshape(n, k)
    s, added = scale.double(), start.double()
    ratio = torch.where(s == 0, 0.0, -added / s)
    whole = ratio.round()
    # scaled_zeros is −s z in fp16: where it is that of a whole z, z itself is meant.
    meant = (-s * whole).to(start.dtype).double() == added
    return Codes(4, q, scale, torch.where(meant, whole, ratio), added)


def gptq(layer: Layer) -> Codes:
    """AutoGPTQ and GPTQModel, 4 bits."""
    n, k = layer.features, layer.size
    groups = layer.rows("scales")
    words = layer.take("qweight", (k // 8, n), torch.int32)
    q = nibbles(words).permute(1, 0, 2).reshape(n, k)
    zero = nibbles(layer.take("qzeros", (groups, n // 8), torch.int32)).flatten(1).T
    version = layer.config.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{layer.name}.qweight: checkpoint_format {version!r} is none of gptq, gptq_v2."
        )
    if version == "gptq":
        if bool((zero == 15).any()):
            raise CheckpointError(
                f"{layer.name}.qzeros holds 15, which is 16 or 0 minus one: readers of version 1 differ. "
                "Convert the checkpoint to gptq_v2."
            )
        zero = zero + 1
    codes = _with_zeros(q, layer.take("scales", (groups, n), None).T, zero)
    return _ordered(layer, codes, "g_idx", -(-k // groups))


def pack_quantized(layer: Layer) -> Codes:
    """compressed-tensors, 4 bits in int32."""
    n, k = layer.features, layer.size
    shape = layer.tensors.get("weight_shape")
    if shape is not None and shape.tolist() != [n, k]:
        raise CheckpointError(f"{layer.name}.weight_shape is {shape.tolist()}, not {[n, k]}.")
    q = nibbles(layer.take("weight_packed", (n, -(-k // 8)), torch.int32)).flatten(1)[:, :k]
    scale = layer.tensors.get("weight_scale")
    groups = int(scale.shape[1]) if scale is not None and scale.dim() == 2 else 1
    scale = layer.take("weight_scale", (n, groups), None)
    zero = torch.full((n, groups), 8)
    if "weight_zero_point" in layer.tensors:
        words = layer.take("weight_zero_point", (-(-n // 8), groups), torch.int32)
        zero = nibbles(words).permute(0, 2, 1).flatten(0, 1)[:n]
    return _ordered(layer, _with_zeros(q, scale, zero), "weight_g_idx", -(-k // groups))


def int_quantized(layer: Layer) -> Codes:
    """compressed-tensors, int8 with a scale for each row or for all."""
    n, k = layer.features, layer.size
    q = layer.take("weight", (n, k), torch.int8)
    scale = layer.tensors.get("weight_scale")
    if scale is not None and scale.numel() == 1:
        scale = layer.take("weight_scale", tuple(scale.shape), None).reshape(1, 1).expand(n, 1)
    else:
        groups = int(scale.shape[1]) if scale is not None and scale.dim() == 2 else 1
        scale = layer.take("weight_scale", (n, groups), None)
    zero = layer.tensors.get("weight_zero_point")
    if zero is None:
        zero = torch.zeros(1, 1)
    elif zero.numel() not in (1, scale.numel()):
        raise CheckpointError(
            f"{layer.name}.weight_zero_point is {list(zero.shape)}, not {list(scale.shape)}."
        )
    zero = (zero.reshape(1, 1) if zero.numel() == 1 else zero.reshape(scale.shape)).expand(
        scale.shape
    )
    if k % scale.shape[1]:
        raise CheckpointError(f"{layer.name}.weight_scale: groups do not divide {k} inputs.")
    return _with_zeros(q, scale, zero, bits=8)


READERS: Mapping[str, Callable[[Layer], Codes]] = {
    "awq": awq,
    "llm-awq": llm_awq,
    "gptq": gptq,
    "pack-quantized": pack_quantized,
    "int-quantized": int_quantized,
}


def layout_of(layer: Layer) -> str:
    """The layout whose tensors a layer has, by their names, shapes and dtypes; "" where it is not quantized.

    Raises:
        CheckpointError: it is quantized, and in none of the known layouts.
    """
    tensors = layer.tensors
    if "weight_packed" in tensors:
        return "pack-quantized"
    if "weight_scale" in tensors and "weight" in tensors:
        if tensors["weight"].dtype is torch.int8:
            return "int-quantized"
        raise CheckpointError(
            f"{layer.name}.weight is {tensors['weight'].dtype} with a scale: of such layouts only int8 is read."
        )
    found = tensors.get("qweight")
    if found is None:
        return ""
    if "scaled_zeros" in tensors:
        return "llm-awq"
    shapes = {
        "awq": (layer.size, layer.features // 8),
        "gptq": (layer.size // 8, layer.features),
    }
    for name, shape in shapes.items():
        if found.dtype is torch.int32 and tuple(found.shape) == shape:
            return name
    raise CheckpointError(
        f"{layer.name}.qweight is {found.dtype} {list(found.shape)}: of 4 bits and for the model's weight "
        f"{[layer.features, layer.size]} it would be int32 {list(shapes['gptq'])} (GPTQ) or "
        f"{list(shapes['awq'])} (AWQ, version gemm)."
    )


def _with_zeros(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int = 4) -> Codes:
    wide = zero.double()
    return Codes(bits, q, scale, wide, -scale.double() * wide)


def _ordered(layer: Layer, codes: Codes, suffix: str, size: int) -> Codes:
    """``codes`` with the index of groups that the layer has, where it is not the plain one."""
    k, groups = layer.size, codes.scale.shape[1]
    plain = torch.arange(k) // size
    index = plain
    if suffix in layer.tensors:
        index = layer.take(suffix, (k,), torch.int32).long()
        if bool(((index < 0) | (index >= groups)).any()):
            raise CheckpointError(
                f"{layer.name}.{suffix} names groups beyond the {groups} there are."
            )
    elif k % groups:
        raise CheckpointError(
            f"{layer.name}: {groups} groups do not divide {k} inputs, and there is no {suffix}."
        )
    if k % groups or not torch.equal(index, plain):
        codes.index = index
    return codes


def _int(layer: Layer, keys: tuple[str, ...], default: int) -> int:
    value = next((layer.config[key] for key in keys if key in layer.config), default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"the checkpoint's {keys[0]} is {value!r}, not a whole number.")
    return value
