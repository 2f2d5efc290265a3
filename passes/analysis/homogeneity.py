"""What an operator does to a positive scale and to a shift of its operand's channels.

``v ↦ v ⊘ s`` (s > 0, one number a channel) and ``v ↦ v − z`` pass an operator f where f(v ⊘ s) = f(v) ⊘ s and
f(v − z) = f(v) − z, the channels being followed through reshapes, slices, concatenations and repeated heads.

carries scale and shift   reindexing (``stream.carry``), max-pool, average pools that count no padding,
                          resizing, attention over v (the rows of the softmax sum to one)
carries the scale alone   ReLU, LeakyReLU, PReLU, |x|, one factor of a product, sums of two values of the same
                          channels (which ties those channels), zero padding
neither                   everything else: GELU, SiLU, sigmoid, tanh, softmax, norms over the channels

Source positive homogeneity as in Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization
       and Bias Correction", §4.1; algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.channels import FREE, Channels, joined, paired
from sparsecc.passes.analysis.sizes import same_size
from sparsecc.passes.analysis.stream import carry, is_number, is_split, rank, size

aten = torch.ops.aten

Known = Mapping[fx.Node, Channels]


@dataclass(frozen=True)
class Step:
    """What one operator does to the channels of its operands.

    Attributes:
        channels: the channels of the result; None where it has none.
        shift: whether a shift passes too.
        lost: operands whose channels go no further here: they may not be scaled or shifted at all.
        tied: pairs of channels that must share one scale; a pair with ``FREE`` may not be scaled.
        scores: operands that the operator contracts with each other, as ("q" or "k", operand, channels): q
            [..., d] and k [..., d] with the axis of queries or keys taken out. Their scales cancel.
        through: "activation", "product" or "attention", where it passed one; empty otherwise.
    """

    channels: Channels | None = None
    shift: bool = False
    lost: tuple[fx.Node, ...] = ()
    tied: tuple[tuple[int, int], ...] = ()
    scores: tuple[tuple[str, fx.Node, Channels], ...] = ()
    through: str = ""


def step(node: fx.Node, known: Known) -> Step:
    """How the channels ``known`` of some operands of ``node`` pass it."""
    operands = tuple(a for a in node.all_input_nodes if a in known)
    value = node.meta.get("val")
    if node.op == "call_function" and is_split(node):
        return Step(known[operands[0]], True)  # its parts tell
    if node.op == "call_function" and isinstance(value, torch.Tensor):
        rule = _RULES.get(node.target, _carried)
        found = rule(node, known) if value.dtype.is_floating_point else None
        if found is not None:
            return found
    return Step(lost=operands)


# ---- rules: node, channels of its operands -> Step, or None where nothing passes --------------------


def _carried(node: fx.Node, known: Known) -> Step | None:
    """What ``stream.carry`` says of each axis of the channels."""
    if getattr(node.target, "__name__", "") == "getitem":
        return _part(node, known)
    operands = [a for a in node.all_input_nodes if a in known]
    if len(operands) != 1:
        return None
    (operand,) = operands
    channels = known[operand]
    order: list[int | None] = [None] * rank(node)
    reindexes: dict[int, bool] = {}
    for axis in range(rank(node)):
        found = carry(node, axis)
        if found is not None and len(found.operands) == 1 and found.operands[0][0] is operand:
            order[axis] = found.operands[0][1]
            reindexes[found.operands[0][1]] = found.reindexes
    varying = channels.varying
    if not reindexes or not set(varying) <= set(reindexes):
        return None
    # One channel alone varies along no axis; what any axis says of a constant then holds.
    shift = all(reindexes[a] for a in varying) if varying else any(reindexes.values())
    return Step(channels.moved(order), shift or _keeps_constants(node))


def _keeps_constants(node: fx.Node) -> bool:
    """Pools and resizing whose weights sum to one everywhere."""
    if node.target in _RESIZES:
        return True
    if node.target not in _POOLS:
        return False
    # avg_pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    padding, ceil = _argument(node, "padding", 3, 0), _argument(node, "ceil_mode", 4, False)
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding != 0
    counted = _argument(node, "count_include_pad", 5, True)
    divisor = _argument(node, "divisor_override", 6, None)
    return not ceil and divisor is None and not (padded and counted)


def _elementwise(node: fx.Node, known: Known) -> Step | None:
    """f(x/s) = f(x)/s for s > 0, element by element."""
    if node.args[0] not in known or len([a for a in node.all_input_nodes if a in known]) != 1:
        return None
    return Step(known[node.args[0]], through="activation")  # type: ignore[index]


def _clamp(node: fx.Node, known: Known) -> Step | None:
    """Only as a ReLU."""
    low, high = _argument(node, "min", 1, None), _argument(node, "max", 2, None)
    number = is_number(low)
    return _elementwise(node, known) if number and low == 0 and high is None else None


def _max_pool(node: fx.Node, known: Known) -> Step | None:
    """The maximum of x − z is that of x, less z (its padding never wins)."""
    source: Any = node.args[0]
    channels = known[source]
    dims = next(d for d in (1, 2, 3) if f"{d}d" in str(node.target))
    if rank(source) != dims + 2 or not set(channels.varying) <= {0, 1}:
        return None
    return Step(channels, True)


def _product(node: fx.Node, known: Known) -> Step | None:
    """One factor carries the scale; the other stays as it is."""
    a, b = (*node.args[:2],) if len(node.args) > 1 else (node.args[0], None)
    if a is b or node.kwargs:
        return None
    carrier: Any = a if a in known else b
    if carrier is b and node.target in _DIVISIONS:
        return None
    other: Any = b if carrier is a else a
    lost = (other,) if other in known else ()
    channels = known[carrier].padded(rank(node))
    branch = isinstance(other, fx.Node) and any(
        rank(other) >= rank(node) - axis and not same_size(size(other, axis - rank(node)), 1)
        for axis in channels.varying
    )
    # A number, or one number a token, makes no second branch.
    return Step(channels, lost=lost, through="product" if branch else "")


def _sum(node: fx.Node, known: Known) -> Step | None:
    """Two values that are scaled alike; every element's two channels are tied."""
    a, b = node.args[:2]
    if a not in known or b not in known:
        return None
    first, second = known[a], known[b]  # type: ignore[index]
    tied = tuple(pair for pair in paired(first, second) if pair[0] != pair[1])
    return Step(_widest(node, first, second), tied=tied)


