"""``sparsecc dump MODEL``: the program at any stage, in any format."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsecc.cli import common
from sparsecc.errors import ModelError, OptionsError, unknown

if TYPE_CHECKING:
    from sparsecc.cli.models import LoadedModel
    from sparsecc.dump.stages import GraphStages
    from sparsecc.report.model import Report

Stage = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="captured, canonical, a pass, lowered, all, or kernels (generated sources). "
        "Default: lowered; all for a folder and for html.",
    ),
]
Form = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="text, python, dot, svg, json, html or mlir."),
]
Graph = Annotated[int | None, typer.Option("--graph", metavar="N", help="This graph only.")]
Output = Annotated[
    pathlib.Path | None,
    typer.Option("--output", "-o", help="A file, or a folder (ends in / or has no suffix)."),
]
Weights = Annotated[bool, typer.Option("--weights", help="mlir: write the weights' values too.")]


def command(
    model: common.Model,
    stage: Stage = None,
    format: Form = None,  # noqa: A002 - the name of the option
    output: Output = None,
    graph: Graph = None,
    passes: common.Passes = None,
    option: common.OptionPairs = None,
    weights: Weights = False,
    json: common.Json = False,
    seed: common.Seed = 0,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Write the program: text by default, to stdout."""
    if json and format not in (None, "json"):
        raise OptionsError(f"--json and --format {format} exclude each other.")
    form = format or ("json" if json else "text")
    options = common.gather(passes, option)
    from sparsecc.dump import formats

    if form not in formats.NAMES:
        raise OptionsError(unknown("format", form, formats.NAMES))
    loaded, options = common.prepare(model, options, seed)
    if form == "mlir":
        common.emit(_mlir(loaded, options, stage or "lowered", weights), output)
        return
    from sparsecc.dump.stages import choose
    from sparsecc.inspection import stages

    if stage == "kernels":
        if form not in ("text", "json"):
            raise OptionsError(
                "kernels are sources: --stage kernels goes with --format text or json."
            )
        options.setdefault("codegen", "cpp")
    report, graphs = stages(loaded.model, *loaded.args, options=options, **loaded.kwargs)
    if not graphs:
        why = "; ".join(report.fallbacks) or "the model calls no PyTorch operators"
        raise ModelError(f"nothing was captured from {model!r}: {why}.")
    if stage == "kernels":
        common.emit(_kernels(report, graph, form == "json"), output)
        return
    folder = output is not None and _is_folder(output)
    graphs = choose(graphs, stage or ("all" if folder or form == "html" else "lowered"), graph)
    if folder:
        from sparsecc.dump.folder import write_folder

        assert output is not None
        files = write_folder(graphs, report, output, [form])
        common.note(f"wrote {len(files)} files; start with {output / 'index.md'}")
    else:
        common.emit(_joined(graphs, form, model), output)


command.__name__ = "dump"


def _is_folder(path: pathlib.Path) -> bool:
    return path.is_dir() or not path.suffix


def _joined(graphs: list[GraphStages], form: str, model: str) -> str:
    """Several graphs and stages as one file, where the format allows it."""
    from sparsecc.dump import formats, html

    if form == "html":
        return html.render(graphs, model)
    if form == "json":
        data: list[dict[str, Any]] = [
            {
                "index": g.index,
                "stages": [formats.json_data(s.program, s.name) for s in g.stages],
            }
            for g in graphs
        ]
        return jsonlib.dumps({"model": model, "graphs": data}, indent=1, ensure_ascii=False) + "\n"
    writer = formats.get(form)
    chosen = [(g.index, i, s) for g in graphs for i, s in enumerate(g.stages)]
    if len(chosen) > 1 and not writer.joins:
        raise OptionsError(
            f"a file of format {form!r} holds one stage of one graph, and {len(chosen)} were "
            "chosen. Name one with --stage and --graph, or a folder with -o."
        )
    parts = []
    for index, _, stage in chosen:
        title = f"{model}, graph {index}, {stage.name}"
        head = f"{writer.comment} {title}\n" if len(chosen) > 1 else ""
        parts.append(head + writer.write(stage.program, title))
    return "\n".join(parts)


def _kernels(report: Report, graph: int | None, as_json: bool) -> str:
    """The generated source of every region's kernel, each headed by what it is for and what was chosen."""
    chosen = [(g.index, k) for g in report.graphs if graph in (None, g.index) for k in g.kernels]
    sources = [
        pathlib.Path(k.source).read_text(encoding="utf-8") if k.source else "" for _, k in chosen
    ]
    if as_json:
        data = [
            {"graph": index, **dataclasses.asdict(kernel), "text": text}
            for (index, kernel), text in zip(chosen, sources, strict=True)
        ]
        return jsonlib.dumps(data, indent=1, ensure_ascii=False) + "\n"
    if not chosen:
        common.note("no region of this model is one that kernels are generated for")
    heads = [
        f"// graph {index}: {kernel.region}, {kernel.shape}, {kernel.count} times; "
        f"{kernel.source or kernel.reason}\n"
        for index, kernel in chosen
    ]
    return "\n".join(head + text for head, text in zip(heads, sources, strict=True))


def _mlir(loaded: LoadedModel, options: dict[str, Any], stage: str, weights: bool) -> str:
    if stage not in ("captured", "lowered"):
        raise OptionsError(unknown("stage (of format mlir)", stage, ("captured", "lowered")))
    import torch

    from sparsecc.dump.mlir import to_mlir
    from sparsecc.export import rewrite

    exported = loaded.model
    if not isinstance(exported, torch.export.ExportedProgram):
        try:
            with torch.no_grad():
                exported = torch.export.export(exported, loaded.args, loaded.kwargs)
        except Exception as error:
            raise ModelError(
                f"torch.export cannot take this model: {type(error).__name__}: {error}\n"
                "The other formats need no export: try --format text."
            ) from error
    if stage == "lowered":
        exported = rewrite(exported, options)
    return to_mlir(exported, weights=weights)
