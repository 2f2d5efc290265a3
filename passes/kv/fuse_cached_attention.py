"""Attention over a cache, together with the rotation and the writing of what is new.

Law.   softmax(s · R(q) K'ᵀ + m) V' in one operator, where K' is the cache of keys with R(k) written at the
       positions of the new tokens, and V' that of values with v.
Source Vaswani et al., "Attention Is All You Need" (2017), eq. 1; Su et al., "RoFormer" (2021), eq. 34; pieces
       of the softmax are put together by Milakov and Gimelshein (2018), eq. 4.
Legal  in inference, in float32 (on GPUs in half precision too), for a few new tokens. Nothing else writes the
       cache or reads it between the write and the attention. The rotation goes along where q and k are
       turned by the same angles.
Exact  in real arithmetic. Keys and values that the mask excludes are not read: a NaN there does not spread.
Pays   the cache is read once, where it lies: spelled out, it is copied for every query head that shares a
       head of it, and a dozen small operators surround the product. Kernel or Inductor: by measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import Aliases, aliases
from sparsecc.passes.analysis.regions import modes
from sparsecc.passes.analysis.sizes import same_shape, same_size
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
from sparsecc.passes.canonical._match import argument, is_tensor, operands, scalar
from sparsecc.runtime.ops.cached_attention import Spec, cached_attention, meaning, rotate

aten = torch.ops.aten

MOST_TOKENS = 16  # above, the products are large enough for the libraries
_DTYPES = {
    "cpu": {torch.float32},
    "cuda": {torch.float32, torch.bfloat16, torch.float16},
}


@dataclass(frozen=True)
class Write:
    """``index_copy_(cache, 2, positions, new)``."""

    node: fx.Node
    cache: fx.Node
    positions: fx.Node
    new: fx.Node


@dataclass(frozen=True)
class Attention:
    """What one call of ``scaled_dot_product_attention`` is made of."""

    node: fx.Node
    q: fx.Node
    k: Write
    v: Write
    mask: fx.Node | None
    groups: int
    rotation: tuple[fx.Node, ...] = ()

    @property
    def key(self) -> fx.Node:
        return self.k.new

    def reads(self) -> list[fx.Node]:
        """What the operator takes and does not write."""
        found = [self.q, self.k.new, self.v.new, self.k.positions, *self.rotation]
        return found if self.mask is None else [*found, self.mask]


@dataclass(frozen=True)
class FuseCachedAttention(RegionPass):
    """Fuse the rotation, the writes into the cache and the attention over it."""

    name: ClassVar[str] = "fuse-cached-attention"
    family: ClassVar[str] = "kv"
    law: ClassVar[str] = "softmax(s·R(q)K'ᵀ + m)V' as one operator, K' the cache with R(k) written"
    source: ClassVar[str] = "Vaswani et al. 2017, eq. 1; Su et al. 2021, eq. 34"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "decoding: the cache is read once and not copied for every query head"
    refusals: ClassVar[Mapping[str, str]] = {
        "training": "gradients flow, and the operator has no backward",
        "tokens": f"more than {MOST_TOKENS} new tokens, or sizes that are not known",
        "dtype": "not all float32 on a CPU, or float32, bfloat16 or float16 on a GPU; or the mask neither bool "
        "nor float32 nor of that dtype",
        "options": "dropout, or a causal mask by flag",
        "layout": "the features of the cache are not contiguous",
        "written": "something that the operator reads is written in place, or the cache is written twice",
        "cache-read": "the cache is read between the write and the attention",
        "region": "an autocast or grad-mode region begins or ends inside",
        "small": RegionPass.SMALL,
        "device": RegionPass.DEVICE,
    }

    def find(self, context: Context) -> list[Match]:
        calls = context.program.calls(aten.scaled_dot_product_attention.default)
        return [Match(node) for node in calls if _recognise(node) is not None]

    def check(self, match: Match, context: Context) -> Refusal | None:
        found, node = _again(match), match.node
        if context.trains:
            return Refusal.at(node, "training", self.refusals["training"])
        code = _mismatch(found)
        if code:
            return Refusal.at(node, code, self.refusals[code])
        match.note = (
            f"{found.groups} query heads a head, {'rotated' if found.rotation else 'not rotated'}"
        )
        return _order_refusal(found, context, self.refusals) or self.unworthy(
            node, (found.k.cache, found.v.cache)
        )

    def rewrite(self, match: Match, context: Context) -> None:
        found, node, program = _again(match), match.node, context.program
        q: Any = found.q.meta["val"]
        values: Any = found.v.cache.meta["val"]
        spec = Spec(q.shape[-1], values.shape[-1], found.groups, bool(found.rotation))
        scale = scalar(argument(node, "scale"))
        args = (
            *(found.q, found.k.new, found.v.new, found.k.cache, found.v.cache, found.k.positions),
            *(list(found.rotation), found.mask),
            *(q.shape[-1] ** -0.5 if scale is None else scale, spec.text()),
        )
        fused = program.call(cached_attention, args, like=node, origin=self.name, before=node)
        heads_first = program.call(
            aten.transpose.int, (fused, 1, 2), like=node, origin=self.name, before=node
        )
        program.replace(node, heads_first)
        for write in (found.k, found.v):
            write.node.replace_all_uses_with(write.cache)
            program.erase(write.node)

    def saving(self, match: Match, context: Context) -> Saving:
        found = _again(match)
        copied = [n for n in found.node.args[1:3] if n not in (found.k.node, found.v.node)]
        # A copy is written and read again.
        size = 2 * sum(nbytes(n) for n in copied if isinstance(n, fx.Node))
        return Saving(size, launches=2 + len(copied) + 10 * bool(found.rotation))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(q: Any, k: Any, v: Any, keys: Any, values: Any, cos: Any, sin: Any) -> Any:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys = torch.cat([keys[:, :, :1], k, keys[:, :, 1:]], 2)
            values = torch.cat([values[:, :, :1], v, values[:, :, 1:]], 2)
            return torch.softmax(q @ keys.transpose(-1, -2) * 0.25, -1) @ values

        def after(q: Any, k: Any, v: Any, keys: Any, values: Any, cos: Any, sin: Any) -> Any:
            spec = Spec(q.shape[-1], v.shape[-1], 1, True)
            # k and v are written over these.
            keys = torch.cat([keys[:, :, :1], k, keys[:, :, 1:]], 2)
            values = torch.cat([values[:, :, :1], v, values[:, :, 1:]], 2)
            angles = [cos[None, None], sin[None, None]]
            rest = (keys, values, torch.arange(1, 1 + k.shape[2]), angles, None, 0.25, spec.text())
            return meaning(q, k, v, *rest).transpose(1, 2)

        def whole(w: Any, v: Any) -> Any:
            return (w @ v) / w.sum(-1, keepdim=True)

        def pieces(w: Any, v: Any) -> Any:
            parts = [(w[:, :1], v[:1]), (w[:, 1:], v[1:])]
            return sum(a @ b for a, b in parts) / sum(a.sum(-1, keepdim=True) for a, _ in parts)

        shapes: dict[str, tuple[str, ...]] = {
            "q": ("b", "h", "t", "even"),
            "k": ("b", "h", "t", "even"),
        }
        shapes |= {"v": ("b", "h", "t", "d"), "keys": ("b", "h", "s", "even")}
        shapes |= {"values": ("b", "h", "s", "d")}
        shapes |= {"cos": ("t", "even"), "sin": ("t", "even")}
        return [
            Example(before, after, shapes),
            Example(whole, pieces, {"w": ("n", "k"), "v": ("k", "d")}, symbolic=True),
        ]


# ---- recognising -----------------------------------------------------------------------------------


def _recognise(node: fx.Node) -> Attention | None:
    q, k, v = node.args[:3]
    key, value = _shared(k), _shared(v)
    if not isinstance(q, fx.Node) or key is None or value is None:
        return None
    written, groups = key
    other, same = value
    heads, query_heads = written.cache.meta["val"].shape[1], q.meta["val"].shape[1]
    if argument(node, "enable_gqa") and isinstance(heads, int) and isinstance(query_heads, int):
        groups = same = query_heads // heads
    if written.positions is not other.positions or groups != same:
        return None
    if not same_size(groups * heads, query_heads):
        return None
    return _with_rotation(Attention(node, q, written, other, argument(node, "attn_mask"), groups))


def _again(match: Match) -> Attention:
    found = _recognise(match.node)  # anew: an earlier match may have replaced q, k or v
    assert found is not None
    return found


def _shared(value: Any) -> tuple[Write, int] | None:
    """The write whose cache ``value`` is, and how often each of its heads is repeated."""
    if not isinstance(value, fx.Node):
        return None
    written = _write(value)
    if written is not None:
        return written, 1
    if value.target is aten.repeat_interleave.self_int and argument(value, "dim") == 1:
        written = _write(value.args[0])
        return None if written is None else (written, value.args[1])  # type: ignore[return-value]
    expanded: Any = (
        value.args[0] if value.target in (aten.reshape.default, aten.view.default) else None
    )
    inserted: Any = getattr(expanded, "target", None) is aten.expand.default and expanded.args[0]
    if not isinstance(inserted, fx.Node) or inserted.target is not aten.unsqueeze.default:
        return None
    written = _write(inserted.args[0])
    if written is None or inserted.args[1] != 2:
        return None
    batch, heads, length, size = written.node.meta["val"].shape
    groups = expanded.meta["val"].shape[2]
    shapes_fit = same_shape(expanded.meta["val"].shape, (batch, heads, groups, length, size))
    is_merge = same_shape(value.meta["val"].shape, (batch, heads * groups, length, size))
    return (written, groups) if shapes_fit and is_merge else None


def _write(node: Any) -> Write | None:
    """The write of the cache ``node``: its result is at hand, or the cache itself is."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is not aten.index_copy_.default:
        writes = [
            u for u in node.users if u.target is aten.index_copy_.default and u.args[0] is node
        ]
        return _write(writes[0]) if len(writes) == 1 else None
    cache, axis, positions, new = node.args
    if axis not in (2, -2) or cache.meta["val"].dim() != 4:  # type: ignore[union-attr]
        return None
    return Write(node, cache, positions, new)  # type: ignore[arg-type]


