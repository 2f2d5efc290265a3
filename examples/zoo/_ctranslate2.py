"""Read a Whisper model from a CTranslate2 `model.bin` into transformers' parameter names."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_VERSION = 6


class _Reader:
    """A cursor over little-endian fields."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def integer(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return int(value)

    def text(self) -> str:
        size = self.integer("H")
        start, self.offset = self.offset, self.offset + size
        return self.data[start : start + size - 1].decode()  # ends in a zero byte

    def array(self) -> Tensor:
        shape = [self.integer("I") for _ in range(self.integer("B"))]
        dtype = np.dtype(_DTYPES[self.integer("B")])
        size = self.integer("I")
        values = np.frombuffer(self.data, dtype, size // dtype.itemsize, self.offset)
        self.offset += size
        return torch.from_numpy(values.astype(np.float32)).view(shape)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a CTranslate2 file, as fp32."""
    reader = _Reader(path.read_bytes())
    version = reader.integer("I")
    if version != _VERSION:
        raise ValueError(f"{path}: format version {version}, this reader knows only {_VERSION}")
    reader.text()  # name of the model class
    reader.integer("I")  # its revision
    return {reader.text(): reader.array() for _ in range(reader.integer("I"))}


def whisper_state(path: Path) -> dict[str, Tensor]:
    """State dictionary for `WhisperForConditionalGeneration`."""
    source = read(path)
    state: dict[str, Tensor] = {}

    def put(target: str, name: str, parts: tuple[str, ...] = ()) -> None:
        """Copy one layer; `parts` splits a projection that CTranslate2 keeps as one matrix."""
        for key, stored in (
            ("weight", "weight"),
            ("bias", "bias"),
            ("weight", "gamma"),
            ("bias", "beta"),
        ):
            if (value := source.get(f"{name}/{stored}")) is None:
                continue
            for part, piece in zip(parts or ("",), value.chunk(len(parts) or 1), strict=True):
                if (part, key) != ("k_proj", "bias"):  # stored as zeros, absent in transformers
                    state[".".join(filter(None, (target, part, key)))] = piece

    for side in ("encoder", "decoder"):
        layers = len(
            [k for k in source if re.fullmatch(side + r"/layer_\d+/ffn/linear_0/weight", k)]
        )
        for i in range(layers):
            name, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            put(f"{target}.self_attn_layer_norm", f"{name}/self_attention/layer_norm")
            put(
                f"{target}.self_attn",
                f"{name}/self_attention/linear_0",
                ("q_proj", "k_proj", "v_proj"),
            )
            put(f"{target}.self_attn.out_proj", f"{name}/self_attention/linear_1")
            put(f"{target}.final_layer_norm", f"{name}/ffn/layer_norm")
            put(f"{target}.fc1", f"{name}/ffn/linear_0")
            put(f"{target}.fc2", f"{name}/ffn/linear_1")
            if side == "decoder":
                put(f"{target}.encoder_attn_layer_norm", f"{name}/attention/layer_norm")
                put(f"{target}.encoder_attn.q_proj", f"{name}/attention/linear_0")
                put(f"{target}.encoder_attn", f"{name}/attention/linear_1", ("k_proj", "v_proj"))
                put(f"{target}.encoder_attn.out_proj", f"{name}/attention/linear_2")
        put(f"model.{side}.layer_norm", f"{side}/layer_norm")
        positions = source[f"{side}/position_encodings/encodings"]
        state[f"model.{side}.embed_positions.weight"] = positions
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    embeddings = source["decoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = embeddings
    return state
