"""Makes any transformers configuration small by what its keys are called, consistently over the whole tree.

Equal widths stay equal (all become one width), so that what must match keeps matching; the widths of
feed-forward layers differ from it, so that a transposed matrix shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

WIDTH, INNER, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 64, 96, 4, 16, 100, 64
KV_HEADS, EXPERTS, LAYERS, MELS = 2, 4, 2, 16

# Derived from other keys when left out, or of no meaning for a random model.
_DROPPED = re.compile(
    r"^(stage_names|out_features|out_indices|_?out_indices|id2label|label2id|architectures|torch_dtype|"
    r"dtype|transformers_version|per_layer_config|_name_or_path|quantization_config|task_specific_params|"
    r"_attn_implementation.*|num_labels|max_value_projector.*)$"
)
_LAYER_LISTS = re.compile(
    r"^(layer_types|mlp_layer_types|layers_block_type|attn_types|attention_types_list)$"
)


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a small configuration of the same class."""
    small = {
        k: _value(k, v, config)
        for k, v in config.items()
        if isinstance(k, str)
        and not _DROPPED.match(k)
        and (v is not None or k.endswith("_token_id"))
    }
    _layers(small)
    _ids(small)
    _heads(small, config)
    return small


def _value(key: str, value: Any, around: Mapping[str, Any]) -> Any:
    if key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
        return _rope(value)
    if isinstance(value, Mapping):
        return shrink(value) if value and all(isinstance(k, str) for k in value) else dict(value)
    if re.search(r"drop|mask_(time|feature)_prob|noise", key) and isinstance(value, float):
        return 0.0
    if re.search(r"drop", key) and isinstance(value, list):
        return [0.0 for _ in value]
    if key in ("use_cache", "apply_spec_augment", "output_attentions", "output_hidden_states"):
        return False
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    if key == "embed_dim" and "depths" in around and isinstance(value, int):
        return 16  # doubled at every stage
    if key == "depths" and isinstance(value, (list, tuple)) and value:
        return [min(value[0], 2), *(1 for _ in value[1:])]  # two, for windows that are shifted
    if key in ("image_size", "img_size", "patch_size"):
        return _image(key, value, around)
    for pattern, rule in _RULES:
        if pattern.search(key.lower()):
            return _each(rule, value)
    return value


