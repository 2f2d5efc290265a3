"""Convolutions (or linear layers) of one input that are summed, merged into one; so is the input itself.

Law.   conv(x, W₁, b₁) + s⊙conv(x, W₂, b₂) + t⊙x + h = conv(x, W₁ + pad(s⊙W₂) + diag(t), b₁ + s⊙b₂ + h);
       a difference is a sum with s = −1, and x + s⊙(conv(x, W, b) − t⊙x − h) is such a sum.
Source Ding et al., "RepVGG" (2021), §3.3; Ding et al., "RepLKNet" (2022), §3, Vasu et al., "MobileOne"
       (2023), §3.2, and, with differences and scales, Vasu et al., "FastViT" (2023), merge the same way.
Legal  when all taps of the smaller kernels, one at the centre for the input itself, are taps of the largest,
       with equal strides and groups, and nothing else reads the branches. Average pooling that counts its
       padding is a branch like any other. Scales are numbers, or weights along the output features.
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
from sparsecc.passes.analysis.sums import Term, sums
from sparsecc.passes.analysis.weights import only_axis, other_users, weight_values
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
class Branch:
    """One summand over an input ``x``: a linear map, or ``x`` itself, its BatchNorm or its average pooling."""

    term: Term
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

    @property
    def branches(self) -> list[Branch]:
        return [self.host, *self.others]


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Merge summed branches of one input into one layer."""

    name: ClassVar[str] = "merge-branches"
    family: ClassVar[str] = "batchnorm"
    law: ClassVar[str] = (
        "conv(x,W₁,b₁) + s⊙conv(x,W₂,b₂) + t⊙x + h = conv(x, W₁+pad(s⊙W₂)+diag(t), b₁+s⊙b₂+h)"
    )
    source: ClassVar[str] = "Ding et al. 2021, RepVGG, §3.3"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "RepVGG, MobileOne, RepLKNet, FastViT: one convolution for two to five"
    refusals: ClassVar[dict[str, str]] = {
        "taps": "the branches have other strides or groups, or their taps do not line up",
        "scale": "a branch is scaled along another axis than that of its features",
        "fan-out": "something else reads the branch too",
        "tied": "a branch's weight is shared with another node",
        "widened": "the sum has another dtype than the branches",
        "layout": "the sum has other strides than the branch that stays",
        "written": "the input is written in place, maybe between the branches; or another summand is, "
        "before the sum is complete",
        **RECOMPUTED,
        "region": "an autocast or grad-mode region begins or ends between the branches",
    }

    def find(self, context: Context) -> list[Match]:
        matches = []
        for total in context.analyses.get(sums):
            for group in _groups(total.terms, context):
                nodes = {"group": group, "sum": total}
                taken = ", ".join(b.node.name for b in group.others)
                matches.append(Match(total.root, nodes, f"{group.host.node.name} takes {taken}"))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        group: Group = match.nodes["group"]
        host, total = group.host, match.nodes["sum"]
        alias = context.analyses.get(aliases)
        if alias.written(host.x):
            return Refusal.at(host.x, "written", f"{host.x.name} is written in place")
        for term in total.terms:  # those that stay may be read later than they were
            if any(term.user < writer < match.node for writer in alias.writes(term.value)):
                words = f"{term.value.name} is written in place before the sum is complete"
                return Refusal.at(term.value, "written", words)
        if not same_layout(match.node.meta["val"], host.node.meta["val"]):
            return Refusal.at(match.node, "layout", self.refusals["layout"])
        refused = (self._refusal(branch, host, match.node, context) for branch in group.branches)
        return next(filter(None, refused), None) or context.recomputed(match.node)

    def _refusal(
        self, branch: Branch, host: Branch, root: fx.Node, context: Context
    ) -> Refusal | None:
        """Why ``host`` cannot take ``branch``, or stay where that is itself."""
        weights = context.analyses.get(weight_values)
        mode = context.analyses.get(modes)
        node = branch.node
        code = _misfit(branch, host)
        if code is not None:
            return Refusal.at(node, code, self.refusals[code])
        if not branch.is_identity and len(node.users) != 1:
            other = next(u for u in node.users if u is not branch.term.user)
            return Refusal.at(other, "fan-out", f"{other.name} reads {node.name} too")
        if branch.linear and other_users(branch.linear.weight, node, weights):
            return Refusal.at(node, "tied", f"the weight of {node.name} is shared")
        if node.meta["val"].dtype != root.meta["val"].dtype:
            return Refusal.at(node, "widened", self.refusals["widened"])
        if mode[root] != mode[host.node] or not (branch.is_identity or mode[node] == mode[root]):
            return Refusal.at(node, "region", self.refusals["region"])
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        program, root = context.program, match.node
        group: Group = match.nodes["group"]
        value = self._merge(group, root, context)
        taken = [branch.term for branch in group.branches]
        rest = match.nodes["sum"].without(taken, program, self.name, "branches of it are elsewhere")
        if rest is None:
            program.replace(root, value)
            return
        total = program.call(
            aten.add.Tensor, (value, rest), like=root, origin=self.name, after=root
        )
        root.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def _merge(self, group: Group, root: fx.Node, context: Context) -> fx.Node:
        """Give the weights of all branches, scaled, to the host; returns their sum."""
        program, linear = context.program, group.host.linear
        assert linear is not None
        build = program.weight(self.name, root)
        weight: fx.Node | None = None
        bias: fx.Node | None = None
        added: list[fx.Node] = []
        for branch in group.branches:
            kernel, shift = _as_kernel(build, branch, group.host)
            kernel, shift = _scaled(build, kernel, shift, branch, linear)
            weight = kernel if weight is None else build.add(weight, kernel)
            if shift is not None and branch.norm and context.trains:
                added.append(shift)  # as in fold-batchnorm
            elif shift is not None:
                bias = shift if bias is None else build.add(bias, shift)
        assert weight is not None
        weight = build.as_dtype(weight, linear.weight.meta["val"].dtype)
        bias = bias and build.as_dtype(bias, (linear.bias or linear.weight).meta["val"].dtype)
        linear.set_weights(program, self.name, weight=weight, bias=bias)
        value = linear.node
        value.meta[MOVED] = "it carries the other branches"
        for shift in added:
            value = self._add(linear, value, shift, context)
        return value

    def _add(self, linear: Linear, value: fx.Node, shift: fx.Node, context: Context) -> fx.Node:
        program = context.program
        rank = value.meta["val"].dim()
        ones = [1] * (rank - 1 - linear.feature_axis % rank)
        build = program.weight(self.name, value)
        vector = build.call(aten.reshape.default, shift, [-1, *ones])
        place: Any = {"like": linear.node, "origin": self.name}
        total = program.call(aten.add.Tensor, (value, vector), **place, after=value)
        value = program.cast(total, value.meta["val"].dtype, **place, before=total.next)
        value.meta[MOVED] = "it carries the other branches"
        return value

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
        def linear(x: Any, W: Any, V: Any, b: Any, c: Any, s: Any) -> Any:
            return (x @ W.transpose(0, 1) + b) - s * (x @ V.transpose(0, 1) + c)

        def merged(x: Any, W: Any, V: Any, b: Any, c: Any, s: Any) -> Any:
            return x @ (W.transpose(0, 1) - V.transpose(0, 1) * s) + (b - s * c)

        def branches(y: Any, W: Any, V: Any, b: Any, t: Any, h: Any, s: Any) -> Any:
            total = conv(y, W, b) + conv(y, V)
            y = y[:, :, : total.shape[2], : total.shape[3]]
            norm = y * t[:, None, None] + h[:, None, None]
            return y + s[:, None, None] * (total - norm)

        def one(y: Any, W: Any, V: Any, b: Any, t: Any, h: Any, s: Any) -> Any:
            rows, columns = W.shape[2:]
            first = torch.diag_embed(1 - s * t)[:, :, None, None]
            first = torch.nn.functional.pad(first, (0, columns - 1, 0, rows - 1))
            return conv(y, s[:, None, None, None] * (W + V) + first, s * (b - h))

        conv = torch.nn.functional.conv2d
        shapes = {"x": ("n", "k"), "W": ("d", "k"), "V": ("d", "k")} | dict.fromkeys("bcs", ("d",))
        kernel = ("d", "d", "k", "k")
        image: dict[str, tuple[str, ...]] = {"y": ("n", "d", "rows", "columns")}
        image |= {"W": kernel, "V": kernel} | dict.fromkeys("bths", ("d",))
        return [
            Example(linear, merged, shapes, ("W", "V", "b", "c", "s"), symbolic=True),
            Example(branches, one, image, ("W", "V", "b", "t", "h", "s")),
        ]


