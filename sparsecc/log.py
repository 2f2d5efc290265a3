"""Logging under the name ``sparsecc`` (``TORCH_LOGS="+sparsecc"`` works), and artifacts for tlparse."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch._logging._internal import trace_structured

log = logging.getLogger("sparsecc")


def artifact(name: str, payload: Callable[[], str]) -> None:
    """Put a text into the structured trace (``TORCH_TRACE``); ``payload`` is called only when it is on."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"sparsecc_{name}", "encoding": "string"},
        payload_fn=payload,
    )
