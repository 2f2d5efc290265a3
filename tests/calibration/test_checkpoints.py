"""Quantized checkpoints: weights, the codes that kernels get, what is left alone, and what is an error."""

from __future__ import annotations

import copy
import json
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
    LLM_AWQ,
    SITES,
    V2,
    D,
    X,
    checkpoint,
    fresh,
    scheme,
)
from support import PreNorm, error, ids, randomise, run
from torch import nn
from torch.nn import functional as F

import sparsecc
from sparsecc import load_quantized
from sparsecc.errors import CheckpointError
from sparsecc.hoist import Hoisted
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats


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


@pytest.mark.parametrize(
    ("which", "folded_norms", "rms"), [("mix", 3, 5), ("up", 3, 5), ("out", 5, 4), ("head", 4, 5)]
)
def test_passes_around_given_weights(
    which: str, folded_norms: int, rms: int, folded: list[torch.Tensor]
) -> None:
    """A pre-LN model where readers or writers of the stream are given: others are rewritten, these are not."""
    model, tokens = randomise(PreNorm()).eval(), ids()
    recipe, generator = Recipe("given"), torch.Generator().manual_seed(0)
    codes = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and which in name:
            site, shape = f"{name}.weight", list(layer.weight.shape)
            q = torch.randint(-128, 128, shape, generator=generator)
            scale = 0.001 + 0.001 * torch.rand(shape[0], 1, generator=generator)
            layer.weight.data.copy_(q * scale.double())
            recipe.sites[site], recipe.shapes[site] = "int8", shape
            recipe.grids[site] = (scale, None)
            codes.append(q.to(torch.int8))
    with torch.no_grad():
        _, report = run(model, tokens, recipe=recipe, verify="each")
    assert report.verified
    assert report["quantize-linear"].applied == len(codes) > 0
    assert report["fold-norm-affine"].applied == folded_norms
    assert report["layernorm-to-rmsnorm"].applied == rms
    assert all(has(folded, q) for q in codes)


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
