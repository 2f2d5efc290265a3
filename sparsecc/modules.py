"""Modules by patterns of their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch

from sparsecc.errors import OptionsError, unknown


def named(
    model: torch.nn.Module,
    patterns: Sequence[str] | str,
    kinds: type[Any] | tuple[type[Any], ...] = torch.nn.Module,
) -> dict[str, Any]:
    """The modules whose names match one of ``patterns`` ("*.mlp.down_proj"), in the model's order.

    Args:
        kinds: of which classes; others of the same names are not meant.
    Raises:
        OptionsError: a pattern matches no such module; the message names the nearest one.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    there = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for pattern in wanted:
        if not fnmatch.filter(there, pattern):
            raise OptionsError(unknown(f"{_words(kinds)} in the model:", pattern, there))
    return {
        name: module
        for name, module in there.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    }


def _words(kinds: type[Any] | tuple[type[Any], ...]) -> str:
    classes = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(kind.__name__ for kind in classes)
