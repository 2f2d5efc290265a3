"""PyTorch's own operator database: every OpInfo, with a handful of its sample inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from conformance.case import Case, NotBuildable
from conformance.observe import seed
from torch.utils._pytree import tree_leaves, tree_map

SAMPLES = 3
# Results of these are whatever memory holds; filled, so that they can be compared.
_UNINITIALISED = "empty empty_like empty_permuted empty_strided new_empty new_empty_strided".split()
_ORDER = (torch.float32, torch.complex64, torch.int64, torch.int32, torch.bool)


@functools.cache
def _ops() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return {".".join(filter(None, (op.name, op.variant_test_name))): op for op in op_db}


def names() -> list[str]:
    return sorted(_ops())


def build(name: str) -> list[Case]:
    op = _ops()[name]
    dtype = _dtype(op)
    train = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    seed()
    found = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=train), 400))
    if not found:
        raise NotBuildable("no sample inputs on CPU")
    step = max(1, (len(found) - 1) // (SAMPLES - 1)) if SAMPLES > 1 else 1
    return [_case(name, op, sample) for sample in found[::step][:SAMPLES]]


def _dtype(op: Any) -> torch.dtype:
    supported = op.supported_dtypes("cpu")
    if not supported:
        raise NotBuildable("no dtype is supported on CPU")
    order = [d for d in _ORDER if d in supported]
    return order[0] if order else min(supported, key=str)


def _case(name: str, op: Any, sample: Any) -> Case:
    args, kwargs = tree_map(_leaf, ((sample.input, *sample.args), sample.kwargs))
    asks = [t.requires_grad for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    call = _call(op.op, sample.output_process_fn_grad, name in _UNINITIALISED)
    return Case(call, args, kwargs, train=any(asks))


def _leaf(value: Any) -> Any:
    """A tensor that can be copied: some samples are views of what requires a gradient."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _call(
    op: Callable[..., Any], settle: Callable[[Any], Any], uninitialised: bool
) -> Callable[..., Any]:
    """``settle`` takes out what is free in a result (the phase of an eigenvector)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        return result.fill_(1) if uninitialised else settle(result)

    return call
