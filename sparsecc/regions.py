"""The operators whose calls are regions for generated kernels, and what may run each of them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from sparsecc import _torch
from sparsecc.codegen import cpp, triton
from sparsecc.errors import BuildError
from sparsecc.runtime.ops import cached_attention, few_rows, rows, sparse_ffn

Call = Callable[..., Any]
Args = tuple[Any, ...]  # of a call, with fake tensors; the last one is the text of a spec


@dataclass(frozen=True)
class Variant:
    """One way to run a region.

    Attributes:
        call: takes a call's arguments.
        language: "aten", "cpp" or "triton".
        source: the file of the generated source, to be read.
        keep: makes this the way from now on, where one operator has several.
    """

    call: Call
    language: str
    source: str = ""
    keep: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Kind:
    """An operator whose calls are regions.

    Attributes:
        native: the same operator by a generated kernel.
        words: (region, shape) for the report, of a call's arguments.
        kernels: the generated variants by name, for arguments on a device, the one to take unmeasured first;
            none where kernels are not made for such arguments. Raises BuildError where one cannot be built.
        meaning: what stands for Inductor's code in a measurement.
        must: whether a kernel runs wherever there is one, as the meaning is for proofs alone.
        prepare: changes a measurement's random arguments in place, where these must be of some kind.
        alike: the text of a spec without what a measurement does not depend on.
    """

    native: Any
    words: Callable[[Args], tuple[str, str]]
    kernels: Callable[[Args], dict[str, Variant]]
    meaning: Call
    must: Callable[[Args], bool] = lambda args: False
    prepare: Callable[..., None] = lambda *args: None
    alike: Callable[[str], str] = lambda text: text


def _cpp(native: Any, load: Callable[[], pathlib.Path]) -> dict[str, Variant]:
    return {"cpp": Variant(native, "cpp", str(load().with_suffix(".cpp")))}


def _triton(native: Any, launch: Any, problem: Any) -> dict[str, Variant]:
    """One variant for each cut of ``problem``, which is of the module ``launch``."""
    source = str(problem.module().__file__)

    def cut(config: Any) -> Variant:
        def keep() -> None:
            launch.choose(problem, config)

        def call(*args: Any) -> Any:
            keep()
            return native(*args)

        return Variant(call, "triton", source, keep)

    return {f"triton {config}": cut(config) for config in problem.configs()}


# ---- few rows --------------------------------------------------------------------------------------


def _few_rows_words(args: Args) -> tuple[str, str]:
    x, weights, _, text = args
    spec = few_rows.Spec.of(text)
    shape = f"{list(x.shape)} x {', '.join(str(list(w.shape)) for w in weights)}"
    return " | ".join([spec.norm, *spec.outputs]), shape


def _few_rows_kernels(args: Args) -> dict[str, Variant]:
    x, weights, _, text = args
    if x.device.type == "cpu":
        spec = few_rows.Spec.of(text)
        return _cpp(few_rows.few_rows_native, lambda: cpp.few_rows.load(spec, x.dtype))
    if why := triton.build.available():
        raise BuildError(why)
    launch = triton.launch
    return _triton(few_rows.few_rows_native, launch, launch.Problem.of(x, weights, text))


# ---- live neurons ----------------------------------------------------------------------------------


def _sparse_words(args: Args) -> tuple[str, str]:
    x, weights, _, only, text = args
    spec = sparse_ffn.Spec.of(text)
    names = [spec.activation, spec.select, spec.after if spec.select else "", spec.hidden]
    shape = f"{list(x.shape)} x {', '.join(str(list(w.shape)) for w in weights)}"
    share = "core" if only is not None else f"{spec.density:.0%} live"
    blocks = f"blocks of {spec.block}" if spec.block else ""
    return " | ".join(filter(None, ["sparse", blocks, *names])), f"{shape}, {share}"


def _sparse_kernels(args: Args) -> dict[str, Variant]:
    x, weights, _, only, text = args
    sizes = x.shape[:-1]
    if not all(isinstance(s, int) for s in sizes) or not 1 <= sizes.numel() <= sparse_ffn.MOST_ROWS:
        return {}
    spec = sparse_ffn.Spec.of(text)
    if x.device.type == "cpu":
        return _cpp(sparse_ffn.sparse_ffn_native, lambda: cpp.sparse_ffn.load(spec, x.dtype))
    if why := triton.build.available():
        raise BuildError(why)
    launch = triton.launch_sparse_ffn
    return _triton(sparse_ffn.sparse_ffn_native, launch, launch.Problem.of(x, weights, only, text))


# ---- attention over a cache ------------------------------------------------------------------------


def _attention_words(args: Args) -> tuple[str, str]:
    q, keys, rotation = args[0], args[3], args[6]
    shape = f"{list(q.shape)} over {list(keys.shape)}"
    return f"cached attention{' | rotated' * bool(rotation)}", shape


def _attention_kernels(args: Args) -> dict[str, Variant]:
    q, mask, text = args[0], args[7], args[-1]
    native = cached_attention.cached_attention_native
    if q.device.type == "cpu":
        spec = cached_attention.Spec.of(text)
        return _cpp(native, lambda: cpp.cached_attention.load(spec))
    if why := triton.build.available():
        raise BuildError(why)
    launch = triton.launch_attention
    return _triton(native, launch, launch.Problem.of(q, mask, text))


def _attention_meaning(*args: Any) -> torch.Tensor:
    """Without the rotation: Inductor fuses it, and run operator by operator it would count too much."""
    *before, _, mask, scale, text = args
    plain = (*before, [], mask, scale, text)
    return cached_attention.meaning(*plain)


# ---- rows ------------------------------------------------------------------------------------------


def _rows_words(args: Args) -> tuple[str, str]:
    tensors, *_, text = args
    spec = rows.Spec.of(text)
    region = "; ".join([*spec.statements, " | ".join(output.text for output in spec.outputs)])
    return region, str(list(tensors[0].shape))


def _rows_kernels(args: Args) -> dict[str, Variant]:
    x, text = args[0][0], args[-1]
    if x.device.type == "cpu":
        spec = rows.Spec.of(text)
        return _cpp(rows.rows_native, lambda: cpp.rows.load(spec, x.dtype))
    if why := triton.build.available():
        raise BuildError(why)
    source = str(triton.launch_rows.module(text, x.shape[-1]).__file__)
    return {"triton": Variant(rows.rows_native, "triton", source)}


def _rows_compiled() -> Call:
    """The meaning as Inductor compiles it by itself, once for each kind of arguments: it fuses such regions."""
    known: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        key = (args[-1], *((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
        if key not in known:
            graph = fx.Graph()

            def placeholder(leaf: Any) -> Any:
                is_tensor = isinstance(leaf, torch.Tensor)
                return graph.placeholder(f"x{len(graph.nodes)}") if is_tensor else leaf

            results = graph.call_function(rows.rows, tree_map(placeholder, args))
            count = len(rows.Spec.of(args[-1]).outputs)
            graph.output(tuple(graph.call_function(getitem, (results, j)) for j in range(count)))
            module = fx.GraphModule(torch.nn.Module(), graph)
            known[key] = _torch.inductor_alone(module, tensors)
        return known[key](*tensors)

    return call


KINDS: Mapping[Any, Kind] = {
    few_rows.few_rows: Kind(
        few_rows.few_rows_native,
        _few_rows_words,
        _few_rows_kernels,
        few_rows.meaning,
        must=lambda args: not few_rows.Spec.of(args[-1]).plain,
    ),
    sparse_ffn.sparse_ffn: Kind(
        sparse_ffn.sparse_ffn_native,
        _sparse_words,
        _sparse_kernels,
        sparse_ffn.meaning,
        prepare=sparse_ffn.at_density,
        alike=sparse_ffn.unlabelled,
    ),
    cached_attention.cached_attention: Kind(
        cached_attention.cached_attention_native,
        _attention_words,
        _attention_kernels,
        _attention_meaning,
    ),
    rows.rows: Kind(rows.rows_native, _rows_words, _rows_kernels, _rows_compiled()),
}
