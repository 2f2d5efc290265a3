"""sparsify-ffn: what a network computes under each law, for few rows and for many, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quant_models import recipe_of
from sparse_models import FFN, NEURONS, D, Flat, kept_activations, recipe, sizes_of_outputs, sparse
from support import error, fp64, managed_by_fsdp, randomise, run
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import sparsecc
from sparsecc.errors import RecipeError
from sparsecc.recipe import Recipe
from sparsecc.runtime.ops import formats
from sparsecc.runtime.ops.sparse_activation import sparse_activation
from sparsecc.runtime.ops.sparse_ffn import Spec, sparse_ffn

NAME = "sparsify-ffn"
GENERATOR = torch.Generator().manual_seed(1)
FEW, MANY = torch.randn(2, 1, D, generator=GENERATOR), torch.randn(3, 7, D, generator=GENERATOR)
INPUTS = pytest.mark.parametrize("x", [FEW, MANY], ids=["few", "many"])
T = torch.tensor([0.1])
EACH = 0.05 + 0.2 * torch.rand(NEURONS, generator=GENERATOR)
CORE = torch.tensor([0, 3, 4, 11, 17, 23, 40, 63])


def only(given: Recipe) -> dict[str, Any]:
    return {"passes": {NAME: {"recipe": given}}, "codegen": "aten"}


def check(model: nn.Module, x: torch.Tensor, given: Recipe, decide: Any, lost: float = 1e-3) -> Any:
    """The compiled model is what the law means, in fp64, and not what the model was."""
    model = randomise(model).eval()
    with torch.no_grad():
        result, report = run(model, x, **only(given))
        meant, exact = sparse(model, decide)(x.double()), fp64(model)(x.double())
    assert report[NAME].applied == 1
    assert error(result, meant) < 1e-6
    assert error(exact, meant) > lost
    return report


def few_nodes(model: nn.Module, x: torch.Tensor, given: Recipe) -> int:
    """How many networks become one operator."""
    from sparsecc.inspection import stages

    with torch.no_grad():
        _, graphs = stages(model, x, options=only(given))
    last = graphs[0].stages[-1].program
    return len(list(last.calls(sparse_ffn)))


# ---- the laws ------------------------------------------------------------------------------------------


@INPUTS
@pytest.mark.parametrize(
    ("kind", "act", "bias"),
    [
        ("plain", "relu", True),
        ("plain", "gelu", False),
        ("gated", "silu", True),
        ("gated", "gelu_tanh", False),
        ("gated", "sigmoid", True),
        ("gated", "relu6", True),
        ("fused", "silu", True),
        ("swapped", "tanh", True),
    ],
)
def test_thresholds_on_the_activation(kind: str, act: str, bias: bool, x: torch.Tensor) -> None:
    model, given = (
        FFN(kind, act, bias),
        recipe(law="activation", t=T if act != "sigmoid" else 5 * T),
    )
    limit = given.thresholds["down.weight"]
    check(model, x, given, lambda ffn, y: kept_activations(ffn, y, limit), 1e-4)


def test_zero_leaves_the_model_as_it_is_and_infinity_nothing() -> None:
    model = randomise(FFN()).eval()
    for t in (0.0, float("inf")):
        given = recipe(law="activation", t=torch.tensor([t]))
        with torch.no_grad():
            result, report = run(model, FEW, **only(given))
            wide = FEW.double()
            meant = fp64(model)(wide) if t == 0 else wide + model.down.bias.double()
        assert report[NAME].applied == 1
        assert error(result, meant) < 1e-6


@INPUTS
def test_magnitudes_count_and_what_equals_the_threshold_is_dropped(x: torch.Tensor) -> None:
    """SiLU's least value is −0.278: neurons below −0.2 are live, and those at exactly ±t are not."""
    model = randomise(FFN("plain", "tanh")).eval()
    with torch.no_grad():
        model.up.weight.zero_()
        model.up.bias.copy_(torch.linspace(-2, 2, NEURONS))
        t = torch.tanh(model.up.bias)[[5]].abs()
        result, _ = run(model, x, **only(recipe(law="activation", t=t)))
        a = torch.tanh(model.up.bias)
        live = a.abs() > t
        assert not live[5]
        assert bool(live[:5].all())
        expected = x + model.down(a * live)
    assert error(result, expected) < 1e-6


