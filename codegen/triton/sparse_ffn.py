"""Triton for ``sparsecc::sparse_ffn``: of the weights, the rows of live neurons alone are read.

Law: y[m] = sum over i with a[m, i] != 0 of hidden(a, p1)[m, i] D[i]; see ``runtime.ops.sparse_ffn``.
Source: CATS (Lee et al. 2024, arXiv:2404.08763, alg. 1): gate, then gathered rows of up, then of down.
Legal: 1 to 16 rows; weights in every format but E2M1. Exact: skipping is, and sums are in fp32, rounded once
(products with x in int8 in int32).
Pays: where few neurons are live for any of the rows; at a half the gathered reads already cost what they save.

Where a format multiplies with x in int8, ``round_activations`` makes that of x before all else.
``gate`` writes the activations [M, C] of the neurons that may be live; a selection over all neurons of a row
takes its limits from them. ``live`` then takes one chunk of neurons for several programs: each finds by ranks
which of them are live, in ascending order, and makes h for some. ``down`` shares the chunks among parts, and
``combine`` adds the parts up. No atomics: an order follows from sizes alone. Between ``live`` and ``down`` h
goes through memory (4 bytes a neuron, where its weights have thousands), so that both have programs enough to
fill a GPU, which one kernel, cut by chunks of neurons alone, has not. ``run`` is in ``launch_sparse_ffn.py``.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.codegen.triton.few_rows import DTYPES, MOST_APART, MOST_ROWS
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import expressions
from sparsecc.runtime.ops.formats import Format
from sparsecc.runtime.ops.sparse_ffn import Spec

STATISTICS_BLOCK = 1024  # neurons of a step of ``gaussian_limits``
COMBINE_BLOCK = 256
_COUNTS_BLOCK = 256  # chunks of a step of ``add_counts``
_ROUND_BLOCK = 1024  # features of a step of ``round_activations``
_PROGRAMS = 512  # some for each multiprocessor of a large GPU


@dataclass(frozen=True)
class Config:
    """How the kernels are cut.

    Attributes:
        chunk: neurons of which one program of ``live`` finds those that live.
        rows, block_k: of a tile of gate or up.
        live, block_n: of a tile of down.
        warps, stages: of all three; tiles loaded ahead.
    """

    chunk: int
    rows: int
    block_k: int
    live: int
    block_n: int
    warps: int = 4
    stages: int = 1

    def __str__(self) -> str:
        tiles = f"{self.rows}x{self.block_k} and {self.live}x{self.block_n}"
        return f"{tiles} of {self.chunk}, {self.warps} warps, {self.stages} stages"


def padded(rows: int) -> int:
    """How many rows a kernel computes for ``rows``."""
    return 1 << (rows - 1).bit_length() if rows <= MOST_APART else MOST_ROWS


def configs(rows: int, size: int, dtype: torch.dtype) -> list[Config]:
    """Those worth measuring, the one to take unmeasured first."""
    each = padded(rows)
    if each <= 2:
        cuts = [
            Config(128, 4, 512, 8, 256),
            Config(64, 4, 512, 8, 128),
            Config(128, 8, 256, 16, 128, stages=2),
        ]
    elif each <= MOST_APART:
        cuts = [Config(128, 4, 256, 4, 256), Config(64, 4, 128, 4, 128, stages=2)]
    elif dtype is torch.float32:
        cuts = [Config(128, 16, 32, 16, 64), Config(128, 32, 32, 16, 32)]
    else:
        cuts = [Config(128, 16, 128, 16, 64, stages=2), Config(128, 32, 128, 16, 128)]
    most = max(16, 1 << (max(size, 1) - 1).bit_length())  # no wider than the rows are
    narrow = [
        Config(c.chunk, c.rows, min(c.block_k, most), c.live, c.block_n, c.warps, c.stages)
        for c in cuts
    ]
    return list(dict.fromkeys(narrow))


def parts(chunks: int, width: int, config: Config) -> tuple[int, int]:
    """How many programs share the chunks for one tile of ``width`` outputs, and the chunks of each."""
    tiles = -(-width // config.block_n)
    walk = max(-(-chunks // max(_PROGRAMS // tiles, 1)), 1)
    return max(-(-chunks // walk), 1), walk


def check_formats(spec: Spec) -> None:
    """Whether kernels read the weights of ``spec``.

    Raises:
        BuildError: one is E2M1, which no kernel reads, or neurons are live by the blocks of a router.
    """
    if spec.block:
        raise BuildError(
            f"sparse_ffn in Triton: no kernel reads a router's blocks of {spec.block} neurons"
        )
    if any(form.kind == "fp4" for form in spec.kept):
        kept = ", ".join(form.name for form in spec.kept)
        raise BuildError(f"sparse_ffn in Triton: weights are {kept}; no kernel reads E2M1")


def roundings(spec: Spec) -> dict[str, Format]:
    """How gate and up have x rounded to int8: a format of each way, by the name of what it makes."""
    rounding = [form for form in spec.kept[:-1] if form.rounds_activations]
    return {_rounding(form): form for form in rounding}


def _rounding(form: Format) -> str:
    return "_static" if form.static else f"_by{form.together}" if form.together else "_row"


def has_gate(spec: Spec) -> bool:
    """Whether activations are kept: there is a product, or a selection needs them all."""
    return spec.gate or bool(spec.select)


def source(spec: Spec) -> str:
    """The Triton of one spec, to be read: its law first.

    Raises:
        BuildError: a weight is in a format that no kernel here reads.
    """
    check_formats(spec)
    name = f"sparse_ffn_{hashlib.sha256(spec.source().text().encode()).hexdigest()[:8]}"
    trees = dict(zip(("activation", "after", "hidden"), spec.trees, strict=True))
    texts = [spec.activation, spec.after, spec.hidden]
    functions = {"divide"} if any("/" in text for text in texts) else set()
    functions.update(*(expressions.functions(tree) for tree in trees.values()))
    if spec.gaussian is not None:
        functions.add("relu")
    shared = {"add_counts", "combine", "down", "live_at", "neurons_at"}
    rounds = {form.rounds_activations for form in spec.kept[:-1]}
    shared |= {"product"} if False in rounds else set()
    shared |= {"gaussian_limits"} if spec.gaussian is not None else set()
    shared |= {"is_top"} if spec.top is not None else set()
    integers = {"product_int8", "round_activations"} if True in rounds else set()
    imports = _imports("functions", functions) + _imports("neurons", shared)
    imports += _imports("weights", integers)
    kernels = ["add_counts", "combine", "down", "live"]
    kernels += ["round_activations"] if integers else []
    kernels += ["gate"] if has_gate(spec) else []
    kernels += ["gaussian_limits"] if spec.gaussian is not None else []
    words = ", ".join(f'"{kernel}"' for kernel in sorted(kernels))
    texts = [_expression(what, tree) for what, tree in trees.items()]
    texts += [_activations(spec), *([_gate(spec)] if has_gate(spec) else []), _live(spec)]
    return f"""# {name}: Triton, 1 to {MOST_ROWS} rows; float32, bfloat16 or float16, with sums in float32.
