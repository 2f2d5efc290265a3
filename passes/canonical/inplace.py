"""In-place arithmetic on values that nobody else holds, written out of place.

Law.  y.op_(z) = op(y, z) for every reader, when all later readers of y's storage read it through
       the result.
Source algebra (static single assignment).
Legal  when the written storage is not an input, a weight or an attribute, and no other view of it
       is read after the write. Later reads of the written node itself see the new value, so they
       move to the result. The result keeps the written dtype: where promotion would widen it, a
       cast follows, which is what the in-place operator did.
Exact  bitwise.
Pays   all later passes: their matchers need not think about time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.regions import autocasts, region, switch_between
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal
from sparsecc.passes.canonical._match import argument, is_tensor

aten = torch.ops.aten

_OVERLOADS = {
    "add_": ("Tensor", "Scalar"),
    "sub_": ("Tensor", "Scalar"),
    "mul_": ("Tensor", "Scalar"),
    "div_": ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode"),
    "masked_fill_": ("Tensor", "Scalar"),
    "clamp_": ("default", "Tensor"),
    "addcmul_": ("default",),
}
_UNARY = (
    "abs_ celu_ clamp_min_ clamp_max_ elu_ exp_ gelu_ hardsigmoid_ hardswish_ hardtanh_ "
    "leaky_relu_ mish_ neg_ reciprocal_ relu_ relu6_ rsqrt_ selu_ sigmoid_ silu_ sqrt_ "
    "square_ tanh_ threshold_"
)


def _functional_forms() -> dict[Any, Any]:
    """In-place overload -> the overload that computes the same out of place."""
    names = {**dict.fromkeys(_UNARY.split(), ("default",)), **_OVERLOADS}
    return {
        getattr(getattr(aten, name), overload): getattr(getattr(aten, name[:-1]), overload)
        for name, overloads in names.items()
        for overload in overloads
    } | {
        aten.pow_.Scalar: aten.pow.Tensor_Scalar,
        aten.pow_.Tensor: aten.pow.Tensor_Tensor,
    }


FUNCTIONAL: dict[Any, Any] = _functional_forms()


@dataclass(frozen=True)
class FunctionalizeInplace(Pass):
    """Replace in-place arithmetic by its functional form where no alias can tell."""

    name: ClassVar[str] = "functionalize-inplace"
    family: ClassVar[str] = "canonical"
    law: ClassVar[str] = "y.op_(z) = op(y, z)"
    source: ClassVar[str] = "algebra"
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    pays: ClassVar[str] = "matchers see values, not storage"
    refusals: ClassVar[dict[str, str]] = {
        "external": "an input, a weight or an attribute is written, which the caller can see",
        "aliased": "another view of the written tensor is read after the write",
        "region": "the tensor was made under another autocast or grad mode",
        "layout": "the functional form would return other strides, for some sizes at least",
    }

    def find(self, context: Context) -> list[Match]:
        targets = (*FUNCTIONAL, aten.dropout_.default)
        return [Match(node) for node in context.program.calls(*targets) if _applies(node)]

    def check(self, match: Match, context: Context) -> Refusal | None:
        node = match.node
        written: fx.Node = node.args[0]  # type: ignore[assignment]
        if node.target is aten.dropout_.default:
            return None  # inactive: it returns what it was given, and writes nothing
        holders = _holders(node, context)
        if any(held.op in ("placeholder", "get_attr") for held in holders):
            return Refusal.at(node, "external", self.refusals["external"])
        heirs = _heirs(node, written, set(holders))
        for held in holders:
            if held in heirs or held is written:
                continue
            late = next((user for user in held.users if node < user), None)
            if late is not None:
                return Refusal.at(late, "aliased", f"{late.name} reads {held.name} after the write")
        # Under another grad mode the write would not be recorded, but the functional result would
        # replace the recorded value. Autocast decides per operator, and may know the two forms by
        # different rules.
        if switch_between((written, node), context.analyses.get(region)):
            return Refusal.at(node, "region", self.refusals["region"])
        if node in context.analyses.get(autocasts):
            return Refusal.at(
                node, "region", "under autocast the two forms may be cast differently"
            )
        value = node.meta["val"]
        functional = context.program.fake_for_all_sizes(
            FUNCTIONAL[node.target], node.args, node.kwargs
        )
        if (
            functional is None
            or not same_shape(functional.shape, value.shape)
            or not same_shape(functional.stride(), value.stride())
        ):
            return Refusal.at(node, "layout", self.refusals["layout"])
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        node, program = match.node, context.program
        written: fx.Node = node.args[0]  # type: ignore[assignment]
        if node.target is aten.dropout_.default:
            program.replace(node, written)
            return
        new = program.call(
            FUNCTIONAL[node.target],
            node.args,
            dict(node.kwargs),
            like=node,
            origin=self.name,
            before=node,
        )
        dtype = node.meta["val"].dtype
        if new.meta["val"].dtype != dtype:
            new = program.call(
                aten.to.dtype, (new, dtype), like=node, origin=self.name, before=node
            )
        written.replace_all_uses_with(new, delete_user_cb=lambda user: node < user)
        program.replace(node, new)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, y: Any) -> Any:
            z = x * y
            z.add_(y).relu_()
            z.mul_(x)
            return z

        def after(x: Any, y: Any) -> Any:
            return torch.relu(x * y + y) * x

        return [Example(before, after, {"x": ("n", "d"), "y": ("n", "d")})]


def _applies(node: fx.Node) -> bool:
    if node.target is aten.dropout_.default:
        return argument(node, "train") is False or argument(node, "p") == 0
    return is_tensor(node) and is_tensor(node.args[0])


def _holders(node: fx.Node, context: Context) -> list[fx.Node]:
    """All nodes that may hold the storage of ``node``.

    The fake tensors know views that no schema tells of (``einsum`` may only permute its input).
    """
    storage = node.meta["val"].untyped_storage()._cdata
    found = dict.fromkeys(context.analyses.get(aliases).same_storage(node))
    for other in context.program.graph.nodes:
        for value in tree_leaves(other.meta.get("val")):
            strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
            if strided and value.untyped_storage()._cdata == storage:
                found[other] = None
    return list(found)


def _heirs(node: fx.Node, written: fx.Node, holders: set[fx.Node]) -> set[fx.Node]:
    """The holders of the storage that follow the new value.

    They are computed from the result of the write or, after the write, from the written node,
    whose later readers move to the result.
    """
    found = {node}
    stack = [node, *(user for user in written.users if node < user and user in holders)]
    found.update(stack)
    while stack:
        for user in stack.pop().users:
            if user in holders and user not in found:
                found.add(user)
                stack.append(user)
    return found
