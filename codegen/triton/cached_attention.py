"""Triton for ``sparsecc::cached_attention``: the cache is read once, where it lies, by all that share it.

Three kernels: ``write`` puts the new keys and values into the cache; ``attend`` takes all queries of one head
of the cache through one chunk of it (Dao et al., "Flash-Decoding for long-context inference", 2023), with sums
in float32; ``combine`` puts the chunks together. One to four queries have products of their own, as matrix
units would compute sixteen; more are one operand of ``tl.dot``. Chunks follow from sizes alone, and so do the
bits. ``run`` is in ``launch_attention.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.codegen.triton.few_rows import DTYPES
from sparsecc.runtime.ops.cached_attention import Spec

MASKS = ("none", "bool", "added")
MOST_APART = 4  # queries with products of their own
_LEAST_DOT = 16  # rows of ``tl.dot``
_MOST_DOT = 64
_SUMS = 2048  # of a program, at most: they must fit the registers
_PROGRAMS = 512  # some for each multiprocessor of a large GPU

_LAW = """#   k' = {k}, written into keys[position]; v into values[position]
#   out[t] = softmax over {s} of ({score}) times values[s]"""


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: keys of a tile, warps, and tiles loaded ahead."""

    block_s: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_s} keys, {self.warps} warps, {self.stages} stages"


def _power(size: int) -> int:
    """The smallest power of two that ``size`` fits, and ``tl.dot`` takes."""
    return max(_LEAST_DOT, 1 << (size - 1).bit_length())


def configs(spec: Spec, tokens: int, dtype: torch.dtype) -> list[Config]:
    """Those worth measuring, the one to take unmeasured first."""
    tile = 2048 // max(_power(spec.size), _power(spec.value_size))  # what registers hold easily
    if tokens * spec.groups <= MOST_APART:
        cuts = [(tile, 4, 1), (tile, 4, 2), (2 * tile, 4, 2), (2 * tile, 8, 1)]
    elif dtype is torch.float32:
        cuts = [(tile, 8, 1), (2 * tile, 8, 1), (tile, 4, 1)]
    else:
        cuts = [(2 * tile, 8, 2), (2 * tile, 4, 1), (2 * tile, 4, 2), (4 * tile, 8, 2)]
        if _row_block(spec, tokens * spec.groups) > _LEAST_DOT:  # what does not spill first
            cuts = [cuts[1], cuts[0], *cuts[2:]]
    found = [Config(min(max(s, 16), 128), warps, stages) for s, warps, stages in cuts]
    return list(dict.fromkeys(found))


def chunk(programs: int, length: int, config: Config) -> int:
    """How many keys one program goes through: whole tiles, fewer where there are few programs else.

    Args:
        programs: of one chunk.
        length: of the cache.
    """
    tiles = max(-(-length // config.block_s), 1)
    return config.block_s * -(-tiles // min(max(_PROGRAMS // programs, 1), tiles))


def row_blocks(spec: Spec, tokens: int) -> int:
    """How many programs share the queries of one head of the cache and one chunk of it."""
    rows = tokens * spec.groups
    return 1 if rows <= MOST_APART else -(-rows // _row_block(spec, rows))


def _row_block(spec: Spec, rows: int) -> int:
    return max(_LEAST_DOT, min(_power(rows), _MOST_DOT, _SUMS // _power(spec.value_size)))


def source(spec: Spec, tokens: int, mask: str) -> str:
    """The Triton of one spec for ``tokens`` new tokens, to be read: its law first.

    Args:
        mask: "none", "bool" or "added".

    Raises:
        ValueError: no tokens, or no such mask.
    """
    if tokens < 1 or mask not in MASKS:
        raise ValueError(
            f"cached_attention in Triton: {tokens} tokens, mask {mask!r}; at least 1, {', '.join(MASKS)}"
        )
    name = f"cached_attention_{hashlib.sha256(spec.text().encode()).hexdigest()[:8]}"
    rows, turn = tokens * spec.groups, spec.rotary
    s = "s with mask[t, s]" if mask == "bool" else "s"
    score = f"scale {'R ' * turn}q[t] . keys[s]{' + mask[t, s]' * (mask == 'added')}"
    law = _LAW.format(k="R k" if turn else "k", s=s, score=score)
    if turn:
        law += "\n# R turns the pairs (i, i + size/2) by the angles of cos and sin."
    apart = rows <= MOST_APART
    names = ["combine", "weigh"]
    if turn:
        names.append("rotated")
    if not apart and mask != "none":
        names += ["is_finite", "not_finite"]
    body = _apart(spec, rows, mask) if apart else _together(spec, rows, mask)
    return f"""# {name}: Triton, {tokens} new tokens; float32, bfloat16 or float16, with sums in float32.
{law}
# q [B, H*{spec.groups}, T, {spec.size}], k [B, H, T, {spec.size}], v [B, H, T, {spec.value_size}];
# keys [B, H, S, {spec.size}], values [B, H, S, {spec.value_size}]; <tensor>_<axis> are strides.

