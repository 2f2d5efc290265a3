"""Neurons of feed-forward networks that a recipe leaves out: by a threshold, by rank, or by a prompt's core.

Law.   Dᵀ(a ⊙ u) ≈ Dᵀ(a' ⊙ u), where a' is a where the recipe's law keeps it, and 0 elsewhere:
       activation  |a_i| > t
       hidden      |h_i| > t_i, h = a ⊙ u
       top         a_i is among the k largest
       gaussian    relu(z − mean(z) − c std(z)) in the place of z: what the activation reads, or gives
       core        i is in the core of the sequence
       What stands for "⊙ u" is missing in a plain network. Neurons that are 0 are not read.
Source Lee et al. 2024, "CATS", alg. 1 (activation); Luo et al. 2024, "Sparsing Law" (hidden, t_i = t /
       ‖D_i‖); Li et al. 2022, "The Lazy Neuron Phenomenon" (top); You et al. 2025, "Spark Transformer", eq. 6
       (gaussian); Wang et al. 2024, "CoreInfer" (core).
Legal  in inference, where nothing else reads the hidden values, for the networks of a recipe. top is for
       activations that are never negative; a gaussian before the activation for those that are 0 at 0. Weights
       whose sites the recipe rounds are rounded too, that of down by neuron, for any number of rows.
Lossy  by what is left out. The function is the same for any number of rows, but for the core: a graph of one
       token for each sequence decodes with the core, and one of more chooses it, and is dense.
Pays   where reading weights is the time: of up and down only the rows of live neurons are read. Where rows are
       many or unknown, products stay those of whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import RecipeError
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.ffn import FFN, find_ffns, through_reshapes
from sparsecc.passes.analysis.regions import autocasts
from sparsecc.passes.analysis.sizes import same_shape, same_size
from sparsecc.passes.analysis.weights import weight_values
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving, nbytes
from sparsecc.passes.ffn._neurons import (
    NOT_ZERO_AT_ZERO,
    RELU_LIKE,
    WORDS,
    activation_text,
    between,
    few,
    input_of,
    kept,
    place_sparse,
    refuse_formats,
    refuse_values,
    rows_of,
    share,
    skipping_pays,
    vector,
)
from sparsecc.program import Program
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.cores import choose_core, core
from sparsecc.runtime.ops.sparse_activation import sparse_activation
from sparsecc.runtime.ops.sparse_ffn import MOST_ROWS, Spec, sparse_ffn

aten = torch.ops.aten

LAWS = ("activation", "hidden", "top", "gaussian", "core")


@dataclass
class _Texts:
    """The expressions of a spec, and the vectors that they read."""

    activation: str
    hidden: str = "a"
    select: str = ""
    after: str = "a"
    operands: list[fx.Node] = field(default_factory=list)

    def spec(self, gate: bool, formats: tuple[str, ...], density: float = 1.0) -> str:
        texts = (self.activation, self.hidden, gate, self.select, self.after)
        return Spec(*texts, formats, density).text()

    def add(self, node: fx.Node) -> str:
        self.operands.append(node)
        return f"v{len(self.operands) - 1}"

    def plus(self, text: str, bias: fx.Node | None) -> str:
        return text if bias is None else f"{text} + {self.add(bias)}"


@dataclass(frozen=True)
class SparsifyFFN(Pass):
    """Leave out the neurons that a recipe says do not count.

    Attributes:
        recipe: whose ``sparsity``, ``thresholds`` and ``neurons`` are carried out, by the names of down
            projections; ``sites`` says how their weights are kept.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe("none"))

    name: ClassVar[str] = "sparsify-ffn"
    family: ClassVar[str] = "ffn"
    law: ClassVar[str] = "Dᵀ(a ⊙ u) ≈ Dᵀ(a' ⊙ u), a' = a where the recipe's law keeps it, else 0"
    source: ClassVar[str] = (
        "Lee et al. 2024, CATS; Luo et al. 2024, Sparsing Law; Li et al. 2022, The Lazy Neuron Phenomenon; "
        "You et al. 2025, Spark Transformer; Wang et al. 2024, CoreInfer"
    )
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    pays: ClassVar[str] = "decoding: of up and down only the rows of live neurons are read"
    refusals: ClassVar[Mapping[str, str]] = {
        **{code: words for code, words in WORDS.items() if code != "given"},
        "conv": "its layers are 1×1 convolutions: its rows are the pixels, which are many, and not last",
        "activation": "the law does not hold for this activation, or the operator has no such function",
        "read": "something else reads the activation or the hidden value",
        "shape": "the result is reshaped to sizes that are not known",
        "follows": "its first layer is the last one of another network, which a core leaves no room for",
    }

    def find(self, context: Context) -> list[Match]:
        program, weights = context.program, context.analyses.get(weight_values)
        found = []
        for ffn in find_ffns(program, context.analyses):
            rows = rows_of(ffn, program, weights)
            site = rows[-1].site
            given = self.recipe.sparsity.get(site)
            if given is None or given.get("law") not in LAWS:
                continue
            width = ffn.down.features
            self.recipe.check({site: [width, ffn.neurons]})
            self._check_numbers(site, given, ffn.neurons)
            roles = {"ffn": ffn, "rows": rows, "given": given, "site": site}
            found.append(Match(ffn.down.node, roles, note=f"{site}: {given['law']}"))
        downs = {match.node for match in found}
        for match in found:
            first = {each.node for each in match.nodes["ffn"].layers[:-1]}
            match.nodes["follows"] = bool(first & downs)
        return found

    def _check_numbers(self, site: str, given: Mapping[str, Any], neurons: int) -> None:
        """Whether the recipe holds what its law needs.

        Raises:
            RecipeError: it does not.
        """
        law = given["law"]
        if law in ("activation", "hidden"):
            known = self.recipe.thresholds.get(site)
            if known is None or list(known.shape) not in ([1], [neurons]):
                shape = None if known is None else list(known.shape)
                raise RecipeError(
                    f"{site}: law {law!r} needs thresholds [1] or [{neurons}], not {shape}"
                )
        elif law == "core":
            known = self.recipe.neurons.get(site)
            if known is None or known.dim() != 1 or not 1 <= len(known) <= neurons:
                raise RecipeError(f"{site}: law 'core' needs neurons [C], 1 <= C <= {neurons}")
            if not 0 < given.get("alpha", 0) <= 1:
                raise RecipeError(
                    f"{site}: law 'core' needs alpha of 0 to 1, not {given.get('alpha')!r}"
                )
        elif law == "top" and (not isinstance(given.get("k"), int) or given["k"] < 1):
            raise RecipeError(f"{site}: law 'top' needs k of at least 1, not {given.get('k')!r}")
        elif law == "gaussian" and given.get("on", "input") not in ("input", "output"):
            raise RecipeError(
                f"{site}: law 'gaussian' is on 'input' or 'output', not {given['on']!r}"
            )

    def check(self, match: Match, context: Context) -> Refusal | None:
        ffn: FFN = match.nodes["ffn"]
        node: fx.Node = match.node
        if ffn.is_conv:
            return Refusal.at(node, "conv", self.refusals["conv"])
        if context.trains or context.program.transient:
            code = "training" if context.trains else "gathered"
            return Refusal.at(node, code, WORDS[code])
        products = [each.node for each in (ffn.gate, ffn.up, ffn.down) if each is not None]
        inside = [*products, ffn.activation, ffn.hidden]
        if context.analyses.get(autocasts).intersection(inside):
            return Refusal.at(node, "region", WORDS["region"])
        refusal = refuse_values(inside) or self._refuse_law(match)
        if refusal is not None:
            return refusal
        if match.nodes["follows"] and match.nodes["given"]["law"] == "core":
            return Refusal.at(node, "follows", self.refusals["follows"])
        moved = self.recipe.links_of(match.nodes["site"])
        if moved:
            return Refusal.at(node, "moved", f"{WORDS['moved']}: {', '.join(sorted(moved))}")
        for value in (ffn.activation, *between(ffn)):
            if len(value.users) > 1:
                return Refusal.at(value, "read", self.refusals["read"])
        if context.analyses.get(aliases).written(ffn.up.x):
            return Refusal.at(ffn.up.x, "written", WORDS["written"])
        if self._skips(match) and not _keeps_shape(ffn) and not few(_sizes(node), 2**31):
            return Refusal.at(node, "shape", self.refusals["shape"])
        return refuse_formats(
            (r for r in match.nodes["rows"] if r is not None), self.recipe, context
        )

    def _refuse_law(self, match: Match) -> Refusal | None:
        given, activation = match.nodes["given"], match.nodes["ffn"].activation
        before = given["law"] == "gaussian" and given.get("on", "input") == "input"
        known = activation_text(activation, "p0") is not None
        if given["law"] == "top":
            known = activation.target in RELU_LIKE
        if not known or (before and activation.target in NOT_ZERO_AT_ZERO):
            words = f"{self.refusals['activation']}: {given['law']} of {activation.target}"
            return Refusal.at(activation, "activation", words)
        return None

    def _skips(self, match: Match) -> bool:
        """Whether the network becomes one operator that skips rows of weights."""
        ffn, given = match.nodes["ffn"], match.nodes["given"]
        if match.nodes[
            "follows"
        ]:  # its first product is another network's, and without its neurons
            return False
        if given["law"] == "core":
            return _one_token(ffn)
        rows, first = _sizes(ffn.up.x), match.nodes["rows"][0]
        if not few(rows, MOST_ROWS) or "density" not in given:
            return few(rows, MOST_ROWS)
        return skipping_pays(self.recipe.sites.get(first.site), share(given, rows), rows)

    def rewrite(self, match: Match, context: Context) -> None:
        given, program = match.nodes["given"], context.program
        if self._skips(match):
            self._as_one(match, program)
        elif given["law"] == "core":
            self._choosing(match, program)
        else:
            self._apart(match, program)

    # ---- few rows: one operator ----------------------------------------------------------------------

    def _as_one(self, match: Match, program: Program) -> None:
        ffn, given, node = match.nodes["ffn"], match.nodes["given"], match.node
        gate, up, down = match.nodes["rows"]
        build = program.weight(self.name, node)
        texts = _Texts("")
        inner = texts.plus("p0", gate.bias(build))
        self._decide(texts, match, program, inner)
        if up is not None:
            bias = up.bias(build)
            product = "a * p1" if bias is None else f"a * ({texts.plus('p1', bias)})"
            texts.hidden = product
            if given["law"] == "hidden":
                texts.hidden = f"keep({product}, {texts.add(self._thresholds(match, program))})"
        weights = [kept(build, rows, self.recipe) for rows in (gate, up, down) if rows is not None]
        formats = [weight.form for weight in weights]
        tensors = [part for weight in weights for part in weight.parts]
        x = input_of(ffn.up.node)
        only = self._core(match, program, x) if given["law"] == "core" else None
        text = texts.spec(
            True, _formats(formats), share(given, _sizes(ffn.up.x)) if only is None else 1.0
        )
        args = (x, tensors, texts.operands, only, text)
        place_sparse(program, node, down, args, self.name, weights[-1].scale)

    def _decide(self, texts: _Texts, match: Match, program: Program, inner: str) -> None:
        """The texts up to a: of ``inner``, what the activation reads."""
        ffn, given = match.nodes["ffn"], match.nodes["given"]
        law = given["law"]
        text = activation_text(ffn.activation, inner)
        assert text is not None
        texts.activation = text
        if law == "activation" or (law == "hidden" and ffn.gate is None):
            texts.activation = f"keep({text}, {texts.add(self._thresholds(match, program))})"
        elif law == "top":
            texts.select = f"top {given['k']}"
        elif law == "gaussian" and given.get("c") is not None:
            texts.select = f"gaussian {float(given['c'])!r}"
            if given.get("on", "input") == "input":
                after = activation_text(ffn.activation, "a")
                assert after is not None
                texts.activation, texts.after = inner, after

    def _thresholds(self, match: Match, program: Program) -> fx.Node:
        """``[F]``."""
        build = program.weight(self.name, match.node)
        known = self.recipe.thresholds[match.nodes["site"]]
        dtype = match.node.meta["val"].dtype
        return vector(build, known, match.nodes["ffn"].neurons, dtype)

    def _core(self, match: Match, program: Program, x: fx.Node) -> fx.Node:
        node, site = match.node, match.nodes["site"]
        usual = program.constant(self.recipe.neurons[site], like=node, origin=self.name)
        args = (usual, x, self._key(match))
        return program.call(core, args, like=node, origin=self.name, before=node)

    def _key(self, match: Match) -> str:
        """Under which the core is known: that of another model, or of other options, is another one."""
        site = match.nodes["site"]
        shares = f"{match.nodes['given']['alpha']} {len(self.recipe.neurons[site])}"
        return f"{self.recipe.about.get('fingerprint', '')} {shares} {site}"

    # ---- many rows: products of whole matrices ---------------------------------------------------------

    def _apart(self, match: Match, program: Program) -> None:
        ffn, given = match.nodes["ffn"], match.nodes["given"]
        texts = _Texts("")
        if given["law"] == "hidden" and ffn.gate is not None:
            old = ffn.hidden
            texts.activation = f"keep(p0, {texts.add(self._thresholds(match, program))})"
            source: Any = old
        else:
            old = ffn.activation
            self._decide(texts, match, program, "p0")
            source = old.args[0]
        place: dict[str, Any] = {"like": old, "origin": self.name, "after": old}
        for value in texts.operands:
            program.bring_before(value, old)
        args = (source, texts.operands, texts.spec(False, ()))
        new = program.call(sparse_activation, args, **place)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        program.version += 1
        self._rounded_down(match, program)

    def _choosing(self, match: Match, program: Program) -> None:
        """Dense, and the core is chosen beside."""
        ffn, given, node = match.nodes["ffn"], match.nodes["given"], match.node
        count = len(self.recipe.neurons[match.nodes["site"]])
        args = (ffn.hidden, float(given["alpha"]), count, self._key(match))
        place: dict[str, Any] = {"like": node, "origin": self.name}
        zero = program.call(choose_core, args, before=node, **place)
        total = program.call(aten.add.Tensor, (node, zero), after=node, **place)
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        program.version += 1
        self._rounded_down(match, program)

    def _rounded_down(self, match: Match, program: Program) -> None:
        """Where down is rounded, it is so by neuron, as for few rows."""
        node, down = match.node, match.nodes["rows"][-1]
        if down.site not in self.recipe.sites:
            return
        weight = kept(program.weight(self.name, node), down, self.recipe)
        text = Spec("p0", "a", gate=False, formats=(weight.form,)).text()
        args: tuple[Any, ...] = (input_of(node), weight.parts, [], None, text)
        place_sparse(program, node, down, args, self.name, weight.scale)

    # ---- what it saves, and its law ----------------------------------------------------------------------

    def saving(self, match: Match, context: Context) -> Saving:
        ffn, given = match.nodes["ffn"], match.nodes["given"]
        if not self._skips(match):
            return Saving()
        skipped = [ffn.down]
        if given["law"] != "hidden" and ffn.gate is not None and ffn.halves is None:
            skipped.append(ffn.up)
        dead = 1 - float(given.get("density", 1.0))
        return Saving(int(dead * sum(nbytes(each.weight) for each in skipped)))

    @classmethod
    def examples(cls) -> list[Example]:
        def masked(x: Any, G: Any, U: Any, D: Any, m: Any) -> Any:
            return ((x @ G.transpose(0, 1)) * m * (x @ U.transpose(0, 1))) @ D

        def without_rows(x: Any, G: Any, U: Any, D: Any, m: Any) -> Any:
            return ((x @ G.transpose(0, 1)) * (x @ U.transpose(0, 1))) @ (D * m[:, None])

        def spelled(x: Any, G: Any, U: Any, D: Any, b: Any, t: Any) -> Any:
            a = torch.relu(x @ G.transpose(0, 1) + b)
            a = torch.where(a.abs() > t.abs(), a, 0.0)
            return (a * (x @ U.transpose(0, 1))) @ D

        def as_one(x: Any, G: Any, U: Any, D: Any, b: Any, t: Any) -> Any:
            text = Spec("keep(relu(p0 + v0), v1)", "a * p1").text()
            return sparse_ffn(x, [G, U, D], [b, t.abs()], None, text)

        shapes = {"x": ("n", "d"), "G": ("k", "d"), "U": ("k", "d"), "D": ("k", "m")}
        more = {**shapes, "b": ("k",), "t": ("k",)}
        return [
            Example(masked, without_rows, {**shapes, "m": ("k",)}, ("G", "U", "D"), symbolic=True),
            Example(spelled, as_one, more, ("G", "U", "D", "b", "t")),
        ]


def _sizes(node: fx.Node) -> list[Any]:
    """All but the features."""
    return list(node.meta["val"].shape[:-1])


def _formats(names: list[str]) -> tuple[str, ...]:
    return () if set(names) == {"dense"} else tuple(names)


def _keeps_shape(ffn: FFN) -> bool:
    return same_shape(_sizes(ffn.up.x), _sizes(ffn.down.node))


def _one_token(ffn: FFN) -> bool:
    """Whether there is one token for each sequence: tokens are the last axis but the features'."""
    sizes = _sizes(through_reshapes(ffn.x))
    return not sizes or same_size(sizes[-1], 1)
