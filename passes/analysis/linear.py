"""Linear maps with weights, in every spelling: linear, addmm, mm, matmul, convolutions, transposed ones.

``y = x Wᵀ + b`` becomes one view with the axes named, so that a fold is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.sizes import same_size
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses, numel
from sparsecc.program import ORIGIN, Program, WeightBuilder

aten = torch.ops.aten

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_CONVS_PADDED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)


@dataclass(frozen=True)
class Linear:
    """One linear map whose weight (and bias) are weight values.

    ``out_axis`` and ``in_axis`` are axes of ``weight``; ``feature_axis`` is the axis of the result that
    holds the output features (-1, or 1 for convolutions). ``bias`` is [out] or None. The weight of a transposed
    convolution is [in, out/groups, ...]: where it is grouped, no axis of it holds the output features.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    out_axis: int
    in_axis: int
    feature_axis: int = -1
    groups: int = 1

    @property
    def is_transposed(self) -> bool:
        return self.node.target in _TRANSPOSED

    @property
    def is_conv(self) -> bool:
        return self.feature_axis == 1

    @property
    def is_grouped(self) -> bool:
        """Whether each output feature reads only some inputs: rows scale, but do not mix."""
        return self.groups != 1

    @property
    def features(self) -> int:
        """How many output features it has."""
        return int(self.node.meta["val"].shape[self.feature_axis])

    @property
    def flops(self) -> int:
        """Multiplications and additions of one call, from shapes."""
        # Each element of the result (of the input, where transposed) meets one slice of the weight.
        slices = self.weight.meta["val"].shape[0 if self.is_conv else self.out_axis]
        met = numel(self.x if self.is_transposed else self.node)
        return 2 * met * (numel(self.weight) // max(1, int(slices)))

    def scale_and_shift(
        self, program: Program, scale: fx.Node, shift: fx.Node | None, origin: str
    ) -> None:
        """Make it ``scale ⊙ y + shift``, both [out] and no narrower than fp32; a bias is made for the shift."""
        build = program.weight(origin, self.node)
        dtype = self.weight.meta["val"].dtype
        wide = build.wide(self.weight)
        weight = build.as_dtype(self.times(build, wide, scale, self.out_axis), dtype)
        bias = shift
        if self.bias is not None:
            dtype = self.bias.meta["val"].dtype
            bias = build.mul(build.wide(self.bias), scale)
            bias = bias if shift is None else build.add(bias, shift)
        if bias is not None:
            bias = build.as_dtype(bias, dtype)
        self.set_weights(program, origin, weight=weight, bias=bias)

    def absorb(
        self, program: Program, scale: fx.Node | float | None, shift: fx.Node | None, origin: str
    ) -> None:
        """Make it read ``scale ⊙ x + shift`` where it reads x (None: no such part; vectors [in]).

        Not for transposed convolutions; with a shift, not for padded ones.
        """
        build = program.weight(origin, self.node)
        dtype = self.weight.meta["val"].dtype
        wide = build.wide(self.weight)
        weight: fx.Node | None = None
        if isinstance(scale, fx.Node):
            weight = build.as_dtype(self.times(build, wide, scale, self.in_axis), dtype)
        elif scale is not None:
            weight = build.as_dtype(build.mul(wide, scale), dtype)
        bias: fx.Node | None = None
        if shift is not None:  # W h as a sum, where autocast cannot narrow it
            axes = [axis for axis in range(wide.meta["val"].dim()) if axis != self.out_axis]
            bias = build.call(
                aten.sum.dim_IntList, self.times(build, wide, shift, self.in_axis), axes
            )
            if self.bias is not None:
                bias = build.add(bias, build.wide(self.bias))
                dtype = self.bias.meta["val"].dtype
            bias = build.as_dtype(bias, dtype)
        self.set_weights(program, origin, weight=weight, bias=bias)

    def times(self, build: WeightBuilder, weight: fx.Node, vector: fx.Node, axis: int) -> fx.Node:
        """``weight`` with each feature of ``axis`` (the out or the in axis) times its element of ``vector``.

        The weight's strides stay: they say where a convolution puts the channels of its result.
        """
        lead, *_ = shape = list(weight.meta["val"].shape)
        ones = [1] * (len(shape) - axis - 1)
        sizes = [*[1] * axis, -1, *ones]
        if self.is_grouped and axis == 1:
            # The axis holds the features of one group; which group it is, axis 0 says.
            groups, features = self.groups, shape[1]
            vector = build.call(aten.reshape.default, vector, [groups, 1, features])
            vector = build.call(aten.expand.default, vector, [groups, lead // groups, features])
            sizes = [lead, features, *ones]
        return build.mul(weight, build.call(aten.reshape.default, vector, sizes))

    def set_input(self, program: Program, x: fx.Node) -> None:
        """Read another activation."""
        self.node.update_arg(1 if self.node.target is aten.addmm.default else 0, x)
        program.version += 1

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
        target: Any = self.node.target
        # Not self.x: another match may have replaced it since.
        x: Any = self.node.args[1 if target is aten.addmm.default else 0]
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
        groups: Any = args[6] if len(args) > 6 else 1
        return _make(node, weights, x, weight, bias, 0, 1, rank=None, feature_axis=1, groups=groups)
    if target in _TRANSPOSED:
        x, weight, bias = (*args, None)[:3]
        groups = args[6] if len(args) > 6 else 1
        return _make(node, weights, x, weight, bias, 1, 0, rank=None, feature_axis=1, groups=groups)
    return None


def current(linear: Linear) -> Linear:
    """``linear`` with the weights that its node reads now: an earlier match may have changed them."""
    x = linear.node.args[1 if linear.node.target is aten.addmm.default else 0]
    others = [a for a in linear.node.all_input_nodes if a is not x]
    found = as_linear(linear.node, WeightValues(dict.fromkeys(others, frozenset())))
    assert found is not None
    return found


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
    groups: int = 1,
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
    features = node.meta["val"].shape[feature_axis]
    if bias is not None and not same_size(bias.meta["val"].shape[0], features):
        return None
    return Linear(node, x, weight, bias, out_axis, in_axis, feature_axis, groups)


def linears(program: Program, analyses: Analyses) -> dict[fx.Node, Linear]:
    """Every linear map of the program that weights may be folded into, by node: not those that are given."""
    every = analyses.get(every_linear)
    if not program.given:
        return every
    return {
        node: linear for node, linear in every.items() if not is_given(linear, program, analyses)
    }


def is_given(linear: Linear, program: Program, analyses: Analyses) -> bool:
    """Whether a recipe gives the codes of the weight (or of a parameter that it is computed from)."""
    read = analyses.get(weight_values).sources[linear.weight]
    return any(program.slots[p.name].fqn in program.given for p in read)


def every_linear(program: Program, analyses: Analyses) -> dict[fx.Node, Linear]:
    """Every linear map of the program, by node: for what leaves weights as they are."""
    weights = analyses.get(weight_values)
    found = ((node, as_linear(node, weights)) for node in program.graph.nodes)
    return {node: linear for node, linear in found if linear is not None}
