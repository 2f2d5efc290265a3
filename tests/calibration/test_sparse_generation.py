"""``generate`` of a small Llama under recipes of sparsity: what it decodes is the masked model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import agree, randomise
from torch import nn
from torch.nn import functional as F

import sparsecc

transformers = pytest.importorskip("transformers", reason="the `models` extra is not installed")

NEW = 4


def llama(act: str = "silu") -> Any:
    config = transformers.LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        hidden_act=act,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model)
    return model


PROMPT = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": torch.randint(3, 90, (4, 16))} for _ in range(2)]


def generated(model: Any, **options: Any) -> torch.Tensor:
    """The logits of every new token."""
    found = model.generate(
        PROMPT,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(found.logits)


class Masked(nn.Module):
    """An MLP that leaves neurons out by hand."""

    def __init__(self, mlp: Any, recipe: sparsecc.Recipe, site: str) -> None:
        super().__init__()
        self.mlp, self.given = mlp, recipe.sparsity[site]
        self.t, self.core = recipe.thresholds.get(site), recipe.neurons.get(site)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.silu(self.mlp.gate_proj(x))
        u = self.mlp.up_proj(x)
        if self.given["law"] == "activation":
            return self.mlp.down_proj(torch.where(a.abs() > self.t, a, 0.0) * u)
        h = a * u
        if x.shape[1] > 1:
            counts = torch.zeros(h.shape[-1])
            for row in h.flatten(0, 1):
                count = -(-2 * int((row > 0).sum()) // 5)  # ⌈0.4 n⌉
                counts[row.argsort(descending=True, stable=True)[:count]] += 1
            best = counts.argsort(descending=True, stable=True)[: len(self.core)]
            self.live = torch.zeros(h.shape[-1]).index_fill(0, best, 1.0)
            return self.mlp.down_proj(h)
        return self.mlp.down_proj(h * self.live)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", ["cats", "coreinfer"])
def test_generate(method: str, cache: str) -> None:
    sparsecc.reset_cores()
    model = llama()
    recipe = sparsecc.sparsify(model, BATCHES, method)
    assert len(recipe.sparsity) == 2
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    report = sparsecc.Report()
    given = {"recipe": recipe, "lower": "eager", "report": report, "strict": True}
    dense = generated(model, **options)
    forward = model.forward
    with torch.no_grad():
        model.forward = torch.compile(forward, backend="sparsecc", options=given)
        got = generated(model, disable_compile=True, **options)
        again = generated(model, disable_compile=True, **options)
        model.forward = forward
        for i, layer in enumerate(model.model.layers):
            layer.mlp = Masked(layer.mlp, recipe, f"model.layers.{i}.mlp.down_proj.weight")
        expected = generated(model, disable_compile=True, **options)
    assert all(graph.passes["sparsify-ffn"].applied == 2 for graph in report.graphs)
    assert len(report.graphs) >= 2  # the prompt, and a token
    agree(got, expected)
    assert torch.equal(got, again)
    first, rest = (dense - expected).abs().flatten(1).amax(1).split([1, NEW - 1])
    assert float(rest.min()) > 1e-3
    assert (float(first) > 1e-3) == (method == "cats")  # CoreInfer reads the prompt whole


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_zeros_are_skipped_exactly(cache: str) -> None:
    """The greedy tokens are eager's and Inductor's."""
    model, report = llama("relu"), sparsecc.Report()
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    given = {"passes": ["skip-zeros"], "codegen": "cpp", "report": report, "strict": True}
    eager, forward = generated(model, **options, disable_compile=True), model.forward
    with torch.no_grad():
        model.forward = torch.compile(forward, backend="sparsecc", options=given)
        got = generated(model, disable_compile=True, **options)
        torch._dynamo.reset()
        model.forward = torch.compile(forward)
        inductors = generated(model, disable_compile=True, **options)
    assert report["skip-zeros"].applied >= 2
    assert {k.chosen for graph in report.graphs for k in graph.kernels} == {"cpp"}
    assert torch.equal(got.argmax(-1), eager.argmax(-1))
    assert torch.equal(got.argmax(-1), inductors.argmax(-1))
    agree(got, eager)