#   y[m, n] = sum over i with a[m, i] != 0 of h[m, i] D[i, n]
#   a = {_law(spec)}
#   h = {spec.hidden}
# where {_products(spec)}, v<j>[i] are operands; x is [M, K], D [F, N].
# C neurons may be live: all F, or those that <only> names. Of a chunk, counts says how many are,
# neurons which, and h [chunk, M, CHUNK] what the down projection reads.
# Weights are {", ".join(form.name for form in spec.kept)}.

import triton
import triton.language as tl

{imports}
__all__ = [{words}]


{(chr(10) * 3).join(texts)}
"""


# ---- arguments ---------------------------------------------------------------------------------------


def arguments(spec: Spec, kernel: str) -> list[str]:
    """The arguments of a kernel but its constants, in its order.

    Args:
        kernel: "round_activations", "gate", "gaussian_limits", "live", "down", "combine" or "add_counts".
    """
    operands = [f"o{name[1:]}" for name in spec.vectors]
    if kernel == "round_activations":
        return ["x", "q", "steps"]
    if kernel == "gate":
        read = _read(spec, 0) if spec.gate else ["x"]
        return [*read, *operands, "only", "kept", "C"]
    if kernel == "gaussian_limits":
        return ["kept", "limits"]
    if kernel == "live":
        up = _read(spec, int(spec.gate)) if spec.up else []
        limits = ["limits"] if spec.select else []
        lasts = ["lasts"] if spec.top is not None else []
        kept = [_kept(spec), *(name for name in up if name != _kept(spec))]
        return [*kept, *operands, "only", *limits, *lasts, "neurons", "counts", "lives", "h", "C"]
    if kernel == "down":
        parts = ["weight", "scale", "zero"]
        return ["neurons", "counts", "h", *parts, "partial", "chunks", "walk"]
    if kernel == "add_counts":
        return ["lives", "counts", "totals", "chunks"]
    return ["partial", "out", "parts"]


def _read(spec: Spec, i: int) -> list[str]:
    """What a product with the ``i``-th weight reads."""
    form, slot = spec.kept[i], spec.slots[i]
    name = _rounding(form) if form.rounds_activations else ""
    return [*([f"q{name}", f"steps{name}"] if name else ["x"]), *_tensors(slot)]


def _tensors(slot: slice) -> list[str]:
    return [f"w{i}" for i in range(slot.start, slot.stop)]


def constants(
    spec: Spec,
    kernel: str,
    rows: int,
    sizes: tuple[int, int, int],
    config: Config,
    rounding: Format | None = None,
) -> dict[str, Any]:
    """The constants of a kernel; ``sizes`` are K, F and N; ``rounding``: whose activations are rounded."""
    size, features, width = sizes
    if kernel == "round_activations":
        form = rounding or next(iter(roundings(spec).values()))
        block = form.together or _ROUND_BLOCK
        return {"K": size, "TOGETHER": form.together, "STATIC": form.static, "BLOCK": block}
    if kernel == "add_counts":
        return {"M": rows, "BLOCK": _COUNTS_BLOCK}
    if kernel == "gaussian_limits":
        return {"F": features, "FACTOR": spec.gaussian, "BLOCK": STATISTICS_BLOCK}
    if kernel == "combine":
        return {"SIZE": rows * width, "BLOCK": COMBINE_BLOCK}
    common = {"M": rows, "MP": padded(rows)}
    if kernel == "down":
        cut = {"CHUNK": config.chunk, "LIVE": config.live, "BLOCK_N": config.block_n}
        return {
            **common,
            "N": width,
            **cut,
            "STAGES": config.stages,
            "GROUP": _group(spec.kept[-1]),
        }
    cut = {"ROWS": config.rows, "BLOCK_K": config.block_k, "STAGES": config.stages}
    chunk = {"CHUNK": config.chunk} if kernel == "live" else {}
    return {**common, "K": size, "F": features, **chunk, **cut}


def signature(spec: Spec, kernel: str, dtype: torch.dtype, core: bool) -> dict[str, str]:
    """The types of all arguments of a kernel, for ``build``; ``core``: whether ``only`` is given."""
    own = {"only": "*i64" if core else "constexpr", "neurons": "*i32", "counts": "*i32"}
    own |= dict.fromkeys(("kept", "h", "limits", "partial", "steps"), "*fp32") | {"q": "*i8"}
    own |= dict.fromkeys(("C", "chunks", "walk", "parts"), "i32") | {"lasts": "*i64"}
    own |= {"lives": "*i32" if spec.label else "constexpr", "totals": "*i64"}
    for name in roundings(spec):
        own |= {f"q{name}": "*i8", f"steps{name}": "*fp32"}
    for form, slot in zip(spec.kept, spec.slots, strict=True):
        kinds = [f"*{_POINTED[part.dtype or dtype]}" for part in form.parts]
        own |= zip(_tensors(slot), kinds, strict=True)
    own |= itertools.zip_longest(("weight", "scale", "zero"), kinds, fillvalue="constexpr")
    types = {name: own.get(name, f"*{DTYPES[dtype]}") for name in arguments(spec, kernel)}
    names = constants(spec, kernel, 1, (1, 1, 1), Config(1, 1, 1, 1, 1))
    return {**types, **dict.fromkeys(names, "constexpr")}


_POINTED = {**DTYPES, torch.int8: "i8", torch.uint8: "u8"}


def _group(form: Format) -> int:
    """Of nibbles, the weights of a group; 0 for others."""
    return form.group if form.kind == "int4" else 0


def _kept(spec: Spec) -> str:
    """Where ``live`` reads activations, or what they are made of."""
    return "kept" if has_gate(spec) else "x"


# ---- the text ----------------------------------------------------------------------------------------


def _law(spec: Spec) -> str:
    after = "" if spec.after == "a" else f", then {spec.after}"
    if spec.top is not None:
        return f"the {spec.top} largest of a row of {spec.activation}, the others 0{after}"
    if spec.gaussian is not None:
        return f"relu(b - mean(b) - {spec.gaussian!r} std(b)) over a row of b = {spec.activation}{after}"
    return spec.activation + after


def _products(spec: Spec) -> str:
    gate = "p0[m, i] = sum over k of x[m, k] G[i, k]" if spec.gate else "p0 = x"
    return gate + (", p1 likewise of U" if spec.up else "")


def _imports(module: str, names: set[str]) -> str:
    where = f"from sparsecc.codegen.triton.{module} import"
    return f"{where} {', '.join(sorted(names))}\n" if names else ""


def _expression(what: str, tree: Any) -> str:
    names = expressions.names(tree)
    text = expressions.to_triton(tree, {name: name for name in names})
    return f"@triton.jit\ndef {what}({', '.join(names)}):\n    return {text}"


def _call(what: str, tree: Any) -> str:
    return f"{what}({', '.join(expressions.names(tree))})"


def _vectors(names: list[str]) -> list[str]:
    load = "tl.load(o{} + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]"
    return [f"{name} = {load.format(name[1:])}" for name in names if name[0] == "v"]


def _function(name: str, parameters: str, body: list[str]) -> str:
    lines = "\n".join(f"    {line}" if line else "" for line in body)
    return f"@triton.jit\ndef {name}(\n    {parameters}\n):\n{lines}"


def _constants(*names: str) -> str:
    return ", ".join(f"{name}: tl.constexpr" for name in names)


_TILE = [
    "m = tl.arange(0, MP).to(tl.int64)[:, None]",
    "tile = (m < M) & inside[None, :]",
]
_OF_X = "tl.load(x + m * K + neuron[None, :], mask=tile, other=0.0).to(tl.float32)"


def _product(spec: Spec, i: int) -> str:
    """The call that multiplies x with the ``i``-th weight."""
    form = spec.kept[i]
    read = _read(spec, i) + ["None"] * (3 - len(form.parts))
    cut = f"neuron, inside, M, K, MP, ROWS, BLOCK_K, STAGES, {_group(form)}"
    if form.rounds_activations:
        return f"product_int8({', '.join(read)}, {cut}, {form.together})"
    return f"product({', '.join(read)}, {cut})"


def _gate(spec: Spec) -> str:
    tree = spec.trees[0]
    first = _product(spec, 0) if spec.gate else _OF_X
    body = [
        "place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)",
        "neuron, inside = neurons_at(only, place, C, F)",
        *_TILE,
        f"p0 = {first}",
        *_vectors(expressions.names(tree)),
        f"tl.store(kept + m * C + place[None, :], {_call('activation', tree)}, mask=tile)",
    ]
    sizes = _constants("M", "MP", "K", "F", "ROWS", "BLOCK_K", "STAGES")
    return _function("gate", f"{', '.join(arguments(spec, 'gate'))},\n    {sizes},", body)


def _given(spec: Spec) -> list[str]:
    """What ``activations`` reads."""
    names = ["x" if not has_gate(spec) else "kept"]
    names += [f"o{name[1:]}" for name in spec.vectors]
    names += ["limits"] if spec.select else []
    return names + (["lasts"] if spec.top is not None else [])


def _activations(spec: Spec) -> str:
    """The function that makes a [MP, …] of some neurons, zero where there are none."""
    first, after, _ = spec.trees
    names = expressions.names(after)
    body = list(_TILE)
    if has_gate(spec):
        body += ["a = tl.load(kept + m * C + place[None, :], mask=tile, other=0.0)"]
    else:
        body += [f"p0 = {_OF_X}"]
        names = [*names, *expressions.names(first)]
    body += _vectors(list(dict.fromkeys(names)))
    if not has_gate(spec):
        body += [f"a = {_call('activation', first)}"]
    if spec.select:
        body += ["limit = tl.load(limits + m, mask=m < M, other=0.0)"]
    if spec.gaussian is not None:
        body += ["a = relu(a - limit)"]
    if spec.top is not None:
        body += [
            "last = tl.load(lasts + m, mask=m < M, other=0)",
            "a = tl.where(is_top(a, neuron[None, :], limit, last), a, 0.0)",
        ]
    body += [f"return tl.where(tile, {_call('after', after)}, 0.0)"]
    sizes = _constants("M", "MP", "K")
    parameters = f"{', '.join(_given(spec))}, place, neuron, inside, C, {sizes},"
    return _function("activations", parameters, body)


def _live(spec: Spec) -> str:
    last = spec.trees[2]

    def activations(*where: str) -> str:
        return f"activations({', '.join([*_given(spec), *where])}, C, M, MP, K)"

    body = [
        "chunk = tl.program_id(0).to(tl.int64)",
        "places = chunk * CHUNK + tl.arange(0, CHUNK)",
        "candidates, there = neurons_at(only, places, C, F)",
        f"every = {activations('places', 'candidates', 'there')}",
        "live = tl.max((every != 0).to(tl.int32), axis=0) != 0",
        "count = tl.sum(live.to(tl.int32), axis=0)",
        "begin = tl.program_id(1) * ROWS",
        "if begin == 0:",
        "    tl.store(counts + chunk, count)",
        "    if lives is not None:",
        "        each = tl.sum((every != 0).to(tl.int32), axis=0)",
        "        tl.store(lives + chunk, tl.sum(each, axis=0))",
        "if begin < count:",
    ]
    inner = [
        "wanted = begin + tl.arange(0, ROWS)",
        "place = chunk * CHUNK + live_at(live, wanted, CHUNK)",
        "neuron, inside = neurons_at(only, place, C, F)",
        "inside = inside & (wanted < count)",
        f"a = {activations('place', 'neuron', 'inside')}",
    ]
    if spec.up:
        inner += [f"p1 = {_product(spec, int(spec.gate))}"]
    inner += [
        *_vectors(expressions.names(last)),
        "m = tl.arange(0, MP).to(tl.int64)[:, None]",
        f"result = {_call('hidden', last)}",
        "at = chunk * CHUNK + wanted",
        "tl.store(neurons + at, neuron.to(tl.int32), mask=inside)",
        "at = (chunk * M + m) * CHUNK + wanted[None, :]",
        "tl.store(h + at, result, mask=(m < M) & inside[None, :])",
    ]
    body += [f"    {line}" for line in inner]
    sizes = _constants("M", "MP", "K", "F", "CHUNK", "ROWS", "BLOCK_K", "STAGES")
    return _function("live", f"{', '.join(arguments(spec, 'live'))},\n    {sizes},", body)
