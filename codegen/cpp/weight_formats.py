"""How the formats of weights (``runtime/ops/formats.py``) are written in C++: structs, tensors, inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsecc.errors import BuildError
from sparsecc.runtime.ops.formats import MOST_INT8, Format

# A kernel's own dtype, that of x, operands and outputs, and the parts of weights: names here and in C++.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
TYPES = {
    torch.float32: ("kFloat32", "float"),
    torch.bfloat16: ("kBFloat16", "BFloat16"),
    torch.float16: ("kFloat16", "Half"),
    torch.int8: ("kInt8", "int8_t"),
    torch.uint8: ("kUInt8", "uint8_t"),
}
STORED = {torch.float32: "Float32", torch.bfloat16: "BFloat16"}  # codegen/cpp/storage.h's


def check(operator: str, forms: Sequence[Format], dtype: torch.dtype) -> None:
    """Whether there is a kernel of ``operator`` for these formats and for ``dtype``.

    Raises:
        BuildError: there is none.
    """
    emulated = [form.name for form in forms if form.kind == "fp4"]
    if emulated:
        names = ", ".join(emulated)
        raise BuildError(f"{operator}: {names}: emulated in ATen, no kernel reads it")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES.values())
        raise BuildError(f"{operator}: no kernel for {dtype}, but for {known}")


def law(forms: Sequence[Format], names: Sequence[str]) -> str:
    """A line that says how weights are kept; none where all are dense."""
    if all(form.name == "dense" for form in forms):
        return ""
    kept = ", ".join(f"{name} {form.name}" for name, form in zip(names, forms, strict=True))
    return f"\n// Weights: {kept} (runtime/ops/formats.py says what these are)."


def struct(form: Format, dtype: torch.dtype) -> str:
    """The struct of codegen/cpp/weights.h."""
    if form.kind == "float":
        return f"Dense<{TYPES[form.parts[0].dtype or dtype][1]}>"
    if form.kind == "int8":
        return f"Int8Groups<{form.together}>" if form.together else "Int8"
    name = "Int4A8" if form.rounds_activations else "Int4"
    return f"{name}<{form.group}, {str(form.zero).lower()}>"


def _quantized(form: Format) -> str:
    """Name of the activations as they are rounded for a format."""
    return "divided" if form.static else f"quantized{form.together or ''}"


def activations(form: Format, many: bool = False) -> tuple[str, str]:
    """Name and type of the activations that a format reads; ``many``: for many rows."""
    if not form.rounds_activations:
        return "floats", "Floats"
    if not form.together:
        return _quantized(form), "Quantized"
    kind = "Grouped" if many else "InGroups" if form.kind == "int8" else "Arranged"
    return f"{kind.lower()}{form.together}", f"{kind}<{form.together}>"


def arranged(forms: Sequence[Format], many: bool = False) -> list[str]:
    """The statements that arrange activations in groups as the formats read them, behind :func:`prologue`."""
    found = []
    for form in forms:
        if form.together:
            name, kind = activations(form, many)
            found.append(f"const {kind} {name}{{{_quantized(form)}}};")
    return list(dict.fromkeys(found))


def weight(form: Format, slot: slice, dtype: torch.dtype, size: str = "call->size") -> str:
    """The struct of a weight, from plain pointers."""
    fields = [
        f"static_cast<const {TYPES[part.dtype or dtype][1]}*>(call->parts[{slot.start + j}])"
        for j, part in enumerate(form.parts)
    ]
    if form.kind == "int4" and not form.zero:
        fields.append("nullptr")
    return f"{{{', '.join([*fields, size])}}}"


def parts(
    forms: Sequence[Format], slots: Sequence[slice], names: Sequence[str], dtype: torch.dtype
) -> str:
    """The tensors of all weights, as runtime/ops/parts.h has them."""
    return "\n".join(
        f'  {{"{name}\'s {part.name} ({form.name})", {TYPES[part.dtype or dtype][0]}, '
        f"{part.per}, {slot.start}}},"
        for name, form, slot in zip(names, forms, slots, strict=True)
        for part in form.parts
    )


def checks(forms: Sequence[Format], size: str = "call->size", of: str = "x") -> list[str]:
    """The statements that return what does not fit a format in the features that it reads, or ``of`` has."""
    lines = []
    for form in dict.fromkeys(forms):
        if form.multiple > 1:
            lines.append(
                f"  if ({size} % {form.multiple}) "
                f'return "{form.name}: the features of {of} are no multiple of {form.multiple}";'
            )
        if form.rounds_activations and of == "x":
            lines.append(
                f"  if ({size} > {MOST_INT8}) "
                f'return "{form.name}: x has more than {MOST_INT8} features, and int32 overflows";'
            )
    return lines


def prologue(
    forms: Sequence[Format], dtype: torch.dtype, norm: str = "none", eps: float = 0.0
) -> str:
    """The activations as the formats want them."""
    lines = [
        "const int64_t size = call->size;",
        "const Element* x = static_cast<const Element*>(call->x);",
    ]
    rounded = [form for form in forms if form.rounds_activations]
    kept = {_quantized(form): form for form in rounded}
    lines += [
        f"Quantized {name}(call->rows, size{f', {form.together}' if form.together else ''});"
        for name, form in sorted(kept.items())
    ]
    floats = len(rounded) < len(forms)
    steps = []  # for row m; y is the row so far
    same = dtype is torch.float32 and norm == "none"
    if same:
        steps.append("const float* y = x + m * size;")
    else:
        lines.append(f"Buffer<float> kept({'call->rows * size' if floats else '0'});")
        steps.append(f"float* y = {'kept.data() + m * size' if floats else 'row.data()'};")
    if dtype is not torch.float32:
        steps.append("to_floats(x + m * size, size, y);")
    if norm != "none":
        row = "x + m * size" if dtype is torch.float32 else "y"
        steps.append(f"{norm}_norm({row}, size, {eps!r}f, y);")
    steps += [
        f"{name}.set{'_divided' if form.static else ''}(m, y);"
        for name, form in sorted(kept.items())
    ]
    if kept or not same:
        lines.append("over_rows(*call, [&](int64_t begin, int64_t end) {")
        if not same and not floats:
            lines.append("  Buffer<float> row(size);")
        lines.append("  for (int64_t m = begin; m < end; ++m) {")
        lines += [f"    {step}" for step in steps]
        lines += ["  }", "});"]
    if floats:
        lines.append(f"const Floats floats{{{'x' if same else 'kept.data()'}, size}};")
    return "\n".join(f"  {line}" for line in lines)
