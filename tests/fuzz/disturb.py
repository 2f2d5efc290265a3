"""Disturbances: what real programs do between the lines of an idea.

A second reader of an inner value, a write to a value or a view of it, a region of autocast or grad mode around
some lines, an inner value returned. Each is kept only where eager still runs and fp64 confirms it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from fuzz.builder import Builder
from fuzz.case import Case, words
from fuzz.observe import sensible
from hypothesis import assume
from hypothesis import strategies as st

_WRITES = (
    "{v}.add_(0.5)",
    "{v}.mul_(2.0)",
    "{v}.relu_()",
    "{v} += {v}",
    "{v}[..., :1] = 0.25",
    "{v}[0] *= 3.0",
    "{v}.copy_({v} * 0.5)",
    "{v}.neg_()",
    "F.relu_({v})",
    "{v}.clamp_(min=-1.0)",
)
_READS = (
    "{v}.sum()",
    "{v}.mean(-1)",
    "{v} * 2.0",
    "{v}.abs().amax(-1)",
    "{v}.view(-1)",
    "{v}.detach()",
    "{v}[..., :2]",
    "{v} * 1.0",
    "torch.tanh({v}).flatten()",
    "F.layer_norm({v}, ({v}.shape[-1],))",
    "F.linear({v}, {v}.new_ones(2, {v}.shape[-1]))",
)


def disturbed(b: Builder, case: Case) -> Case:
    """``case`` with up to two disturbances."""
    assume(sensible(case))
    for _ in range(b.pick((0, 0, 1, 1, 1, 2))):
        kinds = (_reader, _reader, _write, _write, _write, _region, _region, _region)
        kind = b.pick((*kinds, _returned, _strided, _tied))
        changed = kind(b, case)
        if changed is not None and sensible(changed):
            case = changed
    return case


def _names(case: Case, upto: int) -> list[str]:
    """Inputs, weights and the values of the lines before ``upto``, latest first."""
    found = [n for n, t in case.tensors.items() if t.dtype != "i64"]
    for line in case.body[:upto]:
        target = line.partition(" = ")[0].strip()
        if target.isidentifier() and target not in found:
            found.append(target)
    return found[::-1]


def _pick(b: Builder, case: Case, *, live: bool = False) -> tuple[int, str] | None:
    """A place between two lines, and a value that is there (``live``: and is read after it)."""
    at = b.draw(st.integers(0, len(case.body)))
    names = _names(case, at)
    if live:
        later = set(words("\n".join(case.body[at:])))
        names = [n for n in names if n in later] or names
    return (at, b.pick(names)) if names else None


def _inserted(case: Case, at: int, *lines: str) -> Case:
    indent = ""
    if at < len(case.body):
        line = case.body[at]
        indent = line[: len(line) - len(line.lstrip())]
    body = (*case.body[:at], *(indent + line for line in lines), *case.body[at:])
    return replace(case, body=body)


def _reader(b: Builder, case: Case) -> Case | None:
    found = _pick(b, case)
    if found is None:
        return None
    at, value = found
    name = f"r{len(case.body)}"
    read = b.pick(_READS).format(v=value)
    case = _inserted(case, at, f"{name} = {read}")
    return replace(case, returns=(*case.returns, name))


def _write(b: Builder, case: Case) -> Case | None:
    found = _pick(b, case, live=not b.chance(4))
    if found is None:
        return None
    at, value = found
    if b.chance(3):  # through a view
        name = f"v{len(case.body)}"
        view = b.pick(
            (f"{value}[..., 1:]", f"{value}.view(-1)", f"{value}.detach()", f"{value}[:1]")
        )
        at_view = b.pick((at, max(at - 1, 0))) if value in _names(case, max(at - 1, 0)) else at
        case = _inserted(case, at, b.pick(_WRITES).format(v=name))
        return _inserted(case, at_view, f"{name} = {view}")
    return _inserted(case, at, b.pick(_WRITES).format(v=value))


def _region(b: Builder, case: Case) -> Case | None:
    if not case.body:
        return None
    first = b.draw(st.integers(0, len(case.body)))
    count = b.pick((1, 2, 3, 4, 6))
    regions = ["with autocast('cpu', bf16):"] * 2 + ["with torch.no_grad():"]
    if case.train:
        regions.append("with torch.enable_grad():")
    region = b.pick(regions)
    lines = case.body[first : first + count]
    if not lines or any(line.endswith(":") or line.startswith(" ") for line in lines):
        return None
    body = (*case.body[:first], region, *("    " + x for x in lines), *case.body[first + count :])
    return replace(case, body=body)


def _returned(b: Builder, case: Case) -> Case | None:
    names = [n for n in _names(case, len(case.body)) if n not in case.returns]
    return replace(case, returns=(*case.returns, b.pick(names))) if names else None


def _strided(b: Builder, case: Case) -> Case | None:
    """A value takes a detour through another layout."""
    found = _pick(b, case)
    if found is None:
        return None
    at, value = found
    detour: Callable[[str], str] = b.pick(
        (
            lambda v: f"{v}.transpose(0, -1).contiguous().transpose(0, -1)",
            lambda v: f"{v}.transpose(0, 1).contiguous().transpose(0, 1)",
            lambda v: f"{v}.unsqueeze(0).squeeze(0)",
        )
    )
    return _inserted(case, at, f"{value} = {detour(value)}")


def _tied(b: Builder, case: Case) -> Case | None:
    """One weight in the place of another."""
    weights = [n for n, t in case.tensors.items() if t.role == "parameter"]
    pairs = [
        (one, two)
        for one in weights
        for two in weights
        if one < two and case.tensors[one].shape == case.tensors[two].shape
    ]
    if not pairs:
        return None
    one, two = b.pick(pairs)
    return replace(case, body=tuple(re.sub(rf"\b{two}\b", one, line) for line in case.body))
