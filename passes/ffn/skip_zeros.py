"""Feed-forward networks whose activation makes exact zeros read the weights of live neurons alone.

Law.   Σ_i h_i D_i = Σ_{i: h_i ≠ 0} h_i D_i with h_i = a_i(g_i·x) u_i·x: where a_i is 0, neither u_i nor D_i
       is read. Of blocks behind a router, a_i is the value r_n of the block n that neuron i is in, for any r.
Source Mirzadeh et al. 2023, "ReLU Strikes Back" (arXiv:2310.04564), §4; Song et al. 2024, "ProSparse"
       (arXiv:2402.13516), §4.4; Li et al. 2022, "The Lazy Neuron Phenomenon" (arXiv:2210.06313); the selection
       of Gemma 3n: You et al. 2025, "Spark Transformer" (arXiv:2506.06644), eq. 6; blocks: Song et al. 2025,
       "BlockFFN" (arXiv:2507.08771).
Legal  in inference, in float32 or bfloat16, for 16 known rows at most (with more, some row needs nearly every
       neuron, and libraries are good at the dense product). The activation is zero for a range of what it
       reads: ReLU, ReLU², FATReLU, relu(p - b), a threshold on |p|, top-k of a row, relu(p - mean - c std).
       Where others read the hidden value too, it stays, and the down projection alone skips. Of blocks, r is
       made by one of these functions of any value, behind which an RMSNorm may stand (it keeps zeros, whatever
       its weight's sign; a LayerNorm does not), and spread over views [.., N, d] or by repeat_interleave.
Exact  in real arithmetic: what is left out is a product with zero (of a finite weight: 0 · ∞ is not computed).
Pays   by the share of dead neurons: two of three weights of a gated network, one of two of a plain one. Whether
       the kernel or Inductor's dense code runs is measured, with all neurons live unless `density` says better.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import OptionsError
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.blocks import find_blocks
from sparsecc.passes.analysis.live import Live, find_live
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sites import site_name
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import (
    Context,
    Exactness,
    Example,
    Match,
    Refusal,
    RegionPass,
    Saving,
)
from sparsecc.passes.ffn._neurons import Rows, few, place_sparse
from sparsecc.program import Program
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.sparse_ffn import MOST_ROWS, Spec, meaning

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class SkipZeros(RegionPass):
    """Skip the neurons that an activation makes zero.

    Attributes:
        density: the share of neurons that is known to be live, for the choice of kernels; 1 for unknown.
        recipe: what it rounds is left to the passes that carry it out.
    """

    density: float = 1.0
    recipe: Recipe | None = None

    name: ClassVar[str] = "skip-zeros"
    family: ClassVar[str] = "ffn"
    law: ClassVar[str] = "Σ_i h_i D_i = Σ_{i: h_i ≠ 0} h_i D_i"
    source: ClassVar[str] = (
        "Mirzadeh et al. 2023, ReLU Strikes Back, §4; Song et al. 2024, ProSparse"
    )
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "decoding of ReLU networks: the weights of dead neurons are not read"
    refusals: ClassVar[Mapping[str, str]] = {
        "training": "gradients flow, and the operator has no backward",
        "rows": f"more than {MOST_ROWS} rows, or a number that is not known",
        "dtype": "input, weights and biases are not all float32 or all bfloat16",
        "rounded": "the recipe rounds its weights, or says itself what is dead",
        "written": "something that the operator reads is written in place",
        "region": "an autocast or grad-mode region begins or ends inside",
        "small": RegionPass.SMALL,
        "device": RegionPass.DEVICE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        density: Any = self.density
        if (
            isinstance(density, bool)
            or not isinstance(density, (int, float))
            or not 0 < density <= 1
        ):
            raise OptionsError(
                f"pass {self.name!r}: 'density' is a share of (0, 1], not {density!r}."
            )

    def find(self, context: Context) -> list[Match]:
        blocks = {live.down.node: live for live in context.analyses.get(find_blocks)}
        others = {live.down.node: live for live in context.analyses.get(find_live)}
        # What one network's result was -> what it is now, for those that read it.
        results: dict[fx.Node, fx.Node] = {}
        return [
            Match(node, {"live": live, "results": results}, note=words(live))
            for node, live in sorted((others | blocks).items())
        ]

    def check(self, match: Match, context: Context) -> Refusal | None:
        live: Live = match.nodes["live"]
        node, said = match.node, self.refusals
        if context.trains:
            return Refusal.at(node, "training", said["training"])
        sizes = live.x.meta["val"].shape[:-1]
        if not few(sizes, MOST_ROWS):
            return Refusal.at(node, "rows", f"{said['rows']}: {list(sizes)}")
        if self._rounded(live, context):
            return Refusal.at(node, "rounded", said["rounded"])
        weights = weights_of(live)
        read = [live.x, *([live.router] if live.router is not None else [])]
        for value in (*read, node, *live.inside, *weights):
            fake = value.meta["val"]
            if isinstance(fake, torch.Tensor) and fake.is_floating_point():
                alike = fake.dtype is live.x.meta["val"].dtype and fake.dtype in _DTYPES
                if not alike or fake.device != live.x.meta["val"].device:
                    return Refusal.at(value, "dtype", said["dtype"])
        for value in read:
            if context.analyses.get(aliases).written(value):
                return Refusal.at(value, "written", f"{value.name} is written in place")
        mode = context.analyses.get(modes)
        for inner in live.inside:
            if mode[inner] != mode[node]:
                return Refusal.at(inner, "region", said["region"])
        return self.unworthy(node, [w for w in weights if w.meta["val"].dim() == 2])

    def _rounded(self, live: Live, context: Context) -> bool:
        if self.recipe is None:
            return False
        known = context.analyses.get(weight_values)
        names = {site_name(context.program, linear.weight, known) for linear in live.maps}
        return bool(names & (self.recipe.sites.keys() | self.recipe.sparsity.keys()))

    def rewrite(self, match: Match, context: Context) -> None:
        live, results = match.nodes["live"], match.nodes["results"]
        x = results.get(live.x, live.x)
        results[match.node] = as_sparse_ffn(context.program, live, x, self.name, self.density)

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(launches=len(match.nodes["live"].inside))

    @classmethod
    def examples(cls) -> list[Example]:
        gated = Spec("relu(p0 + v0)", "a * p1").text()
        plain = Spec("relu(p0) * relu(p0)", "a").text()

        def before(x: Any, g: Any, u: Any, d: Any, b: Any) -> Any:
            y = torch.relu(x @ g.transpose(0, 1) + b) * (x @ u.transpose(0, 1))
            return y @ d

        def after(x: Any, g: Any, u: Any, d: Any, b: Any) -> Any:
            return meaning(x, [g, u, d], [b], None, gated)

        def squared(x: Any, g: Any, d: Any) -> Any:
            return torch.relu(x @ g.transpose(0, 1)).square() @ d

        def as_one(x: Any, g: Any, d: Any) -> Any:
            return meaning(x, [g, d], [], None, plain)

        def every(h: Any, m: Any, D: Any) -> Any:
            return (h * m) @ D

        def by_neuron(h: Any, m: Any, D: Any) -> Any:
            return h @ (m[:, None] * D)  # a dead neuron's row is nothing

        def routed(x: Any, r: Any, u: Any, d: Any) -> Any:
            h = aten.silu.default((x @ u.flatten(0, 1).transpose(0, 1)).unflatten(-1, u.shape[:2]))
            return (torch.relu(r).unsqueeze(-1) * h).flatten(-2) @ d.flatten(0, 1)

        def of_blocks(x: Any, r: Any, u: Any, d: Any) -> Any:
            spec = Spec("p0", "a * silu(p1)", gate=False, block=u.shape[1]).text()
            weights = [u.flatten(0, 1), d.flatten(0, 1)]
            return meaning(x, weights, [torch.relu(r)], None, spec)

        wide, down = ("k", "d"), ("k", "m")
        gate = {"x": ("n", "d"), "g": wide}
        masked = {"h": ("n", "k"), "m": ("k",), "D": down}
        return [
            Example(
                before, after, {**gate, "u": wide, "d": down, "b": ("k",)}, ("g", "u", "d", "b")
            ),
            Example(squared, as_one, {**gate, "d": down}, ("g", "d")),
            Example(
                routed,
                of_blocks,
                {
                    "x": ("n", "d"),
                    "r": ("n", "k"),
                    "u": ("k", "c", "d"),
                    "d": ("k", "c", "m"),
                },
                ("u", "d"),
            ),
            Example(every, by_neuron, masked, ("D",), symbolic=True),
        ]


def words(live: Live) -> str:
    """The network in a line, for reports."""
    if live.block:
        return f"blocks of {live.block} | {live.hidden}"
    if live.gate is None:
        return "zeros of the input"
    chosen = f" | {live.select} | {live.after}" if live.select else ""
    return f"{live.activation}{chosen} | {live.hidden}"


def weights_of(live: Live) -> list[fx.Node]:
    """The weights, biases and operands that the network reads."""
    biases = [linear.bias for linear in live.maps if linear.bias is not None]
    return [*(linear.weight for linear in live.maps), *biases, *live.operands]


def as_sparse_ffn(
    program: Program, live: Live, x: fx.Node, origin: str, density: float = 1.0
) -> fx.Node:
    """Puts ``sparse_ffn`` in the place of a network; returns its result.

    Args:
        x: what ``live.x`` is now.
    """
    node = live.down.node
    build = program.weight(origin, node)
    operands, weights = list(live.operands), []
    texts = [live.activation, live.hidden]
    for half, name in ((live.gate, "p0"), (live.up, "p1")):
        if half is None:
            continue
        rows = Rows(half.linear, "", half.linear.out_axis, half.part)
        weights.append(rows.weight(build))
        bias = rows.bias(build)
        if bias is not None:
            if bias not in operands:
                operands.append(bias)
            biased = f"({name} + v{operands.index(bias)})"
            texts = [re.sub(rf"\b{name}\b", biased, text) for text in texts]
    down = Rows(live.down, "", live.down.in_axis)
    weights.append(down.weight(build))
    activation, hidden = texts
    gate = live.gate is not None
    spec = Spec(
        activation, hidden, gate, live.select, live.after, density=density, block=live.block
    )
    if live.router is not None:
        operands.append(live.router)
    return place_sparse(program, node, down, (x, weights, operands, None, spec.text()), origin)