def _groups(terms: list[Term], context: Context) -> list[Group]:
    """Summands over one input: the largest kernel with all that fit; then each that does not.

    Of one sum one group is merged.
    """
    maps, norms = context.analyses.get(linears), context.analyses.get(batch_norms)
    weights = context.analyses.get(weight_values)
    layers: list[Branch] = []
    for term in terms:
        linear = maps.get(term.value)
        found = taps(linear) if linear and linear.is_conv else one_tap(0)
        if linear is not None and found is not None:
            layers.append(Branch(term, linear.node, linear.x, found, linear))
    inputs = {branch.x for branch in layers}
    rest = []
    for term in terms:
        node = term.value
        norm, pool = norms.get(node), average(node)
        spatial = one_tap(max(node.meta["val"].dim() - 2, 0))
        if any(branch.term is term for branch in layers):
            continue
        if node in inputs:
            rest.append(Branch(term, node, node, spatial))
        elif norm is not None and norm.x in inputs and norm.reads_only(weights):
            rest.append(Branch(term, node, norm.x, spatial, norm=norm))
        elif pool is not None and node.args[0] in inputs:
            rest.append(Branch(term, node, node.args[0], pool))  # type: ignore[arg-type]
    # One that is itself scaled in another way may only be refused.
    layers.sort(key=lambda b: (_misfit(b, b) is None, math.prod(b.taps.kernel)), reverse=True)
    for host in layers:
        others = [b for b in (*layers, *rest) if b.x is host.x and b is not host]
        fitting = [b for b in others if _misfit(b, host) is None]
        if fitting:
            misfits = [b for b in others if b not in fitting]
            return [Group(host, fitting), *(Group(host, [b]) for b in misfits)]
    return []