@INPUTS
@pytest.mark.parametrize(("kind", "act"), [("plain", "relu"), ("gated", "silu"), ("fused", "gelu")])
def test_thresholds_on_the_hidden_value(kind: str, act: str, x: torch.Tensor) -> None:
    def decide(ffn: FFN, y: torch.Tensor) -> torch.Tensor:
        h = ffn.hidden(y)
        return h * (h.abs() > EACH.double())

    check(FFN(kind, act), x, recipe(law="hidden", t=EACH), decide)


@INPUTS
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_the_largest(kind: str, x: torch.Tensor) -> None:
    def decide(ffn: FFN, y: torch.Tensor) -> torch.Tensor:
        z, u = ffn.parts(y)
        a = ffn.act(z)
        a = a * (a >= a.topk(5).values[..., -1:])
        return a if u is None else a * u

    check(FFN(kind, "relu"), x, recipe(law="top", k=5), decide)
    model = randomise(FFN(kind, "relu")).eval()
    with torch.no_grad():
        whole, _ = run(model, x, **only(recipe(law="top", k=NEURONS)))
    assert error(whole, fp64(model)(x.double())) < 1e-6


@INPUTS
@pytest.mark.parametrize("on", ["input", "output"])
def test_a_quantile_of_the_row(on: str, x: torch.Tensor) -> None:
    c = 0.4

    def above(z: torch.Tensor) -> torch.Tensor:
        mean = z.mean(-1, keepdim=True)
        std = (z - mean).square().mean(-1, keepdim=True).sqrt()
        return torch.relu(z - mean - c * std)

    def decide(ffn: FFN, y: torch.Tensor) -> torch.Tensor:
        z, u = ffn.parts(y)
        assert u is not None
        return (ffn.act(above(z)) if on == "input" else above(ffn.act(z))) * u

    check(FFN("gated", "gelu_tanh"), x, recipe(law="gaussian", c=c, on=on), decide)
    model = randomise(FFN()).eval()
    with torch.no_grad():  # k = F: no c
        whole, report = run(model, x, **only(recipe(law="gaussian", on=on)))
    assert report[NAME].applied == 1
    assert error(whole, fp64(model)(x.double())) < 1e-6


def test_weights_by_columns_and_flattened_tokens() -> None:
    def decide(ffn: Any, y: torch.Tensor) -> torch.Tensor:
        h = ffn.hidden(y)
        return h * (h > 0.3)

    given = recipe("v", law="activation", t=torch.tensor([0.3]))
    for x in (FEW, MANY):
        check(Flat(), x, given, decide)


@pytest.mark.parametrize("rows", [16, 17])
def test_the_function_is_the_same_for_any_number_of_rows(rows: int) -> None:
    model, given = randomise(FFN()).eval(), recipe(law="activation", t=T)
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole, _ = run(model, x, **only(given))
        part, _ = run(model, x[:rows], **only(given))
    assert error(part, whole[:rows]) < 1e-6
    assert few_nodes(model, x[:rows], given) == (rows <= 16)


def test_sizes_that_are_not_known_and_half_precision() -> None:
    model, given = randomise(FFN()).eval(), recipe(law="activation", t=T)
    expected = sparse(model, lambda ffn, y: kept_activations(ffn, y, T))
    with torch.no_grad():
        result, report = run(model, MANY, dynamic=True, **only(given))
        assert error(result, expected(MANY.double())) < 1e-6
        assert report[NAME].applied == 1
        narrow = randomise(FFN()).eval().bfloat16()
        for x in (FEW, MANY):
            got, report = run(narrow, x.bfloat16(), **only(given))
            assert got.dtype is torch.bfloat16
            assert report[NAME].applied == 1
            assert (
                error(got, sparse(narrow, lambda ffn, y: kept_activations(ffn, y, T))(x.double()))
                < 0.02
            )


# ---- cores ---------------------------------------------------------------------------------------------


def test_one_token_is_decoded_with_the_core() -> None:
    sparsecc.reset_cores()
    given = recipe(law="core", alpha=0.5, core=CORE)
    live = torch.zeros(NEURONS).index_fill(0, CORE, 1.0).double()
    check(FFN(), FEW, given, lambda ffn, y: ffn.hidden(y) * live)
    whole = recipe(law="core", alpha=0.5, core=torch.arange(NEURONS))
    model = randomise(FFN()).eval()
    with torch.no_grad():
        result, report = run(model, FEW, **only(whole))
    assert report[NAME].applied == 1
    assert error(result, fp64(model)(FEW.double())) < 1e-6


