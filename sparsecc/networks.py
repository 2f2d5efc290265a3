"""What pruning of whole neurons asks of a model: its feed-forward networks, and how far blocks turn inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sparsecc.errors import CalibrationError
from sparsecc.inspection import stages
from sparsecc.modules import named
from sparsecc.observe import arguments
from sparsecc.passes.analysis.ffn import find_ffns
from sparsecc.passes.analysis.sites import site_name
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import Analyses

Networks = dict[str, tuple[str, ...]]


def networks(model: Any, batch: Any, options: Mapping[str, Any] | None = None) -> Networks:
    """The feed-forward networks of a model: down projection -> the layers before it, by their sites' names.

    Two sites are gate and up; one is the only layer of a plain network, or a fused gate and up.

    Args:
        model: a module in eval mode, or a function.
        batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        options: of the backend, those of :func:`sparsecc.observe.observe`.
    Raises:
        CalibrationError: the model has none.
    """
    args, kwargs = arguments(batch)
    _, graphs = stages(model, *args, options={**(options or {}), "codegen": "aten"}, **kwargs)
    found: Networks = {}
    for graph in graphs:
        # Behind the passes, but before what they folded loses the names of its parameters.
        program = [stage for stage in graph.stages if stage.name != "lowered"][-1].program
        analyses = Analyses(program)
        weights = analyses.get(weight_values)
        for ffn in find_ffns(program, analyses):
            names = [site_name(program, linear.weight, weights) for linear in ffn.layers]
            if all(names):
                found[names[-1]] = tuple(names[:-1])
    if not found:
        raise CalibrationError("the model has no feed-forward network that is known as one.")
    return found


def outermost(model: Any, blocks: Sequence[str] | str) -> dict[str, torch.nn.Module]:
    """The modules whose names match a pattern, without those inside of another of them.

    Raises:
        OptionsError: a pattern matches no module.
        CalibrationError: the model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise CalibrationError(f"blocks are modules, and the model is a {type(model).__name__}.")
    found: dict[str, torch.nn.Module] = {}
    for name, module in named(model, blocks).items():  # an outer module stands before its parts
        if not any(not other or name.startswith(f"{other}.") for other in found):
            found[name] = module
    return found


def block_angles(
    model: torch.nn.Module, batches: Iterable[Any], blocks: Sequence[str] | str
) -> dict[str, float]:
    """How far each block turns its input: the mean over tokens of arccos(cos(x, y)) / π, between 0 and 1.

    x [..., d] is the first tensor that the block is called with, y [..., d] the first that it returns. CFSP
    (Wang et al. 2025, arXiv:2409.13199) sums over tokens; the mean does not depend on their number.

    Args:
        model: in eval mode; it runs eagerly and without gradients.
        blocks: patterns of the blocks' names ("model.layers.*"), as of :func:`outermost`.
    Returns:
        Name of the block -> its angle.
    Raises:
        OptionsError: a pattern matches no module.
        CalibrationError: there are no batches, or a block's output has another shape than its input.
    """
    found = outermost(model, blocks)
    sums = dict.fromkeys(found, 0.0)
    tokens = dict.fromkeys(found, 0)

    def watch(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            x, y = first_tensor((*args, *kwargs.values())), first_tensor((output,))
            if x is None or y is None or x.shape != y.shape:
                shapes = [None if v is None else list(v.shape) for v in (x, y)]
                raise CalibrationError(f"{name} is no block: it makes {shapes[1]} of {shapes[0]}.")
            sums[name] += float(angles(x, y).sum())
            tokens[name] += x[..., 0].numel()

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in found.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                args, kwargs = arguments(batch)
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name, count in tokens.items():
        if not count:
            raise CalibrationError(
                f"{name} was not called: there are no batches, or no rows in any."
            )
    return {name: sums[name] / tokens[name] for name in found}


def angles(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """arccos(cos(x, y)) / π over the last axis, fp64 [...]; ½ where one of both is 0."""
    x, y = x.detach().double(), y.detach().double()
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    # Rounding takes the cosine of a block that changes nothing above 1, where arccos is NaN.
    cosine = ((x * y).sum(-1) / norms.clamp(min=1e-300)).clamp(-1, 1)
    result: torch.Tensor = cosine.acos() / math.pi
    return result


def first_tensor(values: Any) -> torch.Tensor | None:
    """The first tensor of floats among values, and in tuples and lists of them; None: there is none."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (tuple, list)) and (found := first_tensor(value)) is not None:
            return found
    return None
