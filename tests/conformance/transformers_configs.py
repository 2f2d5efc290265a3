"""What the generic shrinker cannot know of single families: keys to set, inputs to make, and reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
_DPT = {
    "backbone_config": {
        "model_type": "dinov2",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
        "apply_layernorm": True,
    },
    "patch_size": 8,
}
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": ...,
    "backbone_kwargs": ...,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 32, 64],
        "depths": [1, 1, 1, 1],
        "out_indices": [4],
    },
}
_EFFICIENT = {
    "width_coefficient": 0.25,
    "depth_coefficient": 0.3,
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "hidden_dim": 64,
}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}

# model type -> dotted keys of the small configuration's arguments and their values; ... removes a key.
CONFIGS: dict[str, dict[str, Any]] = {
    "align": {f"vision_config.{k}": v for k, v in _EFFICIENT.items()},
    "autoformer": _SERIES,
    "bamba": _MAMBA,
    "bros": {"dim_bbox_projection": 16},
    "chmv2": _DPT,
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deformable_detr": {**_RESNET, "num_feature_levels": 1},
    "depth_anything": _DPT,
    "detr": _RESNET,
    "efficientnet": _EFFICIENT,
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "cvt": {"depth": [1, 2, 3]},
    "gemma3n_text": {"intermediate_size": 96, "activation_sparsity_pattern": 0.0},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm_image_text": {"rope_parameters": _MROPE},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "glm4v": {"text_config.rope_parameters": _MROPE},
    "glm4v_moe": {"text_config.rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": _MROPE},
    "glm46v": {"text_config.rope_parameters": _MROPE},
    "glm_image": {"text_config.rope_parameters": _MROPE},
    "glm_ocr": {"text_config.rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ...},
    "granitemoehybrid": _MAMBA,
    "informer": _SERIES,
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1},
    "lilt": {"hidden_size": 96, "max_2d_position_embeddings": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral3": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    "prompt_depth_anything": _DPT,
    "qwen2_5_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "reformer": {"is_decoder": True},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "table-transformer": _RESNET,
    "time_series_transformer": _SERIES,
}

# model type -> name of the class to build, where the rule picks another.
CLASSES: dict[str, str] = {}


def _series(model: Any, made: dict[str, Any]) -> dict[str, Any]:
    make = torch.Generator().manual_seed(2)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    return {
        **made,
        "past_values": floats(2, 11),
        "past_time_features": floats(2, 11, 1),
        "past_observed_mask": torch.ones(2, 11),
        "future_values": floats(2, 4),
        "future_time_features": floats(2, 4, 1),
    }


def _past_values(length: int, channels: int) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    make = torch.Generator().manual_seed(2)
    values = torch.randn(2, length, channels, generator=make)
    return lambda model, made: {**made, "past_values": values}


# model type -> inputs made of the generic ones (a function of model and inputs); None removes one.
INPUTS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "autoformer": _series,
    "informer": _series,
    "patchtsmixer": _past_values(32, 1),
    "patchtst": _past_values(32, 1),
    "time_series_transformer": _series,
}

# model type -> why it is not built.
UNBUILDABLE: dict[str, str] = {
    "vits": "draws random numbers: there is no reference to compare with",
}
