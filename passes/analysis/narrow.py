"""A stream with one feature less: the sizes that its operators spell out, and what their results become.

Views carry hard-coded sizes. Each operator of the stream is tried on fake values of the new width before
anything is edited; one that fails, that would leave a guard, or that gives another shape cannot be rewritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.centred import Stream
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.analysis.stream import Axis
from sparsecc.program import Program, target_name

aten = torch.ops.aten

# Operators that spell out the sizes of their result, with the position of that argument.
_SIZED: dict[Any, int] = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.broadcast_to.default: 1,
    aten.new_zeros.default: 1,
    aten.zeros.default: 0,
}
# A narrower value may have strides that a view does not take; nothing writes the stream, so a copy will do.
_VIEWS = (aten.view.default, aten._unsafe_view.default)

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def narrowed_call(node: fx.Node, axis: Axis, width: int) -> Call:
    """(target, args, kwargs) of ``node`` with ``width`` features on ``axis`` of its result."""
    target: Any = node.target
    args = list(node.args)
    if target in _SIZED:
        args[_SIZED[target]] = _resized(args[_SIZED[target]], axis, width)
    elif target is aten.unflatten.int:
        source: Any = node.args[0]
        first = int(node.args[1]) % source.meta["val"].dim()  # type: ignore[arg-type]
        args[2] = _resized(args[2], axis - first, width)
    return (aten.reshape.default if target in _VIEWS else target), tuple(args), dict(node.kwargs)


def _resized(sizes: Any, axis: Axis, width: int) -> list[Any]:
    inferred = 0 <= axis < len(sizes) and isinstance(sizes[axis], int) and sizes[axis] < 0
    if inferred or not 0 <= axis < len(sizes):
        return list(sizes)
    return [*sizes[:axis], width, *sizes[axis + 1 :]]


def narrowed_values(
    program: Program, stream: Stream
) -> tuple[dict[fx.Node, Any], tuple[str, fx.Node] | None]:
    """Fake values of the stream's nodes with one feature less; or words and the node that has none."""
    trial = _Trial(program, stream)
    for node in stream.values:
        words = trial.add(node)
        if words:
            return {}, (words, node)
    return trial.values, None


class _Trial:
    def __init__(self, program: Program, stream: Stream) -> None:
        self.program, self.stream = program, stream
        self.width = stream.size - 1
        self.values: dict[fx.Node, Any] = {}

    def add(self, node: fx.Node) -> str:
        """Find the value of ``node``; words when there is none."""
        try:
            found = self._value(node)
        except Exception as error:  # whatever the operator says to sizes that it does not take
            return (
                f"{target_name(node)} does not take {self.width} features: {type(error).__name__}"
            )
        if found is None:
            return f"{target_name(node)} would hold for some sizes only"
        old = node.meta["val"]
        if found.dtype != old.dtype:  # autocast is off on fake values
            found = self._run(aten.to.dtype, (found, old.dtype), {})
        shape = list(old.shape)
        shape[self.stream.values[node]] = self.width
        if not same_shape(found.shape, shape):
            return f"{target_name(node)} gives another shape with {self.width} features"
        self.values[node] = found
        return ""

    def _value(self, node: fx.Node) -> Any:
        axis = self.stream.values[node]
        if node in self.stream.norms:  # by the operators that will stand for it: none may guard
            x: Any = node.args[0]
            total = self._run(aten.sum.dim_IntList, (x, [-1], True), {})
            return None if total is None else self._run(aten.mul.Tensor, (x, total), {})
        if node in self.stream.cut:
            return self.program.fake_for_all_sizes(self._cut, (node.meta["val"], axis), {})
        if node in self.stream.linears or node in self.stream.tables:
            old = node.meta["val"]
            shape = [*old.shape[:axis], self.width, *old.shape[axis + 1 :]]
            return self.program.fake_for_all_sizes(torch.Tensor.new_empty, (old, shape), {})
        parent = node.args[0] if node.args else None
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(parent, fx.Node):
            if parent not in self.values:
                parts = self._run(parent.target, parent.args, dict(parent.kwargs))
                if parts is None:
                    return None
                self.values[parent] = parts
            return self.values[parent][node.args[1]]
        return self._run(*narrowed_call(node, axis, self.width))

    def _cut(self, value: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Any feature left out: strides and guards are those of every other."""
        parts = [value.narrow(axis, 0, 1), value.narrow(axis, 1, self.width - 1)]
        return torch.cat(parts if self.width > 1 else parts[:1], axis)

    def _run(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = fx.node.map_arg((args, kwargs), lambda n: self.values.get(n, n))
        return self.program.fake_for_all_sizes(target, *given)
