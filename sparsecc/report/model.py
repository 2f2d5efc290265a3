"""``Report``: what matched, what was refused and why, what it cost, and how far from fp64 it is."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class MatchRecord:
    """One place that a pass looked at. ``status`` is "applied", "refused" or "skipped" (out of fuel)."""

    status: str
    node: str
    module: str = ""
    where: str = ""
    note: str = ""
    code: str = ""
    reason: str = ""
    blame: str = ""
    blame_where: str = ""


@dataclass
class PassReport:
    """What one pass did, over all graphs of a compile.

    ``applied`` and ``refused`` are counts; ``matches`` holds one record for each place looked at.
    """

    name: str
    family: str = ""
    law: str = ""
    exactness: str = ""
    matches: list[MatchRecord] = field(default_factory=list)
    seconds: float = 0.0
    bytes_saved: int = 0
    flops_saved: int = 0
    launches_saved: int = 0

    @property
    def applied(self) -> int:
        return sum(m.status == "applied" for m in self.matches)

    @property
    def refused(self) -> int:
        return sum(m.status == "refused" for m in self.matches)

    @property
    def refusals(self) -> list[MatchRecord]:
        return [m for m in self.matches if m.status == "refused"]


@dataclass
class TensorError:
    """Errors of one output against the fp64 reference (root mean square, and the largest element)."""

    name: str
    eager_rmse: float
    rmse: float
    eager_max: float
    max: float
    bound_rmse: float
    bound_max: float
    passed: bool

    @property
    def ratio(self) -> float:
        return self.rmse / self.eager_rmse if self.eager_rmse > 0 else float(self.rmse > 0)


@dataclass
class Verdict:
    """The outcome of one proof. ``stage`` is a pass's name, or "final" for the compiled graph."""

    stage: str
    passed: bool
    tensors: list[TensorError] = field(default_factory=list)
    algebra: float = 0.0  # largest relative difference of the two programs, both in fp64
    loss: float | None = None  # of a lossy program: relative root mean square error, both in fp64
    skipped: str = ""  # why nothing could be checked
    diverges: str = ""  # first node whose fp64 value differs
    diverges_where: str = ""
    reproduce: str = ""

    @property
    def worst_ratio(self) -> float:
        return max((t.ratio for t in self.tensors), default=0.0)


@dataclass
class KernelChoice:
    """What runs one region: "cpp" or "aten", with the seconds of both where they were measured."""

    region: str
    shape: str
    chosen: str
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""  # why it was not measured
    count: int = 1  # regions of this form
    source: str = ""  # the file of the kernel's generated source


@dataclass
class GraphReport:
    """One captured graph: its size, what became of it, and where the time went."""

    index: int
    nodes: int = 0
    opaque: dict[str, str] = field(default_factory=dict)
    trains: bool = False
    fell_through: str = ""  # why the graph went to Inductor untouched ("" when it was rewritten)
    folded: int = 0
    folded_bytes: int = 0
    packed: int = 0  # weights in a layout of the CPU's kernels
    kernels: list[KernelChoice] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, PassReport] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)


@dataclass
class Report:
    """Everything sparsecc has to say about one compile.

    ``report["layernorm-to-rmsnorm"].applied`` sums over graphs. Truthful about what it did not do: graph
    breaks, graphs that fell through, nodes that stayed opaque.
    """

    model: str = ""
    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    path: str = ""  # where the report is written after each graph ("" nowhere)

    def __getitem__(self, name: str) -> PassReport:
        """The pass's record over all graphs.

        Raises:
            KeyError: no such pass ran.
        """
        found = [g.passes[name] for g in self.graphs if name in g.passes]
        if not found:
            raise KeyError(f"pass {name!r} did not run; these did: {', '.join(self.pass_names())}")
        total = PassReport(name, found[0].family, found[0].law, found[0].exactness)
        for record in found:
            total.matches.extend(record.matches)
            total.seconds += record.seconds
            total.bytes_saved += record.bytes_saved
            total.flops_saved += record.flops_saved
            total.launches_saved += record.launches_saved
        return total

    def __deepcopy__(self, memo: Any) -> Report:
        """The same report: it is a place to write to, and others copy options (transformers' ``generate``)."""
        return self

    def __contains__(self, name: object) -> bool:
        return name in self.pass_names()

    def __iter__(self) -> Iterator[PassReport]:
        return (self[name] for name in self.pass_names())

    def pass_names(self) -> list[str]:
        return list(dict.fromkeys(name for g in self.graphs for name in g.passes))

    @property
    def coverage(self) -> float:
        """Share of captured nodes that lie in graphs brought fully to ATen (opaque nodes count against)."""
        nodes = sum(g.nodes for g in self.graphs)
        lost = sum(
            g.nodes if g.fell_through.startswith("capture") else len(g.opaque) for g in self.graphs
        )
        return 1.0 if nodes == 0 else 1.0 - lost / nodes

    @property
    def fallbacks(self) -> list[str]:
        return [f"graph {g.index}: {g.fell_through}" for g in self.graphs if g.fell_through]

    @property
    def verdicts(self) -> list[Verdict]:
        return [v for g in self.graphs for v in g.verdicts]

    @property
    def verified(self) -> bool:
        """Whether a proof ran and every one passed."""
        ran = [v for v in self.verdicts if not v.skipped]
        return bool(ran) and all(v.passed for v in ran)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["summary"] = {
            record.name: {
                "applied": record.applied,
                "refused": record.refused,
                "exactness": record.exactness,
                "seconds": record.seconds,
            }
            for record in self
        }
        data["coverage"] = self.coverage
        data["fallbacks"] = self.fallbacks
        return data

    def to_json(self, path: str | pathlib.Path | None = None) -> str:
        """The report as JSON text; also written to ``path`` when given."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str)
        if path is not None:
            pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def save(self) -> None:
        """Write to ``path``, as its ending says."""
        if self.path.endswith(".html"):
            self.to_html(self.path)
        elif self.path:
            self.to_json(self.path)

    def to_html(self, path: str | pathlib.Path | None = None) -> str:
        """The report as one self-contained page; also written to ``path`` when given."""
        from sparsecc.report.page import render

        text = render(self)
        if path is not None:
            pathlib.Path(path).write_text(text, encoding="utf-8")
        return text

    def __rich__(self) -> Any:
        from sparsecc.report.text import render

        return render(self)

    def __str__(self) -> str:
        from sparsecc.report.text import to_text

        return to_text(self)
