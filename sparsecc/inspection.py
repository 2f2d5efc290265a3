"""Looking at what sparsecc does to a model, without keeping anything: explain, verify, stages."""

from __future__ import annotations

import contextlib
import itertools
import platform
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import sparsecc
from sparsecc import _torch, pipeline
from sparsecc.driver import compile_graph
from sparsecc.dump.stages import GraphStages
from sparsecc.errors import VerificationError
from sparsecc.options import Options
from sparsecc.report.model import Report


def explain(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile ``model`` for these inputs and say what was done to it.

    A module in eval mode is looked at as for inference (``torch.no_grad``); one in training mode with its
    gradients. The graph is not lowered to kernels unless ``options`` says ``lower="inductor"``.

    Args:
        model: a module or function, or an ``ExportedProgram`` (with its own example inputs).
        *args, **kwargs: example inputs.
        options: as for ``torch.compile(..., options=...)``.
    Returns:
        The report; ``report["layernorm-to-rmsnorm"].applied`` counts rewrites.
    Raises:
        OptionsError: an unknown option, pass or value.
        RequirementError: ``require`` is not met over all graphs together.
    """
    return _look(model, args, kwargs, options)[0]


def verify(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile ``model``, run it, and prove every pass and the result against fp64 on these inputs.

    Returns:
        The report, passed or not: see ``report.verified`` and ``report.verdicts``.
    """
    chosen = {"verify": "each", **(options or {})}
    try:
        return _look(model, args, kwargs, chosen)[0]
    except VerificationError as error:
        report: Report | None = getattr(error, "report", None)
        if report is None:
            raise
        return report


def stages(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> tuple[Report, list[GraphStages]]:
    """The report, and a copy of every graph after every stage that changed it."""
    return _look(model, args, kwargs, options)


def _look(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[str, Any] | None
) -> tuple[Report, list[GraphStages]]:
    kept: list[GraphStages] = []
    chosen = {"lower": "eager", **(given or {})}
    user_report = chosen.pop("report", None)
    report = user_report if isinstance(user_report, Report) else Report()
    report.model = report.model or type(model).__name__
    report.versions = versions()
    report.options = {k: v for k, v in chosen.items() if k not in ("keep_stages",)}
    require = chosen.pop("require", None)
    options = Options.parse({**chosen, "report": report, "keep_stages": kept})
    if isinstance(model, torch.export.ExportedProgram):
        from sparsecc.export import rewrite_recorded

        rewrite_recorded(model, options, report)
    else:
        _compile_and_run(model, args, kwargs, options, report)
    if isinstance(user_report, str):
        report.path = user_report
        report.save()
    if require:
        wanted = Options.parse({"require": require})
        pipeline.check_requirements({p.name: p.applied for p in report}, wanted)
    return report, kept


def _compile_and_run(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, report: Report
) -> None:
    def backend(gm: Any, example_inputs: Any, **_: Any) -> Any:
        return compile_graph(gm, example_inputs, options, None)

    before = Counter(_torch.graph_breaks())
    with _torch.throwaway_compile(), _mode_of(model):
        try:
            compiled: Any = torch.compile(fresh_caller(), backend=backend)
            compiled(model, args, kwargs)
        except VerificationError as error:
            error.report = report  # type: ignore[attr-defined]
            raise
    # By reason: a break is counted again for every frame that it leaves.
    report.graph_breaks = sorted(Counter(_torch.graph_breaks()) - before)


def fresh_caller() -> Any:
    """A function with a code object and a name of its own.

    Dynamo keeps compiled graphs, and counts them against its limit, per code object, and those of a look must
    not stay on the user's ``forward``. Which sizes have changed it remembers by name: sizes of this model would
    be dynamic where another's differed.
    """

    def call(model: Any, args: Any, kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"call_{next(_callers)}")
    return types.FunctionType(code, call.__globals__)


_callers = itertools.count()


@contextlib.contextmanager
def _mode_of(model: Any) -> Iterator[None]:
    if isinstance(model, torch.nn.Module) and not model.training:
        with torch.no_grad():
            yield
    else:
        yield


def versions() -> dict[str, str]:
    """What a result depends on besides the model."""
    found = {
        "sparsecc": sparsecc.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
