"""The two doors into a :class:`Program`: Dynamo's graph module and ``torch.export``'s program."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparsecc import _torch
from sparsecc.errors import CaptureError
from sparsecc.lowering import Lowering
from sparsecc.program import Program, Role, Slot, copy_origin


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Lower Dynamo's graph to a :class:`Program`; ``gm`` is not touched.

    Args:
        gm: the graph module that Dynamo hands to a backend.
        example_inputs: one value per placeholder (real tensors, fake tensors or SymInts).
    Raises:
        CaptureError: when the graph cannot be taken (a reason for falling through to Inductor).
    """
    fake_mode = _torch.backend_fake_mode() or _fake_mode_of(gm)
    lowering = Lowering(gm, fake_mode)
    graph = lowering.run()
    for node in graph.nodes:
        if _reshapes_in_place(node):  # one node, two shapes: no fact about it would hold
            raise CaptureError(f"{node.name} changes the shape of a tensor in place")
    module = fx.GraphModule(_root(gm, lowering.constants), graph)
    copy_origin(gm, module)
    sources: Any = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources = {**sources, **_torch.constant_sources(lowering.constants)}
        module._param_name_to_source = sources
    slots: dict[str, Slot] = {}
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if _torch.is_tensor_subclass(value) and _torch.local_part(value) is None:
            raise CaptureError(f"input {node.name} is a tensor subclass, {type(value).__name__}")
        slots[node.name] = _slot(node, value)
    trains = any(isinstance(v, torch.Tensor) and v.requires_grad for v in example_inputs)
    if not torch.is_grad_enabled():
        if trains and lowering.enables_grad:
            # Weight expressions stand at the top of the graph, where gradients are off.
            raise CaptureError("gradients are switched on inside a call made under no_grad")
        trains = False
    transient = any(map(_torch.is_gathered, graph.find_nodes(op="placeholder")))
    return Program(module, slots, fake_mode, dict(lowering.opaque), trains, transient)


def from_export(exported: torch.export.ExportedProgram) -> Program:
    """View an ``ExportedProgram`` as a :class:`Program` (a copy; the export is not touched).

    Raises:
        CaptureError: when the export was functionalized to core ATen (``run_decompositions``), where norms
            are already taken apart; export again without decompositions.
    """
    source = exported.graph_module
    if exported.dialect != "TRAINING" and any(
        node.target in _DECOMPOSED for node in source.graph.nodes
    ):
        raise CaptureError(
            "this program was decomposed to core ATen, where linear layers and norms are taken apart; "
            "rewrite it before run_decompositions()"
        )
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    opaque: dict[str, str] = {}
    for node in source.graph.nodes:
        new = graph.node_copy(node, lambda n: mapping[n])
        new.name = node.name  # signatures go by name; a copy renames what shadows a builtin
        new.meta = dict(node.meta)
        mapping[node] = new
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            opaque[node.name] = f"higher-order operator {node.target.name()}"
    slots: dict[str, Slot] = {}
    fake_mode: FakeTensorMode | None = None
    specs = exported.graph_signature.input_specs
    for node, spec in zip(graph.find_nodes(op="placeholder"), specs, strict=True):
        slots[node.name] = _export_slot(node, spec)
        fake_mode = fake_mode or getattr(node.meta.get("val"), "fake_mode", None)
    module = fx.GraphModule(source, graph)
    module.meta = dict(source.meta)
    mode = fake_mode or FakeTensorMode(shape_env=ShapeEnv())
    return Program(module, slots, mode, opaque)


_DECOMPOSED = frozenset(
    {
        torch.ops.aten.addmm.default,
        torch.ops.aten.native_layer_norm.default,
        torch.ops.aten._native_batch_norm_legit_no_training.default,
    }
)


def _export_slot(node: fx.Node, spec: torch.export.graph_signature.InputSpec) -> Slot:
    kinds = torch.export.graph_signature.InputKind
    roles = {kinds.PARAMETER: Role.PARAMETER, kinds.BUFFER: Role.BUFFER}
    role = roles.get(spec.kind, Role.INPUT)
    if isinstance(node.meta.get("val"), torch.SymInt):
        role = Role.SYMBOL
    return Slot(node.name, role, spec.target or "")


def _reshapes_in_place(node: fx.Node) -> bool:
    """``transpose_``, ``squeeze_``, ``resize_`` and the like, lowered or as Dynamo had them."""
    if node.target in (torch.ops.aten.detach_.default, "detach_"):
        return False  # tagged like them, but it changes no shape
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.inplace_view in node.target.tags
    if node.op != "call_method" or not str(node.target).endswith("_"):
        return False
    packet = getattr(torch.ops.aten, str(node.target), None)
    return packet is not None and any(
        torch.Tag.inplace_view in getattr(packet, name).tags for name in packet.overloads()
    )


def _slot(node: fx.Node, value: Any) -> Slot:
    source = getattr(node, "_dynamo_source", None)
    name = source.name if source is not None else ""
    name = name() if callable(name) else name  # a method before torch 2.12
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return Slot(node.name, Role.SYMBOL, "")
    storage = _storage(value)
    if _torch.is_tensor_subclass(value):
        # Not a weight to the passes: what they would write mixes plain and sharded tensors, and folding it
        # again is a decision that one rank cannot take alone where it needs a collective.
        return Slot(node.name, Role.INPUT, name, storage)
    if isinstance(value, torch.nn.Parameter) or "._parameters[" in name:
        return Slot(node.name, Role.PARAMETER, qualified_name(name) or node.name, storage)
    if "._buffers[" in name:
        return Slot(node.name, Role.BUFFER, qualified_name(name), storage)
    return Slot(node.name, Role.INPUT, name, storage)


def _storage(value: Any) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    local = _torch.local_part(value)
    value = value if local is None else local
    if isinstance(value, FakeTensor):
        return 0
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts have none
        return 0


def qualified_name(source: str) -> str:
    """``L['self']._modules['fc']._parameters['weight']`` -> ``fc.weight``."""
    keys = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
    return ".".join(keys)


def _root(gm: fx.GraphModule, constants: dict[str, Any]) -> torch.nn.Module:
    """A module holding what get_attr nodes may name: Dynamo's attributes and the traces' constants."""
    if not constants:
        return gm
    root = torch.nn.Module()
    for node in gm.graph.find_nodes(op="get_attr"):
        _set(root, str(node.target), _get(gm, str(node.target)))
    for name, value in constants.items():
        setattr(root, name, value)
    return root


def _get(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _set(module: torch.nn.Module, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(module, part):
            setattr(module, part, torch.nn.Module())
        module = getattr(module, part)
    setattr(module, last, value)


def _fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    for node in gm.graph.find_nodes(op="placeholder"):
        mode = getattr(node.meta.get("example_value"), "fake_mode", None)
        if mode is not None:
            found: FakeTensorMode = mode
            return found
    return FakeTensorMode(shape_env=ShapeEnv())
