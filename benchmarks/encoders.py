"""Encoders and a vision model with real weights: what is run, what calibrates it, and what it is good at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from zoo import efficientnet, minilm, text, vit_focus, whisper_tiny

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Encoder:
    """One network, as a benchmark takes it.

    Attributes:
        name: what it is, and the shape of a call.
        network: the module whose linear layers are quantized.
        forward_of: a module like ``network`` -> the function that is compiled.
        inputs: of one call; all calls have this shape.
        calibration: batches of other data.
        metric: its name and unit.
        quality: the metric of a function.
        batches: of those that the metric is taken on, for comparing outputs.
        pre_norm: whether linear layers alone read its LayerNorms, so that scales and shifts may move there.
    """

    name: str
    network: nn.Module
    forward_of: Callable[[Any], Forward]
    inputs: tuple[torch.Tensor, ...]
    calibration: list[tuple[torch.Tensor, ...]]
    metric: str
    quality: Callable[[Forward], float]
    batches: list[tuple[torch.Tensor, ...]]
    pre_norm: bool = False


def minilm_l6() -> Encoder:
    """MiniLM-L6 (BERT, post-LayerNorm), calibrated on sentences of Wikipedia."""
    sentences = [s.strip() for s in text.wikipedia()[:200_000].split(". ") if len(s) > 40]
    tokens = minilm.tokenizer()(
        sentences[:160], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    pairs = zip(tokens["input_ids"].split(32), tokens["attention_mask"].split(32), strict=True)
    *calibration, held = pairs
    return Encoder(
        "MiniLM-L6, 32 x 16 tokens",
        minilm.load(),
        minilm.as_forward,
        held,
        calibration,
        "WordSim-353, Spearman's rho",
        minilm.wordsim_spearman,
        [held],
    )


def vit_s14(count: int = 300) -> Encoder:
    """DINOv2 ViT-S/14 (pre-LayerNorm), calibrated on digits that the probe does not see."""
    images = vit_focus.digits(1000)[0]
    train = count * 2 // 3
    return Encoder(
        "ViT-S/14, 10 x 112 px",
        vit_focus.load_backbone(),
        vit_focus.as_forward,
        (images[:10],),
        [(chunk,) for chunk in images[900:].split(10)],
        f"linear probe on digits, accuracy of {count - train}",
        lambda f: vit_focus.probe_accuracy(f, train=train, test=count - train, batch=10),
        [(images[:10],)],
        pre_norm=True,
    )


def whisper_encoder() -> Encoder:
    """Whisper tiny.en's encoder (pre-LayerNorm), calibrated on two clips and judged on three others.

    The metric is what the decoder, in fp32, loses on its own transcript when it reads the encoder's states.
    """
    model = whisper_tiny.load()
    clips = [whisper_tiny.features(waveform) for waveform, _ in whisper_tiny.clips()]
    held = clips[2:]
    with torch.no_grad():
        states = [model.model.encoder(features).last_hidden_state for features in held]
        spoken = [_greedy(model, each) for each in states]

    def quality(forward: Forward) -> float:
        lost, tokens = 0.0, 0
        for features, ids in zip(held, spoken, strict=True):
            logits = _decoded(model, forward(features), ids[:, :-1])
            lost += float(nn.functional.cross_entropy(logits[0, 1:], ids[0, 2:], reduction="sum"))
            tokens += ids.shape[1] - 2
        return lost / tokens

    return Encoder(
        "Whisper tiny.en's encoder, a clip",
        model.model.encoder,
        lambda encoder: lambda features: encoder(features).last_hidden_state,
        (held[0],),
        [(features,) for features in clips[:2]],
        "nats a token of fp32's transcripts",
        quality,
        [(features,) for features in held],
        pre_norm=True,
    )


def efficientnet_lite0() -> Encoder:
    """EfficientNet-Lite0 (convolutions, BatchNorm, ReLU6), calibrated on parts of scikit-learn's photos.

    In channels last, where a pointwise convolution is a linear layer without a copy.
    """
    photos = efficientnet.photos()[0]
    last = torch.channels_last
    return Encoder(
        "EfficientNet-Lite0, 10 x 224 px",
        efficientnet.load().to(memory_format=last),
        lambda model: lambda images: model(images.contiguous(memory_format=last)),
        (photos[:10],),
        [(chunk,) for chunk in _crops(32).split(8)],
        "top-1 of 20 photos",
        lambda f: float(efficientnet.top1(f)[0]),
        [(chunk,) for chunk in photos.split(10)],
    )


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "minilm": minilm_l6,
    "vit": vit_s14,
    "whisper": whisper_encoder,
    "efficientnet": efficientnet_lite0,
}


@torch.no_grad()
def relative_error(forward: Forward, expected: list[torch.Tensor], encoder: Encoder) -> float:
    """Root of the sum of squared differences from ``expected``, over that of the squares of ``expected``."""
    wrong = whole = 0.0
    for batch, y in zip(encoder.batches, expected, strict=True):
        wrong += float((forward(*batch).double() - y.double()).square().sum())
        whole += float(y.double().square().sum())
    return (wrong / whole) ** 0.5


def _decoded(model: Any, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(
        encoder_outputs=(states,), decoder_input_ids=ids, use_cache=False
    ).logits
    return logits


def _greedy(model: Any, states: torch.Tensor, length: int = 40) -> torch.Tensor:
    """Token ids [1, S] of a transcript: the prompt of two tokens, the words and the end."""
    start, plain, end = 50257, 50362, 50256
    ids = torch.tensor([[start, plain]])
    while ids.shape[1] < length and int(ids[0, -1]) != end:
        token = _decoded(model, states, ids)[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
    return ids


@cache
def _crops(count: int, side: int = 224) -> torch.Tensor:
    """Parts of scikit-learn's two photos [count, 3, side, side], normalised, at two scales."""
    from sklearn.datasets import load_sample_images

    generator = np.random.RandomState(0)
    found = []
    for i in range(count):
        photo = load_sample_images().images[i % 2]
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float()[None]
        if i % 4 > 1:  # as much of a photo as its height allows
            pixels = nn.functional.interpolate(pixels, scale_factor=0.55, mode="area")
        top, left = (generator.randint(size - side + 1) for size in pixels.shape[2:])
        found.append(pixels[0, :, top : top + side, left : left + side])
    return (torch.stack(found) - 127) / 128