def test_a_prompt_chooses_the_core_and_tokens_keep_it() -> None:
    sparsecc.reset_cores()
    model, given = randomise(FFN()).eval(), recipe(law="core", alpha=0.3, core=CORE)
    compiled = torch.compile(model, backend="sparsecc", options={"lower": "eager", **only(given)})
    wide = fp64(model)

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        h = wide.hidden(x.double()).flatten(0, -2)
        counts = [0] * NEURONS
        for row in h.tolist():
            positive = sum(value > 0 for value in row)
            count = -(-3 * positive // 10)
            for i in sorted(range(NEURONS), key=lambda i: -row[i])[:count]:
                counts[i] += 1
        best = sorted(range(NEURONS), key=lambda i: (-counts[i], i))[: len(CORE)]
        return torch.zeros(NEURONS).index_fill(0, torch.tensor(best), 1.0).double()

    def decoded(live: torch.Tensor) -> torch.Tensor:
        return FEW.double() + wide.down(wide.hidden(FEW.double()) * live)

    usual = torch.zeros(NEURONS).index_fill(0, CORE, 1.0).double()
    with torch.no_grad():
        assert error(compiled(FEW), decoded(usual)) < 1e-6
        for prompt in (MANY, MANY.flip(0)[:1] * 2):
            assert error(compiled(prompt), wide(prompt.double())) < 1e-6  # it is read whole
            live = by_hand(prompt)
            assert not torch.equal(live, usual)
            for _ in range(2):  # a token chooses nothing
                assert error(compiled(FEW), decoded(live)) < 1e-6
        sparsecc.reset_cores()
        assert error(compiled(FEW), decoded(usual)) < 1e-6


def test_a_core_survives_inductor_and_unknown_sizes() -> None:
    sparsecc.reset_cores()
    model, given = randomise(FFN()).eval(), recipe(law="core", alpha=0.3, core=CORE)
    options = {"recipe": given, "codegen": "aten"}
    compiled = torch.compile(model, backend="sparsecc", options=options, dynamic=True)
    plain = torch.compile(model, backend="sparsecc", options={**options, "lower": "eager"})
    with torch.no_grad():
        usual = compiled(FEW).clone()
        compiled(MANY)
        chosen = compiled(FEW).clone()
        assert error(chosen, plain(FEW)) < 1e-6
    assert error(chosen, usual) > 1e-3


# ---- weights that are rounded, tied, or change -----------------------------------------------------------


def rounded(model: FFN, form: str) -> nn.Module:
    """``model`` in fp64 with its weights in a format, that of down by neuron."""
    twin = fp64(model)
    for name, layer in twin.named_children():
        weight = layer.weight.detach()
        by_row = name != "down"
        scale = sizes_of_outputs(weight) if form == "int8" and not by_row else torch.ones(())
        kept = formats.quantize(weight if by_row else (weight.t() / scale).contiguous(), form)

        def forward(
            x: Any,
            kept: Any = kept,
            bias: Any = layer.bias,
            by_row: bool = by_row,
            scale: Any = scale,
        ) -> Any:
            if by_row:
                return formats.product(x, form, kept) + bias
            return x @ formats.dequantize(form, kept, torch.float64) * scale + bias

        layer.forward = forward  # type: ignore[method-assign]
    return twin


@INPUTS
@pytest.mark.parametrize("law", ["activation", "core"])
@pytest.mark.parametrize(
    ("kind", "form"), [("gated", "int8"), ("fused", "int4g32z"), ("plain", "bf16")]
)
def test_rounded_weights(law: str, kind: str, form: str, x: torch.Tensor) -> None:
    """Down is rounded by neuron, for few rows and for many."""
    sparsecc.reset_cores()
    model = randomise(FFN(kind, "relu" if kind == "plain" else "silu")).eval()
    given = recipe(law=law, alpha=0.5, t=T, core=CORE)
    found = recipe_of(model, x, form=form)
    given.sites, given.shapes = found.sites, found.shapes
    live = torch.zeros(NEURONS).index_fill(0, CORE, 1.0).double()

    def decide(ffn: FFN, y: torch.Tensor) -> torch.Tensor:
        if law == "activation":
            return kept_activations(ffn, y, T)
        return ffn.hidden(y) * live if x is FEW else ffn.hidden(y)

    with torch.no_grad():
        result, report = run(model, x, recipe=given, codegen="aten")
        expected = sparse(rounded(model, form), decide)(x.double())
        exact = sparse(model, decide)(x.double())
    assert report[NAME].applied == 1
    assert report["quantize-linear"].applied == (0 if x is FEW else 2 - (kind != "gated"))
    assert error(result, expected) < error(exact, expected) / 5


def test_a_large_output_does_not_make_the_others_coarse() -> None:
    """One 1000 times as large, as residual streams have them, and one of zeros."""
    model = randomise(FFN()).eval()
    with torch.no_grad():
        model.down.weight[3] *= 1000
        model.down.weight[5] = 0
        given = recipe(law="activation", t=0 * T)
        given.sites, given.shapes = {"down.weight": "int8"}, {"down.weight": [D, NEURONS]}
        for x in (FEW, MANY):
            result, report = run(model, x, recipe=given, codegen="aten")
            exact = fp64(model)(x.double())
            assert report[NAME].applied == 1
            others = [i for i in range(D) if i != 3]
            assert error(result[..., others], exact[..., others]) < 0.01
            assert error(result[..., 3], exact[..., 3]) < 0.01


@pytest.mark.parametrize(("density", "skips"), [(0.5, 1), (0.95, 0)])
def test_rounded_products_of_nearly_all_neurons_stay_whole(density: float, skips: int) -> None:
    """Of int8, whole products were measured to be faster there; down alone still skips."""
    model = randomise(FFN()).eval()
    given = recipe(law="activation", t=T, density=density)
    found = recipe_of(model, FEW, form="int8")
    given.sites, given.shapes = found.sites, found.shapes
    with torch.no_grad():
        result, report = run(model, FEW[:1], recipe=given, codegen="aten")
        expected, exact = (
            sparse(each, lambda ffn, y: kept_activations(ffn, y, T))(FEW[:1].double())
            for each in (rounded(model, "int8"), model)
        )
    assert error(result, expected) < error(exact, expected) / 5
    assert report[NAME].applied == 1
    assert report["quantize-linear"].applied == 2 * (1 - skips)


def test_weights_that_change_after_compilation() -> None:
    model, given = randomise(FFN()).eval(), recipe(law="activation", t=T)
    compiled = torch.compile(model, backend="sparsecc", options={"lower": "eager", **only(given)})
    with torch.no_grad():
        compiled(FEW)
        model.down.weight.mul_(-2)
        model.gate.bias.add_(0.5)
        meant = sparse(model, lambda ffn, y: kept_activations(ffn, y, T))
        assert error(compiled(FEW), meant(FEW.double())) < 1e-6


class Tied(nn.Module):
    """Two networks that share a down projection, which another layer reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = FFN(), FFN("plain", "relu")
        self.b.down.weight = self.a.down.weight
        self.other = nn.Linear(NEURONS, D)
        self.other.weight = self.a.down.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + self.other(x.repeat_interleave(NEURONS // D, -1))


@INPUTS
def test_tied_weights(x: torch.Tensor) -> None:
    model, given = randomise(Tied()).eval(), recipe("a.down.weight", law="activation", t=T)
    with torch.no_grad():
        result, report = run(model, x, **only(given))
        meant = sparse(model, lambda ffn, y: kept_activations(ffn, y, T))(x.double())
    assert report[NAME].applied == 2
    assert error(result, meant) < 1e-6


class Chain(nn.Module):
    """Three layers: the last one of one network is the first one of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, NEURONS), nn.Linear(NEURONS, 24), nn.Linear(24, D)

    def forward(self, x: torch.Tensor, t: float = 0.0) -> torch.Tensor:
        h = F.silu(self.a(x))
        y = F.silu(self.b(h * (h.abs() > t)))
        return self.c(y * (y.abs() > t))


