"""``Pass``: a rewrite with its law, its legality, its exactness and its cost.

A pass is a frozen dataclass; its fields are its options. ``find`` proposes matches, ``check`` answers None
(legal) or a :class:`Refusal`, ``rewrite`` edits the graph. ``check`` never edits, ``rewrite`` never decides.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

from sparsecc.errors import OptionsError, unknown
from sparsecc.program import Program, module_path, source_line

T = TypeVar("T")


class Exactness(enum.Enum):
    """How equal the rewritten program is to the original."""

    BITWISE = "bitwise"  # the same bits
    EXACT = "exact"  # equal in real arithmetic; rounding differs
    LOSSY = "lossy"  # another function; needs a budget, never runs unasked


@dataclass(frozen=True)
class Saving:
    """What one match saves per call, as counted from shapes (negative: it costs)."""

    bytes: int = 0
    flops: int = 0
    launches: int = 0

    def __add__(self, other: Saving) -> Saving:
        return Saving(
            self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches
        )


@dataclass
class Match:
    """One place where a pass applies. ``nodes`` are the roles that the pass gave to graph nodes.

    ``where`` is the user's source line and ``module`` the user's module, both taken when the match was made.
    """

    node: fx.Node
    nodes: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    name: str = ""
    where: str = ""
    module: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or self.node.name
        self.where = self.where or source_line(self.node)
        self.module = self.module or module_path(self.node)


@dataclass(frozen=True)
class Refusal:
    """Why a match is not legal (or does not pay): a stable code, words, and the node to blame."""

    code: str
    reason: str
    node: str = ""
    where: str = ""

    @classmethod
    def at(cls, node: fx.Node, code: str, reason: str) -> Refusal:
        return cls(code, reason, node.name, source_line(node))


class Analyses:
    """Facts about one program, computed when asked for and dropped when the graph changes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._cache: dict[Callable[..., Any], tuple[int, Any]] = {}

    def get(self, build: Callable[[Program, Analyses], T]) -> T:
        version, value = self._cache.get(build, (-1, None))
        if version != self.program.version:
            value = build(self.program, self)
            self._cache[build] = (self.program.version, value)
        result: T = value
        return result


# Refusals of passes that fold weights, where the fold would be evaluated anew at each call.
RECOMPUTED: Mapping[str, str] = {
    "training": "folding in every step costs more than it saves; name the pass to force it",
    "gathered": "FSDP gathers the weights anew for each call, so nothing folded could be kept; name the "
    "pass to force it",
}


@dataclass
class Context:
    """What a pass may look at: the program, analyses, and whether the user named the pass."""

    program: Program
    analyses: Analyses
    explicit: bool = False

    @property
    def trains(self) -> bool:
        return self.program.trains

    def recomputed(self, node: fx.Node) -> Refusal | None:
        """A refusal of ``RECOMPUTED`` where what is folded could not be kept and the pass was not named."""
        if self.explicit or not self.program.recomputes:
            return None
        code = "training" if self.trains else "gathered"
        return Refusal.at(node, code, RECOMPUTED[code])


@dataclass(frozen=True)
class Example:
    """One pair of small functions that must agree: the law, made executable.

    ``before`` and ``after`` take the same tensors. ``inputs`` maps each to a shape over named sizes; those in
    ``weights`` are parameters. ``options`` are keyword arguments with the values to try. ``symbolic`` says
    that both use arithmetic, ``@``, ``mean``, ``sum``, ``transpose`` and slices alone, so that SymPy can prove
    them.
    """

    before: Callable[..., Any]
    after: Callable[..., Any]
    inputs: Mapping[str, tuple[str, ...]]
    weights: Sequence[str] = ()
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    symbolic: bool = False


class Pass(ABC):
    """Base of all passes. Subclasses are frozen dataclasses whose fields are the pass's options."""

    name: ClassVar[str]
    family: ClassVar[str]
    law: ClassVar[str]
    source: ClassVar[str]
    exactness: ClassVar[Exactness]
    refusals: ClassVar[Mapping[str, str]] = {}  # code -> when the pass refuses so
    pays: ClassVar[str] = ""

    @abstractmethod
    def find(self, context: Context) -> list[Match]:
        """Every place that looks like the left side of the law, legal or not."""

    def check(self, match: Match, context: Context) -> Refusal | None:
        """None when the rewrite is legal here; otherwise why not."""
        return None

    @abstractmethod
    def rewrite(self, match: Match, context: Context) -> None:
        """Edit the graph at one legal match."""

    def saving(self, match: Match, context: Context) -> Saving:
        """What the match saves, counted from shapes before the rewrite."""
        return Saving()

    @classmethod
    def examples(cls) -> list[Example]:
        """Executable forms of the law, for the generic law test."""
        return []

    @classmethod
    def option_names(cls) -> list[str]:
        return [f.name for f in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> Pass:
        """Build the pass from user options.

        Raises:
            OptionsError: an unknown field, or a value that the pass does not take.
        """
        for key in options:
            if key not in cls.option_names():
                raise OptionsError(
                    f"pass {cls.name!r}: " + unknown("option", key, cls.option_names())
                )
        return cls(**options)


@dataclass(frozen=True)
class RegionPass(Pass):
    """Base of the passes that make regions for generated kernels.

    Attributes:
        least: bytes that a region reads at each call; where it is fewer, a kernel's compilation does not pay.
        devices: kinds of devices on which regions are made.
    """

    least: int = 0
    devices: Sequence[str] = ("cpu", "cuda")

    SMALL: ClassVar[str] = "reads fewer bytes at a call than `least`"
    DEVICE: ClassVar[str] = "is on none of `devices`"

    def __post_init__(self) -> None:
        least: Any = self.least  # the user's
        if isinstance(least, bool) or not isinstance(least, int) or least < 0:
            raise OptionsError(f"pass {self.name!r}: 'least' is in bytes, not {least!r}.")
        for device in (self.devices,) if isinstance(self.devices, str) else self.devices:
            if device not in ("cpu", "cuda"):
                raise OptionsError(
                    f"pass {self.name!r}: " + unknown("device", device, ("cpu", "cuda"))
                )

    def unworthy(self, node: fx.Node, read: Iterable[fx.Node]) -> Refusal | None:
        """A refusal where the region at ``node`` is on another device, or ``read`` is less than ``least``."""
        device = node.meta["val"].device.type
        if device not in self.devices:
            return Refusal.at(node, "device", f"{device} {self.DEVICE}: {', '.join(self.devices)}")
        size = sum(map(nbytes, read))
        if size < self.least:
            return Refusal.at(node, "small", f"{self.SMALL}: {size} of {self.least}")
        return None


def numel(node: fx.Node) -> int:
    """Elements in the node's value, symbolic sizes by their hint (0 for values that are not tensors)."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    sizes: list[Any] = list(value.shape)
    return math.prod(s if isinstance(s, int) else int(s.node.hint or 1) for s in sizes)


def nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return numel(node) * value.element_size() if isinstance(value, torch.Tensor) else 0
