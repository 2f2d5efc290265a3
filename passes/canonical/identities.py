"""Operators that hand back their input.

Law.   dropout(x; inactive) = x, to(x; same dtype and device) = x, x · 1 = x, x / 1 = x, x − 0 = x.
Source algebra.
Legal  Inactive dropout and a cast to the same dtype return the very tensor that they were given, so
       nothing can tell them from it. ``alias``, ``x[:]`` and ``detach`` return a view of it:
       dropped when nobody can write through the view, see it, or (``detach``) lose a gradient by
       it. Arithmetic identities return a copy: dropped when neither side is written in place and
       the copy does not reach the caller.
Never  ``x + 0.0`` (it turns −0 into +0), ``clone``, ``contiguous``, ``_to_copy``.
Exact  bitwise.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.regions import switches_grad_mode
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving
from sparsecc.passes.canonical._match import argument, arithmetic, is_tensor, scalar

aten = torch.ops.aten

_DROPOUTS = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
    }
)
_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other})
_VIEWS = frozenset({aten.alias.default, aten.detach.default})


@dataclass(frozen=True)
class DropIdentities(Pass):
    """Drop inactive dropout, casts to the same dtype, plain aliases, arithmetic with 1 and 0."""

    name: ClassVar[str] = "drop-identities"
    family: ClassVar[str] = "canonical"
    law: ClassVar[str] = "dropout(x; inactive) = to(x; same) = x·1 = x"
    source: ClassVar[str] = "algebra"
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    pays: ClassVar[str] = "other passes see the producer itself"
    refusals: ClassVar[dict[str, str]] = {
        "written": "the copy, or what it copies, is written in place",
        "escapes": "the caller gets the copy, and could tell it from the original",
        "gradient": "detach, or a view taken under another grad mode, stops a gradient",
        "layout": "the copy has other strides than the original",
    }

    def find(self, context: Context) -> list[Match]:
        matches = []
        for node in context.program.graph.nodes:
            kind = _kind(node)
            if kind:
                matches.append(Match(node, {"kind": kind}))
        return matches

    def check(self, match: Match, context: Context) -> Refusal | None:
        node, kind = match.node, match.nodes["kind"]
        source = _source(node)
        if kind == "self":
            return None
        alias = context.analyses.get(aliases)
        if alias.written(node) or alias.written(source):
            return Refusal.at(node, "written", self.refusals["written"])
        if kind == "view":
            switches = any(map(switches_grad_mode, context.program.graph.nodes))
            if switches or (context.trains and node.target is aten.detach.default):
                return Refusal.at(node, "gradient", self.refusals["gradient"])
            if any(user.op == "output" for user in node.users):
                return Refusal.at(node, "escapes", self.refusals["escapes"])
            return None
        if any(user.op == "output" for held in alias.same_storage(node) for user in held.users):
            return Refusal.at(node, "escapes", self.refusals["escapes"])
        if not same_shape(node.meta["val"].stride(), source.meta["val"].stride()):
            return Refusal.at(node, "layout", self.refusals["layout"])
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        context.program.replace(match.node, _source(match.node))

    def saving(self, match: Match, context: Context) -> Saving:
        return Saving(launches=int(match.nodes["kind"] == "copy"))

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any) -> Any:
            y = torch.dropout(torch.dropout(x, 0.5, False), 0.0, True)
            return (y.to(y.dtype) * 1) / 1 - 0

        def after(x: Any) -> Any:
            return x

        return [Example(before, after, {"x": ("n", "d")})]


def _kind(node: fx.Node) -> str:
    """How ``node`` relates to its input: "self", "view", "copy", or "" when it is no identity."""
    if not is_tensor(node) or node.op != "call_function":
        return ""
    if node.target is torch.nn.functional.dropout:  # left by Dynamo when p is a symbolic float
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return "self" if training is False else ""
    if node.target in _DROPOUTS:
        inactive = argument(node, "train") is False or argument(node, "p") == 0
        return "self" if inactive else ""
    if node.target in _CASTS or node.target is aten.type_as.default:
        return "self" if _casts_to_same(node) else ""
    if node.target in _VIEWS or _is_full_slice(node):
        return "view"
    return "copy" if _is_neutral(node) else ""


def _casts_to_same(node: fx.Node) -> bool:
    source = node.args[0]
    if not is_tensor(source) or argument(node, "copy", False) or argument(node, "pin_memory"):
        return False
    old, new = source.meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if argument(node, "memory_format") not in (None, torch.preserve_format):
        return False
    return (old.dtype, old.device, old.layout) == (new.dtype, new.device, new.layout)


def _is_full_slice(node: fx.Node) -> bool:
    """``x[:]``: a slice that leaves out nothing, whatever the size."""
    if node.target is not aten.slice.Tensor or argument(node, "step", 1) != 1:
        return False
    end = argument(node, "end")
    return argument(node, "start") in (None, 0) and (
        end is None or (isinstance(end, int) and end >= sys.maxsize)
    )


def _is_neutral(node: fx.Node) -> bool:
    found = arithmetic(node)
    if found is None:
        return False
    kind, a, b = found
    if kind == "mul" and scalar(a) == 1.0:
        a, b = b, a
    if not is_tensor(a) or a is not node.all_input_nodes[0]:
        return False
    neutral = {"mul": 1.0, "div": 1.0, "sub": 0.0, "add": 0.0}[kind]
    if scalar(b) != neutral:
        return False
    old, new = a.meta["val"], node.meta["val"]
    if (
        old.dtype != new.dtype or old.is_complex()
    ):  # (a+bi)·1 multiplies by 0i, which infinities see
        return False
    if not same_shape(old.shape, new.shape):
        return False
    return kind != "add" or not old.is_floating_point()


def _source(node: fx.Node) -> fx.Node:
    """The tensor that an identity hands back."""
    return next(arg for arg in node.all_input_nodes if is_tensor(arg))