import triton
import triton.language as tl

from sparsecc.codegen.triton.attention import {", ".join(sorted(names))}

__all__ = ["attend", "combine", "write"]


{_write(spec, tokens)}


{body}"""


# ---- arguments ---------------------------------------------------------------------------------------


def write_arguments(spec: Spec) -> list[str]:
    """Those of ``write``, in its order."""
    tensors = {"k": "bht", "v": "bht", "keys": "bhs", "values": "bhs"}
    turn = {"cos": "bt", "sin": "bt"} if spec.rotary else {}
    return [*tensors, "positions", *turn, *_strides({**tensors, **turn}), "heads", "length"]


def attend_arguments(spec: Spec, mask: str) -> list[str]:
    """Those of ``attend``, in its order, before its constants."""
    tensors = {"q": "bht", "keys": "bhs", "values": "bhs"}
    if spec.rotary:
        tensors |= {"cos": "bt", "sin": "bt"}
    if mask != "none":
        tensors["mask"] = "bhts"
    sizes = ["heads", "length", "chunks", "each"]
    return [*tensors, "scratch", "scale", *_strides(tensors), *sizes]


def _strides(tensors: dict[str, str]) -> list[str]:
    return [f"{name}_{axis}" for name, axes in tensors.items() for axis in axes]


def constants(config: Config) -> dict[str, Any]:
    """The constants of ``attend``."""
    return {"BLOCK_S": config.block_s, "STAGES": config.stages}


def combine_constants(spec: Spec, tokens: int) -> dict[str, Any]:
    """The constants of ``combine``."""
    block = _power(spec.value_size)
    sizes = {"T": tokens, "GROUPS": spec.groups, "SIZE": spec.value_size}
    return {**sizes, "BLOCK_C": max(min(4096 // block, 32), 1), "BLOCK_D": block}


def signature(names: Sequence[str], dtype: torch.dtype, mask: str) -> dict[str, str]:
    """The types of the arguments ``names`` and of constants in capitals, for ``build``."""
    known = {"positions": "*i64", "scratch": "*fp32", "scale": "fp32"}
    known["mask"] = "*i1" if mask == "bool" else "*fp32"
    known |= dict.fromkeys(("heads", "length", "chunks", "each"), "i32")

    def kind(name: str) -> str:
        if name.isupper():
            return "constexpr"
        return known.get(name) or ("i64" if "_" in name else f"*{DTYPES[dtype]}")

    return {name: kind(name) for name in names}


# ---- the text ----------------------------------------------------------------------------------------


def _lines(lines: Sequence[str], depth: int = 1) -> str:
    return "\n".join("    " * depth + line for line in lines)


def _arguments(names: Sequence[str], *constants: str) -> str:
    """A list of arguments, a few on each line."""
    shown = [*names, *(f"{name}: tl.constexpr" for name in constants)]
    return "\n".join("    " + ", ".join(shown[i : i + 8]) + "," for i in range(0, len(shown), 8))


def _features(spec: Spec) -> list[str]:
    d, i = _power(spec.size), _power(spec.value_size)
    return [f"d, i = tl.arange(0, {d}), tl.arange(0, {i})"]


def _write(spec: Spec, tokens: int) -> str:
    """The kernel that writes the cache: one new token of one head a program."""
    size, value_size = spec.size, spec.value_size
    key = f"tl.load(k + d, mask=d < {size}, other=0.0)"
    lines = [
        "program = tl.program_id(0).to(tl.int64)",
        f"t, h, b = program % {tokens}, program // {tokens} % heads, program // {tokens} // heads",
        *_features(spec),
        "position = tl.load(positions + t)",
        "inside = (position >= 0) & (position < length)  # elsewhere nothing is written",
        "k += b * k_b + h * k_h + t * k_t",
        "v += b * v_b + h * v_h + t * v_t",
        "keys += b * keys_b + h * keys_h + position * keys_s",
        "values += b * values_b + h * values_h + position * values_s",
    ]
    if spec.rotary:
        lines += [f"{x} += b * {x}_b + t * {x}_t" for x in ("cos", "sin")]
        key = f"rotated(k, cos, sin, d, d < {size}, {size})"
    lines += [
        f"key = {key}",
        f"value = tl.load(v + i, mask=i < {value_size}, other=0.0)",
        f"tl.store(keys + d, key, mask=inside & (d < {size}))",
        f"tl.store(values + i, value, mask=inside & (i < {value_size}))",
    ]
    return f"@triton.jit\ndef write(\n{_arguments(write_arguments(spec))}\n):\n{_lines(lines)}"


def _programs(spec: Spec, mask: str, blocks: int) -> list[str]:
    """What is common to the queries of a program."""
    head, block = "program // chunks", []
    if blocks > 1:
        block = [f"block = program // chunks % {blocks}"]
        head = f"program // chunks // {blocks}"
    return [
        "program = tl.program_id(0).to(tl.int64)",
        "chunk = program % chunks",
        *block,
        f"head = {head}",
        "h, b = head % heads, head // heads",
        "begin = (chunk * each).to(tl.int32)",
        "end = tl.minimum(begin + each, length)",
        *_features(spec),
        "keys += b * keys_b + h * keys_h",
        "values += b * values_b + h * values_h",
        f"q += b * q_b + h * {spec.groups} * q_h",
        *(["cos, sin = cos + b * cos_b, sin + b * sin_b"] if spec.rotary else []),
        *([f"mask += b * mask_b + h * {spec.groups} * mask_h"] if mask != "none" else []),
    ]


_TILE = ["s = start + tl.arange(0, BLOCK_S)", "inside = s < length", "far = s.to(tl.int64)"]


def _cache(name: str, feature: str, size: int, cast: str = "") -> list[str]:
    """A tile of keys or values: what no query of the program sees is not read."""
    place = f"{name}s + (far * {name}s_s)[:, None] + {feature}[None, :]"
    return [
        f"here = live[:, None] & ({feature} < {size})[None, :]",
        f"{name} = tl.load({place}, mask=here, other=0.0){cast}",
    ]


def _apart(spec: Spec, rows: int, mask: str) -> str:
    """Queries with products of their own."""
    each = range(rows)
    lines = _programs(spec, mask, 1)
    for r in each:
        t, g = divmod(r, spec.groups)
        lines += [f"x{r} = q + {g} * q_h + {t} * q_t"]
        if spec.rotary:
            angles = f"cos + {t} * cos_t, sin + {t} * sin_t"
            lines += [f"query{r} = rotated(x{r}, {angles}, d, d < {spec.size}, {spec.size})"]
        else:
            load = f"tl.load(x{r} + d, mask=d < {spec.size}, other=0.0)"
            lines += [f"query{r} = {load}.to(tl.float32)"]
        if mask != "none":
            lines += [f"mask{r} = mask + {g} * mask_h + {t} * mask_t"]
        lines += [
            f'largest{r}, total{r} = float("-inf"), 0.0',
            f"sums{r} = tl.zeros([{_power(spec.value_size)}], tl.float32)",
        ]
    lines += ["for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):"]
    loop = [*_TILE]
    for r in each:
        load = f"tl.load(mask{r} + far * mask_s, mask=inside, other="
        if mask == "none":
            loop += [f"seen{r} = inside"]
        elif mask == "bool":
            loop += [f"seen{r} = {load}0) != 0"]
        else:
            loop += [f'bias{r} = {load}float("-inf")).to(tl.float32)']
            loop += [f'seen{r} = bias{r} != float("-inf")']
    loop += ["live = " + " | ".join(f"seen{r}" for r in each)]
    loop += _cache("key", "d", spec.size, ".to(tl.float32)")
    for r in each:
        score = (
            f"tl.sum(key * query{r}[None, :], axis=1) * scale{f' + bias{r}' * (mask == 'added')}"
        )
        loop += [
            f'score{r} = tl.where(seen{r}, {score}, float("-inf"))',
            f"weight{r}, share{r}, largest{r}, total{r} = weigh(score{r}, largest{r}, total{r}, 0)",
        ]
    loop += _cache("value", "i", spec.value_size, ".to(tl.float32)")
    for r in each:
        part = f"tl.where(seen{r}[:, None], weight{r}[:, None] * value, 0.0)"
        loop += [f"sums{r} = sums{r} * share{r} + tl.sum({part}, axis=0)"]
    lines += ["    " + line for line in loop]
    lines += [
        f"every = tl.num_programs(0).to(tl.int64) * {rows}",
        f"place = (head * chunks + chunk) * {rows}",
        f"maxima, totals = scratch + every * {spec.value_size}, scratch + every * {spec.value_size + 1}",
    ]
    for r in each:
        at = f"(place + {r})"
        lines += [
            f"tl.store(scratch + {at} * {spec.value_size} + i, sums{r}, mask=i < {spec.value_size})",
            f"tl.store(maxima + {at}, largest{r})",
            f"tl.store(totals + {at}, total{r})",
        ]
    return _attend(spec, mask, lines)


def _attend(spec: Spec, mask: str, lines: Sequence[str]) -> str:
    arguments = _arguments(attend_arguments(spec, mask), "BLOCK_S", "STAGES")
    return f"@triton.jit\ndef attend(\n{arguments}\n):\n{_lines(lines)}\n"


def _together(spec: Spec, rows: int, mask: str) -> str:
    """Queries as one operand of a matrix product."""
    block = _row_block(spec, rows)
    blocks = -(-rows // block)
    lines = _programs(spec, mask, blocks)
    lines += [
        f"r = {f'block * {block} + ' * (blocks > 1)}tl.arange(0, {block}).to(tl.int64)",
        f"rows = r < {rows}",
        f"t, g = r // {spec.groups}, r % {spec.groups}",
        "x = q + g * q_h + t * q_t",
        f"here = rows[:, None] & (d < {spec.size})[None, :]",
    ]
    if spec.rotary:
        angles = "(cos + t * cos_t)[:, None], (sin + t * sin_t)[:, None]"
        query = f"rotated(x[:, None], {angles}, d[None, :], here, {spec.size})"
        lines += [f"query = {query}.to(q.dtype.element_ty)"]
    else:
        lines += ["query = tl.load(x[:, None] + d[None, :], mask=here, other=0.0)"]
    given = [
        "query",
        "rows",
        "keys",
        "values",
        "scale",
        "begin",
        "end",
        "length",
        "keys_s",
        "values_s",
    ]
    if mask != "none":
        lines += ["mask += g * mask_h + t * mask_t"]
        given += ["mask", "mask_s"]
    call = f"largest, total, sums = tiles({', '.join(given)}, BLOCK_S"
    if mask == "none":
        lines += [f"{call}, STAGES)"]
    else:
        lines += [
            f"{call}, STAGES, False)",
            "if tl.max(tl.where(is_finite(sums), 0, 1)) > 0:  # by a value that not every row sees?",
            f"    {call}, 1, True)",
        ]
    size = spec.value_size
    lines += [
        f"every = tl.num_programs(0).to(tl.int64) // {blocks} * {rows}",
        f"place = (head * chunks + chunk) * {rows} + r",
        f"maxima, totals = scratch + every * {size}, scratch + every * {size + 1}",
        f"inside = rows[:, None] & (i < {size})[None, :]",
        f"tl.store(scratch + place[:, None] * {size} + i[None, :], sums, mask=inside)",
        "tl.store(maxima + place, largest, mask=rows)",
        "tl.store(totals + place, total, mask=rows)",
    ]
    return f"{_tiles(spec, block, mask, given)}\n\n\n{_attend(spec, mask, lines)}"


def _tiles(spec: Spec, block: int, mask: str, given: Sequence[str]) -> str:
    """The function that takes one block of queries through one chunk."""
    load = "tl.load(mask[:, None] + (far * mask_s)[None, :], mask=here, other="
    loop = [*_TILE, "here = rows[:, None] & inside[None, :]"]
    if mask == "none":
        loop += ["live, seen = inside, here"]
    else:
        if mask == "bool":
            loop += [f"seen = {load}0) != 0"]
        else:
            loop += [f'bias = {load}float("-inf")).to(tl.float32)', 'seen = bias != float("-inf")']
        loop += ["live = tl.max(seen.to(tl.int32), axis=0) > 0"]
    product = 'tl.dot(query, tl.trans(key), input_precision="ieee") * scale'
    loop += [
        *_cache("key", "d", spec.size),
        f"score = {product}{' + bias' * (mask == 'added')}",
        'score = tl.where(seen, score, float("-inf"))',
        "weight, share, largest, total = weigh(score, largest, total, 1)",
        *_cache("value", "i", spec.value_size),
        "sums *= share[:, None]",
    ]
    if mask != "none":
        loop += [
            "if CAREFUL:",
            "    sums += not_finite(seen, value)",
            "    value = tl.where(is_finite(value), value, 0.0)",
        ]
    loop += ['sums = tl.dot(weight.to(value.dtype), value, sums, input_precision="ieee")']
    lines = [
        *_features(spec),
        f'largest = tl.full([{block}], float("-inf"), tl.float32)',
        f"total = tl.zeros([{block}], tl.float32)",
        f"sums = tl.zeros([{block}, {_power(spec.value_size)}], tl.float32)",
        "for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):",
        *("    " + line for line in loop),
        "return largest, total, sums",
    ]
    names = ["BLOCK_S", "STAGES", *(["CAREFUL"] if mask != "none" else [])]
    return f"@triton.jit\ndef tiles(\n{_arguments(given, *names)}\n):\n{_lines(lines)}"
