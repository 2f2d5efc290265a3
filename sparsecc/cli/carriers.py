"""Models of timm and of transformers, by name or from a configuration; nothing is downloaded."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
from typing import Any

from sparsecc.cli.models import LoadedModel, _near, _words
from sparsecc.errors import ModelError

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_TOKENS = 32
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def from_timm(name: str, seed: int = 0) -> LoadedModel:
    """``timm.create_model(name)`` with random weights, and one input of its default size.

    Raises:
        ModelError: timm is missing or cannot be imported, or it has no such model.
    """
    _need("timm", "timm:NAME")
    from sparsecc.cli.timm_models import import_timm

    try:
        timm = import_timm()
    except Exception as error:
        raise ModelError(f"timm cannot be imported: {_words(error)}") from error
    import torch

    if not timm.is_model(name):
        base = name.partition(".")[0]
        raise ModelError(
            f"timm has no model {name!r}.{_near(base, timm.list_models())} "
            "List them with: python -c 'import timm; print(timm.list_models())'"
        )
    torch.manual_seed(seed)
    try:
        model = timm.create_model(name, pretrained=False).eval()
    except Exception as error:
        raise ModelError(f"timm cannot create {name!r}: {_words(error)}") from error
    size = timm.data.resolve_data_config({}, model=model)["input_size"]
    note = "the weights are random (pretrained=False)."
    return LoadedModel(model, (torch.randn(1, *size),), notes=[note])


def from_hf(place: str, seed: int = 0) -> LoadedModel:
    """A transformers model from a directory with ``config.json`` or from a JSON file.

    Weights beside the configuration are loaded; without them they are random, which is noted.

    Raises:
        ModelError: transformers is missing, or the configuration is not there or not usable.
    """
    path = pathlib.Path(place)
    config_file = path / "config.json" if path.is_dir() else path
    if not config_file.is_file():
        what = "has no config.json" if path.is_dir() else "is neither a directory nor a JSON file"
        raise ModelError(
            f"{place!r} {what}. sparsecc downloads nothing: save the model first with "
            "model.save_pretrained(directory), then give hf:directory."
        )
    _need("transformers", "hf:DIRECTORY")
    # Only local files are read; a look-up on the network could only fail or hang.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("torchvision") is not None:
        repair_torchvision()
    transformers = _import("transformers")
    transformers.utils.logging.disable_progress_bar()
    import torch

    torch.manual_seed(seed)
    try:
        config = transformers.AutoConfig.from_pretrained(config_file)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # one forward pass; a cache would only be returned
        model, notes = _create(transformers, config, path)
    except Exception as error:
        raise ModelError(f"cannot make a model from {place!r}: {_words(error)}") from error
    return LoadedModel(model.eval(), (), _inputs(model, config), notes)


def _create(transformers: Any, config: Any, path: pathlib.Path) -> tuple[Any, list[str]]:
    named = [n for n in getattr(config, "architectures", None) or () if hasattr(transformers, n)]
    cls = getattr(transformers, named[0]) if named else transformers.AutoModel
    if path.is_dir() and any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        return cls.from_pretrained(path, config=config), []
    note = f"{path} holds no weights; they are random."
    return (cls(config) if named else cls.from_config(config)), [note]


def _inputs(model: Any, config: Any) -> dict[str, Any]:
    """One example of the model's main input, in the shape that its configuration implies."""
    import torch

    def size(*names: str, default: int) -> int:
        for name in names:
            for source in (config, getattr(config, "vision_config", None)):
                value = getattr(source, name, None)
                if isinstance(value, (tuple, list)):
                    value = value[0]
                if isinstance(value, int):
                    return value
        return default

    def tokens(count: int) -> Any:
        most = size("max_position_embeddings", "n_positions", "max_target_positions", default=count)
        return torch.randint(0, size("vocab_size", default=2), (1, min(count, most)))

    main = getattr(model, "main_input_name", "input_ids")
    made: dict[str, Any] = {}
    if main == "pixel_values":
        side = size("image_size", default=224)
        made[main] = torch.randn(1, size("num_channels", default=3), side, side)
    elif main == "input_features":
        # Whisper's encoder halves the frames; its positions count what comes out.
        frames = 2 * size("max_source_positions", default=1500)
        made[main] = torch.randn(1, size("num_mel_bins", default=80), frames)
    elif main == "input_values":
        made[main] = torch.randn(1, 16000)
    elif main == "input_ids":
        made[main] = tokens(_TOKENS)
    else:
        raise ModelError(
            f"the model's main input is {main!r}, for which sparsecc makes no example. "
            "Write a factory that returns (model, args, kwargs) and give module:factory."
        )
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = tokens(8)
    return made


@functools.cache
def repair_torchvision() -> Any:
    """Make ``import torchvision`` work where its extension does not fit this torch.

    A torchvision of another build fails on importing because operators that it describes do not
    exist. Declaring them is enough: no model here calls them. Returns what must be kept alive.

    Raises:
        ModelError: torchvision cannot be imported for another reason.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise ModelError(f"torchvision cannot be imported: {_words(error)}") from error
    except ImportError as error:
        raise ModelError(f"torchvision cannot be imported: {_words(error)}") from error
    import torch

    # Half-imported modules would be taken as they are.
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared already
            library.define(operator + _NMS)
    _import("torchvision")
    return library


def _need(package: str, for_what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"{package} is not installed; it is needed for {for_what}. "
            f"Install it with: pip install {package}"
        )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(f"{name} cannot be imported: {_words(error)}") from error
