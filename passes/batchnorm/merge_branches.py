"""Convolutions (or linear layers) of one input that are summed, merged into one; so is the input itself.

Law.   conv(x, W₁, b₁) + conv(x, W₂, b₂) + t⊙x + h = conv(x, W₁ + pad(W₂) + diag(t), b₁ + b₂ + h).
Source Ding et al., "RepVGG" (2021), §3.3; Ding et al., "RepLKNet" (2022), §3, and Vasu et al., "MobileOne"
       (2023), §3.2, merge the same way.
Legal  when all taps of the smaller kernels, one at the centre for the input itself, are taps of the largest,
       with equal strides and groups, and nothing else reads the branches. Average pooling that counts its
       padding is a branch like any other.
Exact  in real arithmetic. Stride, dilation, groups and zero padding may be any, as long as the taps line up.
Pays   every branch but one: its FLOPs, its reads and writes of the feature map, two kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.batchnorms import BatchNorm, batch_norms
from sparsecc.passes.analysis.convolutions import Taps, average, one_tap, taps
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_layout, same_shape, same_size
from sparsecc.passes.analysis.stream import is_tensor
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

Place = tuple[fx.Node, int]  # an addition, and which of its operands


@dataclass(frozen=True)
class Branch:
    """One summand over an input ``x``: a linear map, or ``x`` itself, its BatchNorm or its average pooling."""

    place: Place
    node: fx.Node
    x: fx.Node
    taps: Taps
    linear: Linear | None = None
    norm: BatchNorm | None = None

    @property
    def is_identity(self) -> bool:
        return self.node is self.x


@dataclass
class Group:
    """The branch that stays, and those that it takes."""

    host: Branch
    others: list[Branch]


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Merge summed branches of one input into one layer."""

    name: ClassVar[str] = "merge-branches"
    family: ClassVar[str] = "batchnorm"
    law: ClassVar[str] = (
        "conv(x,W₁,b₁) + conv(x,W₂,b₂) + t⊙x + h = conv(x, W₁+pad(W₂)+diag(t), b₁+b₂+h)"
    )
    source: ClassVar[str] = "Ding et al. 2021, RepVGG, §3.3"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "RepVGG, MobileOne, RepLKNet: one convolution for two to five"
    refusals: ClassVar[dict[str, str]] = {
        "taps": "the branches have other strides or groups, or their taps do not line up",
        "fan-out": "something else reads the branch too",
        "tied": "a branch's weight is shared with another node",
        "widened": "the sum has another dtype than the branches",
        "layout": "the sum has other strides than the branch that stays",
        "written": "the input is written in place, maybe between the branches",
        **RECOMPUTED,
        "region": "an autocast or grad-mode region begins or ends between the branches",
    }

    def find(self, context: Context) -> list[Match]:
        matches = []
        for root in context.program.calls(aten.add.Tensor):
            users = list(root.users)
            if not _is_sum(root) or (len(users) == 1 and _is_sum(users[0])):
                continue  # an inner addition of a larger sum
            places, additions = _summands(root)
            for group in _groups(places, context):
                nodes = {"group": group, "additions": additions}
                taken = ", ".join(b.node.name for b in group.others)
                matches.append(Match(root, nodes, f"{group.host.node.name} takes {taken}"))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        group: Group = match.nodes["group"]
        host = group.host
        weights = context.analyses.get(weight_values)
        mode = context.analyses.get(modes)
        if context.analyses.get(aliases).written(host.x):
            return Refusal.at(host.x, "written", f"{host.x.name} is written in place")
        if not same_layout(match.node.meta["val"], host.node.meta["val"]):
            return Refusal.at(match.node, "layout", self.refusals["layout"])
        for branch in (host, *group.others):
            node = branch.node
            if branch is not host and _first_taps(branch, host) is None:
                return Refusal.at(node, "taps", self.refusals["taps"])
            if not branch.is_identity and len(node.users) != 1:
                other = next(u for u in node.users if u is not branch.place[0])
                return Refusal.at(other, "fan-out", f"{other.name} reads {node.name} too")
            if branch.linear and other_users(branch.linear.weight, node, weights):
                return Refusal.at(node, "tied", f"the weight of {node.name} is shared")
            if node.meta["val"].dtype != match.node.meta["val"].dtype:
                return Refusal.at(node, "widened", self.refusals["widened"])
            places = (branch.place[0],) if branch.is_identity else (branch.place[0], node)
            if any(mode[place] != mode[host.node] for place in places):
                return Refusal.at(node, "region", self.refusals["region"])
        return context.recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        group: Group = match.nodes["group"]
        linear = group.host.linear
        assert linear is not None
        build = program.weight(self.name, match.node)
        weight, bias = build.wide(linear.weight), linear.bias and build.wide(linear.bias)
        added: list[fx.Node] = []
        for branch in group.others:
            kernel, shift = _as_kernel(build, branch, group.host)
            weight = build.add(weight, kernel)
            if shift is not None and branch.norm and context.trains:
                added.append(shift)  # as in fold-batchnorm
            elif shift is not None:
                bias = shift if bias is None else build.add(bias, shift)
        dtype = linear.weight.meta["val"].dtype
        weight = build.as_dtype(weight, dtype)
        bias = bias and build.as_dtype(bias, (linear.bias or linear.weight).meta["val"].dtype)
        linear.set_weights(program, self.name, weight=weight, bias=bias)
        linear.node.meta[MOVED] = "it carries the other branches"
        for shift in added:
            self._add(linear, shift, context)
        removed = {branch.place for branch in group.others}
        for total, parent in match.nodes["additions"]:
            left = [
                operand
                for i, operand in enumerate(total.args)
                if isinstance(operand, fx.Node) and (total, i) not in removed
            ]
            if len(left) == 2:
                total.meta[MOVED] = "it carries the other branches"
            elif left:
                program.replace(total, left[0])
            elif parent is not None:
                removed.add(parent)

    def _add(self, linear: Linear, shift: fx.Node, context: Context) -> None:
        program, node = context.program, linear.node
        rank = node.meta["val"].dim()
        ones = [1] * (rank - 1 - linear.feature_axis % rank)
        build = program.weight(self.name, node)
        vector = build.call(aten.reshape.default, shift, [-1, *ones])
        total = program.call(
            aten.add.Tensor, (node, vector), like=node, origin=self.name, after=node
        )
        value = program.cast(
            total, node.meta["val"].dtype, like=node, origin=self.name, before=total.next
        )
        value.meta[MOVED] = "it carries the other branches"
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not total)

    def saving(self, match: Match, context: Context) -> Saving:
        group: Group = match.nodes["group"]
        result = match.node
        flops = 0
        for branch in group.others:
            flops += numel(result)  # the addition
            if branch.linear is not None:
                flops += branch.linear.flops
        moved = 3 * nbytes(result) * len(group.others)
        return Saving(moved, flops, 2 * len(group.others))

    @classmethod
    def examples(cls) -> list[Example]:
        def linear(x: Any, W: Any, V: Any, b: Any, c: Any) -> Any:
            return (x @ W.transpose(0, 1) + b) + (x @ V.transpose(0, 1) + c)

        def merged(x: Any, W: Any, V: Any, b: Any, c: Any) -> Any:
            return x @ (W + V).transpose(0, 1) + (b + c)

        def branches(y: Any, W: Any, V: Any, b: Any, t: Any, h: Any) -> Any:
            total = conv(y, W, b) + conv(y, V)
            rows, columns = total.shape[2:]
            return total + (y * t[:, None, None] + h[:, None, None])[:, :, :rows, :columns]

        def one(y: Any, W: Any, V: Any, b: Any, t: Any, h: Any) -> Any:
            rows, columns = W.shape[2:]
            first = torch.diag_embed(t)[:, :, None, None]
            first = torch.nn.functional.pad(first, (0, columns - 1, 0, rows - 1))
            return conv(y, W + V + first, b + h)

        conv = torch.nn.functional.conv2d
        shapes = {"x": ("n", "k"), "W": ("d", "k"), "V": ("d", "k"), "b": ("d",), "c": ("d",)}
        kernel = ("d", "d", "k", "k")
        image: dict[str, tuple[str, ...]] = {"y": ("n", "d", "rows", "columns")}
        image |= {"W": kernel, "V": kernel, "b": ("d",), "t": ("d",), "h": ("d",)}
        return [
            Example(linear, merged, shapes, ("W", "V", "b", "c"), symbolic=True),
            Example(branches, one, image, ("W", "V", "b", "t", "h")),
        ]


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two tensors of its own shape, or one and the zero that ``sum`` begins with."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    shape = node.meta["val"].shape
    return all(
        same_shape(a.meta["val"].shape, shape) if is_tensor(a) else a == 0  # type: ignore[union-attr]
        for a in node.args
    )


