"""Models with real weights, through Inductor: expected counts, fp64 proof, and the task's own metric.

The metric must not move in the digits that are printed (architecture §5: an exact rewrite is invisible).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import left, refusals

import sparsecc

pytestmark = [pytest.mark.models, pytest.mark.slow]

TO_RMS, AFFINE, SCALE = "layernorm-to-rmsnorm", "fold-norm-affine", "fold-layerscale"
FOLD, PUSH = "fold-batchnorm", "push-batchnorm"


def compare(
    forward: Callable[..., torch.Tensor],
    metric: Callable[[Any], Any],
    inputs: tuple[torch.Tensor, ...],
    expected: dict[str, tuple[int, int]],
) -> tuple[Any, Any]:
    """Metrics of the eager and the rewritten model; counts and proof are asserted."""
    report = sparsecc.Report()
    options = {"report": report, "verify": "final", "strict": True}
    fast = torch.compile(forward, backend="sparsecc", options=options)
    with torch.no_grad():
        fast(*inputs)
        assert {n: (report[n].applied, report[n].refused) for n in expected} == expected
        assert report.verified
        assert report.graph_breaks == []
        return metric(forward), metric(fast)


def test_vit_focus() -> None:
    """12 pre-LN layers with LayerScale: 24 factors and 25 norms; the last norm's affine is returned."""
    from zoo import vit_focus

    forward = vit_focus.as_forward(vit_focus.load_backbone())
    expected = {SCALE: (24, 0), AFFINE: (24, 1), TO_RMS: (25, 0)}
    before, after = compare(
        forward,
        lambda f: round(vit_focus.probe_accuracy(f, train=200, test=100, batch=25), 3),
        (vit_focus.digits(25)[0],),
        expected,
    )
    assert before == after
    assert before > 0.85


def test_vit_focus_with_its_decoder() -> None:
    """The decoder's 3 BatchNorms go into transposed convolutions; one of them reads the last norm."""
    from zoo import vit_focus

    before, after = compare(
        vit_focus.load(),
        vit_focus.focus_centres,
        (vit_focus.digits(10)[0],),
        {FOLD: (3, 0), SCALE: (24, 0), AFFINE: (24, 1), TO_RMS: (25, 0)},
    )
    assert before == after
    assert len(set(before)) == 10


def test_efficientnet_lite0() -> None:
    """49 BatchNorms, each behind a convolution: all are folded."""
    from zoo import efficientnet

    model = efficientnet.load()
    images = efficientnet.photos()[0][:10]
    assert left(model, images) == 0
    before, after = compare(
        efficientnet.as_forward(model), efficientnet.top1, (images,), {FOLD: (49, 0)}
    )
    assert before == after == (18, 20)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_crepe_normalizes_between_relu_and_max_pooling(size: str) -> None:
    """6 BatchNorms that no exact fold reaches: a ReLU before them, and the maximum behind them.

    Past the maximum only a positive scale may go, and signs are values of weights.
    """
    from zoo import crepe

    forward = crepe.as_forward(crepe.load(size))
    report = sparsecc.Report()
    # Its classifier is worth a kernel, which is not the matter here.
    options = {"report": report, "strict": True, "codegen": "aten"}
    fast = torch.compile(forward, backend="sparsecc", options=options)
    before, after = (round(crepe.pitch_error(f), 1) for f in (forward, fast))
    assert refusals(report, FOLD) == ["producer"] * 6
    assert refusals(report, PUSH) == ["reader"] * 6
    assert report.fallbacks == ["graph 0: no rewrite applied"]
    assert before == after
    assert before < 5


def test_whisper_tiny() -> None:
    """4 + 4 layers: 2*4+1 encoder and 3*4+1 decoder norms; the head is tied to the embedding."""
    from zoo import whisper_tiny

    forward = whisper_tiny.as_forward(whisper_tiny.load())
    features = whisper_tiny.features(whisper_tiny.clips()[0][0])
    tokens = torch.full((1, 64), 50256)
    before, after = compare(
        forward,
        whisper_tiny.word_error_rate,
        (features, tokens),
        {TO_RMS: (22, 0), AFFINE: (21, 1)},
    )
    assert before == after
    assert before[0] <= 4


def test_minilm_is_post_norm() -> None:
    """6 post-LN layers: nothing is legal, everything says why, the model goes to Inductor untouched."""
    from zoo import minilm

    model = minilm.load()
    tokens = minilm.tokenizer()(["A man plays a guitar."], return_tensors="pt")
    report = sparsecc.explain(model, **tokens)
    assert report[TO_RMS].applied == report[AFFINE].applied == 0
    codes = [r.code for r in report[TO_RMS].refusals]
    assert codes.count("post-norm") == 12
    assert codes.count("costs-more") == 1
    assert report.fallbacks == ["graph 0: no rewrite applied"]


def test_smollm2() -> None:
    """30 RMSNorm layers: 60 norms fold into q, k, v and gate, up; the last one meets a tied head."""
    from zoo import smollm2

    forward = smollm2.as_forward(smollm2.load())
    before, after = compare(
        forward,
        lambda f: round(smollm2.perplexity(f, tokens=1024, context=128), 2),
        (smollm2.windows(128, context=128),),
        {AFFINE: (60, 1), "raise-rmsnorm": (61, 0), TO_RMS: (0, 0)},
    )
    assert before == after
