"""How a value's feature axis travels through operators that act on each feature alike.

An operator *carries* the features of an operand when, for every matrix M over the feature axis, it commutes
with M: adding two streams, scaling by one number a token, reindexing tokens. Such operators carry a removed
mean (M = I − 11ᵀ/d) unchanged. Those that also keep a constant vector (no zero padding, no sums with weights
that do not add to one) *reindex*: they carry a per-feature scale and shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from sparsecc.passes.analysis.sizes import same_shape, same_size
from sparsecc.program import reads_shape_only

aten = torch.ops.aten

Axis = int
Carried = list[tuple[fx.Node, Axis]]


@dataclass(frozen=True)
class Carry:
    """The operands whose features a node carries, each with its feature axis; and whether it only reindexes."""

    operands: tuple[tuple[fx.Node, Axis], ...]
    reindexes: bool = False


def carry(node: fx.Node, axis: Axis) -> Carry | None:
    """How ``node``'s features on ``axis`` (not negative) come from its operands; None: it does not carry.

    A node without operands in the result carries nothing but is fixed by every M (zeros).
    """
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        return _getitem(node, axis)
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node, axis)


def feature_axis_of_user(user: fx.Node, operand: fx.Node, axis: Axis) -> tuple[Axis, Carry] | None:
    """The axis on which ``user`` carries the features that ``operand`` has on ``axis``, or None."""
    value = user.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    for candidate in range(value.dim()):
        found = carry(user, candidate)
        if found is not None and (operand, axis) in found.operands:
            return candidate, found
    return None


def readers(node: fx.Node) -> list[fx.Node]:
    """Users of ``node``, with split, chunk and unbind replaced by the parts that are used."""
    found: list[fx.Node] = []
    for user in node.users:
        parts = user.target in _SPLITS
        found.extend([part for part in user.users if part.users] if parts else (user,))
    return list(dict.fromkeys(found))


def other_readers(value: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """Who reads elements of ``value`` besides ``reader``; of a split value, which parts."""
    return [u for u in readers(value) if u is not reader and not reads_shape_only(u, value)]


def size(node: fx.Node, axis: Axis) -> Any:
    return node.meta["val"].shape[axis]


def rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def is_number(value: Any) -> TypeGuard[int | float]:
    """A plain number: not a node, and not a flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _axis_in(operand: fx.Node, result: fx.Node, axis: Axis) -> Axis | None:
    """Axis of a broadcast operand that lines up with ``axis`` of the result, if it is there in full size."""
    aligned = axis - (rank(result) - rank(operand))
    if aligned < 0 or not same_size(size(operand, aligned), size(result, axis)):
        return None
    return aligned


def _constant_along(operand: Any, result: fx.Node, axis: Axis) -> bool:
    """Whether a factor or mask is the same for every feature."""
    if not is_tensor(operand):
        return True
    aligned = axis - (rank(result) - rank(operand))
    return aligned < 0 or (
        same_size(size(operand, aligned), 1) and not same_size(size(result, axis), 1)
    )


# ---- rules: node, axis of the result -> Carry or None ---------------------------------------------


