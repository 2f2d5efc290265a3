"""Hard things that Dynamo's graph can hold, each to stand in a branch of a residual network with norms
before, around and after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from support import Block, PreNorm, randomise
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

D = 16
NORMS = 4  # LayerNorms in `Around`, all of which read a stream that can be recentred
TO_RMS = "layernorm-to-rmsnorm"
FOLD = "fold-norm-affine"


class Around(nn.Module):
    """A residual network with ``hard(norm(x), *rest)`` in its first branch."""

    def __init__(self, hard: Callable[..., Any]) -> None:
        super().__init__()
        self.enter = nn.Linear(8, D)
        self.after = Block(D)
        self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm(D)
        self.hard = hard
        self.leave, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        x = self.enter(x)
        x = x + self.leave(self.hard(self.norm(x), *rest, **named))
        return self.head(self.last(self.after(x)))


class Small(nn.Module):
    """The same without the block: two norms, for what costs much to compile."""

    def __init__(self, hard: Callable[..., Any]) -> None:
        super().__init__()
        self.enter = nn.Linear(8, D)
        self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm(D)
        self.hard = hard
        self.leave, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        x = self.enter(x)
        x = x + self.leave(self.hard(self.norm(x), *rest, **named))
        return self.head(self.last(x))


def small(hard: Callable[..., Any]) -> nn.Module:
    return randomise(Small(hard))


class Tiny(nn.Module):
    """``pattern(y, x, *rest)`` behind one norm between two linear layers."""

    def __init__(self, pattern: Callable[..., Any] = lambda y, x: y) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.pattern = pattern

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        y = self.leave(self.norm(self.enter(x)))
        return self.pattern(y, x, *rest, **named)


def tiny(pattern: Callable[..., Any] = lambda y, x: y) -> nn.Module:
    return randomise(Tiny(pattern))


def around(hard: Callable[..., Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomise(Around(hard)).to(dtype)


def x64(*shape: int, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    value = torch.randn(shape or (2, 5, 8), generator=generator, dtype=torch.float64)
    return value.requires_grad_(grad)


def x32(*shape: int, grad: bool = False) -> torch.Tensor:
    return x64(*shape).float().requires_grad_(grad)


RMS = {TO_RMS: NORMS}
BOTH = {TO_RMS: NORMS, FOLD: NORMS}
ALL_BUT_HARD = {TO_RMS: NORMS, FOLD: NORMS - 1}  # the hard thing reads one norm, not a linear layer


def half_region(h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = h @ h.transpose(-1, -2) @ h
        with torch.autocast("cpu", enabled=False):
            h = h.float() @ torch.eye(D)
        return F.linear(h, torch.eye(D)).float()


def frozen_branch(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(h)
    with torch.set_grad_enabled(False):
        gate = gate * h.detach()
    return h * gate


runs = {"count": 0}


@torch.library.custom_op("sparsecc_test::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    runs["count"] += 1
    return x * 2


@counted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


counted.register_autograd(lambda ctx, grad: grad * 2)


tallies: Counter[str] = Counter()


@torch.library.custom_op("sparsecc_test::tally", mutates_args=())
def tally(x: torch.Tensor, name: str) -> torch.Tensor:
    """``3 x``, counted under ``name``: nobody may run it more or less often than the user asked."""
    tallies[name] += 1
    return x * 3


tally.register_fake(lambda x, name: torch.empty_like(x))
tally.register_autograd(lambda ctx, grad: (grad * 3, None))


@torch.library.custom_op("sparsecc_test::log_into", mutates_args=("store", "total"))
def log_into(x: torch.Tensor, store: torch.Tensor, total: torch.Tensor) -> None:
    """Writes two of its arguments and returns nothing."""
    store.copy_(x.detach())
    total.add_(x.detach().abs().mean())


log_into.register_fake(lambda x, store, total: None)


@torch.library.custom_op("sparsecc_test::opaque_sign", mutates_args=())
def opaque_sign(x: torch.Tensor) -> torch.Tensor:
    """Without a formula for autograd."""
    return x.sign()


opaque_sign.register_fake(torch.empty_like)


def checkpointed(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda v: torch.tanh(counted(torch.sin(v))), h, use_reentrant=False)


def saved_bytes(function: Callable[..., torch.Tensor], *args: Any) -> int:
    sizes = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        function(*args).sum()
    return sum(sizes.values())


class Checkpointed(PreNorm):
    """Half of the blocks are checkpointed."""

    def forward(self, tokens: torch.Tensor, use: bool = True) -> torch.Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if i % 2 == 0 and use else block(x)
        return self.head(self.norm(x))


class Wrong(torch.autograd.Function):
    """Its backward is not the gradient of its forward, on purpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 7


