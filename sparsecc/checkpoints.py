"""Checkpoints whose linear layers are quantized already: into a model's parameters, and into a recipe.

Law.   The parameter of a layer becomes W = s (q − z), and the recipe holds s and z of every group. Rounding W
       on that grid gives back q: kernels run the checkpoint's own codes.
Source Jacob et al. 2018, eq. 1; :mod:`sparsecc.quantized_layouts` has the layouts and their sources.
Legal  for ``nn.Linear``. What no integer format here means (groups out of order, int8 weights under floating
       activations, other steps of activations) stays a floating-point product with the dequantized weight.
Pays   as quantize-linear does, with numbers that others have calibrated or trained; it needs no data.
"""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsecc.errors import CheckpointError, first_line
from sparsecc.log import log
from sparsecc.quantized_layouts import PARTS, READERS, Codes, Layer, layout_of
from sparsecc.recipe import Grid, Recipe
from sparsecc.runtime.ops import formats

_CONFIGS = (
    ("config.json", "quantization_config"),
    ("quantize_config.json", None),  # of GPTQ before
    ("quant_config.json", None),  # of AutoAWQ before
)
_MARKS = ("qweight", "weight_packed", "weight_scale")
_METHODS = {
    "awq": ("awq", "llm-awq"),
    "gptq": ("gptq",),
    "compressed-tensors": ("pack-quantized", "int-quantized"),
}
_INT8, _INT8_STATIC = "int8", "int8s"


def load_quantized(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    ignore: Sequence[str] = (),
) -> Recipe:
    """Put a quantized checkpoint into ``model``, and return the recipe that runs its codes by integer kernels.

    Read are AutoAWQ (gemm), llm-awq (kernels of version 2), GPTQ (4 bits, v1 and v2) and compressed-tensors
    (pack-quantized of 4 bits, int-quantized); they are told apart by their tensors. Parameters get the
    dequantized weights, rounded once, to the dtype that they have; what is not quantized is copied. Layers that
    no format stands for get their weights and no site: ``recipe.about["left"]`` says why; a warning follows.

    Args:
        model: with ordinary ``nn.Linear`` layers, under the checkpoint's names, not on the meta device. Its
            contents are undefined after an error.
        source: a directory (safetensors, with or without an index), a .safetensors file, or name -> tensor.
        config: ``quantization_config``, where ``source`` is no directory that holds one (in config.json, or as
            quantize_config.json). GPTQ needs it ("checkpoint_format"), and so does int8.
        ignore: patterns of the checkpoint's tensors to pass over ("*.rotary_emb.inv_freq").
    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape or dtype, or its layout is unknown;
            the message names the tensor.
    """
    tensors, found = _open(source)
    config = found if config is None else config
    names = [n for n in tensors if not any(fnmatch.fnmatchcase(n, p) for p in ignore)]
    modules = dict(model.named_modules())
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device: give the model memory first.")
    recipe = Recipe("quantized checkpoint")
    left: dict[str, str] = {}
    layouts: dict[str, int] = {}
    done: set[str] = set()
    loaded: set[str] = set()
    for module in _quantized(names):
        layer = _layer(module, tensors, modules, config)
        layout = _layout(layer, config)
        parts = [part for kind in PARTS[layout] for part in kind]
        done.update(f"{module}.{part}" for part in parts)
        codes = READERS[layout](layer)
        site = f"{module}.weight"
        _copy(state[site], codes.weight(), site)
        loaded.add(site)
        layouts[layout] = layouts.get(layout, 0) + 1
        why = _give(recipe, site, state[site], codes, layer, layout)
        if why:
            left[site] = why
    if not layouts:
        raise CheckpointError(
            f"the checkpoint has no quantized layer: no tensor is called {', '.join(_MARKS)}."
        )
    for name in names:
        if name not in done:
            _plain(name, tensors[name], state)
            loaded.add(name)
    _all_there(state, loaded)
    _describe(recipe, model, layouts, left)
    return recipe


# ---- reading ---------------------------------------------------------------------------------------------


