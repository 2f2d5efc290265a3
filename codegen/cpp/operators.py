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
_loaded: dict[tuple[str, str], pathlib.Path] = {}


def text_of(*names: str) -> str:
    """Headers of operators and kernels, by file name, to stand in a generated source."""
    found = []
    for name in names:
        path = next(p for p in (_KERNELS / name, _OPERATORS / name) if p.exists())
        found.append(path.read_text(encoding="utf-8").replace("#pragma once", ""))
    return "\n".join(found)


def load(operator: str, spec: str, source: str) -> pathlib.Path:
    """Make ``spec`` runnable by the native ``operator``; returns its library, whose source lies beside it.

    Raises:
        BuildError: it cannot be built here.
    """
    with _lock:
        known = _loaded.get((operator, spec))
        if known is not None:
            return known
        path = native.library(f"{operator}_kernel", source, FLAGS)
        kernel = getattr(ctypes.CDLL(str(path)), f"{operator}_kernel")
        kernel.restype = ctypes.c_void_p
        register = getattr(_library(operator), f"sparsecc_{operator}_register")
        register.argtypes, register.restype = (ctypes.c_char_p, ctypes.c_void_p), None
        register(spec.encode(), kernel())
        return _loaded.setdefault((operator, spec), path)


@functools.cache
def _library(operator: str) -> ctypes.CDLL:
    """The operator's own library, loaded: its implementation for CPU tensors is registered."""
    source = text_of(f"{operator}.cpp")
    source = re.sub(r'#include "(\w+\.h)"', lambda m: text_of(m.group(1)), source)
    path = native.library(operator, source, libraries=("torch_cpu", "c10"))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))
