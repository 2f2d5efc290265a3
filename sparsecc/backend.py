"""The entry point of ``torch.compile(model, backend="sparsecc")``. Importing it does nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx


def sparsecc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: capture, rewrite, hoist weights, hand the rest to Inductor.

    Args:
        gm: Dynamo's graph.
        example_inputs: one value per placeholder.
        options: see :class:`sparsecc.Options`.
        mode: ``torch.compile``'s mode, handed to Inductor.
    Raises:
        OptionsError: an option is unknown or has no such value.
        RequirementError: a pass in ``require`` was not applied as often as asked for.
        VerificationError: (at the first call) the compiled graph failed its proof.
    Anything else that sparsecc cannot do falls through to Inductor with a reason in the report, unless
    ``strict=True``.
    """
    from sparsecc.driver import compile_graph
    from sparsecc.options import Options

    return compile_graph(gm, example_inputs, Options.parse(options), mode)
