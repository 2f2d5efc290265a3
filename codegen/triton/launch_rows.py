"""``sparsecc::rows_native`` on GPUs: arguments checked, the kernel of the spec and the sizes, one launch.

Under ``TRITON_INTERPRET=1``, which must be set before Triton is imported, ``run`` takes tensors on CPU too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import torch

from sparsecc.codegen.triton import build, rows
from sparsecc.codegen.triton.launch import on_device
from sparsecc.runtime.ops.rows import Spec, meaning, result_dtype, result_shape


def run(
    tensors: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    scalars: Sequence[torch.Tensor],
    kernel: str,
) -> list[torch.Tensor]:
    """The operator by its generated kernel.

    Args:
        tensors: ``[..., N]`` each, of one shape; float32, bfloat16 or float16.
        vectors: ``[N]`` each, or more of the tensors' last axes.
        scalars: ``[1]`` each, or the tensors' last axes but the last.
        kernel: the text of a :class:`Spec`.

    Returns:
        For each output ``[..., N]``, ``[..., 1]``, or ``[N]`` if summed; contiguous.

    Raises:
        RuntimeError: arguments that do not fit each other.
        ValueError: no kernel takes such rows.
        BuildError: there is no Triton, or it does not take the kernel's source.
    """
    spec = Spec.of(kernel)
    _check(spec, tensors, vectors, scalars)
    x = tensors[0]
    if x.numel() == 0:
        return meaning(tensors, vectors, scalars, kernel)
    size = x.shape[-1]
    count = x.numel() // size
    cut = rows.config(spec, size)
    fn = module(kernel, size).kernel
    parts = math.ceil(count / cut.rows)
    results, given = [], []
    for output, step in zip(spec.outputs, spec.results, strict=True):
        shape = (parts, size) if output.summed else result_shape(output, step, x.shape)
        results.append(x.new_empty(shape, dtype=result_dtype(output, x.dtype)))
        bits = torch.uint8 if output.dtype == "float8_e4m3fn" else results[-1].dtype
        given.append(results[-1].view(bits))
    dense = [_dense(tensor) for tensor in tensors]
    whole = [operand.float().contiguous() for operand in (*vectors, *scalars)]
    periods = [v.numel() // size for v in vectors] + [s.numel() for s in scalars]
    strides = [stride for _, stride in dense]
    across = math.ceil(size / cut.block) if not _has_whole_rows(spec) else 1
    with on_device(x):
        fn[(parts, across)](
            *(tensor for tensor, _ in dense),
            *whole,
            *given,
            *strides,
            *periods,
            count,
            **rows.constants(size, cut),
            num_warps=cut.warps,
        )
    return [
        result.sum(0) if output.summed else result
        for output, result in zip(spec.outputs, results, strict=True)
    ]


@functools.cache  # calls do not generate it again
def module(kernel: str, size: int) -> ModuleType:
    """The generated source of a spec's text, for rows of ``size``, as a module; its file is to be read."""
    return build.load("rows", rows.source(Spec.of(kernel), size))


def _has_whole_rows(spec: Spec) -> bool:
    return any(step.op != "let" for step in spec.steps)


def _dense(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor whose rows are dense and equally far apart, and how far; a copy only where it must be one."""
    size = tensor.shape[-1]
    try:
        flat = tensor.view(-1, size)
    except RuntimeError:
        flat = tensor.reshape(-1, size)
    if flat.stride(1) != 1 and size > 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def _check(
    spec: Spec,
    tensors: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    scalars: Sequence[torch.Tensor],
) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"rows: {what}")

    lists = {"tensors": tensors, "vectors": vectors, "scalars": scalars}
    for what, operands in lists.items():
        needed = len(spec.operands(what[0]))
        require(len(operands) == needed, f"the spec reads {needed} {what}, not {len(operands)}")
    x = tensors[0]
    require(x.dim() >= 1, "t0 has no features")
    require(x.dtype in rows.DTYPES, "t0 must be float32, bfloat16 or float16")
    for i, tensor in enumerate(tensors):
        require(tensor.shape == x.shape, f"t{i} and t0 differ in shape")
        alike = (tensor.dtype, tensor.device) == (x.dtype, x.device)
        require(alike, f"t{i} must be on {x.device} and have t0's dtype")
    for kind, operands in (("v", vectors), ("s", scalars)):
        shape = x.shape if kind == "v" else (*x.shape[:-1], 1)
        for i, operand in enumerate(operands):
            fits = 1 <= operand.dim() <= x.dim() and operand.shape == shape[-operand.dim() :]
            require(
                fits and operand.device == x.device,
                f"{kind}{i} must be on {x.device} and have the tensors' last axes"
                + (", the last one being 1" if kind == "s" else ""),
            )
            known = operand.dtype in rows.DTYPES
            require(known, f"{kind}{i} must be float32, bfloat16 or float16")


torch.library.impl("sparsecc::rows_native", "CUDA", run)
