"""Native operators and their generated kernels: built, loaded, and introduced to each other.

The operator (``runtime/ops/<name>.cpp``) checks tensors and finds a kernel by the text of its spec; what both
agree on stands in ``runtime/ops/<name>.h``. Each is built from one text, without files to include, so that the
hash of the text is the hash of all that was compiled.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
import threading

import torch

from sparsecc.runtime import native, ops

FLAGS = ("-march=native", "-ffp-contract=fast", "-fno-math-errno")
_OPERATORS = pathlib.Path(ops.__file__).parent
_KERNELS = pathlib.Path(__file__).parent
_lock = threading.Lock()


def text_of(*names: str) -> str:
    """Headers of operators and kernels, by file name, with what they include: a source needs no files."""
    found = []
    for name in names:
        path = next(p for p in (_KERNELS / name, _OPERATORS / name) if p.exists())
        text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
        found.append(re.sub(r'#include "(.+)"', lambda included: text_of(included[1]), text))
    return "\n".join(found)


def load(
    operator: str, dtype: torch.dtype, spec: str, source: str, flags: tuple[str, ...] = FLAGS
) -> pathlib.Path:
    """Make ``spec`` runnable by the native ``operator``; returns its library, whose source lies beside it.

    Args:
        dtype: of the tensors that the kernel is for.
        flags: of the compiler. The kernel that was loaded last for ``spec`` and ``dtype`` is the one that runs.

    Raises:
        BuildError: it cannot be built here.
    """
    with _lock:
        path, kernel = _kernel(operator, source, flags)
        register = getattr(library(operator), f"sparsecc_{operator}_register")
        register.argtypes, register.restype = (ctypes.c_char_p,) * 2 + (ctypes.c_void_p,), None
        register(str(dtype).removeprefix("torch.").encode(), spec.encode(), kernel)
        return path


@functools.cache
def _kernel(
    operator: str, source: str, flags: tuple[str, ...]
) -> tuple[pathlib.Path, ctypes.c_void_p]:
    path = native.library(f"{operator}_kernel", source, flags)
    kernel = getattr(ctypes.CDLL(str(path)), f"{operator}_kernel")
    kernel.restype = ctypes.c_void_p
    return path, ctypes.c_void_p(kernel())


@functools.cache
def library(operator: str) -> ctypes.CDLL:
    """The operator's own library, loaded: its implementation for CPU tensors is registered."""
    path = native.library(operator, text_of(f"{operator}.cpp"), libraries=("torch_cpu", "c10"))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))
