"""What the tests of links share: random scales and shifts along every link, measured against eager in fp64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from support import error, fp64, randomise
from torch import nn

from sparsecc.capture import from_dynamo
from sparsecc.passes import registry
from sparsecc.passes.analysis.links import Link, links
from sparsecc.passes.analysis.walk import UNSCALABLE, UNSHIFTABLE
from sparsecc.passes.base import Analyses, Context
from sparsecc.passes.quant._migrate import migrate_scale, migrate_shift
from sparsecc.program import Program

Edit = Callable[[Program, list[Link]], None]
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(2))


def canonical(program: Program) -> None:
    for name in registry.CANONICAL:
        form = registry.load(name)()
        context = Context(program, Analyses(program))
        for match in form.find(context):
            if form.check(match, context) is None:
                form.rewrite(match, context)
        program.sweep()


def found(model: nn.Module, *args: Any, edit: Edit | None = None, dynamic: bool = False) -> Any:
    """The links of ``model`` in fp64, and how far ``edit`` moves its output from eager's."""
    model = fp64(model).eval()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    seen: list[Link] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        program = from_dynamo(gm, example_inputs)
        canonical(program)
        environment = program.fake_mode.shape_env
        before = len(environment.guards) if environment else 0
        seen.extend(links(program, Analyses(program)))
        for link in seen:
            codes = {**UNSCALABLE, **UNSHIFTABLE}
            for refusal in (link.refusal, link.shift_refusal):
                assert refusal is None or refusal.code in codes
        if edit is not None:
            edit(program, seen)
            program.sweep()
            program.module.recompile()
        assert (len(environment.guards) if environment else 0) == before, "a guard was added"
        return program.module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
        worst = error(fast(*args), model(*args))
    return seen, worst


def numbers(size: int, seed: int) -> tuple[list[float], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    s = torch.exp(torch.randn(size, generator=generator, dtype=torch.float64))
    return s.tolist(), torch.randn(size, generator=generator, dtype=torch.float64).tolist()


def everywhere(program: Program, seen: list[Link]) -> None:
    """Random scales along every link that carries one, then random shifts, then scales again."""
    for seed, link in enumerate(seen):
        s, z = numbers(link.size, seed)
        if link.carries_scale:
            migrate_scale(program, link, s, "test")
        if link.carries_shift:
            migrate_shift(program, link, z, "test")
            migrate_scale(program, link, s[::-1], "test")


def legal(seen: list[Link]) -> Counter[str]:
    return Counter(link.kind for link in seen if link.carries_scale)


def shifting(seen: list[Link]) -> Counter[str]:
    return Counter(link.kind for link in seen if link.carries_shift)


def codes(seen: list[Link]) -> list[str]:
    return [link.refusal.code for link in seen if link.refusal is not None]


def only(seen: list[Link], kind: str) -> Link:
    (link,) = [link for link in seen if link.kind == kind and link.carries_scale]
    return link


def check(model: nn.Module, *args: Any, scales: Any, shifts: Any = (), dynamic: Any = None) -> Any:
    """Both invariances, with the expected numbers of links; ``output`` is the last layer's refusal."""
    model = randomise(model)
    seen: list[Link] = []
    for how in (False, True) if dynamic is None else (dynamic,):
        seen, worst = found(model, *args, edit=everywhere, dynamic=how)
        assert legal(seen) == Counter(scales)
        assert shifting(seen) == Counter(shifts)
        assert worst < 1e-12
    return seen


class Two(nn.Module):
    """Two linear layers, and what stands between them."""

    def __init__(self, between: Callable[[Any], Any], bias: bool = True, wide: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(16, 12, bias=bias)
        self.second = nn.Linear(12 * wide, 8, bias=bias)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))
