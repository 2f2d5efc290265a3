"""Products of a few rows with weights, together with the norm before and what follows element by element.

Law.   f(norm(x)W₁ᵀ, norm(x)W₂ᵀ, …) in one operator: each product, sum and function is the program's own.
Source algebra; the regions are those of decoding: norm and q, k, v; gate, up and their product; the output
       projections and the residual.
Legal  in inference, in float32 or bfloat16 (on GPUs in float16 too), for contiguous weights, where the rows
       are few and known (or any, where a recipe rounds the weights). A norm goes along when nothing else reads
       its result. What follows goes along while nothing else reads what it reads, it keeps the shape, and its
       other operands stand before the first product.
Exact  in real arithmetic: sums are taken in another order, and in half precision a kernel rounds once, at the
       end.
Pays   where reading the weights is the time: one pass over them for several products, no launch and no pass
       over memory for the rest. Whether the generated kernel or Inductor's code runs is measured.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import Aliases, aliases
from sparsecc.passes.analysis.norms import as_norm
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sites import site_name
from sparsecc.passes.analysis.sizes import is_contiguous, same_shape
from sparsecc.passes.analysis.stream import is_number
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import (
    Context,
    Exactness,
    Example,
    Match,
    Refusal,
    RegionPass,
    Saving,
    nbytes,
)
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.expressions import evaluate
from sparsecc.runtime.ops.few_rows import Spec, few_rows, meaning

aten = torch.ops.aten

MOST_ROWS = 16  # above, products are bound by arithmetic, which the libraries are good at
_DTYPES = {
    "cpu": {torch.float32, torch.bfloat16},
    "cuda": {torch.float32, torch.bfloat16, torch.float16},
}


@dataclass
class _Value:
    """The text of a value inside the region, and the node whose value it is."""

    text: str
    node: fx.Node


@dataclass
class Region:
    """One operator to be: its input, the norm before, and its outputs as they grow."""

    x: fx.Node
    linears: list[fx.Node]
    norm: str = "none"
    eps: float | None = 0.0
    weights: list[fx.Node] = field(default_factory=list)
    operands: list[fx.Node] = field(default_factory=list)
    outputs: list[_Value] = field(default_factory=list)
    inside: list[fx.Node] = field(default_factory=list)

    def spec(self) -> Spec:
        texts = [
            ast.unparse(ast.parse(value.text)) for value in self.outputs
        ]  # without needless brackets
        return Spec(self.norm, self.eps, tuple(texts))


@dataclass(frozen=True)
class FuseFewRows(RegionPass):
    """Fuse products of a few rows with the norm before and what follows.

    Attributes:
        recipe: products whose weights it rounds are fused for any number of rows: integer kernels are made for
            that, and rows are then rounded once for all products that read them.
    """

    recipe: Recipe | None = None

    name: ClassVar[str] = "fuse-few-rows"
    family: ClassVar[str] = "linear"
    law: ClassVar[str] = "f(norm(x)W₁ᵀ, norm(x)W₂ᵀ, …) as one operator"
    source: ClassVar[str] = "algebra"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "decoding: every weight is read once a token, and nothing else is"
    refusals: ClassVar[Mapping[str, str]] = {
        "training": "gradients flow, and the operator has no backward",
        "rows": f"more than {MOST_ROWS} rows, or a number that is not known",
        "dtype": "input and weights are not all float32 or all bfloat16 (on a GPU: or float16)",
        "layout": "a weight is not contiguous",
        "written": "something that the operator reads is written in place",
        "region": "an autocast or grad-mode region begins or ends inside",
        "small": RegionPass.SMALL,
        "device": RegionPass.DEVICE,
    }

    def find(self, context: Context) -> list[Match]:
        weights = context.analyses.get(weight_values)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in context.program.calls(aten.linear.default):
            x, weight, *bias = node.args
            known = weight in weights and all(b is None or b in weights for b in bias)
            if isinstance(x, fx.Node) and known and weight.meta["val"].dim() == 2:  # type: ignore[union-attr]
                groups.setdefault(x, []).append(node)
        results: dict[
            fx.Node, fx.Node
        ] = {}  # what one region's result was -> what it is now, for the others
        return [
            Match(nodes[0], {"linears": nodes, "results": results}) for nodes in groups.values()
        ]

    def check(self, match: Match, context: Context) -> Refusal | None:
        linears: list[fx.Node] = match.nodes["linears"]
        first = linears[0]
        if context.trains:
            return Refusal.at(first, "training", self.refusals["training"])
        for node in linears:
            refusal = _operands_refusal(node, self.refusals)
            if refusal is not None:
                return refusal
        x: Any = first.args[0]
        sizes = x.meta["val"].shape[:-1]
        few = all(isinstance(s, int) for s in sizes) and 1 <= sizes.numel() <= MOST_ROWS
        if not few and not self._are_rounded(linears, context):
            return Refusal.at(first, "rows", f"{self.refusals['rows']}: {list(sizes)}")
        region = match.nodes["region"] = _grow(linears, context.analyses.get(weight_values))
        match.note = " | ".join([region.norm, *region.spec().outputs])
        return _place_refusal(region, context, self.refusals) or self.unworthy(
            first, region.weights
        )

    def _are_rounded(self, linears: Sequence[fx.Node], context: Context) -> bool:
        """Whether the recipe rounds every weight of ``linears``."""
        if self.recipe is None:
            return False
        weights = context.analyses.get(weight_values)
        names = (site_name(context.program, node.args[1], weights) for node in linears)  # type: ignore[arg-type]
        return all(name in self.recipe.sites for name in names)

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        region: Region = match.nodes["region"]
        results: dict[fx.Node, fx.Node] = match.nodes["results"]
        x, *operands = (results.get(node, node) for node in (region.x, *region.operands))
        args = (x, region.weights, operands, region.spec().text())
        first = min(region.linears)
        for node in (*region.weights, *operands):  # weights may stand behind, activations never do
            program.bring_before(node, first)
        fused = program.call(few_rows, args, like=first, origin=self.name, before=first)
        for j, value in enumerate(region.outputs):
            result = program.call(
                operator.getitem,
                (fused, j),
                like=value.node,
                origin=self.name,
                before=first,
                val=fused.meta["val"][j],
            )
            value.node.replace_all_uses_with(result)
            results[value.node] = result
        program.version += 1

    def saving(self, match: Match, context: Context) -> Saving:
        region: Region = match.nodes["region"]
        gone = [node for node in region.inside if node not in {v.node for v in region.outputs}]
        return Saving(2 * sum(map(nbytes, gone)), launches=len(region.inside) - 1)

    @classmethod
    def examples(cls) -> list[Example]:
        normed = Spec("rms", 1e-6, ("silu(p0) * p1 + v0", "p2 + t1"))
        plain = Spec("none", 0.0, ("(p0 + v0) * p1 - t1 * 3",))

        def before(x: Any, g: Any, u: Any, b: Any, w: Any, r: Any) -> Any:
            rows = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            gate = rows @ g.transpose(0, 1)
            gated = gate * torch.sigmoid(gate) * (rows @ u.transpose(0, 1)) + b
            return torch.cat([gated, rows @ w.transpose(0, 1) + r], -1)

        def after(x: Any, g: Any, u: Any, b: Any, w: Any, r: Any) -> Any:
            return torch.cat(meaning(x, [g, u, w], [b, r], normed.text()), -1)

        def apart(x: Any, g: Any, u: Any, b: Any, r: Any) -> Any:
            biased = x @ g.transpose(0, 1) + b
            return biased * (x @ u.transpose(0, 1)) - r * 3

        def as_one(x: Any, g: Any, u: Any, b: Any, r: Any) -> Any:
            values = {"p0": x @ g.transpose(0, 1), "p1": x @ u.transpose(0, 1), "v0": b, "t1": r}
            return evaluate(plain.trees[0], values)

        shapes = {"x": ("n", "d"), "g": ("k", "d"), "u": ("k", "d"), "b": ("k",)}
        more = {"w": ("h", "d"), "r": ("n", "h")}
        return [
            Example(before, after, {**shapes, **more}, ("g", "u", "w", "b")),
            Example(apart, as_one, {**shapes, "r": ("n", "k")}, ("g", "u", "b"), symbolic=True),
        ]


def _operands_refusal(node: fx.Node, words: Mapping[str, str]) -> Refusal | None:
    x = node.all_input_nodes[0].meta["val"]
    for value in (node, *node.all_input_nodes):
        fake = value.meta["val"]
        alike = fake.dtype is x.dtype and fake.device == x.device
        if not alike or x.dtype not in _DTYPES.get(x.device.type, ()):
            return Refusal.at(value, "dtype", words["dtype"])
    if not all(is_contiguous(weight.meta["val"]) for weight in node.all_input_nodes[1:]):
        return Refusal.at(node, "layout", words["layout"])
    return None


def _place_refusal(region: Region, context: Context, words: Mapping[str, str]) -> Refusal | None:
    """Everything moves in front of the first product: nothing on the way may change what it reads."""
    alias: Aliases = context.analyses.get(aliases)
    mode = context.analyses.get(modes)
    first = min(region.linears)
    for value in (region.x, *region.operands):
        if alias.written(value):
            return Refusal.at(value, "written", f"{value.name} is written in place")
    for node in region.inside:
        if mode[node] != mode[first]:
            return Refusal.at(node, "region", words["region"])
    return None


# ---- growing a region ------------------------------------------------------------------------------

_UNARY: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",  # that of erf: the other one has a keyword
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
_BINARY: dict[Any, str] = {
    aten.add.Tensor: "+",
    aten.sub.Tensor: "-",
    aten.mul.Tensor: "*",
    aten.div.Tensor: "/",
    aten.add.Scalar: "+",
    aten.mul.Scalar: "*",
}


def _grow(linears: Sequence[fx.Node], weights: WeightValues) -> Region:
    x: Any = linears[0].args[0]
    region = Region(x, list(linears), inside=list(linears))
    _take_norm(region, x)
    for i, node in enumerate(linears):
        _, weight, *bias = node.args
        region.weights.append(weight)  # type: ignore[arg-type]
        text = f"p{i}"
        if bias and bias[0] is not None:
            text = f"{text} + {_operand(region, 'v', bias[0])}"
        region.outputs.append(_Value(text, node))
    while any(_step(region, value, weights) for value in list(region.outputs)):
        pass
    return region


def _take_norm(region: Region, x: fx.Node) -> None:
    """The norm that makes x, where the products alone read it and it has no scale and shift of its own."""
    norm = as_norm(x)
    if norm is None or norm.weight or norm.bias or set(x.users) != set(region.linears):
        return
    if norm.x.meta["val"].dtype is not x.meta["val"].dtype:
        return
    if isinstance(norm.eps, float) or norm.eps is None:
        region.x, region.norm, region.eps = norm.x, norm.kind.removesuffix("_norm"), norm.eps
        region.inside.append(x)


def _operand(region: Region, kind: str, node: Any) -> str:
    if node not in region.operands:
        region.operands.append(node)
    return f"{kind}{region.operands.index(node)}"


def _step(region: Region, value: _Value, weights: WeightValues) -> bool:
    """Take the one reader of ``value`` into the region, if it can go along."""
    if value not in region.outputs or len(value.node.users) != 1:
        return False
    (user,) = value.node.users
    fake = user.meta.get("val")
    if user.op != "call_function" or user.kwargs or not isinstance(fake, torch.Tensor):
        return False
    mine = value.node.meta["val"]
    if fake.dtype is not mine.dtype or not same_shape(fake.shape, mine.shape):
        return False
    if user.target in _UNARY:
        text = f"{_UNARY[user.target]}({value.text})"
    elif user.target in _BINARY and len(user.args) == 2:
        joined = _joined(region, value, user, weights)
        if joined is None:
            return False
        text = joined
    else:
        return False
    region.inside.append(user)
    region.outputs = [v for v in region.outputs if v.node not in user.all_input_nodes or v is value]
    value.text, value.node = text, user
    return True


def _joined(region: Region, value: _Value, user: fx.Node, weights: WeightValues) -> str | None:
    """The text of a binary operation, or None where its other side is not to be had."""
    sides = []
    for side in user.args:
        if side is value.node:
            sides.append(f"({value.text})")
            continue
        other = next((v for v in region.outputs if v.node is side), None)
        if other is not None:
            if len(other.node.users) != 1:
                return None
            sides.append(f"({other.text})")
        elif is_number(side) and math.isfinite(side):  # others have no text
            sides.append(repr(side))
        elif isinstance(side, fx.Node):
            kind = _kind(region, value, side, weights)
            if kind is None:
                return None
            sides.append(_operand(region, kind, side))
        else:
            return None
    return f"{sides[0]} {_BINARY[user.target]} {sides[1]}"


def _kind(region: Region, value: _Value, side: fx.Node, weights: WeightValues) -> str | None:
    """Whether ``side`` is a vector over features ("v"), a tensor of the output's shape ("t"), or neither."""
    fake, mine = side.meta.get("val"), value.node.meta["val"]
    if not isinstance(fake, torch.Tensor) or fake.dtype is not mine.dtype:
        return None
    if side in weights:
        return "v" if fake.dim() == 1 and same_shape(fake.shape, mine.shape[-1:]) else None
    early = side < min(region.linears) and fake.device == mine.device
    return "t" if early and same_shape(fake.shape, mine.shape) else None