def _misfit(branch: Branch, host: Branch) -> str | None:
    """The refusal where the host's kernel has no room for the branch; None where it has."""
    assert host.linear is not None
    rank = host.node.meta["val"].dim()
    axis = host.linear.feature_axis % rank
    scales = [factor for factor in branch.term.factors if isinstance(factor, fx.Node)]
    if any(only_axis(scale, rank) != axis for scale in scales):
        return "scale"
    return "taps" if _first_taps(branch, host) is None else None


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


def _scaled(
    build: WeightBuilder, kernel: fx.Node, shift: fx.Node | None, branch: Branch, linear: Linear
) -> tuple[fx.Node, fx.Node | None]:
    """Kernel and shift of a branch times the factors that it has in the sum."""
    for factor in branch.term.factors:
        if isinstance(factor, fx.Node):
            vector = build.call(aten.reshape.default, build.wide(factor), [-1])
            kernel = linear.times(build, kernel, vector, linear.out_axis)
            shift = shift and build.mul(shift, vector)
        else:
            kernel, shift = build.mul(kernel, factor), shift and build.mul(shift, factor)
    return kernel, shift


def _padded(
    build: WeightBuilder, kernel: fx.Node, branch: Branch, host: Branch, first: tuple[int, ...]
) -> fx.Node:
    """The kernel with zeros around it, up to the host's size."""
    pads: list[int] = []
    for axis in reversed(range(len(first))):
        behind = host.taps.kernel[axis] - branch.taps.kernel[axis] - first[axis]
        pads += [first[axis], behind]
    return build.call(aten.constant_pad_nd.default, kernel, pads) if any(pads) else kernel
