"""Proof on the user's own model and data: the rewritten program against an fp64 reference.

Two questions, kept apart. *Algebra*: do the programs before and after agree when both run in fp64? An exact
pass leaves only fp64 rounding, so a wrong fold, a wrong ε or a lost bias shows here, whatever the dtype.
*Rounding*: is what really runs (folded weights, generated kernels) no further from fp64 than the eager model
is, by the stated factor? The reference is a copy taken before any pass ran; nothing of it is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from sparsecc.dump.stages import Stage
from sparsecc.errors import VerificationError
from sparsecc.log import log
from sparsecc.options import Options
from sparsecc.passes import registry
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.base import Analyses, Exactness
from sparsecc.program import MOVED, Program, source_line
from sparsecc.report.model import GraphReport, TensorError, Verdict
from sparsecc.shadow import copies, fp64_copies, run_fp64

FACTOR = 1.5  # exact rewrites: error no more than this times eager's own
# Below this many units in the last place (root mean square; largest element) two results are not told apart:
# a reduction of another order moves the last few bits of results whose own error happens to be nearly zero.
FLOOR_RMSE, FLOOR_MAX = 2.0, 16.0
# Relative difference of two fp64 programs: fp64 rounds at 1e-16, deep networks amplify it.
ALGEBRA = 1e-9


class FirstCall:
    """Wraps a compiled graph: proves it at its first call, then gets out of the way."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        stages: Sequence[Stage],
        options: Options,
        record: GraphReport,
    ) -> None:
        self.compiled, self.stages, self.options, self.record = compiled, stages, options, record
        self.proved = False

    def __call__(self, *args: Any) -> Any:
        if self.proved:
            return self.compiled(*args)
        # The graph may write its inputs, so the proof works on copies taken before it runs.
        inputs = copies(args)
        state = torch.random.get_rng_state()
        result = self.compiled(*args)
        self.proved = True
        after = torch.random.get_rng_state()
        for verdict in self._verdicts(inputs, args, result, state):
            self.record.verdicts.append(verdict)
            log.info("graph %d: %s", self.record.index, words(verdict))
            if not verdict.passed:
                raise VerificationError(f"graph {self.record.index}: {words(verdict)}")
        torch.random.set_rng_state(after)
        return result

    def _verdicts(
        self, inputs: Sequence[Any], args: Sequence[Any], result: Any, state: torch.Tensor
    ) -> Sequence[Verdict]:
        reference = Reference(self.stages[0].program, inputs, state)
        return reference.verdicts(self.stages, self.options.verify == "each", result, args)


