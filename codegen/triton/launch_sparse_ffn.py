"""``sparsecc::sparse_ffn_native`` on GPUs: arguments checked, and the kernels of the spec launched.

Under ``TRITON_INTERPRET=1``, which must be set before Triton is imported, ``run`` takes tensors on CPU too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from sparsecc.codegen.triton import build, live_counts, sparse_ffn
from sparsecc.codegen.triton.cuts import Cuts
from sparsecc.codegen.triton.few_rows import DTYPES, MOST_ROWS
from sparsecc.codegen.triton.launch import on_device
from sparsecc.codegen.triton.sparse_ffn import Config
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.formats import Format
from sparsecc.runtime.ops.sparse_ffn import Spec, meaning, unlabelled


@dataclass(frozen=True)
class Problem:
    """What kernels are built for; ``core``: whether it is said which neurons may be live."""

    text: str
    rows: int
    size: int
    features: int
    width: int
    dtype: torch.dtype
    core: bool

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        only: torch.Tensor | None,
        kernel: str,
    ) -> Problem:
        spec = Spec.of(kernel)
        features, width = _down(weights, spec)
        text = unlabelled(kernel) if spec.label else kernel  # measured without counting
        rows, size = math.prod(x.shape[:-1]), x.shape[-1]
        return cls(text, rows, size, features, width, x.dtype, only is not None)

    def module(self) -> ModuleType:
        """The generated source as a module; its file is to be read."""
        return _module(self.text)

    def configs(self) -> list[Config]:
        """Those worth measuring, the one to take unmeasured first."""
        return sparse_ffn.configs(self.rows, self.size, self.dtype)


@functools.cache  # calls do not generate it again
def _module(text: str) -> ModuleType:
    return build.load("sparse_ffn", sparse_ffn.source(Spec.of(text)))


cuts: Cuts[Config] = Cuts()
choose = cuts.choose


def run(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    only: torch.Tensor | None,
    kernel: str,
    config: Config | None = None,
) -> torch.Tensor:
    """The operator by its generated kernels. Live neurons are counted where the spec has a label.

    Args:
        x: ``[..., K]``, 1 to 16 rows; float32, bfloat16 or float16; without a gate ``[..., F]``.
        weights: the tensors of gate and up ``[F, K]``, as the spec has them, and of down ``[F, N]``, in the
            spec's formats (dense ones are of x's dtype), on x's device.
        operands: ``[F]`` each, of x's dtype.
        only: int64 ``[C]``, ascending: the neurons that may be live; None for all. What is no neuron is
            skipped, unseen: to read it here, the GPU would have to be waited for.
        kernel: the text of a :class:`Spec`.
        config: how the kernels are cut; otherwise as ``choose`` was told, or the first of
            ``sparse_ffn.configs``.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        RuntimeError: arguments that do not fit each other.
        ValueError: ``only`` stands beside a selection.
        BuildError: there is no Triton, it does not take the kernels' source, or a weight is E2M1.
    """
    spec = Spec.of(kernel)
    sparse_ffn.check_formats(spec)
    _check(x, weights, operands, only, spec)
    features, width = _down(weights, spec)
    out = x.new_empty((*x.shape[:-1], width))
    if x.numel() == 0 or out.numel() == 0 or features == 0 or (only is not None and spec.select):
        return meaning(x, weights, operands, only, kernel)
    problem = Problem.of(x, weights, only, kernel)
    with on_device(x):
        _launch(problem, spec, config or cuts.of(problem), x, weights, operands, only, out)
    return out


def _down(weights: Sequence[torch.Tensor], spec: Spec) -> tuple[int, int]:
    """F and N."""
    packed = weights[spec.slots[-1].start]
    return packed.shape[0], packed.shape[1] * spec.kept[-1].parts[0].per


def _launch(
    problem: Problem,
    spec: Spec,
    cut: Config,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    only: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    module, rows = problem.module(), problem.rows
    count = problem.features if only is None else only.numel()
    chunks = math.ceil(count / cut.chunk)
    parts, walk = sparse_ffn.parts(chunks, problem.width, cut)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return x.new_empty(shape, dtype=dtype)

    given: dict[str, Any] = {"x": x.contiguous(), "out": out, "C": count}
    given |= {f"w{i}": weight.contiguous() for i, weight in enumerate(weights)}
    given |= {f"o{i}": operand.contiguous() for i, operand in enumerate(operands)}
    given |= {"only": None if only is None else only.contiguous()}
    given |= {
        "chunks": chunks,
        "walk": walk,
        "parts": parts,
    }
    given |= {"neurons": scratch(chunks, cut.chunk, dtype=torch.int32)}
    given |= {"counts": scratch(chunks, dtype=torch.int32), "h": scratch(chunks, rows, cut.chunk)}
    last = [given[f"w{i}"] for i in range(len(weights))[spec.slots[-1]]]
    given |= itertools.zip_longest(("weight", "scale", "zero"), last)
    given |= {"lives": scratch(chunks, dtype=torch.int32) if spec.label else None}
    given |= {"partial": out if parts == 1 else scratch(parts, rows, problem.width)}

    def launch(kernel: str, *grid: int, rounding: Format | None = None) -> None:
        if 0 in grid:
            return
        sizes = problem.size, problem.features, problem.width
        constants = sparse_ffn.constants(spec, kernel, rows, sizes, cut, rounding)
        names = sparse_ffn.arguments(spec, kernel)
        getattr(module, kernel)[grid](
            *(given[name] for name in names), **constants, num_warps=cut.warps
        )

    for name, form in sparse_ffn.roundings(spec).items():
        groups = problem.size // form.together if form.together else 1
        given["q"] = given[f"q{name}"] = scratch(rows, problem.size, dtype=torch.int8)
        given["steps"] = given[f"steps{name}"] = scratch(rows, groups)
        launch("round_activations", rows, groups, rounding=form)
    if sparse_ffn.has_gate(spec):
        given["kept"] = scratch(rows, count)
        launch("gate", math.ceil(count / cut.rows))
    if spec.gaussian is not None:
        given["limits"] = scratch(rows)
        launch("gaussian_limits", rows)
    if (
        spec.top is not None
    ):  # a stable sort, as the meaning's: of equal ones the last that stays is here, too
        order = given["kept"].argsort(stable=True, dim=-1, descending=True)
        least = order[:, min(spec.top, problem.features) - 1, None]
        given |= {"lasts": least.contiguous(), "limits": given["kept"].gather(-1, least)}
    launch("live", chunks, math.ceil(cut.chunk / cut.rows))
    if spec.label:
        given["totals"] = live_counts.totals(spec.label, problem.features, x.device)
        launch("add_counts", 1)
    launch("down", math.ceil(problem.width / cut.block_n), parts)
    if parts > 1:
        launch("combine", math.ceil(rows * problem.width / sparse_ffn.COMBINE_BLOCK))


def _parts(spec: Spec) -> list[formats.Part]:
    """Of the tensors of all weights, in a row."""
    return [part for form in spec.kept for part in form.parts]


def _check(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    only: torch.Tensor | None,
    spec: Spec,
) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"sparse_ffn: {what}")

    require(x.dim() >= 1, "x has no features")
    rows = math.prod(x.shape[:-1])
    require(rows <= MOST_ROWS, f"{rows} rows; a kernel takes {MOST_ROWS}")
    require(x.dtype in DTYPES, f"x is {x.dtype}, not float32, bfloat16 or float16")
    needed = sum(len(form.parts) for form in spec.kept)
    require(len(weights) == needed, f"the spec has {needed} weights, not {len(weights)}")
    dense = [w for w, part in zip(weights, _parts(spec), strict=True) if part.dtype is None]
    alike = all(t.dtype == x.dtype for t in (*dense, *operands))
    alike = alike and all(t.device == x.device for t in (*weights, *operands))
    require(alike, f"all tensors must be {x.dtype} on {x.device}, as x is")
    require(weights[spec.slots[-1].start].dim() == 2, "down is not [F, N]")
    features, width = _down(weights, spec)
    names = [*["gate"] * spec.gate, *["up"] * spec.up, "down"]
    for name, form, slot in zip(names, spec.kept, spec.slots, strict=True):
        size = width if name == "down" else x.shape[-1]
        first = weights[slot.start]
        fits = first.dim() == 2 and first.shape[0] == features
        fits = fits and first.shape[1] * form.parts[0].per == size
        require(fits, f"{name} is not [F, K]: {features} neurons by the size of x")
        try:
            if name == "down":  # whose rows are not multiplied with x, and may have any size
                form = dataclasses.replace(form, rounds_activations=False, together=0)
            formats.check(form, weights[slot], size)
        except ValueError as error:
            raise RuntimeError(f"sparse_ffn: {name}: {error}") from error
    require(
        spec.gate or x.shape[-1] == features, f"x has not a value for each of {features} neurons"
    )
    for name in spec.vectors:
        i = int(name[1:])
        require(i < len(operands), f"{name} is not given")
        require(tuple(operands[i].shape) == (features,), f"{name} has not {features} elements")
    if only is not None:
        fits = (only.dtype, only.device, only.dim()) == (torch.int64, x.device, 1)
        require(fits, f"the neurons that may be live must be int64 [C] on {x.device}")


torch.library.impl("sparsecc::sparse_ffn_native", "CUDA", run)
