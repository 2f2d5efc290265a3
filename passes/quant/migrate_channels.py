"""A recipe's scales and shifts, moved along links before anything is rounded.

Law.   W₂ f(W₁x + b₁) + b₂ = (W₂ diag(s)) ((f(W₁x + b₁) − z) / s) + (b₂ + W₂z): producers take − z and ÷ s,
       readers take × s and + W₂z, so the values between are y' = (y − z) / s, for any s > 0.
Source Xiao et al. 2023, "SmoothQuant", eq. 4 (scales); Wei et al. 2023, "Outlier Suppression+", eq. 3
       (shifts); Li et al. 2023, "RepQ-ViT", eq. 8 to 11 (both, into a norm). The recipe's method chose s and z.
Legal  where the link carries a scale (a shift); see balance-channels. A link of the recipe that this graph has
       with another number of channels is an error; one that is refused here is reported.
Exact  in real arithmetic: what is proved in fp64 before a single weight is rounded.
Pays   nothing by itself; activations and weights that are rounded afterwards keep more of what matters. No
       scale is multiplied at run time: all stand in weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sparsecc.errors import RecipeError
from sparsecc.passes.analysis.links import Link
from sparsecc.passes.analysis.sites import named_links
from sparsecc.passes.analysis.walk import UNSCALABLE, UNSHIFTABLE
from sparsecc.passes.base import RECOMPUTED, Context, Exactness, Example, Match, Pass, Refusal
from sparsecc.passes.quant._migrate import migrate_scale, migrate_shift
from sparsecc.recipe import Recipe


@dataclass(frozen=True)
class MigrateChannels(Pass):
    """Move a recipe's scales and shifts into the weights on both sides of each link.

    Attributes:
        recipe: whose ``scales`` and ``shifts`` are moved.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe("none"))

    name: ClassVar[str] = "migrate-channels"
    family: ClassVar[str] = "quant"
    law: ClassVar[str] = "W₂y + b₂ = (W₂ diag(s)) ((y − z) / s) + (b₂ + W₂z), s > 0"
    source: ClassVar[str] = (
        "Xiao et al. 2023, SmoothQuant, eq. 4; Li et al. 2023, RepQ-ViT, eq. 8-11"
    )
    exactness: ClassVar[Exactness] = Exactness.EXACT
    pays: ClassVar[str] = "nothing by itself; it carries out what a recipe's method chose"
    refusals: ClassVar[Mapping[str, str]] = {**UNSCALABLE, **UNSHIFTABLE, **RECOMPUTED}

    def find(self, context: Context) -> list[Match]:
        found = context.analyses.get(named_links)
        wanted = {**self.recipe.scales, **self.recipe.shifts}
        return [
            Match(link.node, {"link": link, "name": name}, note=name)
            for name, link in found.items()
            if name in wanted
        ]

    def check(self, match: Match, context: Context) -> Refusal | None:
        link: Link = match.nodes["link"]
        name: str = match.nodes["name"]
        for vectors in (self.recipe.scales, self.recipe.shifts):
            if name in vectors and list(vectors[name].shape) != [link.size]:
                raise RecipeError(
                    f"the recipe ({self.recipe.method!r}) is of another model: link {name!r} has {link.size} "
                    f"channels here and {list(vectors[name].shape)} in the recipe. Calibrate again."
                )
        if link.refusal is not None:
            return link.refusal
        if name in self.recipe.shifts and link.shift_refusal is not None:
            return link.shift_refusal
        # As weights of this model: not in training, where they would be computed in every step.
        return Context(context.program, context.analyses).recomputed(match.node)

    def rewrite(self, match: Match, context: Context) -> None:
        program, link, name = context.program, match.nodes["link"], match.nodes["name"]
        # The shift first: its bias takes W as it was, and it is then divided with the rest.
        for vectors, migrate in (
            (self.recipe.shifts, migrate_shift),
            (self.recipe.scales, migrate_scale),
        ):
            if name in vectors:
                vector = program.constant(vectors[name].float(), like=link.node, origin=self.name)
                migrate(program, link, vector, self.name)
        program.migrated.add(name)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, W: Any, b: Any, V: Any, c: Any, z: Any, p: Any) -> Any:
            return (x @ W.transpose(0, 1) + b) @ V.transpose(0, 1) + c

        def after(x: Any, W: Any, b: Any, V: Any, c: Any, z: Any, p: Any) -> Any:
            s = p * p + 1
            y = x @ (W.transpose(0, 1) / s) + (b - z) / s
            return y @ (V * s).transpose(0, 1) + (c + z @ V.transpose(0, 1))

        shapes = {"x": ("n", "k"), "W": ("d", "k"), "b": ("d",), "V": ("m", "d"), "c": ("m",)}
        shapes |= {"z": ("d",), "p": ("d",)}
        return [Example(before, after, shapes, ("W", "b", "V", "c", "z", "p"), symbolic=True)]
