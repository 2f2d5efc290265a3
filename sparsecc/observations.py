"""``Observations``: what calibration saw of a model: statistics, weights and links, by site."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from sparsecc.errors import CalibrationError, first_line
from sparsecc.recipe import json_path, write_pair
from sparsecc.statistics import Statistics
from sparsecc.watch import LinkFacts

VERSION = 1  # of the file
_VECTORS = ("low", "high", "total", "squares", "bins", "sample", "keys")


@dataclass
class ObservedSite:
    """A linear layer.

    Attributes:
        shape: [N, K] of its weight.
        groups: of which inputs it read; a layer that is called twice may have several.
        weight: [N, K] fp32, as the passes left it; None while only statistics are here.
        dtype: what the model keeps the weight in.
    """

    shape: list[int]
    groups: list[str]
    weight: torch.Tensor | None = None
    dtype: str = "float32"


@dataclass
class Observations:
    """Statistics of the input of every site over the batches, and what else methods read. Not a recipe yet.

    Attributes:
        batches: how many were seen.
        shard: which part of the data this is (a rank).
        inputs: group (the sites that read one value, joined) -> its statistics.
        sites: by name.
        links: by name; those that were alike in every graph that holds one of their sites.
        left_out: sites that are several weights (one graph serves many layers), which no recipe can name.
        dropped: links that differ between graphs.
        about: facts about the model.
    """

    batches: int = 0
    shard: int = 0
    inputs: dict[str, Statistics] = field(default_factory=dict)
    sites: dict[str, ObservedSite] = field(default_factory=dict)
    links: dict[str, LinkFacts] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    # ---- reading -------------------------------------------------------------------------------------

    def input(self, site: str) -> Statistics:
        """Of all that ``site`` read."""
        return reduce(Statistics.merge, (self.inputs[g] for g in self.sites[site].groups))

    def weight(self, site: str) -> torch.Tensor:
        """[N, K] fp32.

        Raises:
            CalibrationError: these are statistics without weights.
        """
        found = self.sites[site].weight
        if found is None:
            raise CalibrationError(f"{site}: its weight was not kept; observe the model again.")
        return found

    def movable(self) -> dict[str, LinkFacts]:
        """The links along which a scale of the readers' columns may move, every reader being known."""
        return {
            name: link
            for name, link in self.links.items()
            if link.kind != "q-k"
            and link.carries_scale
            and link.whole
            and link.consumers.keys() <= self.sites.keys()
        }

    @property
    def fingerprint(self) -> str:
        """Of the model: its sites, their shapes, and some of their numbers."""
        digest = hashlib.blake2b(digest_size=8)
        for name, site in sorted(self.sites.items()):
            digest.update(f"{name}{site.shape}".encode())
            if site.weight is not None:
                flat = site.weight.flatten()
                digest.update(repr(flat[:: max(1, len(flat) // 64)].tolist()).encode())
        return digest.hexdigest()

    # ---- parts ---------------------------------------------------------------------------------------

    def add_graph(self, names: Iterable[str], links: Mapping[str, LinkFacts]) -> None:
        """Keep the links that are alike in all graphs: a scale moves through the whole model or not at all."""
        here, before = set(names), set(self.sites)
        for name in {*links, *self.links}:
            known, new = self.links.get(name), links.get(name)
            found = known or new
            assert found is not None
            absent = new is None and here & set(found.consumers)
            late = known is None and before & set(found.consumers)
            if absent or late or (known and new and known != new):
                self.dropped.append(name)
        for name, link in links.items():
            self.links.setdefault(name, link)
        self.dropped = sorted(set(self.dropped))
        self.links = {n: link for n, link in self.links.items() if n not in self.dropped}

    def merge(self, other: Observations) -> Observations:
        """Of both together, as if one run had seen both parts of the data.

        Raises:
            CalibrationError: a site has another shape: they are of two models.
        """
        both = replace(
            self, links=dict(self.links), dropped=sorted({*self.dropped, *other.dropped})
        )
        both.batches = self.batches + other.batches
        both.add_graph(other.sites, other.links)
        both.left_out = sorted({*self.left_out, *other.left_out})
        both.sites = {name: replace(site) for name, site in self.sites.items()}
        for name, site in other.sites.items():
            mine = both.sites.setdefault(name, replace(site))
            if mine.shape != site.shape:
                raise CalibrationError(
                    f"{name} is {mine.shape} here and {site.shape} there: observations of two models."
                )
            mine.groups = sorted({*mine.groups, *site.groups})
            mine.weight = site.weight if mine.weight is None else mine.weight
        both.inputs = dict(self.inputs)
        for group, statistics in other.inputs.items():
            known = both.inputs.get(group)
            both.inputs[group] = statistics if known is None else known.merge(statistics)
        both.about = {**other.about, **self.about}
        return both

    def all_reduce(self) -> Observations:
        """The observations of all ranks together, the same on each; its own where there is one process.

        A collective: every rank must call it. Weights do not travel, but for those that a rank never met.
        """
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            return self
        sites = {name: replace(site, weight=None) for name, site in self.sites.items()}
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, replace(self, sites=sites))
        whole: Observations = reduce(Observations.merge, parts)
        whole.shard = self.shard
        for name, site in self.sites.items():
            whole.sites[name].weight = site.weight
        return whole

    # ---- files ---------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, weights: bool = True) -> None:
        """Write ``path`` (``.json``) and the tensors beside it; both appear whole or not at all.

        Args:
            weights: False leaves the weights out: enough to go on observing.
        Raises:
            CalibrationError: a file cannot be written.
            RecipeError: the path does not end in .json.
        """
        from safetensors import SafetensorError

        target = json_path(path)
        tensors = {
            f"{vector}/{group}": getattr(statistics, vector).contiguous()
            for group, statistics in self.inputs.items()
            for vector in _VECTORS
        }
        sites: dict[str, Any] = {}
        for name, site in self.sites.items():
            sites[name] = {"shape": site.shape, "groups": site.groups, "dtype": site.dtype}
            if weights and site.weight is not None:
                tensors[f"weight/{name}"] = site.weight.detach().cpu().contiguous()
        data = {
            "version": VERSION,
            "batches": self.batches,
            "shard": self.shard,
            "inputs": {g: {"size": s.size, "rows": s.rows} for g, s in self.inputs.items()},
            "sites": sites,
            "links": {name: asdict(link) for name, link in self.links.items()},
            "left_out": self.left_out,
            "dropped": self.dropped,
            "about": self.about,
        }
        text = json.dumps(data, ensure_ascii=False)
        try:
            write_pair(target, text, _unshared(tensors))
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"observations {target}: {first_line(error)}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Observations:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: a file is missing, damaged, of another version, or holds no observations.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        target = json_path(path)
        try:
            data = json.loads(target.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.pop("version", None) != VERSION:
                raise CalibrationError(f"observations {target}: not of version {VERSION}.")
            tensors = load_file(str(target.with_suffix(".safetensors")))
            found = cls(
                batches=data["batches"],
                shard=data["shard"],
                left_out=data["left_out"],
                dropped=data["dropped"],
                about=data["about"],
            )
            for group, facts in data["inputs"].items():
                vectors: Any = {vector: tensors[f"{vector}/{group}"] for vector in _VECTORS}
                found.inputs[group] = Statistics(
                    facts["size"], found.shard, facts["rows"], **vectors
                )
            for name, facts in data["sites"].items():
                found.sites[name] = ObservedSite(**facts, weight=tensors.get(f"weight/{name}"))
            for name, facts in data["links"].items():
                for side in ("consumers", "producers"):
                    facts[side] = {s: tuple(channels) for s, channels in facts[side].items()}
                found.links[name] = LinkFacts(**facts)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CalibrationError(
                f"observations {target} cannot be read: {type(error).__name__}: {first_line(error)}"
            ) from error
        return found


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of those that share memory (tied weights), which the format refuses."""
    owners = Counter(t.untyped_storage().data_ptr() for t in tensors.values() if t.numel())
    return {
        name: t.clone() if t.numel() and owners[t.untyped_storage().data_ptr()] > 1 else t
        for name, t in tensors.items()
    }
