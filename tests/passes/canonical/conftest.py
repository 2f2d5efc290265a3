"""Capture a function, run canonical passes over it, run the result. No code generation: quick."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sparsecc.capture import from_dynamo
from sparsecc.passes import registry
from sparsecc.passes.base import Analyses, Context
from sparsecc.program import ORIGIN, Program


@dataclass
class Result:
    """What the passes did to one function, and what the rewritten program returned."""

    value: Any = None
    programs: list[Program] = field(default_factory=list)
    applied: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)

    @property
    def program(self) -> Program:
        return self.programs[0]

    @property
    def targets(self) -> Counter[str]:
        nodes = [n for p in self.programs for n in p.graph.nodes if n.op == "call_function"]
        return Counter(str(node.target) for node in nodes)

    def node(self, target: object) -> torch.fx.Node:
        (found,) = [n for p in self.programs for n in p.calls(target)]
        return found


def apply(program: Program, names: Sequence[str], result: Result) -> None:
    """What the pipeline does for canonical passes."""
    for name in names:
        rewriting = registry.load(name)()
        context = Context(program, Analyses(program))
        for match in rewriting.find(context):
            refusal = rewriting.check(match, context)
            if refusal is not None:
                assert refusal.code in rewriting.refusals
                result.refused.append(refusal.code)
                continue
            rewriting.saving(match, context)
            rewriting.rewrite(match, context)
            result.applied[name] += 1
        program.sweep()
        for node in program.graph.nodes:
            assert ORIGIN not in node.meta or "val" in node.meta, f"{node} has no fake value"
    program.module.recompile()


def run(
    names: Sequence[str],
    function: Callable[..., Any],
    *inputs: Any,
    dynamic: bool = False,
    grad: bool = False,
) -> Result:
    result = Result()

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, example_inputs)
        before = len(_guards(program))
        apply(program, names, result)
        assert len(_guards(program)) == before, "a rewrite added a guard"
        result.programs.append(program)
        return program.module.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        result.value = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return result


def _guards(program: Program) -> Sequence[Any]:
    environment = program.fake_mode.shape_env
    return environment.guards if environment is not None else ()


@pytest.fixture
def run_pass() -> Callable[..., Result]:
    """``run_pass([names], function, *inputs, dynamic=, grad=)``."""
    return run


@pytest.fixture
def capture() -> Callable[..., Program]:
    """``capture(function, *inputs, dynamic=, grad=)``: the program as captured."""

    def captured(function: Callable[..., Any], *inputs: Any, **options: bool) -> Program:
        return run([], function, *inputs, **options).program

    return captured


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The transformers package, also beside a torchvision that was built for another torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    package = pytest.importorskip("transformers")
    package.logging.set_verbosity_error()
    yield package
    del library


@pytest.fixture
def randomise() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Default initialisation hides errors: every parameter gets random values."""

    def randomised(module: torch.nn.Module) -> torch.nn.Module:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, mean=0.1, std=0.4)
        return module.eval()

    return randomised
