"""What a suite hands to the judge: a model, its inputs, and whether it is trained too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class Case:
    """One thing to compile and compare.

    Attributes:
        model: a module (parameters and running statistics randomised already, eval mode) or a function.
        args / kwargs: inputs; fp32 where they float.
        train: compare one training step too (gradients of all parameters and float inputs).
        options: backend options beside those that the harness sets.
    """

    model: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    train: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


class Suite(Protocol):
    """A module of this folder: ``names`` is cheap and sorted, ``build`` makes the cases of one name.

    ``build`` raises :class:`NotBuildable` where the thing cannot be made here, with the reason.
    """

    def names(self) -> list[str]: ...

    def build(self, name: str) -> list[Case]: ...


class NotBuildable(Exception):
    """This name cannot be built here (a missing package, no small configuration): the reason."""
