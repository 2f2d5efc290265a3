"""Runs names of a suite, each in a process of its own with a time and a memory limit; resumable.

The parent imports everything once and forks, so a name costs its own work and no start-up. A child that
crashes, hangs or grows too large is an outcome, and costs no other name anything.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from conformance.case import NotBuildable, Suite

RESULTS = pathlib.Path(__file__).with_name("results")
Row = dict[str, Any]


def load(suite: str) -> Suite:
    found: Any = importlib.import_module(f"conformance.{suite}_suite")
    return found


@dataclass
class Limits:
    """What one name may use, and how many run at once."""

    seconds: float = 120.0
    mib: float = 6000.0
    jobs: int = 2


@dataclass
class _Child:
    name: str
    process: Any
    pipe: Any
    started: float
    peer_for: Row | None = None
    killed: str = ""
    row: Row | None = field(default=None)


def run(
    suite: str,
    names: Sequence[str],
    lower: str,
    limits: Limits | None = None,
    finished: Callable[[Row], None] = lambda row: None,
    source: Suite | None = None,
) -> list[Row]:
    """Judge every name; ``finished`` is called with each row as it comes."""
    limits = limits or Limits()
    source = source or load(suite)
    _prepare()
    waiting: list[tuple[str, Row | None]] = [(name, None) for name in reversed(names)]
    active: list[_Child] = []
    rows: list[Row] = []
    try:
        while waiting or active:
            while waiting and len(active) < limits.jobs:
                name, peer_for = waiting.pop()
                active.append(_start(source, name, lower, peer_for))
            multiprocessing.connection.wait([c.pipe for c in active], timeout=0.2)
            for child in list(active):
                if not _settled(child, limits):
                    continue
                active.remove(child)
                row = _row(suite, lower, child, limits)
                if child.row is None and child.peer_for is None:
                    waiting.append((child.name, row))  # what does the peer do where we crashed?
                    continue
                rows.append(row)
                finished(row)
    finally:
        for child in active:
            _kill(child, "interrupted")
    return rows


def _prepare() -> None:
    """What must stand before the first fork: heavy imports done, no thread pool of torch's used."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import conformance.judge  # noqa: F401
    import torch
    import torch._dynamo.backends.registry
    import torch._functorch.aot_autograd
    import torch._inductor.compile_fx

    torch.set_num_threads(1)


def _start(source: Suite, name: str, lower: str, peer_for: Row | None) -> _Child:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    work = _peer_alone if peer_for is not None else _judge
    process = context.Process(target=_child, args=(send, work, source, name, lower), daemon=False)
    process.start()
    send.close()
    return _Child(name, process, receive, time.monotonic(), peer_for)


def _child(pipe: Any, work: Callable[..., Row], source: Suite, name: str, lower: str) -> None:
    os.setsid()  # with whatever it starts (a C++ compiler), one group to kill
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import torch

    # A model may compile something by Inductor, whose pool of threads did not come along with the fork.
    torch._inductor.config.compile_threads = 1
    pipe.send(work(source, name, lower))
    pipe.close()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    os._exit(0)  # no clean-up of a state that a fork shares


def _judge(source: Suite, name: str, lower: str) -> Row:
    from conformance.judge import Outcome, judge, merge

    try:
        cases = source.build(name)[: 1 if lower == "inductor" else None]  # minutes a case
        return merge([judge(case, lower=lower) for case in cases]).to_json()
    except NotBuildable as error:
        return Outcome("not built", str(error)).to_json()
    except Exception as error:  # a defect of the suite or of the harness must show
        return Outcome("error", f"harness: {type(error).__name__}: {error}").to_json()


def _peer_alone(source: Suite, name: str, lower: str) -> Row:
    from conformance.judge import peer_alone

    return {"peer": peer_alone(source.build(name), lower)}


def _settled(child: _Child, limits: Limits) -> bool:
    """Whether the child has answered, ended, or had to be killed."""
    if child.pipe.poll():
        try:
            child.row = child.pipe.recv()
        except EOFError:
            child.row = None
        child.process.join(timeout=5)
        _kill(child, "")
        return True
    if not child.process.is_alive():
        child.process.join()
        return True
    if time.monotonic() - child.started > limits.seconds:
        _kill(child, f"time-out: more than {limits.seconds:g} s")
        return True
    if _rss(child.process.pid) > limits.mib:
        _kill(child, f"memory: more than {limits.mib:g} MiB")
        return True
    return False


def _kill(child: _Child, why: str) -> None:
    child.killed = why
    if child.process.is_alive():
        try:
            os.killpg(child.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # before it made its group
            child.process.kill()
    child.process.join()


def _rss(pid: int) -> float:
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _row(suite: str, lower: str, child: _Child, limits: Limits) -> Row:
    head = {"suite": suite, "name": child.name, "lower": lower}
    if child.peer_for is not None:
        peer = child.row["peer"] if child.row is not None else f"error: {_end(child)}"
        return {**child.peer_for, "peer": peer}
    if child.row is not None:
        return {**head, **child.row}
    return {**head, "status": "error", "words": _end(child)}


def _end(child: _Child) -> str:
    code = child.process.exitcode
    if child.killed:
        return child.killed
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"the process ended with {code} and no result"


# ---- the file of results -------------------------------------------------------------------------


def read(path: pathlib.Path) -> dict[tuple[str, str, str], Row]:
    """The last row of every (suite, name, depth)."""
    found: dict[tuple[str, str, str], Row] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["suite"], row["name"], row["lower"]] = row
    return found


def append(path: pathlib.Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def compact(path: pathlib.Path) -> None:
    """One line a name, in order: what is committed."""
    rows = sorted(read(path).values(), key=lambda r: (r["suite"], r["lower"], r["name"]))
    path.write_text("".join(map(_line, rows)), encoding="utf-8")


def all_results(folder: pathlib.Path = RESULTS) -> Iterable[Row]:
    for path in sorted(folder.glob("*.jsonl")):
        yield from read(path).values()


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
