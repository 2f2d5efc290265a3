"""Feed-forward networks whose hidden value has exact zeros by its making: what is live, as an expression.

plain    down(a(up(x)))          a(p) is zero for some p: relu, relu², FATReLU, relu(p - b), a threshold
gated    down(a(gate(x)) ⊙ u(up(x))), gate and up apart or the halves of one linear map
given    down(h), h made somehow, but by such a function last
Behind a: top-k of a row (values scattered into zeros), or relu(a - mean(a) - c std(a)), which Gemma 3n has.
"""

from __future__ import annotations

import ast
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.passes.analysis.ffn import half_of, through_reshapes
from sparsecc.passes.analysis.linear import Linear, linears
from sparsecc.passes.analysis.sizes import same_shape
from sparsecc.passes.analysis.stream import is_number
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses
from sparsecc.program import Program, ancestors

aten = torch.ops.aten

_UNARY: dict[Any, str] = {
    aten.relu.default: "relu({})",
    aten.silu.default: "silu({})",
    aten.sigmoid.default: "sigmoid({})",
    aten.tanh.default: "tanh({})",
    aten.abs.default: "abs({})",
    aten.square.default: "({0} * {0})",
    aten.neg.default: "(-{})",
}
_BINARY: dict[Any, str] = {
    aten.add.Tensor: "+",
    aten.sub.Tensor: "-",
    aten.mul.Tensor: "*",
    aten.div.Tensor: "/",
    aten.add.Scalar: "+",
    aten.sub.Scalar: "-",
    aten.mul.Scalar: "*",
    aten.div.Scalar: "/",
}
_ABOVE = {
    aten.gt.Scalar: ">",
    aten.ge.Scalar: ">=",
    aten.gt.Tensor: ">",
    aten.ge.Tensor: ">=",
}
_MOST_CONSTANTS = 32
# Of an expression: a value that each of many steps reads twice (x + relu(x)) would double its text every time.
_DEEPEST, _LONGEST = 32, 400
_ODD = frozenset({"relu", "fatrelu", "keep", "silu", "gelu", "gelu_tanh", "tanh", "abs", "sqrt"})


@dataclass(frozen=True)
class Half:
    """A linear map, or one half (0 or 1) of its features."""

    linear: Linear
    index: int | None = None

    @property
    def part(self) -> slice | None:
        """Which features; None for all."""
        if self.index is None:
            return None
        size = self.linear.features // 2
        return slice(self.index * size, (self.index + 1) * size)


@dataclass
class Live:
    """One product whose input has zeros.

    Attributes: down: the product. x: what gate and up read, or what ``down`` reads where there is no gate.
        gate, up: the linear maps, or None. activation, select, after, hidden: of
        :class:`sparsecc.runtime.ops.sparse_ffn.Spec`, without biases. operands: vectors over neurons. inside:
        the nodes that the expressions stand for, linear maps among them. router: values [..., F // block] that
        p0 is, where a block of neurons shares one; then there is no gate.
    """

    down: Linear
    x: fx.Node
    gate: Half | None = None
    up: Half | None = None
    activation: str = "p0"
    select: str = ""
    after: str = "a"
    hidden: str = "a"
    operands: list[fx.Node] = field(default_factory=list)
    inside: list[fx.Node] = field(default_factory=list)
    router: fx.Node | None = None
    block: int = 0

    @property
    def maps(self) -> list[Linear]:
        """The linear maps, ``down`` last."""
        return [*(half.linear for half in (self.gate, self.up) if half is not None), self.down]


def find_live(program: Program, analyses: Analyses) -> list[Live]:
    """Every linear map but convolutions whose input is made by a function that makes zeros, in graph order."""
    maps, weights = analyses.get(linears), analyses.get(weight_values)
    found = []
    for down in maps.values():
        if down.is_conv or down.weight.meta["val"].dim() != 2:
            continue
        top = through_reshapes(down.x)
        sides: list[tuple[Any, Any]] = [(top, None)]
        if top.target is aten.mul.Tensor and len(top.args) == 2:
            sides += [top.args, top.args[::-1]]
        grown = (Growth(maps, weights, opaque=False).network(down, top, *side) for side in sides)
        whole = next((live for live in grown if live is not None and own(live)), None)
        if whole is not None:
            found.append(whole)
        elif Growth(maps, weights, opaque=True).has_zeros(top):
            found.append(Live(down, down.x))  # it reads what it is given
    return found


