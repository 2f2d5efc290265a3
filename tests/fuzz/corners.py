"""Places that look like the left side of a law and are not legal, for the refusals that are rare otherwise."""

from __future__ import annotations

from collections.abc import Callable

from fuzz import spellings as s
from fuzz.builder import Builder

_WRITES = ("{}.add_(0.5)", "{}.mul_(2.0)", "{}[..., :1] = 0.25", "{}.neg_()")


def corner(b: Builder, x: str) -> str:
    """One of them, over the stream x [..., d]; the result is a stream again, mostly."""
    return b.pick(_CORNERS)(b, x)


def activation_written(b: Builder, x: str) -> str:
    """The gate is of the value before the write, the factor after it."""
    h = s.linear(b, x, b.width)
    gate = b.line(f"torch.sigmoid({h})")
    b.statement(b.pick(_WRITES).format(h))
    return b.line(f"{h} * {gate}")


def permuted(b: Builder, x: str) -> str:
    """An activation or a norm of a permuted value, which the caller gets."""
    h = s.linear(b, x, b.width)
    h = b.line(f"{h}.transpose(0, {b.pick((1, -1))})")
    y = b.pick((s.activation, s.spelled_layer_norm, s.spelled_rms_norm))(b, h)
    b.extra.append(y)
    return b.line(f"{x} * 2.0")


def norm_written(b: Builder, x: str) -> str:
    """The statistics are those of the value before the write."""
    h = s.linear(b, x, b.width)
    if b.chance(2):
        v = b.line(f"{h}.pow(2).mean(-1, keepdim=True)")
        b.statement(b.pick(_WRITES).format(h))
        return b.line(f"{h} * torch.rsqrt({v} + 1e-6)")
    c = b.line(f"{h} - {h}.mean(-1, keepdim=True)")
    v = b.line(f"{c}.pow(2).mean(-1, keepdim=True)")
    b.statement(b.pick(_WRITES).format(b.pick((c, h))))
    return b.line(f"{c} / torch.sqrt({v} + 1e-5)")


def norm_region(b: Builder, x: str) -> str:
    """The statistics are taken in another mode than the product."""
    h = s.linear(b, x, b.width)
    is_layer = b.chance(2)
    if is_layer:
        h = b.line(f"{h} - {h}.mean(-1, keepdim=True)")
    v = b.fresh()
    b.block(_region(b), [f"{v} = {h}.pow(2).mean(-1, keepdim=True)"])
    return b.line(f"{h} * torch.rsqrt({v} + 1e-6)")


def norm_half(b: Builder, x: str) -> str:
    h = b.line(f"{s.linear(b, x, b.width)}.to({b.pick(('bf16', 'f16'))})")
    return b.pick((s.spelled_layer_norm, s.spelled_rms_norm))(b, h)


def unstable(b: Builder, x: str) -> str:
    m = b.line(f"{x}.mean(-1, keepdim=True)")
    v = b.line(f"{x}.pow(2).mean(-1, keepdim=True) - {m}.pow(2)")
    return b.line(f"({x} - {m}) * torch.rsqrt({v} + 1e-2)")


def attention(b: Builder, x: str) -> str:
    """Softmax attention with one thing that the operator does not do."""
    if b.rank(x) != 3:
        return unstable(b, x)
    q, k, v = (s.linear(b, x, 4) for _ in range(3))
    kind = b.pick("broadcast dropout key dim used written half".split())
    if kind == "half":
        q, k, v = (b.line(f"{t}.to(bf16)") for t in (q, k, v))
    if kind == "broadcast":
        k, v = b.line(f"{k}[:1]"), b.line(f"{v}[:1]")
    turned = f"{k}.transpose(1, 2)"
    if kind == "key":
        turned = b.line(f"{turned}.contiguous()")
    p = b.line(f"{q} @ {turned} * 0.5")
    if kind == "written":
        b.statement(b.pick(_WRITES).format(b.pick((v, q))))
    p = b.line(f"torch.softmax({p}, {1 if kind == 'dim' else -1})")
    if kind == "dropout":
        p = b.line(f"F.dropout({p}, 0.5, True)")
    if kind == "used":
        b.extra.append(p)
    return s.linear(b, b.line(f"{p} @ {v}"), b.width)


def gated(b: Builder, x: str) -> str:
    """up * act(gate), with a write or a region between."""
    up, gate = s.linear(b, x, 4, False), s.linear(b, x, 4, False)
    a = b.line(f"F.silu({gate})")
    if b.chance(2):
        b.statement(b.pick(_WRITES).format(b.pick((up, gate))))
        y = b.line(f"{up} * {a}")
    else:
        y = b.fresh()
        b.block(_region(b), [f"{y} = {up} * {a}"])
    return s.linear(b, y, b.width)


def identity_layout(b: Builder, x: str) -> str:
    """A copy that is contiguous, of something that is not."""
    y = b.line(f"{x}[..., ::2] {b.pick(('* 1.0', '/ 1', '- 0.0'))}")
    return s.linear(b, y, b.width)


def inplace_layout(b: Builder, x: str) -> str:
    """The written view has strides that no fresh result would have."""
    whole = b.line(f"{x} * 2.0")
    y = b.line(f"{whole}[..., ::2]")
    b.statement(b.pick((f"{y}.add_(0.5)", f"{y} *= 2.0")))
    return s.linear(b, y, b.width)


def inplace_region(b: Builder, x: str) -> str:
    h = b.line(f"{x} * 2.0")
    b.block(_region(b), [b.pick(_WRITES).format(h)])
    return h


def scale_region(b: Builder, x: str) -> str:
    y, h = s.layer_norm(b, x), b.fresh()
    b.block(_region(b), [f"{h} = {y} * 0.5"])
    return h


def tied_scale(b: Builder, x: str) -> str:
    """λ on a linear map whose weight another one reads."""
    d = b.shape(x)[-1]
    w, scale = b.weight((d, d), "matrix"), b.weight((d,), "scale")
    one = b.line(f"F.linear({x}, {w}) * {scale}")
    return b.line(f"F.linear({one}, {w})")


def dropped(b: Builder, x: str) -> str:
    h = b.line(f"F.dropout({s.linear(b, x, b.width)}, 0.3, True)")
    return s.layer_norm(b, h)


def _region(b: Builder) -> str:
    return b.pick(("with torch.no_grad():", "with autocast('cpu', bf16):"))


_CORNERS: tuple[Callable[[Builder, str], str], ...] = (
    activation_written,
    *(permuted,) * 3,
    *(norm_written,) * 2,
    *(norm_region,) * 2,
    *(norm_half,) * 2,
    unstable,
    *(attention,) * 5,
    *(gated,) * 2,
    identity_layout,
    inplace_layout,
    inplace_region,
    scale_region,
    tied_scale,
    dropped,
)
