"""Generated Triton, from text to a function, and built for GPUs that need not be there.

Triton reads a function's source from its file, so a text is kept as one, beside the native libraries.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sparsecc.errors import BuildError, first_line
from sparsecc.runtime import native


@dataclass(frozen=True)
class Target:
    """One kind of GPU: its name in Triton, threads in a warp, bytes of shared memory for a program."""

    backend: str
    arch: int | str
    warp: int
    shared: int


# NVIDIA: CUDA C++ programming guide, "Technical specifications per compute capability" (shared memory per
# block, opt-in). AMD: CDNA 3 ISA, 64 KiB of LDS in a compute unit.
TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Built:
    """What one build needs of the GPU.

    Attributes:
        registers: vector registers of a thread.
        spills: registers kept in memory for want of room, in bytes stored.
        shared: bytes of shared memory that one program takes.
        assembly: PTX, or AMD's.
    """

    registers: int
    spills: int
    shared: int
    assembly: str


def available() -> str:
    """Why generated Triton cannot run here at all; empty where it can."""
    return "" if importlib.util.find_spec("triton") else "Triton is not installed"


@functools.cache
def load(name: str, source: str) -> ModuleType:
    """The module of a generated ``source``, whose file is ``<name>_<hash>.py`` in the cache folder.

    Raises:
        BuildError: Triton is not installed, the folder cannot be written, or the source is no Python.
    """
    if why := available():
        raise BuildError(f"{name}: {why}; install sparsecc[triton]")
    stem = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    try:
        path = _kept(native.folder() / f"{stem}.py", source)
        spec = importlib.util.spec_from_file_location(f"sparsecc_generated.{stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise BuildError(f"{stem}: {type(error).__name__}: {first_line(error)}") from error
    return module


def _kept(path: pathlib.Path, source: str) -> pathlib.Path:
    """The file of ``source``: whole, whoever else writes it at this moment, and anew where it was damaged."""
    try:
        if path.read_text(encoding="utf-8") == source:
            return path
    except (OSError, UnicodeDecodeError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(source)
    os.replace(part, path)
    return path


def build(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 1,
    targets: Mapping[str, Target] = TARGETS,
    multiples: Collection[str] = (),
) -> dict[str, Built]:
    """Build ``fn`` for each of ``targets``; no GPU is needed, and none is asked.

    Args:
        fn: a function of ``triton.jit`` (not of its interpreter).
        signature: each argument's type in Triton's words ("*bf16", "i32", "constexpr"). Pointers are taken
            for aligned to 16 bytes, as PyTorch's allocations are, and so as the JIT would build it.
        constants: the value of each "constexpr".
        multiples: numbers to be taken for multiples of 16, as the JIT finds most strides to be.

    Raises:
        BuildError: it does not compile for one of them; the message names which.
    """
    return {
        name: _build(
            fn, dict(signature), dict(constants), num_warps, num_stages, name, target, multiples
        )
        for name, target in targets.items()
    }


def _build(
    fn: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    name: str,
    target: Target,
    multiples: Collection[str],
) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = [
        i
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in multiples
    ]
    source = ASTSource(fn, signature, constants, {(i,): [["tt.divisibility", 16]] for i in known})
    try:
        made = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
    except Exception as error:
        words = first_line(error.__cause__ or error)
        raise BuildError(f"{fn.__name__} for {name}: {type(error).__name__}: {words}") from error
    if target.backend == "cuda":
        assembly = made.asm["ptx"]
        registers, spills = _of_ptxas(assembly, int(target.arch))
    else:
        assembly = made.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
        spills = 4 * target.warp * _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return Built(registers, spills, made.metadata.shared, assembly)


def _of_ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and bytes of spills, by the assembler that comes with Triton: what it built has neither."""
    import triton

    tools = triton.knobs.nvidia
    tool = tools.ptxas_blackwell if arch >= 100 else tools.ptxas
    (gpu,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder, "kernel.ptx")
        text.write_text(ptx, encoding="utf-8")
        order = [tool.path, "-v", "--regAllocOptLevel=2", f"--gpu-name={gpu}", str(text)]
        done = subprocess.run(
            [*order, "-o", str(text.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise BuildError(f"ptxas for {gpu}: {done.stderr[:400]}")
    return (
        _number(r"Used (\d+) registers", done.stderr),
        _number(r"(\d+) bytes spill stores", done.stderr),
    )


def _number(pattern: str, text: str) -> int:
    """The one number that ``pattern`` finds.

    Raises:
        BuildError: it finds none, or several: the tool's words have changed.
    """
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise BuildError(f"{len(found)} places say {pattern!r}, not one")
    return int(found[0])
