"""What the tests share: randomised models, programs captured from them, errors against fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsecc.capture import from_dynamo
from sparsecc.program import Program


def fails_on_211(reason: str) -> pytest.MarkDecorator:
    """For what torch 2.11 itself does otherwise, under any backend."""
    return pytest.mark.xfail(torch.__version__ < (2, 12), reason=reason, strict=True)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, norms and statistics: default initialisation hides wrong folds."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(noise(parameter) * 0.5 / parameter.shape[-1] ** 0.5)
                parameter.add_(0.05)  # rows and columns with a mean of their own
            elif "weight" in name:
                parameter.copy_(1 + 0.3 * noise(parameter))
            else:
                parameter.copy_(0.3 * noise(parameter))
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.copy_(0.3 * noise(buffer))
            elif "running_var" in name:
                buffer.copy_(0.5 + noise(buffer).abs())
    return model


def managed_by_fsdp(model: nn.Module) -> nn.Module:
    """``model`` with the marks that FSDP leaves for Dynamo, and nothing else of it."""
    for module in model.modules():
        module._is_fsdp_managed_module = module._fsdp_use_orig_params = True  # type: ignore[assignment]
    return model


def capture(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> Program:
    """The program that Dynamo's graph of ``function(*args)`` becomes (one graph)."""
    programs: list[Program] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        programs.append(from_dynamo(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return programs[-1]


def left(model: nn.Module, *args: Any, operator: Any = torch.ops.aten.batch_norm.default) -> int:
    """How many nodes of ``operator`` the rewritten program of ``model`` has in inference."""
    from sparsecc import pipeline
    from sparsecc.options import Options
    from sparsecc.report.model import GraphReport

    with torch.no_grad():
        program = capture(model, *args)
    pipeline.run(program, Options.parse({"strict": True}), GraphReport(0))
    return len(list(program.calls(operator)))


def fp64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference relative to the largest element of the reference."""
    scale = reference.double().abs().max().clamp_min(1e-300)
    return float((value.double() - reference.double()).abs().max() / scale)


class Block(nn.Module):
    """A pre-LN transformer block without attention: every producer and reader kind that matters."""

    def __init__(self, d: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(d), norm(d)
        self.mix, self.out = nn.Linear(d, d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 3 * d), nn.Linear(3 * d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.out(torch.tanh(self.mix(self.norm1(x))))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class PreNorm(nn.Module):
    """Embeddings, blocks, a final norm and a head; ``tied`` shares the head with the embedding."""

    def __init__(
        self,
        d: int = 16,
        layers: int = 2,
        vocabulary: int = 20,
        tied: bool = False,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.position = nn.Parameter(torch.randn(32, d))
        self.blocks = nn.ModuleList(Block(d, norm) for _ in range(layers))
        self.norm = norm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def ids(batch: int = 3, tokens: int = 5, vocabulary: int = 20, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator)


def run(
    model: nn.Module, *args: Any, passes: Any = None, dynamic: bool | None = None, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Outputs of the compiled model and the report; ``lower`` is "eager" unless given."""
    import sparsecc

    report = sparsecc.Report()
    chosen = {"lower": "eager", "report": report, "strict": True, **options}
    if passes is not None:
        chosen["passes"] = passes
    torch._dynamo.reset()
    result = torch.compile(model, backend="sparsecc", options=chosen, dynamic=dynamic)(*args)
    return result, report


def check_exact(
    model: nn.Module, *args: Any, applied: dict[str, int], wide: bool = True, **options: Any
) -> Any:
    """In fp64 the compiled model equals the original to rounding, and the passes fired as often as said."""
    with torch.no_grad():
        model = fp64(model).eval() if wide else model.eval()
        args = tuple(
            a.double() if wide and isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in args
        )
        result, report = run(model, *args, **options)
        expected = model(*args)
    got = {name: report[name].applied for name in applied}
    assert got == applied, [(p.name, [(r.code, r.reason) for r in p.refusals]) for p in report]
    agree(result, expected, 1e-12)
    return report


def agree(result: Any, expected: Any, bound: float = 1e-6) -> None:
    """Assert that one tensor, or a tuple of them, is another to ``bound`` (relative to its largest element)."""
    pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (result, expected)), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert error(a, b) < bound


def agrees_with_fp64(model: nn.Module, x: torch.Tensor, result: Any) -> None:
    """By the rule of ``verify``: one tensor, or a tuple of them."""
    from sparsecc.proof import compare

    values = [result, model(x), fp64(model)(x.double())]
    triples = zip(*(v if isinstance(v, tuple) else (v,) for v in values), strict=True)
    for got, eager, exact in triples:
        verdict = compare("result", got, eager, exact)
        assert verdict.passed, verdict


def train(model: nn.Module, step: Callable[..., torch.Tensor], steps: int = 20) -> list[float]:
    """Losses of AdamW steps with weight decay on ``step(batch seed)``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for seed in range(steps):
        optimizer.zero_grad()
        loss = step(ids(seed=seed))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def check_training(build: Callable[[], nn.Module], applied: dict[str, int], **options: Any) -> None:
    """20 AdamW steps in fp64, compiled and not, from the same weights: the same losses and parameters."""
    import sparsecc

    plain, rewritten = build().double().train(), build().double().train()
    report = sparsecc.Report()
    fast = torch.compile(
        rewritten,
        backend="sparsecc",
        options={"lower": "aot_eager", "report": report, "strict": True, **options},
    )
    expected = train(plain, lambda x: plain(x).square().mean())
    got = train(rewritten, lambda x: fast(x).square().mean())
    assert {name: report[name].applied for name in applied} == applied
    assert max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True)) < 1e-9
    pairs = zip(rewritten.parameters(), plain.parameters(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-8


def refusals(report: Any, name: str) -> list[str]:
    return [r.code for r in report[name].refusals]
