"""How the kernels of problems are cut: as measuring found, else the first cut that is worth measuring."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

C = TypeVar("C")


class Problem(Protocol[C]):
    """What a kernel is built for; it can be hashed."""

    def configs(self) -> list[C]:
        """Those worth measuring, the one to take unmeasured first."""
        ...


class Cuts(Generic[C]):
    """The choices of one operator."""

    def __init__(self) -> None:
        self.chosen: dict[Problem[C], C] = {}

    def choose(self, problem: Problem[C], config: C) -> None:
        """Cut the kernels of ``problem`` so from now on: what was measured to be the fastest."""
        self.chosen[problem] = config

    def of(self, problem: Problem[C]) -> C:
        """The cut to take where the caller says none."""
        return self.chosen.get(problem) or problem.configs()[0]
