"""Cutting a failing case down, line by line, after Hypothesis has shrunk what was drawn."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

from fuzz.case import Case
from fuzz.check import Wrong, check
from fuzz.observe import sensible

PATIENCE = 60.0  # seconds


def kind_of(case: Case) -> str:
    """How the backend is wrong on ``case`` ("the fuzzer": the check itself failed), or ""."""
    try:
        check(case)
    except Wrong as error:
        return error.kind
    except Exception:
        return "the fuzzer"
    return ""


def reduced(case: Case, kind: str) -> Case:
    """The smallest case found that is wrong in the same way."""
    until = time.monotonic() + PATIENCE
    progress = True
    while progress and time.monotonic() < until:
        progress = False
        for smaller in _smaller(case):
            if time.monotonic() > until:
                break
            smaller = smaller.without_dead_lines()
            if smaller == case or not sensible(smaller):
                continue
            if kind_of(smaller) == kind:
                case, progress = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for name, plain in (("compile", ""), ("dynamic", ""), ("ambient", False), ("gathered", False)):
        if getattr(case, name) != plain:
            yield replace(case, **{name: plain})
    for name, plain in (("update", False), ("order", ()), ("train", False)):
        if getattr(case, name) != plain:
            yield replace(case, **{name: plain})
    for name in list(case.passes or ()):
        if len(case.passes or ()) > 1:
            passes = {n: o for n, o in (case.passes or {}).items() if n != name}
            yield replace(case, passes=passes, order=tuple(n for n in case.order if n != name))
    for name in case.returns if len(case.returns) > 1 else ():
        yield replace(case, returns=tuple(n for n in case.returns if n != name))
    for index in reversed(range(len(case.body))):
        yield replace(case, body=case.body[:index] + case.body[index + 1 :])
        target, _, value = case.body[index].strip().partition(" = ")
        if not target.isidentifier():
            continue
        for operand in dict.fromkeys(re.findall(r"\b[xwhrv]\d+\b", value)):
            if operand != target:  # what it is computed from stands in for it
                yield _renamed(case, index, target, operand)


def _renamed(case: Case, index: int, old: str, new: str) -> Case:
    def rename(text: str) -> str:
        return re.sub(rf"\b{old}\b", new, text)

    later = tuple(map(rename, case.body[index + 1 :]))
    returns = tuple(dict.fromkeys(map(rename, case.returns)))
    return replace(case, body=case.body[:index] + later, returns=returns)
