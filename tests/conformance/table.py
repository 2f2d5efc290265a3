"""docs/conformance.md, written from the committed results: ``python -m conformance.table``."""

from __future__ import annotations

import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from conformance import runner
from conformance.runner import Row

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "conformance.md"
FUZZ = pathlib.Path(__file__).parents[1] / "fuzz" / "results.txt"
_HEAD = """# Conformance

What sparsecc does on PyTorch's own operator and module databases and on whole model zoos, beside PyTorch's
own backend. This page is written by `make conformance` from `tests/conformance/results`.

Every name is built with random parameters and running statistics, compiled with `floor=False` (the captured
program is compiled even where no rewrite applies, so that nothing passes by doing nothing), run in a process
of its own, and compared with fp64 leaf by leaf: outputs, written inputs, buffers, and after one training step
the gradients of all parameters and float inputs. The rule is that of [verify](verify.md): an error of at most
1.5 times eager's own. Where a single run misses it, the errors of six nearby inputs are pooled under the same
rule (a gradient counts as one sample a run). A gradient that is zero but for rounding (eager has no correct
digit of it: a key's bias under softmax) is held to 128 units of rounding of the largest gradient of its module.

- *pass*: right. *fell through*: right, but the graph went to PyTorch's backend untouched, with a reason.
- *wrong*: a value, gradient, shape or type that the rule does not allow. *error*: it raised, crashed, or
  passed its time or memory limit.
- *not compared*: eager itself raises, or the thing cannot be built here.
- *peer*: PyTorch's own backend at the same depth: `aot_eager` (PyTorch's autograd, no code generation) or
  `inductor`.
"""


def fails(row: Row) -> bool:
    """Worse than PyTorch's own backend: wrong, or an error where the peer has none."""
    if row["status"] == "error":
        return not row.get("peer", "").startswith("error")
    return row["status"] == "wrong"


def write(path: pathlib.Path = PAGE) -> None:
    path.write_text(page(list(runner.all_results())), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["lower"], row["suite"]), []).append(row)
    parts = [_HEAD, _totals(groups), _through(rows), _opaque(rows), _fuzz()]
    parts += [_details(suite, lower, group) for (lower, suite), group in sorted(groups.items())]
    return "\n".join(parts)


def _totals(groups: dict[tuple[str, str], list[Row]]) -> str:
    lines = [
        "## Totals",
        "",
        "*No graph* are passes where Dynamo gave no backend anything to compile. *Worse than the peer* is",
        "*wrong*, or *error* where the peer has none. *Norms* counts LayerNorms and RMSNorms, *with norms* the",
        "names that have some, *some rewritten* those of which a pass changed at least one.",
        "",
        "| suite | depth | compared | pass | no graph | fell through | wrong | error | peer: pass | wrong "
        "| error | worse than the peer | not compared | norms | rewritten | with norms | some rewritten |",
        "|" + "---|" * 17,
    ]
    for (lower, suite), rows in sorted(groups.items()):
        status = Counter(r["status"] for r in rows)
        compared = [r for r in rows if r["status"] not in ("eager fails", "not built")]
        peer = Counter(r.get("peer", "").split(":")[0] for r in compared)
        empty = sum(r["status"] == "pass" and not r.get("graphs") for r in rows)
        cells = [suite, lower, len(compared), status["pass"], empty]
        cells += [status[s] for s in ("fell through", "wrong", "error")]
        cells += [peer["pass"], peer["wrong"], peer["error"], sum(map(fails, rows))]
        cells += [len(rows) - len(compared)]
        cells += [sum(r.get(k, 0) for r in rows) for k in ("norms", "rewritten")]
        cells += [sum(r.get(k, 0) > 0 for r in rows) for k in ("norms", "rewritten")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _through(rows: Iterable[Row]) -> str:
    reasons = Counter(_general(r["words"]) for r in rows if r["status"] == "fell through")
    return _counted("## Why graphs fell through", "names", reasons)


def _opaque(rows: Iterable[Row]) -> str:
    reasons: Counter[str] = Counter()
    for row in rows:
        for reason, count in row.get("opaque", {}).items():
            reasons[_general(reason)] += count
    return _counted("## Why nodes stayed opaque", "nodes", reasons)


def _fuzz() -> str:
    """What is on record of the fuzzer's longest run."""
    lines = [
        "## Random programs",
        "",
        "What the longest run of `make fuzz` showed (tests/fuzz/results.txt):",
        "",
    ]
    text = FUZZ.read_text(encoding="utf-8").strip()
    return "\n".join([*lines, "```text", text, "```", ""])


def _counted(title: str, what: str, reasons: Counter[str]) -> str:
    if not reasons:
        return f"{title}\n\nNone.\n"
    order = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    lines = [title, "", f"| {what} | reason |", "|---|---|"]
    lines += [f"| {count} | {_cell(reason)} |" for reason, count in order]
    return "\n".join(lines) + "\n"


def _general(reason: str) -> str:
    """Without the names of nodes and numbers, so that equal reasons count as one."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)
    reason = re.sub(r"\b(input|at|node) \w+", r"\1 …", reason)
    return re.sub(r"\b\w*_?\d+\b|^\w+(?= changes the shape)", "…", reason)[:140]


def _details(suite: str, lower: str, rows: Sequence[Row]) -> str:
    with_norms = any(r.get("norms") for r in rows)
    head = ["name", "status", "peer", "graphs", "breaks"]
    head += ["norms", "rewritten", "rewrites", "refused"] if with_norms else []
    lines = [
        f"<details><summary>{suite}, {lower}: {len(rows)} names</summary>",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in sorted(rows, key=lambda r: r["name"]):
        cells = [row["name"], _status(row), row.get("peer", "").split(":")[0]]
        cells += [row.get("graphs", 0), row.get("graph_breaks", 0)]
        if with_norms:
            cells += [row.get("norms", 0), row.get("rewritten", 0)]
            cells += [_counts(row.get("rewrites", {})), _counts(row.get("refused", {}))]
        lines.append("| " + " | ".join(_cell(str(c)) for c in cells) + " |")
    return "\n".join([*lines, "", "</details>", ""])


def _status(row: Row) -> str:
    words = row.get("words", "")
    if not words or row["status"] == "pass":
        return str(row["status"])
    beside = f" (Inductor: {row['inductor'].split(':')[0]})" if row.get("inductor") else ""
    return f"{row['status']}{beside}: {words}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _cell(text: str) -> str:
    for old, new in (("|", "\\|"), ("<", "&lt;"), ("\n", " "), ("](", "] (")):
        text = text.replace(old, new)
    return text if len(text) <= 160 else text[:157] + "…"


if __name__ == "__main__":
    write()
