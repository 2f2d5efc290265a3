"""How an operator of ``sparsecc::`` is registered: as its meaning, and as a twin that kernels run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("sparsecc", "FRAGMENT")


def define_meaning(name: str, signature: str, meaning: Callable[..., Any]) -> OpOverload:
    """The composite operator ``name``: wherever it is traced through, it is its meaning, in ATen."""
    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, meaning, "CompositeImplicitAutograd")
    composite: OpOverload = getattr(torch.ops.sparsecc, name).default
    return composite


def define(
    name: str, signature: str, meaning: Callable[..., Any], shapes: Callable[..., Any]
) -> tuple[OpOverload, OpOverload]:
    """The operators ``name`` and ``<name>_native``, of one signature.

    Args:
        meaning: in ATen. The first operator is composite: wherever it is traced through, it is its meaning.
        shapes: the results of the second one as empty tensors, for fake ones. It is opaque, and its devices
            register what runs it.
    """
    composite = define_meaning(name, signature, meaning)
    _LIBRARY.define(f"{name}_native{signature}")
    torch.library.register_fake(f"sparsecc::{name}_native", shapes, lib=_LIBRARY)
    native: OpOverload = getattr(torch.ops.sparsecc, f"{name}_native").default
    return composite, native
