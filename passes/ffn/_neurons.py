"""What the passes of sparse feed-forward networks share: weights by neuron, in formats, and texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.ffn import FFN, half_of
from sparsecc.passes.analysis.linear import Linear
from sparsecc.passes.analysis.sites import site_name
from sparsecc.passes.analysis.sizes import is_contiguous, same_shape
from sparsecc.passes.analysis.weights import WeightValues
from sparsecc.passes.base import Context, Refusal
from sparsecc.passes.canonical._match import argument
from sparsecc.program import Program, WeightBuilder
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.formats import Format
from sparsecc.runtime.ops.rounded_weight import rounded_weight
from sparsecc.runtime.ops.sparse_ffn import sparse_ffn

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WORDS: Mapping[str, str] = {
    "training": "gradients flow, and thresholds are chosen for inference",
    "gathered": "FSDP gathers the weights anew for each call: they would be laid out by neuron in each",
    "dtype": "values and weights are not all of one dtype of float32, bfloat16, float16, float64",
    "size": "the row of a neuron is no multiple of its format's group",
    "unmigrated": "the recipe rounds it behind scales or shifts that this graph does not carry",
    "moved": "the recipe moves scales or shifts into what the threshold is compared with",
    "given": "the recipe gives the codes of a weight, by output and not by neuron",
    "step": "the recipe divides what it reads by a fixed step, or corrects its rounding",
    "region": "under autocast, which narrows the product",
    "written": "what it reads is written in place",
}

_TEXTS: Mapping[Any, str] = {
    aten.relu.default: "relu({})",
    aten.relu6.default: "minimum(relu({}), 6.0)",
    aten.silu.default: "silu({})",
    aten.sigmoid.default: "sigmoid({})",
    aten.tanh.default: "tanh({})",
}
RELU_LIKE = frozenset({aten.relu.default, aten.relu6.default})  # never negative, and zero at zero
NOT_ZERO_AT_ZERO = frozenset({aten.sigmoid.default})


def activation_text(node: fx.Node, inner: str) -> str | None:
    """An activation of ``inner`` as an expression; None where there is no such text."""
    if node.target is aten.gelu.default:
        tanh = argument(node, "approximate", "none") == "tanh"
        return f"gelu_tanh({inner})" if tanh else f"gelu({inner})"
    text = _TEXTS.get(node.target)
    return None if text is None else text.format(inner)


@dataclass(frozen=True)
class Rows:
    """A weight of a linear layer, one row for each neuron.

    Attributes:
        linear: the layer.
        site: its name.
        axis: the axis of the layer's weight that holds neurons.
        part: which of them, where it holds those of gate and up; None for all.
    """

    linear: Linear
    site: str
    axis: int
    part: slice | None = None

    @property
    def size(self) -> int:
        """The length of a row."""
        return int(self.linear.weight.meta["val"].shape[1 - self.axis])

    def weight(self, build: WeightBuilder) -> fx.Node:
        """``[F, size]``, contiguous."""
        found = self._sliced(build, self.linear.weight, self.axis)
        if self.axis == 1:
            found = build.call(aten.t.default, found)
        if found is not self.linear.weight or not is_contiguous(found.meta["val"]):
            found = build.call(aten.clone.default, found, memory_format=torch.contiguous_format)
        return found

    def bias(self, build: WeightBuilder) -> fx.Node | None:
        """``[F]``."""
        bias = self.linear.bias
        return None if bias is None else self._sliced(build, bias, 0)

    def _sliced(self, build: WeightBuilder, node: fx.Node, axis: int) -> fx.Node:
        if self.part is None:
            return node
        return build.call(aten.slice.Tensor, node, axis, self.part.start, self.part.stop)


def rows_of(ffn: FFN, program: Program, weights: WeightValues) -> tuple[Rows, Rows | None, Rows]:
    """Of the first layer (gate, or in a plain network the only one), of up, and of down."""

    def named(linear: Linear) -> str:
        return site_name(program, linear.weight, weights)

    down = Rows(ffn.down, named(ffn.down), ffn.down.in_axis)
    if ffn.gate is None:
        return Rows(ffn.up, named(ffn.up), ffn.up.out_axis), None, down
    if ffn.halves is None:
        gate, up = (Rows(each, named(each), each.out_axis) for each in (ffn.gate, ffn.up))
        return gate, up, down
    width = ffn.up.features // 2
    parts = [slice(0, width), slice(width, 2 * width)]
    first = half_of(ffn.halves[0], ffn.axis)
    if first is not None and first[1] == 1:
        parts.reverse()
    gate, up = (Rows(ffn.up, named(ffn.up), ffn.up.out_axis, part) for part in parts)
    return gate, up, down


@dataclass(frozen=True)
class Kept:
    """A weight by neuron in a format.

    Attributes:
        parts: its tensors.
        scale: what the result is to be multiplied by, ``[N]``; None for nothing.
    """

    form: str
    parts: list[fx.Node]
    scale: fx.Node | None = None


def kept(build: WeightBuilder, rows: Rows, recipe: Recipe) -> Kept:
    """A weight by neuron, dense where the recipe does not round it.

    Clips of the recipe are of rows of W: of down, which is rounded by neuron, they are not taken. In int8 its
    columns, one for each output, are brought to one size before: a few large outputs of a residual stream
    would make the others' levels coarse.
    """
    form = recipe.sites.get(rows.site, "dense")
    weight, scale = rows.weight(build), None
    if form == "dense":
        return Kept(form, [weight])
    if rows.axis == rows.linear.in_axis and Format.of(form).kind == "int8":
        scale = _sizes_of_outputs(build, weight)
        weight = build.call(aten.div.Tensor, weight, scale)
    clip: Any = recipe.clips.get(rows.site) if rows.axis == rows.linear.out_axis else None
    if clip is not None:
        clip = clip if rows.part is None else clip[rows.part]
        clip = build.program.constant(clip.float(), like=build.like, origin=build.origin)
    parts = range(len(Format.of(form).parts))
    return Kept(form, [build.call(rounded_weight, weight, clip, form, i) for i in parts], scale)


def _sizes_of_outputs(build: WeightBuilder, weight: fx.Node) -> fx.Node:
    """max|D[:, n]| up to the next power of 2, by which dividing and multiplying are exact; 1 for zeros."""
    most = build.call(aten.amax.default, build.call(aten.abs.default, build.wide(weight)), [0])
    power = build.call(aten.ceil.default, build.call(aten.log2.default, most))
    size = build.call(aten.exp2.default, power)
    none = build.call(aten.eq.Scalar, most, 0)
    size = build.call(aten.where.ScalarSelf, none, 1.0, size)
    return build.as_dtype(size, weight.meta["val"].dtype)


def refuse_formats(read: Iterable[Rows], recipe: Recipe, context: Context) -> Refusal | None:
    """Why the weights cannot be kept by neuron in the formats that the recipe gives their sites."""
    for rows in read:
        node, site = rows.linear.node, rows.site
        form = recipe.sites.get(site)
        if form is None:
            continue
        if site in recipe.grids:
            return Refusal.at(node, "given", f"{WORDS['given']}: {site}")
        if recipe.activations.get(site, 1.0) != 1.0 or site in recipe.corrections:
            return Refusal.at(node, "step", f"{WORDS['step']}: {site}")
        missing = recipe.links_of(site) - context.program.migrated
        if missing:
            words = f"{WORDS['unmigrated']}: {', '.join(sorted(missing))}"
            return Refusal.at(node, "unmigrated", words)
        try:
            Format.of(form).check_size(rows.size)
        except ValueError as error:
            return Refusal.at(node, "size", f"{WORDS['size']}: {site}: {error}")
    return None


def refuse_values(nodes: Iterable[fx.Node]) -> Refusal | None:
    """Why ``nodes`` and what they read are not of one dtype that sparse products are computed in."""
    found: set[torch.dtype] = set()
    for node in nodes:
        for value in (node, *node.all_input_nodes):
            fake = value.meta.get("val")
            if isinstance(fake, torch.Tensor):
                found.add(fake.dtype)
            if len(found) > 1 or not found <= set(DTYPES):
                return Refusal.at(value, "dtype", WORDS["dtype"])
    return None


def between(ffn: FFN) -> list[fx.Node]:
    """The hidden value, and its reshapes on the way to down."""
    found, node = [ffn.hidden], ffn.down.x
    while node is not ffn.hidden:
        found.append(node)
        node = node.all_input_nodes[0]
    return found


def input_of(node: fx.Node) -> fx.Node:
    """What a linear map reads now: an earlier rewrite may have replaced what it was found with."""
    found: Any = node.args[1 if node.target is aten.addmm.default else 0]
    assert isinstance(found, fx.Node)
    return found


def place_sparse(
    program: Program,
    node: fx.Node,
    rows: Rows,
    args: tuple[Any, ...],
    origin: str,
    scale: fx.Node | None = None,
) -> fx.Node:
    """``sparse_ffn`` of ``args`` in place of ``node``, the layer of ``rows``; returns what is there now.

    Args:
        scale: of the outputs, ``[N]``, as of :class:`Kept`. The layer's bias is added behind.
    """
    place: dict[str, Any] = {"like": node, "origin": origin, "before": node}
    for value in (*args[1], *args[2]):
        program.bring_before(value, node)
    result = program.call(sparse_ffn, args, **place)
    shape = node.meta["val"].shape
    if not same_shape(result.meta["val"].shape, shape):
        result = program.call(aten.reshape.default, (result, list(shape)), **place)
    if scale is not None:
        program.bring_before(scale, node)
        result = program.call(aten.mul.Tensor, (result, scale), **place)
    bias = rows.linear.bias
    if bias is not None:
        program.bring_before(bias, node)
        result = program.call(aten.add.Tensor, (result, bias), **place)
    program.replace(node, result)
    return result


def vector(build: WeightBuilder, value: torch.Tensor, size: int, dtype: torch.dtype) -> fx.Node:
    """A recipe's thresholds, of one number or of each neuron, as ``[size]`` in ``dtype``."""
    wide = value.float().expand(size).contiguous()
    node = build.program.constant(wide, like=build.like, origin=build.origin)
    return build.as_dtype(node, dtype)


def share(given: Mapping[str, Any], rows: Iterable[Any]) -> float:
    """How many neurons are live for any of ``rows``, were rows independent; 1 where it is not known."""
    dead = 1 - float(given.get("density", 1.0))
    return max(1 - dead ** int(math.prod(rows)), 1e-3)


# Up to which share of live neurons skipping beats whole products, by (kind of weight, more rows than one), as
# benchmarks/results/2026-11-29-x86_64-2-cores-sparse_ffn measured; of floats, up to all.
_CROSSOVER = {("int8", False): 0.9, ("int8", True): 0.6, ("int4", False): 0.55, ("int4", True): 0.5}


def skipping_pays(form: str | None, live: float, rows: Iterable[Any]) -> bool:
    """Whether rows of weights in ``form`` (None: as they are) should be skipped at a share of live neurons."""
    kind = "float" if form is None else Format.of(form).kind
    return live <= _CROSSOVER.get((kind, math.prod(rows) > 1), 1.0)


def few(rows: Iterable[Any], most: int) -> bool:
    """Whether sizes are known, and at most ``most`` rows together, and one at least."""
    sizes = list(rows)
    return all(isinstance(s, int) for s in sizes) and bool(1 <= math.prod(sizes) <= most)
