"""Inputs of a small transformers model, from the signature of its ``forward`` and its configuration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Change = Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
BATCH, TOKENS, TARGETS, GRID = 2, 7, 5, 4


def inputs_of(model: nn.Module, config: Any, change: Change | None = None) -> dict[str, Any]:
    """Keyword arguments for ``forward`` with which it runs: the first of the usual layouts that does.

    Raises:
        Exception: what the model raised for the first layout, when it takes none of them.
    """
    inputs = _Inputs(model, config)
    first: Exception | None = None
    for made in variants(inputs.make()):
        try:
            with torch.no_grad():
                made = inputs.place_images(made)
                if change is not None:
                    made = change(model, made)
                made = {k: v for k, v in made.items() if v is not None}
                copy.deepcopy(model)(**made)
        except Exception as error:
            first = first or error
        else:
            return made
    assert first is not None
    raise first


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of ``names`` that the configuration or one of its parts has."""
    parts = [config] + [
        getattr(config, p) for p in getattr(config, "sub_configs", {}) if getattr(config, p, None)
    ]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


class _Inputs:
    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        self.generator = torch.Generator().manual_seed(1)
        self.parameters = inspect.signature(model.forward).parameters

    def make(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name in self.parameters:
            maker = _MAKERS.get(name)
            if maker is not None and (value := maker(self)) is not None:
                made[name] = value
        return made

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def whole(self, high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def ids(self, tokens: int) -> torch.Tensor:
        text = getattr(self.config, "text_config", None) or self.config
        vocabulary = find(text, "vocab_size", "src_vocab_size", default=100)
        if not isinstance(vocabulary, int):
            vocabulary = 100
        return self.whole(min(vocabulary, 100) - 20, BATCH, tokens, low=5)

    def mask(self, tokens: int) -> torch.Tensor:
        mask = torch.ones(BATCH, tokens, dtype=torch.long)
        mask[1, tokens - 2 :] = 0
        return mask

    def pixels(self) -> torch.Tensor:
        vision = getattr(self.config, "vision_config", None) or self.config
        size = find(vision, "image_size", "img_size", "input_size", "resolution", default=64)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        if "pixel_values_videos" in self.parameters and "pixel_values" not in self.parameters:
            frames = find(vision, "num_frames", "frames_per_clip", default=4)
            return self.floats(BATCH, frames, channels, height, width)
        patch = find(vision, "patch_size", default=8)
        patch = patch if isinstance(patch, int) else patch[0]
        if "spatial_shapes" in self.parameters:
            return self.floats(BATCH, GRID * GRID, channels * patch * patch)
        if {"grid_thw", "image_grid_thw"} & set(self.parameters):
            deep = find(vision, "temporal_patch_size", default=1)
            return self.floats(BATCH * GRID * GRID, channels * deep * patch * patch)
        return self.floats(BATCH, channels, height, width)

    def grid(self, *shape: int) -> torch.Tensor:
        return torch.tensor([shape] * BATCH)

    def place_images(self, made: dict[str, Any]) -> dict[str, Any]:
        """As many image tokens in the text as the model makes of the image."""
        token = find(self.config, "image_token_id", "image_token_index")
        inner = [self.model, getattr(self.model, "model", None)]
        found = next((f for m in inner if (f := getattr(m, "get_image_features", None))), None)
        if token is None or found is None or not {"input_ids", "pixel_values"} <= set(made):
            return made
        wanted = inspect.signature(found).parameters
        features = found(**{k: v for k, v in made.items() if k in wanted and k != "input_ids"})
        features = getattr(features, "pooler_output", features)
        if isinstance(features, (list, tuple)):
            features = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
        count = features.numel() // features.shape[-1] // BATCH
        ids = made["input_ids"]
        images = torch.full((BATCH, count), token, dtype=ids.dtype)
        made = {**made, "input_ids": torch.cat([ids[:, :2], images, ids[:, 2:]], 1)}
        if "attention_mask" in made:
            made["attention_mask"] = self.mask(made["input_ids"].shape[1])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in self.parameters:
                made[name] = (made["input_ids"] == token).long()
        return made


def _wave(self: _Inputs) -> torch.Tensor:
    return self.floats(BATCH, 1600)


def _frames(self: _Inputs) -> int:
    positions = find(self.config, "max_source_positions")
    return 2 * positions if isinstance(positions, int) else 32


def _mels(self: _Inputs) -> torch.Tensor:
    mels = find(self.config, *_MEL_NAMES, default=16)
    return self.floats(BATCH, _frames(self), mels)


_MEL_NAMES = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "input_feat_size",
    "input_dim",
)


def _boxes(self: _Inputs) -> torch.Tensor:
    corner = self.whole(20, BATCH, TOKENS, 2)
    return torch.cat([corner, corner + self.whole(20, BATCH, TOKENS, 2, low=1)], -1)


_MAKERS: dict[str, Callable[[_Inputs], Any]] = {
    "input_ids": lambda self: self.ids(TOKENS),
    "attention_mask": lambda self: self.mask(TOKENS) if "input_ids" in self.parameters else None,
    "decoder_input_ids": lambda self: self.ids(TARGETS),
    "pixel_values": _Inputs.pixels,
    "input_features": _mels,
    "input_values": _wave,
    "pixel_values_videos": lambda self: (
        self.pixels() if "pixel_values" not in self.parameters else None
    ),
    "hidden_states": lambda self: self.pixels() if "grid_thw" in self.parameters else None,
    "grid_thw": lambda self: self.grid(1, GRID, GRID),
    "image_grid_thw": lambda self: self.grid(1, GRID, GRID),
    "spatial_shapes": lambda self: self.grid(GRID, GRID),
    "pixel_attention_mask": lambda self: (
        torch.ones(BATCH, GRID * GRID, dtype=torch.long)
        if "spatial_shapes" in self.parameters
        else None
    ),
    "input_features_mask": lambda self: torch.ones(BATCH, _frames(self), dtype=torch.long),
    "feature_attention_mask": lambda self: torch.ones(BATCH, _frames(self), dtype=torch.long),
    "bbox": _boxes,
}


def variants(made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same inputs in the other layouts that models take them in."""
    yield made
    other = {
        "input_features": (lambda x: x.mT.contiguous(), lambda x: x[:, None]),
        "input_values": (lambda x: x[:, None], lambda x: x[:, :512].reshape(BATCH, 32, 16)),
        "pixel_values": (
            lambda x: x[:, None],
            lambda x: x[:, None].repeat(1, 2, 1, 1, 1),
            lambda x: x[:, None].repeat(1, 4, 1, 1, 1),
        ),
    }
    for name, layouts in other.items():
        if name in made:
            for layout in layouts:
                yield {**made, name: layout(made[name])}
    if {"input_ids", "pixel_values"} <= set(made):
        yield {k: v for k, v in made.items() if "image" not in k and "pixel" not in k}