def makes_zeros(text: str) -> bool:
    """Whether it is zero for some range of what it reads: relu, a threshold, or a product with one."""
    return _zeros(ast.parse(text, mode="eval").body, makes=True)


def _keeps_zeros(text: str) -> bool:
    """Whether the expression over a is zero where a is."""
    return _zeros(ast.parse(text, mode="eval").body, makes=False)


def _zeros(tree: ast.expr, *, makes: bool) -> bool:
    """Whether zeros are made in ``tree`` and stay zero; without ``makes``: whether zeros of ``a`` stay."""
    if isinstance(tree, ast.Call):
        assert isinstance(tree.func, ast.Name)
        name, first = tree.func.id, tree.args[0]
        if makes and name in ("relu", "fatrelu", "keep"):
            return True
        return name in _ODD and _zeros(first, makes=makes)
    if isinstance(tree, ast.BinOp):
        sides = (_zeros(side, makes=makes) for side in (tree.left, tree.right))
        if isinstance(tree.op, ast.Mult):
            return any(sides)
        return next(sides) if isinstance(tree.op, ast.Div) else all(sides)
    if isinstance(tree, ast.UnaryOp):
        return _zeros(tree.operand, makes=makes)
    return not makes and isinstance(tree, ast.Name) and tree.id == "a"


def own(live: Live) -> bool:
    """Whether nothing but ``down`` reads what is inside, reshapes on the way to it among that."""
    nodes, node = set(live.inside), live.down.x
    while node is not through_reshapes(node):
        nodes.add(node)
        node = node.all_input_nodes[0]
    return all(user in nodes or user is live.down.node for each in nodes for user in each.users)