def branches(h: torch.Tensor) -> torch.Tensor:
    return torch.cond(h.sum() > 0, lambda v: v.sin() * 2, lambda v: v - 1, (h,))


def loop(h: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    start = torch.zeros((), dtype=torch.int64)
    return while_loop(lambda i, _: i < 3, lambda i, v: (i + 1, v * 0.5 + 1), (start, h))[1]


def scanned(h: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.scan import scan

    start = torch.zeros_like(h[:, 0])
    carry, rows = scan(lambda c, v: (c * 0.5 + v, c + v), start, h.transpose(0, 1).contiguous())
    return rows.transpose(0, 1) + carry[:, None]


TRANSFORMS = {
    "vmap": lambda h: torch.vmap(lambda r: r * r.mean())(h),
    "vmap of vmap": lambda h: torch.vmap(torch.vmap(lambda r: r - r.max()))(h),
    "grad": lambda h: torch.func.grad(lambda r: (r.sin() ** 2).sum())(h),
    "grad through a norm": lambda h: torch.func.grad(lambda r: (F.layer_norm(r, (D,)) ** 3).sum())(
        h
    ),
    "grad of grad": lambda h: torch.func.grad(
        lambda r: (torch.func.grad(lambda s: (s**3).sum())(r) ** 2).sum()
    )(h),
    "jvp": lambda h: torch.func.jvp(lambda r: torch.tanh(r) * r, (h,), (h,))[1],
    "jacrev": lambda h: h + torch.func.jacrev(lambda r: torch.tanh(r[0, 0]))(h).sum(0),
    "vmap of grad": lambda h: torch.vmap(torch.func.grad(lambda r: (r**3).sum()))(h),
}


class Cache(nn.Module):
    """A key-value cache kept as buffers and one passed in; every way of writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 9, D))
        self.register_buffer("values", torch.zeros(2, 9, D))

    def forward(self, h: torch.Tensor, position: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(1, position, h)
        self.values[:, position] = h * 2
        self.values[:, 7:] = h[:, :2]
        self.values[:, 0] += 1
        own[:, 1 : 1 + h.shape[1]] = h
        own.narrow(1, 0, 1).copy_(h[:, :1])
        scores = (h @ self.keys.transpose(-1, -2)).softmax(-1)
        return scores @ self.values + own.sum(1, keepdim=True)


class StaticCache:
    """As in transformers: tensors in a plain object, updated at a position that is a tensor."""

    def __init__(self) -> None:
        self.keys = torch.zeros(2, 9, D, dtype=torch.float64)

    def update(self, h: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(1, position, h)
        return self.keys


def rotate_in_place(h: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    extra.mul_(2).add_(h.sum())
    extra[extra > 0] = 1.5
    view = h[:, ::2].clone()
    view[..., :3].zero_()
    view.relu_()
    return h + view.sum() + extra.sum()


class Noisy(nn.Module):
    """BatchNorm over tokens, dropout where it does not touch the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.drop(self.norm(h))) + F.dropout(h, 0.2, self.training)


def shaped(h: torch.Tensor) -> torch.Tensor:
    """Sizes used as numbers, in views, and in arithmetic."""
    batch, tokens, d = h.shape
    h = h.reshape(batch, tokens, 4, d // 4).transpose(1, 2)
    weights = torch.arange(tokens, dtype=h.dtype).view(1, 1, tokens, 1) / tokens
    return (h * weights).transpose(1, 2).reshape(batch, -1, d) * batch**0.5


class Doubled(torch.Tensor):
    """A wrapper subclass: what quantized and distributed tensors are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Doubled:
        new = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        new.inner = inner
        return new

    def __repr__(self) -> str:  # PyTorch logs the inputs of a graph
        return "Doubled"

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: Any, context: Any, size: Any, stride: Any) -> Doubled:
        return Doubled(tensors["inner"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return Doubled(args[0].inner)
        args, kwargs = tree_map(
            lambda v: v.inner * 2 if isinstance(v, Doubled) else v, (args, kwargs or {})
        )
        return function(*args, **kwargs)
