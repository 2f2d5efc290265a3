"""Programs, block by block: a source, residual branches, what happens to a stream on its way, an end."""

from __future__ import annotations

import contextlib

from fuzz import spellings as s
from fuzz.builder import Builder, Dropped
from fuzz.case import VOCABULARY
from fuzz.corners import corner

BATCH, TOKENS = 2, 5
WIDER = {"bf16": "f32", "f16": "f32", "f32": "f64"}


def program(b: Builder) -> None:
    """A whole program; sets ``b.result``."""
    b.width = b.pick((8, 8, 8, 8, 8, 6))
    b.dtype = b.pick(("f32",) * 16 + ("bf16", "f16", "f64"))
    kind = b.pick(("stream",) * 17 + ("space", "space", "shapes"))
    if kind == "space":
        return spatial(b)
    if kind == "shapes":
        return shapes(b)
    table, x = source(b)
    b.result = x
    for _ in range(b.pick((1, 1, 1, 2, 2))):
        x = on_the_way(b, x)
        b.result = x
        x = b.pick((residual,) * 6 + (post_norm, parallel, plain, corner, corner))(b, x)
        b.result = x
    b.result = end(b, x, table)
    return None


# ---- where a stream comes from -------------------------------------------------------------------


def source(b: Builder) -> tuple[str, str]:
    """(the embedding table or "", the stream [B, T, d] or [N, d])."""
    d = b.width
    kind = b.pick(
        ("linear", "linear", "input", "embedding", "embedding", "patches", "flat", "weight")
    )
    if kind == "embedding":
        table = b.weight((VOCABULARY, d), "matrix")
        ids = b.tensor("input", (BATCH, TOKENS), "normal", "i64")
        more = b.pick(
            ("", "", "", ", padding_idx=0", ", scale_grad_by_freq=True", ", max_norm=1.0")
        )
        x = b.line(f"F.embedding({ids}, {table}{more})")
        if b.dtype in WIDER and b.chance(4):
            x = b.line(f"{x}.to({WIDER[b.dtype]})")
        return table, position(b, x)
    if kind == "input":
        return "", b.input((BATCH, TOKENS, d))
    if kind == "flat":
        return "", s.linear(b, b.input((TOKENS, d - 2)), d)
    if kind == "patches":
        image = b.input((BATCH, 3, 4, 4))
        w = b.weight((d, 3, 2, 2), "matrix")
        c = b.weight((d,), "normal")
        y = b.line(f"F.conv2d({image}, {w}, {b.pick((c, 'None'))}, stride=2)")
        return "", position(b, b.line(f"{y}.flatten(2).transpose(1, 2)"))
    x = s.linear(b, b.input((BATCH, TOKENS, d - 2)), d)
    if kind == "weight":  # a stream that starts as a parameter: learned queries
        w = b.weight((1, TOKENS, d), "normal")
        y = b.line(f"{w}.expand({x}.shape[0], -1, -1)")
        return "", b.line(f"{y} + {x}") if b.chance(2) else y
    return "", position(b, x)


def position(b: Builder, x: str) -> str:
    """Learned positions and other tables, added."""
    d, tokens = b.shape(x)[-1], b.shape(x)[-2]
    kind = b.pick(("", "", "added", "sliced", "class", "scaled", "normed", "narrow"))
    if kind == "narrow":  # widened by a cast, or by the addition itself
        narrow = [one for one, wide in WIDER.items() if wide == b.kind(x)]
        w = b.weight((1, tokens, d), "normal", b.pick(narrow or [b.kind(x)]))
        return b.line(b.pick((f"{x} + {w}", f"{x} + {w}.to({b.kind(x)})")))
    if kind == "normed":
        w = b.weight((tokens, d), "normal")
        return b.line(f"{x} + {s.norm(b, w)}")
    if kind == "added":
        w = b.weight((1, tokens, d), "normal")
        return b.line(b.pick((f"{x} + {w}", f"{w} + {x}")))
    if kind == "sliced":
        w = b.weight((9, d), "normal")
        return b.line(f"{x} + {w}[:{x}.shape[1]]")
    if kind == "class":
        w = b.weight((1, 1, d), "normal")
        return b.line(f"torch.cat([{w}.expand({x}.shape[0], 1, {d}), {x}], dim=1)")
    if kind == "scaled":
        return b.line(f"{x} * {d**0.5!r}")
    return x


