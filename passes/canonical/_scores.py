"""Reading attention backwards: from the product with v, through the softmax, to q and kᵀ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.sizes import same_size
from sparsecc.passes.canonical._guard import GUARD_REFUSALS
from sparsecc.passes.canonical._match import (
    argument,
    cast_source,
    is_last_dim,
    is_tensor,
    number,
    only_user,
    operands,
)

aten = torch.ops.aten

SCORES_REFUSALS = {
    **GUARD_REFUSALS,
    "half-precision": "scores are rounded to half precision, or cast; the kernels do neither",
    "broadcast": "q, k, v or the mask broadcast against each other",
    "dropout": "dropout on the probabilities is active",
    "key-layout": "k is stored transposed; the kernels would copy it",
    "mask-before-scale": "the mask is added before scaling, so the scale acts on it too",
    "masked-fill": "scores are filled, not added to: fully masked rows would differ",
    "probabilities-used": "something else reads the scores or the probabilities",
    "softmax-dim": "the softmax is not over the keys",
}

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_DROPOUTS = (aten.dropout.default, torch.nn.functional.dropout)
_SWAPS = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_DEPTH = 8  # scale, mask, bias, casts: no model spells more between product and softmax


@dataclass
class Attention:
    """One attention, spelled out.

    Attributes:
        q / v: the queries and values. ``k`` is None where no node holds the keys: then
            ``k_transposed`` does, with its last two dimensions swapped.
        factors: scale factors, each with whether it divides.
        masks: what is added to the scaled scores.
        chain: the nodes between the first product and the second, in graph order.
        problems: refusal codes of what was met on the way.
    """

    q: fx.Node
    k: fx.Node | None
    k_transposed: fx.Node
    v: fx.Node
    factors: list[tuple[Any, bool]] = field(default_factory=list)
    masks: list[fx.Node] = field(default_factory=list)
    chain: list[fx.Node] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def recognise(node: fx.Node) -> Attention | None:
    """The attention whose result ``node`` is, or None."""
    if node.target not in _PRODUCTS or not is_tensor(node) or node.meta["val"].dim() not in (3, 4):
        return None
    probabilities, v = node.args[:2]
    if not is_tensor(probabilities) or not is_tensor(v):
        return None
    tail: list[fx.Node] = []
    problems: list[str] = []
    current: Any = probabilities
    while is_tensor(current) and current.target not in (aten.softmax.int, aten._softmax.default):
        tail.append(current)
        if current.target in _DROPOUTS:
            if not _is_inactive(current):
                problems.append("dropout")
            current = current.args[0]
        elif (source := cast_source(current)) is not None:
            current = source
        else:
            return None
    if not is_tensor(current):
        return None
    softmax: fx.Node = current
    found = _scores(softmax.args[0], _DEPTH)
    if found is None:
        return None
    if not is_last_dim(argument(softmax, "dim"), softmax.meta["val"].dim()):
        problems.append("softmax-dim")
    found.v = v  # type: ignore[assignment]
    found.chain += [softmax, *reversed(tail)]
    found.problems += problems
    _strip_scales(found)
    return found


def fits(mask: Any, scores: Any) -> bool:
    """Whether a mask of shape ``mask`` broadcasts to ``scores`` without enlarging it."""
    if len(mask) > len(scores):
        return False
    pairs = zip(reversed(list(mask)), reversed(list(scores)), strict=False)
    return all(same_size(m, 1) or same_size(m, s) for m, s in pairs)


def _scores(node: Any, depth: int) -> Attention | None:
    """The first product and what happened to it up to ``node``."""
    if not is_tensor(node) or depth == 0 or node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        q, key = node.args[:2]
        if not is_tensor(q) or not is_tensor(key) or node.meta["val"].dim() not in (3, 4):
            return None
        if q.meta["val"].dim() != key.meta["val"].dim():
            return None
        return Attention(q, _transposed_input(key), key, node, chain=[node])
    for kind in ("mul", "div"):
        for inner, factor in operands(node, kind):
            factor = number(factor)
            found = _scores(inner, depth - 1) if factor is not None else None
            if found is not None:
                if found.masks:
                    found.problems.append("mask-before-scale")
                found.factors.append((factor, kind == "div"))
                found.chain.append(node)
                return found
    for inner, mask in operands(node, "add"):
        found = _scores(inner, depth - 1) if is_tensor(mask) else None
        if found is not None:
            found.masks.append(mask)
            found.chain.append(node)
            return found
    inner = None
    if node.target in _FILLS:
        inner = node.args[0]
    elif node.target in (aten.where.self, aten.where.ScalarOther):
        inner = node.args[1]
    elif (source := cast_source(node)) is not None:
        inner = source
    found = _scores(inner, depth - 1)
    if found is not None:
        found.chain.append(node)
        if cast_source(node) is None:
            found.problems.append("masked-fill")
    return found


def _strip_scales(found: Attention) -> None:
    """Move factors on q and k alone into the scale (OPT and T5 scale q before the product)."""
    found.q = _strip(found.q, found)
    if found.k is not None and only_user(found.k) is not None:
        found.k = _strip(found.k, found)


def _strip(node: fx.Node, found: Attention) -> fx.Node:
    for kind in ("mul", "div"):
        for inner, factor in operands(node, kind):
            factor = number(factor)
            if factor is None or not is_tensor(inner) or only_user(node) is None:
                continue
            if inner.meta["val"].dtype != node.meta["val"].dtype:
                continue
            found.factors.append((factor, kind == "div"))
            return _strip(inner, found)
    return node


def _transposed_input(node: fx.Node) -> fx.Node | None:
    """``k`` where ``node`` is k with exactly its last two dimensions swapped."""
    rank = node.meta["val"].dim()
    swapped = False
    if node.target in _SWAPS:
        dims = node.args[1:3]
        swapped = {d % rank for d in dims if isinstance(d, int)} == {rank - 1, rank - 2}
    elif node.target is aten.mT.default:
        swapped = True
    elif node.target is aten.permute.default:
        order = node.args[1]
        wanted = [*range(rank - 2), rank - 1, rank - 2]
        swapped = (
            isinstance(order, (list, tuple))
            and [d % rank for d in order if isinstance(d, int)] == wanted
        )
    source = node.args[0] if swapped else None
    return source if is_tensor(source) else None  # type: ignore[return-value]


def _is_inactive(node: fx.Node) -> bool:
    if node.target is torch.nn.functional.dropout:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return training is False
    return argument(node, "train") is False or argument(node, "p") == 0