class Growth:
    """Reads backward from one value; names of linear maps and operands by their order of meeting.

    Attributes: opaque: whether values that are no linear maps, or too far away, have a name, too ("x"). texts:
        the expressions of the nodes that were met.
    """

    def __init__(self, maps: dict[fx.Node, Linear], weights: WeightValues, *, opaque: bool) -> None:
        self.maps, self.weights, self.opaque = maps, weights, opaque
        self.read: list[Half] = []
        self.operands: list[fx.Node] = []
        self.inside: list[fx.Node] = []
        self.select, self.after = "", "a"
        self.texts: dict[fx.Node, str | None] = {}
        self.depth = 0

    def network(self, down: Linear, top: fx.Node, a: Any, other: Any) -> Live | None:
        """The network whose hidden value ``top`` is ``a`` of one linear map, times ``other`` of another."""
        text = self.activated(a)
        if text is None or len(self.read) != 1:
            return None
        if not (_keeps_zeros(self.after) if self.select else makes_zeros(text)):
            return None
        hidden = "a"
        if other is not None:
            right = self.text(other)
            if right is None or len(self.read) != 2:
                return None
            hidden = f"a * {right}"
            self.inside.append(top)
        (x, *others) = {through_reshapes(half.linear.x) for half in self.read}
        if others or not same_rows(x, down):
            return None
        gate, up = self.read[0], self.read[1] if other is not None else None
        texts = (text, self.select, self.after, hidden)
        return Live(down, x, gate, up, *texts, self.operands, self.inside)

    def has_zeros(self, top: fx.Node) -> bool:
        """Whether ``top`` is made by a function that makes zeros, of whatever it reads."""
        if self._top(top) or self._gaussian(top):
            return True
        text = self.text(top)
        return text is not None and makes_zeros(text)

    # ---- expressions ----

    def activated(self, node: Any) -> str | None:
        """The text up to a selection, and behind it ``self.after``; without one, all of it."""
        chain: list[str] = []
        at: Any = node
        while isinstance(at, fx.Node):
            source = self._top(at) or self._gaussian(at)
            if source is not None:
                source_node, self.select = source
                text = self.text(source_node)
                for template in reversed(chain):
                    self.after = template.format(self.after)
                return text
            step = _unary(at)
            if step is None or "{0}" in step:
                break
            chain.append(step)
            self.inside.append(at)
            at = at.args[0]
        self.inside.clear()
        return self.text(node)

    def text(self, node: Any) -> str | None:
        """The expression of ``node`` over p0, p1 and v…, or None."""
        if is_number(node) and math.isfinite(node):
            return repr(float(node)) if node >= 0 else f"({float(node)!r})"
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if node not in self.texts:
            self.depth += 1
            near = self.depth <= _DEEPEST
            found = self._text(node) if near else None
            self.depth -= 1
            far = not near or (found is not None and len(found) > _LONGEST)
            self.texts[node] = ("x" if self.opaque else None) if far else found
        return self.texts[node]

    def _text(self, node: fx.Node) -> str | None:
        """The same of a node that was not met before."""
        if node in self.weights:
            return self._vector(node)
        product = self._product(node)
        if product is not None:
            return product
        template = _unary(node)
        if template is not None:
            inner = self.text(node.args[0])
            self.inside.append(node)
            return None if inner is None else template.format(inner)
        found = self._binary(node) or self._threshold(node)
        return "x" if found is None and self.opaque else found

    def _binary(self, node: fx.Node) -> str | None:
        if node.target not in _BINARY or len(node.args) != 2 or node.kwargs:
            return None
        if _compared(node.args[1]):
            return self._masked(node, node.args[1], node.args[0])
        if _compared(node.args[0]):
            return self._masked(node, node.args[0], node.args[1])
        left, right = self.text(node.args[0]), self.text(node.args[1])
        self.inside.append(node)
        if left is None or right is None:
            return None
        return f"({left} {_BINARY[node.target]} {right})"

    def _masked(self, node: fx.Node, mask: Any, value: Any) -> str | None:
        """value * (value > t)."""
        return self._beyond(node, mask, value) if node.target is aten.mul.Tensor else None

    def _threshold(self, node: fx.Node) -> str | None:
        """where(value > t, value, 0), and torch.threshold."""
        args: Any = node.args
        if node.target is aten.threshold.default:
            value, least, other = args
            inner = self.text(value)
            self.inside.append(node)
            if inner is None or other != 0 or not is_number(least) or not least >= 0:
                return None
            return f"relu(keep({inner}, {float(least)!r}))"
        if node.target in (aten.where.self, aten.where.ScalarOther):
            mask, value, other = args
            if _compared(mask) and self._is_zero(other):
                return self._beyond(node, mask, value)
        return None

    def _is_zero(self, node: Any) -> bool:
        if is_number(node):
            return bool(node == 0)
        full = (
            aten.full.default,
            aten.zeros.default,
            aten.zeros_like.default,
            aten.scalar_tensor.default,
        )
        if not isinstance(node, fx.Node) or node.target not in full:
            return False
        filled = {aten.full.default: 1, aten.scalar_tensor.default: 0}.get(node.target)
        return filled is None or bool(node.args[filled] == 0)

    def _beyond(self, node: fx.Node, mask: fx.Node, value: Any) -> str | None:
        """The text of ``value`` where it (or its magnitude) is beyond a number, else 0."""
        args: Any = mask.args
        compared, bound = args
        if not is_number(bound) or not isinstance(compared, fx.Node):
            return None
        inner = self.text(value)
        self.inside += [mask, node]
        if inner is None:
            return None
        target: Any = mask.target
        strict, t = _ABOVE[target] == ">", float(bound)
        if compared is value:
            if strict:
                return f"relu(keep({inner}, {t!r}))" if t >= 0 else None
            return f"fatrelu({inner}, {t!r})"
        if compared.target is aten.abs.default and compared.args[0] is value and strict and t >= 0:
            self.inside.append(compared)
            return f"keep({inner}, {t!r})"
        return None

    def _vector(self, node: fx.Node) -> str | None:
        if node.meta["val"].dim() != 1:
            return None
        if node not in self.operands:
            self.operands.append(node)
        return f"v{self.operands.index(node)}"

    def _product(self, node: fx.Node) -> str | None:
        """p0 or p1, where the value is a linear map or half of one."""
        at, index = through_reshapes(node), None
        if at not in self.maps:
            half = half_of(at)
            if half is None:
                return None
            self.inside.append(at)
            if at.target is not aten.slice.Tensor:
                self.inside.append(at.args[0])  # type: ignore[arg-type]
            at, index = through_reshapes(half[0]), half[1]
        linear = self.maps.get(at)
        if linear is None or linear.is_conv or linear.weight.meta["val"].dim() != 2:
            return None
        each = Half(linear, index)
        if each not in self.read:
            self.read.append(each)
        self.inside.append(linear.node)
        while node is not through_reshapes(node):
            self.inside.append(node)
            node = node.args[0]  # type: ignore[assignment]
        return f"p{self.read.index(each)}"

    # ---- selections ----

    def _top(self, node: fx.Node) -> tuple[fx.Node, str] | None:
        """zeros.scatter(-1, indices, values) of topk(source, k): the source, and the selection."""
        if node.target is not aten.scatter.src or len(node.args) != 4:
            return None
        zeros, dim, indices, values = node.args
        parts = {getattr(n, "args", (None,))[0] for n in (indices, values)}
        chosen: Any
        (chosen, *rest) = parts
        if rest or not isinstance(chosen, fx.Node) or chosen.target is not aten.topk.default:
            return None
        source, k, *more = chosen.args
        last = {-1, source.meta["val"].dim() - 1}  # type: ignore[union-attr]
        largest = len(more) < 2 or more[1] is True
        places = [getattr(n, "args", (0, 0))[1] for n in (indices, values)]
        if dim not in last or (more and more[0] not in last) or not largest or places != [1, 0]:
            return None
        if not isinstance(k, int) or not self._is_zero(zeros):
            return None
        self.inside += [node, indices, values, chosen, zeros]  # type: ignore[list-item]
        return source, f"top {k}"  # type: ignore[return-value]

    def _gaussian(self, node: fx.Node) -> tuple[fx.Node, str] | None:
        """relu(s - (mean(s) + c std(s))): the source s, and the selection."""
        if node.target is not aten.relu.default:
            return None
        minus: Any = node.args[0]
        if minus.target is not aten.sub.Tensor or len(minus.args) != 2 or minus.kwargs:
            return None
        source, cutoff = minus.args
        both = isinstance(source, fx.Node) and isinstance(cutoff, fx.Node)
        if not both or cutoff.target is not aten.add.Tensor:
            return None
        for mean, spread in (cutoff.args, cutoff.args[::-1]):
            c, std = _times(spread)
            if c is None or not _over_row(mean, source, (aten.mean.dim,)):
                continue
            if _over_row(std, source, (aten.std.correction, aten.std.dim)) and _population(std):
                self.inside += [node, minus, cutoff, mean, spread, std]
                return source, f"gaussian {c!r}"
        return None