def _where(node: fx.Node, known: Known) -> Step | None:
    condition, a, b = node.args[:3]
    if condition in known or a not in known or b not in known:
        return None
    first, second = known[a], known[b]  # type: ignore[index]
    tied = tuple(pair for pair in paired(first, second) if pair[0] != pair[1])
    return Step(_widest(node, first, second), tied=tied)


def _widest(node: fx.Node, a: Channels, b: Channels) -> Channels:
    shape = [max(pair) for pair in zip(*(m.padded(rank(node)).shape for m in (a, b)), strict=True)]
    return a.spread(shape)


def _reshape(node: fx.Node, known: Known) -> Step | None:
    source: Any = node.args[0]
    if source not in known:
        return None  # view_as(other, x) is not asked: it reads the shape alone
    found = known[source].reshaped(source.meta["val"].shape, node.meta["val"].shape)
    return None if found is None else Step(found, True)


def _expand(node: fx.Node, known: Known) -> Step | None:
    """Repeated along axes of size 1, as heads of k and v are: the channel is the same along them."""
    source: Any = node.args[0]
    return Step(known[source].padded(rank(node)), True) if source in known else None


def _repeat_interleave(node: fx.Node, known: Known) -> Step | None:
    source: Any = node.args[0]
    times, dim = node.args[1], _argument(node, "dim", 2, None)
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    return Step(known[source].repeated(dim % rank(source), times), True)


def _slice(node: fx.Node, known: Known) -> Step | None:
    source: Any = node.args[0]
    dim = _argument(node, "dim", 1, 0) % rank(source)
    if not known[source].varies(dim):
        return Step(known[source], True)
    whole, length = size(source, dim), size(node, dim)
    narrow = node.target is aten.narrow.default
    start = _argument(node, "start", 2, 0)
    step_ = 1 if narrow else _argument(node, "step", 4, 1)
    start = 0 if start is None else start
    if not all(isinstance(i, int) for i in (whole, length, start, step_)):
        return None
    if length == 0:  # partial rotary embeddings that turn all of a head
        return Step(None, True)
    start = max(start + whole, 0) if start < 0 else start
    return Step(known[source].sliced(dim, start, step_, length), True)