def _same_axis(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    if not is_tensor(source) or not node.meta["val"].dtype.is_floating_point:
        return None
    return Carry(((source, axis),), True)


def _scaled(node: fx.Node, axis: Axis) -> Carry | None:
    """A linear unary map that is not the identity on constants (neg)."""
    source = node.args[0]
    return Carry(((source, axis),)) if is_tensor(source) else None  # type: ignore[arg-type]


def _sum(node: fx.Node, axis: Axis) -> Carry | None:
    operands = []
    for source in node.args[:2]:
        if not is_tensor(source):
            return None  # x + 3: the constant is not a stream
        aligned = _axis_in(source, node, axis)  # type: ignore[arg-type]
        if aligned is None:
            return None
        operands.append((source, aligned))
    return Carry(tuple(operands))  # type: ignore[arg-type]


def _product(node: fx.Node, axis: Axis) -> Carry | None:
    """Stream times one factor per token or sample (DropPath, a scalar)."""
    a, b = node.args[:2]
    pairs = ((a, b),) if node.target in _DIVISIONS else ((a, b), (b, a))
    for stream, factor in pairs:
        if is_tensor(stream) and _constant_along(factor, node, axis):
            aligned = _axis_in(stream, node, axis)  # type: ignore[arg-type]
            if aligned is not None:
                return Carry(((stream, aligned),))  # type: ignore[arg-type]
    return None


def _reshape(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    before, after = list(source.meta["val"].shape), list(node.meta["val"].shape)
    # The axis survives when some axis of the same size has the same number of elements behind it.
    tail = after[axis + 1 :]
    for candidate in range(len(before)):
        if (
            same_size(before[candidate], after[axis])
            and _same_product(before[candidate + 1 :], tail)
            and _same_product(before[:candidate], after[:axis])
        ):
            return Carry(((source, candidate),), True)
    return None


def _same_product(a: list[Any], b: list[Any]) -> bool:
    left, right = ([s for s in sizes if not same_size(s, 1)] for sizes in (a, b))
    if same_shape(left, right):
        return True
    return same_size(math.prod(left), math.prod(right))


def _permute(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    dims: Any = node.args[1]
    order: list[int] = [d % rank(source) for d in dims]
    return Carry(((source, order[axis]),), True)


def _transpose(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    n = rank(source)
    if node.target is aten.t.default:
        return Carry(((source, n - 1 - axis),), True)
    a, b = (int(d) % n for d in node.args[1:3])  # type: ignore[arg-type]
    return Carry(((source, {a: b, b: a}.get(axis, axis)),), True)


def _unsqueeze(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    dim = int(node.args[1]) % rank(node)  # type: ignore[arg-type]
    if axis == dim:
        return None
    return Carry(((source, axis - (axis > dim)),), True)


def _squeeze(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    given = node.args[1] if len(node.args) > 1 else list(range(rank(source)))
    dims = {d % rank(source) for d in (given if isinstance(given, (list, tuple)) else [given])}  # type: ignore[operator]
    kept = [d for d in range(rank(source)) if not (d in dims and same_size(size(source, d), 1))]
    return Carry(((source, kept[axis]),), True)


def _expand(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    aligned = _axis_in(source, node, axis)
    return None if aligned is None else Carry(((source, aligned),), True)


def _off_axis(position: int, name: str, default: int | None = 0) -> Callable[..., Carry | None]:
    """Operators that act along one other axis: slice, narrow, index_select, flip, roll."""

    def rule(node: fx.Node, axis: Axis) -> Carry | None:
        source: Any = node.args[0]
        dims = _arg(node, position, name, default)
        listed = dims if isinstance(dims, (list, tuple)) else [dims]
        if not listed or any(not isinstance(d, int) or d % rank(source) == axis for d in listed):
            return None
        return Carry(((source, axis),), True)

    return rule


def _select(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    dim = int(_arg(node, 1, "dim")) % rank(source)
    return Carry(((source, axis + (axis >= dim)),), True)


def _index(node: fx.Node, axis: Axis) -> Carry | None:
    """``x[i, j]`` on leading axes: the last axis stays whole."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    if axis != rank(node) - 1 or len(indices) >= rank(source):
        return None
    if any(i is not None and i.meta["val"].dtype == torch.bool for i in indices):
        return None
    return Carry(((source, rank(source) - 1),), True)


def _cat(node: fx.Node, axis: Axis) -> Carry | None:
    dim = int(_arg(node, 1, "dim", 0)) % rank(node)
    parts: Any = node.args[0]
    if dim == axis or any(rank(p) != rank(node) for p in parts):
        return None
    return Carry(tuple((p, axis) for p in parts), True)


def _stack(node: fx.Node, axis: Axis) -> Carry | None:
    dim = int(_arg(node, 1, "dim", 0)) % rank(node)
    if dim == axis:
        return None
    parts: Any = node.args[0]
    return Carry(tuple((p, axis - (axis > dim)) for p in parts), True)


def _getitem(node: fx.Node, axis: Axis) -> Carry | None:
    """One part of split, chunk or unbind."""
    parent = node.args[0]
    if not isinstance(parent, fx.Node) or parent.target not in _SPLITS:
        return None
    source: Any = parent.args[0]
    position = 1 if parent.target is aten.unbind.int else 2
    dim = int(_arg(parent, position, "dim", 0)) % rank(source)
    if parent.target is aten.unbind.int:
        return Carry(((source, axis + (axis >= dim)),), True)
    return None if dim == axis else Carry(((source, axis),), True)


def _mean(node: fx.Node, axis: Axis) -> Carry | None:
    source: Any = node.args[0]
    dims = _arg(node, 1, "dim")
    if dims is None:
        return None
    reduced = {d % rank(source) for d in dims}
    if _arg(node, 2, "keepdim", False):
        return None if axis in reduced else Carry(((source, axis),), True)
    kept = [d for d in range(rank(source)) if d not in reduced]
    return Carry(((source, kept[axis]),), True)


def _token_sum(node: fx.Node, axis: Axis) -> Carry | None:
    found = _mean(node, axis)
    return None if found is None else Carry(found.operands)


def _where(node: fx.Node, axis: Axis) -> Carry | None:
    condition, a, b = node.args[:3]
    if not _constant_along(condition, node, axis):
        return None
    operands = []
    for source in (a, b):
        aligned = _axis_in(source, node, axis) if is_tensor(source) else None  # type: ignore[arg-type]
        if aligned is None:
            return None
        operands.append((source, aligned))
    return Carry(tuple(operands), True)  # type: ignore[arg-type]


def _masked_fill(node: fx.Node, axis: Axis) -> Carry | None:
    source, mask, value = node.args[:3]
    if not _constant_along(mask, node, axis) or value != 0:
        return None
    aligned = _axis_in(source, node, axis)  # type: ignore[arg-type]
    return None if aligned is None else Carry(((source, aligned),))  # type: ignore[arg-type]


def _dropout(node: fx.Node, axis: Axis) -> Carry | None:
    probability, train = node.args[1:3]
    return _same_axis(node, axis) if train is False or probability == 0 else None


def _pad(node: fx.Node, axis: Axis) -> Carry | None:
    """Padding of other axes with zeros (a shift would be lost, a removed mean is not) or with what is there."""
    source: Any = node.args[0]
    pads: Any = node.args[1]
    general = node.target is aten.pad.default
    mode = _arg(node, 2, "mode", "constant") if general else "constant"
    back = rank(source) - 1 - axis
    if any(p != 0 for p in pads[2 * back : 2 * back + 2]):
        return None
    if mode != "constant":
        return Carry(((source, axis),), True)
    value = _arg(node, 3 if general else 2, "value", 0)
    return Carry(((source, axis),)) if value in (None, 0) else None


def _spatial(node: fx.Node, axis: Axis) -> Carry | None:
    """Linear maps over space with channels on axis 1: resizing, average pooling (batched inputs)."""
    source: Any = node.args[0]
    batched = rank(node) == (3 if "1d" in str(node.target) else 4)
    if axis != 1 or not batched:
        return None
    return Carry(((source, axis),), _weights_sum_to_one(node))


def _weights_sum_to_one(node: fx.Node) -> bool:
    """Whether a resizing or average pooling keeps constants: no zeros are counted in."""
    if node.target not in (aten.avg_pool1d.default, aten.avg_pool2d.default):
        return True
    padding: Any = _arg(node, 3, "padding", 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    counts_padding = _arg(node, 5, "count_include_pad", True)
    divisor = _arg(node, 6, "divisor_override")
    return divisor is None and not (padded and counts_padding)


def _zeros(node: fx.Node, axis: Axis) -> Carry | None:
    del node, axis
    return Carry(())


_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
_SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)

_GROUPS: tuple[tuple[Callable[..., Carry | None], tuple[Any, ...]], ...] = (
    (
        _same_axis,
        (
            aten.alias.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.detach.default,
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten._to_copy.default,
            aten.type_as.default,
        ),
    ),
    (_scaled, (aten.neg.default,)),
    (_sum, (aten.add.Tensor, aten.sub.Tensor)),
    (_product, (aten.mul.Tensor, aten.mul.Scalar, *_DIVISIONS)),
    (
        _reshape,
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.view_as.default,
            aten.reshape_as.default,
        ),
    ),
    (_permute, (aten.permute.default,)),
    (
        _transpose,
        (aten.transpose.int, aten.t.default, aten.swapaxes.default, aten.swapdims.default),
    ),
    (_unsqueeze, (aten.unsqueeze.default,)),
    (_squeeze, (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)),
    (_expand, (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)),
    (
        _off_axis(1, "dim"),
        (aten.slice.Tensor, aten.narrow.default, aten.index_select.default, aten.flip.default),
    ),
    (_off_axis(2, "dims", None), (aten.roll.default,)),
    (_select, (aten.select.int,)),
    (_index, (aten.index.Tensor,)),
    (_cat, (aten.cat.default, aten.concat.default)),
    (_stack, (aten.stack.default,)),
    (_mean, (aten.mean.dim,)),
    (_token_sum, (aten.sum.dim_IntList,)),
    (_where, (aten.where.self,)),
    (_masked_fill, (aten.masked_fill.Scalar,)),
    (_dropout, (aten.dropout.default,)),
    (_pad, (aten.constant_pad_nd.default, aten.pad.default)),
    (
        _spatial,
        (
            aten.upsample_bicubic2d.vec,
            aten.upsample_bicubic2d.default,
            aten.upsample_bilinear2d.vec,
            aten.upsample_bilinear2d.default,
            aten.upsample_nearest2d.vec,
            aten.upsample_nearest2d.default,
            aten.avg_pool2d.default,
            aten.adaptive_avg_pool2d.default,
            aten.avg_pool1d.default,
            aten.adaptive_avg_pool1d.default,
        ),
    ),
    (_zeros, (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)),
)

_RULES: dict[Any, Callable[..., Carry | None]] = {
    target: rule for rule, targets in _GROUPS for target in targets
}


def is_split(node: fx.Node) -> bool:
    """Whether ``node`` takes a value apart into a tuple of its parts (split, chunk, unbind)."""
    return node.target in _SPLITS
