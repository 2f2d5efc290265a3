"""A program as it grows: lines, tensors, and the value of every name so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from fuzz.case import DTYPES, T, filled
from hypothesis import strategies as st

V = TypeVar("V")

_SHORT = {dtype: name for name, dtype in DTYPES.items()}


class Dropped(Exception):
    """Eager refuses the line: the block that wanted it ends here."""


class Builder:
    """Draws, and writes lines; each line is run at once, on small random tensors."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.tensors: dict[str, T] = {}
        self.body: list[str] = []
        self.env: dict[str, Any] = {"torch": torch, "F": F, "math": math, **DTYPES}
        self.env["autocast"] = torch.autocast
        self.extra: list[str] = []  # returned beside the result
        self.result = ""
        self.dtype = "f32"
        self.width = 8
        self.train = False
        self.symbolic = False  # every size may be symbolic
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0

    # ---- draws -----------------------------------------------------------------------------------

    def pick(self, values: Sequence[V]) -> V:
        return self.draw(st.sampled_from(values))

    def chance(self, one_in: int) -> bool:
        """True once in ``one_in`` draws; False is the simpler case."""
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    # ---- values ----------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.env[name].shape)

    def rank(self, name: str) -> int:
        return len(self.env[name].shape)

    def kind(self, name: str) -> str:
        return _SHORT[self.env[name].dtype]

    def tensor(self, role: str, shape: Sequence[int], values: str, dtype: str = "") -> str:
        t = T(role, tuple(shape), dtype or self.dtype, values)
        name = f"{'x' if role == 'input' else 'w'}{len(self.tensors)}"
        return self.declare(name, t)

    def declare(self, name: str, t: T) -> str:
        self.tensors[name] = t
        value = filled(t, self._generator)
        self.env[name] = (
            torch.nn.Parameter(value) if t.role == "parameter" and self.train else value
        )
        return name

    def input(self, shape: Sequence[int], values: str = "", dtype: str = "") -> str:
        kinds = ("normal", "normal", "normal", "rows", "large", "tiny", "strided")
        return self.tensor("input", shape, values or self.pick(kinds), dtype)

    def weight(self, shape: Sequence[int], values: str, dtype: str = "") -> str:
        """A new weight; now and then one that is there already (a tied weight)."""
        dtype = dtype or self.dtype
        alike = [
            n
            for n, t in self.tensors.items()
            if t.role != "input"
            and t.shape == tuple(shape)
            and t.dtype == dtype
            and t.values == values
        ]
        if alike and self.chance(10):
            return self.pick(alike)
        role = self.pick(("parameter",) * 10 + ("frozen", "buffer"))
        if alike and self.chance(30):
            role = "parameter"
            owner = self.pick(alike)
            if self.tensors[owner].role == "parameter":
                return self.declare(
                    f"w{len(self.tensors)}", T(role, tuple(shape), dtype, values, shares=owner)
                )
        return self.tensor(role, shape, values, dtype)

    # ---- lines -----------------------------------------------------------------------------------

    def line(self, expression: str, name: str = "") -> str:
        """``name = expression``; returns the name."""
        name = name or self.fresh()
        self.statement(f"{name} = {expression}")
        return name

    def fresh(self) -> str:
        self._count += 1
        return f"h{self._count}"

    def statement(self, line: str) -> None:
        self._run(line)
        self.body.append(line)

    def _run(self, text: str) -> None:
        try:
            with torch.no_grad():
                exec(text, self.env)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            raise Dropped(text) from error

    def block(self, header: str, lines: Sequence[str]) -> None:
        """Lines under a ``with``."""
        text = [header, *(f"    {line}" for line in lines)]
        self._run("\n".join(text))
        self.body += text

    def recover(self) -> None:
        """After a refused line: the last value that is there is the result."""
        if self.result and self.result in self.env:
            return
        names = [n for n in self.env if n.startswith("h") and isinstance(self.env[n], torch.Tensor)]
        if not names:
            names = [n for n, t in self.tensors.items() if t.dtype != "i64"] or [
                self.input((2, 3, 4), "normal")
            ]
        self.result = names[-1]

    def returned(self) -> list[str]:
        return [self.result, *dict.fromkeys(n for n in self.extra if n != self.result)]
