"""What kernels of ``sparsecc::cached_attention`` are tried on, whatever their language; what near is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from sparsecc.runtime.ops.cached_attention import Spec, meaning, rotate

SPECS = {
    "llama": Spec(64, 64, 3, True),
    "one head each": Spec(32, 32, 1, True),
    "odd": Spec(33, 17, 2, False),
    "one": Spec(1, 1, 1, False),
    "values wider": Spec(48, 80, 4, True),
    "large": Spec(256, 256, 2, True),
}
MASKS = ("none", "causal", "padded", "added", "minus infinity", "by head")


def inputs(
    name: str,
    batch: int,
    tokens: int,
    length: int,
    mask: str,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    heads: int = 3,
) -> list[Any]:
    """The arguments of a call; masks that are added are of ``dtype``."""
    spec = SPECS[name]
    q = torch.randn(batch, tokens, heads * spec.groups, spec.size).transpose(1, 2)
    k = torch.randn(batch, tokens, heads, spec.size).transpose(1, 2)
    v = torch.randn(batch, tokens, heads, spec.value_size).transpose(1, 2)
    keys = torch.randn(batch, heads, length, spec.size)
    values = torch.randn(batch, heads, length, spec.value_size)
    positions = torch.arange(start, start + tokens)
    angles = torch.randn(1, 1, tokens, spec.size)
    rotation = [angles.cos(), angles.sin()] if spec.rotary else []
    args = [q, k, v, keys, values, positions, rotation, _mask(mask, q, keys, positions)]
    return own([*args, spec.size**-0.5, spec.text()], dtype, device)


def _mask(kind: str, q: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> Any:
    batch, heads, tokens, _ = q.shape
    length = keys.shape[2]
    if kind == "none":
        return None
    causal = torch.arange(length)[None] <= positions[:, None]
    if kind == "causal":
        return causal[None, None]
    if kind == "padded":
        padding = torch.arange(length)[None] >= torch.arange(batch)[:, None]
        return (causal[None] & padding[:, None])[:, None].expand(batch, heads, tokens, length)
    if kind == "by head":
        return torch.randn(heads, 1, length)
    bias = torch.randn(batch, 1, tokens, length)
    return bias if kind == "added" else bias.masked_fill(~causal, -torch.inf)


def wide(args: list[Any]) -> list[Any]:
    return [own(a, torch.float64) for a in args]


def own(value: Any, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """A copy with the same strides, so that the caches of another call stay as they were."""
    if isinstance(value, list):
        return [own(v, dtype, device) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    kind = dtype if value.is_floating_point() else None
    return value.to(device or value.device, kind or value.dtype, copy=True)


def seen_only(*args: Any) -> torch.Tensor:
    """The meaning, query by query over the keys that its mask lets it see: what a kernel may read."""
    whole = meaning(*args)  # writes the cache
    q, _, _, keys, values, _, rotation, mask, scale, _ = args
    q = rotate(q, *rotation)
    groups = q.shape[1] // keys.shape[1]
    bias = mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf)
    bias = bias.expand(*q.shape[:3], keys.shape[2])
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        seen = bias[b, h, t] != -torch.inf
        scores = keys[b, h // groups, seen] @ q[b, h, t] * scale + bias[b, h, t, seen]
        whole[b, t, h] = torch.softmax(scores, 0) @ values[b, h // groups, seen]
    return whole


def check(run: Callable[..., torch.Tensor], *cases: list[Any]) -> None:
    """Over all cases, the root mean square error is at most 1.5 times that of the meaning; caches are right."""
    ours, aten = [], []
    rounding = torch.finfo(cases[0][0].dtype).eps
    for args in cases:
        mine, plain, exact = own(args), own(args), wide(args)
        got, expected, truth = run(*mine), meaning(*plain), meaning(*exact)
        assert got.shape == truth.shape
        assert got.dtype is args[0].dtype
        assert got.is_contiguous()
        scale = truth.square().mean()
        ours.append((got - truth).square().mean() / scale)
        aten.append((expected - truth).square().mean() / scale)
        for i in (3, 4):
            unit = rounding * exact[i].abs().amax()
            assert (mine[i] - exact[i]).abs().amax() <= 2 * unit
            new = torch.zeros(args[3].shape[2], dtype=torch.bool, device=got.device)
            untouched = ~new.index_fill(0, args[5], True)
            assert torch.equal(mine[i][:, :, untouched], args[i][:, :, untouched])
    bound = 1.5 * torch.stack(aten).mean().sqrt()
    # Where the meaning happens to be exact: one rounding of the result, and two of float32.
    least = max(2 * torch.finfo(torch.float32).eps, rounding / 2)
    assert torch.stack(ours).mean().sqrt() <= max(bound, least)


def check_special_values(
    run: Callable[..., torch.Tensor], args: list[Any], place: int, special: float
) -> None:
    """A NaN or infinity in q, k, v or a cache is where it is in the meaning, read as a kernel may."""
    args[place][1, 2, 1, 3] = special
    got, expected = run(*own(args)), seen_only(*wide(args))
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isfinite(), expected.isfinite())


def _without_last(a: list[Any], i: int) -> list[Any]:
    return [*a[:i], a[i][..., :-1], *a[i + 1 :]]


# What is said of wrong arguments -> how to make them from right ones.
WRONG: dict[str, Callable[[list[Any]], list[Any]]] = {
    "sizes of keys": lambda a: _without_last(a, 3),
    "sizes of v ": lambda a: _without_last(a, 2),
    "not of the sizes that the kernel was made for": lambda a: _without_last(
        _without_last(a, 2), 4
    ),
    "a rotation is missing": lambda a: [*a[:6], [], *a[7:]],
    "a rotation is cos and sin": lambda a: [*a[:6], a[6][:1], *a[7:]],
    "does not broadcast": lambda a: [*a[:7], a[7][..., :-1], *a[8:]],
    "mask must be bool or float32": lambda a: [*a[:7], a[7].double(), *a[8:]],
    "features of keys must be contiguous": lambda a: [*a[:3], a[3].mT.contiguous().mT, *a[4:]],
}
