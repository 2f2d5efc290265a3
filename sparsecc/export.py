"""The second door: the same passes on ``torch.export`` programs, and models with folded weights to keep."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from sparsecc import pipeline
from sparsecc.capture import from_export
from sparsecc.driver import instruments_for, publish
from sparsecc.errors import CaptureError, RecipeError, VerificationError, first_line
from sparsecc.hoist import Hoisted, hoist
from sparsecc.instruments import Instrument, Snapshots
from sparsecc.log import log
from sparsecc.options import Options
from sparsecc.program import Program
from sparsecc.proof import Reference, words
from sparsecc.report.model import GraphReport, Report
from sparsecc.shadow import copies


def rewrite(
    exported: ExportedProgram,
    options: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> ExportedProgram:
    """Run the passes on an exported program; the result goes on to AOTInductor, ONNX or torch-mlir.

    Folded weights become parameters of the result (``sparsecc_folded_0``, …) in the dtype of the originals;
    weights that nothing reads any more are left out. The program given is not changed.

    Args:
        exported: from ``torch.export.export`` (not decomposed).
        options: as for ``torch.compile(..., options=...)``; ``verify`` uses the program's example inputs.
        report: filled when given.
    Raises:
        OptionsError, RequirementError, VerificationError: as for the backend.
        CaptureError: the program was decomposed; rewrite it before ``run_decompositions()``.
    """
    report = report if report is not None else Report(model="ExportedProgram")
    given = dict(options or {})
    if given.get("recipe") is None:
        given.setdefault("codegen", "aten")  # the result is plain PyTorch; of a recipe it cannot be
    chosen = Options.parse({**given, "report": report})
    result = rewrite_recorded(exported, chosen, report)
    if chosen.require:
        pipeline.check_requirements({p.name: p.applied for p in report}, chosen)
    return result


def bake(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> torch.nn.Module:
    """A plain module with the rewritten weights in it, so that leaving sparsecc is free.

    Args:
        model: in eval mode.
        args, kwargs: example inputs, as for ``torch.export.export``.
        options: as for ``torch.compile(..., options=...)``.
        dynamic_shapes: as for ``torch.export.export``.
    """
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    baked: torch.nn.Module = rewrite(exported, options).module()
    return baked


def rewrite_recorded(
    exported: ExportedProgram, options: Options, report: Report
) -> ExportedProgram:
    """:func:`rewrite` with parsed options, recording into ``report``."""
    record = GraphReport(len(report.graphs))
    report.graphs.append(record)
    instruments = instruments_for(options, record.index)
    try:
        result = _rewritten(exported, options, record, instruments)
    except (CaptureError, RecipeError):
        raise
    except Exception as error:  # a defect of ours must not cost the user the model
        if options.strict:
            raise
        record.fell_through = f"{type(error).__name__}: {first_line(error)}"
        log.warning("the program is returned as it was: %s", record.fell_through)
        return exported
    snapshots = next((i for i in instruments if isinstance(i, Snapshots)), None)
    if options.verify != "off" and snapshots is not None:
        _prove(exported, result, snapshots, options, record)
    publish(report, record, options, instruments)
    return result


def _rewritten(
    exported: ExportedProgram,
    options: Options,
    record: GraphReport,
    instruments: Sequence[Instrument],
) -> ExportedProgram:
    program = from_export(exported)
    applied = pipeline.run(program, options, record, instruments)
    pipeline.announce(record, options)
    hoisted = hoist(program) if applied else None
    main = hoisted.main if hoisted is not None else program
    for instrument in instruments:
        instrument.stage("lowered", main, True)
    if applied:
        return _assemble(exported, main, hoisted, record)
    record.fell_through = "no rewrite applied"
    return exported


def _assemble(
    exported: ExportedProgram, main: Program, hoisted: Hoisted | None, record: GraphReport
) -> ExportedProgram:
    old = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    state = dict(exported.state_dict)
    folded: list[torch.Tensor] = []
    if hoisted is not None:
        sources = [_tensor(exported, name) for name in hoisted.names]
        folded = hoisted.evaluate(sources)
        record.folded = len(folded)
        record.folded_bytes = sum(f.numel() * f.element_size() for f in folded)
    placeholders = main.placeholders()
    new_nodes = placeholders[len(placeholders) - len(folded) :]
    _move_before_user_inputs(new_nodes, placeholders, old)
    added: dict[str, InputSpec] = {}
    numbers = (i for i in itertools.count() if f"sparsecc_folded_{i}" not in exported.state_dict)
    for node, value in zip(new_nodes, folded, strict=True):
        target = f"sparsecc_folded_{next(numbers)}"
        state[target] = torch.nn.Parameter(value, requires_grad=False)
        added[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target)
    specs = [added.get(p.name) or old[p.name] for p in main.placeholders()]
    alive = {s.target for s in specs if s.target is not None}
    gone = {
        s.target for s in old.values() if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    } - alive
    main.module.recompile()
    return ExportedProgram(
        root=main.module,
        graph=main.graph,
        graph_signature=ExportGraphSignature(specs, _output_specs(exported, main)),
        state_dict={k: v for k, v in state.items() if k not in gone},
        range_constraints=copy.deepcopy(exported.range_constraints),
        module_call_graph=copy.deepcopy(exported.module_call_graph),
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def _output_specs(exported: ExportedProgram, main: Program) -> list[OutputSpec]:
    """The old specs under the names of the nodes that are returned now."""
    returned: Any = main.output().args[0]
    return [
        dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=node.name))
        if isinstance(node, fx.Node) and node.name != spec.arg.name
        else spec
        for spec, node in zip(exported.graph_signature.output_specs, returned, strict=True)
    ]


def _tensor(exported: ExportedProgram, name: str) -> torch.Tensor:
    found: torch.Tensor = (
        exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
    )
    return found


def _move_before_user_inputs(
    nodes: Sequence[fx.Node], placeholders: Sequence[fx.Node], specs: Mapping[str, InputSpec]
) -> None:
    """Export wants lifted inputs first."""
    first = next(
        (p for p in placeholders if p.name in specs and specs[p.name].kind is InputKind.USER_INPUT),
        None,
    )
    if first is not None:
        for node in nodes:
            first.prepend(node)


def _prove(
    before: ExportedProgram,
    after: ExportedProgram,
    snapshots: Snapshots,
    options: Options,
    record: GraphReport,
) -> None:
    if before.example_inputs is None:
        return
    args, kwargs = before.example_inputs
    flat = before._graph_module_flat_inputs(args, kwargs)
    reference = Reference(snapshots.stages[0].program, flat, torch.random.get_rng_state())
    # On copies: buffers that the program writes belong to the user's model too.
    with torch.no_grad():
        flat_after = after._graph_module_flat_inputs(args, kwargs)
        result = after.graph_module(*copies(flat_after))
    each = options.verify == "each"
    record.verdicts += reference.verdicts(snapshots.stages, each, result)
    for verdict in record.verdicts:
        if not verdict.passed:
            raise VerificationError(words(verdict))