def _select(node: fx.Node, known: Known) -> Step | None:
    source: Any = node.args[0]
    return _selected(source, int(node.args[1]), node.args[2], known)  # type: ignore[arg-type]


def _selected(source: fx.Node, dim: int, index: Any, known: Known) -> Step | None:
    dim %= rank(source)
    channels = known[source]
    if channels.varies(dim):
        if not isinstance(index, int):
            return None
        channels = channels.sliced(dim, index % channels.shape[dim], 1, 1)
    return Step(channels.moved([a for a in range(rank(source)) if a != dim]), True)


def _part(node: fx.Node, known: Known) -> Step | None:
    """One part of split, chunk or unbind; ``known`` holds the whole's channels for the tuple."""
    parent: Any = node.args[0]
    index: Any = node.args[1]
    if not is_split(parent) or not isinstance(index, int):
        return None
    source: Any = parent.args[0]
    whole = {source: known[parent]}
    if parent.target is aten.unbind.int:
        return _selected(source, _argument(parent, "dim", 1, 0), index, whole)
    dim = _argument(parent, "dim", 2, 0) % rank(source)
    if not known[parent].varies(dim):
        return Step(known[parent], True)
    sizes = [part.shape[dim] for part in parent.meta["val"]]
    if not all(isinstance(s, int) for s in sizes):
        return None
    index %= len(sizes)
    return Step(known[parent].sliced(dim, sum(sizes[:index]), 1, sizes[index]), True)


def _cat(node: fx.Node, known: Known) -> Step | None:
    parts: Any = node.args[0]
    dim = _argument(node, "dim", 1, 0) % rank(node)
    if any(rank(part) != rank(node) for part in parts):
        return None
    parts = [part for part in parts if not same_size(size(part, dim), 0)]
    return _joined(node, [known.get(part) for part in parts], [size(p, dim) for p in parts], dim)


def _stack(node: fx.Node, known: Known) -> Step | None:
    parts: Any = node.args[0]
    dim = _argument(node, "dim", 1, 0) % rank(node)
    order: list[int | None] = [a - (a > dim) if a != dim else None for a in range(rank(node))]
    maps = [None if known.get(part) is None else known[part].moved(order) for part in parts]
    return _joined(node, maps, [1] * len(parts), dim)


def _joined(node: fx.Node, maps: list[Channels | None], sizes: list[Any], dim: int) -> Step | None:
    free = Channels((1,) * rank(node), (FREE,))
    parts = [free if part is None else part for part in maps]
    if all(part == parts[0] for part in parts) and not parts[0].varies(dim):
        return Step(parts[0], True)
    if not all(isinstance(s, int) for s in sizes):
        return None
    return Step(joined(parts, dim, sizes), True)


def _matmul(node: fx.Node, known: Known) -> Step | None:
    """a [..., L, d] · b [..., d, S]: channels of b's last axis pass; those of d are contracted."""
    a, b = node.args[:2]
    if a is b or any(rank(x) < 2 for x in (a, b)):  # type: ignore[arg-type]
        return None
    scores, lost = [], []
    channels, shift = None, False
    if a in known:
        last = rank(a) - 1  # type: ignore[arg-type]
        if known[a].varies(last) and not known[a].varies(last - 1):  # type: ignore[index]
            scores.append(("q", a, _without(known[a], last - 1)))  # type: ignore[index]
        else:
            lost.append(a)
    if b in known:
        last = rank(b) - 1  # type: ignore[arg-type]
        inner, outer = known[b].varies(last - 1), known[b].varies(last)  # type: ignore[index]
        if inner and not outer:
            scores.append(("k", b, _without(known[b], last)))  # type: ignore[index]
        elif not inner and a not in known:
            channels, shift = known[b].padded(rank(node)), _rows_sum_to_one(a)  # type: ignore[index]
        else:
            lost.append(b)
    through = "attention" if channels is not None else ""
    return Step(channels, shift, tuple(lost), scores=tuple(scores), through=through)  # type: ignore[arg-type]


