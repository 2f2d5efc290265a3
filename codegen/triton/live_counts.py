"""Counts of live neurons on GPUs, by the label of a spec: kept on the device, and read when they are asked for.

Kernels add to them in the order of their stream, without a synchronisation and without atomics; calls of one
label that run at once on several streams may lose counts.
"""

from __future__ import annotations

import torch

# calls, rows, live neurons, and those that are live for any row, by label and device; neurons of the network
_totals: dict[tuple[str, torch.device], tuple[torch.Tensor, int]] = {}


def totals(label: str, neurons: int, device: torch.device) -> torch.Tensor:
    """Where the kernels of ``label`` add to: int64 ``[4]``, of calls, rows, live and union of live."""
    found, known = _totals.get((label, device), (None, neurons))
    if found is None or known != neurons:
        found = torch.zeros(4, dtype=torch.int64, device=device)
        _totals[label, device] = found, neurons
    return found


def counters() -> dict[str, list[tuple[int, int, int, int, int]]]:
    """Calls, rows, live, union of live and neurons since the last reset, by label, of each device.

    Waits for the kernels that count.
    """
    counts: dict[str, list[tuple[int, int, int, int, int]]] = {}
    for (label, _), (found, neurons) in _totals.items():
        calls, rows, live, union_live = found.tolist()
        counts.setdefault(label, []).append((calls, rows, live, union_live, neurons))
    return counts


def reset_counters() -> None:
    """All counts are zero again, where they are: a captured CUDA graph goes on adding to them."""
    for found, _ in _totals.values():
        found.zero_()
