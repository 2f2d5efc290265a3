"""Running a program in fp64: the reference of every proof, and how folded weights are evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparsecc.program import WEIGHT, no_autocast

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_CAST_METHODS = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble"}
_REGIONS = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


def widen(value: Any) -> Any:
    """Floating and complex tensors in fp64; everything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in _WIDE:
        return value.to(_WIDE[value.dtype])
    return value


class Fp64(fx.Interpreter):
    """Interprets a graph with every floating value, cast and factory in fp64.

    Casts to narrower types that the program spells out become casts to fp64, autocast regions are left out,
    and the bodies of higher-order operators are rewritten alike. ``seen`` is called with every node's value.
    """

    def __init__(
        self, module: fx.GraphModule, seen: Callable[[fx.Node, Any], None] | None = None
    ) -> None:
        super().__init__(_widened_bodies(module), garbage_collect_values=True)
        self.seen = seen

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and any(
            self.env.get(a) is result and _dtype(a) != _dtype(n) for a in n.all_input_nodes
        ):
            # A cast is a copy, which may be written, also where fp64 casts nothing.
            result = result.clone()
        if self.seen is not None:
            self.seen(n, result)
        return result

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _REGIONS:
            return None
        args, kwargs = _wide_dtypes((args, kwargs))
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _wide_dtypes((args, kwargs))
        return super().call_method(_CAST_METHODS.get(target, target), args, kwargs)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def run_fp64(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    seen: Callable[[fx.Node, Any], None] | None = None,
) -> Any:
    """The outputs of ``module`` with all floating arithmetic in fp64.

    ``inputs`` are fp64 already (:func:`fp64_copies`); in-place operators write them, as they would.
    """
    with no_autocast():
        return Fp64(module, seen).run(*inputs)


def copies(inputs: Sequence[Any]) -> list[Any]:
    """Copies of ``inputs`` that a run may write."""
    return [i.detach().clone() if isinstance(i, torch.Tensor) else i for i in inputs]


def fp64_copies(inputs: Sequence[Any]) -> list[Any]:
    """Copies of ``inputs`` in fp64 that a run may write."""
    return [_own(widen(i)) for i in inputs]


class FoldInterpreter(fx.Interpreter):
    """Evaluates weight expressions: what passes wrote in fp64, what the user wrote in its own dtype.

    The user's own arithmetic on weights may round on purpose (fake quantization); it is left as it is.
    """

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not n.meta.get(WEIGHT):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = _wide_dtypes(torch.utils._pytree.tree_map(widen, (args, kwargs)))
        return n.target(*args, **kwargs)  # type: ignore[operator]


def _wide_dtypes(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda leaf: _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf, value
    )


def _own(value: Any) -> Any:
    """A copy that in-place operators may write (fp64 inputs are not copied by ``widen``)."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _widened_bodies(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` with the subgraphs of higher-order operators widened too."""
    bodies = [
        n.target
        for n in module.graph.find_nodes(op="get_attr")
        if isinstance(getattr(module, str(n.target), None), fx.GraphModule)
    ]
    if not bodies:
        return module
    shallow = fx.GraphModule(module, module.graph)
    for name in bodies:
        body = copy.deepcopy(getattr(module, str(name)))
        for inner in [m for m in body.modules() if isinstance(m, fx.GraphModule)]:
            for node in inner.graph.nodes:
                node.args, node.kwargs = _wide_dtypes((node.args, node.kwargs))
                if node.op == "call_method":
                    node.target = _CAST_METHODS.get(node.target, node.target)
                elif node.target in _REGIONS:
                    raise NotImplementedError("autocast inside a higher-order operator")
            inner.recompile()
        setattr(shallow, str(name), body)
    return shallow
