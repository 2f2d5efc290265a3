"""How near results are to fp64, beside how near PyTorch's own are."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In fp64; integers as they are."""
    return [t.double() if t.is_floating_point() else t for t in tensors]


def squares(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squares of the errors, as shares of the exact values' own (where those are not all zero)."""
    pairs = zip(results, exact, strict=True)
    return torch.stack(
        [(r.double() - e).square().mean() / (e.square().mean() or 1.0) for r, e in pairs]
    )


def assert_as_near(
    ours: Sequence[torch.Tensor], aten: Sequence[torch.Tensor], rounding: float = 0.0
) -> None:
    """Over all cases, each output's root mean square error is at most 1.5 times that of its meaning.

    Args:
        ours, aten: what :func:`squares` gives, for each case.
        rounding: an error that is allowed where the meaning happens to be exact; at least two of float32.
    """
    bound = 1.5 * torch.stack(list(aten)).mean(0).sqrt()
    rounding = max(rounding, 2 * torch.finfo(torch.float32).eps)
    error = torch.stack(list(ours)).mean(0).sqrt()
    assert (error <= bound.clamp(min=rounding)).all(), f"{error.tolist()} > {bound.tolist()}"


def same_special_values(got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
    """NaN and infinities are where they are in fp64."""
    for g, e in zip(got, exact, strict=True):
        assert torch.equal(g.isnan(), e.isnan())
        assert torch.equal(g.isfinite(), e.isfinite())
        assert torch.equal(g[g.isinf()].double(), e[e.isinf()])
