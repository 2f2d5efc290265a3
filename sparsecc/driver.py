"""One graph's way through the compiler: capture, passes, hoisting, lowering, and what runs at each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparsecc import _torch, counting, kernels, pipeline
from sparsecc.capture import from_dynamo
from sparsecc.dump.stages import GraphStages, Stage
from sparsecc.errors import CaptureError, PassError, RecipeError, SparseccError, first_line
from sparsecc.hoist import Hoisted, hoist
from sparsecc.instruments import Artifacts, Fuel, Instrument, PrintOnChange, Snapshots
from sparsecc.log import artifact, log
from sparsecc.options import Options
from sparsecc.prepack import Prepack, prepack
from sparsecc.program import Program, Role
from sparsecc.proof import FirstCall
from sparsecc.regions import KINDS
from sparsecc.report.model import GraphReport, Report
from sparsecc.runtime.fresh import FreshWeights

Compiled = Callable[..., Any]

_NOTHING = torch.empty(0)  # stands for an input that nothing reads


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None
) -> Compiled:
    """See :func:`sparsecc.backend.sparsecc`."""
    report = options.report if isinstance(options.report, Report) else Report()
    record = GraphReport(len(report.graphs))
    report.graphs.append(record)
    instruments = instruments_for(options, record.index)
    started = time.perf_counter()
    try:
        program, applied = _rewrite(gm, example_inputs, options, record, instruments)
    except SparseccError as error:
        if options.strict or isinstance(error, RecipeError):
            raise
        log.warning("graph %d goes to Inductor untouched: %s", record.index, error)
        record.fell_through = ("capture: " if isinstance(error, CaptureError) else "") + str(error)
        program, applied = None, 0
    record.seconds["sparsecc"] = time.perf_counter() - started
    if program is None or any(s.role is Role.PARAMETER for s in program.slots.values()):
        # A graph without parameters (glue between graph breaks) has nothing to require of.
        pipeline.check_requirements({n: p.applied for n, p in record.passes.items()}, options)
    pipeline.announce(record, options)
    try:
        if program is None or (applied == 0 and options.floor and not _has_regions(program)):
            # Nothing of ours is worth having: the floor is Inductor's own result on Dynamo's graph.
            record.fell_through = record.fell_through or "no rewrite applied"
            packing = None if program is None else _prepack(program, gm, options, mode)
            compiled = _lower(gm, example_inputs, options, mode, record, packing)
            if packing is not None and packing.sources:
                compiled = _at_each_call(
                    compiled, range(len(example_inputs)), None, packing, options
                )
        else:
            compiled = _rewritten(gm, program, example_inputs, options, mode, record, instruments)
    except (*_torch.RESTARTS, *_torch.SPLITS):
        report.graphs.remove(record)  # Dynamo will hand over this graph again, or its parts
        raise
    publish(report, record, options, instruments)
    return compiled


def _has_regions(program: Program) -> bool:
    """Whether a program without rewrites has regions all the same: of a model that was baked."""
    return next(program.calls(*KINDS), None) is not None


def _rewritten(
    gm: fx.GraphModule,
    program: Program,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    record: GraphReport,
    instruments: Sequence[Instrument],
) -> Compiled:
    """Compile the rewritten program; Dynamo's graph if Inductor refuses it."""
    try:
        return _compile(program, example_inputs, options, mode, record, instruments)
    except _torch.RESTARTS:
        raise
    except Exception as error:
        if options.strict:
            raise
        compiled = _lower(gm, example_inputs, options, mode, record)  # it may refuse this one, too
        log.warning(
            "graph %d: Inductor refused the rewritten graph: %s", record.index, first_line(error)
        )
        record.fell_through = f"lowering: {type(error).__name__}: {first_line(error)}"
        return compiled


def _rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    record: GraphReport,
    instruments: Sequence[Instrument],
) -> tuple[Program | None, int]:
    if not options.pipeline() and not any(isinstance(i, Snapshots) for i in instruments):
        return None, 0
    try:
        with _timed(record, "capture"):
            program = from_dynamo(gm, example_inputs)
        record.trains = program.trains
        with _timed(record, "passes"):
            return program, pipeline.run(program, options, record, instruments)
    except SparseccError:
        raise
    except Exception as error:  # a defect of ours must not cost the user the model
        raise PassError(f"{type(error).__name__}: {first_line(error)}") from error


def _compile(
    program: Program,
    example_inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    record: GraphReport,
    instruments: Sequence[Instrument],
) -> Compiled:
    if options.count:
        counting.label(program)
    with _timed(record, "hoist"):
        hoisted = None if program.recomputes else hoist(program)
    main = program if hoisted is None else hoisted.main
    main.module.recompile()
    with _timed(record, "kernels"):
        kernels.select(main, options, record)
    for instrument in instruments:
        instrument.stage("lowered", main, True)
    keep: Sequence[int] = range(len(example_inputs))
    folded: list[Any] = []
    if hoisted is not None:
        keep = hoisted.keep
        folded = [p.meta["val"] for p in main.placeholders()[len(keep) :]]
        record.folded = len(folded)
        record.folded_bytes = sum(f.numel() * f.element_size() for f in folded)
    packing = _prepack(main, main.module, options, mode, len(folded))
    inputs = [*(example_inputs[i] for i in keep), *folded]
    compiled = _lower(main.module, inputs, options, mode, record, packing)
    if hoisted is not None or (packing is not None and packing.sources):
        compiled = _at_each_call(compiled, keep, hoisted, packing, options)
    if options.verify == "off":
        return compiled
    snapshots = next(i for i in instruments if isinstance(i, Snapshots))
    return FirstCall(compiled, snapshots.stages, options, record)


