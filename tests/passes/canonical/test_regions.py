"""Regions: between two autocast or grad-mode switches."""

from __future__ import annotations

import torch

from sparsecc.passes.analysis.regions import autocasts, is_switch, region, switch_between
from sparsecc.passes.base import Analyses

aten = torch.ops.aten


def regions(program):
    return region(program, Analyses(program))


def test_one_region_without_switches(capture):
    program = capture(lambda x: x.sin() + x, torch.randn(3))
    assert set(regions(program).values()) == {0}


def test_every_switch_starts_a_region(capture):
    def function(x):
        y = x.sin()
        with torch.no_grad():
            z = y.cos()
        return y * z

    program = capture(function, torch.randn(3, requires_grad=True), grad=True)
    found = regions(program)
    sine, cosine, product = (
        next(iter(program.calls(target)))
        for target in (aten.sin.default, aten.cos.default, aten.mul.Tensor)
    )
    assert found[sine] < found[cosine] < found[product]
    assert switch_between((sine, product), found)
    assert sum(map(is_switch, program.graph.nodes)) == 2
    assert not autocasts(program, Analyses(program))


def test_autocast_nests(capture):
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            a = x @ x
            with torch.autocast("cpu", enabled=False):
                b = x.sin()
            c = x.cos()
        return a + b + c

    program = capture(function, torch.randn(3, 3))
    inside = {str(node.target) for node in autocasts(program, Analyses(program))}
    assert "aten.matmul.default" in inside
    assert "aten.cos.default" in inside
    assert "aten.sin.default" not in inside
    assert "aten.add.Tensor" not in inside
