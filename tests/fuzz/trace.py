"""A graph like the one that Dynamo makes, for a fraction of its time.

The program runs once on fake tensors under a torch-function mode that records what it calls; placeholders
carry sources, so that the backend tells parameters from buffers and inputs.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from fuzz.case import Case
from torch import fx
from torch._dynamo.source import AttrSource, ConstantSource, DictGetItemSource, LocalSource
from torch._guards import GuardSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_SILENT = frozenset("shape dtype device ndim layout requires_grad is_leaf grad grad_fn".split())
_OPERATORS = frozenset(
    "add sub mul truediv pow matmul neg getitem setitem iadd isub imul itruediv".split()
)
_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast

_SIZES = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.mul,
    "FloorDiv": operator.floordiv,
}
_TRACE = '  File "<fuzz program>", line 1, in program'

Reader = tuple[str, int | None]  # a tensor, or one of its sizes


def read(tensors: Mapping[str, Any], reader: Reader) -> Any:
    """The value of one placeholder."""
    name, axis = reader
    return tensors[name] if axis is None else tensors[name].shape[axis]


class _FSDPSource(DictGetItemSource):
    """Where a weight of an FSDP module comes from."""

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.LOCAL_FSDP_MODULE


def dynamo_like(
    case: Case, tensors: Mapping[str, torch.Tensor]
) -> tuple[fx.GraphModule, list[Reader]]:
    """The graph, and for each of its placeholders how its value comes from the tensors."""
    recorder = _Recorder(case)
    taken = recorder.placeholders(tensors)
    names = {"autocast": recorder.autocast, "torch": recorder.torch()}
    program = case.function(names=names)
    # Sizes need fake tensors; otherwise real ones will do, which are ten times as fast.
    mode = recorder.mode if case.dynamic else contextlib.nullcontext()
    with mode, recorder:
        result = program(*taken)
    values = tree_map(recorder.node_of, result)
    recorder.graph.output(tuple(values))
    return fx.GraphModule(torch.nn.Module(), recorder.graph), recorder.readers


class _Recorder(TorchFunctionMode):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=not case.dynamic)
        self.readers: list[Reader] = []
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        self._symbols: dict[sympy.Symbol, fx.Node] = {}

    # ---- inputs ----------------------------------------------------------------------------------

    def placeholders(self, tensors: Mapping[str, torch.Tensor]) -> list[Any]:
        taken = []
        for name, value in tensors.items():
            fake = self._fake(name, value)
            for axis, size in enumerate(fake.shape):
                if isinstance(size, torch.SymInt) and size.node.expr not in self._symbols:
                    symbol = self.graph.placeholder(str(size.node.expr))
                    symbol.meta["example_value"] = size
                    symbol._dynamo_source = None  # type: ignore[attr-defined]
                    self._symbols[size.node.expr] = symbol
                    self.readers.append((name, axis))
            node = self.graph.placeholder(name)
            node.meta["example_value"] = fake
            node._dynamo_source = self._source(name)  # type: ignore[attr-defined]
            given = fake if self.case.dynamic else value.detach().clone()
            given.requires_grad_(value.requires_grad)
            self._remember(given, node)
            self.readers.append((name, None))
            taken.append(given)
        return taken

    def _fake(self, name: str, value: torch.Tensor) -> Any:
        is_input = self.case.tensors[name].role == "input"
        if not self.case.dynamic or not is_input:
            return self.mode.from_tensor(value, static_shapes=True)
        axes = range(value.dim()) if self.case.dynamic == "all" else range(1)
        sizes = [DimDynamic.DUCK if a in axes else DimDynamic.STATIC for a in range(value.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(f"__{name}")
        return self.mode.from_tensor(value, symbolic_context=context, source=source)

    def _source(self, name: str) -> Any:
        role = self.case.tensors[name].role
        if role == "input":
            return LocalSource(name)
        held = "_buffers" if role == "buffer" else "_parameters"
        kind = _FSDPSource if self.case.gathered else DictGetItemSource
        return kind(AttrSource(LocalSource("self"), held), name)

    # ---- calls -----------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        attribute = ""
        if name == "__get__":
            attribute = func.__self__.__name__
            if attribute in _SILENT:
                return result
        is_write = name == "__setitem__"
        if not is_write and not any(isinstance(r, torch.Tensor) for r in tree_leaves(result)):
            return result
        taken, named = tree_map(self.node_of, (tuple(args), dict(kwargs)))
        if attribute:
            node = self.graph.call_function(getattr, (taken[0], attribute))
        elif name.strip("_") in _OPERATORS and name.startswith("__"):
            node = self.graph.call_function(getattr(operator, name.strip("_")), taken)
        elif getattr(torch.Tensor, name, None) is func:
            node = self.graph.call_method(name, taken, named)
        else:
            node = self.graph.call_function(func, taken, named)
        return self._recorded(node, result)

    def _recorded(self, node: fx.Node, result: Any) -> Any:
        node.meta["stack_trace"] = (
            _TRACE  # retracing looks for one where there is none, which takes long
        )
        if isinstance(result, (tuple, list)):
            parts = []
            for index, part in enumerate(result):
                item = self.graph.call_function(operator.getitem, (node, index))
                parts.append(self._recorded(item, part))
            node.meta["example_value"] = (
                type(result)(parts) if type(result) in (tuple, list) else tuple(parts)
            )
            return node.meta["example_value"]
        if isinstance(result, torch.Tensor):
            if id(result) in self._nodes:  # it handed back its input: a value of its own to Dynamo
                result = result.detach()
            node.meta["example_value"] = result
            self._remember(result, node)
        return result

    def _remember(self, value: Any, node: fx.Node) -> None:
        self._nodes[id(value)] = node
        self._alive.append(value)

    def node_of(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, torch.Tensor):
            return self._nodes[id(value)]
        if isinstance(value, torch.SymInt):
            return self._expression(value)
        return value

    def _expression(self, value: torch.SymInt) -> Any:
        return self._sized(value.node.expr)[0]

    def _sized(self, expr: Any) -> tuple[Any, Any]:
        """(node or number, value) of a size: sums, products and quotients of the symbols of the inputs."""
        if expr.is_Integer:
            return int(expr), int(expr)
        if expr not in self._symbols:
            if expr.is_Pow and expr.args[1].is_Integer and expr.args[1] > 0:
                parts = [expr.args[0]] * int(expr.args[1])
            else:
                parts = list(expr.args)
            function = _SIZES.get(type(expr).__name__)
            if function is None:
                raise NotImplementedError(f"size {expr}")
            node, held = self._sized(parts[0])
            for part in parts[1:]:
                other, size = self._sized(part)
                node, held = self.graph.call_function(function, (node, other)), function(held, size)
                node.meta["example_value"] = held
            self._symbols[expr] = node
        node = self._symbols[expr]
        return node, node.meta["example_value"]

    # ---- regions ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def autocast(self, device: str, dtype: torch.dtype) -> Iterator[None]:
        entered = self.graph.call_function(_ENTER, (device, dtype, True, True))
        with torch.autocast(device, dtype):
            yield
        self.graph.call_function(_EXIT, (entered,))

    @contextlib.contextmanager
    def _grad(self, enabled: bool) -> Iterator[None]:
        before = torch.is_grad_enabled()
        self.graph.call_function(torch._C._set_grad_enabled, (enabled,))
        with torch.set_grad_enabled(enabled):
            yield
        self.graph.call_function(torch._C._set_grad_enabled, (before,))

    def torch(self) -> Any:
        """``torch`` as the program sees it: switches of the grad mode are recorded."""
        return _Torch(self._grad)


class _Torch:
    def __init__(self, grad: Any) -> None:
        self._grad = grad

    def no_grad(self) -> Any:
        return self._grad(False)

    def enable_grad(self) -> Any:
        return self._grad(True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
