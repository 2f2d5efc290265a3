"""Linear maps whose weights meet: products, parts, the same map twice, constants behind one."""

from __future__ import annotations

from fuzz import blocks
from fuzz import spellings as s
from fuzz.builder import Builder

_MODES = ("with torch.no_grad():", "with autocast('cpu', bf16):")


def program(b: Builder) -> None:
    """A source and what becomes of it; sets ``b.result``."""
    b.width = b.pick((8, 8, 8, 6))
    b.dtype = b.pick(("f32",) * 10 + ("bf16", "f64"))
    _, x = blocks.source(b)
    b.result = x
    for _ in range(b.pick((1, 2))):
        x = b.result = meeting(b, x)


def meeting(b: Builder, x: str) -> str:
    """One of them, over the stream x [..., d]; the result is a stream again, mostly."""
    kinds = (product, product, window, window, part, part, twice, shift, shift, joined)
    return b.pick(kinds)(b, x)


def joined(b: Builder, x: str) -> str:
    """Two maps of one input, concatenated; now and then not of the same kind."""
    d, k, dtype = b.width, b.shape(x)[-1], b.kind(x)
    if b.rank(x) == 3 and b.chance(3):
        turned = b.line(f"{x}.transpose(1, 2).contiguous()")
        parts = []
        for _ in range(2):
            groups = b.pick((1, 1, 1, 2))
            w = b.weight((d, k // groups, 3), "matrix", dtype)
            bias = b.weight((d,), "normal", dtype) if b.chance(2) else "None"
            more = b.pick(("1, 1, 1", "1, 1, 1", "1, 1, 1", "1, 'same', 1"))
            parts.append(b.line(f"F.conv1d({turned}, {w}, {bias}, {more}, {groups})"))
        y = b.line(f"torch.cat(({parts[0]}, {parts[1]}), 1)")
        return b.line(f"{y}.transpose(1, 2)[..., :{d}]")
    parts = []
    for out in (d, b.pick((d, 3))):
        w = b.weight((out, k), "matrix", dtype)
        bias = b.weight((out,), "normal", dtype) if b.chance(2) else "None"
        if b.chance(6):
            parts.append(s.linear(b, x, out))
        elif b.chance(8):
            y = b.fresh()
            b.block(b.pick(_MODES), [f"{y} = F.linear({x}, {w})"])
            parts.append(b.line(f"{y}.to({dtype})"))
        else:
            parts.append(b.line(f"F.linear({x}, {w}, {bias})"))
        if b.chance(10):
            b.extra.append(parts[-1])
        if b.chance(10):
            b.statement(f"{x}.mul_(2.0)")
    y = b.line(f"torch.cat(({parts[0]}, {parts[1]}), -1)")
    return s.linear(b, y, d)


def product(b: Builder, x: str) -> str:
    """Two maps, and mostly nothing between."""
    d = b.width
    h = s.linear(b, x, b.pick((2 * d, 2 * d, 2)))
    rank = b.rank(h)
    kind = b.pick(("", "", "", "read", "view", "write", "region", "detach", "cast"))
    if kind == "read":
        b.extra.append(h)
    elif kind == "write":
        b.statement(f"{x}.mul_(2.0)")
    elif kind == "detach":
        h = b.line(f"{h}.detach()")
    elif kind == "cast":
        h = b.line(f"{h}.to(f64).to({b.kind(h)})")
    elif kind == "view" and rank == 3:
        k = b.shape(h)[-1]
        h = b.line(
            b.pick(
                (
                    f"{h}.transpose(0, 1)",
                    f"{h}[:, 1:]",
                    f"{h}.mean(1)",
                    f"{h}.view({h}.shape[0], -1, {k}).flip(1)",
                    f"{h}.unsqueeze(1).expand(-1, 2, -1, {k}).flatten(0, 1)",
                )
            )
        )
    elif kind == "region":
        y = b.fresh()
        b.block(b.pick(_MODES), [f"{y} = F.linear({h}, {b.weight((d, b.shape(h)[-1]), 'matrix')})"])
        return y
    return s.linear(b, h, d)


def window(b: Builder, x: str) -> str:
    """Two or three convolutions over the tokens."""
    d = b.shape(x)[-1]
    if b.rank(x) != 3:
        return product(b, x)
    h = b.line(f"{x}.transpose(1, 2)")
    for size in b.pick(((3, 1), (1, 3), (1, 1), (3, 1, 3), (1, 3, 1))):
        groups = b.pick((1, 1, 1, 1, 2, d))
        w = b.weight((d, d // groups, size), "matrix", b.kind(h))
        bias = b.pick(("None", "None", b.weight((d,), "normal", b.kind(h))))
        stride, dilation = b.pick(((1, 1), (1, 1), (2, 1), (1, 2)))
        padding = b.pick((0, dilation * (size // 2), size // 2, 1))
        if b.chance(8):
            h = b.line(f"F.conv_transpose1d({h}, {b.weight((d, d, 1), 'matrix', b.kind(h))})")
        h = b.line(f"F.conv1d({h}, {w}, {bias}, {stride}, {padding}, {dilation}, {groups})")
    return b.line(f"{h}.transpose(1, 2)")


def part(b: Builder, x: str) -> str:
    """A wide map of which some features are read."""
    d = b.width
    grouped = b.rank(x) == 3 and b.chance(6)
    if grouped:
        k = b.shape(x)[-1]
        w = b.weight((3 * k, 1, 1), "matrix", b.kind(x))
        y = b.line(f"F.conv1d({x}.transpose(1, 2), {w}, None, groups={k}).transpose(1, 2)")
    else:
        y = s.linear(b, x, 3 * d)
    if b.rank(y) == 3:
        y = b.line(b.pick((y, y, f"{y}.transpose(0, 1)", f"{y}[:, 1:]", f"torch.relu({y})")))
    if b.chance(6):
        b.extra.append(y)
    kind = b.pick(("one", "ends", "ends", "chunk", "step", "write", "strides", "tied"))
    if kind == "ends":
        return b.line(f"{y}[..., :{d}] * {y}[..., {2 * d}:]")
    if kind == "chunk":
        return b.line(f"{y}.chunk(3, dim=-1)[{b.pick((0, 1, -1))}]")
    if kind == "step":
        return b.line(f"{y}[..., 1 : {d + 1} : 2].repeat_interleave(2, dim=-1)")
    z = b.line(b.pick((f"{y}[..., {d}:-{d}]", f"{y}.narrow(-1, 2, {d})", f"{y}[..., -{d}:]")))
    if kind == "write":
        b.statement(f"{z}.relu_()" if b.chance(2) else f"{z}[0] *= 3.0")
    if kind == "strides":
        return b.line(f"{z}.as_strided({z}.shape, {z}.stride()) * 2.0")
    return z


def twice(b: Builder, x: str) -> str:
    """The same map of the same value, or nearly."""
    d, k = b.width, b.shape(x)[-1]
    w = b.weight((d, k), "matrix", b.kind(x))
    call = f"F.linear({x}, {w})"
    one = b.line(call)
    kind = b.pick(("", "", "returned", "write", "region", "branch"))
    if kind == "write":
        b.statement(b.pick((f"{x}.mul_(2.0)", f"{one}.mul_(2.0)", f"{one}[0] *= 3.0")))
    if kind == "region":
        two = b.fresh()
        b.block(b.pick(_MODES), [f"{two} = {call}"])
    else:
        two = b.line(call)
    if kind == "returned":
        b.extra += [one, two]
    if kind == "branch":
        v = b.weight((d, d), "matrix", b.kind(x))
        one, two = (b.line(f"F.linear(torch.tanh({h}), {v})") for h in (one, two))
    return b.line(f"{one} * torch.tanh({two})")


def shift(b: Builder, x: str) -> str:
    """A constant vector behind a map, or behind a sum that a map takes part in."""
    d = b.shape(x)[-1]
    h = s.linear(b, x, d)
    if b.chance(3):
        h = b.line(b.pick((f"{x} + {h}", f"{h} + {x}", f"{x} - {h}", f"{h} + {h}")))
    kind = b.pick(("", "", "", "read", "write", "region", "slice"))
    if kind == "read":
        b.extra.append(h)
    if kind == "slice" and b.rank(h) == 3:
        h = b.line(f"{h}[:, 1:]")
    c = b.weight(b.pick(((d,), (d,), (1, d))), "normal", b.kind(h))
    if kind == "region":
        y = b.fresh()
        b.block(b.pick(_MODES), [f"{y} = {h} + {c}"])
        return y
    sums = (
        f"{h} + {c}",
        f"{c} + {h}",
        f"{h} - {c}",
        f"torch.add({h}, {c}, alpha=0.5)",
        f"{c} - {h}",
    )
    y = b.line(b.pick(sums))
    if kind == "write":
        b.statement(f"{y}[0] *= 3.0")
    return y
