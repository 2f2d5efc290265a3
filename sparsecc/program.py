"""The ``Program``: one FX graph in pre-dispatch ATen, with the role and the name of every input.

This module is the ground floor: passes, code generation and the driver all speak in ``Program``; it imports
nothing of theirs.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument
from torch.utils._pytree import tree_leaves

from sparsecc._torch import faking, without_new_guards

WEIGHT = "sparsecc_weight"  # node.meta: an expression over weights that a pass wrote
ORIGIN = "sparsecc_pass"  # node.meta: the pass that created the node
MOVED = "sparsecc_moved"  # node.meta: why the node's value differs from the original's by design


_SHAPE_QUERIES = frozenset(
    "sym_size sym_stride sym_numel zeros_like ones_like full_like empty_like rand_like "
    "randn_like new_zeros new_ones new_full new_empty".split()
)


_LIKE = ("aten.view_as.default", "aten.reshape_as.default", "aten.expand_as.default")


_TORCH = os.path.dirname(torch.__file__) + os.sep


class Role(enum.Enum):
    """What a placeholder is to the model."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    SYMBOL = "symbol"

    @property
    def is_weight(self) -> bool:
        return self in (Role.PARAMETER, Role.BUFFER)


@dataclass(frozen=True)
class Slot:
    """One input of the program: the placeholder's node name, its role, and its fully qualified name.

    ``storage`` is equal for two inputs exactly when they share memory (0: unknown, taken as its own).
    """

    name: str
    role: Role
    fqn: str
    storage: int = 0