# ---- residual branches ---------------------------------------------------------------------------


def residual(b: Builder, x: str) -> str:
    """x + f(norm(x))."""
    y = s.after_norm(b, s.norm(b, x))
    if b.chance(6):
        b.extra.append(y)
    h = like(b, mixer(b, y, b.width), x)
    return add(b, x, branch_scale(b, h))


def post_norm(b: Builder, x: str) -> str:
    """norm(x + f(x))."""
    return s.norm(b, add(b, x, like(b, mixer(b, x, b.width), x)))


def parallel(b: Builder, x: str) -> str:
    """One norm, two readers, one addition."""
    y = s.after_norm(b, s.norm(b, x))
    one, two = mixer(b, y, b.width), mixer(b, y, b.width)
    return add(b, x, like(b, b.line(f"{one} + {two}"), x))


def plain(b: Builder, x: str) -> str:
    return s.norm(b, like(b, mixer(b, x, b.width), x))


def mixer(b: Builder, y: str, out: int) -> str:
    """What a branch computes: linear, feed-forward, gated, attention."""
    kind = b.pick(
        (
            "linear",
            "linear",
            "ffn",
            "gated",
            "fused",
            "attention",
            "attention",
            "conv",
            "transposed",
        )
    )
    if b.rank(y) != 3 and kind in ("attention", "conv", "transposed"):
        kind = "ffn"
    hidden = 2 * out
    if kind == "linear":
        return s.linear(b, y, out)
    if kind == "ffn":
        return s.linear(b, s.activation(b, s.linear(b, y, hidden)), out)
    if kind == "gated":
        up, gate = s.linear(b, y, hidden), s.activation(b, s.linear(b, y, hidden))
        return s.linear(b, b.line(b.pick((f"{gate} * {up}", f"{up} * {gate}"))), out)
    if kind == "fused":
        whole = s.linear(b, y, 2 * hidden)
        one, two = b.fresh(), b.fresh()
        halves = b.pick((f"{whole}.chunk(2, dim=-1)", f"torch.split({whole}, {hidden}, -1)", ""))
        if halves:
            b.statement(f"{one}, {two} = {halves}")
        else:
            b.line(f"{whole}[..., :{hidden}]", one)
            b.line(f"{whole}[..., {hidden}:]", two)
        gate, up = b.pick(((one, two), (two, one)))
        gate = s.activation(b, gate)
        return s.linear(b, b.line(b.pick((f"{gate} * {up}", f"{up} * {gate}"))), out)
    if kind == "conv":  # over tokens, depthwise or not
        d, dtype = b.shape(y)[-1], b.kind(y)
        groups = b.pick((1, d))
        w = b.weight((d, d // groups, 3), "matrix", dtype)
        return b.line(
            f"F.conv1d({y}.transpose(1, 2), {w}, None, padding=1, groups={groups}).transpose(1, 2)"
        )
    if kind == "transposed":
        d, dtype = b.shape(y)[-1], b.kind(y)
        w = b.weight((d, d, 1), "matrix", dtype)
        return b.line(f"F.conv_transpose1d({y}.transpose(1, 2), {w}).transpose(1, 2)")
    return s.attention(b, y)


def like(b: Builder, h: str, x: str) -> str:
    """The branch in the dtype of the stream."""
    return h if b.kind(h) == b.kind(x) else b.line(f"{h}.to({b.kind(x)})")


def branch_scale(b: Builder, h: str) -> str:
    """LayerScale, DropPath, dropout, constants: what stands between a branch and the addition."""
    d, rank, dtype = b.shape(h)[-1], b.rank(h), b.kind(h)
    kind = b.pick(("", "", "", "", "layer", "layer", "layer", "path", "drop", "constant", "zero"))
    if kind == "layer":
        spelled = b.pick(("vector", "vector", "rank", "view", "slice", "computed", "input"))
        if spelled == "input":
            return b.line(f"{h} * {b.input((d,), 'scale', dtype)}")
        wide = (1,) * (rank - 1) + (d,)
        shape = {"rank": wide, "slice": (d + 3,)}.get(spelled, (d,))
        w = b.weight(shape, "scale", dtype)
        if spelled == "view":
            w = b.line(f"{w}.view({', '.join(map(str, wide))})")
        elif spelled == "slice":
            w = b.line(f"{w}[:{d}]")
        elif spelled == "computed":
            w = b.line(f"1 + {w}")
        if b.chance(3):
            b.extra.append(h)
        return b.line(b.pick((f"{h} * {w}", f"{w} * {h}", f"torch.mul({h}, {w})")))
    if kind == "zero":  # ReZero: one number that is learned
        return b.line(f"{h} * {b.weight(b.pick(((), (1,), (1, 1, 1)[:rank])), 'scale', dtype)}")
    if kind == "path":
        factor = b.input((b.shape(h)[0], *(1,) * (rank - 1)), "keep", dtype)
        return b.line(b.pick((f"{h} * {factor}", f"{h}.div(0.7) * {factor}", f"{factor} * {h}")))
    if kind == "drop":
        p, active = b.pick(((0.3, False), (0.0, True), (0.3, True)))
        return b.line(f"F.dropout({h}, {p}, {active})")
    if kind == "constant":
        return b.line(b.pick((f"{h} * 0.5", f"{h} / 3.0", f"-{h}", f"2 * {h}", f"{h} * 1.0")))
    return h


def add(b: Builder, x: str, h: str) -> str:
    kind = b.pick(("+", "+", "+", "reversed", "alpha", "-", "+=", "add_", "into", "out"))
    if kind == "reversed":
        return b.line(f"{h} + {x}")
    if kind == "alpha":
        return b.line(f"torch.add({x}, {h}, alpha=0.5)")
    if kind == "-":
        return b.line(f"{x} - {h}")
    if kind == "+=":
        b.statement(f"{h} += {x}")
        return h
    if kind == "add_":
        return b.line(f"{x}.add_({h})") if b.chance(2) else b.line(f"{h}.add_({x})")
    if kind == "into":
        b.statement(f"{h}.add_({x})")
        return h
    return b.line(f"{x} + {h}")


# ---- what happens to a stream on its way ---------------------------------------------------------


def on_the_way(b: Builder, x: str) -> str:
    """Reindexing, pooling, casts: mostly nothing."""
    if not b.chance(3):
        return x
    d = b.shape(x)[-1]
    if b.rank(x) == 3 and b.chance(6):  # a buffer that is filled
        made = b.line(b.pick((f"torch.zeros_like({x})", f"{x}.new_zeros({x}.shape)")))
        b.statement(b.pick((f"{made}[:, 1:] = {x}[:, 1:]", f"{made}.copy_({x})", f"{made} += {x}")))
        return made
    choices = [
        f"{x}.clone()",
        f"{x} * 0.5",
        f"{x}.contiguous()",
        f"{x} + 0.1",
        f"{x}.flip(0)",
        f"{x}[:]",
    ]
    if b.rank(x) == 3:
        lead = f"{x}.shape[0], {x}.shape[1]"
        choices += [
            f"{x}[:, 1:]",
            f"{x}[:, ::2]",
            f"{x}[:, 0]",
            f"{x}[0]",
            f"torch.cat([{x}, {x}], dim=-1)[..., {d // 2}:{d // 2 + d}]",
            f"torch.cat({x}.chunk(2, dim=1)[::-1], dim=1)",
            f"{x}.mean(1)",
            f"{x}.sum(dim=1, keepdim=True)",
            f"{x}.reshape(-1, {d})",
            f"{x}.transpose(0, 1)",
            f"{x}.roll(1, 1)",
            f"torch.cat([{x}, {x}[:, :1]], dim=1)",
            f"torch.stack([{x}, {x} * 2.0], dim=1).mean(1)",
            f"F.pad({x}, (0, 0, 1, 0))",
            f"{x}.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1)",
            f"{x}.masked_fill({x}[..., :1] > 0.5, 0.0)",
            f"torch.where({x}[..., :1] > 0, {x}, torch.zeros_like({x}))",
            f"{x}.index_select(1, torch.tensor([2, 0, 1]))",
            f"{x}.unbind(1)[1]",
            f"{x}.view({lead}, 2, {d // 2}).flatten(2)",
            f"{x}.permute(1, 0, 2).contiguous().transpose(0, 1)",
            f"{x}.repeat(1, 2, 1)",
            f"F.avg_pool1d({x}.transpose(1, 2), 2).transpose(1, 2)",
        ]
    if b.kind(x) == "f32":
        choices += [f"{x}.to(bf16)", f"{x}.to(bf16).to(f32)", f"{x}.to(f64)", f"{x}.to(f32)"]
    return b.line(b.pick(choices))


# ---- the end -------------------------------------------------------------------------------------


def end(b: Builder, x: str, table: str) -> str:
    kind = b.pick(("norm", "head", "head", "head", "raw", "pooled"))
    if kind == "raw":
        return x
    if b.chance(5):
        b.extra.append(x)
    y = s.after_norm(b, s.norm(b, x))
    if kind == "norm":
        return y
    if kind == "pooled" and b.rank(y) == 3:
        y = b.line(b.pick((f"{y}.mean(1)", f"{y}[:, 0]", f"{y}[:, -1:]")))
    if table and b.chance(2) and b.shape(table)[-1] == b.shape(y)[-1]:
        with contextlib.suppress(Dropped):
            return b.line(b.pick((f"F.linear({y}, {table})", f"{y} @ {table}.t()")))
    return s.linear(b, y, 3)


def shapes(b: Builder) -> None:
    """Without weights, so that every size may be symbolic."""
    b.symbolic = True
    x = b.result = b.input((BATCH, TOKENS, b.width), "normal")
    y = b.input((BATCH, TOKENS, b.width), "normal")
    for _ in range(b.pick((1, 2))):
        h = b.line(f"F.layer_norm({x}, ({x}.shape[-1],), None, None, {b.pick(s.EPS)})")
        h = s.activation(b, b.line(b.pick((f"{h} * {y}", f"{h} @ {y}.transpose(1, 2) @ {y}", h))))
        x = b.result = add(b, x, h)
    b.result = b.line(f"F.layer_norm({x}, ({x}.shape[-1],))")


def spatial(b: Builder) -> None:
    """A ConvNet block: channels on axis 1, a norm over them behind a permute, a residual."""
    d = b.width
    image = b.input((BATCH, 3, 4, 4))
    w = b.weight((d, 3, 2, 2), "matrix")
    c = b.weight((d,), "normal")
    x = b.result = b.line(f"F.conv2d({image}, {w}, {c}, stride=2)")
    k = b.weight((d, 1, 3, 3), "matrix")
    y = b.line(f"F.conv2d({x}, {k}, None, padding=1, groups={d})")
    kind = b.pick(("layer", "layer", "batch", "group"))
    if kind == "layer":
        y = b.line(f"{y}.permute(0, 2, 3, 1)")
        y = s.linear(b, s.activation(b, s.linear(b, s.norm(b, y), 2 * d)), d)
        y = b.line(f"{branch_scale(b, y)}.permute(0, 3, 1, 2)")
    else:
        if kind == "batch":
            mean, var = b.tensor("buffer", (d,), "normal"), b.tensor("buffer", (d,), "positive")
            g, e = b.weight((d,), "scale"), b.weight((d,), "normal")
            y = b.line(f"F.batch_norm({y}, {mean}, {var}, {g}, {e}, {b.chance(2)}, 0.1, 1e-5)")
        else:
            y = b.line(f"F.group_norm({y}, 2)")
        up = b.weight((d, d, 1, 1), "matrix")
        y = b.line(f"F.conv2d({s.activation(b, y)}, {up})")
        scale = b.weight((d, 1, 1), "scale")
        y = b.line(f"{y} * {scale}") if b.chance(2) else y
    x = b.result = add(b, x, like(b, y, x))
    turn = b.pick(
        (f"{x}.permute(0, 2, 3, 1)", f"{x}.flatten(2).transpose(1, 2)", f"{x}.mean((2, 3))")
    )
    b.result = end(b, b.line(turn), "")