def _prepack(
    program: Program, module: fx.GraphModule, options: Options, mode: str | None, folded: int = 0
) -> Prepack | None:
    """What may be packed where ``module`` is compiled for ``program`` (itself, or Dynamo's graph of it)."""
    if not options.prepack or options.lower != "inductor":
        return None
    return prepack(program, module, folded, mode, dict(options.inductor))


def _at_each_call(
    inner: Compiled,
    keep: Sequence[int],
    hoisted: Hoisted | None,
    packing: Prepack | None,
    options: Options,
) -> Compiled:
    """Add folded and packed weights to each call; fold and pack again when a source has changed.

    ``inner`` takes the inputs at ``keep`` and the folded weights; ``packing`` counts positions among those.
    """
    folding = () if hoisted is None else hoisted.sources
    packed = () if packing is None else packing.sources
    plain = len(keep)
    sources = list(dict.fromkeys([*folding, *(keep[p] for p in packed if p < plain)]))

    def prepare(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        at = dict(zip(sources, weights, strict=True))
        folded = [] if hoisted is None else hoisted.evaluate([at[i] for i in folding])
        if packing is None or not packed:
            return folded
        ready = packing.evaluate([at[keep[p]] if p < plain else folded[p - plain] for p in packed])
        # Of a folded weight that is read in its packed form alone nothing else is kept.
        unread = packing.unread
        dense = [_NOTHING if plain + i in unread else f for i, f in enumerate(folded)]
        return [*dense, *ready]

    # Packed weights may be views of their sources, which a refresh in place would write.
    fresh = FreshWeights(prepare, sources, options.freshness, not packed)
    get = fresh.get

    def call(*args: Any) -> Any:
        return inner(*[args[i] for i in keep], *get(args))

    def call_packed(*args: Any) -> Any:
        values = get(args)
        packing.hand_over(values[folds:])  # type: ignore[union-attr]
        return inner(*[args[i] for i in keep], *values[:folds])

    folds = 0 if hoisted is None else len(hoisted.main.placeholders()) - plain
    result = call_packed if packed else call
    result.fresh_weights = fresh  # type: ignore[attr-defined]
    return result


def _lower(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    record: GraphReport,
    packing: Prepack | None = None,
) -> Compiled:
    with _timed(record, options.lower):
        if options.lower == "eager":
            return module.forward
        if options.lower == "aot_eager":
            return _torch.aot_eager(module, inputs)
        config = dict(options.inductor)
        if any(node.target in KINDS for node in module.graph.nodes):
            # Hundreds of them in a decoded token: Dynamo guards the sizes of inputs, kernels check theirs.
            config.setdefault("size_asserts", False)
        if packing is not None:
            try:
                compiled = _torch.inductor(module, inputs, mode, config, packing.inner)
                record.packed = packing.count
                return compiled
            except (*_torch.RESTARTS, *_torch.SPLITS):
                raise
            except Exception as error:
                if options.strict:
                    raise
                packing.give_up()
                log.info("graph %d: weights are not packed: %s", record.index, first_line(error))
        try:
            return _torch.inductor(module, inputs, mode, config)
        except _torch.RESTARTS:
            raise
        except Exception as error:
            problem = _torch.toolchain_problem(error)
            if options.strict or not problem:
                raise
            log.warning(
                "graph %d runs without generated code (lower='aot_eager'): %s",
                record.index,
                problem,
            )
            return _torch.aot_eager(module, inputs)


def instruments_for(options: Options, index: int) -> list[Instrument]:
    found: list[Instrument] = [Artifacts(index), PrintOnChange()]
    if options.fuel is not None:
        found.append(Fuel(options.fuel))
    if options.verify != "off" or options.dump is not None or options.keep_stages is not None:
        found.append(Snapshots())
    return found


def publish(
    report: Report, record: GraphReport, options: Options, instruments: Sequence[Instrument]
) -> None:
    artifact(f"{record.index}_report", report.to_json)
    report.save()
    snapshots = [i for i in instruments if isinstance(i, Snapshots)]
    if not snapshots:
        return
    stages = GraphStages(record.index, [Stage(s.name, s.program) for s in snapshots[0].stages])
    if options.keep_stages is not None:
        options.keep_stages.append(stages)
    if options.dump is not None:
        from sparsecc.dump.stages import write_folder

        write_folder([stages], report, options.dump, ["text"])


class _timed:  # noqa: N801 - reads as a statement
    """Adds the time of a block to the record."""

    def __init__(self, record: GraphReport, name: str) -> None:
        self.record, self.name = record, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.started
        self.record.seconds[self.name] = self.record.seconds.get(self.name, 0.0) + spent
