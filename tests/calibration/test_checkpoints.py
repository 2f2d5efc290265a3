"""Quantized checkpoints: weights, the codes that kernels get, what is left alone, and what is an error."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable
from functools import cache
from typing import Any

import packed_layers as packed
import pytest
import torch
from support import error, randomise, run
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc import load_quantized
from sparsecc.errors import CheckpointError, RecipeError
from sparsecc.hoist import Hoisted
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats

D, INNER = 128, 64
X = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
LAYERS = {"gate_proj": (INNER, D), "up_proj": (INNER, D), "down_proj": (D, INNER)}
SITES = [f"model.mlp.{name}.weight" for name in LAYERS]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
LLM_AWQ = {"w_bit": 4, "q_group_size": 32}


def scheme(reads: dict[str, Any] | None, target: str = "Linear") -> dict[str, Any]:
    groups = {"group_0": {"targets": [target], "input_activations": reads}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


EACH_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
FIXED = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, INNER, bias=False)
        self.up_proj = nn.Linear(D, INNER)
        self.down_proj = nn.Linear(INNER, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.norm, self.mlp = nn.RMSNorm(D), nn.RMSNorm(D), MLP()


class Model(nn.Module):
    """Named as in transformers; the head is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Body(), nn.Linear(D, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.model.mlp(self.model.input_layernorm(x))
        return self.lm_head(self.model.norm(x))


@cache
def made(make: Callable[..., packed.Packed], *args: Any) -> packed.Packed:
    return make(*args)


def checkpoint(
    make: Callable[..., packed.Packed], *args: Any
) -> tuple[dict[str, torch.Tensor], dict[str, packed.Packed]]:
    """Every linear layer of the body packed, everything else as in a model with other weights."""
    layers = {
        f"model.mlp.{name}": made(make, n, k, seed, *args)
        for seed, (name, (n, k)) in enumerate(LAYERS.items())
    }
    source = randomise(Model(), 7).state_dict()
    tensors = {n: v for n, v in source.items() if n not in SITES}
    for name, layer in layers.items():
        tensors |= {f"{name}.{suffix}": value for suffix, value in layer.tensors.items()}
    return tensors, layers


def fresh(dtype: torch.dtype = torch.float32) -> nn.Module:
    return randomise(Model()).eval().to(dtype)


def meant(model: nn.Module, recipe: Recipe) -> nn.Module:
    """``model`` in fp64 with every site as its format means it, on the recipe's grid."""
    twin = copy.deepcopy(model).double()
    for site, form in recipe.sites.items():
        layer = twin.get_submodule(site.removesuffix(".weight"))
        step = recipe.activations.get(site, 1.0)
        scale, zero = recipe.grids[site]
        kept = formats.quantize_on(layer.weight.detach() * step, form, scale.double() * step, zero)

        def forward(x, form=form, kept=kept, bias=layer.bias, step=step):
            y = formats.product(x / step, form, kept)
            return y if bias is None else y + bias

        layer.forward = forward  # type: ignore[method-assign]
    return twin


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is made of weights for the compiled graphs."""
    seen: list[torch.Tensor] = []
    real = Hoisted.evaluate

    def evaluate(self: Hoisted, sources: Any) -> list[torch.Tensor]:
        made = real(self, sources)
        seen.extend(made)
        return made

    monkeypatch.setattr(Hoisted, "evaluate", evaluate)
    return seen


def has(tensors: list[torch.Tensor], wanted: torch.Tensor) -> bool:
    return any(t.dtype is wanted.dtype and torch.equal(t, wanted) for t in tensors)


KINDS: dict[str, tuple[Callable[..., packed.Packed], tuple[Any, ...], Any, str]] = {
    "awq": (packed.awq, (), AWQ, "int4g32z"),
    "llm-awq": (packed.llm_awq, (), LLM_AWQ, "int4g32z"),
    "gptq": (packed.gptq, (), GPTQ, "int4g32z"),
    "gptq-v2": (packed.gptq, (0,), V2, "int4g32z"),
    "packed": (packed.packed4, (), scheme(None), "int4g32z"),
    "packed-each-row": (packed.packed4, (1, False), scheme(EACH_TOKEN), "int4g{}a8"),
    "int8": (packed.int8, (), scheme(EACH_TOKEN), "int8"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_codes_are_the_checkpoints(kind: str, folded: list[torch.Tensor]) -> None:
    make, args, config, form = KINDS[kind]
    tensors, layers = checkpoint(make, *args)
    model = fresh()
    recipe = load_quantized(model, tensors, config)
    for name, layer in layers.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), layer.weight.float())
        # One group of a row is the same as several with one scale.
        assert recipe.sites[f"{name}.weight"] == form.format(min(128, layer.q.shape[1]))
    assert recipe.about["left"] == {}
    for name in tensors.keys() & dict(model.named_parameters()).keys() - set(SITES):
        assert torch.equal(model.get_parameter(name), tensors[name])
    codegen = {"packed": "cpp", "int8": "cpp"}.get(kind, "aten")
    with torch.no_grad():
        result, report = run(model, X, recipe=recipe, codegen=codegen, verify="each")
        assert report.verified
        exact = meant(model, recipe)(X.double())
    notes = ", ".join(m.note for m in report["quantize-linear"].matches)
    assert report["quantize-linear"].refused == 0
    assert {k.chosen for k in report.graphs[0].kernels} == {codegen}
    assert all(f"{site}: " in notes for site in SITES)
    for layer in layers.values():
        if form == "int8":
            wanted = [layer.q.to(torch.int8), layer.scale[:, 0]]
        else:
            group = formats.Format.of(recipe.sites[SITES[0]]).group if "g32" not in form else 32
            group = min(group, layer.q.shape[1])
            each = layer.q.shape[1] // layer.scale.shape[1] // group
            wanted = [formats.pack(layer.q, group), layer.scale.half().repeat_interleave(each, 1)]
            wanted += [layer.zero.half()] if "z" in form else []
        assert all(has(folded, part) for part in wanted)
    # An activation that lies between two steps may be rounded to the other one.
    assert error(result, exact) < (5e-3 if "a8" in form or form == "int8" else 1e-5)
    # The parameters mean the same, to what fp16 loses of a scaled zero, and to rounded activations.
    plain = copy.deepcopy(model).double()(X.double())
    bound = {"llm-awq": 1e-3, "packed-each-row": 0.05, "int8": 0.05}.get(kind, 1e-12)
    assert error(exact, plain) < bound


def test_a_fixed_step_of_the_input() -> None:
    tensors, layers = checkpoint(packed.int8)
    model = fresh()
    load_quantized(model, tensors, scheme(EACH_TOKEN))
    with torch.no_grad():
        y = model.model.input_layernorm(X)
        inner = F.silu(model.model.mlp.gate_proj(y)) * model.model.mlp.up_proj(y)
    for name, value in (("gate_proj", y), ("up_proj", y), ("down_proj", inner)):
        tensors[f"model.mlp.{name}.input_scale"] = (value.abs().max() / 127).reshape(1)
    recipe = load_quantized(model, tensors, scheme(FIXED))
    assert set(recipe.sites.values()) == {"int8s"}
    baked = sparsecc.bake(model, (X,), options={"recipe": recipe})
    assert all(
        has(list(baked.state_dict().values()), la.q.to(torch.int8)) for la in layers.values()
    )
    with torch.no_grad():
        result, report = run(model, X, recipe=recipe)
        exact, plain = meant(model, recipe)(X.double()), copy.deepcopy(model).double()(X.double())
    assert report["quantize-linear"].applied == 3
    assert error(result, exact) < 5e-3
    assert error(exact, plain) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["awq", "int8"])
def test_narrow_weights_hold_the_codes(kind: str, dtype: torch.dtype) -> None:
    make, args, config, _ = KINDS[kind]
    tensors, layers = checkpoint(make, *args)
    model = fresh(dtype)
    recipe = load_quantized(model, tensors, config)
    assert set(recipe.sites) == set(SITES)
    for name, layer in layers.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), layer.weight.to(dtype))
        form = recipe.sites[f"{name}.weight"]
        kept = formats.quantize_on(
            model.get_parameter(f"{name}.weight").detach(), form, *recipe.grids[f"{name}.weight"]
        )
        codes = kept[0] if kind == "int8" else formats.unpack(kept[0], 32)
        assert torch.equal(codes, layer.q.to(codes.dtype))


def test_nothing_is_folded_into_given_weights() -> None:
    """The norm would move into both of its readers; with another recipe it does."""
    tensors, _ = checkpoint(packed.awq)
    model = fresh()
    recipe = load_quantized(model, tensors, AWQ)
    with torch.no_grad():
        _, report = run(model, X, recipe=recipe)
        _, other = run(model, X, recipe=Recipe("plain", dict(recipe.sites), dict(recipe.shapes)))
    assert other["fold-norm-affine"].applied == 2
    assert report["fold-norm-affine"].applied == 1  # of the head
    assert [r.code for r in report["fold-norm-affine"].refusals] == ["given"]
    assert report["quantize-linear"].applied == 3


def test_scales_are_not_migrated_at_given_weights() -> None:
    tensors, _ = checkpoint(packed.awq)
    model = fresh()
    recipe = load_quantized(model, tensors, AWQ)
    link = f"norm-linear: {', '.join(SITES[:2])}"
    recipe.scales[link] = torch.full((D,), 2.0)
    with torch.no_grad():
        _, report = run(model, X, recipe=recipe)
        plain = Recipe("plain", dict(recipe.sites), dict(recipe.shapes), dict(recipe.scales))
        _, other = run(model, X, recipe=plain)
    assert other["migrate-channels"].applied == 1
    assert report["migrate-channels"].applied == 0
    assert [r.code for r in report["quantize-linear"].refusals] == ["unmigrated"] * 2


def test_a_weight_that_the_model_computes_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.by = nn.Linear(D, INNER), nn.Parameter(torch.rand(D) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.layer.weight * self.by, self.layer.bias)

    model = randomise(Scaled()).eval()
    recipe = Recipe("given", {"layer.weight": "int4g128"}, {"layer.weight": [INNER, D]})
    recipe.grids["layer.weight"] = (torch.full((INNER, 1), 0.01).half(), None)
    with torch.no_grad():
        result, report = run(model, X, recipe=recipe)
        assert error(result, copy.deepcopy(model).double()(X.double())) < 1e-5
    assert [r.code for r in report["quantize-linear"].refusals] == ["given"]


def test_a_grid_of_another_shape_is_an_error() -> None:
    tensors, _ = checkpoint(packed.awq)
    model = fresh()
    recipe = load_quantized(model, tensors, AWQ)
    scale, zero = recipe.grids[SITES[0]]
    for grid in ((scale, None), (scale[:, :1], zero[:, :1])):
        recipe.grids[SITES[0]] = grid
        with torch.no_grad(), pytest.raises(Exception, match=r"the grid of model\.mlp\.gate_proj"):
            run(model, X, recipe=recipe)
    recipe.grids[SITES[0]] = (scale, zero)
    recipe.clips[SITES[0]] = torch.ones(INNER, 1)
    with torch.no_grad(), pytest.raises(Exception, match=r"a grid and a clip"):
        run(model, X, recipe=recipe)


def test_fresh_when_a_weight_changes() -> None:
    """Other weights are rounded on the same grid."""
    tensors, _ = checkpoint(packed.packed4)
    model = fresh()
    recipe = load_quantized(model, tensors, scheme(None))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsecc", options={"recipe": recipe, "lower": "eager"})
    with torch.no_grad():
        before = fast(X)
        model.model.mlp.down_proj.weight[3] *= -1
        after = fast(X)
        assert error(after, meant(model, recipe)(X.double())) < 1e-5
    assert error(after, before) > 1e-3


def test_saved_and_loaded(tmp_path: pathlib.Path) -> None:
    for kind in ("awq", "int8"):
        make, args, config, _ = KINDS[kind]
        tensors, _ = checkpoint(make, *args)
        model = fresh()
        recipe = load_quantized(model, tensors, config)
        recipe.save(tmp_path / "r.json")
        loaded = Recipe.load(tmp_path / "r.json")
        assert loaded.grids.keys() == recipe.grids.keys()
        for site, (scale, zero) in recipe.grids.items():
            assert torch.equal(loaded.grids[site][0], scale)
            assert (loaded.grids[site][1] is None) == (zero is None)
        with torch.no_grad():
            one, _ = run(model, X, recipe=recipe)
            two, _ = run(model, X, recipe=str(tmp_path / "r.json"))
        assert torch.equal(one, two)


@pytest.mark.parametrize("shards", [1, 2])
def test_directories(shards: int, tmp_path: pathlib.Path) -> None:
    from safetensors.torch import save_file

    tensors, layers = checkpoint(packed.awq)
    names = sorted(tensors)
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        held = {n: tensors[n].contiguous() for n in names if where[n] == file}
        save_file(held, str(tmp_path / file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": AWQ}))
    model = fresh()
    recipe = load_quantized(model, tmp_path)
    assert list(recipe.about["layouts"].values()) == [3]
    for name, layer in layers.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), layer.weight.float())
    if shards > 1:
        (tmp_path / "model-1.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-1\.safetensors cannot be read"):
            load_quantized(model, tmp_path)


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
