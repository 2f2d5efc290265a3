"""Small reproducers of what whole model zoos showed."""

from __future__ import annotations

import torch
from conformance.case import Case
from conformance.judge import judge
from support import PreNorm, ids, randomise


class ScalarIntoMask(torch.nn.Module):
    """``x[mask] = 0`` of integers traces to a constant tensor that no input holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PreNorm()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.clone()
        tokens[tokens > 9] = 0
        return self.inner(tokens)


def test_constants_of_the_trace_are_lowered() -> None:
    outcome = judge(Case(randomise(ScalarIntoMask()), (ids(),)))
    assert (outcome.status, outcome.words) == ("pass", "")
    assert outcome.rewrites["layernorm-to-rmsnorm"] == 5