def _each(rule: Callable[[int], int], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_each(rule, v) for v in value]
    return rule(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _width(value: int) -> int:
    """The same for the same value wherever it stands, since the widths of stages must fit each other."""
    return value if value <= 8 else 16 if value < WIDTH else WIDTH


def _image(key: str, value: Any, around: Mapping[str, Any]) -> Any:
    patch = around.get("patch_size", 1)
    patch = patch[0] if isinstance(patch, (list, tuple)) and patch else patch
    patched = isinstance(patch, int) and patch >= 8
    new = (8 if patched else patch) if key == "patch_size" else (32 if patched else 64)
    if isinstance(value, (list, tuple)):
        return [new if v >= 8 else v for v in value]
    return new if key != "patch_size" or patched else value


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    if any(isinstance(v, Mapping) for v in value.values()):
        return {k: _rope(v) if isinstance(v, Mapping) else v for k, v in value.items()}
    kept = {
        k: v
        for k, v in value.items()
        if k in ("rope_theta", "partial_rotary_factor", "mrope_interleaved") and v is not None
    }
    if value.get("rope_type") in ("axial", "proportional"):
        kept["rope_type"] = value["rope_type"]
    if value.get("mrope_section"):
        kept["partial_rotary_factor"] = 1.0
        rest = HEAD_DIM // 2 - 2 * (len(value["mrope_section"]) - 1)
        kept["mrope_section"] = [rest] + [2] * (len(value["mrope_section"]) - 1)
    return {"rope_type": "default", **kept}


def _layers(small: dict[str, Any]) -> None:
    """As many layers as there are kinds of them (at most three), with one kind each."""
    count = LAYERS
    for key in [k for k in small if _LAYER_LISTS.match(k)]:
        kinds = list(dict.fromkeys(small[key]))[:3]
        small[key] = kinds
        count = max(count, len(kinds))
    for key in [k for k in small if _LAYER_LISTS.match(k)]:
        small[key] = (small[key] * count)[:count]
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if name in small:
                small[name] = count
    if small.get("first_k_dense_replace"):
        small["first_k_dense_replace"] = 1
    for key in ("sliding_window", "attention_window", "local_attention"):
        if isinstance(small.get(key), int) and small[key] > 4:
            small[key] = 4


def _ids(small: dict[str, Any]) -> None:
    """Special tokens inside the vocabulary: the ordinary ones low, those of other media at its end."""
    vocabulary = small.get("vocab_size", VOCABULARY)
    if not isinstance(vocabulary, int):
        return
    low = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    top = vocabulary - 1
    for key, value in small.items():
        if not re.search(r"(_token_id|_token_index|_token_ids|_id)$", key):
            continue
        if key in low and isinstance(value, (int, list)):
            small[key] = low[key]
        elif isinstance(value, int) and not isinstance(value, bool) and value > 3:
            small[key] = top
            top -= 1


def _heads(small: dict[str, Any], old: Mapping[str, Any]) -> None:
    if old.get("head_dim", 0) is None:
        small["head_dim"] = HEAD_DIM
    if old.get("head_dim") and old["head_dim"] == old.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    counts = {"num_experts_per_tok": 2, "moe_topk": 2, "n_routed_experts": EXPERTS}
    small.update({k: v for k, v in counts.items() if old.get(k, 0) is None})
    for kv in ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_query_groups"):
        if kv in old and old[kv] is None:
            small[kv] = HEADS
        if not isinstance(old.get(kv), int):
            continue
        heads = [v for k, v in old.items() if k in ("num_attention_heads", "n_head", "num_heads")]
        small[kv] = 1 if old[kv] == 1 else HEADS if old[kv] in heads else KV_HEADS


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda v: min(v, limit)


_RULES: tuple[tuple[re.Pattern[str], Callable[[int], int]], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"token|_id$|index$|_ids$|temperature|theta|rate$|weight|seed|kernel|stride", lambda v: v),
        (r"codebook_size", _at_most(64)),  # some must be a power of two
        (r"num_feat_extract_layers", lambda v: v),
        (r"num_frames|frames_per_clip", _at_most(4)),
        (r"^window_size$", lambda v: 2 if v > 2 else v),
        (r"vocab|num_embeddings|num_embeds|num_classes|num_codevectors", _at_most(100)),
        (r"mel_bins|num_mel|mel_dim|^feature_size$|feat_per_channel|n_mels", _at_most(MELS)),
        (
            r"num_queries|num_denoising|num_proposals|num_latents|prompt_length|n_latents|query_num"
            r"|num_query_tokens",
            _at_most(8),
        ),
        (
            r"(num|n)_(local_|routed_|text_|)?experts?$|^num_experts$|moe_num_experts|n_routed_experts"
            r"|num_local_experts|zero_expert_num",
            _at_most(EXPERTS),
        ),
        (
            r"experts_per_tok|experts_per_token|moe_k$|moe_topk|top_k_experts|num_selects_experts"
            r"|^moe_top_k$|router_top_k",
            _at_most(2),
        ),
        (r"^n_group$|num_expert_group", _at_most(2)),
        (r"^topk_group$", _at_most(1)),
        (
            r"max_.*(position|len|seq|tokens|embeddings)|n_positions|n_ctx|seq_len|max_length"
            r"|num_position_embeddings|context_length|position_embedding_size|max_num_patches",
            _at_most(POSITIONS),
        ),
        (r"qk_rope_head_dim", _at_most(8)),
        (r"qk_head_dim", _at_most(HEAD_DIM + 8)),
        (
            r"head_dim|d_kv$|d_head$|dim_head|head_size$|kv_channels|headdim|rotary_dim",
            _at_most(HEAD_DIM),
        ),
        (r"lora_rank", _at_most(32)),
        (
            r"heads?$|n_head|heads_per|num_heads|n_groups",
            lambda v: v if v < 2 else 2 if v < HEADS else HEADS,
        ),
        (r"upsample_groups", _width),
        (r"depths|num_blocks|block_repeats|layer_repeats|num_stages_layers", _at_most(2)),
        (r"layers$|^depth$|n_layer|num_layers|_layers?_num$|layers_per_block", _at_most(LAYERS)),
        (
            r"intermediate|ffn|mlp_dim|d_ff$|feedforward|feed_forward|linear_units|dff$|n_inner"
            r"|d_inner|ff_dim|mlp_hidden",
            _at_most(INNER),
        ),
        (r"state_size|d_state", _at_most(8)),
        (
            r"hidden|dim|channels|width|d_model|n_embd|units|embed|feat|size$|filters|dims$|sizes$"
            r"|latent|emb$",
            _width,
        ),
    )
)
