"""Is the backend right on one case? Results, gradients, written inputs, weights and Dynamo's graph.

fp64 is the reference, computed by the program's own lines. The rewritten program must agree with it in fp64 to
``ALGEBRA``, and what really ran must be as near to it as eager is, by the rule of ``sparsecc.proof.compare``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from fuzz.case import Case
from fuzz.observe import Seen, modes, nearby, observe, relative, same, sane, truth, wide
from fuzz.trace import Reader, dynamo_like, read
from torch import fx

import sparsecc
from sparsecc import driver, pipeline
from sparsecc.capture import from_dynamo
from sparsecc.errors import CaptureError
from sparsecc.instruments import Snapshots
from sparsecc.options import Options
from sparsecc.passes.base import Pass
from sparsecc.program import Program
from sparsecc.proof import ALGEBRA, compare
from sparsecc.report.model import GraphReport
from sparsecc.shadow import Fp64

# Of nearby inputs, where one comparison of two draws of rounding noise is too close to call. Where gradients of
# small tensors differ by a factor of two from draw to draw, eight do not settle a rule of 1.5.
SAMPLES = (8, 64)
MOVED = 2.0**-5  # several units of bfloat16, the coarsest rounding in a program


class Wrong(AssertionError):
    """The backend is wrong on a case; ``kind`` says how (stable, so that shrinking keeps to it)."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind}: {words}")
        self.kind = kind


@dataclass
class Outcome:
    """What was seen of a case that is right."""

    mode: str = ""
    applied: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Ordered(Options):
    """Options whose rewrites run in another order than the pipeline's."""

    order: tuple[str, ...] = ()

    def pipeline(self) -> list[Pass]:
        chosen = {p.name: p for p in super().pipeline()}
        return [chosen[name] for name in self.order if name in chosen]


def check(case: Case) -> Outcome:
    """Compile and run ``case``.

    Raises:
        Wrong: what the backend did wrong.
    """
    outcome = Outcome(_mode(case))
    with modes(case):
        tensors = case.build()
        eager, exact = _truth(case.program)
        judge = _Judge(case, outcome)
        if case.compile:
            run = _through_dynamo(case, tensors, outcome)
        else:
            compiled = _on_graph(case, tensors, outcome)
            if compiled is None:
                return outcome
            run, program = compiled
            judge.algebra(program, exact)
        judge.run = run
        try:
            judge.rounding(run, tensors, eager, exact)
        except RuntimeError as error:
            if case.compile != "aot_eager" or not _peer_raises(case, str(error)):
                raise
            outcome.notes["raises, as PyTorch's aot_eager does"] += 1
            return outcome
        if case.update:
            judge.after_update(tensors)
    return outcome


def compile_only(case: Case) -> Outcome:
    """What the passes do to a case, without running it."""
    outcome = Outcome(_mode(case))
    with modes(case):
        _on_graph(case, case.build(), outcome)
    return outcome


# ---- compiling ---------------------------------------------------------------------------------------


def _options(case: Case, report: sparsecc.Report, **more: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"report": report, "floor": False, **more}
    if case.passes is not None:
        chosen["passes"] = dict(case.passes)
    return chosen


