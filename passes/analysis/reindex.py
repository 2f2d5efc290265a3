"""The same reindexing of tokens for another number of features.

A rewrite that changes how many features a value has must change the sizes that views spell out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.stream import Axis, Carried, carry

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_EXPANDS = (aten.expand.default, aten.broadcast_to.default)
# Their arguments name axes, never the number of features.
_SIZELESS = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.flatten.using_ints,
        aten.flip.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.mean.dim,
        aten.narrow.default,
        aten.permute.default,
        aten.roll.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
    }
)


def resized(node: fx.Node, axis: Axis, size: int) -> tuple[Any, tuple[Any, ...]] | None:
    """Operator and arguments of ``node`` where its first operand, and ``axis`` of its result, have ``size``
    features; None where that is not known. A view becomes a reshape, which takes any strides.
    """
    if node.target in _SIZELESS:
        return None if _squeezes(node, axis) else (node.target, node.args)
    if node.target not in (*_VIEWS, *_EXPANDS) or not isinstance(node.args[1], (list, tuple)):
        return None
    sizes = list(node.args[1])
    if not isinstance(sizes[axis], int):
        return None  # a size that the program computes
    if sizes[axis] != -1:
        sizes[axis] = size
    return (aten.reshape.default if node.target in _VIEWS else node.target), (node.args[0], sizes)


def _squeezes(node: fx.Node, axis: Axis) -> bool:
    """Whether ``node`` would drop the features if there were but one."""
    if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
        return False
    carried = carry(node, axis)
    dims: Any = node.args[1]
    source: Any = node.args[0]
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    rank = source.meta["val"].dim()
    return carried is None or carried.operands[0][1] in {d % rank for d in listed}


def resizable_path(value: fx.Node, axis: Axis, ends: Any) -> Carried | None:
    """From ``value`` back to the first node in ``ends``, each node with its feature axis.

    None where something on the way does more than reindex, or cannot be :func:`resized`.
    """
    path: Carried = [(value, axis)]
    while path[-1][0] not in ends:
        node, at = path[-1]
        carried = carry(node, at)
        if carried is None or not carried.reindexes or len(carried.operands) != 1:
            return None
        if resized(node, at, 2) is None:
            return None
        path.append(carried.operands[0])
    return path
