"""What calibration keeps of feed-forward networks, in constant memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecc.statistics import Statistics


@dataclass
class FFNStatistics:
    """Of one network, over all tokens that were seen.

    Attributes:
        kind: "plain", "gated" or "fused".
        activation: the operator's name ("silu").
        down: the weight of the down projection by neuron, fp32 [F, N].
        a: of what the activation gave; in a plain network that of the hidden values.
        h: of the hidden values, with sample rows.
    """

    kind: str
    activation: str
    down: torch.Tensor
    a: Statistics
    h: Statistics

    @property
    def size(self) -> int:
        """F, the number of neurons."""
        return int(self.down.shape[0])

    @property
    def shape(self) -> list[int]:
        """[N, F], as a linear layer's weight."""
        return [int(self.down.shape[1]), self.size]

    @property
    def norms(self) -> torch.Tensor:
        """‖D_i‖ of each neuron, fp64 [F]."""
        found: torch.Tensor = self.down.double().norm(dim=1)
        return found

    @property
    def density(self) -> float:
        """The share of hidden values that are not exactly zero by themselves."""
        return 1 - self.h.zeros

    def merge(self, other: FFNStatistics) -> FFNStatistics:
        """Of both together.

        Raises:
            ValueError: the networks differ in their sizes.
        """
        a = self.a.merge(other.a)
        h = a if self.a is self.h else self.h.merge(other.h)
        return FFNStatistics(self.kind, self.activation, self.down, a, h)


@dataclass
class FFNObservations:
    """Statistics of every feed-forward network, by the site of its down projection.

    Attributes:
        ffns: site -> statistics.
        batches: how many were seen.
        left_out: sites that are several weights (one graph serves many layers), which no recipe can name; and
            those of networks of 1×1 convolutions, whose rows are not last.
        about: facts about the model.
    """

    ffns: dict[str, FFNStatistics] = field(default_factory=dict)
    batches: int = 0
    left_out: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the model: its sites, their shapes, and some of their numbers."""
        digest = hashlib.blake2b(digest_size=8)
        for name, ffn in sorted(self.ffns.items()):
            flat = ffn.down.flatten()
            some = flat[:: max(1, len(flat) // 64)].tolist()
            digest.update(f"{name}{ffn.shape}{some!r}".encode())
        return digest.hexdigest()
