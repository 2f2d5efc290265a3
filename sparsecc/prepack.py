"""Weights in the layouts of the CPU's kernels, made ahead of the calls, and still fresh.

Inductor packs weights for oneDNN, and lets a convolution's kernel do what follows it, under ``freezing``: there
weights are constants, and its results go stale when they change. Here the same patterns run over stand-ins.
What depends on weights alone becomes a graph of its own, whose results are inputs of the compiled one, and
which is evaluated again when a weight has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from sparsecc import _torch
from sparsecc.passes.analysis.batchnorms import batch_norms
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import Analyses
from sparsecc.program import Program, Role, no_autocast
from sparsecc.split import Split, is_packed

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)


class Prepack:
    """The weights of one graph that are packed, and how.

    Args:
        weights: positions among the graph's inputs of the weights that may be packed.

    Attributes:
        sources: positions of the weights that are packed; empty until :meth:`inner` has found some.
        count: how many values the compiled graph reads that :meth:`evaluate` makes.
        unread: positions of the inputs that the compiled graph does not read itself.

    :meth:`inner` compiles the graph; :meth:`evaluate` packs, and :meth:`hand_over` comes before each call.
    """

    def __init__(self, weights: Collection[int]) -> None:
        self._weights = frozenset(weights)
        self._graph: fx.GraphModule | None = None
        self._handed = threading.local()
        self.sources: tuple[int, ...] = ()
        self.unread: frozenset[int] = frozenset()
        self.count = 0

    def inner(self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        """Compile AOTAutograd's inference graph, as Inductor's ``compile_fx_inner`` would, on packed weights.

        Raises:
            RuntimeError: called a second time.
        """
        if self._graph is not None:
            raise RuntimeError("one packing serves one graph")
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        position = {node: _torch.position(node) for node in placeholders}
        weights = [n for n in placeholders if position[n] in self._weights and _packable(n)]
        split = Split(gm, weights)
        split.move()
        _torch.packing_patterns(gm)
        split.move()
        packed = split.finish()
        self.count = len(packed)
        self._graph = fx.GraphModule({}, split.graph)
        self.sources = tuple(p for n in split.sources() if (p := position[n]) is not None)
        left = set(gm.graph.find_nodes(op="placeholder"))
        kept = [i for i, node in enumerate(placeholders) if node in left]
        read = {position[placeholders[i]] for i in kept}
        self.unread = frozenset(p for p in position.values() if p is not None and p not in read)

        static = set(options.get("static_input_idxs") or ())
        count = len(kept)
        options["static_input_idxs"] = [
            *(new for new, old in enumerate(kept) if old in static),
            *range(count, count + len(packed)),
        ]
        taken = [*(inputs[i] for i in kept), *(node.meta["val"] for node in packed)]
        opaque = any(is_packed(value) for value in split.graph.output_node().all_input_nodes)
        compiled = _torch.compile_inner(gm, taken, opaque, **options)
        handed = self._handed

        def call(args: list[Any]) -> Any:
            values = [args[i] for i in kept]
            args.clear()  # the caller's, so that memory is free as soon as it can be
            if packed:
                values += handed.weights
                handed.weights = ()
            return compiled(values)

        return _torch.boxed(call)

    def give_up(self) -> None:
        """The graph was compiled in another way: nothing is packed."""
        self.sources, self.unread = (), frozenset()

    def evaluate(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pack the weights of ``sources``; results may share memory with them."""
        assert self._graph is not None
        with torch.inference_mode(False), torch.no_grad(), no_autocast():
            plain = [w.detach() if not w.is_inference() else w.clone() for w in weights]
            return list(fx.Interpreter(self._graph).run(*plain))

    def hand_over(self, packed: Sequence[torch.Tensor]) -> None:
        """What this thread's next call reads: AOTAutograd passes on no other inputs than its own."""
        self._handed.weights = packed


def prepack(
    program: Program,
    module: fx.GraphModule,
    folded: int,
    mode: str | None,
    config: dict[str, Any],
) -> Prepack | None:
    """What may be packed of the weights of a program that Inductor is to compile, in ``module``; or None.

    On CPU, weights of convolutions: parameters, and the last ``folded`` inputs. Other buffers may change at
    every call, but for running variances that no pass folded: a reciprocal square root of each is kept.
    """
    if program.recomputes or torch.is_grad_enabled() or _owns_weights(module):
        return None
    tensors = [v for n in program.placeholders() if isinstance(v := n.meta["val"], torch.Tensor)]
    if any(t.device.type != "cpu" for t in tensors):
        return None
    if not _torch.packs_weights(_torch.inductor_patches(mode, config)):
        return None
    analyses = Analyses(program)
    sources = analyses.get(weight_values).sources
    inputs = program.placeholders()
    may = {n for n in inputs if program.slots[n.name].role is Role.PARAMETER}
    may.update(inputs[len(inputs) - folded :])
    read: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.target in _CONVOLUTIONS:
            read |= sources.get(node.args[1], frozenset()) & may
    if not read:
        return None
    for norm in analyses.get(batch_norms).values():
        if not norm.of_the_batch and norm.variance is not None:
            read |= sources.get(norm.variance, frozenset())
    return Prepack([i for i, node in enumerate(inputs) if node in read])


def _owns_weights(module: fx.GraphModule) -> bool:
    """Whether a graph holds tensors other than a trace's constants: Inductor would freeze them for good."""
    if any(True for _ in module.parameters()):
        return True
    return any(not name.startswith("_constant_") for name, _ in module.named_buffers())


def _packable(placeholder: fx.Node) -> bool:
    value = placeholder.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(isinstance(s, int) for s in (*value.shape, *value.stride()))
        and not any(_writes(user) for user in placeholder.users)
    )


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