def chained(**given: Any) -> Recipe:
    one, other = recipe("b.weight", (24, NEURONS), **given), recipe("c.weight", (D, 24), **given)
    for name in ("sparsity", "shapes", "thresholds", "neurons"):
        getattr(one, name).update(getattr(other, name))
    return one


class Plain(nn.Module):
    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.a, self.b, self.c = chain.a, chain.b, chain.c

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.silu(self.b(F.silu(self.a(x)))))


@INPUTS
def test_networks_that_share_a_layer(x: torch.Tensor) -> None:
    """The second one reads what the first one left."""
    chain = randomise(Chain()).eval()
    model = Plain(chain)
    with torch.no_grad():
        result, report = run(model, x, **only(chained(law="activation", t=T)))
        meant = fp64(chain)(x.double(), float(T.double()))
        assert report[NAME].applied == 2
        assert error(result, meant) < 1e-6
        assert error(fp64(chain)(x.double()), meant) > 1e-3
        core = torch.arange(0, 24, 2)
        _, report = run(model, x, **only(chained(law="core", alpha=0.5, core=core)))
    assert report[NAME].applied == 1
    assert [r.code for r in report[NAME].refusals] == ["follows"]


# ---- what is refused -------------------------------------------------------------------------------------


def refused(model: nn.Module, given: Recipe, x: torch.Tensor = FEW, **options: Any) -> list[str]:
    model = randomise(model).eval()
    with torch.no_grad():
        _, report = run(model, x, **only(given), **options)
    assert report[NAME].applied == 0
    return [r.code for r in report[NAME].refusals]


