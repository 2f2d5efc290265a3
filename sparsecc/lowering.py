"""From Dynamo's Torch IR to pre-dispatch ATen, a run of plain nodes at a time.

Dynamo's graph mixes plain tensor code with nodes that must not be traced through: higher-order operators
(tracing drops recompute tags and custom backward functions), autocast and grad-mode switches, constants,
data-dependent sizes. So plain nodes are retraced in runs through ``make_fx(pre_dispatch=True)`` and spliced
in with the metadata of the originals; the others are copied as they are. Each run is checked against
Dynamo's own shapes and dtypes; a run that fails is halved until the guilty node stands alone and is copied.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from sparsecc import _torch
from sparsecc.errors import first_line
from sparsecc.program import copy_source

_ENTER = (torch.amp.autocast_mode._enter_autocast,)
_EXIT = (torch.amp.autocast_mode._exit_autocast,)
_GRAD = (torch._C._set_grad_enabled,)
# Constants trace to FakeTensor attributes; Dynamo's own node makes a real one.
_CONSTANTS = (torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.from_numpy)


class Lowering:
    """Rewrites one Dynamo graph. ``graph`` and ``opaque`` hold the result after :meth:`run`."""

    def __init__(self, source: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        self.source, self.fake_mode = source, fake_mode
        self.graph = fx.Graph()
        self.opaque: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self._new: dict[fx.Node, fx.Node] = {}
        self._regions: dict[fx.Node, Any] = {}
        self._level = 0  # of nested functorch transforms (vmap, grad, jvp)
        self.enables_grad = False  # whether the user switches gradients on inside

    def run(self) -> fx.Graph:
        pending: list[fx.Node] = []
        with self._state():
            for node in self.source.graph.nodes:
                reason = self._keep_reason(node)
                if reason is None:
                    pending.append(node)
                    continue
                self._lower(pending)
                pending = []
                self._enter_region(node)
                self._keep(node, reason)
        return self.graph

    def _keep_reason(self, node: fx.Node) -> str | None:
        """Why ``node`` is not lowered; between two switches of functorch's level nothing is."""
        name = getattr(node.target, "__name__", "")
        inside = self._level > 0
        if name.endswith("_increment_nesting"):
            self._level += 1
        elif name.endswith("_decrement_nesting"):
            self._level -= 1
        return "inside a functorch transform" if inside else keep_reason(node)

    # ---- plain nodes ---------------------------------------------------------------------------

    def _lower(self, nodes: list[fx.Node]) -> None:
        if not nodes:
            return
        try:
            traced, inputs, outputs = self._trace(nodes)
        except (
            Exception
        ) as error:  # whatever a node raises under tracing, Inductor may still take it
            if len(nodes) == 1:
                self._keep(nodes[0], f"not traceable: {type(error).__name__}: {first_line(error)}")
                return
            middle = len(nodes) // 2
            self._lower(nodes[:middle])
            self._lower(nodes[middle:])
            return
        self._splice(traced, inputs, outputs)

    def _trace(self, nodes: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        inside = set(nodes)
        inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
        outputs = [n for n in nodes if any(u not in inside for u in n.users)]

        def run(*values: Any) -> list[Any]:
            env = dict(zip(inputs, values, strict=True))
            for node in nodes:
                with fx_traceback.set_current_meta(node):
                    env[node] = _execute(self.source, node, env)
            return [env[node] for node in outputs]

        values = [self._new[node].meta["val"] for node in inputs]
        if any(isinstance(v, (list, tuple, dict)) for v in values):
            raise TypeError("reads a container made by an opaque node")
        with self.fake_mode, fx_traceback.preserve_node_meta():
            traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(*values)
        _check(traced, outputs)
        return traced, inputs, outputs

    def _splice(
        self, traced: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> None:
        local: dict[fx.Node, fx.Node] = {}
        sources = iter(inputs)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                local[node] = self._new[next(sources)]
            elif node.op == "output":
                for old, new in zip(outputs, node.args[0], strict=True):
                    if isinstance(new, fx.Node):
                        self._new[old] = local[new]
            else:
                copied = self.graph.node_copy(node, lambda n: local[n])
                copied.meta = {k: v for k, v in node.meta.items() if k in _KEPT_META}
                if node.op == "get_attr":
                    copied.target = self._constant(getattr(traced, str(node.target)))
                local[node] = copied

    def _constant(self, value: Any) -> str:
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = value
        return name

    # ---- nodes copied as they are ------------------------------------------------------------------

    def _keep(self, node: fx.Node, reason: str) -> None:
        new = self.graph.node_copy(node, lambda n: self._new[n])
        new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        if "example_value" in node.meta:
            new.meta["val"] = self._refake(node.meta["example_value"])
        copy_source(node, new)
        self._new[node] = new
        if reason:
            self.opaque[new.name] = reason

    def _refake(self, value: Any) -> Any:
        """Dynamo's fake values belong to its own mode; AOTAutograd and we share the backend's."""

        def convert(item: Any) -> Any:
            if not isinstance(item, torch.Tensor) or _torch.is_tensor_subclass(item):
                return item
            if _torch.is_functorch_wrapped(item):  # stands for what one level of a transform sees
                with self.fake_mode:
                    return torch.empty(item.shape, dtype=item.dtype, device=item.device)
            return self.fake_mode.from_tensor(item)

        return torch.utils._pytree.tree_map(convert, value)

    def _enter_region(self, node: fx.Node) -> None:
        """Trace what follows in the autocast and grad mode that it will run in."""
        target: Any = node.target
        if target in _ENTER:
            self._regions[node] = target(*node.args)
        elif target in _EXIT:
            entered: Any = node.args[0]
            region = self._regions.pop(entered, None)
            if region is not None:
                region.__exit__(None, None, None)
        elif node.target in _GRAD and self._level == 0:
            torch._C._set_grad_enabled(bool(node.args[0]))
            self.enables_grad |= bool(node.args[0])

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            for region in reversed(list(self._regions.values())):
                region.__exit__(None, None, None)
            torch._C._set_grad_enabled(grad)


_KEPT_META = frozenset(
    {"stack_trace", "nn_module_stack", "source_fn_stack", "val", "from_node", "custom"}
)


def keep_reason(node: fx.Node) -> str | None:
    """Why ``node`` must be copied untouched: "" for structure, words for an opaque node, None to lower it."""
    if node.op in ("placeholder", "output", "get_attr"):
        return ""
    if node.op == "call_module":
        return "a module call"
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher-order operator {target.name()}"
    if target in _ENTER or target in _EXIT or target in _GRAD:
        return ""
    if target in _CONSTANTS or _is_ours(target):
        return ""
    if node.op == "call_function" and getattr(target, "__module__", "") in _torch.STATEFUL_MODULES:
        return f"changes interpreter state: {getattr(target, '__name__', target)}"
    if any(_is_result_of_opaque(a) for a in node.all_input_nodes) and _is_getitem(node):
        return ""
    for value in (node.meta.get("example_value"), *map(_example, node.all_input_nodes)):
        for leaf in torch.utils._pytree.tree_leaves(value):
            if _torch.is_tensor_subclass(leaf):
                return f"tensor subclass {type(leaf).__name__}"
            if _torch.has_unbacked_symbols(leaf):
                return "data-dependent size"
    if node.op == "call_method" and target == "item":
        return ""  # how a float that may change comes in
    if "example_value" not in node.meta and target is not operator.setitem:  # which returns None
        return "no example value" if node.all_input_nodes else ""
    return None


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_ours(target: object) -> bool:
    """A region of a model that was baked: traced through, it would be its meaning."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "sparsecc"


def _is_result_of_opaque(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) or _is_ours(node.target)


def _execute(module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
    if node.op == "call_function":
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)


def _check(traced: fx.GraphModule, outputs: Sequence[fx.Node]) -> None:
    """The trace must agree with what Dynamo saw, or the run is not lowered."""
    results = next(iter(traced.graph.find_nodes(op="output"))).args[0]
    for old, new in zip(outputs, results, strict=True):
        expected = old.meta["example_value"]
        if isinstance(expected, torch.Tensor):
            if not isinstance(new, fx.Node):
                raise TypeError(f"{old.name} traced to a {type(new).__name__}")
            got = new.meta["val"]
            if (got.dtype, got.device, got.dim()) != (
                expected.dtype,
                expected.device,
                expected.dim(),
            ):
                raise TypeError(f"{old.name}: traced {got.dtype}, Dynamo saw {expected.dtype}")
            if tuple(map(str, got.shape)) != tuple(map(str, expected.shape)):
                raise TypeError(f"{old.name}: traced {got.shape}, Dynamo saw {expected.shape}")
        elif not isinstance(new, fx.Node):
            raise TypeError(f"{old.name} is not a tensor and traced to a constant")
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(traced, str(node.target)), FakeTensor):
            raise TypeError("the trace holds a fake constant")
        if _torch.has_unbacked_symbols(node.meta.get("val")):
            raise TypeError("the trace made a data-dependent size")
