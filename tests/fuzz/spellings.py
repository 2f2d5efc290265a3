"""The spellings of one idea: linear maps, norms, activations, attention, residual additions."""

from __future__ import annotations

from fuzz.builder import Builder

EPS = ("1e-5", "1e-6", "1e-12", "1e-2")


# ---- linear maps ---------------------------------------------------------------------------------


def linear(b: Builder, x: str, out: int, bias: bool | None = None) -> str:
    """x [..., k] -> [..., out]."""
    k, dtype = b.shape(x)[-1], b.kind(x)
    bias = b.chance(2) if bias is None else bias
    kind = b.pick(_LINEARS if b.rank(x) == 3 else _LINEARS[:-3])
    vector = b.weight((out,), "normal", dtype) if bias else "None"
    if kind == "linear":
        w = b.weight((out, k), "matrix", dtype)
        return b.line(f"F.linear({x}, {w}, {vector})")
    if kind == "sliced":
        w = b.weight((out + 2, k), "matrix", dtype)
        part = b.line(f"{w}[:{out}]")
        return b.line(f"F.linear({x}, {part}, {vector})")
    if kind == "computed":
        w = b.weight((out, k), "matrix", dtype)
        made = b.line(
            b.pick(
                (
                    f"{w} * 0.5",
                    f"{w}.to(f32).to({dtype})",
                    f"{w} + {w}",
                    f"{w}.detach()",
                    f"{w} / {w}.norm(dim=1, keepdim=True)",
                    f"{w}.t().contiguous().t()",
                )
            )
        )
        return b.line(f"F.linear({x}, {made}, {vector})")
    if kind == "einsum":
        w = b.weight((out, k), "matrix", dtype)
        y = b.line(f"torch.einsum('...i,oi->...o', {x}, {w})")
    elif kind == "transposed":
        w = b.weight((out, k), "matrix", dtype)
        y = b.line(f"{x} @ {w}.{b.pick(('t()', 'transpose(0, 1)', 'mT'))}")
    elif kind == "flat":
        w = b.weight((k, out), "matrix", dtype)
        flat = b.line(f"{x}.reshape(-1, {k})")
        calls = [f"torch.mm({flat}, {w})", f"{flat} @ {w}"]
        if bias:
            calls += [f"torch.addmm({vector}, {flat}, {w})"] * 3
            calls.append(f"torch.addmm({vector}, {flat}, {w}, beta=0.5, alpha=2.0)")
        call = b.pick(calls)
        y = b.line(call)
        lead = "".join(f"{x}.shape[{i}], " for i in range(b.rank(x) - 1))
        y = b.line(f"{y}.view({lead}{out})")
        bias = bias and "addmm" not in call
    elif kind == "conv1d":
        w = b.weight((out, k, 1), "matrix", dtype)
        turned = b.line(f"{x}.transpose(1, 2)")
        y = b.line(f"F.conv1d({turned}, {w}, {vector}).transpose(1, 2)")
        return y
    elif kind == "bmm":
        w = b.weight((k, out), "matrix", dtype)
        y = b.line(f"torch.bmm({x}, {w}.expand({x}.shape[0], {k}, {out}))")
    elif kind == "conv2d":
        w = b.weight((out, k, 1, 1), "matrix", dtype)
        turned = b.line(f"{x}.transpose(1, 2).unsqueeze(-1)")
        y = b.line(f"F.conv2d({turned}, {w}, {vector}).squeeze(-1).transpose(1, 2)")
        return y
    else:
        w = b.weight((k, out), "matrix", dtype)
        y = b.line(b.pick((f"{x} @ {w}", f"torch.matmul({x}, {w})")))
    return b.line(b.pick((f"{y} + {vector}", f"{vector} + {y}"))) if bias else y


_LINEARS = (
    *("linear",) * 8,
    *("matmul", "matmul", "transposed", "flat", "flat", "sliced", "computed", "einsum"),
    *("conv1d", "bmm", "conv2d"),
)


# ---- norms ---------------------------------------------------------------------------------------


def norm(b: Builder, x: str) -> str:
    """A normalization of x, over its last axis unless drawn otherwise."""
    kind = b.pick(_NORMS)
    return kind(b, x)


def layer_norm(b: Builder, x: str) -> str:
    d, dtype = b.shape(x)[-1], b.kind(x)
    if dtype in ("bf16", "f16") and b.chance(
        3
    ):  # a half-precision model whose norms are kept in float
        dtype = "f32"
    w = b.weight((d,), "scale", dtype) if not b.chance(5) else "None"
    c = b.weight((d,), "normal", dtype) if w != "None" and not b.chance(5) else "None"
    if w != "None" and b.chance(12):  # modulated by an input, not by a weight
        w = b.input((d,), "scale", dtype)
    return b.line(f"F.layer_norm({x}, ({x}.shape[-1],), {w}, {c}, {b.pick(EPS)})")


