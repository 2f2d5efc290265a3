"""Weights of linear layers rounded to integers, as a recipe says, and multiplied by integer kernels.

Law.   x Wᵀ ≈ s_x s_w ⊙ (q_x q_wᵀ) with q_w = round(W / s_w) for each row (int8) or group of a row (int4), and
       q_x = round(x / s_x): s_x of each row of x (dynamic), or one number that the recipe holds (static). For
       fp4, round is to the numbers of E2M1 (runtime/ops/minifloat.py) instead of the integers.
Source Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
       Inference"; Yao et al. 2022, "ZeroQuant" (each token, each group); Yao et al. 2023, "ZeroQuant-V2", §4
       (a low-rank correction U V of the rounding error); Liu et al. 2023, "LLM-FP4" (E2M1, emulated).
Legal  in inference, for the sites of a recipe, where K is a multiple of the group. The weight is rounded as the
       passes before left it, in fp64, and again when it changes. A tied weight is rounded as a copy of its own:
       other readers keep the original. Where the recipe gives the grid (a checkpoint's scales and zeros), the
       weight must be the parameter itself, so that the checkpoint's codes come back; other passes leave it.
Lossy  by the rounding alone: the transforms before are exact (migrate-channels).
Pays   int8 reads a quarter of the bytes of fp32, int4 an eighth, and sums integers. A static step that no link
       could move into a weight costs one multiplication of the input. fp4 is emulated: it costs time.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from sparsecc.errors import RecipeError
from sparsecc.passes.analysis.regions import autocasts
from sparsecc.passes.analysis.sites import Site, sites
from sparsecc.passes.base import Context, Exactness, Example, Match, Pass, Refusal, Saving, nbytes
from sparsecc.program import ORIGIN, Program
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.few_rows import Spec, few_rows
from sparsecc.runtime.ops.formats import Format
from sparsecc.runtime.ops.rounded_weight import rounded_weight

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizeLinear(Pass):
    """Round the weights of a recipe's sites, and multiply by them in integers.

    Attributes:
        recipe: whose ``sites``, ``grids``, ``clips``, ``activations`` and ``corrections`` are carried out.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe("none"))

    name: ClassVar[str] = "quantize-linear"
    family: ClassVar[str] = "quant"
    law: ClassVar[str] = "x Wᵀ ≈ s_x s_w ⊙ (round(x / s_x) round(W / s_w)ᵀ) (+ (x Vᵀ) Uᵀ)"
    source: ClassVar[str] = (
        "Jacob et al. 2018; Yao et al. 2022, ZeroQuant; Yao et al. 2023, ZeroQuant-V2, §4"
    )
    exactness: ClassVar[Exactness] = Exactness.LOSSY
    pays: ClassVar[str] = (
        "weights are a quarter or an eighth of their bytes, and products are of integers"
    )
    refusals: ClassVar[Mapping[str, str]] = {
        "training": "gradients flow, and rounding has none",
        "gathered": "FSDP gathers the weights anew for each call: they would be rounded in each",
        "dtype": "input, weight and bias are not all of one dtype of float32, bfloat16, float16",
        "size": "the features are no multiple of the format's group, or too many for its sums",
        "unmigrated": "the recipe rounds it behind scales or shifts that this graph does not carry (those "
        "of v where a cache is written, say: calibrate with the cache)",
        "region": "under autocast, which narrows the product",
        "given": "the recipe gives the codes of a parameter, and the model computes the weight from it",
    }

    def find(self, context: Context) -> list[Match]:
        found = context.analyses.get(sites)
        self.recipe.check({site.name: site.shape for site in found})
        for site in found:
            self._check_grid(site)
        products: dict[fx.Node, list[Site]] = defaultdict(list)
        for site in found:
            if site.name in self.recipe.sites:
                products[site.node].append(site)
        return [
            Match(node, {"sites": each}, note=", ".join(self._words(site) for site in each))
            for node, each in products.items()
        ]

    def _check_grid(self, site: Site) -> None:
        """Whether the grid of a site is one of its format.

        Raises:
            RecipeError: it is not.
        """
        if site.name not in self.recipe.given():
            return
        form, grid = Format.of(self.recipe.sites[site.name]), self.recipe.grids[site.name]
        features, size = site.shape
        wanted = [features, 1 if form.kind == "int8" else size // form.group]
        shapes = [list(part.shape) for part in grid if part is not None]
        if form.kind == "float" or shapes != [wanted] * (1 + form.zero):
            raise RecipeError(
                f"the grid of {site.name} is {shapes}; the format {form.name!r} of a weight {site.shape} has "
                f"{[wanted] * (1 + form.zero) if form.kind != 'float' else 'none'}."
            )
        if site.name in self.recipe.clips:
            raise RecipeError(
                f"{site.name} has a grid and a clip: codes that are given are not clipped."
            )

    def _words(self, site: Site) -> str:
        static = self.recipe.activations.get(site.name)
        step = "" if static is None else f", step {static:.3g}"
        return f"{site.name}: {self.recipe.sites[site.name]}{step}"

    def _steps(self, read: list[Site]) -> set[float]:
        """The steps of what the sites of one product read: one, or the recipe is wrong.

        Raises:
            RecipeError: there are several.
        """
        steps = {self.recipe.activations.get(site.name, 1.0) for site in read}
        if len(steps) > 1:
            names = ", ".join(site.name for site in read)
            raise RecipeError(f"{names} read one input, and have the steps {sorted(steps)}")
        return steps

    def check(self, match: Match, context: Context) -> Refusal | None:
        node, words = match.node, self.refusals
        if context.trains or context.program.transient:
            code = "training" if context.trains else "gathered"
            return Refusal.at(node, code, words[code])
        if node in context.analyses.get(autocasts):
            return Refusal.at(node, "region", words["region"])
        x = node.args[0].meta["val"]  # type: ignore[union-attr]
        for value in (v for v in node.all_input_nodes if isinstance(v.meta["val"], torch.Tensor)):
            if value.meta["val"].dtype is not x.dtype or x.dtype not in _DTYPES:
                return Refusal.at(value, "dtype", words["dtype"])
        self._steps(match.nodes["sites"])
        for site in match.nodes["sites"]:
            missing = self.recipe.links_of(site.name) - context.program.migrated
            if missing:
                return Refusal.at(
                    site.weight,
                    "unmigrated",
                    f"{words['unmigrated']}: {', '.join(sorted(missing))}",
                )
            if site.name in self.recipe.grids and site.weight.op != "placeholder":
                return Refusal.at(site.weight, "given", f"{words['given']}: {site.name}")
            try:
                Format.of(self.recipe.sites[site.name]).check_size(site.shape[1])
            except ValueError as error:
                return Refusal.at(site.weight, "size", str(error))
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        program, node = context.program, match.node
        if node.target is not few_rows:
            node = _as_few_rows(program, node, self.name)
        chosen = {site.index: site for site in match.nodes["sites"]}
        spec = Spec.of(str(node.args[3]))
        read: Any = node.args[1]
        operands: Any = list(node.args[2])  # type: ignore[arg-type]
        x: Any = node.args[0]
        (step,) = self._steps(match.nodes["sites"])
        corrected = [i for i, site in chosen.items() if site.name in self.recipe.corrections]
        if corrected or step != 1.0:
            x, spec = _norm_apart(program, node, spec, self.name), replace(spec, norm="none")
        texts = list(spec.outputs)
        for i in corrected:
            term = self._correction(program, node, x, self.recipe.corrections[chosen[i].name])
            texts = [re.sub(rf"\bp{i}\b", f"(p{i} + t{len(operands)})", text) for text in texts]
            operands.append(term)
        if step != 1.0:  # no link could move it into what makes x
            x = program.call(
                aten.mul.Scalar, (x, 1 / step), like=node, origin=self.name, before=node
            )
        formats, tensors = [], []
        for i, weight in enumerate(read):
            form = self.recipe.sites[chosen[i].name] if i in chosen else "dense"
            formats.append(form)
            tensors += self._rounded(program, node, weight, form, chosen.get(i), step)
        text = replace(spec, outputs=tuple(texts), formats=tuple(formats)).text()
        node.args = (x, tensors, operands, text)
        for tensor in tensors:
            program.bring_before(tensor, node)
        node.meta[ORIGIN] = self.name
        program.version += 1

    def _rounded(
        self,
        program: Program,
        node: fx.Node,
        weight: fx.Node,
        form: str,
        site: Site | None,
        step: float,
    ) -> list[fx.Node]:
        build = program.weight(self.name, node)
        if step != 1.0:  # what reads x / s takes s into its weight, rounded or not
            dtype = weight.meta["val"].dtype
            weight = build.as_dtype(build.mul(build.wide(weight), step), dtype)
        if site is None:
            return [weight]
        clip: Any = self.recipe.clips.get(site.name)
        if clip is not None:
            clip = program.constant(clip.float(), like=node, origin=self.name)
        grid: list[Any] = []
        for i, part in enumerate(self.recipe.grids.get(site.name, ())):
            if part is not None:
                wide = part.double() * step if i == 0 and step != 1.0 else part
                narrow = wide.float() if wide.dtype is torch.float64 else wide
                grid.append(program.constant(narrow, like=node, origin=self.name))
        parts = range(len(Format.of(form).parts))
        return [build.call(rounded_weight, weight, clip, form, i, *grid) for i in parts]

    def _correction(
        self, program: Program, node: fx.Node, x: fx.Node, pair: tuple[torch.Tensor, torch.Tensor]
    ) -> fx.Node:
        """(x Vᵀ) Uᵀ."""
        dtype = x.meta["val"].dtype
        value = x
        for factor in reversed(pair):
            weight = program.constant(factor.to(dtype), like=node, origin=self.name)
            value = program.call(
                aten.linear.default, (value, weight), like=node, origin=self.name, before=node
            )
        return value

    def saving(self, match: Match, context: Context) -> Saving:
        saved = 0
        for site in match.nodes["sites"]:
            features, size = site.shape
            form, own = Format.of(self.recipe.sites[site.name]), site.weight.meta["val"].itemsize
            saved += nbytes(site.weight) - form.nbytes(features, size, own)
        return Saving(saved)

    @classmethod
    def examples(cls) -> list[Example]:
        def before(x: Any, Q: Any, s: Any, b: Any) -> Any:
            return x @ (Q * s[:, None]).transpose(0, 1) + b

        def after(x: Any, Q: Any, s: Any, b: Any) -> Any:
            return (x @ Q.transpose(0, 1)) * s + b  # one multiplication behind the sums

        shapes = {"x": ("n", "k"), "Q": ("d", "k"), "s": ("d",), "b": ("d",)}
        return [Example(before, after, shapes, ("Q", "s", "b"), symbolic=True)]


def _as_few_rows(program: Program, node: fx.Node, origin: str) -> fx.Node:
    """The operator that stands for ``aten.linear``."""
    x, weight, *bias = node.args
    operands = [b for b in bias if b is not None]
    spec = Spec("none", 0.0, ("p0 + v0",) if operands else ("p0",))
    made = program.call(
        few_rows, (x, [weight], operands, spec.text()), like=node, origin=origin, before=node
    )
    result = program.call(
        operator.getitem, (made, 0), like=node, origin=origin, before=node, val=made.meta["val"][0]
    )
    program.replace(node, result)
    return made


def _norm_apart(program: Program, node: fx.Node, spec: Spec, origin: str) -> fx.Node:
    """What the products of ``node`` read, as a value of its own: other things read it now."""
    x: Any = node.args[0]
    shape = [x.meta["val"].shape[-1]]
    if spec.norm != "none":
        target: Any = aten.rms_norm.default
        args: tuple[Any, ...] = (x, shape, None, spec.eps)
        if spec.norm == "layer":
            target, args = aten.layer_norm.default, (x, shape, None, None, spec.eps or 0.0)
        x = program.call(target, args, like=node, origin=origin, before=node)
    found: fx.Node = x
    return found