class Twice(FFN):
    """Its hidden values are a result, too."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.hidden(x)
        return self.down(h), h


class Narrowed(FFN):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Written(FFN):
    """What it reads is written behind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = self.down(self.hidden(y))
        y.transpose(0, 1).mul_(3)
        return y + z


class HalfFlat(Flat):
    """Down reads tokens in their sequences."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x) @ self.v + self.c


def test_what_is_refused() -> None:
    given = recipe(law="activation", t=T)
    _, report = run(randomise(FFN()), FEW.clone().requires_grad_(), **only(given))
    assert [r.code for r in report[NAME].refusals] == ["training"]
    assert refused(managed_by_fsdp(FFN()), given) == ["gathered"]
    assert refused(Twice(), given) == ["read"]
    assert refused(Narrowed(), given) == ["region"]
    assert refused(Written(), given) == ["written"]
    assert refused(FFN("plain", "tanh").to(torch.complex64), given, FEW + 0j) == ["dtype"]
    core = recipe("v", law="core", alpha=0.5, core=CORE)
    assert refused(HalfFlat(), core, FEW.repeat(3, 1, 1), dynamic=True) == ["shape"]
    assert refused(FFN("gated", "mish"), given) == ["activation"]
    assert refused(FFN("gated", "silu"), recipe(law="top", k=3)) == ["activation"]
    assert refused(FFN("gated", "sigmoid"), recipe(law="gaussian", c=1.0)) == ["activation"]


def with_format(form: str = "int8", **fields: Any) -> Recipe:
    given = recipe(law="activation", t=T)
    given.sites = {"up.weight": form, "down.weight": form}
    for name, value in fields.items():
        getattr(given, name).update(value)
    return given


def test_formats_that_cannot_be_kept_by_neuron() -> None:
    link = "norm-linear: gate.weight, up.weight"
    assert refused(FFN(), with_format(scales={link: torch.ones(D)})) == ["unmigrated"]
    moved = "up-down: down.weight"
    assert refused(FFN(), with_format(scales={moved: torch.ones(NEURONS)})) == ["moved"]
    assert refused(FFN(), with_format(activations={"up.weight": 0.5})) == ["step"]
    pair = (torch.zeros(D, 2), torch.zeros(2, NEURONS))
    assert refused(FFN(), with_format(corrections={"down.weight": pair})) == ["step"]
    assert refused(FFN(), with_format("int4g64")) == ["size"]  # of 32 outputs


def test_recipes_that_do_not_fit() -> None:
    model = randomise(FFN()).eval()
    for given, words in (
        (recipe(law="activation"), "needs thresholds"),
        (recipe(law="hidden", t=torch.ones(5)), "needs thresholds"),
        (recipe(law="core", alpha=0.4), "needs neurons"),
        (recipe(law="core", core=CORE), "needs alpha"),
        (recipe(law="gaussian", on="gate"), "on 'input' or 'output', not 'gate'"),
        (recipe(law="top"), "needs k"),
        (recipe(shape=(D, 7), law="activation", t=T), "of another model"),
    ):
        torch._dynamo.reset()
        with pytest.raises((RecipeError, BackendCompilerFailed), match=words), torch.no_grad():
            run(model, FEW, **only(given))


def test_a_recipe_of_other_names_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = randomise(FFN()).eval()
    with torch.no_grad():
        run(model, FEW, recipe=recipe(law="activation", t=T))
        assert "names none" not in caplog.text
        run(model, FEW, recipe=recipe("other.down.weight", law="activation", t=T))
    assert "names none of this graph's 3 linear layers: " in caplog.text
    assert "other.down.weight there" in caplog.text


def test_expressions_that_read_weights_are_no_activation() -> None:
    for spec in (Spec("p0", "a"), Spec("p0", "a * p1", gate=False)):
        with pytest.raises(ValueError, match="reads weights"):
            sparse_activation(FEW, [], spec.text())


def test_nothing_is_left_out_unasked() -> None:
    model = randomise(FFN()).eval()
    with torch.no_grad():
        _, report = run(model, FEW, recipe=Recipe("by hand"))
    assert report[NAME].applied == report[NAME].refused == 0
