"""quantize-softmax: the quantizers' laws, which attentions are rounded, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quant_models import Net
from support import error, fp64, randomise, run
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from sparsecc.errors import RecipeError
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops.rounded_attention import LAWS, Rounding, attention

NAME = "quantize-softmax"
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def rounding(law: str, **given: Any) -> Rounding:
    return Rounding.of({"law": law, **given})


def only(law: str = "log-sqrt2", **given: Any) -> dict[str, Any]:
    recipe = Recipe("by hand", attention={"law": law, **given})
    return {"passes": {NAME: {"recipe": recipe}}, "codegen": "aten"}


# ---- quantizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("law", LAWS)
def test_codes_and_what_they_stand_for(law: str, bits: int) -> None:
    kind, last = rounding(law, bits=bits), 2**bits - 1
    p = torch.linspace(0, 1, 4001, dtype=torch.float64)
    codes = kind.codes(p)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) == 0
    assert float(codes.max()) == last + (law == "log-sqrt2")
    values = kind.rounded(p)
    assert bool((values.diff() >= 0).all())
    assert float(values[0]) == 0
    assert float(values[-1]) == pytest.approx(1, rel=1e-12 if law != "sulq" else 1e-3)
    assert kind.rounded(torch.tensor([math.nan])).isnan().all()
    assert kind.rounded(p.bfloat16()).dtype is torch.bfloat16


def test_parity_gives_powers_of_the_root_of_two() -> None:
    for bits, scale in ((4, 1.0), (4, 0.5), (8, 1.0)):
        kind = rounding("log-sqrt2", bits=bits, parameter=scale)
        q = torch.arange(2**bits, dtype=torch.float64)
        torch.testing.assert_close(kind.values(q), scale * 2 ** (-q / 2), rtol=1e-14, atol=0)
        even = kind.values(q[::2].float())  # in fp32 powers of two, to the bit
        assert torch.equal(even.frexp().mantissa, torch.full_like(even, 0.5))
    kind = rounding("log-sqrt2", bits=4)
    assert kind.codes(torch.ones(1)).tolist() == [0]
    tiny = torch.tensor([2.0**-7.5, 2.0**-7.74, 2.0**-7.76, 0.0])  # q 15, 15, and more
    assert (kind.rounded(tiny) > 0).tolist() == [True, True, False, False]


def test_shifted_sums_are_the_product() -> None:
    """I&S-ViT: Σ v ≪ e − η Σ v; without the last term it is another number."""
    kind = rounding("sulq", bits=4, parameter=0.01)
    p = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    v = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    exponents = (kind.rounded(p) + 0.01).log2()
    assert torch.allclose(exponents, exponents.round(), atol=1e-12)
    sums = torch.exp2(exponents.round()) @ v
    assert torch.allclose(sums - 0.01 * v.sum(0), kind.rounded(p) @ v, atol=1e-12)
    assert not torch.allclose(sums, kind.rounded(p) @ v, atol=1e-3)
    zero = torch.zeros(1, dtype=torch.float64)
    assert abs(float(kind.rounded(zero))) <= (math.sqrt(2) - 1) * 0.01
    assert float(rounding("sulq", parameter=2.0**-7).rounded(zero)) == 0


def test_codes_of_the_tangent_are_finer_near_one() -> None:
    kind = rounding("tanq", bits=4)
    steps = kind.values(torch.arange(16, dtype=torch.float64)).diff()
    assert float(steps[-1]) < 0.5 * float(steps[0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"law": "log2"}, "one of log-sqrt2, sulq, tanq"),
        ({"law": "sulq", "bit": 4}, "one of log-sqrt2, sulq, tanq"),
        ({"law": "sulq", "bits": 1}, "bits are 2 to 8, not 1"),
        ({"law": "sulq", "parameter": 0}, "parameter must be above 0"),
        ({"law": "tanq", "parameter": math.pi / 2}, "parameter must be above 0"),
    ],
)
def test_what_is_no_rounding(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rounding.of(given)
    recipe = Recipe("by hand", attention=given)
    with pytest.raises((RecipeError, BackendCompilerFailed), match=words), torch.no_grad():
        run(randomise(Net()).eval(), X, recipe=recipe)


# ---- the pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_the_operator_is_attention_where_nothing_is_lost(mask: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(Rounding, "rounded", lambda self, p: p)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, tokens, size, generator=generator).double()
        for heads, tokens, size in ((4, 5, 8), (2, 7, 8), (2, 7, 6))
    )
    given: Any = None
    if mask == "bool":
        given = torch.rand(5, 7, generator=generator) < 0.6
        given[2] = False  # a row without a key
    elif mask == "float":
        given = torch.randn(2, 1, 5, 7, generator=generator).double()
    causal = mask == "causal"
    got = attention(q, k, v, given, causal, 0.3, True, rounding("sulq").text())
    expected = F.scaled_dot_product_attention(
        q, k, v, given, is_causal=causal, scale=0.3, enable_gqa=True
    )
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("law", LAWS)
def test_attention_of_a_model_is_rounded(law: str) -> None:
    model = randomise(Net()).eval()
    text = rounding(law).text()

    def rounded(q, k, v, is_causal=False, enable_gqa=False):
        return attention(q, k, v, None, is_causal, None, enable_gqa, text)

    exact = fp64(model)
    with torch.no_grad():
        expected = exact(X.double())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", rounded)
            meant = exact(X.double())
        result, report = run(model, X, **only(law))
    assert report[NAME].applied == 1
    lost = error(meant, expected)
    assert lost > 1e-4
    assert error(result, meant) < 0.05 * lost


class Explicit(nn.Module):
    """Probabilities that are a result, too, so that no operator stands for the chain."""

    def __init__(self, dim: int = -1, rows: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.dim = dim
        self.table = nn.Parameter(torch.randn(5, 16)) if rows else None

    def forward(self, x):
        p = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) * 0.3, self.dim)
        return p @ (self.v(x) if self.table is None else self.table), p


def test_a_softmax_and_its_product() -> None:
    model, kind = randomise(Explicit()).eval(), rounding("log-sqrt2")
    with torch.no_grad():
        (result, p), report = run(model, X, **only())
        wide = fp64(model)
        expected, exact = wide(X.double())
        values = wide.v(X.double())
    assert report[NAME].applied == 1
    assert error(p, exact) < 1e-5  # who else reads them has them as they are
    meant = kind.rounded(exact) @ values
    assert error(meant, expected) > 0.01
    assert error(result, meant) < 1e-5


class Dropping(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


class Narrowed(nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(x, x, x)


def refused(model: nn.Module, x: torch.Tensor = X) -> list[str]:
    with torch.no_grad():
        _, report = run(model, x, **only())
    assert report[NAME].applied == 0
    return [r.code for r in report[NAME].refusals]


def test_what_is_refused() -> None:
    assert refused(Dropping(), X[:, None]) == ["dropout"]
    assert refused(randomise(Explicit(dim=1)).eval()) == ["axis"]
    assert refused(randomise(Explicit(rows=True)).eval()) == ["weight"]
    _, report = run(randomise(Explicit()), X.clone().requires_grad_(), **only())
    assert [r.code for r in report[NAME].refusals] == ["training"]
    assert refused(Narrowed(), X[:, None]) == ["region"]


def test_nothing_is_rounded_unasked() -> None:
    model = randomise(Net()).eval()
    with torch.no_grad():
        _, report = run(model, X, recipe=Recipe("by hand"))
    assert report[NAME].applied == report[NAME].refused == 0
