"""Where the taps of a convolution or an average pooling stand, and whether one has all taps of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.linear import Linear

aten = torch.ops.aten

# The operators that take padding as numbers, by the number of spatial axes.
EXPLICIT: dict[int, Any] = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}

_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


@dataclass(frozen=True)
class Taps:
    """Per spatial axis: tap ``i`` of output ``n`` reads position ``n·stride + i·dilation − padding``."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def is_padded(self) -> bool:
        return any(self.padding)

    @property
    def is_pointwise(self) -> bool:
        """Whether each position of the result reads one position of the input."""
        return all(size == 1 for size in self.kernel)

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation, as the operators of ``EXPLICIT`` take them."""
        return list(self.stride), list(self.padding), list(self.dilation)

    def inside(self, host: Taps) -> tuple[int, ...] | None:
        """Which tap of ``host`` the first tap of each axis is, if all taps are among those of ``host``."""
        if self.stride != host.stride:
            return None
        first = []
        for axis, kernel in enumerate(self.kernel):
            distance = host.padding[axis] - self.padding[axis]
            at, rest = divmod(distance, host.dilation[axis])
            aligned = kernel == 1 or self.dilation[axis] == host.dilation[axis]
            if rest or not aligned or not 0 <= at <= host.kernel[axis] - kernel:
                return None
            first.append(at)
        return tuple(first)


def one_tap(rank: int) -> Taps:
    """The identity: output n reads position n."""
    one, zero = (1,) * rank, (0,) * rank
    return Taps(one, one, zero, one)


def taps(linear: Linear) -> Taps | None:
    """The taps of a convolution; None for a transposed one, and for padding that is not symmetric."""
    if not linear.is_conv or linear.is_transposed:
        return None
    kernel = tuple(linear.weight.meta["val"].shape[2:])
    if not all(isinstance(k, int) for k in kernel):
        return None
    given: Any = linear.node.args
    stride, padding, dilation = (
        given[i] if len(given) > i else default for i, default in ((3, 1), (4, 0), (5, 1))
    )
    step, spread = _per_axis(stride, kernel), _per_axis(dilation, kernel)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = [t // 2 for t in total]
    return Taps(kernel, step, _per_axis(padding, kernel), spread)


def average(node: fx.Node) -> Taps | None:
    """The taps of an average pooling of [N, C, ...] whose weights are all one over their number; else None."""
    if node.target not in _POOLS:
        return None
    args: Any = node.args
    rank = node.meta["val"].dim() - 2
    kernel = _per_axis(args[1], (0,) * rank)
    stride = _per_axis(args[2], kernel) if len(args) > 2 and args[2] else kernel
    padding = _per_axis(args[3] if len(args) > 3 else 0, kernel)
    ceil, counted, divisor = (
        args[i] if len(args) > i else d for i, d in ((4, False), (5, True), (6, None))
    )
    if args[0].meta["val"].dim() != rank + 2 or ceil or divisor is not None:
        return None
    return Taps(kernel, stride, padding, (1,) * rank) if counted or not any(padding) else None


def _per_axis(value: Any, like: tuple[int, ...]) -> tuple[int, ...]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(values * len(like) if len(values) == 1 else values)


def memory_format(weight: torch.Tensor) -> torch.memory_format | None:
    """Channels first or channels last; None for other strides.

    A convolution puts the channels of its result last where its input or its weight has them there.
    """
    first = [1]
    for size in reversed(weight.shape[1:]):
        first.append(first[-1] * size)
    if list(weight.stride()) == first[::-1]:
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    return last if last is not None and weight.is_contiguous(memory_format=last) else None
