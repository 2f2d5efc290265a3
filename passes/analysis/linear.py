"""Linear maps with weights, in every spelling: linear, addmm, mm, matmul, convolutions.

``y = x Wᵀ + b`` becomes one view with the axes named, so that a fold is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.sizes import same_size
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses
from sparsecc.program import ORIGIN, Program

aten = torch.ops.aten

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_CONVS_PADDED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)


@dataclass(frozen=True)
class Linear:
    """One linear map whose weight (and bias) are weight values.

    ``out_axis`` and ``in_axis`` are axes of ``weight``; ``feature_axis`` is the axis of the result that
    holds the output features (-1, or 1 for convolutions). ``bias`` is [out] or None.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    out_axis: int
    in_axis: int
    feature_axis: int = -1

    @property
    def is_conv(self) -> bool:
        return self.feature_axis == 1

    @property
    def is_grouped(self) -> bool:
        """Whether each output feature reads only some inputs: rows scale, but do not mix."""
        return self.is_conv and not same_size(
            self.weight.meta["val"].shape[1], self.x.meta["val"].shape[1]
        )

    def along(self, program: Program, vector: fx.Node, axis: int, origin: str) -> fx.Node:
        """A vector [n] reshaped to broadcast along ``axis`` of the weight."""
        rank = self.weight.meta["val"].dim()
        shape = [1] * rank
        shape[axis] = -1
        return program.weight(origin, self.node).call(aten.reshape.default, vector, shape)

    def set_weights(
        self,
        program: Program,
        origin: str,
        *,
        weight: fx.Node | None = None,
        bias: fx.Node | None = None,
    ) -> None:
        """Read other weights (those not given stay). The node itself stays: matches may hold on to it."""
        weight, bias = weight or self.weight, bias if bias is not None else self.bias
        for value in (weight, bias):
            if value is not None:
                program.bring_before(value, self.node)
        self.node.target, self.node.args = self._spelled(program, origin, weight, bias)
        self.node.meta[ORIGIN] = origin
        program.version += 1

    def _spelled(
        self, program: Program, origin: str, weight: fx.Node, bias: fx.Node | None
    ) -> tuple[Any, Any]:
        target, x = self.node.target, self.x
        if self.is_conv:
            return target, (x, weight, bias, *self.node.args[3:])
        if target is aten.linear.default:
            return target, (x, weight, bias) if bias is not None else (x, weight)
        if bias is None:
            return target, (x, weight)
        if x.meta["val"].dim() == 2:
            return aten.addmm.default, (bias, x, weight)
        # A matmul of higher rank that gains a bias: linear takes [out, in].
        flipped = program.weight(origin, self.node).call(aten.t.default, weight)
        return aten.linear.default, (x, flipped, bias)


def as_linear(node: fx.Node, weights: WeightValues) -> Linear | None:
    """View ``node`` as a linear map of one activation, or None."""
    if node.op != "call_function" or any(v != 1 for v in node.kwargs.values()):
        return None  # alpha and beta other than 1 scale the two terms apart
    target, args = node.target, list(node.args)
    if target is aten.linear.default:
        x, weight, bias = (*args, None)[:3]
        return _make(node, weights, x, weight, bias, 0, 1, rank=2)
    if target is aten.addmm.default:
        bias, x, weight = args
        return _make(node, weights, x, weight, bias, 1, 0, rank=2)
    if target in (aten.mm.default, aten.matmul.default):
        x, weight = args
        return _make(node, weights, x, weight, None, 1, 0, rank=2)
    if target in _CONVS or target in _CONVS_PADDED:
        x, weight, bias = (*args, None)[:3]
        return _make(node, weights, x, weight, bias, 0, 1, rank=None, feature_axis=1)
    return None


def _make(
    node: fx.Node,
    weights: WeightValues,
    x: Any,
    weight: Any,
    bias: Any,
    out_axis: int,
    in_axis: int,
    *,
    rank: int | None,
    feature_axis: int = -1,
) -> Linear | None:
    if not isinstance(x, fx.Node) or x in weights or weight not in weights:
        return None
    shape = weight.meta["val"].shape
    if rank is not None and len(shape) != rank:
        return None
    if feature_axis == 1 and x.meta["val"].dim() != len(shape):
        return None  # an unbatched convolution has its channels elsewhere
    if bias is not None and not (bias in weights and bias.meta["val"].dim() == 1):
        return None
    if bias is not None and not same_size(bias.meta["val"].shape[0], shape[out_axis]):
        return None
    return Linear(node, x, weight, bias, out_axis, in_axis, feature_axis)


def linears(program: Program, analyses: Analyses) -> dict[fx.Node, Linear]:
    """Every linear map of the program, by node."""
    weights = analyses.get(weight_values)
    found = ((node, as_linear(node, weights)) for node in program.graph.nodes)
    return {node: linear for node, linear in found if linear is not None}
