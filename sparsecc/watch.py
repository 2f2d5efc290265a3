"""Running a model with someone at every linear layer: what observation and simulation share.

The model runs eagerly, as the default passes leave it: weights are folded, sites have the names that a recipe
gives them, and no kernel hides the input of a layer. Products and convolutions that a recipe could round are
linear layers here (raise-linear).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from sparsecc import _torch, pipeline
from sparsecc.capture import from_dynamo
from sparsecc.errors import PassError, SparseccError, first_line
from sparsecc.hoist import hoist
from sparsecc.inspection import fresh_caller
from sparsecc.log import log
from sparsecc.options import Options, disabled
from sparsecc.passes import registry
from sparsecc.passes.analysis.ffn import find_ffns
from sparsecc.passes.analysis.linear import Linear
from sparsecc.passes.analysis.links import Link
from sparsecc.passes.analysis.sites import named_links, site_name, sites
from sparsecc.passes.analysis.weights import WeightValues, weight_values
from sparsecc.passes.base import Analyses
from sparsecc.passes.ffn._neurons import between
from sparsecc.program import Program, target_name
from sparsecc.report.model import GraphReport

aten = torch.ops.aten

# What is no matter of a model's values, or would change them.
_OWN = ("lower", "codegen", "recipe", "report", "verify", "dump", "require", "keep_stages")

_RAISE = "raise-linear"  # with a recipe it runs for the recipe's sites


@dataclass(frozen=True)
class LinkFacts:
    """A link, by sites.

    Attributes:
        name: of the link (``passes/analysis/sites.py``).
        kind: "norm-linear", "linear-linear", "v-o", "up-down" or "q-k".
        size: its channels.
        consumers: site -> the channel of each column (of q-k: of each row), -1 where it has none.
        producers: site -> the channel of each row; norms and convolutions are not among them.
        carries_scale, carries_shift: whether a scale, and a shift too, may move.
        whole: whether every consumer is a site.
    """

    name: str
    kind: str
    size: int
    consumers: dict[str, tuple[int, ...]]
    producers: dict[str, tuple[int, ...]]
    carries_scale: bool
    carries_shift: bool
    whole: bool = True


@dataclass(frozen=True)
class At:
    """A place where a site runs: its name, the sites that read the same value, whether it is the first."""

    site: str
    group: str
    first: bool


class Visitor(Protocol):
    """Who stands at the linear layers."""

    def graph(self, found: Sequence[str], links: Mapping[str, LinkFacts]) -> None:
        """A graph was captured, with these sites and links."""

    def site(self, at: At, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor | None:
        """A site is about to run; a result stands for its own."""


@dataclass(frozen=True)
class FFNAt:
    """A place where a feed-forward network runs.

    Attributes:
        site: of its down projection.
        kind: "plain", "gated" or "fused".
        activation: the operator's name ("silu").
        out_axis: the axis of the down projection's weight that holds output features.
    """

    site: str
    kind: str
    activation: str
    out_axis: int


@runtime_checkable
class FFNVisitor(Visitor, Protocol):
    """Who stands at the down projections of feed-forward networks, too."""

    def ffn(
        self, at: FFNAt, a: torch.Tensor, h: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor | None:
        """The down projection is about to read ``h`` [..., F]; a result, of its shape, is read instead.

        Args:
            a: what the activation gave [..., F]; in a plain network it is h.
            down: the weight by neuron, [F, N].
        """

    def not_shown(self, site: str) -> None:
        """The network of this down projection is not shown: it is made of convolutions."""


@contextlib.contextmanager
def watched(
    model: Any, visitor: Visitor, options: Mapping[str, Any] | None = None
) -> Iterator[Callable[[tuple[Any, ...], dict[str, Any]], Any]]:
    """The model as a function of ``(args, kwargs)`` that shows ``visitor`` every site. Without gradients.

    Args:
        options: of the backend, as for ``torch.compile``; those that say how graphs are lowered are ours.
    Raises:
        OptionsError: an option, pass or value does not exist.
    """
    given = {k: v for k, v in (options or {}).items() if k not in _OWN}
    chosen = Options.parse({**given, "lower": "eager", "codegen": "aten"})
    graphs = 0

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        nonlocal graphs
        graphs += 1
        try:
            return WatchedGraph(_program(gm, example_inputs, chosen, graphs - 1), visitor)
        except SparseccError as error:
            if chosen.strict:
                raise
            log.warning("graph %d is not calibrated: %s", graphs - 1, error)
            return gm.forward

    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    with _torch.throwaway_compile(), torch.no_grad():
        compiled: Any = torch.compile(fresh_caller(), backend=backend)
        yield lambda args, kwargs: compiled(model, args, kwargs)


def _program(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, index: int
) -> Program:
    try:
        program = from_dynamo(gm, example_inputs)
        left_out = disabled() or _RAISE in options.disable
        last = () if left_out else (registry.load(_RAISE)(),)
        pipeline.run(program, options, GraphReport(index), last=last)
        return program
    except (SparseccError, *_torch.RESTARTS):
        raise
    except Exception as error:  # a defect of ours; the rest of the model can be calibrated
        raise PassError(f"{type(error).__name__}: {first_line(error)}") from error


class WatchedGraph:
    """A program as a function that shows ``visitor`` its sites; weights are folded when they change."""

    def __init__(self, program: Program, visitor: Visitor) -> None:
        analyses = Analyses(program)
        readers: dict[fx.Node, list[tuple[str, fx.Node]]] = {}
        for site in sites(program, analyses):
            if site.node.target is aten.linear.default:
                readers.setdefault(site.node.all_input_nodes[0], []).append((site.name, site.node))
        self.sites: dict[str, At] = {}
        for read in readers.values():
            group = ", ".join(sorted({name for name, _ in read}))
            for i, (name, node) in enumerate(read):
                self.sites[node.name] = At(name, group, i == 0)
        self.ffns, self.activations = _ffns(program, analyses, visitor)
        names = {at.site for at in self.sites.values()}
        visitor.graph(sorted(names), link_facts(program, analyses, names))
        self.visitor = visitor
        self.hoisted = None if program.recomputes else hoist(program)
        self.main = program if self.hoisted is None else self.hoisted.main
        self.sources: list[Any] = []
        self.folded: list[torch.Tensor] = []

    def __call__(self, *args: Any) -> Any:
        inputs = args
        if self.hoisted is not None:
            sources = [args[i] for i in self.hoisted.sources]
            same = len(sources) == len(self.sources)
            if not same or any(a is not b for a, b in zip(sources, self.sources, strict=True)):
                self.sources, self.folded = sources, self.hoisted.evaluate(sources)
            inputs = (*[args[i] for i in self.hoisted.keep], *self.folded)
        return _Interpreter(self).run(*inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, graph: WatchedGraph) -> None:
        super().__init__(graph.main.module, garbage_collect_values=True)
        self.extra_traceback = False  # an error says which site it is; the node's name is of no use
        self.watched = graph
        self.activated: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.watched.ffns:
            self._ffn(n)
        at = self.watched.sites.get(n.name)
        if at is None:
            return self._result(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, weight, bias = (*args, None)[:3]
        result = self.watched.visitor.site(at, x, weight, bias)
        return super().run_node(n) if result is None else result

    def _result(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.watched.activations:  # down, which may stand far behind, is shown it
            self.activated[n.name] = result
        return result

    def _ffn(self, n: fx.Node) -> None:
        """Show the visitor what a down projection is about to read."""
        at, activation = self.watched.ffns[n.name]
        visitor = self.watched.visitor
        assert isinstance(visitor, FFNVisitor)
        first = n.target is aten.addmm.default
        x, weight = n.args[first], n.args[first + 1]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        h, down = self.env[x], self.env[weight]
        a = self.activated.pop(activation).reshape(h.shape)
        result = visitor.ffn(at, a, h, down if at.out_axis else down.t())
        if result is not None:
            self.env[x] = result


def _ffns(
    program: Program, analyses: Analyses, visitor: Visitor
) -> tuple[dict[str, tuple[FFNAt, str]], frozenset[str]]:
    """By the nodes of down projections, with the nodes of their activations; for a visitor that asks."""
    found: dict[str, tuple[FFNAt, str]] = {}
    if isinstance(visitor, FFNVisitor):
        weights = analyses.get(weight_values)
        for ffn in find_ffns(program, analyses):
            site = site_name(program, ffn.down.weight, weights)
            if ffn.is_conv:
                visitor.not_shown(site)
                continue
            read_once = all(len(v.users) == 1 for v in (ffn.activation, *between(ffn)))
            if site and read_once:
                words = target_name(ffn.activation)
                words = words.removeprefix("aten.").partition(".")[0]
                at = FFNAt(site, ffn.kind, words, ffn.down.out_axis)
                found[ffn.down.node.name] = (at, ffn.activation.name)
    return found, frozenset(activation for _, activation in found.values())


def link_facts(
    program: Program, analyses: Analyses, names: set[str] | frozenset[str]
) -> dict[str, LinkFacts]:
    """The links of a program whose consumers are layers with a name; ``names``: those that are sites."""
    weights = analyses.get(weight_values)
    found = {}
    for name, link in analyses.get(named_links).items():
        consumers, twice = _by_site(program, link, weights, producers=False)
        producers, _ = _by_site(program, link, weights, producers=True)
        found[name] = LinkFacts(
            name,
            link.kind,
            link.size,
            {site: channels for site, channels in consumers.items() if site in names},
            {site: channels for site, channels in producers.items() if site in names},
            link.carries_scale,
            link.carries_shift,
            not twice and set(consumers) <= names,
        )
    return found


def _by_site(
    program: Program, link: Link, weights: WeightValues, *, producers: bool
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Channels by site, and whether a site stands twice."""
    found: dict[str, tuple[int, ...]] = {}
    twice = False
    for side in link.producers if producers else link.consumers:
        if isinstance(side.of, Linear):
            name = site_name(program, side.of.weight, weights)
            twice = twice or name in found
            found[name] = tuple(side.channels)
    return found, twice
