"""Random small programs over what the passes touch, drawn by Hypothesis so that failures shrink.

A program is grown block by block (a source, residual blocks, an end), each line run as soon as it is written,
so that every draw knows the shapes and dtypes before it. Then it is disturbed: second readers, writes, regions,
views and returns at random places. A disturbance that eager refuses, or that fp64 does not confirm, is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fuzz import blocks
from fuzz.builder import Builder, Dropped
from fuzz.case import Case
from fuzz.disturb import disturbed
from fuzz.observe import sensible
from hypothesis import strategies as st

from sparsecc.passes import registry

# Exact in training too, but γ's gradient is a difference of two there whose rounding grows with |μ|/σ: 2.7
# times eager's was seen. They run in training only when named; their tests compare gradients in fp64.
NOT_IN_TRAINING = ("fold-batchnorm", "push-batchnorm")


@st.composite
def cases(
    draw: st.DrawFn,
    through_dynamo: int = 20,
    program: Callable[[Builder], None] = blocks.program,
) -> tuple[Case, ...]:
    """Two cases of one program, under two choices of passes: most of the time goes into taking a program in.

    One program in ``through_dynamo`` goes through torch.compile (0: none), and is often one case.
    """
    build = Builder(draw)
    train = build.chance(3)
    build.train = train
    try:
        program(build)
    except Dropped:
        build.recover()
    case = Case(
        tensors=dict(build.tensors),
        body=tuple(build.body),
        returns=tuple(build.returned()),
        train=train,
        seed=draw(st.integers(0, 999)),
    )
    case = disturbed(build, case)
    case = compiled(build, case, through_dynamo)
    chosen = rewritten(build, case)
    return (
        (chosen,)
        if case.compile and build.chance(2)
        else (replace(case, update=chosen.update), chosen)
    )


def compiled(build: Builder, case: Case, through_dynamo: int) -> Case:
    """How the program is taken in and called."""
    changes: dict[str, Any] = {}
    if through_dynamo and build.chance(through_dynamo):
        changes = {"compile": "aot_eager" if build.chance(4) else "eager"}
        changes["dynamic"] = build.pick(("", "", "", "batch"))
    elif build.symbolic and build.chance(2):
        changes["dynamic"] = "all"
    elif build.chance(25):
        changes["dynamic"] = build.pick(("batch", "all"))
    if not case.train:
        changes["gathered"] = not changes.get("compile") and build.chance(12)
    case = replace(case, **changes)
    if build.chance(25):
        ambient = replace(case, ambient=True)
        case = ambient if sensible(ambient) else case
    return case


def rewritten(build: Builder, case: Case) -> Case:
    """Which passes run, in which order, and whether the weights change after it."""
    drawn = [
        n for n in registry.REWRITES if n not in {*registry.FOR_KERNELS, *registry.FOR_RECIPES}
    ]
    names = [n for n in drawn if not (case.train and n in NOT_IN_TRAINING)]
    chosen = [n for n in names if not build.chance(3)] or names
    untie: dict[str, Any] = {"untie": True} if build.chance(2) else {}
    passes = {n: untie if n == "fold-norm-affine" else {} for n in chosen}
    order: tuple[str, ...] = ()
    if not case.compile and build.chance(2):
        order = tuple(build.draw(st.permutations(chosen)))
    else:  # the passes that make regions for kernels come last, and change nothing for those before
        passes.update({name: {} for name in registry.FOR_KERNELS})
    update = not case.train and build.chance(8)
    return replace(case, passes=passes, order=order, update=update)