class Reference:
    """The original program with its inputs: fp64 results, and eager's own error against them.

    Inputs that the program writes (caches, running statistics) are results too.
    """

    def __init__(self, program: Program, inputs: Sequence[Any], state: torch.Tensor) -> None:
        self.program, self.inputs, self.state = program, inputs, state
        self.skipped = _unprovable(program, inputs)
        facts = Analyses(program).get(aliases)
        self.written = [i for i, p in enumerate(program.placeholders()) if facts.written(p)]
        if not self.skipped:
            try:
                self.exact = self._run_fp64(program)
                self.eager = self._run_eager()
            except Exception as error:  # an operator without an fp64 kernel, say
                self.skipped = f"no fp64 reference: {type(error).__name__}: {error}"

    def verdicts(
        self, stages: Sequence[Stage], each: bool, result: Any, args: Sequence[Any] = ()
    ) -> list[Verdict]:
        """One verdict on the whole, and before it one on every exact stage if ``each``.

        Algebra ends where a lossy pass begins. What runs after one is held to that pass's own error: kernels
        may add to the rounding that the recipe chose, by the stated factor, and no more.
        """
        rewritten = [s for s in stages if s.name != "lowered"]
        lossy = next((i for i, s in enumerate(rewritten) if is_lossy(s.name)), len(rewritten))
        exact = rewritten[:lossy]
        found = []
        if each:
            found = [self.judge_algebra(s.name, s.program) for s in exact[1:]]
        rounded = rewritten[-1].program if lossy < len(rewritten) else None
        found.append(self.judge("final", exact[-1].program, result, args, rounded))
        return found

    def judge_algebra(self, stage: str, program: Program) -> Verdict:
        """Both programs in fp64."""
        if self.skipped:
            return Verdict(stage, True, skipped=self.skipped)
        found = self._run_fp64(program)
        difference = max(
            (_relative(a, b) for a, b in zip(found, self.exact, strict=True)), default=0.0
        )
        verdict = Verdict(stage, difference <= ALGEBRA, algebra=difference)
        if not verdict.passed:
            self._blame(verdict, program)
        return verdict

    def judge(
        self,
        stage: str,
        program: Program,
        result: Any,
        args: Sequence[Any] = (),
        lossy: Program | None = None,
    ) -> Verdict:
        """Algebra of ``program``, and the rounding of ``result`` and of the inputs that it wrote.

        Of a ``lossy`` program, made of ``program``, that in fp64 takes the place of eager where it loses more:
        weights that are on their grid already lose nothing by being rounded, and float products still do.
        """
        verdict = self.judge_algebra(stage, program)
        if verdict.skipped:
            return verdict
        beside = self.eager
        if lossy is not None:
            rounded = self._run_fp64(lossy)
            verdict.loss = max(map(_loss, rounded, self.exact), default=0.0)
            triples = zip(rounded, self.eager, self.exact, strict=True)
            beside = [_further(_like(a, b), b, exact) for a, b, exact in triples]
        results = _outputs(result)
        names = [f"output {i}" for i in range(len(results))]
        if args:
            names += [f"input {i}, after it was written" for i in self.written]
            results += [args[i] for i in self.written]
        expected = zip(names, results, beside, self.exact, strict=bool(args))
        for name, got, eager, exact in expected:
            if isinstance(exact, torch.Tensor):
                verdict.tensors.append(compare(name, got, eager, exact))
        verdict.passed = verdict.passed and all(t.passed for t in verdict.tensors)
        return verdict

    def _run_fp64(self, program: Program, seen: Any = None) -> list[Any]:
        return self._run(fp64_copies(self.inputs), lambda i: run_fp64(program.module, i, seen))

    def _run_eager(self) -> list[Any]:
        plain = fx.Interpreter(self.program.module)
        return self._run(copies(self.inputs), lambda i: plain.run(*i))

    def _run(self, inputs: list[Any], program: Callable[[list[Any]], Any]) -> list[Any]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.random.set_rng_state(self.state)
            outputs = _outputs(program(inputs))
            return outputs + [inputs[i] for i in self.written]

    def _blame(self, verdict: Verdict, program: Program) -> None:
        """The first node that both programs have, should agree on, and do not."""
        ours = {n.name: n for n in program.graph.nodes}
        kept: dict[str, torch.Tensor] = {}
        names = {
            n.name
            for n in self.program.graph.nodes
            if n.name in ours and MOVED not in ours[n.name].meta and n.op == "call_function"
        }

        def remember(node: fx.Node, value: Any) -> None:
            if node.name in names and isinstance(value, torch.Tensor):
                kept[node.name] = value.clone()

        found: list[fx.Node] = []

        def compare_with(node: fx.Node, value: Any) -> None:
            if not found and node.name in kept and _relative(value, kept[node.name]) > ALGEBRA:
                found.append(node)

        self._run_fp64(self.program, remember)
        self._run_fp64(program, compare_with)
        if found:
            verdict.diverges, verdict.diverges_where = found[0].name, source_line(found[0])
        verdict.reproduce = "sparsecc verify MODEL --option verify=each   (MODEL as module:factory)"
        if verdict.stage in registry.REWRITES:
            verdict.reproduce += (
                f"; leave the pass out with --option 'disable=[\"{verdict.stage}\"]'"
            )


