"""How an operator of ``sparsecc::`` is registered: as its meaning, and as a twin that kernels run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("sparsecc", "FRAGMENT")


def define(
    name: str, signature: str, meaning: Callable[..., Any], shapes: Callable[..., Any]
) -> tuple[OpOverload, OpOverload]:
    """The operators ``name`` and ``<name>_native``, of one signature.

    Args:
        meaning: in ATen. The first operator is composite: wherever it is traced through, it is its meaning.
        shapes: the results of the second one as empty tensors, for fake ones. It is opaque, and its devices
            register what runs it.
    """
    _LIBRARY.define(name + signature)
    _LIBRARY.define(f"{name}_native{signature}")
    _LIBRARY.impl(name, meaning, "CompositeImplicitAutograd")
    torch.library.register_fake(f"sparsecc::{name}_native", shapes, lib=_LIBRARY)
    packets = (getattr(torch.ops.sparsecc, each) for each in (name, f"{name}_native"))
    composite, native = (packet.default for packet in packets)
    return composite, native