@dataclass
class Program:
    """A graph in pre-dispatch ATen and what is known of its inputs.

    Attributes:
        module: the graph module; every tensor-valued node carries ``meta["val"]`` (a FakeTensor).
        slots: placeholder name -> :class:`Slot`.
        fake_mode: the mode that all ``meta["val"]`` belong to.
        opaque: node names copied as Dynamo had them (not ATen), with the reason.
        trains: whether gradients may flow through this program.
        transient: whether its weights are filled anew for each call (FSDP gathers them), so that nothing
            computed from them may be kept.
        migrated: the links of a recipe along which channels were scaled or shifted.
        given: names of the parameters whose codes a recipe gives: no pass may fold anything into them.
    """

    module: fx.GraphModule
    slots: dict[str, Slot]
    fake_mode: FakeTensorMode
    opaque: dict[str, str] = field(default_factory=dict)
    trains: bool = False
    transient: bool = False
    version: int = 0
    migrated: set[str] = field(default_factory=set)
    given: frozenset[str] = frozenset()

    @property
    def recomputes(self) -> bool:
        """Whether weight expressions stay in the graph and run at every call."""
        return self.trains or self.transient

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    def output(self) -> fx.Node:
        return self.graph.output_node()

    def slot(self, node: fx.Node) -> Slot | None:
        return self.slots.get(node.name) if node.op == "placeholder" else None

    def calls(self, *targets: object) -> Iterator[fx.Node]:
        """Nodes that call one of ``targets``, in topological order."""
        wanted = set(targets)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in wanted:
                yield node

    def copy(self) -> Program:
        """An independent copy of the graph; weights and fake values are shared, never written."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            new = graph.node_copy(node, lambda n: mapping[n])
            new.meta = dict(node.meta)
            new.name = node.name
            copy_source(node, new)
            mapping[node] = new
        graph._codegen = copy.deepcopy(self.graph._codegen)
        module = fx.GraphModule(self.module, graph)
        copy_origin(self.module, module)
        for node, new in mapping.items():  # GraphModule may rename on copy; slots are keyed by name
            if node.name != new.name:
                new._rename(node.name)
        return Program(
            module,
            dict(self.slots),
            self.fake_mode,
            dict(self.opaque),
            self.trains,
            self.transient,
            self.version,
            set(self.migrated),
            self.given,
        )

    # ---- edits: all passes go through these, so that metadata is never lost ----------------------

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument] | None = None,
        *,
        like: fx.Node,
        origin: str,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        val: Any = None,
    ) -> fx.Node:
        """Insert a call, with its fake value and the source line of ``like``.

        Args:
            like: the user's node that this one stands for (its stack trace and module stack are copied).
            origin: the name of the pass that writes it.
            before / after: where to insert (exactly one).
            val: the fake value, where the caller knows it (computed otherwise).
        Raises:
            ValueError: when neither or both positions are given.
        """
        if (before is None) == (after is None):
            raise ValueError("give exactly one of before= and after=")
        place = (
            self.graph.inserting_before(before)
            if before is not None
            else self.graph.inserting_after(after)
        )
        with place:
            node = self.graph.call_function(target, args, kwargs or {})
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta[ORIGIN] = origin
        node.meta["from_node"] = like.meta.get("from_node", [])
        node.meta["val"] = self.fake(target, args, kwargs or {}) if val is None else val
        self.version += 1
        return node

    def cast(
        self, value: fx.Node, dtype: torch.dtype, *, like: fx.Node, origin: str, before: fx.Node
    ) -> fx.Node:
        """``value`` in ``dtype``, by a new node where it is another."""
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(
            torch.ops.aten.to.dtype, (value, dtype), like=like, origin=origin, before=before
        )

    def fake(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``target`` returns on the fake values of its arguments."""
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with faking(self.fake_mode), torch.no_grad(), no_autocast():
            return target(*values, **named)

    def fake_for_all_sizes(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As :meth:`fake`; None where what it returns (its strides, say) is so for some sizes only."""
        return without_new_guards(self.fake_mode, self.fake, target, args, kwargs)

    def constant(self, value: torch.Tensor, *, like: fx.Node, origin: str) -> fx.Node:
        """A tensor of a recipe as a node that weight expressions may read (an attribute of the module)."""
        number = sum(name.startswith("_recipe_") for name, _ in self.module.named_buffers())
        name = f"_recipe_{number}"
        self.module.register_buffer(name, value.detach(), persistent=False)
        with self.graph.inserting_after(next(iter(reversed(self.placeholders())))):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.fake_mode.from_tensor(value.detach(), static_shapes=True)
        for key in ("stack_trace", "nn_module_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta[ORIGIN], node.meta[WEIGHT] = origin, True
        self.version += 1
        return node

    def drop_constants(self) -> None:
        """Forget the constants that nothing reads any more."""
        read = {node.target for node in self.graph.find_nodes(op="get_attr")}
        for name in [n for n, _ in self.module.named_buffers() if n.startswith("_recipe_")]:
            if name not in read:
                delattr(self.module, name)

    def bring_before(self, node: fx.Node, anchor: fx.Node) -> None:
        """Move ``node``, and what it is computed from, in front of ``anchor`` where it stands behind.

        For pure values of unwritten weights only: nothing else may change its place.
        """
        if node < anchor:
            return
        for source in node.all_input_nodes:
            self.bring_before(source, anchor)
        anchor.prepend(node)
        self.version += 1

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Give every use of ``old`` to ``new`` and erase ``old``."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.version += 1

    def erase(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        self.version += 1

    def sweep(self) -> None:
        """Drop dead nodes and check the graph is well formed."""
        self.graph.eliminate_dead_code(is_impure_node=is_effect)
        self.graph.lint()
        self.version += 1

    def weight(self, origin: str, like: fx.Node) -> WeightBuilder:
        """A builder of weight expressions (see :class:`WeightBuilder`)."""
        return WeightBuilder(self, origin, like)

    def text(self) -> str:
        """The graph as deterministic text, one node a line, with shapes and dtypes."""
        return "\n".join(_line(self, node) for node in self.graph.nodes) + "\n"


def copy_source(old: fx.Node, new: fx.Node) -> None:
    """Dynamo notes where each input comes from; AOTAutograd asks (aliasing, static addresses)."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source


def copy_origin(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """What marks a graph module as Dynamo's."""
    new.meta = dict(old.meta)
    if hasattr(old, "_param_name_to_source"):
        new._param_name_to_source = old._param_name_to_source


class WeightBuilder:
    """Writes weight expressions: ordinary nodes over the old weights, never tensors.

    In training they stay in the graph and are differentiated; in inference the hoisting step evaluates them
    once in fp64. They stand as early in the graph as their arguments allow, so that no autocast or grad-mode
    region of the user's wraps them. Half-precision weights are widened first: a chain of folds rounds once.
    """

    def __init__(self, program: Program, origin: str, like: fx.Node) -> None:
        self.program, self.origin, self.like = program, origin, like

    def call(self, target: Callable[..., Any], *args: Argument, **kwargs: Argument) -> fx.Node:
        last = next(iter(reversed(self.program.placeholders())))
        for arg in tree_leaves((args, kwargs)):  # cat takes a list of them
            if isinstance(arg, fx.Node) and last < arg:
                last = arg
        # FX inserts right after `last`; earlier weight expressions already there stay in front.
        node = self.program.call(
            target, args, kwargs, like=self.like, origin=self.origin, after=last
        )
        node.meta[WEIGHT] = True
        return node

    def wide(self, node: fx.Node) -> fx.Node:
        """``node`` in fp32 if it is narrower; identity otherwise."""
        value = node.meta["val"]
        if value.dtype in (torch.bfloat16, torch.float16):
            return self.call(torch.ops.aten.to.dtype, node, torch.float32)
        return node

    def as_dtype(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(torch.ops.aten.to.dtype, node, dtype)

    def mul(self, a: fx.Node, b: Argument) -> fx.Node:
        return self.call(_scalar_or_tensor(torch.ops.aten.mul, b), a, b)

    def add(self, a: fx.Node, b: Argument) -> fx.Node:
        return self.call(_scalar_or_tensor(torch.ops.aten.add, b), a, b)

    def sub(self, a: fx.Node, b: Argument) -> fx.Node:
        return self.call(_scalar_or_tensor(torch.ops.aten.sub, b), a, b)

    def mean(self, a: fx.Node, dim: int) -> fx.Node:
        return self.call(torch.ops.aten.mean.dim, a, [dim], True)

    def sum(self, a: fx.Node, dim: int) -> fx.Node:
        return self.call(torch.ops.aten.sum.dim_IntList, a, [dim])

    def centred(self, node: fx.Node, dim: int) -> fx.Node:
        """``w - w.mean(dim, keepdim=True)`` in the dtype of ``w``."""
        wide = self.wide(node)
        return self.as_dtype(self.sub(wide, self.mean(wide, dim)), node.meta["val"].dtype)


# Operators that move running statistics, which their schemas do not say; arguments 3 to 5 are the mean, the
# variance and whether they are moved.
_MOVES_STATISTICS = frozenset(
    "batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm "
    "_batch_norm_impl_index".split()
)


def moved_statistics(node: fx.Node) -> list[fx.Node]:
    """The running statistics that ``node`` writes (BatchNorm and InstanceNorm in training)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or len(node.args) < 6:
        return []
    if target._schema.name.removeprefix("aten::") not in _MOVES_STATISTICS or not node.args[5]:
        return []
    return [value for value in node.args[3:5] if isinstance(value, fx.Node)]


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes``, and all that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def is_effect(node: fx.Node) -> bool:
    """Whether removing an unused ``node`` could change what the user sees."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return (
            target._schema.is_mutable
            or torch.Tag.nondeterministic_seeded in target.tags
            or bool(moved_statistics(node))
        )
    if getattr(target, "__module__", "") == "_operator":
        return getattr(target, "__name__", "") in WRITING_OPERATORS
    # What Dynamo left (higher-order operators, grad mode, asserts) may have effects; keep all of it.
    return True


WRITING_OPERATORS = frozenset(
    "setitem delitem iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub "
    "itruediv ixor iconcat".split()
)


def is_shape_query(node: fx.Node) -> bool:
    """Whether ``node`` reads only the shape, dtype or device of its operand."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.removeprefix("aten::")
    return name in _SHAPE_QUERIES and len(node.all_input_nodes) == 1


def reads_shape_only(user: fx.Node, value: fx.Node) -> bool:
    """Whether ``user`` asks ``value`` for its shape or dtype alone."""
    if is_shape_query(user):
        return True
    return target_name(user) in _LIKE and user.args[0] is not value


def source_line(node: fx.Node) -> str:
    """``file:line, in function`` of the user's code that made ``node`` (empty when unknown)."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
    if not frames:
        return ""
    own = [
        f for f in frames if not f[0].startswith(_TORCH)
    ]  # nn.LayerNorm.forward is not the user's
    path, line, function = (own or frames)[-1]
    return f"{path}:{line}, in {function}"


def module_path(node: fx.Node) -> str:
    """The user's module that made ``node``, as ``model.layers.3.mlp`` (empty when unknown)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    if not paths:
        return ""
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", paths[-1])
    return re.sub(r"^L\['\w+'\]\.?", "", path)


def _scalar_or_tensor(packet: Any, other: Argument) -> Callable[..., Any]:
    overload: Callable[..., Any] = packet.Tensor if isinstance(other, fx.Node) else packet.Scalar
    return overload


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast off on every device: weight expressions are evaluated as they are written."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_value(v) for v in value) + ")"
    return type(value).__name__ if value is not None else "-"


def _line(program: Program, node: fx.Node) -> str:
    def show(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return f"%{arg.name}"
        if isinstance(arg, (list, tuple)):
            body = ", ".join(show(a) for a in arg)
            return f"[{body}]" if isinstance(arg, list) else f"({body})"
        if isinstance(arg, float):
            return repr(arg)
        return str(arg)

    value = _value(node.meta.get("val"))
    if node.op == "placeholder":
        slot = program.slots[node.name]
        return f"%{node.name} : {value} = {slot.role.value} {slot.fqn or node.name}"
    if node.op == "output":
        return f"return {show(node.args[0])}"
    parts = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
    mark = f"  # {node.meta[ORIGIN]}" if ORIGIN in node.meta else ""
    return f"%{node.name} : {value} = {target_name(node)}({', '.join(parts)}){mark}"


def target_name(node: fx.Node) -> str:
    """A stable name of what ``node`` calls: ``aten.linear.default``, ``torch.relu``, ``.view``."""
    target = node.target
    if isinstance(target, str):
        return f".{target}" if node.op == "call_method" else target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    return f"{module}.{name}".lstrip("._") if name else str(target)
