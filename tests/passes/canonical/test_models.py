"""Real model code, tiny and random: the whole canonical form, counted and compared with eager."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sparsecc.passes.analysis.ffn import find_ffns
from sparsecc.passes.base import Analyses
from sparsecc.passes.registry import CANONICAL

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
HEADS = {"num_attention_heads": 2}
GROUPED = {**HEADS, "num_key_value_heads": 1}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": False}
GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 40}

# model -> (configuration, {pass: applied}, kind of FFN)
MODELS = {
    "Llama": ({**SMALL, **GROUPED, **TOKENS}, {"rmsnorm": 5, "attention": 2}, "gated"),
    "Mistral": ({**SMALL, **GROUPED, **TOKENS}, {"rmsnorm": 5, "attention": 2}, "gated"),
    "Qwen2": ({**SMALL, **GROUPED, **TOKENS}, {"rmsnorm": 5, "attention": 2}, "gated"),
    "Gemma": (
        {**SMALL, **GROUPED, **TOKENS, "head_dim": 8},
        {"rmsnorm": 5, "attention": 2},
        "gated",
    ),
    "Phi3": (
        {**SMALL, **GROUPED, **TOKENS},
        {"rmsnorm": 5, "attention": 2, "gated-ffn": 2},
        "fused",
    ),
    "GPTNeoX": ({**SMALL, **HEADS, **TOKENS}, {"attention": 2}, "plain"),
    "GPT2": ({**GPT2, **TOKENS}, {"attention": 2, "activation": 2}, "plain"),
    "Bert": ({**SMALL, **HEADS, "pad_token_id": 0}, {"attention": 2}, "plain"),
    "T5Encoder": (
        {**T5, "feed_forward_proj": "gated-gelu", "pad_token_id": 0},
        {"rmsnorm": 5, "attention": 2, "activation": 2},
        "gated",
    ),
}


def build(transformers, name, configuration):
    config_name = name.removesuffix("Encoder") + "Config"
    config = getattr(transformers, config_name)(**configuration, attn_implementation="eager")
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in MODELS), ("Llama", True), ("GPT2", True), ("Phi3", True)],
)
def test_model(run_pass, transformers, randomise, name, dynamic):
    configuration, expected, kind = MODELS[name]
    model = randomise(build(transformers, name, configuration))
    ids = torch.randint(3, 40, (2, 5))
    result = run_pass(list(CANONICAL), model, ids, dynamic=dynamic)
    counts = Counter(
        {
            key.removeprefix("raise-"): count
            for key, count in result.applied.items()
            if key.startswith("raise-")
        }
    )
    if dynamic and "activation" in expected:
        # The constant π is a symbolic float under dynamic=True.
        expected = {key: count for key, count in expected.items() if key != "activation"}
    assert counts == expected
    with torch.no_grad():
        eager = model(ids)
    torch.testing.assert_close(result.value[0], eager[0], rtol=1e-4, atol=1e-5)
    if not dynamic:
        kinds = [ffn.kind for ffn in find_ffns(result.program, Analyses(result.program))]
        assert kinds == [kind, kind]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_returned_attentions_keep_the_spelling(run_pass, transformers, randomise, name):
    configuration, *_ = MODELS[name]
    model = randomise(build(transformers, name, configuration))
    ids = torch.randint(3, 40, (2, 5))

    def function(ids):
        return model(ids, output_attentions=True).attentions

    result = run_pass(["drop-identities", "raise-attention"], function, ids)
    assert result.refused.count("probabilities-used") == 2
    with torch.no_grad():
        torch.testing.assert_close(result.value, function(ids))


@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_bfloat16(run_pass, transformers, randomise, name):
    """Norms compute in float32 inside a bfloat16 model; attention in bfloat16 stays spelled out."""
    configuration, expected, _ = MODELS[name]
    model = randomise(build(transformers, name, configuration)).bfloat16()
    ids = torch.randint(3, 40, (2, 5))
    result = run_pass(list(CANONICAL), model, ids)
    assert result.applied["raise-rmsnorm"] == expected["rmsnorm"]
    assert result.refused.count("half-precision") == 2
    with torch.no_grad():
        torch.testing.assert_close(result.value[0], model(ids)[0], rtol=2e-2, atol=2e-2)


def test_gradients(run_pass, transformers, randomise):
    configuration, expected, _ = MODELS["Llama"]
    model = randomise(build(transformers, "Llama", configuration)).train()
    ids = torch.randint(3, 40, (2, 5))
    result = run_pass(list(CANONICAL), model, ids, grad=True)
    assert result.applied["raise-rmsnorm"] == expected["rmsnorm"]
    assert result.refused.count("training") == expected["attention"]
    parameters = list(model.parameters())
    got = torch.autograd.grad(result.value[0].sin().sum(), parameters)
    eager = torch.autograd.grad(model(ids)[0].sin().sum(), parameters)
    torch.testing.assert_close(got, eager, rtol=1e-3, atol=1e-3)
