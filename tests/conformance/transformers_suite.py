"""Every architecture of transformers that can be built small from its configuration alone."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from conformance.case import Case, NotBuildable
from conformance.transformers_configs import CLASSES, CONFIGS, INPUTS, UNBUILDABLE
from conformance.transformers_inputs import inputs_of
from conformance.transformers_shrink import shrink
from conformance.zoo import randomise_network
from torch import nn

LIMIT = 30_000_000  # parameters
# In this order: a head shares what passes fold (tied embeddings), then the bare model, then any task.
_HEADS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM")


def names() -> list[str]:
    """Model types with a base model or a model of some task."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    tasks = [getattr(modeling_auto, n) for n in dir(modeling_auto) if _is_table(n)]
    return sorted(n for n in CONFIG_MAPPING_NAMES if any(n in t for t in tasks))


def build(name: str) -> list[Case]:
    if name in UNBUILDABLE:
        raise NotBuildable(UNBUILDABLE[name])
    try:
        model, config = _model(name)
        inputs = inputs_of(model, config, INPUTS.get(name))
    except NotBuildable:
        raise
    except Exception as error:
        root = error.__cause__ or error
        words = " ".join(str(root).split())[:200]
        raise NotBuildable(f"{type(root).__name__}: {words}") from error
    return [Case(model, kwargs=inputs)]


def small_config(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    small = shrink(config_class().to_dict())
    for path, value in CONFIGS.get(name, {}).items():
        *parents, last = path.split(".")
        place = small
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            place.pop(last, None)
        else:
            place[last] = value
    if "model_type" in small and "model_type" not in inspect.signature(config_class).parameters:
        small.pop("model_type")
    config = config_class(**small)
    config._experts_implementation = "batched_mm"  # the grouped one has no fp64 kernel
    return config


def _model(name: str) -> tuple[nn.Module, Any]:
    model_class = _class(name)
    config = small_config(name)
    with torch.device("meta"):
        planned = model_class(config)
    count = sum(p.numel() for p in planned.parameters())
    if count > LIMIT:
        raise NotBuildable(f"{count / 1e6:.0f}M parameters after shrinking")
    torch.manual_seed(0)
    model = model_class(small_config(name))
    for module in model.modules():
        if getattr(module, "_requires_grad", False) is True:
            module._requires_grad = (
                False  # feature extractors that turn gradients of their input on
            )
    return randomise_network(model).eval(), model.config


def _class(name: str) -> Any:
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING,
        model_type_to_module_name,
    )

    chosen = CLASSES.get(name)
    if chosen is None:
        heads = [f"MODEL_FOR_{h}_MAPPING_NAMES" for h in _HEADS]
        composed = "text_config" in getattr(CONFIG_MAPPING[name], "sub_configs", {})
        tables = ["MODEL_MAPPING_NAMES"] if composed else [*heads, "MODEL_MAPPING_NAMES"]
        tables += [n for n in dir(modeling_auto) if _is_table(n)]
        found = (getattr(modeling_auto, t).get(name) for t in tables)
        chosen = next(f for f in found if f)
        chosen = chosen if isinstance(chosen, str) else chosen[0]
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(name)}")
    if hasattr(module, chosen):
        return getattr(module, chosen)
    import transformers

    return getattr(transformers, chosen)


def _is_table(name: str) -> bool:
    return name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