def compare(name: str, got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> TensorError:
    """Judge one output: root mean square and largest error against fp64, within FACTOR of eager's own."""
    if not exact.dtype.is_floating_point and not exact.dtype.is_complex:
        same = bool(torch.equal(got, eager))
        return TensorError(name, 0.0, float(not same), 0.0, float(not same), 0.0, 0.0, same)
    if got.is_complex() and eager.is_complex() and exact.is_complex():
        got, eager, exact = (_parts(t) for t in (got, eager, exact))
    unit = torch.finfo(eager.dtype).eps
    scale_rmse, scale_max = _rms(exact), _largest(exact)
    eager_rmse, eager_max = _errors(eager, exact)
    rmse, largest = _errors(got, exact)
    # The errors of one row (a token, an image) come from the same features and rise and fall together, so n
    # rows are n samples; their root mean square is uncertain by 1/sqrt(2n), taken here at three sigma.
    rows = exact.numel() // max(exact.shape[-1] if exact.dim() else 1, 1)
    factor = FACTOR * (1 + 3 / math.sqrt(2 * max(rows, 1)))
    bound_rmse = max(factor * eager_rmse, FLOOR_RMSE * unit * scale_rmse)
    # One element is noisier than the mean of all: its bound is twice as wide.
    bound_max = max(2 * factor * eager_max, FLOOR_MAX * unit * scale_max)
    if unit <= torch.finfo(torch.float64).eps:
        # Eager is the reference itself and has no error of its own: what fp64 programs may differ by holds.
        bound_rmse, bound_max = (max(b, ALGEBRA * scale_max) for b in (bound_rmse, bound_max))
    agree = got.shape == exact.shape and got.dtype == eager.dtype
    special = bool(torch.equal(got.isfinite(), eager.isfinite())) if agree else False
    passed = agree and special and rmse <= bound_rmse and largest <= bound_max
    return TensorError(name, eager_rmse, rmse, eager_max, largest, bound_rmse, bound_max, passed)


def words(verdict: Verdict) -> str:
    """One paragraph on a verdict: what, how far, where, and what to do."""
    if verdict.skipped:
        return f"{verdict.stage}: not proved: {verdict.skipped}"
    ratio = verdict.worst_ratio
    text = (
        f"{verdict.stage}: {'passed' if verdict.passed else 'FAILED'}: "
        f"fp64 algebra differs by {verdict.algebra:.1e} (at most {ALGEBRA:.0e})"
    )
    if verdict.tensors:
        own = "eager's own" if verdict.loss is None else "that of the rounded program in fp64"
        text += f"; error {ratio:.2f}x {own} (at most {FACTOR}x, or rounding)"
    if verdict.loss is not None:
        text += f"; lossy by {verdict.loss:.2e} of the outputs"
    for tensor in verdict.tensors:
        if not tensor.passed:
            text += (
                f"; {tensor.name}: rmse {tensor.rmse:.2e} > {tensor.bound_rmse:.2e} or "
                f"max {tensor.max:.2e} > {tensor.bound_max:.2e}"
            )
    if verdict.diverges:
        text += f"; first diverging node {verdict.diverges} ({verdict.diverges_where})"
    if not verdict.passed and verdict.reproduce:
        text += f". Reproduce: {verdict.reproduce}"
    return text


def is_lossy(stage: str) -> bool:
    """Whether a stage is that of a lossy pass."""
    return stage in registry.REWRITES and registry.load(stage).exactness is Exactness.LOSSY


def _loss(rounded: Any, exact: Any) -> float:
    if not isinstance(exact, torch.Tensor) or not exact.dtype.is_floating_point:
        return 0.0
    return _rms(rounded - exact) / max(_rms(exact), 1e-300)


def _like(value: Any, eager: Any) -> Any:
    return value.to(eager.dtype) if isinstance(eager, torch.Tensor) else value


def _further(rounded: Any, eager: Any, exact: Any) -> Any:
    """Which of two results is further from ``exact``."""
    if not isinstance(exact, torch.Tensor) or not exact.dtype.is_floating_point:
        return rounded
    return rounded if _errors(rounded, exact) >= _errors(eager, exact) else eager


def _outputs(result: Any) -> list[Any]:
    return list(tree_leaves(result))


def _unprovable(program: Program, inputs: Sequence[Any]) -> str:
    for node in program.graph.nodes:
        target = node.target
        if (
            isinstance(target, torch._ops.OpOverload)
            and torch.Tag.nondeterministic_seeded in target.tags
            and not (target._schema.name == "aten::dropout" and _inactive(node))
            and not (target._schema.name.startswith("aten::scaled_dot_product") and _no_p(node))
        ):
            return f"{node.name} draws random numbers ({source_line(node)})"
    if any(isinstance(i, torch.Tensor) and i.is_meta for i in inputs):
        return "inputs are on the meta device"
    return ""


def _inactive(node: fx.Node) -> bool:
    return bool(node.args[1] == 0 or node.args[2] is False)


def _no_p(node: fx.Node) -> bool:
    return bool((node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)) == 0)


def _errors(value: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    if value.shape != exact.shape or value.is_complex() != exact.is_complex():
        return math.inf, math.inf
    error = (value.detach().double() - exact).abs()
    error = error[exact.isfinite()]
    return _rms(error), _largest(error)


def _parts(value: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts side by side in each row: ``double()`` would drop the latter."""
    parts = torch.view_as_real(value.detach().resolve_conj())
    return parts.flatten(-2) if parts.dim() > 1 else parts


def _rms(value: torch.Tensor) -> float:
    finite = value[value.isfinite()] if value.numel() else value
    return float(finite.abs().double().pow(2).mean().sqrt()) if finite.numel() else 0.0


def _largest(value: torch.Tensor) -> float:
    finite = value[value.isfinite()] if value.numel() else value
    return float(finite.abs().max()) if finite.numel() else 0.0


def _relative(a: Any, b: Any) -> float:
    if not isinstance(a, torch.Tensor):
        return 0.0 if a is b or bool(a == b) else math.inf
    if a.shape != b.shape:
        return math.inf
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        return 0.0 if torch.equal(a, b) else math.inf
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    return _largest(a - b) / max(_largest(b), 1e-300)
