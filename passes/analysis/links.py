"""Links: a producer whose channels are read by linear layers alone, through what carries a scale or shift.

norm-linear    γ and β of a norm, and every linear layer that reads it
linear-linear  rows of one linear layer or convolution, and columns of the next (ReLU, pools, reshapes between)
v-o            rows of v and columns of the output projection, through attention; grouped heads share a channel
up-down        rows of one factor of a product and columns of what reads it: up and down of a gated FFN
q-k            rows of k (÷ s) and of q (× s), which cancel in q·k; what a rotary embedding mixes shares s

Every channel is followed on its own. One that an operator or reader in the way cannot carry is left as it is
(the q and k rows of a fused qkv, the gate half of a fused gate and up); the link holds the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx

from sparsecc.passes.analysis.affine import affine_tail
from sparsecc.passes.analysis.channels import FREE, paired
from sparsecc.passes.analysis.layout import runs
from sparsecc.passes.analysis.norms import Norm, as_norm
from sparsecc.passes.analysis.pairs import Pairs
from sparsecc.passes.analysis.walk import (
    UNSCALABLE,
    UNSHIFTABLE,
    Facts,
    Score,
    Side,
    Walk,
    blame,
)
from sparsecc.passes.base import Analyses, Refusal
from sparsecc.program import Program


@dataclass(frozen=True)
class Link:
    """A place for an equivalent transform: ``producers ÷ s`` and ``consumers × s``, or − z and + Wz.

    Attributes:
        kind: "norm-linear", "linear-linear", "v-o", "up-down" or "q-k".
        producers: whose rows are divided and shifted (of q-k: the keys).
        consumers: whose columns are multiplied (of q-k: the queries, whose rows are).
        size: how many channels there are: the length of s and z.
        path: the values between, which carry the scale or shift.
        refusal: why neither scale nor shift may pass (code of ``UNSCALABLE``); None where the scale may.
        shift_refusal: why a shift may not pass (code of either table).
    """

    kind: str
    producers: tuple[Side, ...]
    consumers: tuple[Side, ...] = ()
    size: int = 0
    path: tuple[fx.Node, ...] = ()
    refusal: Refusal | None = None
    shift_refusal: Refusal | None = None

    @property
    def node(self) -> fx.Node:
        return self.producers[0].node

    @property
    def carries_scale(self) -> bool:
        return self.refusal is None

    @property
    def carries_shift(self) -> bool:
        return self.refusal is None and self.shift_refusal is None


def links(program: Program, analyses: Analyses) -> list[Link]:
    """Every link of the program, refused ones too, in graph order of their producers.

    A producer whose rows serve two links (a fused qkv: v-o and q-k) stands in both, by different rows. One
    that has no legal link has one refused link, with the first reason that was met.
    """
    facts = Facts(program, analyses)
    walks = [Walk(facts, i, side) for i, side in enumerate(_sources(facts))]
    found = [link for walk in walks if (link := _columns(walk)) is not None]
    crossed = _crossed(walks, facts)
    taken = {side.node for link in (*found, *crossed) for side in link.producers}
    taken |= {side.node for link in crossed for side in link.consumers}
    found += crossed
    found += [_refused(walk) for walk in walks if walk.node not in taken]
    return sorted(found, key=lambda link: facts.order[link.node])


def _sources(facts: Facts) -> Iterable[Side]:
    """Every norm and linear layer whose features are a fixed number."""
    for node in facts.order:
        linear, norm = facts.maps.get(node), as_norm(node)
        if linear is not None:
            features = node.meta["val"].shape[linear.feature_axis]
            if isinstance(features, int):
                yield Side(linear, tuple(range(features)))
        elif norm is not None and isinstance(norm.size, int):
            yield Side(norm, tuple(range(norm.size)), affine_tail(node, norm.size, facts.weights))


def _columns(walk: Walk) -> Link | None:
    """The link from a producer to the columns that read it, where there is one."""
    number: dict[int, int] = {}

    def channel(label: int) -> int:
        if not walk.alive(label, "columns"):
            return FREE
        return number.setdefault(walk.same.find(label), len(number))

    rows = tuple(map(channel, walk.side.channels))
    if not number:
        return None
    mapped = [(linear, tuple(map(channel, labels))) for linear, labels in walk.columns]
    consumers = tuple(Side(linear, labels) for linear, labels in mapped if set(labels) != {FREE})
    through = frozenset[str]().union(
        *(walk.through[linear.x] for linear, labels in mapped if set(labels) != {FREE})
    )
    path = tuple(n for n, c in walk.known.items() if any(channel(i) != FREE for i in c.labels))
    shift = next((r for i, r in walk.unshifted.items() if channel(i) != FREE), None)
    producer = replace(walk.side, channels=rows)
    link = Link(_kind(walk, through), (producer,), consumers, len(number), path)
    return _checked(replace(link, shift_refusal=shift or _no_bias(producer)))


def _crossed(walks: list[Walk], facts: Facts) -> list[Link]:
    """The q-k links: channels of two producers (or of one) that cancel in q·k."""
    scored = {walk.index: walk for walk in walks if walk.scores}
    same, dead = _contracted(scored.values())
    keys = [(i, label) for i, walk in scored.items() for label in walk.side.channels]
    classes = []
    for members in same.sets(keys).values():
        roles = {role for i, label in members for role in "qk" if scored[i].alive(label, role)}
        whole = all(scored[i].alive(n, "q") or scored[i].alive(n, "k") for i, n in members)
        if whole and roles == {"q", "k"} and not dead.intersection(members):
            classes.append(members)
    together: Pairs[int] = Pairs()
    for members in classes:
        for i, _ in members:
            together.join(members[0][0], i)
    groups: dict[int, list[list[tuple[int, int]]]] = defaultdict(list)
    for members in classes:
        groups[together.find(members[0][0])].append(members)
    return [_crossed_link(group, scored, facts) for group in groups.values()]


def _contracted(walks: Iterable[Walk]) -> tuple[Pairs[tuple[int, int]], set[tuple[int, int]]]:
    """Which channels (by walk and label) share a scale, and which meet one that has none."""
    same: Pairs[tuple[int, int]] = Pairs()
    dead: set[tuple[int, int]] = set()
    reads: dict[fx.Node, list[Score]] = defaultdict(list)
    for walk in walks:
        for label in walk.side.channels:
            same.join((walk.index, walk.same.find(label)), (walk.index, label))
        for score in walk.scores:
            reads[score.node].append(score)
    for scores in reads.values():
        if sorted(score.role for score in scores) != ["k", "q"]:
            dead |= {(s.walk.index, label) for s in scores for label in s.channels.labels}
            continue
        first, second = scores
        for a, b in paired(first.channels, second.channels):
            left, right = (first.walk.index, a), (second.walk.index, b)
            if FREE in (a, b):
                dead |= {left, right}
            else:
                same.join(left, right)
    return same, dead


def _crossed_link(
    classes: list[list[tuple[int, int]]], scored: dict[int, Walk], facts: Facts
) -> Link:
    channel = {key: i for i, members in enumerate(classes) for key in members}
    sides: dict[str, list[Side]] = {"k": [], "q": []}
    path: list[fx.Node] = []
    for index in sorted({i for members in classes for i, _ in members}):
        walk = scored[index]
        for role, found in sides.items():
            rows = tuple(
                channel.get((index, label), FREE) if walk.alive(label, role) else FREE
                for label in walk.side.channels
            )
            if set(rows) != {FREE}:
                found.append(replace(walk.side, channels=rows))
        path += [n for n, c in walk.known.items() if any((index, i) in channel for i in c.labels)]
    keys, queries = tuple(sides["k"]), tuple(sides["q"])
    shift = Refusal.at(keys[0].node, "cancels", UNSHIFTABLE["cancels"])
    link = Link("q-k", keys, queries, len(classes), tuple(path), shift_refusal=shift)
    for side in (*keys, *queries):
        if facts.mode[side.node] != facts.mode[keys[0].node]:
            return replace(link, refusal=Refusal.at(side.node, "region", UNSCALABLE["region"]))
        if isinstance(side.of, Norm) and not _has_factor(side):
            reason = f"{side.node.name} has no weight to take the scale"
            return replace(link, refusal=Refusal.at(side.node, "not-a-weight", reason))
    return _checked(link)


def _has_factor(side: Side) -> bool:
    """Whether a norm multiplies by a weight."""
    assert isinstance(side.of, Norm)
    assert side.tail is not None
    factors = [side.of.weight, *(s.operand for s in side.tail.folds if s.kind == "mul")]
    return any(isinstance(factor, fx.Node) for factor in factors)


def _checked(link: Link) -> Link:
    for side in (*link.producers, *link.consumers):
        if runs(side.channels) is None:
            refusal = Refusal.at(side.node, "layout", UNSCALABLE["layout"])
            return replace(link, refusal=refusal)
    return link


def _refused(walk: Walk) -> Link:
    """A producer without a link, and why."""
    through = frozenset[str]().union(*walk.through.values())
    kind = "q-k" if walk.scores else _kind(walk, through)
    refusal = next(iter(walk.dead.values()), None)
    if refusal is None and walk.scores:
        refusal = blame(walk.scores[0].node)
    if refusal is None:
        refusal = Refusal.at(walk.node, "no-reader", UNSCALABLE["no-reader"])
    return Link(kind, (walk.side,), refusal=refusal, shift_refusal=refusal)


def _kind(walk: Walk, through: frozenset[str]) -> str:
    if isinstance(walk.side.of, Norm):
        return "norm-linear"
    kinds = {"attention": "v-o", "product": "up-down"}
    return next((kind for word, kind in kinds.items() if word in through), "linear-linear")


def _no_bias(producer: Side) -> Refusal | None:
    """Whether a norm has a place for a shift: its own bias, or a last addition in its tail."""
    if not isinstance(producer.of, Norm) or producer.tail is None:
        return None
    folds = producer.tail.folds
    if folds and folds[-1].kind == "add":
        return None
    if not folds and producer.of.kind == "layer_norm":
        return None
    return Refusal.at(producer.node, "no-bias", UNSHIFTABLE["no-bias"])
