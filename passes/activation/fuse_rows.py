"""What works on rows by themselves, with statistics of its own, as one operator.

Law.   Pointwise work and sums, means, maxima and variances over the last axis, as one program over a row:
       var x = mean((x − mean x)²), x³ = x·x·x, norm(x) by its definition; equal expressions once.
Source algebra; the regions are those of published activations and norms: statistical top-k (Spark), PolyNorm
       (PolyCom), CRMSNorm, EvoNorm-S0, norms that are quantized on their way out.
Legal  in inference, where all values are of one floating dtype, in rows of one shape whose length is known
       (their number need not be), and nothing that is read or made is written in place. A region ends where
       something else must run between.
Not    one plain norm or softmax with what surrounds it, which Inductor compiles as well.
Exact  in real arithmetic: sums are taken in another order, powers are products, and in half precision a kernel
       rounds once, at the end.
Pays   each row is read from memory once, and its statistics are taken in the cache. Whether the generated
       kernel or Inductor's code for the same region runs is measured.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.activation import _regions
from sparsecc.passes.activation._operations import Terms, softmax
from sparsecc.passes.activation._regions import Region
from sparsecc.passes.analysis.alias import Aliases, aliases
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import is_contiguous, same_shape
from sparsecc.passes.analysis.weights import weight_values
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
from sparsecc.runtime.ops import catalogue
from sparsecc.runtime.ops.expressions import evaluate
from sparsecc.runtime.ops.rows import (
    REDUCTIONS,
    Output,
    Spec,
    meaning,
    rows,
    rows_native,
)

aten = torch.ops.aten

LEAST = 4  # operators: fewer are no region
MOST = 256  # operators: more would take a compiler too long
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_DEVICES = frozenset({"cpu", "cuda"})


@dataclass(frozen=True)
class FuseRows(RegionPass):
    """Fuse statistics over the last axis with the pointwise work around them."""

    name: ClassVar[str] = "fuse-rows"
    family: ClassVar[str] = "activation"
    law: ClassVar[str] = "f(x, mean x, var x, max x, …) of each row as one operator"
    source: ClassVar[str] = "algebra"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = (
        "several statistics of one row: memory is read once, the cache for the rest"
    )
    refusals: ClassVar[Mapping[str, str]] = {
        "training": "gradients flow, and the kernels have no backward",
        "dtype": "the rows are not float32, bfloat16 or float16 on a CPU or GPU",
        "size": "the length of the rows is not known",
        "large": f"more than {MOST} operators, which would take long to compile",
        "plain": "one norm or softmax, which Inductor compiles as well",
        "layout": "what is read outside is not contiguous",
        "written": "something that the operator reads or makes is written in place",
        "region": "an autocast or grad-mode region begins or ends inside",
        "small": RegionPass.SMALL,
        "device": RegionPass.DEVICE,
    }

    def find(self, context: Context) -> list[Match]:
        results: dict[fx.Node, fx.Node] = {}  # what one region's result was -> what it is now
        found = []
        for region in _regions.find(context.program, context.analyses.get(weight_values)):
            first = next((v.node for v in region.values if v.operation.statistics), None)
            if first is not None and len(region.inside) >= LEAST:
                found.append(Match(first, {"region": region, "results": results}))
        return found

    def check(self, match: Match, context: Context) -> Refusal | None:
        region: Region = match.nodes["region"]
        words = self.refusals
        if context.trains:
            return Refusal.at(match.node, "training", words["training"])
        x = match.node.meta["val"]
        if x.dtype not in _DTYPES or x.device.type not in _DEVICES:
            return Refusal.at(match.node, "dtype", f"{words['dtype']}: {x.dtype}, {x.device.type}")
        if not isinstance(region.rows[-1], int):
            return Refusal.at(match.node, "size", words["size"])
        if len(region.inside) > MOST:
            return Refusal.at(match.node, "large", f"{words['large']}: {len(region.inside)}")
        if region.statistics < 2 or region.spec == _softmax():
            return Refusal.at(match.node, "plain", words["plain"])
        match.note = "; ".join([*region.spec.statements, *(o.text for o in region.spec.outputs)])
        return _place_refusal(region, context, words) or self.unworthy(
            match.node, region.operands["t"]
        )

    def rewrite(self, match: Match, context: Context) -> None:
        program = context.program
        region: Region = match.nodes["region"]
        results: dict[fx.Node, fx.Node] = match.nodes["results"]
        anchor = region.anchor
        operands = {
            kind: [results.get(node, node) for node in nodes]
            for kind, nodes in region.operands.items()
        }
        for kind in "vs":
            operands[kind] = [self._trim(node, anchor, context) for node in operands[kind]]
        args = (operands["t"], operands["v"], operands["s"], region.spec.text())
        values = program.fake(rows_native, args, {})  # their shapes alone
        fused = program.call(
            rows, args, like=match.node, origin=self.name, before=anchor, val=values
        )
        for node, index in region.results.items():
            new = program.call(
                operator.getitem,
                (fused, index),
                like=node,
                origin=self.name,
                before=anchor,
                val=values[index],
            )
            if not same_shape(values[index].shape, node.meta["val"].shape):  # a number without axis
                squeeze = (new, -1)
                new = program.call(
                    aten.squeeze.dim, squeeze, like=node, origin=self.name, before=anchor
                )
            # Those before the anchor are inside, and dead by now.
            node.replace_all_uses_with(new, lambda user: not user < anchor)
            results[node] = new
        program.version += 1

    def _trim(self, node: fx.Node, anchor: fx.Node, context: Context) -> fx.Node:
        """A vector or scalar without leading axes of one."""
        value = node.meta["val"]
        shape = _regions.trimmed(value)
        if len(shape) == value.dim():
            return node
        for _ in range(value.dim() - len(shape)):
            args = (node, 0)
            node = context.program.call(
                aten.squeeze.dim, args, like=node, origin=self.name, before=anchor
            )
        if not value.dim():
            args = (node, 0)
            node = context.program.call(
                aten.unsqueeze.default, args, like=node, origin=self.name, before=anchor
            )
        return node

    def saving(self, match: Match, context: Context) -> Saving:
        region: Region = match.nodes["region"]
        gone = [node for node in region.inside if node not in region.results]
        return Saving(2 * sum(map(nbytes, gone)), launches=len(region.inside) - 1)

    @classmethod
    def examples(cls) -> list[Example]:
        def apart(x: Any, v: Any) -> Any:
            mean = x.mean(-1, keepdim=True)
            spread = ((x - mean) ** 2).mean(-1, keepdim=True)
            return (x**3 * v - mean) / (spread + x.sum(-1, keepdim=True) ** 2 + 1)

        cubes = Spec(
            ("m = mean(t0)", "c = t0 - m", "u = sum(t0)"),
            (Output("(t0 * t0 * t0 * v0 - m) / (mean(c * c) + u * u + 1)"),),
        )

        def as_one(x: Any, v: Any) -> Any:
            values: dict[str, Any] = {"t0": x, "v0": v}
            for step in cubes.steps:
                value = evaluate(step.tree, values)
                values[step.name] = value if step.op == "let" else REDUCTIONS[step.op](value)
            return evaluate(cubes.results[0].tree, values)

        def top_k(x: Any) -> Any:
            cut = (
                x.mean(-1, keepdim=True)
                + x.std(-1, keepdim=True, correction=0) * 0.6744897501960817
            )
            return torch.relu(x - cut)

        def top_k_as_one(x: Any) -> Any:
            return meaning([x], [], [], catalogue.statistical_top_k(0.25).text())[0]

        def quantized(x: Any, r: Any, w: Any) -> Any:
            h = x + r
            y = torch.rms_norm(h, (x.shape[-1],), w, 1e-5)
            scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
            return scale, h

        def quantized_as_one(x: Any, r: Any, w: Any) -> Any:
            spec = catalogue.quantized_norm("rms", 1e-5, residual=True)
            return tuple(meaning([x, r], [w], [], spec.text())[1:])

        rows_of: dict[str, tuple[str, ...]] = {"x": ("n", "d")}
        return [
            Example(apart, as_one, {**rows_of, "v": ("d",)}, ("v",), symbolic=True),
            Example(top_k, top_k_as_one, rows_of),
            Example(quantized, quantized_as_one, {**rows_of, "r": ("n", "d"), "w": ("d",)}, ("w",)),
        ]


def _softmax() -> Spec:
    terms = Terms()
    term = softmax(terms, terms.make("t0"))
    statements, texts = terms.written([term])
    return Spec(statements, (Output(texts[term]),))


def _place_refusal(region: Region, context: Context, words: Mapping[str, str]) -> Refusal | None:
    """Everything moves to one place: nothing on the way may change what is read, or was made."""
    alias: Aliases = context.analyses.get(aliases)
    mode = context.analyses.get(modes)
    anchor = region.anchor
    for node in (*region.reads, *region.inside):
        if alias.written(node):
            return Refusal.at(node, "written", f"{node.name} is written in place")
    for node in region.inside:
        if mode[node] != mode[anchor]:
            return Refusal.at(node, "region", words["region"])
    for node in region.results:
        if not is_contiguous(node.meta["val"]):
            return Refusal.at(node, "layout", f"{node.name} is read outside and is not contiguous")
    return None
