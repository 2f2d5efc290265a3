"""fuse-cached-attention: which attention over a cache becomes one operator, and which stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import capture, randomise, refusals, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from sparsecc import pipeline
from sparsecc.options import Options
from sparsecc.proof import compare
from sparsecc.report.model import GraphReport
from sparsecc.runtime.ops.cached_attention import cached_attention

NAME = "fuse-cached-attention"
ONLY = {"passes": [NAME]}
LOWER = {"lower": "eager", "strict": True, "floor": False}
D, HEADS, SIZE, LENGTH = 24, 2, 8, 20


class Decoder(nn.Module):
    """Attention over a static cache, in the spellings that models use."""

    def __init__(self, groups: int = 3, rotary: bool = True, repeat: str = "expand") -> None:
        super().__init__()
        self.groups, self.rotary, self.repeat = groups, rotary, repeat
        self.q = nn.Linear(D, HEADS * groups * SIZE)
        self.k, self.v = nn.Linear(D, HEADS * SIZE), nn.Linear(D, HEADS * SIZE)
        self.out = nn.Linear(HEADS * groups * SIZE, D)

    def heads(self, x):
        return x.view(*x.shape[:2], -1, SIZE).transpose(1, 2)

    def angles(self, positions):
        like = {"dtype": self.q.weight.dtype, "device": self.q.weight.device}
        frequencies = 10 ** -torch.arange(0, 1, 2 / SIZE, **like)
        angles = positions[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)[None, None]
        return angles.cos(), angles.sin()

    def turn(self, x, cos, sin):
        turned = torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1)
        return x * cos + turned * sin

    def every(self, cache):
        if self.repeat == "interleave":
            return cache.repeat_interleave(self.groups, 1)
        if self.repeat != "expand" or self.groups == 1:
            return cache
        batch, heads, length, size = cache.shape
        repeated = cache[:, :, None, :, :].expand(batch, heads, self.groups, length, size)
        return repeated.reshape(batch, heads * self.groups, length, size)

    def attend(self, q, k, v, mask):
        gqa = {"enable_gqa": True} if self.repeat == "flag" else {}
        return F.scaled_dot_product_attention(q, self.every(k), self.every(v), mask, **gqa)

    def mask(self, keys, positions):
        return (torch.arange(keys.shape[2], device=keys.device)[None] <= positions[:, None])[
            None, None
        ]

    def forward(self, x, keys, values, positions):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        if self.rotary:
            cos, sin = self.angles(positions)
            q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        out = self.attend(q, keys, values, self.mask(keys, positions))
        return self.out(out.transpose(1, 2).reshape(*x.shape[:2], -1))


def inputs(batch: int = 2, tokens: int = 1) -> tuple[torch.Tensor, ...]:
    x = torch.randn(batch, tokens, D)
    cache = torch.randn(2, batch, HEADS, LENGTH, SIZE)
    return x, cache[0].clone(), cache[1].clone(), torch.arange(5, 5 + tokens)


def own(args: Any, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [a.to(dtype) if dtype and a.is_floating_point() else a.clone() for a in args]


def agrees(model: nn.Module, args: Any, fast: Any) -> None:
    """Results and caches, by the rule of ``verify``."""
    mine, plain, exact = own(args), own(args), own(args, torch.float64)
    with torch.no_grad():
        result, expected = fast(*mine), model(*plain)
        truth = copy.deepcopy(model).double()(*exact)
    pairs = {"result": (result, expected, truth)}
    pairs |= {f"cache {i}": (mine[i], plain[i], exact[i]) for i in (1, 2)}
    for name, values in pairs.items():
        verdict = compare(name, *values)
        assert verdict.passed, verdict


def compiled(model: nn.Module, args: Any, **options: Any) -> Any:
    """The report; results and caches were compared."""
    reports = []

    def fast(*mine: Any) -> Any:
        result, report = run(model, *mine, **{**ONLY, **options})
        reports.append(report)
        return result

    agrees(model, args, fast)
    return reports[0]


@pytest.mark.parametrize("codegen", ["aten", "cpp"])
@pytest.mark.parametrize(
    ("groups", "repeat"), [(1, ""), (3, "expand"), (3, "interleave"), (3, "flag")]
)
@pytest.mark.parametrize("rotary", [True, False])
def test_one_operator(groups: int, repeat: str, rotary: bool, codegen: str) -> None:
    model = randomise(Decoder(groups, rotary, repeat)).eval()
    report = compiled(model, inputs(), codegen=codegen)
    (match,) = report[NAME].matches
    assert match.note == f"{groups} query heads a head, {'rotated' if rotary else 'not rotated'}"
    assert [k.chosen for k in report.graphs[0].kernels] == [codegen]


@pytest.mark.parametrize("tokens", [1, 2, 15])
def test_through_inductor_and_verified(tokens: int) -> None:
    model = randomise(Decoder()).eval()
    options = {"lower": "inductor", "codegen": "cpp", "verify": "each"}
    report = compiled(model, inputs(tokens=tokens), **options)
    assert report.verified
    assert report[NAME].applied == 1


def test_a_preset_takes_it_where_kernels_are_asked_for() -> None:
    model = randomise(Decoder()).eval()
    for codegen in ("aten", "cpp"):
        with torch.no_grad():
            _, report = run(model, *inputs(), codegen=codegen)
        assert (NAME in report.pass_names()) == (codegen == "cpp")


def test_tokens_one_after_another_and_weights_that_change() -> None:
    model = randomise(Decoder()).eval()
    options = {"codegen": "cpp", **LOWER, **ONLY}
    fast = torch.compile(model, backend="sparsecc", options=options)
    args = inputs()
    for step in range(6):
        args = (torch.randn_like(args[0]), *own(args[1:3]), torch.tensor([5 + step]))
        agrees(model, args, fast)
        if step == 2:
            model.load_state_dict(randomise(copy.deepcopy(model), 7).state_dict())


def test_tied_weights() -> None:
    model = randomise(Decoder(groups=1)).eval()
    model.k.weight = model.q.weight
    assert compiled(model, inputs(), codegen="cpp")[NAME].applied == 1


def test_dynamic_batch_and_length() -> None:
    """Sizes of the cache and the batch may be symbolic: kernels take any."""
    model = randomise(Decoder()).eval()
    fast = torch.compile(
        model, backend="sparsecc", dynamic=True, options={"codegen": "cpp", **LOWER, **ONLY}
    )
    for batch in (2, 3, 4):
        args = inputs(batch)
        for t in args[:3]:
            torch._dynamo.mark_dynamic(t, 0)
        torch._dynamo.mark_static(args[0], 1)
        agrees(model, args, fast)


# ---- refusals -----------------------------------------------------------------------------------


class Twice(Decoder):
    def forward(self, x, keys, values, positions):
        out = super().forward(x, keys, values, positions)
        keys.index_copy_(2, positions + 1, keys[:, :, :1])
        return out


class Between(Decoder):
    def forward(self, x, keys, values, positions):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        keys.index_copy_(2, positions, k)
        norms = keys.square().sum((1, 2, 3))[:, None, None]
        values.index_copy_(2, positions, v)
        out = self.attend(q, keys, values, self.mask(keys, positions))
        return self.out(out.transpose(1, 2).reshape(*x.shape[:2], -1)) + norms


class WrittenQuery(Decoder):
    def attend(self, q, k, v, mask):
        q.mul_(2)
        return super().attend(q, k, v, mask)


class Causal(Decoder):
    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, self.every(k), self.every(v), is_causal=True)


class Autocast(Decoder):
    def attend(self, q, k, v, mask):
        with torch.autocast("cpu", enabled=False):
            return super().attend(q, k, v, mask)


class StridedCache(Decoder):
    def forward(self, x, keys, values, positions):
        return super().forward(x, keys.mT.contiguous().mT, values, positions)


REFUSED = {
    "written": (Twice(), inputs()),
    "cache-read": (Between(), inputs()),
    "options": (Causal(), inputs(tokens=3)),
    "region": (Autocast(), inputs()),
    "layout": (StridedCache(), inputs()),
    "tokens": (Decoder(), (*inputs(tokens=17)[:3], torch.arange(1, 18))),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refused(code: str) -> None:
    model, args = REFUSED[code]
    report = compiled(randomise(model).eval(), args, codegen="cpp")
    assert refusals(report, NAME) == [code]


def test_a_query_that_is_written_later_is_refused() -> None:
    report = compiled(randomise(WrittenQuery(rotary=False)).eval(), inputs(), codegen="cpp")
    assert report[NAME].applied == 0


def test_other_dtypes_are_refused() -> None:
    model = randomise(Decoder()).eval().double()
    args = own(inputs(), torch.float64)
    with torch.no_grad():
        _, report = run(model, *args, codegen="cpp", **ONLY)
    assert refusals(report, NAME) == ["dtype"]


def test_autocast_is_refused() -> None:
    """Inside, attention is in half precision, and so is its result."""

    class Wide(Decoder):
        def heads(self, x):
            return super().heads(x).float()

    model, args = randomise(Wide()).eval(), inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(*own(args))
        result, report = run(model, *own(args), codegen="cpp", **ONLY)
    assert refusals(report, NAME) == ["dtype"]
    assert result.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(result, expected)


def test_training_is_refused() -> None:
    model = randomise(Decoder()).train()
    args = inputs()
    result, report = run(model, *own(args), codegen="cpp", **ONLY)
    result.sum().backward()
    assert refusals(report, NAME) == ["training"]
    assert model.v.weight.grad is not None


def test_angles_that_differ_stay_outside() -> None:
    class Other(Decoder):
        def forward(self, x, keys, values, positions):
            q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
            q = self.turn(q, *self.angles(positions + 1))
            keys.index_copy_(2, positions, self.turn(k, *self.angles(positions)))
            values.index_copy_(2, positions, v)
            out = self.attend(q, keys, values, self.mask(keys, positions))
            return self.out(out.transpose(1, 2).reshape(*x.shape[:2], -1))

    report = compiled(randomise(Other()).eval(), inputs(), codegen="cpp")
    assert [m.note for m in report[NAME].matches] == ["3 query heads a head, not rotated"]


def test_the_cache_read_afterwards() -> None:
    class Reader(Decoder):
        def forward(self, x, keys, values, positions):
            out = super().forward(x, keys, values, positions)
            return out + keys.sum() + values[:, 0].mean()

    assert compiled(randomise(Reader()).eval(), inputs(), codegen="cpp")[NAME].applied == 1


def test_returned_caches_are_the_inputs() -> None:
    class Returns(Decoder):
        def forward(self, x, keys, values, positions):
            return super().forward(x, keys, values, positions), keys

    model = randomise(Returns()).eval()
    args = own(inputs())
    with torch.no_grad():
        (_, keys), report = run(model, *args, codegen="cpp", **ONLY)
    assert report[NAME].applied == 1
    assert keys.data_ptr() == args[1].data_ptr()


# ---- on GPUs, as far as that is decided without one ----------------------------------------------------


class WithoutIndexing(Decoder):
    """Where PyTorch has no CUDA, not even fake tensors can be indexed."""

    def mask(self, keys, positions):
        places = torch.arange(keys.shape[2], device=keys.device).unsqueeze(0)
        return (places <= positions.unsqueeze(1)).unsqueeze(0).unsqueeze(0)


def on_cuda(dtype: torch.dtype, cache: torch.dtype) -> tuple[int, list[str]]:
    """How many regions a decoder on a GPU that is not here has, and why others are none."""
    options, record = Options.parse({**ONLY, "codegen": "triton"}), GraphReport(0)
    model = WithoutIndexing(groups=1, rotary=False).eval()

    def fake(real: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_like(real, device="cuda", dtype=dtype)

    x, keys, values, positions = inputs()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for layer in (model.q, model.k, model.v, model.out):
            layer.weight = nn.Parameter(fake(layer.weight, dtype))
            layer.bias = nn.Parameter(fake(layer.bias, dtype))
        caches = fake(keys, cache), fake(values, cache)
        program = capture(model, fake(x, dtype), *caches, fake(positions, torch.int64))
        pipeline.run(program, options, record)
        regions = list(program.calls(cached_attention))
    return len(regions), [r.code for r in record.passes[NAME].refusals]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_takes_half_precision_too(dtype: torch.dtype) -> None:
    assert on_cuda(dtype, dtype) == (1, [])


def test_other_dtypes_are_refused_on_a_gpu() -> None:
    assert on_cuda(torch.float64, torch.float64) == (0, ["dtype"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_on_a_cpu(dtype: torch.dtype) -> None:
    model = randomise(Decoder()).eval().to(dtype)
    with torch.no_grad():
        _, report = run(model, *own(inputs(), dtype), codegen="cpp", **ONLY)
    assert refusals(report, NAME) == ["dtype"]
