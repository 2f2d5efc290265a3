"""fuse-rows: how far a region reaches, and as what it is written."""

from __future__ import annotations

import pytest
import torch
from row_models import METHODS, ONLY, D, Forward, X, made, specs, spread, top_k
from support import agrees_with_fp64, run
from torch.nn import functional as F

SPREAD = "max(t0) - min(t0)"
REACH: dict[str, tuple[Forward, list[str]]] = {
    "operands of every shape": (
        lambda m, x: (x * m.weight + m.leading) * m.by_row / spread(x) + m.by_token * x * m.shift,
        [f"(t0 * v0 + v1) * s0 / ({SPREAD}) + v2 * t0 * s1"],
    ),
    "numbers": (
        lambda m, x: 1 - (2 * x + 3) / spread(x) + torch.add(x, x, alpha=1),
        [f"1.0 - (t0 * 2.0 + 3.0) / ({SPREAD}) + (t0 + t0)"],
    ),
    "functions": (
        lambda m, x: (
            F.gelu(x, approximate="tanh")
            * torch.tanh(F.silu(x).abs().sqrt())
            / (spread(x).exp() + 1).rsqrt()
        ),
        [f"gelu_tanh(t0) * tanh(sqrt(abs(silu(t0)))) / rsqrt(exp({SPREAD}) + 1.0)"],
    ),
    "powers": (
        lambda m, x: x.pow(5) / spread(x).pow(-0.5) + 1 / x,
        [f"y0 = t0 * t0; y0 * y0 * t0 / rsqrt({SPREAD}) + 1 / t0"],
    ),
    "clamps": (
        lambda m, x: torch.maximum(x.clamp(max=1), spread(x) * 0.1).clamp(-2, 2).clamp_min(0.5),
        [f"maximum(clamp(maximum(minimum(t0, 1.0), ({SPREAD}) * 0.1), -2.0, 2.0), 0.5)"],
    ),
    "an unbiased variance": (
        lambda m, x: x / (x.var(-1, keepdim=True) + 1) - x,
        ["y0 = t0 - mean(t0); t0 / (sum(y0 * y0) / (N - 1.0) + 1.0) - t0"],
    ),
    "a variance with its mean": (
        lambda m, x: (lambda v, u: (x - u) / (v + 1) * 2)(*torch.var_mean(x, -1, keepdim=True)),
        ["y0 = t0 - mean(t0); y0 / (sum(y0 * y0) / (N - 1.0) + 1.0) * 2.0"],
    ),
    "the axis put back": (
        lambda m, x: x / (x.amax(-1) - x.amin(-1)).unsqueeze(-1) + 1,
        [f"t0 / ({SPREAD}) + 1.0"],
    ),
    "numbers of rows without the axis": (
        lambda m, x: (x.abs().amax(-1) * 2 - x.mean(-1), x + spread(x)),
        ["max(abs(t0)) * 2.0 - mean(t0)", f"t0 + ({SPREAD})"],
    ),
    "the largest, its place not asked for": (
        lambda m, x: x / (x.max(-1, keepdim=True).values - x.min(-1, keepdim=True)[0]) * 2,
        [f"t0 / ({SPREAD}) * 2.0"],
    ),
    "not where its place is asked for": (
        lambda m, x: (lambda top: (x / (top[0] - x.mean(-1, keepdim=True)) * 2 + x, top[1]))(
            x.max(-1, keepdim=True)
        ),
        [],
    ),
    "what is also read outside": (
        lambda m, x: (lambda h: (h / spread(h) * 2, h.cumsum(-1)))(x + m.bias),
        [
            "y0 = t0 + v0; y0; y0 / (max(y0) - min(y0)) * 2.0",
        ],
    ),
    "a result that is read before the last operand is there": (
        lambda m, x: (lambda h: (h / spread(h) + x.cumsum(-1), torch.cos(h)))(x + m.bias),
        ["y0 = t0 + v0; y0; y0 / (max(y0) - min(y0)) + t1"],
    ),
    "a softmax with more": (
        lambda m, x: (lambda p: p - p.amax(-1, keepdim=True) * 0.5 + x)(x.softmax(-1)),
        ["y0 = exp(t0 - max(t0)); y1 = y0 / sum(y0); y1 - max(y1) * 0.5 + t0"],
    ),
    "halves of a row": (
        lambda m, x: (lambda a, b: a * b / (spread(a) + 1))(*x.chunk(2, -1)),
        ["t0 * t1 / (max(t0) - min(t0) + 1.0)"],
    ),
    "cut where something else runs between": (
        lambda m, x: top_k(m, top_k(m, x).cumsum(-1) + x),
        [
            METHODS["statistical top-k"][1],
            "y0 = t0 + t1; y1 = mean(y0); y2 = y0 - y1; relu(y0 - "
            "(y1 + sqrt(mean(y2 * y2)) * 0.6744897501960817))",
        ],
    ),
    "numbers of one region in another": (
        lambda m, x: (lambda s, part: (part - s) / (spread(part) + s))(
            spread(x) + x.mean(-1, keepdim=True) * 2, x[..., :8]
        ),
        [f"{SPREAD} + mean(t0) * 2.0", f"(t0 - s0) / ({SPREAD} + s0)"],
    ),
    "not over another axis": (
        lambda m, x: x / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)),
        [],
    ),
    "not what broadcasts between": (
        lambda m, x: x[:, :1] * (spread(x) + 1) * 2 + x,
        [f"{SPREAD} + 1.0"],
    ),
    "not what widens": (lambda m, x: x.double() / spread(x) + x.mean(-1, keepdim=True), []),
    "not by a number that is not finite": (
        lambda m, x: x.clamp(min=-float("inf")) / spread(x),
        ["t1 / (max(t0) - min(t0))"],
    ),
    "not a norm without ε": (lambda m, x: F.rms_norm(x, (D,)) * x.mean(-1, keepdim=True) + 1, []),
    "not an integer that may overflow": (
        lambda m, x: torch.round(x / spread(x) * 2).to(torch.int8).float(),
        ["round(t0 / (max(t0) - min(t0)) * 2.0)"],
    ),
}


@pytest.mark.parametrize("name", REACH)
def test_how_far_a_region_reaches(name: str) -> None:
    forward, expected = REACH[name]
    model = made(forward)
    x = X.abs() + 0.1 if name in ("functions", "powers") else X
    with torch.no_grad():
        result, report = run(model, x, codegen="cpp", **ONLY)
        agrees_with_fp64(model, x, result)
    assert specs(report) == expected
