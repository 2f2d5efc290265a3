"""Neurons that a recipe prunes, cut out of the weights of a feed-forward network.

Law.   Σⱼ mⱼ act(gⱼx + aⱼ) (uⱼx + bⱼ) dⱼ + c = D[:, C] (act(G[C]x + a[C]) ⊙ (U[C]x + b[C])) + c, for the mask
       m = 1 on the kept neurons C and 0 elsewhere; in a plain network without the factor of U.
Source Wang et al. 2025, "CFSP" (arXiv:2409.13199); Li et al. 2017, "Pruning Filters for Efficient
       ConvNets" (structured pruning). Which neurons stay, the recipe's method chose.
Legal  when the values between the first linear maps and the down projection have no other reader, and no
       other node reads the weights. A fused gate and up is cut in both halves, which are found again at their
       new place. Layers are products or 1×1 convolutions, which keep their memory format. A recipe whose
       neurons do not fit the network is an error.
Lossy  against the whole network; equal to the masked one in real arithmetic.
Pays   the pruned share of the network's arithmetic, of the bytes of its weights and of the values between, at
       every number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import RecipeError
from sparsecc.passes.analysis.convolutions import memory_format
from sparsecc.passes.analysis.ffn import FFN, find_ffns, half_of
from sparsecc.passes.analysis.linear import Linear, current, every_linear, is_given
from sparsecc.passes.analysis.reindex import resized
from sparsecc.passes.analysis.sites import site_name
from sparsecc.passes.analysis.sizes import is_contiguous
from sparsecc.passes.analysis.weights import other_users, weight_values
from sparsecc.passes.base import (
    Context,
    Exactness,
    Example,
    Match,
    Pass,
    Refusal,
    Saving,
    nbytes,
)
from sparsecc.program import MOVED, Program, is_shape_query
from sparsecc.recipe import Recipe

aten = torch.ops.aten

LAW = "prune"  # of a recipe's ``sparsity``


@dataclass(frozen=True)
class PruneNeurons(Pass):
    """Cut the neurons that a recipe prunes out of the weights.

    Attributes:
        recipe: whose ``neurons`` of law "prune" are kept.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe("none"))

    name: ClassVar[str] = "prune-neurons"
    family: ClassVar[str] = "ffn"
    law: ClassVar[str] = (
        "D (m ⊙ act(Gx) ⊙ Ux) = D[:, C] (act(G[C]x) ⊙ U[C]x), m = 1 on C, 0 elsewhere"
    )
    source: ClassVar[str] = "Wang et al. 2025, CFSP; Li et al. 2017, Pruning Filters"
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    pays: ClassVar[str] = "the pruned share of a feed-forward network, at every batch size"
    refusals: ClassVar[Mapping[str, str]] = {
        "not-ffn": "what the layer reads is not the hidden value of a feed-forward network",
        "given": "a recipe gives the codes of one of the weights, and nothing may be cut out of it",
        "fan-out": "something else reads a value between the layers",
        "tied": "one of the weights is shared with another node",
        "layout": "a value between has strides, or a view sizes, that do not hold for fewer neurons",
        "training": "gradients flow: what is cut out could not be trained, and would be cut in every step",
        "gathered": "FSDP gathers the weights anew for each call: they would be cut in each",
    }

    def find(self, context: Context) -> list[Match]:
        program, weights = context.program, context.analyses.get(weight_values)
        networks = {ffn.down.node: ffn for ffn in find_ffns(program, context.analyses)}
        found = []
        for node, down in context.analyses.get(every_linear).items():
            name = site_name(program, down.weight, weights)
            if self.recipe.sparsity.get(name, {}).get("law") != LAW:
                continue
            size = int(down.weight.meta["val"].shape[down.in_axis])
            kept = self._kept(name, size)
            if len(kept) < size:
                nodes = {"down": down, "ffn": networks.get(node), "kept": kept}
                found.append(Match(node, nodes, note=f"{name}: {len(kept)} of {size} neurons"))
        return found

    def _kept(self, name: str, size: int) -> torch.Tensor:
        """The neurons of a site, int64 ascending.

        Raises:
            RecipeError: there are none, or they are not neurons of a network of this size.
        """
        kept = self.recipe.neurons.get(name)
        if kept is None or kept.dim() != 1 or not len(kept) or kept.dtype is not torch.int64:
            raise RecipeError(
                f"the recipe ({self.recipe.method!r}) prunes {name} and does not say which neurons stay: "
                "`neurons` must hold int64 indices for it."
            )
        share = float(self.recipe.sparsity[name].get("keep", len(kept) / size))
        fits = int(kept[0]) >= 0 and int(kept[-1]) < size and bool((kept.diff() > 0).all())
        if not fits or round(share * size) != len(kept):
            raise RecipeError(
                f"the recipe ({self.recipe.method!r}) is of another model: {name} has {size} neurons here, and "
                f"the recipe keeps {len(kept)}, {share:.4g} of all, from {int(kept[0])} to {int(kept[-1])}. "
                "Calibrate again."
            )
        return kept

    def check(self, match: Match, context: Context) -> Refusal | None:
        ffn: FFN | None = match.nodes["ffn"]
        down: Linear = match.nodes["down"]
        if ffn is None:
            code = "given" if _is_given(down, context) else "not-ffn"
            return Refusal.at(match.node, code, self.refusals[code])
        between = _between(ffn)
        for node in between:
            for user in node.users:
                outside = user not in between and user is not down.node
                if outside and not _asks_other_sizes(user, ffn.axis):
                    words = f"{user.name} reads {node.name} too"
                    return Refusal.at(user, "fan-out", words)
        weights = context.analyses.get(weight_values)
        for linear in ffn.layers:
            if other_users(linear.weight, linear.node, weights):
                words = f"the weight of {linear.node.name} is shared"
                return Refusal.at(linear.node, "tied", words)
        for node in between:
            if not _holds(node, ffn, len(match.nodes["kept"])):
                return Refusal.at(node, "layout", self.refusals["layout"])
        for linear in ffn.layers:
            if ffn.is_conv and memory_format(linear.weight.meta["val"]) is None:
                return Refusal.at(linear.node, "layout", self.refusals["layout"])
        if context.program.recomputes:
            code = "training" if context.trains else "gathered"
            return Refusal.at(match.node, code, self.refusals[code])
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        program, kept = context.program, match.nodes["kept"]
        ffn: FFN = match.nodes["ffn"]
        size, count = ffn.neurons, len(kept)
        # Before anything is edited: the order of the graph, and who reads what.
        between = sorted(_between(ffn))
        places = {node: half_of(node, ffn.axis) for node in ffn.halves or ()}
        both = kept if ffn.halves is None else torch.cat([kept, kept + size])
        for linear in ffn.layers:
            first = linear is not ffn.down
            self._cut(program, linear, both if first else kept, first)
        linears = {linear.node for linear in ffn.layers}
        for node in between:
            place = places.get(node)
            if place is not None:
                self._replace_half(program, node, *place, ffn.axis, count)
            elif isinstance(node.meta.get("val"), torch.Tensor):
                width = int(node.meta["val"].shape[ffn.axis]) // size * count
                if node not in linears:
                    _resize(node, ffn.axis, width)
                node.meta["val"] = _narrowed(program, node, ffn.axis, width)
                node.meta[MOVED] = "its pruned neurons are gone"
        program.version += 1

    def _cut(self, program: Program, linear: Linear, kept: torch.Tensor, rows: bool) -> None:
        """Keep the rows (or the columns) ``kept`` of a layer, and of its bias the rows."""
        # Afresh: it may be the down projection of a network that was cut before.
        now = current(linear)
        build = program.weight(self.name, linear.node)
        index = program.constant(
            kept.to(now.weight.meta["val"].device), like=linear.node, origin=self.name
        )
        axis = now.out_axis if rows else now.in_axis
        weight = build.call(aten.index_select.default, now.weight, axis, index)
        if now.is_conv:  # its strides say where the result has its channels
            order = memory_format(now.weight.meta["val"])
            weight = build.call(aten.clone.default, weight, memory_format=order)
        bias = None
        if rows and now.bias is not None:
            bias = build.call(aten.index_select.default, now.bias, 0, index)
        now.set_weights(program, self.name, weight=weight, bias=bias)

    def _replace_half(
        self, program: Program, node: fx.Node, whole: fx.Node, half: int, axis: int, count: int
    ) -> None:
        """The first or the second half of a fused gate and up, at its new place."""
        start, axis = half * count, axis % whole.meta["val"].dim()
        new = program.call(
            aten.slice.Tensor,
            (whole, axis, start, start + count),
            like=node,
            origin=self.name,
            before=node,
        )
        new.meta[MOVED] = "its pruned neurons are gone"
        program.replace(node, new)

    def saving(self, match: Match, context: Context) -> Saving:
        ffn: FFN = match.nodes["ffn"]
        size = ffn.neurons
        dead = size - len(match.nodes["kept"])
        layers = ffn.layers
        moved = sum(nbytes(linear.weight) for linear in layers) + 2 * nbytes(ffn.hidden)
        return Saving(moved * dead // size, sum(linear.flops for linear in layers) * dead // size)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, G: Any, a: Any, U: Any, D: Any, c: Any) -> Any:
            gate, up = x @ G.transpose(0, 1) + a, x @ U.transpose(0, 1)
            h = gate * gate * up
            # Masked: the first neuron adds nothing.
            return (
                (h[:, :1] * 0) @ D[:, :1].transpose(0, 1) + h[:, 1:] @ D[:, 1:].transpose(0, 1) + c
            )

        def after(x: Any, G: Any, a: Any, U: Any, D: Any, c: Any) -> Any:
            gate, up = x @ G[1:].transpose(0, 1) + a[1:], x @ U[1:].transpose(0, 1)
            return (gate * gate * up) @ D[:, 1:].transpose(0, 1) + c

        shapes = {"x": ("n", "k"), "G": ("d", "k"), "a": ("d",), "U": ("d", "k"), "D": ("m", "d")}
        shapes |= {"c": ("m",)}
        return [Example(before, after, shapes, ("G", "a", "U", "D", "c"), symbolic=True)]


def _between(ffn: FFN) -> dict[fx.Node, None]:
    """The first layers and all values from there to what the down projection reads."""
    first = {linear.node for linear in ffn.layers[:-1]}
    found: dict[fx.Node, None] = {}
    stack = [ffn.down.x]
    while stack:
        node = stack.pop()
        if node in found or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            continue  # sizes of a view
        found[node] = None
        if node not in first:
            stack.extend(node.all_input_nodes)
    return found


def _asks_other_sizes(user: fx.Node, features: int) -> bool:
    """Whether ``user`` asks for a dtype, or a size other than the number of neurons."""
    if not is_shape_query(user):
        return False
    if user.target is not aten.sym_size.int:
        return False
    value: Any = user.args[0]
    axis: Any = user.args[1]
    rank = value.meta["val"].dim()
    return bool(axis % rank != features % rank)


def _holds(node: fx.Node, ffn: FFN, count: int) -> bool:
    """Whether a value between can have ``count`` neurons."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return True  # parts of a fused gate and up, which become slices
    if ffn.halves is not None and node in ffn.halves:
        return True
    layers = {linear.node for linear in ffn.layers}
    reshapes = node not in layers and node not in (ffn.activation, ffn.hidden)
    if reshapes and resized(node, ffn.axis % value.dim(), count) is None:
        return False
    # Of one channel, an image is both channels first and channels last.
    return is_contiguous(value) or (count > 1 and _channels_last(value, ffn.axis))


def _channels_last(value: torch.Tensor, axis: int) -> bool:
    """Whether features that are not the last axis are last in memory, and the others in order."""
    return axis == 1 and is_contiguous(value.movedim(1, -1))


def _narrowed(program: Program, node: fx.Node, axis: int, width: int) -> torch.Tensor:
    """The fake value of ``node`` with ``width`` features, in the same order of memory."""
    value = node.meta["val"]
    shape = list(value.shape)
    shape[axis] = width
    if is_contiguous(value):
        result: torch.Tensor = program.fake(aten.new_empty.default, (node, shape), {})
        return result
    shape.append(shape.pop(1))
    moved: torch.Tensor = program.fake(aten.new_empty.default, (node, shape), {})
    return moved.movedim(-1, 1)


def _resize(node: fx.Node, axis: int, width: int) -> None:
    """Let a view name the new number of neurons; elementwise operators name none."""
    found = resized(node, axis % node.meta["val"].dim(), width)
    if found is not None:
        node.target, node.args = found


def _is_given(down: Linear, context: Context) -> bool:
    """Whether the codes of the layer, or of a layer before it, are given."""
    every = context.analyses.get(every_linear)
    layers, stack, seen = [down], [down.x], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in every:
            layers.append(every[node])
        elif node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return any(is_given(layer, context.program, context.analyses) for layer in layers)
