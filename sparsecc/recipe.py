"""``Recipe``: what calibration decided for one model, as a file to read, to keep and to compile with.

``NAME.json`` holds everything but tensors, ``NAME.safetensors`` beside it the tensors. Sites are named by the
parameters that they read, so a recipe holds for any batch size, device and process.

This is ground floor: passes take what they need from a recipe, and calibration writes one.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsecc.errors import RecipeError, first_line

VERSION = 1  # of the file
_TENSORS = ("scales", "shifts", "clips", "corrections", "grids", "thresholds", "neurons")

Grid = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(repr=False)
class Recipe:
    """How a model's linear layers are to be quantized.

    A *site* is the weight of a linear layer, named by the parameters that it is computed from, matrices alone,
    joined by "+" where layers were merged ("layers.0.fc1.weight"). A *link* (``passes/analysis/links.py``) is
    named by its kind and the sites that read it ("norm-linear: layers.0.q.weight, layers.0.k.weight").

    Attributes:
        method: its name ("int8", "awq", …).
        sites: site -> the weight's format (:mod:`sparsecc.runtime.ops.formats`).
        shapes: site -> [N, K] of its weight; a model that has another one is not this recipe's.
        scales: link -> s fp32 [channels], positive: producers ÷ s, consumers × s, before anything is rounded.
        shifts: link -> z fp32 [channels]: producers − z, consumers' biases + Wz.
        clips: site -> the share of its largest magnitude that each group of a row keeps, fp32 [N, groups]; of
            fp4, the share that the largest code of the row stands for, fp32 [N, 1].
        activations: site -> the step s of its input, one number for the tensor: q = round(y / s).
        corrections: site -> (U [N, r], V [r, K]), fp32: what is added to the rounded weight.
        grids: site -> (scale [N, groups], zero [N, groups] or None) on which its weight is rounded, where they
            are known before, as a checkpoint's; one group is a row of int8. The site's parameter itself is
            rounded: no pass folds anything into it.
        attention: how attention probabilities are rounded, all alike: {"law": "log-sqrt2", "bits": 4}
            (:mod:`sparsecc.runtime.ops.rounded_attention`); empty for not at all.
        sparsity: site -> which of its inputs count, and how many did: {"law": "activation", "density": 0.5}.
            The site is the down projection of a feed-forward network (laws "activation", "hidden", "top",
            "gaussian", "core", "prune") or any linear layer (law "input").
        thresholds: site -> fp32 [F] or [1]: magnitudes up to which a neuron (or an input feature) is dead.
        neurons: site -> int64 [C], ascending: the neurons that are kept.
        options: of the method.
        budget: what was asked for, such as {"metric": "perplexity", "increase": 0.02}; empty without.
        tried: one entry for each candidate that was measured, in order.
        about: of the model and the data: parameters, rows seen, a fingerprint, other names of tied weights.
        versions: of sparsecc and torch.
    """

    method: str
    sites: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)
    clips: dict[str, torch.Tensor] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)
    corrections: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    sparsity: dict[str, dict[str, Any]] = field(default_factory=dict)
    thresholds: dict[str, torch.Tensor] = field(default_factory=dict)
    neurons: dict[str, torch.Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Recipe({self.method!r}, {len(self.sites)} sites)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (``.json``) and the tensors beside it; both appear whole or not at all.

        Raises:
            RecipeError: the path does not end in .json, or cannot be written.
        """
        from safetensors import SafetensorError

        target = json_path(path)
        data: dict[str, Any] = {"version": VERSION}
        tensors: dict[str, torch.Tensor] = {}
        for name, value in vars(self).items():
            if name not in _TENSORS:
                data[name] = value
                continue
            for key, tensor in value.items():
                parts = tensor if isinstance(tensor, tuple) else (tensor,)
                for i, part in enumerate(parts):
                    if part is not None:
                        tensors[f"{name}/{i}/{key}"] = part.detach().cpu().contiguous()
        try:
            text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
            write_pair(target, text, tensors)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise RecipeError(
                f"recipe {target}: {type(error).__name__}: {first_line(error)}"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read what :meth:`save` wrote.

        Raises:
            RecipeError: a file is missing, damaged, of another version, or not a recipe.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        target = json_path(path)
        try:
            data = json.loads(target.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.pop("version", None) != VERSION:
                raise RecipeError(f"recipe {target}: not of version {VERSION}; calibrate again.")
            recipe = cls(**data)
            tensors = load_file(str(target.with_suffix(".safetensors")))
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise RecipeError(
                f"recipe {target} cannot be read: {type(error).__name__}: {first_line(error)}"
            ) from error
        pairs: dict[str, dict[str, dict[int, torch.Tensor]]] = {"corrections": {}, "grids": {}}
        for name, tensor in tensors.items():
            kind, index, key = name.split("/", 2)
            if kind in pairs:
                pairs[kind].setdefault(key, {})[int(index)] = tensor
            elif kind in _TENSORS:
                getattr(recipe, kind)[key] = tensor
        recipe.corrections = {key: (p[0], p[1]) for key, p in pairs["corrections"].items()}
        recipe.grids = {key: (p[0], p.get(1)) for key, p in pairs["grids"].items()}
        return recipe

    def given(self) -> frozenset[str]:
        """The sites whose codes are given, and which stay as they are until they are rounded."""
        return frozenset(self.grids.keys() & self.sites.keys())

    def links_of(self, site: str) -> set[str]:
        """The links whose scales or shifts the numbers of ``site`` were chosen behind."""
        return {
            link
            for link in {**self.scales, **self.shifts}
            if site in link.partition(": ")[2].split(", ")
        }

    def under(self, names: Collection[str]) -> Recipe:
        """This recipe by the names of one graph: capture and export call a tied weight by different ones.

        Args:
            names: of the graph's parameters; the other names of a tied one are in ``about["tied"]``.
        """
        other = {
            known: [name for name in (known, *tied) if name in names] or [known]
            for known, tied in self.about.get("tied", {}).items()
            if known in self.sites or known in self.sparsity
        }
        if all(here == [known] for known, here in other.items()):
            return self

        def renamed(key: str) -> list[str]:  # an exported program may have a weight under both
            kind, colon, sites = key.rpartition(": ")
            ways = itertools.product(*(other.get(site, [site]) for site in sites.split(", ")))
            return [kind + colon + ", ".join(sorted(way)) for way in ways]

        changed: dict[str, Any] = {
            name: {new: value for key, value in getattr(self, name).items() for new in renamed(key)}
            for name in ("sites", "shapes", "activations", "sparsity", *_TENSORS)
        }
        return replace(self, **changed)

    def check(self, shapes: Mapping[str, Any]) -> None:
        """Compare ``shapes`` (site -> shape of its weight, of a graph's sites) with this recipe's.

        Raises:
            RecipeError: a site of both has another shape; the message names it.
        """
        for site, shape in shapes.items():
            wanted = self.shapes.get(site)
            if wanted is not None and list(shape) != wanted:
                raise RecipeError(
                    f"the recipe ({self.method!r}) is of another model: {site} is {list(shape)} here and was "
                    f"{wanted} when it was calibrated. Calibrate again."
                )


def as_recipe(value: Any) -> Recipe | None:
    """A recipe, the path of one, or None.

    Raises:
        RecipeError: the file cannot be read, or ``value`` is something else.
    """
    if value is None or isinstance(value, Recipe):
        return value
    if isinstance(value, (str, os.PathLike)):
        return Recipe.load(value)
    raise RecipeError(f"a recipe is a sparsecc.Recipe or the path of one, not {value!r}.")


def json_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """``path``, which must end in .json: the tensors lie beside it.

    Raises:
        RecipeError: it ends otherwise.
    """
    target = pathlib.Path(path)
    if target.suffix != ".json":
        raise RecipeError(f"{target}: the path must end in .json.")
    return target


def write_pair(target: pathlib.Path, text: str, tensors: dict[str, torch.Tensor]) -> None:
    """``text`` to ``target`` and ``tensors`` beside it, the text last: where it is, they are."""
    from safetensors.torch import save_file

    _write_whole(target.with_suffix(".safetensors"), lambda part: save_file(tensors, str(part)))
    _write_whole(target, lambda part: part.write_text(text + "\n", encoding="utf-8"))


def _write_whole(target: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write beside the target and move into place: a reader never meets half a file."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
