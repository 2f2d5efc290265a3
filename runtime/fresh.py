"""Folded weights that never go stale.

At each call the source weights are compared with what they were when they were folded: identity, address and
version of each, and a sampled content check (PyTorch's version counters miss ``p.data.mul_()``, fused
optimizer steps and BatchNorm statistics). An optimizer's step marks its parameters as changed. Whatever
differs is folded again, in place and without recompiling.
"""

from __future__ import annotations

import pathlib
import threading
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsecc.runtime.native import Later, extension

Fold = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]

SAMPLES = 16  # elements of each source that the content check reads

_SOURCE = pathlib.Path(__file__).with_name("fresh.cpp")
_native = Later(
    lambda: extension("sparsecc_fresh", _SOURCE.read_text(encoding="utf-8")).Watch,
    "weights are checked in Python, which is slower",
)
_version = attrgetter("_version")
_address = torch.Tensor.data_ptr
_folded: weakref.WeakSet[_Entry] = weakref.WeakSet()
_hook: Any = None


class FreshWeights:
    """The folded weights of one compiled graph.

    Args:
        fold: evaluates all weight expressions from the sources.
        positions: of the sources among the graph's arguments.
        freshness: "probe" (identity, address, version, samples), "version" (no samples) or "hash" (every
            element).
        in_place: write refreshed weights into the memory of the old ones, so that addresses hold still for CUDA
            graphs. False where they may be views of their sources, or have no strides.

    ``folds`` counts evaluations. Safe to call from several threads.
    """

    def __init__(
        self,
        fold: Fold,
        positions: Sequence[int],
        freshness: str = "probe",
        in_place: bool = True,
    ) -> None:
        self._fold, self._freshness, self._in_place = fold, freshness, in_place
        self._positions = list(positions)
        # One compiled layer may serve every layer of a model; an entry goes when its weights do.
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self._last: _Entry | None = None
        self._lock = threading.RLock()
        self.folds = 0
        _watch_optimizers()

    def get(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The folded weights for the present values of the sources among ``args``."""
        last = self._last
        if last is not None and last.fresh(args):
            return last.folded
        sources = [args[i] for i in self._positions]
        key = tuple(map(id, sources))
        entry = self._entries.get(key)
        if entry is None or entry is last or not entry.fresh(args):
            with self._lock:
                entry = self._entries.get(key)
                if entry is None or not entry.fresh(args):
                    entry = self._refold(entry, sources)
        self._last = entry
        return entry.folded

    def _refold(self, entry: _Entry | None, sources: Sequence[torch.Tensor]) -> _Entry:
        self.folds += 1
        key = tuple(map(id, sources))
        # What is compared later is read before the fold: a change during it shows at the next call.
        if entry is not None:
            entry.changed = False
        state = _State(self._positions, sources, self._freshness)
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
        if self._entries.pop(key, None) is self._last:
            self._last = None


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

    def fresh(self, args: tuple[Any, ...]) -> bool:
        state = self.state
        if self.changed or not state.matches(args):
            return False
        if state.watch is None and _native.get() is not None and state.plain:
            newer = state.again(args)
            if state.matches(
                args
            ):  # nothing changed before the newer look, and it sees what changes later
                self.state = newer
        return True


class _State:
    """What the sources looked like: which, where, their versions, and samples or a hash of their contents."""

    def __init__(
        self, positions: list[int], sources: Sequence[torch.Tensor], freshness: str
    ) -> None:
        self._positions, self._freshness = positions, freshness
        self.plain = all(type(s) in _PLAIN and s.layout is torch.strided for s in sources)
        # Tensors made in inference mode count no versions; their contents are checked all the same.
        self._all_counted = not any(s.is_inference() for s in sources)
        self._ids = list(map(id, sources))
        self._versions = self._count(sources)
        self._addresses = list(map(_address, sources))
        watch = _native.get() if self.plain else None
        groups: dict[Any, list[torch.Tensor]] = {}
        sampled: list[torch.Tensor] = []
        for source in sources if freshness != "version" else ():
            if watch is not None and freshness == "probe" and source.device.type == "cpu":
                sampled.append(source)
            else:
                groups.setdefault((source.dtype, source.device), []).append(source)
        kind = _Hash if freshness == "hash" else _Samples
        self._contents = [kind(group) for group in groups.values()]
        with torch.inference_mode(False), torch.no_grad():
            self._views = list(map(_strided, sampled))  # they keep the memory from being freed
            self.watch: Any = None
            if watch is not None:
                self.watch = watch(positions, list(sources), *_addresses(self._views))

    def again(self, args: tuple[Any, ...]) -> _State:
        """What they look like now."""
        return _State(self._positions, [args[i] for i in self._positions], self._freshness)

    def matches(self, args: tuple[Any, ...]) -> bool:
        same = self._same(args) if self.watch is None else self.watch.matches(args)
        return same and all(c.unchanged() for c in self._contents)

    def _same(self, args: tuple[Any, ...]) -> bool:
        sources = [args[i] for i in self._positions]
        return (
            self._ids == list(map(id, sources))
            and self._addresses == list(map(_address, sources))
            and self._versions == self._count(sources)
        )

    def _count(self, sources: Sequence[torch.Tensor]) -> list[int]:
        if self._all_counted:
            return list(map(_version, sources))
        return [-1 if s.is_inference() else s._version for s in sources]


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _addresses(views: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Where the elements of ``views`` lie, and how many have one, two, four and eight bytes."""
    found: dict[int, list[torch.Tensor]] = {1: [], 2: [], 4: [], 8: []}
    for view in views:
        size = view.element_size()
        where = view.data_ptr() + size * view.stride(0) * torch.arange(len(view))
        # A complex128 is two of eight bytes.
        found[min(size, 8)] += [where + offset for offset in range(0, size, 8)]
    each = [torch.cat([torch.empty(0, dtype=torch.int64), *group]) for group in found.values()]
    return torch.cat(each), tuple(map(len, each))


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
