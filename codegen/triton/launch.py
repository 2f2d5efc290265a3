"""``sparsecc::few_rows_native`` on GPUs: arguments checked, the kernel of the spec and the sizes, one launch.

Under ``TRITON_INTERPRET=1``, which must be set before Triton is imported, ``run`` takes tensors on CPU too.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from sparsecc.codegen.triton import build, few_rows
from sparsecc.codegen.triton.cuts import Cuts
from sparsecc.codegen.triton.few_rows import Config
from sparsecc.runtime.ops.few_rows import Spec, meaning


@dataclass(frozen=True)
class Problem:
    """What a kernel is built for: ``features`` are those of each output."""

    text: str
    rows: int
    size: int
    features: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor, weights: Sequence[torch.Tensor], kernel: str) -> Problem:
        spec = Spec.of(kernel)
        features = [weights[spec.weights(j)[0]].shape[0] for j in range(len(spec.outputs))]
        return cls(kernel, math.prod(x.shape[:-1]), x.shape[-1], tuple(features), x.dtype)

    def module(self) -> ModuleType:
        """The generated source as a module; its file is to be read."""
        return build.load("few_rows", few_rows.source(Spec.of(self.text), self.rows))

    def configs(self) -> list[Config]:
        """Those worth measuring, the one to take unmeasured first."""
        return few_rows.configs(Spec.of(self.text), self.rows, self.size, self.dtype)


cuts: Cuts[Config] = Cuts()
choose = cuts.choose


def run(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    kernel: str,
    config: Config | None = None,
) -> list[torch.Tensor]:
    """The operator by its generated kernel.

    Args:
        x: ``[..., K]``, 1 to 16 rows; float32, bfloat16 or float16.
        weights: ``[N_i, K]`` each, and
        operands: ``[N]`` or ``[..., N]`` each, as ``kernel`` names them: of x's dtype, on its device.
        kernel: the text of a :class:`Spec`.
        config: how the kernel is cut; otherwise as ``choose`` was told for these sizes, or the first of
            ``few_rows.configs``.

    Returns:
        One ``[..., N]``, contiguous, for each output of the spec.

    Raises:
        RuntimeError: arguments that do not fit each other.
        BuildError: there is no Triton, it does not take the kernel's source, or weights are in other formats.
    """
    few_rows.check_formats(Spec.of(kernel))
    _check(x, weights, operands, Spec.of(kernel))
    problem = Problem.of(x, weights, kernel)
    shapes = [(*x.shape[:-1], n) for n in problem.features]
    if x.numel() == 0:
        return meaning(x, weights, operands, kernel)
    outputs = [x.new_empty(shape) for shape in shapes]
    launch = _launch(problem, config or cuts.of(problem))
    given = {f"w{i}": weight.contiguous() for i, weight in enumerate(weights)}
    given.update((f"o{i}", operand.contiguous()) for i, operand in enumerate(operands))
    given.update((f"out{j}", output) for j, output in enumerate(outputs))
    given["x"] = x.contiguous()
    with on_device(x):
        launch(given)
    return outputs


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Where to launch: Triton does on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _launch(problem: Problem, config: Config) -> Callable[[dict[str, torch.Tensor]], None]:
    spec = Spec.of(problem.text)
    fn = problem.module().kernel
    names = few_rows.pointers(spec)
    constants: dict[str, Any] = few_rows.constants(
        spec, problem.rows, problem.size, problem.features, config
    )
    grid = (sum(math.ceil(n / config.block_n) for n in problem.features),)

    def launch(given: dict[str, torch.Tensor]) -> None:
        if grid != (0,):
            fn[grid](*(given[name] for name in names), **constants, num_warps=config.warps)

    return launch


def _check(
    x: torch.Tensor, weights: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], spec: Spec
) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"few_rows: {what}")

    require(x.dim() >= 1, "x has no features")
    rows = math.prod(x.shape[:-1])
    require(rows <= few_rows.MOST_ROWS, f"{rows} rows; a kernel takes {few_rows.MOST_ROWS}")
    require(x.dtype in few_rows.DTYPES, f"x is {x.dtype}, not float32, bfloat16 or float16")
    alike = [(t.dtype, t.device) == (x.dtype, x.device) for t in (*weights, *operands)]
    require(all(alike), f"all tensors must be {x.dtype} on {x.device}, as x is")
    for j in range(len(spec.outputs)):
        first, *others = spec.weights(j)
        for i in (first, *others):
            require(i < len(weights), f"W{i} is not given")
            fits = weights[i].dim() == 2 and weights[i].shape[1] == x.shape[-1]
            require(fits, f"W{i} is not [features, size of x]")
            require(
                weights[i].shape[0] == weights[first].shape[0],
                f"W{i} and W{first} differ in features",
            )
        for name in spec.operands(j):
            i = int(name[1:])
            require(i < len(operands), f"{name} is not given")
            count = weights[first].shape[0] * (rows if name[0] == "t" else 1)
            require(operands[i].numel() == count, f"{name} is not as large as output {j} needs it")


torch.library.impl("sparsecc::few_rows_native", "CUDA", run)