def _summands(root: fx.Node) -> tuple[list[Place], list[tuple[fx.Node, Place | None]]]:
    """The places of all summands of ``root``; and its additions, inner ones first, each with its own place."""
    places: list[Place] = []
    additions: list[tuple[fx.Node, Place | None]] = [(root, None)]
    for total, _ in additions:
        for i, operand in enumerate(total.args):
            if not isinstance(operand, fx.Node):
                continue
            inner = _is_sum(operand) and len(operand.users) == 1
            if inner and total.args.count(operand) == 1:
                additions.append((operand, (total, i)))
            else:
                places.append((total, i))
    return places, additions[::-1]


def _groups(places: list[Place], context: Context) -> list[Group]:
    """Summands over one input: the largest kernel with all that fit; then each that does not.

    Of one sum one group is merged.
    """
    maps, norms = context.analyses.get(linears), context.analyses.get(batch_norms)
    weights = context.analyses.get(weight_values)
    layers: list[Branch] = []
    for place in places:
        linear = maps.get(_operand(place))
        found = taps(linear) if linear and linear.is_conv else one_tap(0)
        if linear is not None and found is not None:
            layers.append(Branch(place, linear.node, linear.x, found, linear))
    inputs = {branch.x for branch in layers}
    rest = []
    for place in places:
        node = _operand(place)
        norm, pool = norms.get(node), average(node)
        spatial = one_tap(max(node.meta["val"].dim() - 2, 0))
        if any(branch.place == place for branch in layers):
            continue
        if node in inputs:
            rest.append(Branch(place, node, node, spatial))
        elif norm is not None and norm.x in inputs and norm.reads_only(weights):
            rest.append(Branch(place, node, norm.x, spatial, norm=norm))
        elif pool is not None and node.args[0] in inputs:
            rest.append(Branch(place, node, node.args[0], pool))  # type: ignore[arg-type]
    layers.sort(key=lambda branch: math.prod(branch.taps.kernel), reverse=True)
    for host in layers:
        others = [b for b in (*layers, *rest) if b.x is host.x and b is not host]
        fitting = [b for b in others if _first_taps(b, host) is not None]
        if fitting:
            misfits = [b for b in others if b not in fitting]
            return [Group(host, fitting), *(Group(host, [b]) for b in misfits)]
    return []


