"""Input features of linear layers that a recipe leaves out where they are small.

Law.   W x + b ≈ W x' + b, x'_j = x_j where |x_j| > t, and 0 elsewhere. Each layer has its own t.
Source Liu et al. 2024, "TEAL: Training-Free Activation Sparsity in Large Language Models".
Legal  in inference, for the sites of a recipe. A weight that the recipe rounds is rounded too, by input
       feature, for any number of rows.
Lossy  by what is left out; the function is the same for any number of rows.
Pays   where reading weights is the time: of the transposed weight only the rows of live features are read.
       Where rows are many or unknown, the product stays that of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import RecipeError
from sparsecc.passes.analysis.alias import aliases
from sparsecc.passes.analysis.linear import every_linear
from sparsecc.passes.analysis.regions import autocasts
from sparsecc.passes.analysis.sites import sites
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving, nbytes
from sparsecc.passes.ffn._neurons import (
    WORDS,
    Rows,
    few,
    input_of,
    kept,
    place_sparse,
    refuse_formats,
    refuse_values,
    share,
    vector,
)
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.sparse_activation import sparse_activation
from sparsecc.runtime.ops.sparse_ffn import MOST_ROWS, Spec, sparse_ffn

aten = torch.ops.aten

_KEEP = "keep(p0, v0)"


@dataclass(frozen=True)
class SparsifyInput(Pass):
    """Leave out small input features of a recipe's linear layers.

    Attributes:
        recipe: whose ``sparsity`` and ``thresholds`` are carried out where the law is "input".
    """

    recipe: Recipe = field(default_factory=lambda: Recipe("none"))

    name: ClassVar[str] = "sparsify-input"
    family: ClassVar[str] = "ffn"
    law: ClassVar[str] = "W x + b ≈ W x' + b, x'_j = x_j where |x_j| > t, else 0"
    source: ClassVar[str] = "Liu et al. 2024, TEAL"
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    pays: ClassVar[str] = "decoding: of the weight only the columns of live features are read"
    refusals: ClassVar[Mapping[str, str]] = {
        code: words
        for code, words in WORDS.items()
        if code != "unmigrated"  # which is "moved" here
    }

    def find(self, context: Context) -> list[Match]:
        maps, found = context.analyses.get(every_linear), []
        for site in context.analyses.get(sites):
            given = self.recipe.sparsity.get(site.name)
            linear = maps.get(site.node)
            if given is None or given.get("law") != "input" or linear is None:
                continue
            self.recipe.check({site.name: site.shape})
            known, size = self.recipe.thresholds.get(site.name), site.shape[1]
            if known is None or list(known.shape) not in ([1], [size]):
                shape = None if known is None else list(known.shape)
                raise RecipeError(
                    f"{site.name}: law 'input' needs thresholds [1] or [{size}], not {shape}"
                )
            rows = Rows(linear, site.name, linear.in_axis)
            found.append(Match(site.node, {"rows": rows, "given": given}, note=site.name))
        return found

    def check(self, match: Match, context: Context) -> Refusal | None:
        node, rows = match.node, match.nodes["rows"]
        if context.trains or context.program.transient:
            code = "training" if context.trains else "gathered"
            return Refusal.at(node, code, WORDS[code])
        if node in context.analyses.get(autocasts):
            return Refusal.at(node, "region", WORDS["region"])
        refusal = refuse_values([node])
        if refusal is not None:
            return refusal
        moved = self.recipe.links_of(rows.site)
        if moved:
            return Refusal.at(node, "moved", f"{WORDS['moved']}: {', '.join(sorted(moved))}")
        if context.analyses.get(aliases).written(rows.linear.x):
            return Refusal.at(rows.linear.x, "written", WORDS["written"])
        return refuse_formats([rows], self.recipe, context)

    def rewrite(self, match: Match, context: Context) -> None:
        node, rows, program = match.node, match.nodes["rows"], context.program
        build = program.weight(self.name, node)
        x = input_of(node)
        known = self.recipe.thresholds[rows.site]
        limit = vector(build, known, int(x.meta["val"].shape[-1]), x.meta["val"].dtype)
        program.bring_before(limit, node)
        if not _few(x) and rows.site not in self.recipe.sites:
            args = (x, [limit], Spec(_KEEP, "a", gate=False).text())
            kept_x = program.call(sparse_activation, args, like=node, origin=self.name, before=node)
            rows.linear.set_input(program, kept_x)
            return
        found = kept(build, rows, self.recipe)
        formats = () if found.form == "dense" else (found.form,)
        density = share(match.nodes["given"], x.meta["val"].shape[:-1]) if _few(x) else 1.0
        spec = Spec(_KEEP, "a", gate=False, formats=formats, density=density)
        given = (x, found.parts, [limit], None, spec.text())
        place_sparse(program, node, rows, given, self.name, found.scale)

    def saving(self, match: Match, context: Context) -> Saving:
        rows = match.nodes["rows"]
        if not _few(rows.linear.x):
            return Saving()
        dead = 1 - float(match.nodes["given"].get("density", 1.0))
        return Saving(int(dead * nbytes(rows.linear.weight)))

    @classmethod
    def examples(cls) -> list[Example]:
        def masked(x: Any, W: Any, b: Any, m: Any) -> Any:
            return (x * m) @ W.transpose(0, 1) + b

        def without_columns(x: Any, W: Any, b: Any, m: Any) -> Any:
            return x @ (W * m).transpose(0, 1) + b

        def spelled(x: Any, W: Any, b: Any, t: Any) -> Any:
            return torch.where(x.abs() > t.abs(), x, 0.0) @ W.transpose(0, 1) + b

        def as_one(x: Any, W: Any, b: Any, t: Any) -> Any:
            text = Spec(_KEEP, "a", gate=False).text()
            return sparse_ffn(x, [W.transpose(0, 1)], [t.abs()], None, text) + b

        shapes = {"x": ("n", "d"), "W": ("k", "d"), "b": ("k",)}
        return [
            Example(masked, without_columns, {**shapes, "m": ("d",)}, ("W", "b"), symbolic=True),
            Example(spelled, as_one, {**shapes, "t": ("d",)}, ("W", "b", "t")),
        ]


def _few(x: fx.Node) -> bool:
    return few(x.meta["val"].shape[:-1], MOST_ROWS)