def _unary(node: fx.Node) -> str | None:
    """A template of the node's function."""
    if node.target is aten.gelu.default:
        kind = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu_tanh({})" if kind == "tanh" else "gelu({})"
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return _UNARY[aten.square.default]
    return None if node.kwargs else _UNARY.get(node.target)


def _compared(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _ABOVE


def same_rows(x: fx.Node, down: Linear) -> bool:
    """Whether the rows of x are those of ``down``, in one order, however they are shaped."""
    ours, theirs = x.meta["val"].shape[:-1], down.node.meta["val"].shape[:-1]
    if same_shape(ours, theirs):
        return True
    known = all(isinstance(size, int) for size in (*ours, *theirs))
    return known and math.prod(ours) == math.prod(theirs)


def _times(node: Any) -> tuple[float | None, Any]:
    """``(c, value)`` of value * c with a number c, also one that is a tensor of the program's constants."""
    if not isinstance(node, fx.Node) or len(node.args) < 2:
        return None, None
    args: Any = node.args
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        for value, c in (args[:2], args[1::-1]):
            known = c if is_number(c) else _constant(c)
            if known is not None:
                return float(known), value
    return None, None


def _constant(node: Any) -> float | None:
    """The number that a node of no dimension is computed from constants to be, or None.

    Gemma 3n asks the inverse of the normal distribution in the graph.
    """
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    before = sorted(ancestors([node]))
    if len(before) > _MOST_CONSTANTS or node.meta["val"].dim() or not all(map(_pure, before)):
        return None
    values: dict[fx.Node, Any] = {}
    for each in before:
        args, kwargs = fx.map_arg((each.args, each.kwargs), values.__getitem__)
        values[each] = each.target(*args, **kwargs)  # type: ignore[operator]
    return float(values[node])


def _pure(node: fx.Node) -> bool:
    """Whether it makes or computes tensors by arithmetic alone: the same in every call."""
    if node.target in (torch.tensor, operator.getitem):
        return True
    schema = getattr(node.target, "_schema", None)
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    return (
        node.op == "call_function" and schema is not None and not schema.is_mutable and not random
    )


def _over_row(node: Any, source: fx.Node, targets: tuple[Any, ...]) -> bool:
    """Whether ``node`` reduces the last axis of ``source``, keeping it."""
    if not isinstance(node, fx.Node) or node.target not in targets or node.args[0] is not source:
        return False
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    rank = source.meta["val"].dim()
    if not dims or [d % rank for d in dims] != [rank - 1]:
        return False
    value: Any = node.meta["val"]
    return bool(value.dim() == rank)


def _population(std: fx.Node) -> bool:
    if std.target is aten.std.dim:
        return len(std.args) > 2 and std.args[2] is False
    return bool(std.kwargs.get("correction") == 0)
