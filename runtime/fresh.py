"""Folded weights that never go stale.

At each call the source weights are compared with what they were when they were folded: identity, address and
version of each, and a sampled content check (PyTorch's version counters miss ``p.data.mul_()``, fused
optimizer steps and BatchNorm statistics). An optimizer's step marks its parameters as changed. Whatever
differs is folded again, in place and without recompiling.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

Fold = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]

SAMPLES = 16  # elements of each source that the content check reads

_version = attrgetter("_version")
_address = torch.Tensor.data_ptr
_folded: weakref.WeakSet[_Entry] = weakref.WeakSet()
_hook: Any = None


class FreshWeights:
    """The folded weights of one compiled graph.

    Args:
        fold: evaluates all weight expressions from the sources.
        freshness: "probe" (identity, address, version, samples), "version" (no samples) or "hash" (every
            element).
        in_place: write refreshed weights into the memory of the old ones, so that addresses hold still for CUDA
            graphs. False where they may be views of their sources, or have no strides.

    ``folds`` counts evaluations. Safe to call from several threads.
    """

    def __init__(self, fold: Fold, freshness: str = "probe", in_place: bool = True) -> None:
        self._fold, self._freshness, self._in_place = fold, freshness, in_place
        # One compiled layer may serve every layer of a model; an entry goes when its weights do.
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self._lock = threading.RLock()
        self.folds = 0
        _watch_optimizers()

    def get(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The folded weights for the present values of ``sources``."""
        entry = self._entries.get(tuple(map(id, sources)))
        if entry is not None and entry.fresh(sources):
            return entry.folded
        with self._lock:
            entry = self._entries.get(tuple(map(id, sources)))
            if entry is None or not entry.fresh(sources):
                entry = self._refold(entry, sources)
            return entry.folded

    def _refold(self, entry: _Entry | None, sources: Sequence[torch.Tensor]) -> _Entry:
        self.folds += 1
        key = tuple(map(id, sources))
        # What is compared later is read before the fold: a change during it shows at the next call.
        if entry is not None:
            entry.changed = False
        state = _State(sources, self._freshness)
        folded = self._fold(sources)
        if entry is not None and self._in_place and _same_layout(entry.folded, folded):
            with torch.inference_mode(False), torch.no_grad():
                for old, new in zip(entry.folded, folded, strict=True):
                    old.copy_(new)  # in place: addresses hold still for CUDA graphs
            entry.state = state
            return entry
        evict = _evictor(weakref.ref(self), key)
        entry = _Entry(state, folded, [weakref.ref(s, evict) for s in sources], frozenset(key))
        self._entries[key] = entry
        _folded.add(entry)
        return entry

    def drop(self, key: tuple[int, ...]) -> None:
        self._entries.pop(key, None)


class _Entry:
    """Folded weights of one set of sources, and what those looked like."""

    def __init__(
        self,
        state: _State,
        folded: list[torch.Tensor],
        refs: list[weakref.ref[torch.Tensor]],
        ids: frozenset[int],
    ) -> None:
        self.state, self.folded, self.refs, self.ids = state, folded, refs, ids
        self.changed = False

    def fresh(self, sources: Sequence[torch.Tensor]) -> bool:
        return not self.changed and self.state.matches(sources)


class _State:
    """What the sources looked like: addresses, versions, and samples or a hash of their contents."""

    def __init__(self, sources: Sequence[torch.Tensor], freshness: str) -> None:
        # Tensors made in inference mode count no versions; their contents are checked all the same.
        self.all_counted = not any(s.is_inference() for s in sources)
        self.versions = _versions(sources, self.all_counted)
        self.addresses = list(map(_address, sources))
        self.contents: list[_Samples] = []
        if freshness != "version":
            groups: dict[Any, list[torch.Tensor]] = {}
            for source in sources:
                groups.setdefault((source.dtype, source.device), []).append(source)
            kind = _Hash if freshness == "hash" else _samples
            self.contents = [kind(group) for group in groups.values()]

    def matches(self, sources: Sequence[torch.Tensor]) -> bool:
        return (
            self.addresses == list(map(_address, sources))
            and self.versions == _versions(sources, self.all_counted)
            and all(c.unchanged() for c in self.contents)
        )


def _versions(sources: Sequence[torch.Tensor], all_counted: bool) -> list[int]:
    if all_counted:
        return list(map(_version, sources))
    return [-1 if s.is_inference() else s._version for s in sources]


class _Samples:
    """Evenly spaced elements of tensors of one dtype and device, read by one concatenation."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.views = [_strided(t) for t in tensors]
            self.now = self.views[0].new_empty(sum(v.numel() for v in self.views))
            self.before = self._read().clone()

    def _read(self) -> torch.Tensor:
        # Into memory of its own: autocast changes cat() of half-precision tensors, or refuses it.
        return torch.cat(self.views, out=self.now)

    def unchanged(self) -> bool:
        with torch.no_grad():
            self._read()
            # equal() of NaN is false: a model with NaN weights is folded at each call, and is right
            return bool(torch.equal(self.now, self.before))


class _Gathered(_Samples):
    """The same elements of CPU tensors, read by one gather from all memory: five times faster than ``cat``.

    They are compared by their bits, so that a NaN equals itself. The views keep the memory from being freed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.views = [v for v in map(_strided, tensors) if v.numel()]
            size = tensors[0].element_size()
            where = [v.data_ptr() + size * v.stride(0) * torch.arange(len(v)) for v in self.views]
            addresses = torch.cat(where)
            first, last = int(addresses.min()), int(addresses.max())
            memory = (ctypes.c_byte * (last + size - first)).from_address(first)
            self.memory = torch.frombuffer(memory, dtype=_BITS[size])
            self.index = (addresses - first) // size
            self.now = self.memory.new_empty(len(addresses))
            self.before = self._read().clone()

    def _read(self) -> torch.Tensor:
        return torch.index_select(self.memory, 0, self.index, out=self.now)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _samples(tensors: Sequence[torch.Tensor]) -> _Samples:
    size = tensors[0].element_size()
    can = tensors[0].device.type == "cpu" and size in _BITS and any(t.numel() for t in tensors)
    aligned = can and all(t.data_ptr() % size == 0 for t in tensors)
    return _Gathered(tensors) if aligned else _Samples(tensors)


class _Hash(_Samples):
    """A hash of every element: slow, complete."""

    def _read(self) -> torch.Tensor:
        return torch.stack([torch.hash_tensor(v) for v in self.views])

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.views = [t.detach() for t in tensors]
            self.before = self._read()

    def unchanged(self) -> bool:
        with torch.no_grad():
            return bool(torch.equal(self._read(), self.before))


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """A view of about SAMPLES elements spread over the whole storage of ``tensor``."""
    plain = tensor.detach()
    if plain.is_contiguous():
        flat = plain.view(-1)
    else:
        flat = plain.as_strided(
            (plain.untyped_storage().nbytes() // plain.element_size(),), (1,), 0
        )
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step]


def _same_layout(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and x.device == y.device
        and x.stride() == y.stride()
        for x, y in zip(a, b, strict=True)
    )


def _evictor(owner: weakref.ref[FreshWeights], key: tuple[int, ...]) -> Callable[[Any], None]:
    def evict(_: Any) -> None:
        weights = owner()
        if weights is not None:
            weights.drop(key)

    return evict


def _watch_optimizers() -> None:
    """Mark folded weights as changed after any optimizer's step (fused steps move no version counter)."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    entries = list(_folded)
    if not entries:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for entry in entries:
        if not stepped.isdisjoint(entry.ids):
            entry.changed = True
