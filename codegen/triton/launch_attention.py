"""``sparsecc::cached_attention_native`` on GPUs: arguments checked, the kernels of the spec, three launches.

Under ``TRITON_INTERPRET=1``, which must be set before Triton is imported, ``run`` takes tensors on CPU too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from sparsecc.codegen.triton import build, cached_attention
from sparsecc.codegen.triton.cached_attention import Config
from sparsecc.codegen.triton.cuts import Cuts
from sparsecc.codegen.triton.few_rows import DTYPES
from sparsecc.codegen.triton.launch import on_device
from sparsecc.runtime.ops.cached_attention import Spec


@dataclass(frozen=True)
class Problem:
    """What kernels are built for: any batch and length of the cache; ``mask`` is "none", "bool" or "added"."""

    text: str
    tokens: int
    mask: str
    dtype: torch.dtype

    @classmethod
    def of(cls, q: torch.Tensor, mask: torch.Tensor | None, kernel: str) -> Problem:
        kind = "none" if mask is None else "bool" if mask.dtype is torch.bool else "added"
        return cls(kernel, q.shape[2], kind, q.dtype)

    def module(self) -> ModuleType:
        """The generated source as a module; its file is to be read."""
        return _module(self.text, self.tokens, self.mask)

    def configs(self) -> list[Config]:
        """Those worth measuring, the one to take unmeasured first."""
        return cached_attention.configs(Spec.of(self.text), self.tokens, self.dtype)


@functools.cache  # calls do not generate it again
def _module(text: str, tokens: int, mask: str) -> ModuleType:
    return build.load("cached_attention", cached_attention.source(Spec.of(text), tokens, mask))


cuts: Cuts[Config] = Cuts()
choose = cuts.choose


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    scale: float,
    kernel: str,
    config: Config | None = None,
) -> torch.Tensor:
    """The operator by its generated kernels.

    Args:
        q: ``[B, H·groups, T, size]``, before rotation; float32, bfloat16 or float16.
        k, v: ``[B, H, T, size]`` and ``[B, H, T, value_size]`` of the new tokens: of q's dtype, on its device,
            as all that follow.
        keys, values: the cache, ``[B, H, S, size]`` and ``[B, H, S, value_size]``, features contiguous; written
            at ``positions``.
        positions: ``[T]``, int64. Where the caches do not reach, nothing is written and no error raised: to
            read them here, the GPU would have to be waited for.
        rotation: none, or cos and sin, ``[B or 1, 1, T, size]``.
        mask: None, or bool (True: attend) or added (float32 or of q's dtype), that broadcasts to
            ``[B, H·groups, T, S]``. Keys and values that it excludes for all queries are not read.
        scale: of the scores.
        kernel: the text of a :class:`Spec`.
        config: how the kernels are cut; otherwise as ``choose`` was told, or the first of
            ``cached_attention.configs``.

    Returns:
        ``[B, T, H·groups, value_size]``, contiguous.

    Raises:
        RuntimeError: arguments that do not fit each other.
        BuildError: there is no Triton, or it does not take the kernels' source.
    """
    spec = Spec.of(kernel)
    tensors = {"q": q, "k": k, "v": v, "keys": keys, "values": values}
    _check(tensors, positions, rotation, mask, spec)
    batch, heads, tokens, length = q.shape[0], keys.shape[1], q.shape[2], keys.shape[2]
    out = q.new_empty((batch, tokens, q.shape[1], values.shape[3]))
    if out.numel() == 0:
        return out
    problem = Problem.of(q, mask, kernel)
    module, cut = problem.module(), config or cuts.of(problem)
    rows, programs = batch * heads * tokens * spec.groups, batch * heads
    programs *= cached_attention.row_blocks(spec, tokens)
    each = cached_attention.chunk(programs, length, cut)
    chunks = max(-(-length // each), 1)
    scratch = q.new_empty(rows * chunks * (spec.value_size + 2), dtype=torch.float32)
    given = _given(tensors, rotation, mask, (batch, q.shape[1], tokens, length))
    given |= {"positions": positions.contiguous(), "scratch": scratch, "scale": float(scale)}
    given |= {"heads": heads, "length": length, "chunks": chunks, "each": each}
    with on_device(q):
        names = cached_attention.write_arguments(spec)
        module.write[(batch * heads * tokens,)](*(given[name] for name in names), num_warps=1)
        names = cached_attention.attend_arguments(spec, problem.mask)
        constants = cached_attention.constants(cut)
        module.attend[(programs * chunks,)](
            *(given[name] for name in names), **constants, num_warps=cut.warps
        )
        constants = cached_attention.combine_constants(spec, tokens)
        module.combine[(rows,)](scratch, out, heads, chunks, **constants)
    return out


def _given(
    tensors: Mapping[str, torch.Tensor],
    rotation: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    sizes: Sequence[int],
) -> dict[str, Any]:
    """The kernels' arguments: tensors with their features contiguous, and strides, 0 where they broadcast."""
    angles = dict(zip(("cos", "sin"), rotation, strict=False))
    given: dict[str, Any] = {}
    for name, tensor in {**tensors, **angles}.items():
        held = tensor if _dense(tensor) else tensor.contiguous()
        given[name] = held
        axes = "b_t" if name in angles else "bhs" if name in ("keys", "values") else "bht"
        given |= {f"{name}_{a}": held.stride(i) for i, a in enumerate(axes)}
        if name in angles and held.shape[0] == 1:
            given[f"{name}_b"] = 0
    if mask is not None:
        every = mask.expand(*sizes)
        given |= {"mask": every, **{f"mask_{a}": every.stride(i) for i, a in enumerate("bhts")}}
    return given


def _dense(tensor: torch.Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _check(
    tensors: Mapping[str, torch.Tensor],
    positions: torch.Tensor,
    rotation: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    spec: Spec,
) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"cached_attention: {what}")

    q, keys, values = tensors["q"], tensors["keys"], tensors["values"]
    require(q.dtype in DTYPES, f"q is {q.dtype}, not float32, bfloat16 or float16")

    def alike(tensor: torch.Tensor, what: str) -> None:
        same = (tensor.dtype, tensor.device) == (q.dtype, q.device)
        require(same and tensor.dim() == 4, f"{what} must be {q.dtype} on {q.device}, four axes")

    def match(tensor: torch.Tensor, sizes: Sequence[int], what: str) -> None:
        fits = tuple(tensor.shape) == tuple(sizes)
        require(fits, f"the sizes of {what} do not fit the rest")

    for name, tensor in tensors.items():
        alike(tensor, name)
    for name in ("keys", "values"):
        require(_dense(tensors[name]), f"the features of {name} must be contiguous")
    batch, query_heads, tokens, size = q.shape
    heads, length, value_size = keys.shape[1], keys.shape[2], values.shape[3]
    match(keys, (batch, heads, length, size), "keys")
    match(values, (batch, heads, length, value_size), "values")
    match(tensors["k"], (batch, heads, tokens, size), "k")
    match(tensors["v"], (batch, heads, tokens, value_size), "v")
    match(positions, (tokens,), "positions")
    where = positions.dtype is torch.int64 and positions.device == q.device
    require(where, f"positions must be int64 on {q.device}")
    made = (size, value_size, query_heads) == (spec.size, spec.value_size, spec.groups * heads)
    require(made, "the tensors are not of the sizes that the kernel was made for")
    require(len(rotation) in (0, 2), "a rotation is cos and sin")
    require(bool(rotation) == spec.rotary, "a rotation is missing, or one too many")
    for angle in rotation:
        alike(angle, "cos and sin")
        require(angle.shape[0] in (1, batch), "cos and sin do not fit the batch")
        match(angle, (angle.shape[0], 1, tokens, size), "cos and sin")
    if mask is not None:
        holds = mask.dim() <= 4 and mask.device == q.device
        require(holds, f"the mask has more than four axes, or is not on {q.device}")
        sizes = (batch, query_heads, tokens, length)
        pairs = zip(reversed(mask.shape), reversed(sizes), strict=False)
        require(all(a in (1, b) for a, b in pairs), "the mask does not broadcast to the scores")
        known = mask.dtype in (torch.bool, torch.float32, q.dtype)
        require(known, f"the mask must be bool or float32, or {q.dtype} as q is")


torch.library.impl("sparsecc::cached_attention_native", "CUDA", run)
