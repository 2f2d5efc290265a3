"""Sets of things that must be treated alike, grown by pairs (union-find)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Pairs(Generic[T]):
    """Disjoint sets; what was never joined is a set of its own."""

    def __init__(self) -> None:
        self._parent: dict[T, T] = {}

    def find(self, item: T) -> T:
        """The representative of the set of ``item``."""
        root = item
        while (above := self._parent.get(root, root)) != root:
            root = above
        while item != root:  # shorten the way for the next time
            above = self._parent[item]
            self._parent[item] = root
            item = above
        return root

    def join(self, a: T, b: T) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[b] = a

    def sets(self, items: Iterable[T]) -> dict[T, list[T]]:
        """The sets that ``items`` fall into, by representative, in order."""
        found: dict[T, list[T]] = {}
        for item in items:
            found.setdefault(self.find(item), []).append(item)
        return found
