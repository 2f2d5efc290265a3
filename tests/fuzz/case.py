"""One fuzz case: a small torch program as Python lines, the tensors that it takes, and how it is compiled.

The lines are the specification: what a failure prints can be read, run and cut down by hand.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
}


@dataclass(frozen=True)
class T:
    """A tensor that the program takes.

    Attributes:
        role: "parameter", "frozen" (one that needs no gradient), "buffer" or "input".
        values: how it is filled: see :func:`filled`.
        shares: the name of a parameter whose memory this one shares (a tied weight under two names).
    """

    role: str
    shape: tuple[int, ...]
    dtype: str = "f32"
    values: str = "normal"
    shares: str = ""

    def __repr__(self) -> str:
        given = [repr(self.role), repr(self.shape)]
        rest = [("dtype", "f32"), ("values", "normal"), ("shares", "")]
        named = [f"{n}={getattr(self, n)!r}" for n, d in rest if getattr(self, n) != d]
        return f"T({', '.join(given + named)})"


@dataclass(frozen=True)
class Case:
    """A program and how to compile it; ``repr`` is Python that makes it again.

    Attributes:
        tensors: name -> :class:`T`, the arguments of the program.
        body: lines of Python over torch, F, math and the dtype names of ``DTYPES``.
        returns: the names that the program returns.
        train: gradients flow, and are compared.
        passes: names -> options, as for ``options["passes"]``; None for the preset.
        order: the order in which the rewrites run; () for the pipeline's own.
        dynamic: "", "batch" or "all": which sizes of the inputs are symbolic.
        ambient: the call is made under autocast.
        gathered: the weights belong to an FSDP module.
        update: weights are changed after the first call, and the second must see it.
        compile: "" runs the driver on a Dynamo-like graph; "eager" and "aot_eager" go through torch.compile.
        seed: of all values.
    """

    tensors: Mapping[str, T] = field(default_factory=dict)
    body: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    train: bool = False
    passes: Mapping[str, Mapping[str, Any]] | None = None
    order: tuple[str, ...] = ()
    dynamic: str = ""
    ambient: bool = False
    gathered: bool = False
    update: bool = False
    compile: str = ""
    seed: int = 0

    def __repr__(self) -> str:
        rows = ["Case("]
        for f in fields(self):
            value = getattr(self, f.name)
            default = {} if f.name == "tensors" else f.default
            if value == default:
                continue
            if f.name == "tensors":
                rows += [
                    "    tensors={",
                    *(f"        {k!r}: {v!r}," for k, v in value.items()),
                    "    },",
                ]
            elif f.name == "body":
                rows += ["    body=(", *(f"        {line!r}," for line in value), "    ),"]
            else:
                rows.append(f"    {f.name}={value!r},")
        return "\n".join([*rows, ")"])

    def __hash__(self) -> int:
        return hash((self.body, self.returns, self.seed))

    @property
    def program(self) -> Case:
        """The case as far as the passes' choice plays no part."""
        return replace(self, passes=None, order=(), update=False)

    # ---- running it ------------------------------------------------------------------------------

    def function(
        self, *, wide: bool = False, names: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The program over its tensors in order; ``wide`` computes everything in fp64.

        ``names`` replaces names that the lines use (how a tracer takes the place of autocast).
        """
        namespace = {**_NAMES, **(_WIDE if wide else {}), **(names or {})}
        return _compiled(self._source(", ".join(self.tensors)), namespace, "program")

    def module(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """The program as a module that holds its weights; its forward takes the inputs."""
        held = [n for n, t in self.tensors.items() if t.role != "input"]
        given = [n for n, t in self.tensors.items() if t.role == "input"]
        prologue = [f"{n} = self.{n}" for n in held]
        source = self._source(", ".join(["self", *given]), prologue)
        forward = _compiled(source, dict(_NAMES), "program")
        module = type("Program", (nn.Module,), {"forward": forward})()
        for name in held:
            if self.tensors[name].role == "buffer":
                module.register_buffer(name, tensors[name])
            else:
                module.register_parameter(name, tensors[name])  # type: ignore[arg-type]
        return module

    def _source(self, arguments: str, prologue: list[str] | None = None) -> str:
        returned = ", ".join(self.returns) + ("," if len(self.returns) == 1 else "")
        lines = [*(prologue or ()), *self.body, f"return ({returned})"]
        return f"def program({arguments}):\n" + "\n".join(f"    {line}" for line in lines) + "\n"

    def build(self, offset: int = 0) -> dict[str, torch.Tensor]:
        """Its tensors; ``offset`` gives other values of the same kind."""
        made: dict[str, torch.Tensor] = {}
        for index, (name, t) in enumerate(self.tensors.items()):
            generator = torch.Generator().manual_seed(1000 * (self.seed + offset) + index)
            value = filled(t, generator)
            if t.shares and t.shares in made:
                value = made[t.shares].detach().view(t.shape)
            if t.role in ("parameter", "frozen"):
                value = nn.Parameter(value, requires_grad=t.role == "parameter")
            made[name] = value
        return made

    def without_dead_lines(self) -> Case:
        """The same case without the lines and tensors that nothing reads (a print is easier to read)."""
        used = set(self.returns)
        kept: list[str] = []
        for line in reversed(self.body):
            target, _, value = line.strip().partition(" = ")
            names = {n.strip() for n in target.split(",")}
            is_plain = bool(value) and all(n.isidentifier() for n in names)
            if is_plain and not names & used and not line.startswith(" ") and "_(" not in line:
                continue
            kept.append(line)
            used |= set(words(line))
        tensors = {n: t for n, t in self.tensors.items() if n in used or t.shares in used}
        return replace(self, body=tuple(reversed(kept)), tensors=tensors)


def filled(t: T, generator: torch.Generator) -> torch.Tensor:
    """Random values of one kind; default initialisation would hide mistakes in folding."""
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
    rank = len(t.shape)
    if t.dtype == "i64":
        return torch.randint(0, VOCABULARY, t.shape, generator=generator)
    if t.values == "matrix":
        value = noise * (0.7 / math.sqrt(max(t.shape[-1], 1))) + 0.05
    elif t.values == "scale":
        value = 1 + 0.3 * noise
    elif t.values == "positive":
        value = 0.5 + noise.abs()
    elif t.values == "keep":  # DropPath: a factor per sample, some of them zero
        value = (noise > -0.5).double() / 0.7
    elif t.values == "large":
        value = 30 * noise + 10
    elif t.values == "tiny":
        value = 1e-4 * noise
    elif t.values == "rows":  # rows that are zero, nearly so, and ordinary ones
        factor = torch.tensor([1.0, 0.0, 1e-6, 1.0, 3.0], dtype=torch.float64)
        count = t.shape[-2] if rank > 1 else 1
        value = noise * factor[torch.arange(count) % 5].reshape(-1, *[1] * (rank > 1))
    else:
        value = noise
    value = value.to(DTYPES[t.dtype])
    if t.values == "strided" and rank > 1:
        value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    return value


VOCABULARY = 7

_NAMES: dict[str, Any] = {"torch": torch, "F": F, "math": math, **DTYPES}
_WIDE: dict[str, Any] = dict.fromkeys(("f32", "bf16", "f16"), torch.float64)


@contextlib.contextmanager
def no_autocast(*_: Any) -> Any:
    yield


def _compiled(source: str, namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    if "autocast" not in namespace:
        namespace["autocast"] = torch.autocast
    exec(compile(source, "<fuzz program>", "exec"), namespace)
    function: Callable[..., Any] = namespace[name]
    return function


def words(line: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in line).split()


_WIDE["autocast"] = no_autocast
