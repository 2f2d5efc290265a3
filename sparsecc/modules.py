"""Modules by patterns of their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

import torch

from sparsecc.errors import OptionsError, unknown


def listed(patterns: Sequence[str] | str) -> list[str]:
    """One pattern, or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matching(names: Collection[str], patterns: Sequence[str] | str, kind: str) -> list[str]:
    """Which of ``names`` match one of ``patterns``, in the order of the names.

    Args:
        kind: what is named, in the words of an error.
    Raises:
        OptionsError: there are no patterns, or one matches nothing; the message names the nearest name.
    """
    wanted = listed(patterns)
    if not wanted:
        raise OptionsError(f"no pattern of a {kind} is given. There are: {', '.join(names)}.")
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise OptionsError(unknown(kind, pattern, names))
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in wanted)]


def named(
    model: torch.nn.Module, patterns: Sequence[str] | str, kind: type[Any] = torch.nn.Module
) -> dict[str, Any]:
    """The modules of a class whose names match one of ``patterns`` ("*.mlp.down_proj"), in the model's order.

    Raises:
        OptionsError: a pattern matches no such module.
    """
    there = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    words = f"{kind.__name__} of the model:"
    return {name: there[name] for name in matching(there, patterns, words)}
