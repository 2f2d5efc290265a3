"""BatchNorm networks, randomised: how many BatchNorms are left and why, and the proof in fp32 (some: in bf16).

timm's families at small sizes, and by hand those that it lacks. The statistics are those of random images.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.zoo import randomise_network
from support import left
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sparsecc
from sparsecc.cli.timm_models import import_timm

pytestmark = [pytest.mark.models, pytest.mark.slow]

FOLD, PUSH, MERGE = "fold-batchnorm", "push-batchnorm", "merge-branches"


# ---- networks that timm does not have ------------------------------------------------------------


def conv(inner: int, outer: int, kernel: int, groups: int = 1, act: bool = True) -> nn.Sequential:
    layer = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outer), nn.ReLU() if act else nn.Identity())


class Shuffle(nn.Module):
    """A ShuffleNet V2 unit: half of the channels pass by, then the halves are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv(half, half, 1), conv(half, half, 3, half, act=False), conv(half, half, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passed, worked = x.chunk(2, 1)
        x = torch.cat((passed, self.branch(worked)), 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class LargeKernel(nn.Module):
    """RepLKNet's two blocks: a large depthwise kernel beside a small one, and the feed-forward one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.enter, self.leave = conv(width, width, 1), conv(width, width, 1, act=False)
        self.large = conv(width, width, 13, width, act=False)
        self.small = conv(width, width, 5, width, act=False)
        self.up, self.down = (
            conv(width, 2 * width, 1, act=False),
            conv(2 * width, width, 1, act=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(self.norm1(x))
        x = x + self.leave((self.large(y) + self.small(y)).relu())
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def headed(width: int, *body: nn.Module, head: nn.Module | None = None) -> nn.Module:
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), head or nn.Linear(width, 10))
    return nn.Sequential(conv(3, width, 3), *body, *pooled)


def shufflenet() -> nn.Module:
    return headed(16, Shuffle(16), Shuffle(16))


def replknet() -> nn.Module:
    return headed(16, LargeKernel(16), LargeKernel(16))


def moco() -> nn.Module:
    """A contrastive learner's projector: the last BatchNorm has neither scale nor shift."""
    projector = nn.Sequential(
        nn.Linear(16, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 8, bias=False),
        nn.BatchNorm1d(8, affine=False),
    )
    return headed(16, conv(16, 16, 3), head=projector)


def convmixer() -> nn.Module:
    return import_timm().models.convmixer.ConvMixer(16, 3, kernel_size=5, num_classes=10)


def mobileone() -> nn.Module:
    """The first blocks of mobileone_s0."""
    byobnet = import_timm().models.byobnet
    config = byobnet.model_cfgs["mobileone_s0"]
    short = [stage[:4] for stage in config.blocks[:2]]  # a block: depthwise and pointwise
    return byobnet.ByobNet(dataclasses.replace(config, blocks=short), num_classes=10)


# ---- the table -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """A network, its image size, and what is expected.

    ``codes`` are the refusals of fold-batchnorm and push-batchnorm, given where BatchNorms are ``left``.
    """

    network: str | Callable[[], nn.Module]
    fold: int
    push: int = 0
    merge: int = 0
    left: int = 0
    codes: tuple[dict[str, int], dict[str, int]] | None = None
    size: int = 64
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if callable(self.network):
            return self.network()
        model: nn.Module = import_timm().create_model(self.network, num_classes=10, **self.options)
        return model


# Those left stand before an activation, and behind a sum or a concatenation that others read too.
FAMILIES = {
    "ResNet": Family("resnet18", fold=20),
    "ResNet, bottleneck": Family("resnet50", fold=17, options={"layers": (1, 1, 1, 1)}),
    "ResNet, pre-activation": Family(
        "resnetv2_18",
        fold=8,
        left=9,
        codes=({"producer": 3, "fan-out": 6}, {"reader": 9}),
    ),
    "SE-ResNeXt": Family("seresnext26ts", fold=31),
    "Res2Net": Family("res2net50_14w_8s", fold=41, options={"layers": (1, 1, 1, 1)}),
    "RegNetX": Family("regnetx_002", fold=44),
    "RegNetY": Family("regnety_002", fold=44),
    "CSPDarkNet": Family("cs3darknet_focus_s", fold=31),
    "DLA": Family("dla46x_c", fold=48),
    "HRNet": Family("hrnet_w18_small", fold=91),
    "VoVNet": Family("ese_vovnet19b_slim", fold=19),
    "SelecSLS": Family("selecsls42", fold=41),
    "Xception": Family("legacy_xception", fold=40),
    "DenseNet": Family(
        "densenet121",
        fold=9,
        left=12,
        codes=({"producer": 3, "fan-out": 9}, {"reader": 12}),
        options={"block_config": (2, 2, 2, 2)},
    ),
    "DPN": Family(
        "dpn48b",
        fold=11,
        left=10,
        codes=({"producer": 10}, {"reader": 10}),
        options={"k_sec": (1, 1, 2, 1)},
    ),
    "MobileNetV2": Family("mobilenetv2_035", fold=52),
    "MobileNetV3": Family("mobilenetv3_small_050", fold=34),
    "MnasNet": Family("mnasnet_small", fold=46),
    "EfficientNet": Family("efficientnet_lite0", fold=49),
    "ReXNet": Family("rexnet_100", fold=39, options={"depth_mult": 0.5}),
    "GhostNet": Family("ghostnet_050", fold=80),
    "ShuffleNet V2": Family(shufflenet, fold=7, size=32),
    "RepVGG": Family("repvgg_a0", fold=44, merge=22),
    "MobileOne": Family(mobileone, fold=38, merge=9),
    "RepLKNet": Family(replknet, fold=13, push=4, merge=2, size=32),
    # Its mixer is x + s·(conv(x) + BN(x) − BN(x)).
    "FastViT": Family("fastvit_t8", fold=28, merge=14, options={"layers": (1, 1, 1, 1)}),
    # BatchNorm between an activation and a sum; the last one goes into the classifier.
    "ConvMixer": Family(
        convmixer,
        fold=0,
        push=1,
        left=6,
        codes=({"producer": 7}, {"reader": 6}),
        size=28,
    ),
    # The two classifiers behind their BatchNorms are averaged, and become one.
    "LeViT": Family(
        "levit_128s",
        fold=26,
        push=2,
        merge=1,
        size=224,
        options={"embed_dim": (64, 64, 64), "depth": (1, 1, 1)},
    ),
    "EfficientFormer": Family(
        "efficientformer_l1",
        fold=13,
        merge=1,
        size=224,
        options={"depths": (1, 1, 1, 2), "num_vit": 1},
    ),
    "XCiT": Family(  # between GELU and a convolution that pads with zeros
        "xcit_nano_12_p8_224",
        fold=3,
        left=2,
        codes=({"producer": 2}, {"border": 2}),
        options={"depth": 2},
    ),
    "TinyViT": Family("tiny_vit_5m_224", fold=18, options={"depths": (1, 1, 2, 1)}),
    "MoCo projector": Family(moco, fold=4, size=32),
    # It standardizes weights with the operator.
    "NFNet (none)": Family("test_nfnet", fold=0, left=25, codes=({}, {})),
}


def images(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def measured(model: nn.Module, size: int) -> nn.Module:
    """Random weights, and in every BatchNorm the statistics that its input has: deep networks stay finite."""
    randomise_network(model).eval()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = 1.0
            norm.train()
    with torch.no_grad():
        model(images(16, size, seed=2))
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_left_and_proved(name: str) -> None:
    family = FAMILIES[name]
    model, x = measured(family.build(), family.size), images(2, family.size, seed=1)
    assert left(model, x) == family.left
    # Half precision for every third: what it rounds does not depend on the family.
    half = list(FAMILIES).index(name) % 3 == 0
    for dtype in (torch.float32, torch.bfloat16)[: 1 + half]:
        torch._dynamo.reset()
        options = {"strict": True, "verify": "final"}
        report = sparsecc.verify(model.to(dtype), x.to(dtype), options=options)
        applied = tuple(report[n].applied for n in (FOLD, PUSH, MERGE))
        assert applied == (family.fold, family.push, family.merge)
        if family.left:
            codes = [collections.Counter(r.code for r in report[n].refusals) for n in (FOLD, PUSH)]
            assert tuple(codes) == family.codes
        assert report.graph_breaks == []
        assert report.verified == any(applied)
        assert all(v.algebra < 1e-11 for v in report.verdicts)
