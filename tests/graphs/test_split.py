"""A graph cut in two: what depends on weights alone, and the rest. Together they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sparsecc import _torch
from sparsecc.split import Split, is_packed

aten = torch.ops.aten
W = (4, 3, 3, 3)


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """``function(x, *weights)`` as a graph with fake values; ``x`` has the first shape."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(torch.zeros(s)) for s in shapes]
    with torch.no_grad():
        gm = make_fx(function, tracing_mode="real")(*[torch.zeros(s) for s in shapes])
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta["val"] = fake
    with mode:
        for node in gm.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
    return gm


def split(gm: fx.GraphModule, pack: bool = False) -> tuple[Split, list[int]]:
    """The cut, and which weights the second graph reads."""
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    found = Split(gm, inputs[1:])
    found.move()
    if pack:
        _torch.packing_patterns(gm)
        found.move()
    found.finish()
    return found, [inputs.index(s) for s in found.sources()]


def check(function: Callable[..., Any], *shapes: tuple[int, ...], pack: bool = False) -> Split:
    gm = traced(function, *shapes)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    found, read = split(gm, pack)
    values = [torch.randn(s) for s in shapes]
    with torch.no_grad():
        moved = fx.Interpreter(fx.GraphModule({}, found.graph)).run(*[values[i] for i in read])
        left = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        kept = [values[names.index(name)] for name in left if name in names]
        got, expected = gm(*kept, *moved), function(*values)
    torch.testing.assert_close(got, expected)
    assert not [n for n in gm.graph.nodes if n.op == "get_attr"]
    return found


def targets(graph: fx.Graph) -> list[Any]:
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_weights_alone_are_no_work() -> None:
    found = check(lambda x, w: x @ w, (2, 4), (4, 3))
    assert targets(found.graph) == []
    assert targets(found.gm.graph) == [aten.mm.default]


def test_arithmetic_moves() -> None:
    found = check(lambda x, w, v: x @ (w * v.exp()) + v, (2, 4), (4, 3), (3,))
    assert targets(found.graph) == [aten.exp.default, aten.mul.Tensor]
    assert targets(found.gm.graph) == [aten.mm.default, aten.add.Tensor]


def test_what_grows_stays() -> None:
    """An expanded token that is copied: the copies would cost memory."""
    found = check(lambda x, w: x + w.expand(8, 3).clone(), (8, 3), (1, 3))
    assert targets(found.graph) == []
    assert targets(found.gm.graph) == [aten.expand.default, aten.clone.default, aten.add.Tensor]


def test_views_stay_unless_their_weight_is_moved_anyway() -> None:
    assert targets(check(lambda x, w: x @ w.t(), (2, 3), (4, 3)).graph) == []
    found = check(lambda x, w: (x @ w.t(), w.exp() + x[:1]), (2, 3), (4, 3))
    assert set(targets(found.graph)) == {aten.t.default, aten.exp.default}


def test_what_the_caller_gets_stays() -> None:
    """The caller may write it, and views of it."""

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scaled = w * 2
        return x @ scaled.t(), scaled.view(-1), w.exp() + x[:1]

    found = check(function, (2, 3), (4, 3))
    # What x is multiplied with is another copy.
    assert targets(found.graph) == [aten.mul.Tensor, aten.t.default, aten.exp.default]
    given = found.gm.graph.output_node().args[0][1]
    assert given.args[0].target is aten.mul.Tensor


def test_random_values_stay() -> None:
    gm = traced(lambda x, w: x + torch.bernoulli(w), (4,), (4,))
    found, read = split(gm)
    assert targets(found.graph) == []
    assert read == []


def test_a_convolution_is_packed() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return aten.convolution(x, w * v, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    found = check(function, (2, 3, 8, 8), W, (3, 1, 1), pack=True)
    (value,) = found.graph.output_node().all_input_nodes
    assert is_packed(value)
    (placeholder,) = [n for n in found.gm.graph.nodes if n.name.startswith("packed")]
    assert placeholder.meta["val"].shape == W


def test_a_grouped_transposed_convolution_changes_its_shape() -> None:
    """The compiler derives the size of the result from that of the packed weight."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return aten.convolution(x, w, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 2)

    found = check(function, (2, 6, 8, 8), (6, 4, 3, 3), pack=True)
    (placeholder,) = [n for n in found.gm.graph.nodes if n.name.startswith("packed")]
    assert placeholder.meta["val"].shape == (8, 3, 3, 3)
