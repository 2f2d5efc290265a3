"""Pre-norm streams without surprises: what layernorm-to-crmsnorm needs, and seldom meets elsewhere."""

from __future__ import annotations

from fuzz import spellings as s
from fuzz.builder import Builder
from fuzz.case import VOCABULARY

BATCH, TOKENS = 2, 5


def program(b: Builder) -> None:
    """A source, one or two residual branches behind LayerNorms, a norm and a head; sets ``b.result``."""
    d = b.width = b.pick((8, 8, 6, 5))
    b.dtype = b.pick(("f32",) * 8 + ("f64", "bf16"))
    table = ""
    if b.chance(2):
        table = b.weight((VOCABULARY, d), "matrix")
        ids = b.tensor("input", (BATCH, TOKENS), "normal", "i64")
        x = b.line(f"F.embedding({ids}, {table}) + {b.weight((1, TOKENS, d), 'normal')}")
    else:
        x = s.linear(b, b.input((BATCH, TOKENS, d - 2), "normal"), d)
    for _ in range(b.pick((1, 1, 2))):
        y = _norm(b, x)
        h = s.activation(b, s.linear(b, y, 2 * d))
        x = b.result = b.line(f"{x} + {s.linear(b, h, d)}")
    if b.chance(8):
        x = b.line(b.pick((f"{x}[:, 0]", f"{x}.mean(1)", f"{x}.flatten(0, 1)", f"{x}.cumsum(1)")))
    y = _norm(b, x)
    tied = table and b.rank(y) == 3 and b.chance(4)
    b.result = b.line(f"F.linear({y}, {table})") if tied else s.linear(b, y, 3)


def _norm(b: Builder, x: str) -> str:
    d, dtype = b.width, b.kind(x)
    w, c = b.weight((d,), "scale", dtype), b.weight((d,), "normal", dtype)
    w, c = b.pick(((w, c), (w, c), ("None", "None")))
    eps = b.pick(s.EPS)
    if b.chance(16):
        return b.line(f"F.rms_norm({x}, ({d},))")
    return b.line(f"F.layer_norm({x}, ({d},), {w}, {c}, {eps})")