def _with_rotation(found: Attention) -> Attention:
    """With the rotation, where the query and the new key are turned by the same angles."""
    query, key = _rotated(found.q), _rotated(found.k.new)
    if query is None or key is None or query[1:] != key[1:]:
        return found
    x, cos, sin = key
    if not all(_turns(angle, x) and _turns(angle, query[0]) for angle in (cos, sin)):
        return found
    return replace(found, q=query[0], k=replace(found.k, new=x), rotation=(cos, sin))


def _turns(angle: fx.Node, x: fx.Node) -> bool:
    """Whether ``angle`` is ``[B or 1, 1, T, size]`` for x of ``[B, heads, T, size]``."""
    shape, own = x.meta["val"].shape, angle.meta["val"].shape
    if len(shape) != 4 or len(own) != 4 or own[1] != 1 or not same_shape(own[2:], shape[2:]):
        return False
    return same_size(own[0], 1) or same_size(own[0], shape[0])


def _rotated(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """``(x, cos, sin)`` where ``node`` is x cos + turned(x) sin."""
    for straight, crossed in operands(node, "add"):
        for x, cos in operands(straight, "mul"):
            for turned, sin in operands(crossed, "mul"):
                if is_tensor(cos) and is_tensor(sin) and is_tensor(x) and _is_turned(turned, x):
                    return x, cos, sin
    return None


def _is_turned(node: Any, x: fx.Node) -> bool:
    """Whether ``node`` is cat(-second half of x, first half of x)."""
    if getattr(node, "target", None) is not aten.cat.default or len(node.args[0]) != 2:
        return False
    size = x.meta["val"].shape[-1]
    negated, first = node.args[0]
    if argument(node, "dim", 0) not in (-1, 3) or not isinstance(size, int) or size % 2:
        return False
    second = negated.args[0] if negated.target is aten.neg.default else None
    return _is_half(first, x, 0, size) and _is_half(second, x, size // 2, size)


def _is_half(node: Any, x: fx.Node, start: int, size: int) -> bool:
    if getattr(node, "target", None) is not aten.slice.Tensor or node.args[0] is not x:
        return False
    begin, end = argument(node, "start") or 0, argument(node, "end")
    end = size if end is None or (isinstance(end, int) and end > size) else end
    on_last = argument(node, "dim", 0) in (-1, 3) and argument(node, "step", 1) == 1
    return on_last and (begin, end) == (start, start + size // 2)


# ---- refusing --------------------------------------------------------------------------------------


def _mismatch(found: Attention) -> str:
    """The refusal code of what the kernels do not take, or ""."""
    if argument(found.node, "dropout_p") != 0.0 or argument(found.node, "is_causal"):
        return "options"
    q: Any = found.q.meta["val"]
    caches: list[Any] = [found.k.cache.meta["val"], found.v.cache.meta["val"]]
    known = [
        q.shape[1],
        q.shape[2],
        q.shape[3],
        found.groups,
        *(c.shape[i] for c in caches for i in (1, 3)),
    ]
    if not all(isinstance(size, int) for size in known) or not 1 <= q.shape[2] <= MOST_TOKENS:
        return "tokens"
    floats = [q, found.node.meta["val"], *caches]
    floats += [new.meta["val"] for new in (found.k.new, found.v.new)]
    floats += [angle.meta["val"] for angle in found.rotation]
    alike = all((t.dtype, t.device) == (q.dtype, q.device) for t in floats)
    if not alike or q.dtype not in _DTYPES.get(q.device.type, ()):
        return "dtype"
    mask = None if found.mask is None else found.mask.meta["val"]
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return "dtype"
    rest = [found.k.positions.meta["val"], *([] if mask is None else [mask])]
    if not all(t.device == q.device for t in rest):
        return "dtype"
    if not all(same_size(cache.stride(-1), 1) for cache in caches):
        return "layout"
    return ""


def _order_refusal(found: Attention, context: Context, words: Mapping[str, str]) -> Refusal | None:
    """The writes move to where the attention stands: nothing on the way may notice."""
    alias: Aliases = context.analyses.get(aliases)
    mode = context.analyses.get(modes)
    for value in found.reads():
        if alias.written(value):
            return Refusal.at(value, "written", f"{value.name} is written in place")
    for write in (found.k, found.v):
        if alias.writes(write.cache) != (write.node,):
            return Refusal.at(write.node, "written", words["written"])
        repeats = _repeats(found, write)
        if not all(write.node < node for node in repeats):
            return Refusal.at(write.node, "cache-read", "the cache is read before it is written")
        if mode[write.node] != mode[found.node]:
            return Refusal.at(write.node, "region", words["region"])
        readers = {u for view in alias.same_storage(write.cache) for u in view.users}
        for reader in readers - repeats:
            if write.node < reader < found.node:
                reason = f"{reader.name} reads the cache before the attention"
                return Refusal.at(reader, "cache-read", reason)
    return None


def _repeats(found: Attention, write: Write) -> set[fx.Node]:
    """The nodes that repeat the heads of a cache, with the attention."""
    value: Any = found.node.args[1 if write is found.k else 2]
    inside = {found.node}
    while value not in (write.node, write.cache):
        inside.add(value)
        value = value.args[0]
    return inside
