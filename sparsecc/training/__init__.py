"""Training towards sparsity: what a model is fine-tuned with, before it is compiled.

Nothing here changes what a compiled model computes: losses push activations to zero, ReLU makes them zero, and
the passes then skip what is zero.
"""

from sparsecc.training.activations import FFNActivations
from sparsecc.training.losses import chunk_loss, density, density_loss, l1, locality_loss
from sparsecc.training.relufy import FATReLU, relufy
from sparsecc.training.schedule import SineSchedule
from sparsecc.training.structured import SelfGuided, from_linear, rho_at

__all__ = [
    "FATReLU",
    "FFNActivations",
    "SelfGuided",
    "SineSchedule",
    "chunk_loss",
    "density",
    "density_loss",
    "from_linear",
    "l1",
    "locality_loss",
    "relufy",
    "rho_at",
]
