"""transformers' architectures with randomised weights: expected counts, expected refusals, fp64 proof.

L layers of a pre-LN network have 2L + 1 norms (parallel blocks with one norm: L + 1).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import randomise

import sparsecc

transformers = pytest.importorskip("transformers", reason="the `models` extra is not installed")

L = 3
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    **{
        k: WIDTHS[k]
        for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    },
    "image_size": 32,
    "patch_size": 8,
}
GPT = {
    "n_layer": L,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {**WIDTHS, "ffn_dim": 64, "word_embed_proj_dim": 32}
WHISPER = {
    "d_model": 32,
    "encoder_layers": L,
    "decoder_layers": L,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
LLAMA = {**WIDTHS, "num_key_value_heads": 2}
TO_RMS, AFFINE, SCALE = "layernorm-to-rmsnorm", "fold-norm-affine", "fold-layerscale"

# model class, config class, config, inputs, {pass: (applied, {refusal code: count})}
TEXT = {"input_ids": IDS}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT,
        TEXT,
        {TO_RMS: (2 * L + 1, {}), AFFINE: (2 * L, {"tied": 1})},
    ),
    "ViT": (
        "ViTModel",
        "ViTConfig",
        VISION,
        {"pixel_values": PIXELS},
        {TO_RMS: (2 * L + 1, {}), AFFINE: (2 * L, {"output": 1})},
    ),
    "DINOv2 (LayerScale)": (
        "Dinov2Model",
        "Dinov2Config",
        VISION,
        {"pixel_values": PIXELS},
        {SCALE: (2 * L, {}), TO_RMS: (2 * L + 1, {}), AFFINE: (2 * L, {"output": 1})},
    ),
    "BERT (post-LN)": (
        "BertModel",
        "BertConfig",
        WIDTHS,
        TEXT,
        {
            TO_RMS: (0, {"post-norm": 2 * L, "costs-more": 1}),
            AFFINE: (0, {"reader": 2 * L, "output": 1}),
        },
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": IDS},
        {TO_RMS: (5 * L + 2, {}), AFFINE: (5 * L, {"output": 1, "tied": 1})},
    ),
    "CLIP text (LayerNorm stays inside, only the final norm is returned)": (
        "CLIPTextModel",
        "CLIPTextConfig",
        {**WIDTHS, "max_position_embeddings": 16},
        TEXT,
        {TO_RMS: (2 * L + 1, {}), AFFINE: (2 * L, {"output": 1})},
    ),
    "CLIP vision (returns its raw stream)": (
        "CLIPVisionModel",
        "CLIPVisionConfig",
        VISION,
        {"pixel_values": PIXELS},
        {TO_RMS: (0, {"stream-exit": 2 * L + 1, "costs-more": 1})},
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        OPT,
        TEXT,
        {TO_RMS: (2 * L + 1, {}), AFFINE: (2 * L, {"tied": 1})},
    ),
    "GPT-J (parallel block)": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**GPT, "rotary_dim": 4},
        TEXT,
        {TO_RMS: (L + 1, {}), AFFINE: (L + 1, {})},
    ),
    "Falcon (parallel block)": (
        "FalconForCausalLM",
        "FalconConfig",
        {**{k: v for k, v in WIDTHS.items() if k != "intermediate_size"}, "alibi": False},
        TEXT,
        {TO_RMS: (L + 1, {}), AFFINE: (L, {"tied": 1})},
    ),
    "GPT-NeoX (parallel residual, two norms)": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        WIDTHS,
        TEXT,
        {TO_RMS: (2 * L + 1, {}), AFFINE: (2 * L + 1, {})},
    ),
    "Gemma (1 + w)": (
        "GemmaForCausalLM",
        "GemmaConfig",
        {**LLAMA, "head_dim": 8},
        TEXT,
        {TO_RMS: (0, {}), AFFINE: (2 * L, {"tied": 1}), "raise-rmsnorm": (2 * L + 1, {})},
    ),
    "Llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": False},
        TEXT,
        {TO_RMS: (0, {}), AFFINE: (2 * L + 1, {}), "raise-rmsnorm": (2 * L + 1, {})},
    ),
    "Mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {**LLAMA, "sliding_window": None},
        TEXT,
        {AFFINE: (2 * L + 1, {}), "raise-rmsnorm": (2 * L + 1, {})},
    ),
    "Qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**LLAMA, "tie_word_embeddings": False},
        TEXT,
        {AFFINE: (2 * L + 1, {}), "raise-rmsnorm": (2 * L + 1, {})},
    ),
    "Qwen3 (q and k norms stay)": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**LLAMA, "head_dim": 8, "tie_word_embeddings": False},
        TEXT,
        {AFFINE: (2 * L + 1, {"reader": 2 * L}), "raise-rmsnorm": (4 * L + 1, {})},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": L,
            "num_heads": 4,
            "vocab_size": 100,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        {"input_ids": IDS, "decoder_input_ids": IDS},
        {TO_RMS: (0, {}), "raise-rmsnorm": (5 * L + 2, {})},
    ),
}


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    model_class, config_class, config, inputs, _ = ARCHITECTURES[name]
    if model_class not in (
        "ViTModel",
        "Dinov2Model",
        "CLIPVisionModel",
        "CLIPTextModel",
        "BertModel",
    ):
        config = {**config, "use_cache": False}
    made = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return randomise(made).eval(), inputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_refusals_and_proof(name: str) -> None:
    model, inputs = build(name)
    report = sparsecc.verify(model, **inputs, options={"strict": True, "verify": "final"})
    for rewriting, (applied, refused) in ARCHITECTURES[name][4].items():
        record = report[rewriting]
        found: dict[str, int] = {}
        for refusal in record.refusals:
            found[refusal.code] = found.get(refusal.code, 0) + 1
        assert (record.applied, found) == (applied, refused), rewriting
        assert all(r.reason and (r.where or r.blame_where) for r in record.refusals)
    assert report.graph_breaks == []
    assert report.coverage == 1.0
    changed = any(report[n].applied for n in (TO_RMS, AFFINE, SCALE))
    assert report.verified == changed, (
        "a rewritten graph is proved; an untouched one needs no proof"
    )
    if changed:
        assert all(v.algebra < 1e-11 for v in report.verdicts)


@pytest.mark.parametrize("name", ["GPT-2", "Gemma (1 + w)", "Whisper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    model, inputs = build(name)
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    report = sparsecc.verify(model, **inputs, options={"verify": "final"})
    assert report.verified
    assert report[AFFINE].applied > 0


def test_training_step_of_gpt2_equals_eager_in_fp64() -> None:
    import copy

    model, inputs = build("GPT-2")
    model = model.double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.0
    other = copy.deepcopy(model)
    report = sparsecc.Report()
    options = {"lower": "aot_eager", "report": report}
    fast = torch.compile(other, backend="sparsecc", options=options)
    for one in (model, fast):
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert report[TO_RMS].applied == 2 * L + 1
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-11, msg=name)


TIMM = {
    # name -> {pass: (applied, refused)}; depthwise convolutions, stages, LayerScale spelled with a view
    "convnext_atto": {SCALE: (12, 0), AFFINE: (16, 1), TO_RMS: (1, 16)},
    "cait_xxs24_224": {SCALE: (52, 0), AFFINE: (53, 0), TO_RMS: (53, 0)},
    "beit_base_patch16_224": {SCALE: (24, 0), AFFINE: (25, 0), TO_RMS: (25, 0)},
    "mixer_s32_224": {AFFINE: (9, 8), TO_RMS: (17, 0)},
    "mvitv2_tiny": {AFFINE: (21, 30), TO_RMS: (21, 30)},
    "swin_tiny_patch4_window7_224": {AFFINE: (16, 13), TO_RMS: (6, 23)},
    "pvt_v2_b0": {AFFINE: (23, 7), TO_RMS: (30, 0)},
    "poolformer_s12": {SCALE: (12, 0), AFFINE: (1, 0), TO_RMS: (0, 1)},
}


@pytest.mark.models
@pytest.mark.parametrize("name", TIMM)
def test_timm_families(name: str) -> None:
    from sparsecc.cli.timm_models import import_timm

    model = randomise(import_timm().create_model(name)).eval()
    image = torch.randn(1, *model.default_cfg["input_size"])
    report = sparsecc.verify(model, image, options={"strict": True, "verify": "final"})
    assert {n: (report[n].applied, report[n].refused) for n in TIMM[name]} == TIMM[name]
    assert report.verified
    assert all(v.algebra < 1e-11 for v in report.verdicts)