def spelled_layer_norm(b: Builder, x: str) -> str:
    x = _in_float(b, x)
    m = b.line(
        b.pick((f"{x}.mean(-1, keepdim=True)", f"{x}.sum(-1, keepdim=True) / {b.shape(x)[-1]}"))
    )
    d = b.line(f"{x} - {m}")
    eps = b.pick(EPS)
    v = b.line(
        b.pick(
            (
                f"({d} * {d}).mean(-1, keepdim=True)",
                f"{d}.pow(2).mean(-1, keepdim=True)",
                f"{x}.var(-1, unbiased=False, keepdim=True)",
                f"torch.var({d}, dim=-1, correction=0, keepdim=True)",
                f"{x}.var(-1, keepdim=True)",  # unbiased: another function
                f"(({x} * {x}).mean(-1, keepdim=True) - {m} * {m})",
            )
        )
    )
    y = b.line(
        b.pick(
            (
                f"{d} * torch.rsqrt({v} + {eps})",
                f"{d} / torch.sqrt({v} + {eps})",
                f"{d} / ({v} + {eps}) ** 0.5",
                f"(1 / torch.sqrt({eps} + {v})) * {d}",
                f"{d} / (torch.sqrt({v}) + 1e-3)",  # eps outside: another function
                f"{d} / ({x}.std(-1, keepdim=True) + 1e-3)",
            )
        )
    )
    return _affine(b, y, shift=not b.chance(3))


def rms_norm(b: Builder, x: str) -> str:
    d, dtype = b.shape(x)[-1], b.kind(x)
    w = b.weight((d,), "scale", dtype) if not b.chance(4) else "None"
    return b.line(f"F.rms_norm({x}, ({d},), {w}, {b.pick(('None', *EPS))})")


def spelled_rms_norm(b: Builder, x: str) -> str:
    dtype = b.kind(x)
    wide = _in_float(b, x)
    eps = b.pick(EPS)
    v = b.line(
        b.pick(
            (f"{wide}.pow(2).mean(-1, keepdim=True)", f"({wide} * {wide}).mean(-1, keepdim=True)")
        )
    )
    y = b.line(
        b.pick(
            (
                f"{wide} * torch.rsqrt({v} + {eps})",
                f"{wide} / torch.sqrt({v} + {eps})",
                f"{wide} * ({v} + {eps}).pow(-0.5)",
            )
        )
    )
    if b.chance(2) and b.kind(y) != dtype:
        y = b.line(f"{y}.to({dtype})")  # Llama rounds before the weight
    y = _affine(b, y, shift=b.chance(6))
    return b.line(f"{y}.to({dtype})") if b.kind(y) != dtype else y


def batch_norm(b: Builder, x: str) -> str:
    """Over the features, as channels."""
    d, dtype = b.shape(x)[-1], b.kind(x)
    mean = b.tensor("buffer", (d,), "normal", dtype)
    var = b.tensor("buffer", (d,), "positive", dtype)
    w, c = b.weight((d,), "scale", dtype), b.weight((d,), "normal", dtype)
    call = f"{mean}, {var}, {w}, {c}, {b.chance(3)}, 0.1, 1e-5)"
    if b.rank(x) == 2:
        return b.line(f"F.batch_norm({x}, {call}")
    # Without the copy PyTorch traces other strides than the operator returns: aot_eager raises on its own.
    turned = b.line(f"{x}.transpose(1, -1).contiguous()")
    return b.line(f"F.batch_norm({turned}, {call}.transpose(1, -1)")


def odd_norm(b: Builder, x: str) -> str:
    """A LayerNorm over other axes than the features, or over more."""
    shape, dtype = b.shape(x), b.kind(x)
    if len(shape) == 3 and b.chance(2):
        turned = b.line(f"{x}.transpose(1, 2)")
        return b.line(f"F.layer_norm({turned}, ({shape[1]},)).transpose(1, 2)")
    axes = shape[-2:]
    w = b.weight(axes, "scale", dtype) if b.chance(2) else "None"
    return b.line(f"F.layer_norm({x}, {axes}, {w}, None, {b.pick(EPS)})")


_NORMS = (
    *(layer_norm,) * 8,
    *(spelled_layer_norm,) * 3,
    *(rms_norm, rms_norm, spelled_rms_norm, spelled_rms_norm),
    *(batch_norm, odd_norm),
)


def _in_float(b: Builder, x: str) -> str:
    """Half precision is widened, mostly; and now and then float is narrowed, or cast to itself."""
    if b.kind(x) in ("bf16", "f16"):
        return x if b.chance(4) else b.line(f"{x}.to(f32)")
    if b.kind(x) == "f32" and b.chance(8):
        return b.line(f"{x}.to({b.pick(('f32', 'bf16'))})")
    return x


def _affine(b: Builder, y: str, shift: bool) -> str:
    d, dtype = b.shape(y)[-1], b.kind(y)
    if b.chance(5):
        return y
    shape = (*(1,) * (b.rank(y) - 1), d) if b.chance(6) else (d,)
    w = b.weight(shape, "scale", b.pick((dtype, dtype, dtype, "f32")))
    y = b.line(
        b.pick((f"{y} * {w}", f"{w} * {y}", f"{y} * (1 + {w})", f"{y} * (1.0 + {w}.to(f32))"))
    )
    if shift:
        c = b.weight((d,), "normal", b.kind(y))
        y = b.line(b.pick((f"{y} + {c}", f"{c} + {y}")))
    return y


