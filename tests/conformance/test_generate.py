"""transformers' ``generate`` through Inductor: greedy tokens are Inductor's, logits as near fp64 as eager's.

Static caches: ``generate`` compiles the decoding step itself, with the ``CompileConfig`` that it is given.
Dynamic caches: the user compiles ``forward``, and the cache is one entry longer at each call.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from agreement import no_worse
from support import randomise

import sparsecc

transformers = pytest.importorskip("transformers", reason="the `models` extra is not installed")

pytestmark = pytest.mark.slow

L = 1
NEW = 5
TO_RMS, AFFINE = "layernorm-to-rmsnorm", "fold-norm-affine"
WORDS = {"vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# model class, configuration, what is rewritten in one decoding step
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "Llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": L,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
        },
        {AFFINE: 2 * L + 1},
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"n_layer": L, "n_embd": 32, "n_head": 4},
        {TO_RMS: 2 * L + 1, AFFINE: 2 * L},
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": L,
            "decoder_layers": L,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        {TO_RMS: 3 * L + 1},
    ),
}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    kind, config, _ = MODELS[name]
    architecture = getattr(transformers, kind)
    model = architecture(architecture.config_class(**WORDS, **config)).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    if name == "Whisper":
        features = torch.randn(2, 8, 32, generator=generator)
        return model, {"input_features": features, "decoder_input_ids": torch.ones(2, 3).long()}
    return model, {"input_ids": torch.randint(3, 90, (2, 7), generator=generator)}


def generate(model: Any, inputs: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """Greedy tokens, and the logits that they were chosen by."""
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    found = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return found.sequences, torch.stack(found.logits)


def static(settings: dict[str, Any]) -> dict[str, Any]:
    config = transformers.CompileConfig(mode=None, fullgraph=True, **settings)
    config._compile_all_devices = True  # on CPU too
    return {"cache_implementation": "static", "compile_config": config}


def only_decoding(forward: Any, compiled: Any) -> Any:
    """As ``generate`` does it for static caches: the prompt, of another length each time, runs eagerly."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        return (compiled if tokens.shape[1] == 1 else forward)(*args, **kwargs)

    return call


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, cache: str) -> None:
    report = sparsecc.Report()
    options = {"report": report, "strict": True, "floor": False}
    model, inputs = build(name)
    plain = {"cache_implementation": "static", "disable_compile": True}
    plain = plain if cache == "static" else {}
    found = {
        "eager": generate(model, inputs, **plain),
        "fp64": generate(copy.deepcopy(model).double(), inputs, **plain),
    }
    for backend in ({"backend": "inductor"}, {"backend": "sparsecc", "options": options}):
        torch._dynamo.reset()
        one = copy.deepcopy(model)
        if cache == "dynamic":
            one.forward = only_decoding(
                one.forward, torch.compile(one.forward, dynamic=True, **backend)
            )
        settings = static(backend) if cache == "static" else {}
        found[backend["backend"]] = generate(one, inputs, **settings)
    tokens = {k: v[0] for k, v in found.items()}
    assert tokens["eager"].shape[1] == NEW + (3 if name == "Whisper" else 7)
    assert torch.equal(tokens["sparsecc"], tokens["inductor"])
    assert torch.equal(tokens["sparsecc"], tokens["eager"])
    no_worse(*({"logits": found[k][1]} for k in ("sparsecc", "eager", "fp64")))
    assert not report.fallbacks
    step = report.graphs[-1].passes
    assert {n: step[n].applied for n in MODELS[name][2]} == MODELS[name][2]
