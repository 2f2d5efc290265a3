"""Is the backend right on one case, and what did PyTorch's own backend give?

Four runs of the same case from the same state and seed: eager, eager in fp64, PyTorch's own backend (the
*peer*) and ours; once for inference and once for a training step. Ours is judged by the rule of
:func:`sparsecc.proof.compare`, leaf by leaf.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from conformance.case import Case
from conformance.observe import Observed, Runs, drew_random_numbers, observe, own
from torch import fx
from torch.utils._pytree import tree_leaves

import sparsecc
from sparsecc import _torch
from sparsecc.errors import first_line
from sparsecc.proof import compare
from sparsecc.report.model import TensorError

# From best to worst: the worst of several cases is the outcome of their name.
STATUSES = ("pass", "not built", "eager fails", "fell through", "error", "wrong")
NORMS = (torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default)


@dataclass
class Outcome:
    """What became of a case (or, merged, of all cases of a name).

    ``peer`` is what PyTorch's own backend gave at the same depth ("pass", "wrong: ...", "error: ..."), and
    ``inductor``, on anything but a pass of ours, what Inductor gave. ``norms`` counts the LayerNorms and
    RMSNorms of the inference program in canonical form, ``rewritten`` those that a pass changed.
    """

    status: str = "pass"
    words: str = ""
    peer: str = ""
    inductor: str = ""
    norms: int = 0
    rewritten: int = 0
    rewrites: dict[str, int] = field(default_factory=dict)
    train_rewrites: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    graph_breaks: int = 0
    opaque: dict[str, int] = field(default_factory=dict)
    cases: int = 1
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Without what is empty or zero."""
        return {k: v for k, v in asdict(self).items() if v or k == "status"}


def judge(case: Case, *, lower: str = "aot_eager") -> Outcome:
    """Compile, run and compare ``case``: inference, then (``case.train``) one training step."""
    started = time.perf_counter()
    outcomes = [_phase(case, lower, train=False)]
    if case.train and outcomes[0].status not in ("eager fails", "error"):
        trained = _phase(case, lower, train=True)
        trained.words = trained.words and f"training: {trained.words}"
        trained.train_rewrites, trained.rewrites = trained.rewrites, {}
        trained.refused, trained.opaque = {}, {}
        trained.norms = trained.rewritten = trained.graphs = trained.graph_breaks = 0
        if trained.status == "eager fails":  # nothing to compare with, and no fault of ours
            trained.status = "pass"
        outcomes.append(trained)
    outcome = merge(outcomes)
    outcome.cases, outcome.seconds = 1, round(time.perf_counter() - started, 2)
    return outcome


def peer_alone(cases: Iterable[Case], lower: str) -> str:
    """What PyTorch's own backend gives, without ours: asked where ours took the process down."""
    found = []
    for case in cases:
        for train in (False, True) if case.train else (False,):
            try:
                truth = _truth(case, train)
            except Exception:
                continue
            found.append(_alone(case, truth, lower, train))
    return _worst_peer(found)


