"""The stages of a compile: what every dump is made of."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

from sparsecc.errors import OptionsError, unknown
from sparsecc.program import Program


@dataclass
class Stage:
    """A program after one step: "captured", "canonical", a pass's name, or "lowered"."""

    name: str
    program: Program


@dataclass
class GraphStages:
    """Every stage of one captured graph, in order."""

    index: int
    stages: list[Stage]


def choose(
    graphs: list[GraphStages], stage: str = "all", graph: int | None = None
) -> list[GraphStages]:
    """The graphs and stages that the user named.

    Raises:
        OptionsError: no such graph or stage; the message names the ones there are.
    """
    if graph is not None:
        found = [g for g in graphs if g.index == graph]
        if not found:
            there = ", ".join(str(g.index) for g in graphs) or "none"
            raise OptionsError(f"no graph {graph} was captured. There are: {there}.")
        graphs = found
    if stage == "all":
        return graphs
    chosen = [GraphStages(g.index, [s for s in g.stages if s.name == stage]) for g in graphs]
    chosen = [g for g in chosen if g.stages]
    if not chosen:
        names = dict.fromkeys(s.name for g in graphs for s in g.stages)
        raise OptionsError(unknown("stage", stage, [*names, "all"]))
    return chosen


def write_folder(*args: Any, **kwargs: Any) -> list[pathlib.Path]:
    """See :func:`sparsecc.dump.folder.write_folder`."""
    from sparsecc.dump.folder import write_folder as write

    return write(*args, **kwargs)
