"""Latency of networks beside Inductor and Inductor with freezing, at batch 1 and 8.

timm's and transformers' architectures with random weights and random BatchNorm statistics: speed does not
depend on their values, as long as activations are ordinary numbers.

Prediction, written before measuring: Inductor without freezing keeps BatchNorm and reorders the weight of
every convolution at each call; with freezing it folds and packs. With BatchNorm folded and weights packed,
sparsecc should be level with freezing (0.98x to 1.02x) and 1.1x to 1.5x as fast as Inductor at batch 1; less
at batch 8, where the reordering is paid once for more work. Where branches merge (RepVGG, MobileOne) it
should be ahead of both: one convolution for three to five. Transformers: level; the weights of linear layers
are read once either way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from speed import VARIANTS, measure
from torch import nn

CONVOLUTIONAL = (
    "resnet18",
    "resnet50",
    "regnety_008",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "densenet121",
    "repvgg_a0",
    "mobileone_s1",
    "ghostnet_100",
    "levit_256",
)
TRANSFORMERS = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "bert", "gpt2")
BATCHES = (1, 8)


def randomised(network: nn.Module) -> nn.Module:
    """Weights as initialised, norms and statistics moved: activations stay ordinary."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            noise = torch.rand(tensor.shape, generator=generator)
            if "running_mean" in name:
                tensor.copy_(noise - 0.5)
            elif "running_var" in name or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(0.75 + 0.5 * noise)
    return network.eval()


def build(name: str, batch: int) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...], nn.Module]:
    """The function that is timed, its inputs, and the network."""
    torch.manual_seed(0)
    if name in ("bert", "gpt2"):
        import transformers

        config = {"bert": transformers.BertConfig, "gpt2": transformers.GPT2Config}[name]()
        network = randomised(transformers.AutoModel.from_config(config))
        tokens = torch.randint(0, 1000, (batch, 128))
        return lambda ids: network(ids).last_hidden_state, (tokens,), network
    from sparsecc.cli.timm_models import import_timm

    network = randomised(import_timm().create_model(name))
    return network, (torch.randn(batch, 3, 224, 224),), network


def run(limits: dict[str, float]) -> tuple[dict[str, Any], str]:
    data: dict[str, Any] = {}
    rows = [
        "| network | batch | eager | Inductor | freezing | sparsecc | floor | / Inductor | / better of both |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (*CONVOLUTIONAL, *TRANSFORMERS):
        for batch in BATCHES:
            torch._dynamo.reset()
            entry = data[f"{name}, batch {batch}"] = measure(lambda: build(name, batch), limits)  # noqa: B023
            entry["over_better"] = min(
                entry["sparsecc_over_inductor"], entry["sparsecc_over_freezing"]
            )
            cells = [f"{entry[k]['median_ms']:.1f} ms ±{entry[k]['spread']:.0%}" for k in VARIANTS]
            rows.append(
                f"| {name} | {batch} | {' | '.join(cells)} | {entry['floor_ms']:.1f} ms | "
                f"{entry['sparsecc_over_inductor']:.3f}x | {entry['over_better']:.3f}x |"
            )
            print(rows[-1], flush=True)
    ratios = [entry["over_better"] for entry in data.values()]
    mean = statistics.geometric_mean(ratios)
    rows.append(
        f"\nGeometric mean against the better of both: {mean:.3f}x; lowest {min(ratios):.3f}x."
    )
    return data, "\n".join(rows)