def merge(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst status with its words; counts are summed."""
    found = list(outcomes)
    worst = max(found, key=lambda o: STATUSES.index(o.status))
    if worst.status == "eager fails" and any(o.status == "pass" for o in found):
        worst = next(o for o in found if o.status == "pass")  # one sample of many is not an outcome
    total = Outcome(worst.status, cases=sum(o.cases for o in found))
    total.words = worst.words or next((o.words for o in found if o.words), "")
    total.peer = worst.peer if worst.status != "pass" else _worst_peer(o.peer for o in found)
    total.inductor = worst.inductor
    for name in ("rewrites", "train_rewrites", "refused", "opaque"):
        counts: Counter[str] = Counter()
        for outcome in found:
            counts.update(getattr(outcome, name))
        setattr(total, name, dict(counts))
    for name in ("norms", "rewritten", "graphs", "graph_breaks", "seconds"):
        setattr(total, name, round(sum(getattr(o, name) for o in found), 2))
    return total


def _worst_peer(peers: Iterable[str]) -> str:
    found = [p for p in peers if p]
    return next((p for p in found if p != "pass"), found[0] if found else "")


@dataclass
class _Truth:
    """What a result is compared with: eager, and fp64 where it can be had."""

    eager: Observed
    exact: Observed | None
    note: str = ""
    random: bool = False


def _phase(case: Case, lower: str, *, train: bool) -> Outcome:
    try:
        truth = _truth(case, train)
    except Exception as error:
        return Outcome("eager fails", _words(error))
    with _reproducible(lower):
        peer = _attempt(case, _compiled(lower), train)
        outcome, ours = _observe_ours(case, lower, train)
        peer_faults = _judged(case, peer, truth, _compiled(lower), train)
        faults = _judged(case, ours, truth, _ours(case, lower), train)
        outcome.peer = _peer_words(peer, peer_faults)
        if isinstance(ours, dict) and not outcome.words and not faults and _faults(ours, truth):
            outcome.words = f"errors pooled over {SAMPLES} nearby inputs"
        if faults and all(n in peer_faults and _same(ours, peer, n) for n in faults):
            outcome.words, faults = "as the peer: " + next(iter(faults.values())), {}
        if faults and truth.random and peer_faults and not _misshapen(faults):
            outcome.words, faults = "random numbers: only shapes were compared", {}
        if faults:
            outcome.status, outcome.words = "wrong", _summary("", faults)
        if outcome.status not in ("pass", "eager fails") and lower != "inductor":
            outcome.inductor = _alone(case, truth, "inductor", train)
    if not outcome.words:
        outcome.words = truth.note
    return outcome


def _truth(case: Case, train: bool) -> _Truth:
    eager = observe(case, lambda model: model, train=train)
    if drew_random_numbers():
        other = observe(case, lambda model: model, train=train, draw=1)
        if other.keys() != eager.keys() or not all(_equal(eager[n], other[n]) for n in eager):
            return _Truth(eager, None, "random numbers, from the same seed", random=True)
    try:
        exact = observe(case, lambda model: model, train=train, wide=True)
    except Exception as error:
        return _Truth(eager, None, f"no fp64 reference: {_words(error)}")
    if exact.keys() != eager.keys() or any(_shape(exact[n]) != _shape(eager[n]) for n in eager):
        return _Truth(eager, None, "no fp64 reference: it takes another way in fp64")
    return _Truth(eager, exact)


def _alone(case: Case, truth: _Truth, backend: str, train: bool) -> str:
    """What one of PyTorch's own backends gives."""
    with _reproducible(backend):
        found = _attempt(case, _compiled(backend), train)
        return _peer_words(found, _judged(case, found, truth, _compiled(backend), train))


def _peer_words(found: Observed | str, faults: Mapping[str, str]) -> str:
    return found if isinstance(found, str) else _summary("wrong", faults) or "pass"


def _compiled(backend: str) -> Callable[..., Any]:
    return lambda model: torch.compile(model, backend=backend)


def _attempt(case: Case, wrap: Callable[..., Any], train: bool) -> Observed | str:
    torch._dynamo.reset()
    try:
        return observe(case, wrap, train=train)
    except Exception as error:
        return f"error: {_words(error)}"


def _observe_ours(case: Case, lower: str, train: bool) -> tuple[Outcome, Observed | str]:
    report, stages = sparsecc.Report(), []
    before = _torch.graph_breaks()
    found = _attempt(case, _ours(case, lower, report=report, keep_stages=stages), train)
    outcome = Outcome()
    outcome.graph_breaks = sum(
        count - before.get(reason, 0)
        for reason, count in _torch.graph_breaks().items()
        if count > before.get(reason, 0)
    )
    _count(outcome, report, stages)
    if isinstance(found, str):
        outcome.status, outcome.words = "error", found.removeprefix("error: ")
        return outcome, found
    if report.fallbacks:
        outcome.status = "fell through"
        outcome.words = re.sub(r"^graph \d+: ", "", report.fallbacks[0])
    elif not report.graphs:
        outcome.words = "Dynamo made no graph"
    return outcome, found


def _ours(case: Case, lower: str, **more: Any) -> Callable[..., Any]:
    options = {"lower": lower, "floor": False, "strict": False, **case.options, **more}
    return lambda model: torch.compile(model, backend="sparsecc", options=options)


def _count(outcome: Outcome, report: sparsecc.Report, stages: list[Any]) -> None:
    outcome.graphs = len(report.graphs)
    for record in report:
        if record.family == "canonical":
            continue
        if record.applied:
            outcome.rewrites[record.name] = record.applied
        for code, count in Counter(r.code for r in record.refusals).items():
            outcome.refused[f"{record.name}: {code}"] = count
    reasons = Counter(reason for g in report.graphs for reason in g.opaque.values())
    outcome.opaque = dict(reasons)
    for graph in stages:
        rewritten = [s for s in graph.stages if s.name != "lowered"]
        if not rewritten:  # it fell through before there was a program
            continue
        canonical = [s for s in rewritten if s.name in ("captured", "canonical")][-1]
        norms = _norms(canonical.program.graph)
        after = _norms(rewritten[-1].program.graph)
        outcome.norms += len(norms)
        outcome.rewritten += sum(after.get(name) != facts for name, facts in norms.items())


def _norms(graph: fx.Graph) -> dict[str, Any]:
    """Norms by name, with what a rewrite changes of them: the operator, and which affine it has."""
    return {
        n.name: (n.target, [str(a) for a in n.args[2:4]]) for n in graph.nodes if n.target in NORMS
    }


def _judged(
    case: Case, got: Observed | str, truth: _Truth, wrap: Callable[..., Any], train: bool
) -> dict[str, str]:
    """The faults of a run that also several runs together have."""
    if isinstance(got, str):
        return {}
    faults = _faults(got, truth)
    noisy = [name for name, fault in faults.items() if fault.startswith(f"{name}: rmse")]
    acquitted = _acquitted(case, noisy, wrap, train) if noisy else set()
    return {name: fault for name, fault in faults.items() if name not in acquitted}


def _acquitted(case: Case, names: list[str], wrap: Callable[..., Any], train: bool) -> set[str]:
    """The leaves that are right over several nearby inputs, their errors pooled under the same rule.

    Where one ill-conditioned row carries all of the error, one run compares two draws of rounding noise.
    Inputs and weights moved by a thousandth round independently; a wrong value stays wrong in all.
    """
    pooled: dict[str, list[list[Any]]] = {name: [] for name in names}
    torch._dynamo.reset()
    runs = Runs(wrap, train=train)
    for sample in range(SAMPLES):
        near = _nearby(case, sample)
        try:
            found, truth = runs.run(near), _truth(near, train)
        except Exception:
            return set()
        if truth.exact is None:
            return set()
        for name, values in pooled.items():
            values.append([run.get(name) for run in (found, truth.eager, truth.exact)])
    return {name for name, values in pooled.items() if _pooled(name, values)}


def _pooled(name: str, values: list[list[Any]]) -> bool:
    leaves = [leaf for run in values for leaf in run]
    if not all(isinstance(v, torch.Tensor) and v.shape == leaves[0].shape for v in leaves):
        return False
    runs = [torch.stack(leaf) for leaf in zip(*values, strict=True)]
    if runs[0].dim() == 1 or name.startswith("gradient"):
        # The errors of one gradient come from the same backward and rise and fall together: a run is a row.
        runs = [run.reshape(SAMPLES, -1) for run in runs]
    return compare(name, *runs).passed


SAMPLES = 6
# Units of rounding. Flash attention subtracts larger terms than softmax does: 38 of them were seen.
VANISHING = 128.0


def _vanishes(name: str, error: TensorError, truth: _Truth) -> bool:
    """Whether a leaf that is zero but for rounding is as near to zero as its module's other leaves allow.

    The gradient of a key's bias under softmax is zero: eager's error is all that there is of it, without one
    correct digit. What is compared is how the sum cancels, on the scale of the gradient of the key's weight.
    A term that is wrongly there, or missing, is orders of magnitude larger.
    """
    assert truth.exact is not None
    if error.eager_rmse < _rms(truth.exact[name]):
        return False
    owner = name.rpartition(".")[0]
    others = [
        _rms(v)
        for n, v in truth.exact.items()
        if n != name and n.rpartition(".")[0] == owner and isinstance(v, torch.Tensor)
    ]
    unit = torch.finfo(truth.eager[name].dtype).eps
    bound = VANISHING * unit * max(others, default=0.0)
    return error.rmse <= bound and error.max <= 4 * bound


def _rms(value: torch.Tensor) -> float:
    return float(value.abs().double().square().mean().sqrt()) if value.numel() else 0.0


def _nearby(case: Case, sample: int) -> Case:
    near = own(case)
    generator = torch.Generator().manual_seed(sample)
    tensors = [t for t in tree_leaves((near.args, near.kwargs)) if isinstance(t, torch.Tensor)]
    if isinstance(near.model, torch.nn.Module):
        tensors += list(near.model.parameters())
    with torch.no_grad():
        for tensor in {id(t): t for t in tensors if t.is_floating_point()}.values():
            if tensor.layout != torch.strided:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(tensor * (1 + 1e-3 * noise).to(tensor))
    return near


_SHAPE = "expected "


def _misshapen(faults: dict[str, str]) -> bool:
    return any(fault.startswith(_SHAPE) for fault in faults.values())


def _faults(got: Observed, truth: _Truth) -> dict[str, str]:
    """Leaves of ``got`` that the rule does not allow, with words."""
    found = {n: f"{_SHAPE}{n}" for n in truth.eager.keys() - got.keys()}
    found |= {n: f"{_SHAPE}no {n}" for n in got.keys() - truth.eager.keys()}
    for name, value in got.items():
        if name not in found:
            fault = _fault(name, value, truth)
            if fault:
                found[name] = fault
    return found


def _fault(name: str, got: Any, truth: _Truth) -> str:
    eager = truth.eager[name]
    if _kind(got) != _kind(eager):
        return f"{_SHAPE}{name} as {_kind(eager)}, got {_kind(got)}"
    if not isinstance(eager, torch.Tensor):
        return "" if _close(got, eager) else f"{name} is {got!r}, expected {eager!r}"
    exact = truth.exact[name] if truth.exact is not None else None
    if isinstance(exact, torch.Tensor) and exact.is_floating_point() == eager.is_floating_point():
        if not torch.equal(got.isnan(), eager.isnan()):
            return f"{name} has NaN where eager has none, or none where it has"
        error = compare(name, got, eager, exact)
        if error.passed or _vanishes(name, error, truth):
            return ""
        return (
            f"{name}: rmse {error.rmse:.2e} (at most {error.bound_rmse:.2e}), "
            f"max {error.max:.2e} (at most {error.bound_max:.2e})"
        )
    return "" if _close(got, eager) else f"{name} is not close to eager's"


def _close(got: Any, eager: Any) -> bool:
    """By PyTorch's default tolerances; equal where they are no numbers."""
    if isinstance(got, torch.Tensor) and isinstance(eager, torch.Tensor):
        try:
            torch.testing.assert_close(got, eager, equal_nan=True)
        except AssertionError:
            return False
        return True
    if isinstance(got, float) and isinstance(eager, float):
        return got == eager or abs(got - eager) <= 1e-5 * abs(eager) or got != got
    return type(got) is type(eager) and bool(got == eager)


def _equal(a: Any, b: Any) -> bool:
    """Bit for bit (drawn numbers that drop nothing leave no trace)."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    return _kind(a) == _kind(b) and torch.equal(a, b)


def _same(ours: Any, peer: Any, name: str) -> bool:
    """Whether two runs left the same in a leaf, to PyTorch's default tolerances."""
    if (name in ours) != (name in peer):
        return False
    if name not in ours:
        return True
    a, b = ours[name], peer[name]
    return _kind(a) == _kind(b) and _close(a, b)


def _kind(value: Any) -> str:
    """Type, dtype and shape of a leaf."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}"


def _shape(value: Any) -> Any:
    """What a leaf of the fp64 reference must have in common with eager's."""
    return value.shape if isinstance(value, torch.Tensor) else type(value)


def _summary(prefix: str, faults: Mapping[str, str]) -> str:
    if not faults:
        return ""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return (f"{prefix}: " if prefix else "") + next(iter(faults.values())) + more


def _words(error: BaseException) -> str:
    """Type and first line; the cause's where Dynamo wrapped it."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {first_line(inner)}"


def _reproducible(lower: str) -> Any:
    """Inductor draws from eager's generator, so that random numbers can be compared at all."""
    from torch._inductor import config

    return config.patch(fallback_random=lower == "inductor")