def _operand(place: Place) -> fx.Node:
    operand = place[0].args[place[1]]
    assert isinstance(operand, fx.Node)
    return operand


def _first_taps(branch: Branch, host: Branch) -> tuple[int, ...] | None:
    """Which tap of the host the branch's first tap is on each spatial axis; None where it cannot be merged."""
    linear = host.linear
    assert linear is not None
    if branch.linear is not None:
        other = branch.linear
        if (other.is_conv, other.groups) != (linear.is_conv, linear.groups):
            return None
        ours, theirs = (x.weight.meta["val"].shape for x in (linear, other))
        if not linear.is_conv and other.out_axis != linear.out_axis:
            theirs = theirs[::-1]
        if not same_shape(ours[:2], theirs[:2]):
            return None
    else:
        result, x = linear.node.meta["val"], linear.x.meta["val"]
        axis = linear.feature_axis % result.dim()
        if not isinstance(result.shape[axis], int) or not same_size(
            result.shape[axis], x.shape[axis]
        ):
            return None
        if not linear.is_conv and not branch.is_identity and result.dim() != 2:
            return None  # BatchNorm's channels are axis 1
        if not linear.is_conv:
            return ()
    return branch.taps.inside(host.taps)


def _as_kernel(
    build: WeightBuilder, branch: Branch, host: Branch
) -> tuple[fx.Node, fx.Node | None]:
    """(kernel of the shape of the host's weight, shift [out] or None) that do what the branch does."""
    linear, first = host.linear, _first_taps(branch, host)
    assert linear is not None
    assert first is not None
    if branch.linear is not None:
        other = branch.linear
        kernel = build.wide(other.weight)
        if not linear.is_conv and other.out_axis != linear.out_axis:
            kernel = build.call(aten.t.default, kernel)
        return _padded(build, kernel, branch, host, first), other.bias and build.wide(other.bias)
    shift: fx.Node | None = None
    count = linear.node.meta["val"].shape[linear.feature_axis]
    if branch.norm is not None:
        scale, shift = branch.norm.affine(build)
    else:
        scale = build.call(aten.new_ones.default, build.wide(linear.weight), [count])
    if not linear.is_conv:
        return build.call(aten.diag_embed.default, scale), shift
    if not branch.is_identity and branch.norm is None:
        scale = build.mul(scale, 1 / math.prod(branch.taps.kernel))
    each = count // linear.groups
    blocks = build.call(aten.reshape.default, scale, [linear.groups, each])
    blocks = build.call(aten.diag_embed.default, blocks)
    ones = [1] * len(host.taps.kernel)
    kernel = build.call(aten.reshape.default, blocks, [count, each, *ones])
    if branch.taps.kernel != tuple(ones):
        kernel = build.call(aten.expand.default, kernel, [count, each, *branch.taps.kernel])
    return _padded(build, kernel, branch, host, first), shift


def _padded(
    build: WeightBuilder, kernel: fx.Node, branch: Branch, host: Branch, first: tuple[int, ...]
) -> fx.Node:
    """The kernel with zeros around it, up to the host's size."""
    pads: list[int] = []
    for axis in reversed(range(len(first))):
        behind = host.taps.kernel[axis] - branch.taps.kernel[axis] - first[axis]
        pads += [first[axis], behind]
    return build.call(aten.constant_pad_nd.default, kernel, pads) if any(pads) else kernel