def _attention(node: fx.Node, known: Known) -> Step | None:
    """Attention: the scales of q and k cancel; v's channels pass, for the rows of the softmax sum to one."""
    q, k, v = node.args[:3]
    mask = _argument(node, "attn_mask", 3, None)
    dropout = _argument(node, "dropout_p", 4, 0.0)
    if len({q, k, v}) != 3 or mask in known:
        return None
    scores, lost = [], []
    heads = _repeats(node)
    for role, operand in (("q", q), ("k", k)):
        if operand not in known:
            continue
        rows = rank(operand) - 2  # type: ignore[arg-type]
        found = known[operand]  # type: ignore[index]
        repeated = None if role == "q" else heads
        if found.varies(rows + 1) and not found.varies(rows):
            without = _without(found, rows)
            if repeated is None:
                scores.append((role, operand, without))
                continue
            if without.rank > 1 and isinstance(repeated, int):
                scores.append((role, operand, without.repeated(without.rank - 2, repeated)))
                continue
        lost.append(operand)
    channels = None
    if v in known:
        found, rows = known[v], rank(v) - 2  # type: ignore[index, arg-type]
        if found.varies(rows) or heads == "unknown":
            lost.append(v)
        elif isinstance(heads, int):
            channels = found.repeated(rows - 1, heads)
        else:
            channels = found
    # A row that the mask leaves nothing is zero, not an average. Without a mask there is none.
    shift = mask is None and dropout == 0
    return Step(
        None if channels is None else channels.padded(rank(node)),
        shift,
        tuple(lost),  # type: ignore[arg-type]
        scores=tuple(scores),  # type: ignore[arg-type]
        through="attention" if channels is not None else "",
    )


def _repeats(node: fx.Node) -> int | str | None:
    """How often each head of k and v is used in a row under ``enable_gqa``; None where heads pair off."""
    if not node.kwargs.get("enable_gqa", False):
        return None
    q, k = node.args[0], node.args[1]
    queries, keys = size(q, -3), size(k, -3)  # type: ignore[arg-type]
    if not isinstance(queries, int) or not isinstance(keys, int) or queries % keys:
        return "unknown"
    return queries // keys


def _rows_sum_to_one(node: Any) -> bool:
    """Whether the last axis of ``node`` holds a softmax, seen through what keeps each row whole."""
    while isinstance(node, fx.Node):
        last = rank(node) - 1
        if node.target in (aten.softmax.int, aten._softmax.default):
            return _argument(node, "dim", 1, None) in (-1, last)
        found = carry(node, last)
        if found is None or not found.reindexes or len(found.operands) != 1:
            return False
        node, at = found.operands[0]
        if at != rank(node) - 1:
            return False
    return False


def _without(channels: Channels, axis: int) -> Channels:
    return channels.moved([a for a in range(channels.rank) if a != axis])


def _argument(node: fx.Node, name: str, position: int, default: Any) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default)
_RESIZES = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bicubic2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
)
_GROUPS: tuple[tuple[Callable[..., Step | None], tuple[Any, ...]], ...] = (
    (
        _elementwise,
        (aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.abs.default),
    ),
    (_clamp, (aten.clamp.default, aten.clamp_min.default)),
    (
        _max_pool,
        (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    ),
    (_product, (aten.mul.Tensor, aten.mul.Scalar, *_DIVISIONS)),
    (_sum, (aten.add.Tensor, aten.sub.Tensor)),
    (_where, (aten.where.self,)),
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
    (_expand, (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)),
    (_repeat_interleave, (aten.repeat_interleave.self_int,)),
    (_slice, (aten.slice.Tensor, aten.narrow.default)),
    (_select, (aten.select.int,)),
    (_cat, (aten.cat.default, aten.concat.default)),
    (_stack, (aten.stack.default,)),
    (_matmul, (aten.matmul.default, aten.bmm.default)),
    (_attention, (aten.scaled_dot_product_attention.default,)),
)
_RULES: dict[Any, Callable[..., Step | None]] = {
    target: rule for rule, targets in _GROUPS for target in targets
}
