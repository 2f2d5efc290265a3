"""Convolutional networks: convolutions of every kind, BatchNorm before and behind them, branches, joins."""

from __future__ import annotations

from fuzz import spellings as s
from fuzz.builder import Builder

BATCH, CHANNELS, SIDE = 2, 4, 6


def program(b: Builder) -> None:
    """A few layers over an image [B, C, H, W]; sets ``b.result``."""
    b.dtype = b.pick(("f32",) * 10 + ("bf16", "f16", "f64"))
    x = b.result = b.input((BATCH, CHANNELS, SIDE, SIDE), "normal")
    for _ in range(b.pick((2, 2, 3))):
        x = b.result = b.pick(_LAYERS)(b, x)
    if b.chance(2):
        pooled = b.line(b.pick((f"{x}.mean((2, 3))", f"F.adaptive_avg_pool2d({x}, 1).flatten(1)")))
        b.result = s.linear(b, batch_norm(b, pooled) if b.chance(2) else pooled, 3)


def convolution(b: Builder, x: str, out: int = 0, kernel: int = 0, stride: int = 0) -> str:
    """x [B, C, H, W] -> [B, out, H', W']; the size is kept where the stride is 1."""
    c = b.shape(x)[1]
    out, kernel = out or b.pick((4, 4, 6, 8)), kernel or b.pick((3, 3, 1, 5))
    groups = b.pick((1, 1, 1, 2, c)) if c % 2 == 0 and out % c == 0 else 1
    stride = stride or b.pick((1, 1, 1, 2))
    bias = b.weight((out,), "normal") if b.chance(2) else "None"
    if kernel == 3 and b.chance(6):
        w = b.weight((c, out // groups, 3, 3), "matrix")
        return b.line(f"F.conv_transpose2d({x}, {w}, {bias}, {stride}, 1, {stride - 1}, {groups})")
    w = b.weight((out, c // groups, kernel, kernel), "matrix")
    padding = "'same'" if stride == 1 and b.chance(6) else str(kernel // 2)
    if kernel == 3 and stride == 1 and b.chance(8):
        return b.line(f"F.conv2d({x}, {w}, {bias}, 1, 2, 2, {groups})")
    return b.line(f"F.conv2d({x}, {w}, {bias}, {stride}, {padding}, 1, {groups})")


def batch_norm(b: Builder, x: str) -> str:
    c = b.shape(x)[1]
    mean, var = b.tensor("buffer", (c,), "normal"), b.tensor("buffer", (c,), "positive")
    g, e = ("None", "None") if b.chance(6) else (b.weight((c,), "scale"), b.weight((c,), "normal"))
    if b.chance(8) and b.rank(x) == 4 and g != "None":  # FrozenBatchNorm, by hand
        t = b.line(f"{g} * ({var} + 1e-5).rsqrt()")
        shift = b.line(f"{e} - {mean} * {t}")
        return b.line(f"{x} * {t}.reshape(1, -1, 1, 1) + {shift}.reshape(1, -1, 1, 1)")
    return b.line(f"F.batch_norm({x}, {mean}, {var}, {g}, {e}, {b.chance(12)}, 0.1, 1e-5)")


def normalized(b: Builder, x: str) -> str:
    """convolution, BatchNorm, and often an activation."""
    y = batch_norm(b, convolution(b, x))
    return y if b.chance(3) else s.activation(b, y)


def progressive(b: Builder, x: str) -> str:
    """RepBN: BatchNorm and a multiple of its input."""
    y = batch_norm(b, x)
    share = b.pick((x, f"{x} * 0.5", f"{b.weight((1,), 'scale')} * {x}"))
    y = b.line(b.pick((f"{y} + {share}", f"{share} + {y}")))
    return convolution(b, y, kernel=1) if b.chance(2) else y


def before(b: Builder, x: str) -> str:
    """BatchNorm before a convolution, with or without an activation between."""
    y = batch_norm(b, x)
    y = s.activation(b, y) if b.chance(2) else y
    return convolution(b, y)


def branches(b: Builder, x: str) -> str:
    """RepVGG: convolutions of one input and the input itself, each with its BatchNorm, summed."""
    c = b.shape(x)[1]
    out, stride = b.pick((c, c, 8)), b.pick((1, 1, 1, 2))
    total = ""
    for kernel in b.pick(((3, 1), (3, 1), (5, 3), (3, 3, 1), (3,))):
        y = convolution(b, x, out, kernel, stride)
        y = y if b.chance(4) else batch_norm(b, y)
        total = b.line(f"{total} + {y}") if total else y
    if stride == 1 and out == c and b.chance(2):
        y = batch_norm(b, x) if b.chance(2) else x
        total = b.line(b.pick((f"{total} + {y}", f"{y} + {total}")))
    return s.activation(b, total) if b.chance(2) else total


def mixer(b: Builder, x: str) -> str:
    """FastViT: the input, and the scaled difference of two convolutions and its BatchNorm."""
    c = b.shape(x)[1]
    y, z = (batch_norm(b, convolution(b, x, c, kernel, 1)) for kernel in (3, 1))
    total = b.line(b.pick((f"{y} + {z} - {batch_norm(b, x)}", f"{y} - {x} * 2", f"-{y} - {z}")))
    scale = b.weight((1, c, 1, 1), "scale")
    return b.line(b.pick((f"{x} + {total} * {scale}", f"{scale} * {total} - {x}")))


def joined(b: Builder, x: str) -> str:
    """BatchNorm over a sum or a concatenation."""
    out, kernel = b.pick((4, 6)), b.pick((1, 3))
    y, z = convolution(b, x, out, kernel, 1), convolution(b, x, out, 3, 1)
    join = b.pick((f"{y} + {z}", f"torch.cat(({y}, {z}), 1)", f"torch.cat(({y}, {x}), 1)"))
    return batch_norm(b, b.line(join))


def twice(b: Builder, x: str) -> str:
    """Two convolutions with nothing between, or a part of the channels."""
    y = convolution(b, x, b.pick((8, 12)))
    if b.chance(3):
        return b.line(f"{y}[:, :4]")
    return convolution(b, y, 4)


def residual(b: Builder, x: str) -> str:
    c = b.shape(x)[1]
    y = batch_norm(b, convolution(b, x, c, 3, 1))
    return b.line(f"{x} + {y}")


def shifted(b: Builder, x: str) -> str:
    """A constant vector added, LayerScale, or the average of neighbours."""
    c = b.shape(x)[1]
    kind = b.pick(("add", "scale", "pool"))
    if kind == "pool":
        return b.line(f"F.avg_pool2d({x}, 3, 1, 1)")
    y = convolution(b, x, c, 0, 1)
    v = b.weight((1, c, 1, 1), "normal" if kind == "add" else "scale")
    return b.line(f"{y} {'+' if kind == 'add' else '*'} {v}")


_LAYERS = (
    *(normalized,) * 5,
    *(branches,) * 3,
    *(before, before, joined, joined, progressive, twice, residual, shifted, mixer),
)
