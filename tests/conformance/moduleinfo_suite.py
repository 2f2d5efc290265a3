"""PyTorch's own module database: every ModuleInfo, with a handful of its inputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from conformance.case import Case, NotBuildable
from conformance.observe import seed
from conformance.opinfo_suite import SAMPLES
from support import randomise
from torch import nn
from torch.utils._pytree import tree_map


@functools.cache
def _modules() -> dict[str, Any]:
    from torch.testing._internal.common_modules import module_db

    return {info.name: info for info in module_db}


def names() -> list[str]:
    return sorted(_modules())


def build(name: str) -> list[Case]:
    info = _modules()[name]
    seed()
    found = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=False
    )
    found = [inputs for inputs in found if inputs.forward_input is not None]
    if not found:
        raise NotBuildable("no inputs on CPU")
    step = max(1, (len(found) - 1) // (SAMPLES - 1))
    return [_case(info.module_cls, inputs) for inputs in found[::step][:SAMPLES]]


def _case(module_class: type[nn.Module], inputs: Any) -> Case:
    given = inputs.constructor_input
    torch.manual_seed(0)
    module = module_class(*given.args, **given.kwargs).float()
    args, kwargs = tree_map(_leaf, (inputs.forward_input.args, inputs.forward_input.kwargs))
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        with torch.no_grad():
            module(*args, **kwargs)
    return Case(randomise(module).eval(), args, kwargs)


def _leaf(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)