def after_norm(b: Builder, y: str) -> str:
    """LayerNorm Scaling's constant, a factor that is an input, a cast and back."""
    kind = b.pick(("", "", "", "", "", "", "scale", "scale", "input", "cast"))
    if kind == "scale":
        return b.line(b.pick((f"{y} * 0.70710678", f"{y} / 2.0", f"0.5 * {y}", f"{y} * -1.5")))
    if kind == "input":
        factor = b.input((b.shape(y)[-1],), "scale", b.kind(y))
        return b.line(f"{y} * (1 + {factor})")
    if kind == "cast" and b.kind(y) == "f32":
        return b.line(f"{y}.to(bf16).to(f32)")
    return y


# ---- activations ---------------------------------------------------------------------------------


def activation(b: Builder, x: str) -> str:
    expression = b.pick(
        (
            f"F.relu({x})",
            f"F.gelu({x})",
            f"F.gelu({x}, approximate='tanh')",
            f"F.silu({x})",
            f"torch.tanh({x})",
            f"{x} * torch.sigmoid({x})",
            f"torch.sigmoid({x}) * {x}",
            f"{x} / (1 + torch.exp(-{x}))",
            f"0.5 * {x} * (1 + torch.tanh(0.7978845608028654 * ({x} + 0.044715 * {x}.pow(3))))",
            f"{x} * 0.5 * (1.0 + torch.erf({x} / 1.4142135623730951))",
            f"{x} * torch.sigmoid(1.702 * {x})",
            f"F.leaky_relu({x})",
            f"F.relu({x}).square()",
        )
    )
    if "sigmoid" in expression and b.chance(2):  # in two lines, so that something may come between
        gate = b.line(f"torch.sigmoid({x})")
        return b.line(b.pick((f"{x} * {gate}", f"{gate} * {x}")))
    return b.line(expression)


# ---- attention -----------------------------------------------------------------------------------


def attention(b: Builder, x: str) -> str:
    """Self-attention over x [B, T, d], two heads."""
    d = b.shape(x)[-1]
    if b.rank(x) != 3 or d % 2:
        return linear(b, x, d)
    if b.chance(3):
        packed = linear(b, x, 3 * d)
        q, k, v = b.fresh(), b.fresh(), b.fresh()
        b.statement(f"{q}, {k}, {v} = {packed}.chunk(3, dim=-1)")
    else:
        q, k, v = linear(b, x, d), linear(b, x, d), linear(b, x, d)
    lead = f"{x}.shape[0], {x}.shape[1]"
    q, k, v = (b.line(f"{t}.reshape({lead}, 2, {d // 2}).transpose(1, 2)") for t in (q, k, v))
    if b.chance(3):
        causal = b.chance(2)
        y = b.line(f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal={causal})")
    else:
        y = _spelled_attention(b, q, k, v, d // 2)
    y = b.line(
        b.pick((f"{y}.transpose(1, 2).reshape({lead}, {d})", f"{y}.permute(0, 2, 1, 3).flatten(2)"))
    )
    return linear(b, y, d)


def _spelled_attention(b: Builder, q: str, k: str, v: str, d: int) -> str:
    if b.chance(6):
        q = b.line(f"{q} * {d**-0.5!r}")
    if b.chance(8):  # grouped queries: one head of keys, broadcast
        k = b.line(f"{k}[:, :1]")
    if b.chance(8):
        stored = b.line(f"{k}.transpose(-1, -2).contiguous()")
        s = b.line(f"{q} @ {stored}")
    else:
        s = b.line(f"{q} @ {k}.{b.pick(('transpose(-1, -2)', 'mT', 'permute(0, 1, 3, 2)'))}")
    steps = ["scale", "mask"] if b.chance(2) else ["scale"]
    if len(steps) == 2 and b.chance(5):
        steps.reverse()
    for step in steps:
        if step == "scale":
            s = b.line(b.pick((f"{s} * {d**-0.5!r}", f"{s} / {d**0.5!r}")))
        else:
            s = _masked(b, s)
    dim = b.pick((-1,) * 9 + (-2,))
    p = b.line(f"torch.softmax({s}, dim={dim})")
    drop = b.pick(("", "", "", "", "", "False", "True"))
    if drop:
        p = b.line(f"F.dropout({p}, 0.5, {drop})")
    return b.line(f"{p} @ {v}")


def _masked(b: Builder, s: str) -> str:
    shape, dtype = b.shape(s), b.kind(s)
    kind = b.pick(("add", "add", "add", "rows", "fill"))
    if kind == "fill":
        mask = b.line(f"torch.ones_like({s}).triu(1) > 0")
        return b.line(f"{s}.masked_fill({mask}, -1e4)")
    mask = b.input(shape[-2:] if kind == "add" else (shape[0], 1, 1, shape[-1]), "normal", dtype)
    return b.line(f"{s} + {mask}")
