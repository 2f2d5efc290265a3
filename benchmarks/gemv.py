"""Products of a few rows with one weight in every format, beside the time of reading it from memory.

Prediction, written before measuring: at one row, memory is the limit for all formats but int4 with float
activations. fp32 and bf16 reach 90% of the bandwidth of a streaming read, int8 80%; int4 with int8 activations
needs half the bytes and somewhat more arithmetic for each, so 60 to 70% of the bandwidth, which is 1.6 times
int8; int4 with float activations must widen each weight to fp32, and is bound by that at half of the bandwidth.
At 16 rows arithmetic is the limit everywhere, and what is left is the lead of int8 products over float ones.
ATen reaches 80% in fp32 and 45% in bf16 at one row. torchao's int8 weights run by Inductor's own kernels: at
most 1.0 times ours for weights alone, behind where activations are quantized in passes of their own.

What the prediction got wrong: torchao's and ATen's int8 weights alone reach half of ours, not the same; int4
with float activations is 0.75 to 1.0 times int8.

Weights take turns so that no cache holds them, and so does the read that they are compared with.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from sparsecc.codegen.cpp import few_rows as generator
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.few_rows import Spec, few_rows_native
from sparsecc.timing import side_by_side

SIZES = ((2048, 5632), (576, 1536))  # features, size
ROWS = (1, 4, 16)
COLD = 96 * 2**20  # bytes that no cache holds
ROUNDS = 15

# Name -> the format, and the dtype of x.
KERNELS = {
    "fp32": ("dense", torch.float32),
    "bf16": ("dense", torch.bfloat16),
    "int8": ("int8", torch.float32),
    "int4g32": ("int4g32", torch.float32),
    "int4g128": ("int4g128", torch.float32),
    "int4g32a8": ("int4g32a8", torch.float32),
    "int4g128a8": ("int4g128a8", torch.float32),
}
TORCHAO = {
    "torchao int8": ("Int8WeightOnlyConfig", {}),
    "torchao int8 dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
    "torchao int4": ("Int4WeightOnlyConfig", {"group_size": 128}),
}


class Variant:
    """Calls over as many copies of a weight as no cache holds."""

    def __init__(self, calls: list[Callable[[], Any]], nbytes: int) -> None:
        self.calls, self.nbytes = calls, nbytes

    def __call__(self) -> None:
        for call in self.calls:
            call()


@torch.no_grad()
def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    if importlib.util.find_spec("torchao") is None:
        print("torchao is not installed: its products are not measured")
    data: dict[str, Any] = {"gigabytes_per_second": limits["gigabytes_per_second"]}
    rows = [
        "| weight | rows | variant | bytes a weight | time | GB/s | of a read's | x int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for features, size in SIZES:
        for m in ROWS:
            entry = data[f"{features}x{size}, {m} rows"] = _measure(features, size, m)
            base = entry["int8"]["microseconds"]
            for name, got in entry.items():
                cells = [
                    f"{features}x{size}",
                    f"{m}",
                    name,
                    f"{got['bytes'] / features / size:.2f}",
                    f"{got['microseconds']:.0f} us ±{got['spread']:.0%}",
                    f"{got['gigabytes_per_second']:.1f}",
                    f"{got['share_of_read']:.0%}",
                    f"{base / got['microseconds']:.2f}x",
                ]
                rows.append(f"| {' | '.join(cells)} |")
                print(rows[-1], flush=True)
    return data, "\n".join(rows)


def _measure(features: int, size: int, m: int) -> dict[str, Any]:
    weight, x = torch.randn(features, size) / size**0.5, torch.randn(m, size)
    variants = {**_ours(weight, x), **_aten(weight, x), **_torchao(weight, x)}
    stream = torch.ones(COLD // 4)
    timings = side_by_side({"read": stream.sum, **variants}, rounds=ROUNDS)
    read = stream.nbytes / timings["read"].median
    entry = {}
    for name, variant in variants.items():
        seconds = timings[name].median / len(variant.calls)
        entry[name] = {
            "bytes": variant.nbytes,
            "microseconds": seconds * 1e6,
            "spread": timings[name].spread,
            "gigabytes_per_second": variant.nbytes / seconds / 1e9,
            "share_of_read": variant.nbytes / seconds / read,
        }
    return entry


def _copies(nbytes: int) -> range:
    return range(math.ceil(COLD / nbytes))


def _over(call: Callable[[list[torch.Tensor]], Any], tensors: list[torch.Tensor]) -> Variant:
    """``call`` over copies of ``tensors``."""
    nbytes = sum(t.nbytes for t in tensors)
    call(tensors)  # compiles
    copies = [[t.clone() for t in tensors] for _ in _copies(nbytes)]
    return Variant([lambda each=each: call(each) for each in copies], nbytes)  # type: ignore[misc]


def _ours(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Variant]:
    found = {}
    for name, (form, dtype) in KERNELS.items():
        spec, rows = Spec("none", 0.0, ("p0",), (form,)), x.to(dtype)
        generator.load(spec, dtype)
        text = spec.text()

        def call(tensors: list[torch.Tensor], rows: torch.Tensor = rows, text: str = text) -> Any:
            return few_rows_native(rows, tensors, [], text)

        found[name] = _over(call, list(formats.quantize(weight.to(dtype), form)))
    return found


def _aten(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Variant]:
    found = {}
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: F.linear(x, w), backend="inductor", dynamic=False)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        narrow = x.to(dtype)
        for kind, linear in (("ATen", F.linear), ("Inductor", compiled)):

            def call(
                tensors: list[torch.Tensor],
                linear: Callable[..., Any] = linear,
                x: torch.Tensor = narrow,
            ) -> Any:
                return linear(x, tensors[0])

            found[f"{kind} {name}"] = _over(call, [weight.to(dtype)])
    return {**found, **_packed(weight, x.bfloat16())}


def _packed(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Variant]:
    """ATen's products of bf16 rows with int8 weights, and with int4 in groups of 128."""
    aten = torch.ops.aten
    levels, scale = formats.quantize(weight, "int8")
    packed, steps, zero = formats.quantize(weight, "int4g128z")
    nibbles = formats.unpack(packed, 128).int()
    own = aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    # w = scale (q - 8) + shift, with both [K / 128, N] in one tensor.
    shift = (8 - zero.float()) * steps.float()
    pairs = torch.stack([steps.float().t(), shift.t()], -1).bfloat16().contiguous()

    def int8(tensors: list[torch.Tensor]) -> Any:
        return aten._weight_int8pack_mm(x, *tensors)

    def int4(tensors: list[torch.Tensor]) -> Any:
        return aten._weight_int4pack_mm_for_cpu(x, tensors[0], 128, tensors[1])

    exact = x.float() @ formats.dequantize("int4g128z", (packed, steps, zero), torch.float32).T
    assert (int4([own, pairs]).float() - exact).norm() < 0.02 * exact.norm()
    return {
        "ATen int8": _over(int8, [levels, scale.bfloat16()]),
        "ATen int4": _over(int4, [own, pairs]),
    }


def _torchao(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Variant]:
    """torchao's quantized layers in bf16, compiled by Inductor as it advises; what it lacks here is named."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    import torchao.quantization as quantization

    found = {}
    sizes = {"torchao int4": 0.5 + 4 / 128}
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    plain.weight.data.copy_(weight)
    for name, (config, options) in TORCHAO.items():
        torch._dynamo.reset()
        try:
            layer = torch.nn.Sequential(copy.deepcopy(plain))
            quantization.quantize_(layer, getattr(quantization, config)(**options))
            nbytes = int(weight.numel() * sizes.get(name, 1.0))
            layers = [copy.deepcopy(layer[0].weight) for _ in _copies(nbytes)]
            compiled = torch.compile(lambda x, w: F.linear(x, w), backend="inductor", dynamic=False)
            narrow = x.bfloat16()
            compiled(narrow, layers[0])
            calls = [lambda w=w, c=compiled, x=narrow: c(x, w) for w in layers]  # type: ignore[misc]
            found[name] = Variant(calls, nbytes)
        except Exception as error:  # whatever this version of torchao does not have on this machine
            words = str(error).splitlines()
            print(f"{name} is not measured: {type(error).__name__}: {words[0] if words else ''}")
    return found
