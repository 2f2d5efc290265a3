"""Quantized checkpoints: what stays a floating-point product, and what is an error."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import packed_layers as packed
import pytest
import torch
from packed_layers import (
    AWQ,
    EACH_TOKEN,
    FIXED,
    GPTQ,
    INNER,
    LAYERS,
    SITES,
    D,
    Model,
    X,
    checkpoint,
    fresh,
    scheme,
)
from support import error, run

from sparsecc import load_quantized
from sparsecc.errors import CheckpointError, RecipeError

# ---- left alone -----------------------------------------------------------------------------------------


def test_groups_out_of_order_stay_dense() -> None:
    """desc_act: the weights are exact, and the product is in floating point."""
    generator = torch.Generator().manual_seed(0)
    index = (torch.randperm(INNER, generator=generator) // 32).to(torch.int32)
    tensors, layers = checkpoint(packed.gptq)
    name = "model.mlp.down_proj"
    layers[name] = packed.gptq(*LAYERS["down_proj"], 5, 1, index)
    tensors |= {f"{name}.{suffix}": value for suffix, value in layers[name].tensors.items()}
    model = fresh()
    recipe = load_quantized(model, tensors, GPTQ)
    assert list(recipe.about["left"]) == [f"{name}.weight"]
    assert "desc_act" in recipe.about["left"][f"{name}.weight"]
    assert set(recipe.sites) == set(SITES[:2])
    for each, layer in layers.items():
        assert torch.equal(model.get_parameter(f"{each}.weight"), layer.weight.float())
    with torch.no_grad():
        result, _ = run(model, X, recipe=recipe)
        assert error(result, copy.deepcopy(model).double()(X.double())) < 1e-5


def test_what_no_format_means_stays_dense() -> None:
    """Float activations under int8, or ones with zeros; groups of 16; int8 with zeros; scales beyond fp16."""
    reads = {**EACH_TOKEN, "symmetric": False}
    int8, _ = checkpoint(packed.int8)
    with_zeros = {
        **int8,
        "model.mlp.up_proj.weight_zero_point": torch.ones(INNER, 1).to(torch.int8),
    }
    small, _ = checkpoint(packed.packed4, 4)  # groups of 32 and 16
    huge, _ = checkpoint(packed.packed4)
    huge["model.mlp.up_proj.weight_scale"] = torch.full((INNER, 4), 1e6).bfloat16()
    one = {"model.mlp.up_proj.weight"}
    for tensors, config, left, words in (
        (int8, scheme(None), set(SITES), "floating activations"),
        (int8, scheme(reads), set(SITES), "not symmetric"),
        (with_zeros, scheme(EACH_TOKEN), one, "with zeros"),
        (small, scheme(None), {SITES[2]}, "groups of 16"),
        (huge, scheme(None), one, "do not hold"),
    ):
        recipe = load_quantized(fresh(), tensors, config)
        assert set(recipe.about["left"]) == left
        assert set(recipe.sites) == set(SITES) - left
        assert all(words in why for why in recipe.about["left"].values())


# ---- errors ----------------------------------------------------------------------------------------------

UP = "model.mlp.up_proj"


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: value})


BROKEN: dict[str, tuple[Any, Any, Any, str]] = {
    "no scales": (packed.awq, AWQ, drop(f"{UP}.scales"), rf"{UP}\.scales is missing"),
    "no zeros": (packed.awq, AWQ, drop(f"{UP}.qzeros"), rf"no {UP}\.qzeros"),
    "no norm": (packed.awq, AWQ, drop("model.norm.weight"), r"no model\.norm\.weight"),
    "no bias": (packed.awq, AWQ, drop(f"{UP}.bias"), rf"no {UP}\.bias"),
    "shape": (
        packed.awq,
        AWQ,
        put(f"{UP}.scales", torch.ones(4, 63).half()),
        rf"{UP}\.scales is \[4, 63\], not \[4, 64\]",
    ),
    "dtype": (
        packed.awq,
        AWQ,
        put(f"{UP}.scales", torch.ones(4, INNER).int()),
        rf"{UP}\.scales is torch.int32",
    ),
    "not finite": (
        packed.awq,
        AWQ,
        put(f"{UP}.scales", torch.full((4, INNER), torch.inf).half()),
        rf"{UP}\.scales has a NaN",
    ),
    "8 bits": (
        packed.awq,
        AWQ,
        put(f"{UP}.qweight", torch.zeros(D, INNER // 4, dtype=torch.int32)),
        rf"{UP}\.qweight is torch.int32 \[128, 16\]: of 4 bits",
    ),
    "float8": (
        packed.int8,
        scheme(EACH_TOKEN),
        put(f"{UP}.weight", torch.zeros(INNER, D).to(torch.float8_e4m3fn)),
        rf"{UP}\.weight is torch.float8_e4m3fn",
    ),
    "unknown tensor": (
        packed.awq,
        AWQ,
        put("model.extra", torch.ones(1)),
        r"has model\.extra, and the model does not",
    ),
    "unknown module": (
        packed.awq,
        AWQ,
        put("model.mlp.other.qweight", torch.zeros(D, 8, dtype=torch.int32)),
        r"quantizes model\.mlp\.other, and the model has no such",
    ),
    "not linear": (
        packed.awq,
        AWQ,
        put("model.norm.qweight", torch.zeros(D, 8, dtype=torch.int32)),
        r"model\.norm, and the model has a RMSNorm",
    ),
    "another layout": (packed.gptq, AWQ, lambda t: None, r"laid out as 'gptq'"),
    "another version": (packed.awq, {**AWQ, "version": "gemv"}, lambda t: None, "not 'gemv'"),
    "gptq unnamed": (packed.gptq, {}, lambda t: None, "checkpoint_format"),
    "zero of 16": (
        packed.gptq,
        GPTQ,
        put(f"{UP}.qzeros", torch.full((4, INNER // 8), -1, dtype=torch.int32)),
        rf"{UP}\.qzeros holds 15",
    ),
    "group": (
        packed.gptq,
        GPTQ,
        put(f"{UP}.g_idx", torch.full((D,), 4, dtype=torch.int32)),
        rf"{UP}\.g_idx names groups beyond the 4",
    ),
    "int8 unnamed": (packed.int8, {}, lambda t: None, "no config group"),
    "other targets": (packed.int8, scheme(EACH_TOKEN, "re:x"), lambda t: None, "no config group"),
    "no step": (packed.int8, scheme(FIXED), lambda t: None, r"no model\..*\.input_scale"),
    "shape of packed": (
        packed.packed4,
        scheme(None),
        put(f"{UP}.weight_shape", torch.tensor([1, 2])),
        rf"{UP}\.weight_shape is \[1, 2\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_name_the_tensor(name: str) -> None:
    make, config, breaks, words = BROKEN[name]
    tensors, _ = checkpoint(make)
    breaks(tensors)
    with pytest.raises(CheckpointError, match=words):
        load_quantized(fresh(), tensors, config)


def test_more_errors(tmp_path: pathlib.Path) -> None:
    assert issubclass(CheckpointError, RecipeError)
    tensors, _ = checkpoint(packed.awq)
    load_quantized(fresh(), {**tensors, "model.extra": X}, AWQ, ignore=["*.extra"])
    with pytest.raises(CheckpointError, match="no quantized layer"):
        load_quantized(fresh(), fresh().state_dict(), AWQ)
    with pytest.raises(CheckpointError, match="meta device"), torch.device("meta"):
        load_quantized(Model(), tensors, AWQ)
    with pytest.raises(CheckpointError, match=r"has no \.safetensors"):
        load_quantized(fresh(), tmp_path)
    with pytest.raises(CheckpointError, match="neither a directory nor a file"):
        load_quantized(fresh(), tmp_path / "none")
    (tmp_path / "m.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_quantized(fresh(), tmp_path)
