"""Models compiled through Inductor, called several times, and compared with eager and fp64.

Everything that a call leaves behind counts: outputs, written inputs, gradients, buffers. The rule is that of
:func:`sparsecc.proof.compare`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

import sparsecc
from sparsecc.proof import compare


def ours(report: sparsecc.Report | None = None, **options: Any) -> dict[str, Any]:
    """Settings of ``torch.compile`` under which nothing falls through and nothing is left uncompiled."""
    chosen = {"strict": True, "floor": False, **options}
    return {
        "backend": "sparsecc",
        "options": chosen if report is None else {**chosen, "report": report},
    }


def own(value: Any) -> Any:
    """A leaf of its own with the same strides."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.no_grad():
        if 0 in value.stride():  # expanded
            return value.detach()
        new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
    return new.requires_grad_(value.requires_grad)


def run_backward(function: Any, args: Any, kwargs: Any, train: bool) -> tuple[Any, Any]:
    """The outputs of a call on copies, and those copies after the backward of its square sum."""
    torch.manual_seed(7)
    args, kwargs = tree_map(own, (args, kwargs))
    with torch.set_grad_enabled(train):
        outputs = function(*args, **kwargs)
    losses = [o for o in tree_leaves(outputs) if isinstance(o, torch.Tensor) and o.requires_grad]
    if losses:
        sum(loss.abs().double().pow(2).sum() for loss in losses).backward()
    return outputs, (args, kwargs)


def observe(
    function: Any, args: Any, kwargs: Any, train: bool, model: nn.Module | None = None
) -> dict[str, Any]:
    """Everything a call leaves behind: outputs, inputs after it, gradients, buffers."""
    outputs, (args, kwargs) = run_backward(function, args, kwargs, train)
    found = {}
    for what, tree in {"output": outputs, "input": (args, kwargs)}.items():
        for path, leaf in tree_flatten_with_path(tree)[0]:
            found[what + "".join(map(str, path))] = leaf
            if what == "input" and isinstance(leaf, torch.Tensor):
                found[f"gradient of input{''.join(map(str, path))}"] = leaf.grad
    if model is not None:
        found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        found |= {f"buffer {n}": b for n, b in model.named_buffers()}
    return {n: v.detach().clone() if isinstance(v, torch.Tensor) else v for n, v in found.items()}


def nearby(value: Any, draw: int) -> Any:
    """Float tensors moved by a thousandth, strides and overlaps kept: another draw of rounding errors."""
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() and value.numel()):
        return value
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        size = value.untyped_storage().nbytes() // value.element_size()
        flat = value.as_strided((size,), (1,), 0).clone()
        if draw:
            flat *= 1 + 1e-3 * torch.randn(size, generator=generator).to(flat)
        new = flat.as_strided(value.shape, value.stride(), value.storage_offset())
    return new.requires_grad_(value.requires_grad)


def widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16):
        return value.detach().double().requires_grad_(value.requires_grad)
    return value.to(torch.complex128) if getattr(value, "dtype", None) is torch.complex64 else value


Observed = dict[str, Any]


def no_worse(
    got: Observed | Sequence[Observed],
    eager: Observed | Sequence[Observed],
    exact: Observed | Sequence[Observed],
    tensors: int = 1,
) -> None:
    """``got`` is of eager's types and layouts, and no further from fp64 than the rule allows.

    Given several draws of nearby inputs, their errors are pooled under the same rule: in one draw of a small
    tensor two roundings are compared, not two programs.
    """
    draws = [[r] if isinstance(r, dict) else list(r) for r in (got, eager, exact)]
    compared = 0
    for name in draws[0][0]:
        values, wanted, truth = ([one[name] for one in run] for run in draws)
        for value, other in zip(values, wanted, strict=True):
            assert type(value) is type(other), name
            if not isinstance(other, torch.Tensor):
                assert value == other, name
                continue
            assert (value.shape, value.dtype) == (other.shape, other.dtype), name
            if other.numel() and not name.startswith("gradient"):
                assert value.stride() == other.stride(), name
        if isinstance(values[0], torch.Tensor):
            verdict = compare(name, *map(_stacked, (values, wanted, truth)))
            assert verdict.passed, f"{verdict}\n{values}\n{wanted}"
            compared += 1
    assert compared >= tensors
    assert all(one.keys() == draws[0][0].keys() for run in draws for one in run)


def _stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    stack = torch.stack(list(values)) if len(values) > 1 else values[0]
    return torch.view_as_real(stack) if stack.is_complex() else stack


def agree(
    runs: Sequence[tuple[Any, Any]],
    args: Any,
    kwargs: dict[str, Any] | None = None,
    train: bool = True,
    draws: int = 4,
) -> None:
    """Three pairs of a function and its module (ours, eager, fp64), called on ``args`` and on inputs nearby."""
    found: list[list[Observed]] = [[], [], []]
    for draw in range(draws):
        given = tree_map(lambda v: nearby(v, draw), (args, kwargs or {}))  # noqa: B023
        for index, (function, module) in enumerate(runs):
            module = module if isinstance(module, nn.Module) else None
            if module is not None:
                module.zero_grad()
            own_args, own_kwargs = tree_map(widened, given) if index == 2 else given
            found[index].append(observe(function, own_args, own_kwargs, train, module))
    no_worse(*found)


def judge(
    model: Any,
    *args: Any,
    applied: dict[str, int],
    train: bool = True,
    exact: Any = None,
    draws: int = 4,
    options: dict[str, Any] | None = None,
    compile: Callable[..., Any] = torch.compile,  # noqa: A002
    **settings: Any,
) -> tuple[Any, sparsecc.Report]:
    """Compile ``model`` through Inductor and compare every call with eager and fp64 copies of it.

    ``exact`` is the model of the fp64 reference where a copy in double precision is not one. Returns the
    compiled model and the report. Nothing may fall through, and nothing passes by doing nothing.
    """
    report = sparsecc.Report()
    plain, wide = copy.deepcopy(model), copy.deepcopy(exact if exact is not None else model)
    for one in (model, plain, wide):
        if isinstance(one, nn.Module):
            one.train(train)
    if isinstance(wide, nn.Module):
        wide.double()
    fast = compile(model, **ours(report, **(options or {})), **{"fullgraph": True, **settings})
    agree([(fast, model), (plain, plain), (wide, wide)], args, train=train, draws=draws)
    counts = {name: report[name].applied for name in applied}
    refusals = [f"{r.code}: {r.reason}" for name in applied for r in report[name].refusals]
    assert counts == applied, "\n".join([*report.fallbacks, *refusals])
    assert not report.fallbacks
    return fast, report


def copies(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(model), copy.deepcopy(model).double()


def train_alike(
    fast: Any, model: nn.Module, plain: nn.Module, wide: nn.Module, x: torch.Tensor
) -> None:
    """A training step of each agrees."""
    agree([(fast, model), (plain, plain), (wide, wide)], (x,))


def follow(model: nn.Module, fast: Any, *steps: Callable[[Any], Any]) -> None:
    """Every step, a function of the model, gives what eager gives, by the fp64 rule."""
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    for step in steps:
        no_worse(*(named(step(m)) for m in (fast, plain, wide)))


def named(value: Any) -> dict[str, Any]:
    return {str(i): v for i, v in enumerate(tree_leaves(value))}
