"""``sparsecc::few_rows``: a norm, one or more products with weights, and what follows them element by element.

Decoding reads every weight once for a row or a few, so its time is that of reading the weights: whatever else
happens on the way should cost no pass of its own over memory, and no launch.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsecc.runtime.ops import expressions, formats
from sparsecc.runtime.ops.define import define
from sparsecc.runtime.ops.formats import Format

NORMS = {  # y of x, as generated sources say it
    "none": "x",
    "rms": "x / sqrt(mean(x^2) + {eps})",
    "layer": "(x - mean(x)) / sqrt(var(x) + {eps})",
}


@dataclass(frozen=True)
class Spec:
    """What one kernel computes: out_j[m, n] = f_j(p.[m, n], v.[n], t.[m, n]), p_i = norm(x) W_iᵀ.

    Attributes:
        norm: over the features of x, without scale or shift: "none", "rms" or "layer".
        eps: of the norm; None for ``rms_norm``'s own default, which depends on the dtype.
        outputs: expressions over p0, p1, … (products, by weight), v0, … (vectors over features) and t0, …
            (tensors of the output's shape); vectors and tensors share one count, by operand.
        formats: how each weight is kept (:mod:`sparsecc.runtime.ops.formats`); empty where all are "dense".
    """

    norm: str
    eps: float | None
    outputs: tuple[str, ...]
    formats: tuple[str, ...] = ()

    @property
    def float_eps(self) -> float:
        """``eps`` of a kernel: ATen's default is that of float32 for half precision, too: it computes in it."""
        return torch.finfo(torch.float32).eps if self.eps is None else self.eps

    @property
    def norm_law(self) -> str:
        return NORMS[self.norm].format(eps=self.float_eps)

    @functools.cached_property
    def trees(self) -> list[ast.expr]:
        return [expressions.parse(text) for text in self.outputs]

    def weights(self, output: int) -> list[int]:
        """The weights that an output reads; all have its number of features."""
        found = expressions.names(self.trees[output])
        return sorted(int(name[1:]) for name in found if name[0] == "p")

    def operands(self, output: int) -> list[str]:
        return [name for name in expressions.names(self.trees[output]) if name[0] != "p"]

    @functools.cached_property
    def kept(self) -> tuple[Format, ...]:
        """The format of each weight."""
        count = 1 + max(max(self.weights(j)) for j in range(len(self.outputs)))
        return tuple(map(Format.of, self.formats or ("dense",) * count))

    @functools.cached_property
    def plain(self) -> bool:
        """Whether every weight is of x's dtype."""
        return all(form.name == "dense" for form in self.kept)

    @functools.cached_property
    def slots(self) -> tuple[slice, ...]:
        """Where the tensors of each weight stand among all of them."""
        return formats.slots(self.kept)

    def text(self) -> str:
        data = {"norm": self.norm, "eps": self.eps, "outputs": list(self.outputs)}
        if self.formats:  # without, texts are those of before there were formats
            data["formats"] = list(self.formats)
        return json.dumps(data)

    @classmethod
    @functools.cache
    def of(cls, text: str) -> Spec:
        """The spec of a text.

        Raises:
            ValueError: it is none.
        """
        try:
            data = json.loads(text)
            eps = None if data["eps"] is None else float(data["eps"])
            spec = cls(data["norm"], eps, tuple(data["outputs"]), tuple(data.get("formats", ())))
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"few_rows: {text!r} is no spec") from error
        if spec.norm not in NORMS:
            raise ValueError(f"few_rows: norm {spec.norm!r} is none of {', '.join(NORMS)}")
        for j, output in enumerate(spec.outputs):
            if not spec.weights(j):
                raise ValueError(f"few_rows: {output!r} reads no product")
            if spec.weights(j)[-1] >= len(spec.kept):
                raise ValueError(f"few_rows: {output!r} reads a weight without a format")
        return spec


def normalized(spec: Spec, x: torch.Tensor) -> torch.Tensor:
    if spec.norm == "rms":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=spec.eps)
    if spec.norm == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=spec.eps or 0.0)
    return x


def meaning(
    x: torch.Tensor, weights: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], kernel: str
) -> list[torch.Tensor]:
    """The operator in ATen.

    Where all weights are dense, it computes in x's dtype, operation by operation. Otherwise it computes in fp32
    (fp64 where x is), and rounds once at the end.

    Args:
        x: ``[..., K]``, of a float dtype.
        weights: the tensors of each weight ``[N_i, K]``, as the formats of the spec have them, in a row.
        operands: ``[N]`` or ``[..., N]`` each, as ``kernel`` names them, of x's dtype.
        kernel: the text of a :class:`Spec`.

    Returns:
        One ``[..., N]`` for each output of the spec, of x's dtype.

    Raises:
        ValueError: the text is no spec, or the tensors of a weight are not of its format.
    """
    spec = Spec.of(kernel)
    wide = x.dtype if spec.plain else torch.promote_types(x.dtype, torch.float32)
    rows = normalized(spec, x if spec.plain else x.to(wide))
    if spec.plain:
        products = [torch.nn.functional.linear(rows, w) for w in weights]
    else:
        operands = [operand.to(wide) for operand in operands]
        products = [
            formats.product(rows, form.name, weights[slot])
            for form, slot in zip(spec.kept, spec.slots, strict=True)
        ]
    values = {f"p{i}": value for i, value in enumerate(products)}
    values.update((f"{kind}{i}", operand) for i, operand in enumerate(operands) for kind in "vt")
    results = [expressions.evaluate(tree, values) for tree in spec.trees]
    return results if spec.plain else [result.to(x.dtype) for result in results]


def _shapes(
    x: torch.Tensor, weights: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], kernel: str
) -> list[torch.Tensor]:
    del operands
    spec = Spec.of(kernel)
    first = [weights[spec.slots[spec.weights(j)[0]].start] for j in range(len(spec.outputs))]
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in first]


_SIGNATURE = "(Tensor x, Tensor[] weights, Tensor[] operands, str kernel) -> Tensor[]"
# The second runs by a generated kernel. On CPU ``codegen.cpp.few_rows.load`` must have loaded that of the spec
# and of x's dtype (float32 or bfloat16); on a GPU ``codegen.triton.launch`` builds it at the first call.
few_rows, few_rows_native = define("few_rows", _SIGNATURE, meaning, _shapes)