def _on_graph(
    case: Case, tensors: dict[str, torch.Tensor], outcome: Outcome
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The driver on a Dynamo-like graph: what it returns, and the rewritten program in fp64."""
    options = _parsed(case)

    def arguments(values: Sequence[torch.Tensor]) -> list[Any]:
        held = dict(zip(tensors, values, strict=True))
        return [read(held, r) for r in readers]

    record = GraphReport(0)
    options.report.graphs.append(record)
    try:  # what the driver does, without its ways of falling through
        gm, readers, captured = _captured(case.program)
        program, before, guards = captured.copy(), _fingerprint(gm), _guards(gm)
        inputs = arguments(list(tensors.values()))
        pipeline.run(program, options, record)
        added = [g for g in _guards(gm)[len(guards) :] if excludes(g, guards)]
        compiled = driver._compile(program, inputs, options, None, record, ())
    except CaptureError as error:
        outcome.notes[f"capture: {str(error).split(' (')[0]}"] += 1
        return None
    except NotImplementedError as error:
        outcome.notes[str(error)] += 1
        return None
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"raises {type(error).__name__}", str(error)) from error
    if _fingerprint(gm) != before:
        raise Wrong("Dynamo's graph", "was changed")
    if added:
        _captured.cache_clear()  # its guards are not as they were
        raise Wrong("guard", f"a rewrite added {added}")
    _count(options.report, outcome)

    def run(*values: torch.Tensor) -> Any:
        return compiled(*arguments(values))

    return _guarded(run), lambda *values: _fp64(program, arguments(values))


def _guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, whose exceptions are the backend's fault."""

    def guarded(*values: torch.Tensor) -> Any:
        try:
            return run(*values)
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(f"raises {type(error).__name__}", str(error)[:2000]) from error

    return guarded


@lru_cache(maxsize=1)
def _truth(program: Case) -> tuple[Seen, Seen]:
    return truth(program, program.build())


@lru_cache(maxsize=1)
def _captured(program: Case) -> tuple[fx.GraphModule, list[Reader], Program]:
    """The graph and the program that it becomes.

    Raises:
        NotImplementedError: a size that the tracer has no words for.
        CaptureError: the backend does not take the graph.
    """
    tensors = program.build()
    gm, readers = dynamo_like(program, tensors)
    before = _fingerprint(gm)
    captured = from_dynamo(gm, [read(tensors, r) for r in readers])
    if _fingerprint(gm) != before:
        raise Wrong("Dynamo's graph", "was changed by the capture")
    return gm, readers, captured


def _parsed(case: Case) -> Options:
    options = Options.parse(_options(case, sparsecc.Report(), lower="eager", strict=True))
    if not case.order:
        return options
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return _Ordered(**values, order=case.order)


def _fp64(program: Program, arguments: Sequence[Any]) -> Any:
    grad = torch.is_grad_enabled()
    try:
        return Fp64(program.module).run(*arguments)
    finally:
        torch.set_grad_enabled(grad)


def blame(case: Case) -> list[str]:
    """How far each stage of the pipeline is from the lines, in fp64; and the graphs before and after."""
    with modes(case):
        tensors = case.build()
        _, exact = _truth(case.program)
        _, readers, captured = _captured(case.program)
        snapshots = Snapshots()
        record = GraphReport(0)
        pipeline.run(captured.copy(), _parsed(case), record, [snapshots])
        lines = []
        for stage in snapshots.stages:

            def run(*values: Any, stage: Any = stage) -> Any:
                held = dict(zip(tensors, values, strict=True))
                return _fp64(stage.program, [read(held, r) for r in readers])

            seen = observe(case, run, {n: wide(t) for n, t in tensors.items()})
            found = {n: f"{relative(v, exact.values[n]):.0e}" for n, v in seen.values.items()}
            lines.append(f"{stage.name}: {found}")
        for report in record.passes.values():
            lines += [
                f"{report.name} {m.status} {m.node} {m.code} {m.reason}" for m in report.matches
            ]
        for stage in (snapshots.stages[0], snapshots.stages[-1]):
            lines += ["", stage.name, *stage.program.text().splitlines()]
    return lines


def _through_dynamo(
    case: Case, tensors: dict[str, torch.Tensor], outcome: Outcome
) -> Callable[..., Any]:
    report = sparsecc.Report()
    verify = "each" if case.seed % 2 else "off"
    options = _options(case, report, lower=case.compile, strict=False, verify=verify)
    torch._dynamo.reset()
    held = [n for n, t in case.tensors.items() if t.role != "input"]
    module = case.module(tensors)
    dynamic = True if case.dynamic else None
    fast = torch.compile(
        module, backend="sparsecc", options=options, dynamic=dynamic, fullgraph=True
    )
    first = [True]

    def run(*values: torch.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        with torch.no_grad():
            for name in held:
                if given[name] is not getattr(module, name):
                    raise RuntimeError("weights are compiled in place")
        result = fast(*[v for n, v in given.items() if n not in held])
        if first.pop() if first else False:
            for graph in report.graphs:
                if graph.fell_through and not graph.fell_through.startswith("capture: "):
                    raise Wrong("fell through", graph.fell_through)
                if graph.fell_through:
                    outcome.notes[graph.fell_through.split(" (")[0]] += 1
            _count(report, outcome)
        return result

    return _guarded(run)


def _peer_raises(case: Case, words: str) -> bool:
    """Whether PyTorch's own backend raises the same: it traces other strides than some operators return."""
    torch._dynamo.reset()
    tensors = case.build()
    module = case.module(tensors)
    fast = torch.compile(module, backend="aot_eager", fullgraph=True)
    inputs = [n for n, t in case.tensors.items() if t.role == "input"]

    def run(*values: torch.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        return fast(*[given[name] for name in inputs])

    try:
        observe(case, run, tensors, copy=False)
    except RuntimeError as error:
        return str(error) == words
    return False


def _fingerprint(gm: fx.GraphModule) -> list[Any]:
    return [
        (
            n.name,
            n.op,
            n.target,
            str(n.args),
            str(n.kwargs),
            len(n.meta),
            id(n.meta.get("example_value")),
        )
        for n in gm.graph.nodes
    ]


def _guards(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo's sizes are tied to so far, as SymPy expressions."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        if isinstance(value, torch.Tensor):
            environment = value.fake_mode.shape_env
            return [g.expr for g in environment.guards]
    return []


def excludes(guard: Any, guards: Sequence[Any], sizes: range = range(2, 9)) -> bool:
    """Whether ``guard`` fails for sizes that ``guards`` let through: for them it is compiled again."""
    known = [g for g in guards if g.free_symbols & guard.free_symbols]
    symbols = sorted(guard.free_symbols.union(*(g.free_symbols for g in known)), key=str)
    for values in itertools.product(sizes, repeat=len(symbols)):
        chosen = {s: sympy.Integer(v) for s, v in zip(symbols, values, strict=True)}
        if guard.subs(chosen) != sympy.true and all(g.subs(chosen) == sympy.true for g in known):
            return True
    return False


def _count(report: sparsecc.Report, outcome: Outcome) -> None:
    for record in report:
        outcome.applied[record.name] += record.applied
        for refusal in record.refusals:
            outcome.refused[record.name, refusal.code] += 1


# ---- judging -----------------------------------------------------------------------------------------


class _Judge:
    def __init__(self, case: Case, outcome: Outcome) -> None:
        self.case, self.outcome = case, outcome
        self.run: Callable[..., Any] = lambda *a: None

    def algebra(self, program: Callable[..., Any], exact: Seen) -> None:
        """The rewritten program and the lines, both in fp64."""
        tensors = {n: wide(t) for n, t in self.case.build().items()}
        try:
            found = observe(self.case, program, tensors)
        except Exception as error:
            raise Wrong(f"fp64 raises {type(error).__name__}", str(error)) from error
        _same_names(found, exact, "fp64")
        for name, value in found.values.items():
            difference = relative(value, exact.values[name])
            self._within_algebra(name, difference, tensors, exact)

    def _within_algebra(
        self, name: str, difference: float, tensors: dict[str, torch.Tensor], exact: Seen
    ) -> None:
        """Two fp64 results differ by no more than fp64 allows, or than the lines themselves are conditioned."""
        if difference <= ALGEBRA:
            return
        if difference > 100 * self._conditioning(name, tensors, exact):
            raise Wrong("algebra", f"{name} differs by {difference:.1e} in fp64")
        self.outcome.notes["ill-conditioned in fp64"] += 1

    def _conditioning(self, name: str, tensors: dict[str, torch.Tensor], exact: Seen) -> float:
        """How far one rounding of the inputs alone moves a result."""
        worst = 0.0
        function = self.case.function(wide=True)
        for sample in range(4):
            moved = observe(self.case, function, nearby(tensors, sample, 2.0**-52))
            worst = max(worst, relative(moved.values[name], exact.values[name]))
        return worst

    def rounding(
        self, run: Callable[..., Any], tensors: dict[str, torch.Tensor], eager: Seen, exact: Seen
    ) -> None:
        """What really ran, against fp64 and beside eager; weights as they were."""
        before = {n: t.detach().clone() for n, t in tensors.items()}
        found = observe(self.case, run, tensors, copy=False)
        written = {n.split(",")[0] for n in eager.values if n.endswith("written")}
        for name, value in tensors.items():
            if name not in written and not same(value.detach(), before[name]):
                raise Wrong("a weight was written", name)
        with torch.no_grad():
            for name in written:
                if self.case.tensors[name].role != "input":
                    tensors[name].copy_(before[name])
        _same_names(found, eager, "the compiled program")
        for name, expected in eager.memory.items():
            if found.memory[name] != expected:
                raise Wrong(
                    "memory", f"{name} (shares with, strides): {found.memory[name]}, not {expected}"
                )
        bad = [n for n in found.values if not _close(n, found, eager, exact)]
        if bad:
            try:
                self._second_look(run, tensors, bad, SAMPLES[0])
            except Wrong:
                self._second_look(run, tensors, bad, SAMPLES[1])

    def _second_look(
        self,
        run: Callable[..., Any],
        tensors: dict[str, torch.Tensor],
        bad: list[str],
        samples: int,
    ) -> None:
        """Nearby inputs round independently; a wrong value stays wrong in all of them."""
        self.outcome.notes[f"second look, {samples} inputs"] += 1
        pooled: dict[str, list[Seen]] = {"got": [], "eager": [], "exact": []}
        before = {n: t.detach().clone() for n, t in tensors.items()}
        for sample in range(samples):
            _set(tensors, nearby(tensors, sample, MOVED))
            eager, exact = truth(self.case, tensors)
            pooled["got"].append(observe(self.case, run, tensors, copy=False))
            pooled["eager"].append(eager)
            pooled["exact"].append(exact)
        _set(tensors, before)
        for name in bad:
            if _is_reference(pooled["eager"][0].values[name], pooled["exact"][0].values[name]):
                self._in_fp64(name, pooled)
                continue
            parts = [
                torch.stack([s.values[name] for s in pooled[k]]) for k in ("got", "eager", "exact")
            ]
            verdict = compare(name, *parts)
            if not verdict.passed:
                raise Wrong(
                    "rounding" if "gradient" not in name else "gradient",
                    f"{name}: rmse {verdict.rmse:.2e} (eager {verdict.eager_rmse:.2e}, at most "
                    f"{verdict.bound_rmse:.2e}), max {verdict.max:.2e} (at most {verdict.bound_max:.2e})",
                )

    def _in_fp64(self, name: str, pooled: dict[str, list[Seen]]) -> None:
        pairs = zip(pooled["got"], pooled["exact"], strict=True)
        difference = min(relative(a.values[name], b.values[name]) for a, b in pairs)
        tensors = {n: wide(t) for n, t in self.case.build().items()}
        exact = observe(self.case, self.case.function(wide=True), tensors)
        self._within_algebra(name, difference, tensors, exact)

    def after_update(self, tensors: dict[str, torch.Tensor]) -> None:
        """New weights in the old tensors: the next call must see them."""
        other = self.case.build(offset=1)
        with torch.no_grad():
            for name, value in tensors.items():
                if not self.case.tensors[name].shares:
                    (value.data if self.case.seed % 2 else value).copy_(other[name])
        torch.clear_autocast_cache()  # as in _set
        eager, exact = truth(self.case, tensors)
        if not sane(eager, exact):
            return
        try:
            self.rounding(self.run, tensors, eager, exact)
        except Wrong as error:
            raise Wrong(f"after an update of the weights, {error.kind}", str(error)) from error


def _set(tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    torch.clear_autocast_cache()  # inside one region eager itself keeps casts of the old weights


def _same_names(found: Seen, expected: Seen, what: str) -> None:
    if found.values.keys() != expected.values.keys():
        more = sorted(found.values.keys() ^ expected.values.keys())
        raise Wrong("results", f"{what} and eager differ in {more}")


def _is_reference(eager: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether eager computed in fp64 all along: then it has no error of its own to compare with."""
    return eager.dtype == torch.float64 and relative(eager, exact) <= ALGEBRA / 10


def _close(name: str, found: Seen, eager: Seen, exact: Seen) -> bool:
    got, expected = found.values[name], eager.values[name]
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Wrong(
            "kind",
            f"{name} is {got.dtype} {list(got.shape)}, not {expected.dtype} {list(expected.shape)}",
        )
    reference = exact.values[name]
    if _is_reference(expected, reference):
        return relative(got, reference) <= ALGEBRA
    return compare(name, got, expected, reference).passed


def _mode(case: Case) -> str:
    words = ["training" if case.train else "inference"]
    words += [f"torch.compile ({case.compile})"] if case.compile else []
    words += ["dynamic"] * bool(case.dynamic) + ["reordered"] * bool(case.order)
    return ", ".join(words)