class _Files(Mapping[str, torch.Tensor]):
    """Name -> tensor of safetensors files, each read when it is asked for."""

    def __init__(self, files: Sequence[pathlib.Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(str(file), framework="pt")
                names = opened.keys()  # type: ignore[no-untyped-call]
                self._where |= dict.fromkeys(names, opened)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._where[name].get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _open(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]:
    """The tensors of a checkpoint, and the config beside them (empty where there is none)."""
    if isinstance(source, Mapping):
        return source, {}
    path = pathlib.Path(source)
    if path.is_file():
        return _Files([path]), {}
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a directory nor a file.")
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    if index is not None:
        named = _json(index).get("weight_map")
        if not isinstance(named, Mapping):
            raise CheckpointError(f"{index} has no weight_map.")
        files = [path / str(name) for name in dict.fromkeys(named.values())]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no .safetensors file.")
    for name, key in _CONFIGS:
        if (path / name).is_file():
            data: Any = _json(path / name)
            config = data if key is None else data.get(key)
            if isinstance(config, Mapping):
                return _Files(files), config
    return _Files(files), {}


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return data if isinstance(data, dict) else {}


def _quantized(names: Sequence[str]) -> list[str]:
    """The modules that have a quantized weight, in the checkpoint's order."""
    split = (name.rpartition(".") for name in names)
    return list(dict.fromkeys(module for module, _, suffix in split if suffix in _MARKS))


def _layer(
    module: str,
    tensors: Mapping[str, torch.Tensor],
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
) -> Layer:
    """The tensors of one quantized layer, and the size of the model's own.

    Raises:
        CheckpointError: the model has no such linear layer.
    """
    own = modules.get(module)
    if not isinstance(own, nn.Linear):
        what = "no such module" if own is None else f"a {type(own).__name__} there, no nn.Linear"
        raise CheckpointError(f"the checkpoint quantizes {module}, and the model has {what}.")
    suffixes = {part for kinds in PARTS.values() for kind in kinds for part in kind}
    found = {s: tensors[f"{module}.{s}"].cpu() for s in suffixes if f"{module}.{s}" in tensors}
    features, size = own.weight.shape
    return Layer(module, found, features, size, config)


def _layout(layer: Layer, config: Mapping[str, Any]) -> str:
    """The layout of a layer; what the config says must not contradict it.

    Raises:
        CheckpointError: it is unknown, or not the config's.
    """
    layout = layout_of(layer)
    if not layout:
        (mark, *_) = layer.tensors
        raise CheckpointError(f"{layer.name}.{mark} stands alone: there is no weight with it.")
    method = config.get("quant_method")
    if layout == "gptq" and not config:
        raise CheckpointError(
            f"{layer.name}.qweight is GPTQ's, whose versions differ in their zeros: give config="
            "{'quant_method': 'gptq', 'checkpoint_format': 'gptq'} (or 'gptq_v2')."
        )
    if method is not None and layout not in _METHODS.get(str(method), ()):
        raise CheckpointError(
            f"{layer.name} is laid out as {layout!r}, and the config's quant_method is {method!r}."
        )
    version = str(config.get("version") or "gemm").lower()
    if layout == "awq" and version != "gemm":  # of a square weight the shapes are the same
        raise CheckpointError(
            f"{layer.name}.qweight: of AWQ's versions gemm is read, not {version!r}."
        )
    return layout


# ---- into the model ------------------------------------------------------------------------------------


def _copy(target: torch.Tensor, value: torch.Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise CheckpointError(
            f"{name} is {list(value.shape)} in the checkpoint and {list(target.shape)} in the model."
        )
    with torch.no_grad():
        target.copy_(value)


def _plain(name: str, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
    if name not in state:
        raise CheckpointError(
            f"the checkpoint has {name}, and the model does not. To pass over it: ignore=[{name!r}]."
        )
    _copy(state[name], value, name)


def _all_there(state: Mapping[str, torch.Tensor], loaded: set[str]) -> None:
    """Whether every tensor of the model was in the checkpoint, itself or as one that it shares memory with."""
    there = {state[name].data_ptr() for name in loaded}
    for name, value in state.items():
        if name not in loaded and value.numel() and value.data_ptr() not in there:
            raise CheckpointError(f"the checkpoint has no {name}, and the model does.")


# ---- into a recipe -------------------------------------------------------------------------------------


def _give(
    recipe: Recipe, site: str, weight: torch.Tensor, codes: Codes, layer: Layer, layout: str
) -> str:
    """Make ``site`` one of the recipe's; or say why it is none."""
    form, step, why = _activations(layer, layout)
    if why:
        return why
    if codes.index is not None:
        return "its groups are not in the order of its inputs (desc_act)"
    grid: Grid
    if codes.bits == 8:
        if codes.scale.shape[1] != 1:
            return "int8 in groups of a row"
        if bool(codes.zero.any()):
            return "int8 with zeros"
        grid = (codes.scale.float().contiguous(), None)
    else:
        size = layer.size // codes.scale.shape[1]
        group = next((g for g in reversed(formats.GROUPS) if size % g == 0), None)
        if group is None:
            return f"groups of {size}"
        scale, zero = (
            part.half().repeat_interleave(size // group, 1) for part in (codes.scale, codes.zero)
        )
        zeros = bool((zero != 8).any())
        form = f"int4g{group}{'z' if zeros else ''}{form}"
        grid = (scale.contiguous(), zero.contiguous() if zeros else None)
    if not _held(weight.detach().cpu(), form, grid, codes.q):
        return f"{weight.dtype} or the format's scales do not hold its codes"
    recipe.sites[site], recipe.shapes[site] = form, [layer.features, layer.size]
    recipe.grids[site] = grid
    if form == _INT8_STATIC:
        recipe.activations[site] = step
    return ""


def _held(weight: torch.Tensor, form: str, grid: Grid, q: torch.Tensor) -> bool:
    """Whether rounding the parameter gives back the codes, where their scale is not 0."""
    kept = formats.quantize_on(weight, form, *grid)
    got = kept[0]
    if got.dtype is torch.uint8:
        got = formats.unpack(got, formats.Format.of(form).group)
    if not bool(torch.isfinite(kept[1]).all()):
        return False
    each = weight.shape[1] // grid[0].shape[1]
    dead = (grid[0] == 0).repeat_interleave(each, 1)
    return bool(((got == q) | dead).all()) and not bool(weight[dead].any())


def _activations(layer: Layer, layout: str) -> tuple[str, float, str]:
    """What a layer reads: int8's format or int4's suffix, the step where it is fixed, and why it is neither."""
    if layout not in _METHODS["compressed-tensors"]:
        return "", 1.0, ""
    eight = layout == "int-quantized"
    scheme = _scheme(layer)
    if scheme is None:
        if eight:
            raise CheckpointError(
                f"{layer.name}.weight is int8, and no config group says what it reads: give config=."
            )
        return "", 1.0, ""
    given = scheme.get("input_activations")
    if given is None:
        return "", 1.0, "int8 weights and floating activations" if eight else ""
    whole = given.get("num_bits") == 8 and given.get("type", "int") == "int"
    if not whole or given.get("symmetric", True) is not True:
        return "", 1.0, "its activations are not symmetric int8"
    if given.get("dynamic") is True:
        if given.get("strategy") != "token":
            return "", 1.0, "its activations have no step of each token"
        return _INT8 if eight else "a8", 1.0, ""
    if given.get("dynamic", False) is not False or given.get("strategy", "tensor") != "tensor":
        return "", 1.0, "its activations have no step of the tensor"
    if not eight:
        return "", 1.0, "int4 weights and activations of a fixed step"
    shift = layer.tensors.get("input_zero_point")
    if shift is not None and bool(shift.any()):
        return "", 1.0, "its activations have a zero"
    scale = layer.tensors.get("input_scale")
    step = layer.take("input_scale", (1,) if scale is None else tuple(scale.shape), None)
    if step.numel() != 1 or not float(step) > 0:
        raise CheckpointError(f"{layer.name}.input_scale is no positive number.")
    return _INT8_STATIC, float(step), ""


def _scheme(layer: Layer) -> Mapping[str, Any] | None:
    """The config group of a layer: one that names it, or matches its name, or its class."""
    groups = layer.config.get("config_groups") or {}

    def names(target: str) -> bool:
        return target == layer.name

    def matches(target: str) -> bool:
        return target.startswith("re:") and re.match(target[3:], layer.name) is not None

    def is_class(target: str) -> bool:
        return target == "Linear"

    for fits in (names, matches, is_class):
        for group in groups.values():
            if any(fits(str(target)) for target in group.get("targets", ())):
                found: Mapping[str, Any] = group
                return found
    return None


def _describe(
    recipe: Recipe, model: nn.Module, layouts: Mapping[str, int], left: Mapping[str, str]
) -> None:
    from sparsecc.inspection import versions

    recipe.versions = {k: v for k, v in versions().items() if k in ("sparsecc", "torch")}
    recipe.about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layouts": dict(layouts),
        "left": dict(left),
    }
    if left:
        site, why = next(iter(left.items()))
        log.warning(
            "%d of %d quantized layers stay floating-point products: %s (%s)%s",
            len(left),
            len(left) + len(recipe.sites),
            site,
            why,
            ", …" if len(left) > 1 else "",
        )
