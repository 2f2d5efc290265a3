"""Two linear maps with nothing between, collapsed into one.

Law.   linear(linear(x, W₁, b₁), W₂, b₂) = linear(x, W₂W₁, W₂b₁ + b₂). A convolution of one position before or
       behind another: W'[o,c,k] = Σₘ W₂[o,m,k] W₁[m,c], or W₂[o,m] W₁[m,c,k]; b' = Σₘₖ W₂[o,m,k] b₁[m] + b₂.
Source algebra; for convolutions as in Ding et al., "Diverse Branch Block" (2021), transforms I and III.
Legal  when nothing else reads the value between, which is only reindexed on its way (between convolutions not
       even that), and the blocks of grouped convolutions compose. Zero padding in the second convolution pads
       the result of the first by 0 and not by b₁: legal where the first reads one position and has no bias.
Exact  in real arithmetic; strides, dilations and padding compose as the positions do.
Pays   where the product is smaller than its factors, out·in < r(out + in) for features r between, counted with
       kernels and positions. A bottleneck costs more when collapsed: there it runs only when named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import OptionsError
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.convolutions import EXPLICIT, Taps, memory_format, taps
from sparsecc.passes.analysis.linear import Linear, as_linear, linears
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.reindex import resizable_path, resized
from sparsecc.passes.analysis.stream import Carried, other_readers
from sparsecc.passes.analysis.weights import other_users, weight_values
from sparsecc.passes.base import (
    RECOMPUTED,
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
    Saving,
    nbytes,
    numel,
)
from sparsecc.program import MOVED, WeightBuilder

aten = torch.ops.aten


@dataclass(frozen=True)
class CollapseLinear(Pass):
    """Collapse two linear maps with nothing between into one.

    Attributes:
        always: also where one map costs more than the two. Its sums are longer then, and round more.
    """

    always: bool = False

    name: ClassVar[str] = "collapse-linear"
    family: ClassVar[str] = "linear"
    law: ClassVar[str] = "linear(linear(x, W₁, b₁), W₂, b₂) = linear(x, W₂W₁, W₂b₁ + b₂)"
    source: ClassVar[str] = "algebra; Ding et al. 2021, Diverse Branch Block, transforms I and III"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "over-parameterized layers, projections behind projections"
    refusals: ClassVar[dict[str, str]] = {
        "costs-more": "one map has more weights or arithmetic than the two (pass option always=True)",
        "fan-out": "something else reads the value between them too",
        "border": "zero padding between them would have to pad with the first one's bias",
        "grouped": "the blocks of grouped convolutions do not compose",
        "transposed": "one of them is a transposed convolution",
        "chain": "the first convolution is itself collapsed; one product a run",
        "tied": "one of the weights is shared with another node",
        "written": "the input is written in place",
        "layout": "views between do not hold for the input's sizes, or the result would have other strides",
        **RECOMPUTED,
        "region": "an autocast or grad-mode region begins or ends between them",
    }

    def __post_init__(self) -> None:
        given: Any = self.always
        if not isinstance(given, bool):
            raise OptionsError(f"pass {self.name!r}: always must be True or False, not {given!r}.")

    def find(self, context: Context) -> list[Match]:
        maps = context.analyses.get(linears)
        matches: dict[fx.Node, Match] = {}
        for outer in maps.values():
            path = _path(outer, maps)
            if path is None:
                continue
            inner = maps[path[-1][0]]
            before = matches.get(inner.node)
            nodes = {"outer": outer, "inner": inner, "path": path, "before": before}
            matches[outer.node] = Match(outer.node, nodes)
        return list(matches.values())

    def check(self, match: Match, context: Context) -> Refusal | None:
        outer: Linear = match.nodes["outer"]
        inner: Linear = match.nodes["inner"]
        path: Carried = match.nodes["path"]
        weights = context.analyses.get(weight_values)
        reader = outer.node
        for node, _ in path:
            for other in other_readers(node, reader):
                return Refusal.at(other, "fan-out", f"{other.name} reads the value between too")
            reader = node
        if inner.is_transposed or outer.is_transposed:
            return Refusal.at(outer.node, "transposed", self.refusals["transposed"])
        before: Match | None = match.nodes["before"]
        chained = before is not None and self.check(before, context) is None
        if outer.is_conv:
            code = _obstacle(inner, outer)
            if code or chained:
                return Refusal.at(outer.node, code or "chain", self.refusals[code or "chain"])
        for linear in (inner, outer):
            if other_users(linear.weight, linear.node, weights):
                words = f"the weight of {linear.node.name} is shared"
                return Refusal.at(linear.node, "tied", words)
        alias = context.analyses.get(aliases)
        for value in (inner.x, *(a for node, _ in path[:-1] for a in node.all_input_nodes)):
            if alias.written(value):
                return Refusal.at(value, "written", f"{value.name} is written in place")
        mode = context.analyses.get(modes)
        if mode[inner.node] != mode[outer.node] or any(
            mode[node][0] != mode[outer.node][0] for node, _ in path
        ):
            return Refusal.at(inner.node, "region", self.refusals["region"])
        source: Match = before if chained and before is not None else match
        if not self.always and not _pays(match, source):
            return Refusal.at(outer.node, "costs-more", self._words(match, source))
        if not _holds(path, inner, outer, context):
            return Refusal.at(outer.node, "layout", self.refusals["layout"])
        return context.recomputed(outer.node)

    def _words(self, match: Match, source: Match) -> str:
        outer, between = match.nodes["outer"], match.nodes["inner"].features
        columns, out = _columns(source.nodes["inner"]), outer.features
        return f"{columns} → {out} features directly cost more than over {between}"

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        weights = context.analyses.get(weight_values)
        # Afresh: an earlier match may have collapsed the first map.
        inner = as_linear(match.nodes["inner"].node, weights)
        outer = as_linear(match.node, weights)
        assert inner is not None
        assert outer is not None
        value = inner.x
        for node, axis in reversed(match.nodes["path"][:-1]):
            found = resized(node, axis, _columns(inner))
            assert found is not None
            target, args = found
            value = program.call(
                target,
                (value, *args[1:]),
                dict(node.kwargs),
                like=node,
                origin=self.name,
                before=outer.node,
            )
        build = program.weight(self.name, outer.node)
        weight, bias = (_convolved if outer.is_conv else _multiplied)(build, inner, outer)
        dtype = outer.weight.meta["val"].dtype
        if bias is not None and outer.bias is not None:
            bias = build.add(bias, build.wide(outer.bias))
        if bias is not None:
            bias = build.as_dtype(bias, dtype if outer.bias is None else _dtype(outer.bias))
        joined = _joined(inner, outer) if outer.is_conv else None
        outer.set_input(program, value)
        outer.set_weights(program, self.name, weight=build.as_dtype(weight, dtype), bias=bias)
        if joined is not None:
            outer.node.target = EXPLICIT[len(joined[0].kernel)]
            outer.node.args = (*outer.node.args[:3], *joined[0].arguments, joined[1])
        outer.node.meta[MOVED] = "it carries the map before it"

    def saving(self, match: Match, context: Context) -> Saving:
        outer, inner = match.nodes["outer"], match.nodes["inner"]
        flops, elements = _collapsed(match, match)
        weight = nbytes(outer.weight) // max(1, numel(outer.weight))
        return Saving(
            2 * nbytes(inner.node)
            + nbytes(inner.weight)
            + nbytes(outer.weight)
            - elements * weight,
            inner.flops + outer.flops - flops,
            1,
        )

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any, V: Any, c: Any) -> Any:
            y = x @ W.transpose(0, 1)
            return (y + b) @ V.transpose(0, 1) + c, y @ V.transpose(0, 1)

        def after(x: Any, W: Any, b: Any, V: Any, c: Any) -> Any:
            y = x @ (V @ W).transpose(0, 1)
            return y + ((V * b).sum(-1) + c), y

        shapes = {"x": ("n", "d"), "W": ("k", "d"), "b": ("k",), "V": ("m", "k"), "c": ("m",)}

        def windowed(x: Any, z: Any, W: Any, b: Any, V: Any, U: Any) -> Any:
            # A kernel of two positions, read as a sum over them, behind one of a single position.
            y, w = x @ W.transpose(0, 1) + b, z @ W.transpose(0, 1) + b
            return y @ V.transpose(0, 1) + w @ U.transpose(0, 1)

        def collapsed(x: Any, z: Any, W: Any, b: Any, V: Any, U: Any) -> Any:
            y, w = x @ (V @ W).transpose(0, 1), z @ (U @ W).transpose(0, 1)
            return y + w + ((V + U) * b).sum(-1)

        names = {**{n: shapes[n] for n in "xWbV"}, "z": shapes["x"], "U": shapes["V"]}
        named = {n: names[n] for n in "xzWbVU"}
        return [
            Example(before, after, shapes, ("W", "b", "V", "c"), symbolic=True),
            Example(windowed, collapsed, named, ("W", "b", "V", "U"), symbolic=True),
        ]


def _path(outer: Linear, maps: dict[fx.Node, Linear]) -> Carried | None:
    """From the input of ``outer`` back to the linear map whose features it contracts."""
    rank = outer.x.meta["val"].dim()
    axis = 1 if outer.is_conv else rank - 1
    if outer.is_conv and outer.x not in maps:
        return None  # only views of whole positions could stand here
    path = resizable_path(outer.x, axis, maps)
    if path is None:
        return None
    inner, at = maps[path[-1][0]], path[-1][1]
    both = inner.is_conv == outer.is_conv and _dtype(inner.node) == _dtype(outer.node)
    if not both or at != inner.feature_axis % inner.node.meta["val"].dim():
        return None
    if outer.is_conv and not (inner.is_transposed or outer.is_transposed):
        first, second = taps(inner), taps(outer)
        if first is None or second is None or not (first.is_pointwise or second.is_pointwise):
            return None
    return path


def _obstacle(inner: Linear, outer: Linear) -> str:
    """Why two convolutions do not make one, as a code; empty when they do."""
    first, second = taps(inner), taps(outer)
    assert first is not None
    assert second is not None
    if second.is_padded and (inner.bias is not None or not first.is_pointwise):
        return "border"
    depthwise = not inner.is_grouped and outer.weight.meta["val"].shape[outer.in_axis] == 1
    return "" if inner.groups == outer.groups or depthwise else "grouped"


def _joined(inner: Linear, outer: Linear) -> tuple[Taps, int]:
    """The window and the groups of both convolutions in one."""
    first, second = taps(inner), taps(outer)
    assert first is not None
    assert second is not None
    steps = list(zip(first.stride, second.stride, strict=True))
    padding = zip(first.padding, first.stride, second.padding, strict=True)
    # Neighbours of the second kernel lie a stride of the first apart.
    spread = tuple(s * d for s, d in zip(first.stride, second.dilation, strict=True))
    joined = Taps(
        second.kernel if first.is_pointwise else first.kernel,
        tuple(a * b for a, b in steps),
        tuple(p + s * q for p, s, q in padding),
        spread if first.is_pointwise else first.dilation,
    )
    return joined, inner.groups


def _multiplied(
    build: WeightBuilder, inner: Linear, outer: Linear
) -> tuple[fx.Node, fx.Node | None]:
    """W₂W₁ in the orientation of the outer weight, and W₂b₁."""
    first, second = build.wide(inner.weight), build.wide(outer.weight)
    if inner.out_axis != outer.out_axis:
        first = build.call(aten.t.default, first)
    pair = (second, first) if outer.out_axis == 0 else (first, second)
    weight = build.call(aten.mm.default, *pair)
    if inner.bias is None:
        return weight, None
    # A product and a sum, where autocast cannot narrow them.
    scaled = outer.times(build, second, build.wide(inner.bias), outer.in_axis)
    return weight, build.sum(scaled, outer.in_axis)


def _convolved(
    build: WeightBuilder, inner: Linear, outer: Linear
) -> tuple[fx.Node, fx.Node | None]:
    """The kernel of both convolutions, block by block, and what the inner bias adds to the outer one."""
    first, second = build.wide(inner.weight), build.wide(outer.weight)
    between, columns, *small = first.meta["val"].shape
    out, inputs, *large = second.meta["val"].shape
    width = torch.Size(small).numel()
    count = torch.Size(large).numel()
    blocks = outer.groups
    rows = out // blocks

    def shaped(node: fx.Node, *sizes: int) -> fx.Node:
        return build.call(aten.reshape.default, node, list(sizes))

    # Each block: [rows · count, inputs] times [inputs, columns · width], where count or width is one.
    left = build.call(aten.transpose.int, shaped(second, blocks, rows, inputs, count), 2, 3)
    left = shaped(left, blocks, rows * count, inputs)
    right = shaped(first, blocks, between // blocks, columns * width)
    product = shaped(
        build.call(aten.bmm.default, left, right), blocks, rows, count, columns * width
    )
    product = build.call(aten.transpose.int, product, 2, 3)
    kernel = large if width == 1 else small
    weight = shaped(product, out, columns, *kernel)
    weight = build.call(aten.clone.default, weight, memory_format=_format(inner, outer))
    if inner.bias is None:
        return weight, None
    total = build.sum(shaped(second, blocks, rows, inputs, count), 3)
    row = shaped(build.wide(inner.bias), blocks, 1, inputs)
    return weight, shaped(build.sum(build.mul(total, row), 2), out)


def _format(inner: Linear, outer: Linear) -> torch.memory_format | None:
    """The memory format of the kernel of both, for which the result keeps its strides."""
    formats = [memory_format(linear.weight.meta["val"]) for linear in (inner, outer)]
    if None in formats:
        return None
    return next((f for f in formats if f != torch.contiguous_format), torch.contiguous_format)


def _columns(linear: Linear) -> int:
    """Inputs of one output feature, at one position."""
    return int(linear.weight.meta["val"].shape[linear.in_axis])


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _collapsed(match: Match, source: Match) -> tuple[int, int]:
    """Arithmetic and weights of the collapsed map, whose input is that of ``source``."""
    outer: Linear = match.nodes["outer"]
    inner: Linear = source.nodes["inner"]
    columns = numel(inner.weight) // max(1, int(inner.weight.meta["val"].shape[inner.out_axis]))
    positions = numel(outer.weight) // (outer.features * _columns(outer)) if outer.is_conv else 1
    return 2 * numel(outer.node) * columns * positions, outer.features * columns * positions


def _pays(match: Match, source: Match) -> bool:
    """Whether the product has less arithmetic than its factors, and no more weights.

    Where ``source`` is an earlier match, the inner map is what that one makes of it.
    """
    outer: Linear = match.nodes["outer"]
    inner: Linear = match.nodes["inner"]
    flops, elements = inner.flops, numel(inner.weight)
    if source is not match:
        flops, elements = _collapsed(source, source)
    one_flops, one_elements = _collapsed(match, source)
    return one_flops < flops + outer.flops and one_elements <= elements + numel(outer.weight)


def _holds(path: Carried, inner: Linear, outer: Linear, context: Context) -> bool:
    """Whether all sizes allow the reindexing between on the input too, and the result's strides are known."""
    program = context.program
    value = inner.x.meta["val"]
    for node, axis in reversed(path[:-1]):
        found = resized(node, axis, _columns(inner))
        if found is None:
            return False
        target, args = found
        value = program.fake_for_all_sizes(target, (value, *args[1:]), node.kwargs)
        if value is None:
            return False
    return not outer.is_conv or _format(inner, outer) is not None
