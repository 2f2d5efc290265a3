"""What a program leaves behind: outputs, written tensors, gradients; in its own dtypes and in fp64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz.case import Case
from torch import nn
from torch.overrides import TorchFunctionMode


@dataclass
class Seen:
    """Named results of one run: outputs, written tensors, gradients.

    ``memory`` says of each output which others, and which inputs, share its memory, and its strides: a caller
    that writes or views an output can tell.
    """

    values: dict[str, torch.Tensor]
    memory: dict[str, tuple[Any, ...]] = field(default_factory=dict)


def truth(case: Case, tensors: dict[str, torch.Tensor]) -> tuple[Seen, Seen]:
    """Eager's own result, and the reference in fp64."""
    casts = _Casts()
    with casts:
        eager = observe(case, case.function(), tensors)
    with _Casts(casts.copied):
        exact = observe(case, case.function(wide=True), {n: wide(t) for n, t in tensors.items()})
    return eager, exact


class _Casts(TorchFunctionMode):
    """Notes which casts copy, and in the fp64 run copies there too: the copy may be written."""

    def __init__(self, copied: list[bool] | None = None) -> None:
        super().__init__()
        self.copied: list[bool] = []
        self._replayed = None if copied is None else iter(copied)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("to", "float", "double"):
            copied = result is not args[0]
            if self._replayed is None:
                self.copied.append(copied)
            elif next(self._replayed, copied) and not copied:
                result = result.clone()
        return result


def observe(
    case: Case, function: Callable[..., Any], tensors: dict[str, torch.Tensor], *, copy: bool = True
) -> Seen:
    """Run ``function`` on copies of the inputs (and, unless ``copy`` is False, of the weights)."""
    given = copies(case, tensors, copy)
    before = {n: t.detach().clone() for n, t in given.items()}
    torch.manual_seed(case.seed)
    result = function(*given.values())
    outputs = list(result)
    values = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    memory = _memory({**given, **values}, list(values))
    for name, tensor in given.items():
        if not same(tensor.detach(), before[name]):
            values[f"{name}, written"] = tensor.detach()
    if case.train:
        values |= gradients(case, outputs, given)
    return Seen({n: v.clone() for n, v in values.items()}, memory)


def _memory(tensors: dict[str, torch.Tensor], names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Of each name: the names of what shares its memory, and the strides of axes that have any."""
    found: dict[str, tuple[Any, ...]] = {}
    at = {n: t.untyped_storage().data_ptr() for n, t in tensors.items()}
    for name in names:
        value = tensors[name]
        shared = tuple(n for n in tensors if n != name and at[n] == at[name] and value.numel())
        strides = tuple(
            st for st, size in zip(value.stride(), value.shape, strict=True) if size > 1
        )
        found[name] = (shared, strides if value.numel() else ())
    return found


def gradients(
    case: Case, outputs: Sequence[torch.Tensor], given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of a fixed random functional of all outputs, by every leaf that wants one."""
    generator = torch.Generator().manual_seed(case.seed)
    terms = []
    for output in outputs:
        if output.requires_grad:
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            terms.append((output.double() * weight).sum())
    leaves = {n: t for n, t in given.items() if t.requires_grad}
    if not terms or not leaves:
        return {}
    found = torch.autograd.grad(torch.stack(terms).sum(), list(leaves.values()), allow_unused=True)
    return {f"gradient of {n}": g for n, g in zip(leaves, found, strict=True) if g is not None}


def copies(
    case: Case, tensors: dict[str, torch.Tensor], all_of_them: bool
) -> dict[str, torch.Tensor]:
    """Tensors that a run may write; memory that is shared stays shared."""
    made: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        t = case.tensors[name]
        if t.role != "input" and not all_of_them:
            made[name] = value
            continue
        shared = made.get(t.shares)
        new = value.detach().clone() if shared is None else shared.detach().view(value.shape)
        made[name] = new.requires_grad_(value.requires_grad and case.train)
        if isinstance(value, nn.Parameter):
            made[name] = nn.Parameter(new, requires_grad=value.requires_grad)
    return made


def wide(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit (NaN equals NaN)."""
    return a.shape == b.shape and bool(torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30)))


def sane(eager: Seen, exact: Seen) -> bool:
    """Whether eager is a number, and in any agreement with fp64 (else nothing can be told from it)."""
    if eager.values.keys() != exact.values.keys():
        return False
    for name, value in eager.values.items():
        reference = exact.values[name]
        if value.shape != reference.shape or not bool(value.isfinite().all()):
            return False
        if not bool(reference.isfinite().all()) or relative(value, reference) > 0.1:
            return False
    return True


def sensible(case: Case) -> bool:
    """Whether eager runs ``case`` at all, and gives a result that fp64 confirms."""
    with modes(case):
        try:
            eager, exact = truth(case, case.build())
        except Exception:
            return False
    return bool(eager.values) and sane(eager, exact)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest element of the reference."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    scale = float(b.double().abs().max())
    difference = float((a.double() - b.double()).abs().max())
    return difference / scale if scale else (math.inf if difference else 0.0)


def nearby(tensors: dict[str, torch.Tensor], sample: int, size: float) -> dict[str, torch.Tensor]:
    """The tensors moved by a relative ``size``."""
    generator = torch.Generator().manual_seed(sample)
    moved: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        new = value.detach()
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            new = (new.double() * (1 + size * noise)).to(value.dtype)
        moved[name] = new.requires_grad_(value.requires_grad)
    return moved


@contextlib.contextmanager
def modes(case: Case) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(case.train))
        if case.ambient:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield
