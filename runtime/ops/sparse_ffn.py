"""``sparsecc::sparse_ffn``: a feed-forward network that reads the weights of live neurons alone.

A neuron is dead for a row where its activation is exactly zero: it then adds nothing, and neither its row of
the up projection nor its row of the transposed down projection need be read. Skipping is exact; what makes
neurons dead (ReLU, a threshold, top-k) is part of the expressions, so that lossy methods differ from the model
in these alone. Of several rows, the neurons that are live for any are read.

All weights are kept by neuron: gate and up ``[F, K]``, and down transposed, ``[F, N]``, so that a live neuron
is one contiguous row of each.

Sources: gathered rows as in CATS (Lee et al. 2024, arXiv:2404.08763, alg. 1) and ProSparse (Song et al. 2024,
arXiv:2402.13516, §4.4); top-k as in Li et al. 2022, "The Lazy Neuron Phenomenon" (arXiv:2210.06313);
statistical top-k as in You et al. 2025, "Spark Transformer" (arXiv:2506.06644, eq. 6) and in Gemma 3n; input
thresholds as in TEAL (Liu et al. 2024, arXiv:2408.14690); blocks of neurons behind a router as in BlockFFN
(Song et al. 2025, arXiv:2507.08771).
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from sparsecc.runtime.ops import expressions, formats
from sparsecc.runtime.ops.define import define
from sparsecc.runtime.ops.formats import Format

MOST_ROWS = 16  # above, some row needs nearly every neuron
# Beside those of every expression.
FUNCTIONS = ("abs", "sqrt", "maximum", "minimum", "keep", "fatrelu")


@dataclass(frozen=True)
class Spec:
    """y[m] = sum over live i of h[m, i] D[i]; a neuron i is live where a[m, i] is not 0.

    a = after(select(activation(p0, v…))), h = hidden(a, p1, v…), with p0 = x Gᵀ and p1 = x Uᵀ. Of blocks,
    p0[m, i] is r[m, i // block], with the router's values r: each but 0 makes its block live, also negative
    ones and NaN.

    Attributes:
        activation: over p0 and v0, v1, … (vectors over neurons, by operand). Without a gate p0 is x itself.
        hidden: over a, p1 and v…; zero where a is: "a", "a * p1", "a * (p1 + v0)", "keep(a * p1, v0)".
        gate: whether the first weight is multiplied with x; otherwise x has a value for each neuron.
        select: over all neurons of a row: none (""), "top <k>": the k largest stay, of equal ones the first,
            and the others become 0; "gaussian <c>": relu(a - mean(a) - c std(a)), with the population's std.
        after: over a and v…, behind ``select``.
        formats: how gate, up and down are kept, of those there are; down without rounding what it reads.
        block: how many neurons one value of a router stands for. There is no gate then, and no selection; the
            last operand is the router's values ``[..., F // block]`` for each row of x. 0: there is no router.
        density: the share of neurons that is live, as far as it is known; kernels are measured at it.
        label: under which kernels count live neurons; none ("") is not counted.
    """

    activation: str
    hidden: str
    gate: bool = True
    select: str = ""
    after: str = "a"
    formats: tuple[str, ...] = ()
    density: float = 1.0
    label: str = ""
    block: int = 0

    @functools.cached_property
    def trees(self) -> tuple[ast.expr, ast.expr, ast.expr]:
        """Of activation, after and hidden."""
        first, second, third = (
            expressions.parse(text, FUNCTIONS)
            for text in (self.activation, self.after, self.hidden)
        )
        return first, second, third

    @property
    def up(self) -> bool:
        return "p1" in expressions.names(self.trees[2])

    @functools.cached_property
    def kept(self) -> tuple[Format, ...]:
        """The formats of the weights."""
        return tuple(map(Format.of, self.formats or ("dense",) * (1 + self.gate + self.up)))

    @functools.cached_property
    def slots(self) -> tuple[slice, ...]:
        """Where the tensors of each weight stand among all of them."""
        return formats.slots(self.kept)

    @property
    def plain(self) -> bool:
        """Whether every weight is of x's dtype."""
        return all(form.name == "dense" for form in self.kept)

    @property
    def vectors(self) -> list[str]:
        """The operands' names."""
        found = {n for tree in self.trees for n in expressions.names(tree) if n[0] == "v"}
        return sorted(found, key=lambda name: int(name[1:]))

    @property
    def top(self) -> int | None:
        """How many neurons of a row stay at most; None: any number."""
        return int(self.select.split()[1]) if self.select.startswith("top ") else None

    @property
    def gaussian(self) -> float | None:
        """c of the statistical selection, None for another."""
        return float(self.select.split()[1]) if self.select.startswith("gaussian ") else None

    def text(self) -> str:
        fields = asdict(self)
        if not self.block:  # texts, and with them kernels, are as they were
            del fields["block"]
        return json.dumps(fields)

    def source(self) -> Spec:
        """What a kernel's source depends on: neither what is measured nor what is counted."""
        return replace(self, density=1.0, label="")

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Spec:
        """The spec of a text.

        Raises:
            ValueError: it is none.
        """
        try:
            data = json.loads(text)
            spec = cls(**{**data, "formats": tuple(data["formats"])})
            count = len(spec.kept)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"sparse_ffn: {text!r} is no spec") from error
        if count != 1 + spec.gate + spec.up:
            raise ValueError(f"sparse_ffn: {count} formats for {1 + spec.gate + spec.up} weights")
        if spec.select and not re.fullmatch(r"top [1-9]\d*|gaussian -?[\d.e+-]+", spec.select):
            raise ValueError(f"sparse_ffn: {spec.select!r} selects nothing")
        if type(spec.block) is not int or spec.block < 0:
            raise ValueError(f"sparse_ffn: a block has 1 neuron at least, not {spec.block!r}")
        if spec.block and (spec.gate or spec.select):
            raise ValueError("sparse_ffn: a router's blocks beside a gate or a selection")
        for tree, values in zip(spec.trees, (("p0",), ("a",), ("a", "p1")), strict=True):
            for name in expressions.names(tree):
                if name not in values and not re.fullmatch(r"v\d+", name):
                    raise ValueError(
                        f"sparse_ffn: {name!r} has no meaning in {ast.unparse(tree)!r}"
                    )
        return spec


def unlabelled(kernel: str) -> str:
    """The text of a spec that is not counted."""
    return replace(Spec.of(kernel), label="").text()


def selected(spec: Spec, a: torch.Tensor) -> torch.Tensor:
    """What ``spec.select`` leaves of activations ``[..., F]``.

    A stable sort: of equal activations the first stay, on every device.
    """
    if spec.top is not None and spec.top < a.shape[-1]:
        order = a.argsort(stable=True, dim=-1, descending=True)
        return a.scatter(-1, order[..., spec.top :], 0.0)
    if spec.gaussian is not None:
        wide = a if a.dtype is torch.float64 else a.float()
        std, mean = torch.std_mean(wide, -1, correction=0, keepdim=True)
        return torch.relu(a - (mean + std * spec.gaussian).to(a.dtype))
    return a


def spread(router: torch.Tensor, rows: Sequence[int], neurons: int, block: int) -> torch.Tensor:
    """The router's value of every neuron, ``[*rows, neurons]``.

    Raises:
        ValueError: ``router`` is not ``[..., neurons // block]`` for so many rows.
    """
    if router.shape[-1] * block != neurons or router.shape[:-1].numel() != math.prod(rows):
        raise ValueError(
            f"sparse_ffn: router {list(router.shape)} for {math.prod(rows)} rows of {neurons} neurons "
            f"in blocks of {block}"
        )
    return router.reshape(*rows, router.shape[-1]).repeat_interleave(block, -1)


def hidden(
    spec: Spec,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    only: torch.Tensor | None = None,
) -> torch.Tensor:
    """h ``[..., F]`` in x's dtype: what the down projection reads."""
    p0 = x
    if spec.block:
        *operands, router = operands
        neurons = weights[spec.slots[-1].start].shape[0]
        p0 = spread(router.to(x.dtype), x.shape[:-1], neurons, spec.block)
    values = {f"v{i}": operand.to(x.dtype) for i, operand in enumerate(operands)}
    slots = iter(zip(spec.kept, spec.slots, strict=True))

    def product() -> torch.Tensor:
        form, slot = next(slots)
        if form.name == "dense":
            return torch.nn.functional.linear(x, weights[slot.start].to(x.dtype))
        return formats.product(x, form.name, weights[slot])

    first, after, last = spec.trees
    a = expressions.evaluate(first, values | {"p0": product() if spec.gate else p0})
    a = expressions.evaluate(after, values | {"a": selected(spec, a)})
    if only is not None:
        live = torch.zeros(a.shape[-1], dtype=torch.bool, device=a.device).index_fill(0, only, True)
        a = torch.where(live, a, 0.0)
    named = values | {"a": a}
    result: torch.Tensor = expressions.evaluate(
        last, named | {"p1": product()} if spec.up else named
    )
    return result


def meaning(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    only: torch.Tensor | None,
    kernel: str,
) -> torch.Tensor:
    """The operator in ATen: every neuron is read, and dead ones add zero.

    Where all weights are dense, it computes in x's dtype, operation by operation. Otherwise it computes in fp32
    (fp64 where x is), and rounds once at the end. A kernel that skips differs where a weight or an activation
    of a dead neuron is infinite or NaN: 0 · ∞ is NaN here, and is not computed there.

    Args:
        x: ``[..., K]`` of a float dtype; without a gate and a router ``[..., F]``.
        weights: the tensors of gate and up ``[F, K]`` and down ``[F, N]``, as the formats have them, in a row.
        operands: ``[F]`` each, of x's dtype; the last of a spec of blocks ``[..., F // block]``, with as many
            rows as x.
        only: int64 ``[C]``, ascending: the neurons that may be live; None for all. Not beside ``select``.
        kernel: the text of a :class:`Spec`.

    Returns:
        ``[..., N]``, of x's dtype.

    Raises:
        ValueError: the text is no spec, the tensors of a weight are not of its format, ``only`` stands
            beside a selection, or the router's values do not fit.
    """
    spec = Spec.of(kernel)
    if only is not None and spec.select:
        raise ValueError("sparse_ffn: a core beside a selection over all neurons")
    wide = x.dtype if spec.plain else torch.promote_types(x.dtype, torch.float32)
    h = hidden(spec, x.to(wide), weights, operands, only)
    down = formats.dequantize(spec.kept[-1].name, weights[spec.slots[-1]], wide)
    return (h @ down).to(x.dtype)


def at_density(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    only: torch.Tensor | None,
    kernel: str,
) -> None:
    """Changes random arguments in place, so that the spec's density of neurons is live for every row.

    Inputs become positive, and the gate's row of a dead neuron negative; its thresholds become infinite; the
    router's value of a dead block becomes 0. Of a selection, ``select`` itself says how many neurons are live.
    """
    del only
    spec = Spec.of(kernel)
    neurons = weights[spec.slots[-1].start].shape[0] // (spec.block or 1)
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))
    live = torch.zeros(neurons, dtype=torch.bool)
    live[order[: round(spec.density * neurons)]] = True
    live = live.to(x.device)
    if spec.block:
        *operands, router = operands
        router.fill_(1.0).mul_(live)
        live = live.repeat_interleave(spec.block)
    for operand in operands:
        operand.fill_(1e-3)
    calls = (node for tree in spec.trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    for bound in (call.args[1] for call in calls if len(call.args) == 2):
        if isinstance(bound, ast.Name) and bound.id[0] == "v":
            operands[int(bound.id[1:])].masked_fill_(~live, torch.inf)
    if spec.select or spec.block:
        return
    x.abs_()
    if not spec.gate:
        x.mul_(live)
        return
    sign = torch.where(live, 1.0, -1.0)
    first, *parts = weights[spec.slots[0]]
    if spec.kept[0].kind == "int4":
        first.fill_(0xFF)  # the largest level
    else:
        first.abs_()
    scaled = parts[0].abs_() if parts else first
    scaled.mul_((sign if scaled.dim() == 1 else sign[:, None]).to(scaled.dtype))
    for zero in parts[1:]:
        zero.zero_()


def _shapes(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    only: torch.Tensor | None,
    kernel: str,
) -> torch.Tensor:
    del operands, only
    spec = Spec.of(kernel)
    packed = weights[spec.slots[-1].start]
    return x.new_empty((*x.shape[:-1], packed.shape[1] * spec.kept[-1].parts[0].per))


_SIGNATURE = "(Tensor x, Tensor[] weights, Tensor[] operands, Tensor? only, str kernel) -> Tensor"
# The second runs by a generated kernel: on CPU ``codegen.cpp.sparse_ffn.load`` must have loaded that of the
# spec and of x's dtype (float32 or bfloat16); on a GPU ``codegen.triton`` builds it at the first call.
sparse_ffn, sparse_ffn_native = define("sparse_ffn", _SIGNATURE, meaning, _shapes)
