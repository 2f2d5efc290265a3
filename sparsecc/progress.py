"""A progress bar on stderr, where somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], label: str, wanted: bool | None = None) -> Iterator[T]:
    """``items``, with a bar while they are taken; ``wanted``: None on a terminal only, else always or never."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    # A terminal shows it while it lasts; a log keeps its last line.
    yield from track(items, label, total=total, console=console, transient=console.is_terminal)
