"""The feed-forward networks of transformers' models: what the two views make of their spellings."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from equivalent import canonical
from support import capture, randomise
from torch import nn
from torch.nn import functional as F

from sparsecc.passes.analysis.ffn import find_ffns
from sparsecc.passes.analysis.live import find_live
from sparsecc.passes.base import Analyses
from sparsecc.passes.ffn.skip_zeros import words

D, WIDE = 24, 56
SIZES = {"hidden_size": D, "intermediate_size": WIDE, "num_attention_heads": 2}
T5 = {"d_model": D, "d_ff": WIDE}
# family -> class, options of the configuration; the kind of the network; what makes zeros.
MODELS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "llama": ("LlamaMLP", SIZES, "gated", []),
    "llama, relu": ("LlamaMLP", {**SIZES, "hidden_act": "relu"}, "gated", ["relu(p0) | a * p1"]),
    "gemma": ("GemmaMLP", SIZES, "gated", []),
    "gemma3n": (
        "Gemma3nTextMLP",
        {**SIZES, "num_hidden_layers": 1, "activation_sparsity_pattern": [0.95]},
        "",
        ["p0 | gaussian 1.6448535919189453 | gelu_tanh(a) | a * p1"],
    ),
    "phi": ("PhiMLP", SIZES, "plain", []),
    "phi3": ("Phi3MLP", SIZES, "fused", []),
    "falcon": ("FalconMLP", {"hidden_size": D, "num_attention_heads": 2}, "plain", []),
    "t5": ("T5DenseActDense", T5, "plain", ["relu(p0) | a"]),
    "t5, gated": ("T5DenseGatedActDense", {**T5, "feed_forward_proj": "gated-gelu"}, "gated", []),
    "gpt2": ("GPT2MLP", {"n_embd": D}, "plain", []),
    "gpt_neox": ("GPTNeoXMLP", SIZES, "plain", []),
    "nemotron": ("NemotronMLP", SIZES, "", ["(relu(p0) * relu(p0)) | a"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_of_transformers(name: str) -> None:
    layer, options, kind, zeros = MODELS[name]
    family = name.partition(",")[0]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    names = [
        n
        for n in dir(configs)
        if n.endswith("Config") and n.lower().startswith(family.replace("_", ""))
    ]
    config_of = next((n for n in names if n.endswith("TextConfig")), min(names, key=len))
    config = getattr(configs, config_of)(**options)
    more = {"gemma3n": (0,)}.get(family, ())
    first = (WIDE, config) if family == "gpt2" else (config, *more)
    model = randomise(getattr(module, layer)(*first)).eval()
    check(model, torch.randn(1, 2, D), [kind] if kind else [], zeros)


class Experts(nn.Module):
    """Two experts of one stack of weights, each for its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.ups = (nn.Parameter(torch.randn(2, WIDE, D)) for _ in range(2))
        self.downs = nn.Parameter(torch.randn(2, D, WIDE))

    def forward(self, x):
        parts = []
        for i in range(2):
            own = x[:, i]
            h = F.relu(F.linear(own, self.gates[i])) * F.linear(own, self.ups[i])
            parts.append(F.linear(h, self.downs[i]))
        return torch.stack(parts, 1)


def test_experts() -> None:
    check(Experts().eval(), torch.randn(1, 2, D), ["gated"] * 2, ["relu(p0) | a * p1"] * 2)


def check(model: nn.Module, x: torch.Tensor, kinds: list[str], zeros: list[str]) -> None:
    with torch.no_grad():
        program = capture(model, x)
    canonical(program)
    analyses = Analyses(program)
    assert [ffn.kind for ffn in analyses.get(find_ffns)] == kinds
    assert [words(live) for live in analyses.get(find_live)] == zeros
