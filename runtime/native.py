"""C++ that is built on the user's machine, once, and kept.

A library's file name holds a hash of all that decides its machine code (source, flags, compiler, PyTorch,
Python, CPU) and one of its own bytes. It is built in a folder of its own under a lock and moved into place
whole: builders at the same time wait for one, a killed build leaves nothing that is ever loaded, and a damaged
file is built anew.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Generic, TypeVar

import filelock
import torch

from sparsecc import _torch
from sparsecc.errors import BuildError, first_line

log = logging.getLogger("sparsecc")

T = TypeVar("T")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")
SECONDS = 600.0  # for one build, and for waiting for another builder of the same


def folder() -> pathlib.Path:
    """Where built libraries are kept: beside what Inductor keeps."""
    return pathlib.Path(_torch.cache_folder()) / "sparsecc"


def library(
    name: str, source: str, flags: Sequence[str] = (), libraries: Sequence[str] = ()
) -> pathlib.Path:
    """The shared library of a C++ ``source``, built unless it is kept.

    Args:
        name: what its file is called, before the hashes.
        flags: of the compiler, beside ``FLAGS`` and PyTorch's and Python's headers.
        libraries: of PyTorch, to link against ("torch_cpu").

    Raises:
        BuildError: there is no compiler, it fails, or the folder cannot be written.
    """
    try:
        compiler = _torch.cpp_compiler()
        command = [compiler, *FLAGS, *flags, *_platform(libraries)]
        stem = f"{name}-{_hash(source, *command, _version(compiler), *machine())}"
        home = folder()
        found = _kept(home, stem)
        if found is None:
            home.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(home / f"{stem}.lock", timeout=SECONDS):
                found = _kept(home, stem) or _build(home, stem, source, command)
        return found
    except BuildError:
        raise
    except filelock.Timeout as error:
        raise BuildError(
            f"{name}: another process has been building it for {SECONDS:.0f} s"
        ) from error
    except Exception as error:  # no compiler, no space, no permission
        raise BuildError(f"{name}: {type(error).__name__}: {first_line(error)}") from error


def extension(name: str, source: str) -> ModuleType:
    """A Python module in C++, built unless it is kept; ``name`` is that of its ``PyInit``.

    Raises:
        BuildError: as :func:`library`, or it does not load.
    """
    path = library(name, source, libraries=("torch_python", "torch_cpu", "c10"))
    try:
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_loader(name, loader, origin=str(path))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{name}: {first_line(error)}") from error
    return module


class Later(Generic[T]):
    """Something native that is made in the background, once a process, while others do without."""

    def __init__(self, make: Callable[[], T], without: str) -> None:
        self._make, self._without = make, without
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._made: T | None = None

    def get(self) -> T | None:
        """What was made; None until then, or where it cannot be made. The first call begins."""
        if self._thread is None:
            self._start()
        return self._made

    def wait(self) -> T | None:
        """What is made, or None where it cannot be made; where that failed before, it is tried again."""
        thread = self._thread
        if thread is None or (self._made is None and not thread.is_alive()):
            thread = self._start(after=thread)
        thread.join()
        return self._made

    def _start(self, after: threading.Thread | None = None) -> threading.Thread:
        with self._lock:
            if self._thread is None or self._thread is after:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            return self._thread

    def _run(self) -> None:
        try:
            self._made = self._make()
        except BuildError as error:
            log.info("%s: %s", self._without, error)


def _kept(home: pathlib.Path, stem: str) -> pathlib.Path | None:
    """The library if it is there and whole."""
    for path in home.glob(f"{stem}-*.so"):
        if path.stem == f"{stem}-{_digest(path)}":
            return path
    return None


def _build(home: pathlib.Path, stem: str, source: str, command: Sequence[str]) -> pathlib.Path:
    work = home / f"{stem}.build"
    shutil.rmtree(work, ignore_errors=True)  # a killed builder's
    work.mkdir()
    try:
        text, made = work / f"{stem}.cpp", work / f"{stem}.so"
        text.write_text(source, encoding="utf-8")
        order = [command[0], str(text), *command[1:], "-o", str(made)]
        done = subprocess.run(order, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode != 0:
            words = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            raise BuildError(
                f"{stem}: {command[0]} failed: {' '.join(words[:2])[:400] or done.stderr[:400]}"
            )
        for damaged in home.glob(f"{stem}-*.so"):
            damaged.unlink()
        kept = home / f"{stem}-{_digest(made)}.so"
        os.replace(made, kept)
        os.replace(text, kept.with_suffix(".cpp"))  # to be read beside it
        return kept
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _platform(libraries: Sequence[str]) -> list[str]:
    """Headers and libraries of PyTorch and Python."""
    if sys.platform == "win32":
        raise BuildError("native code is not built on Windows")
    from torch.utils import cpp_extension  # needs setuptools, which only a build does

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    found = [f"-I{path}" for path in includes]
    if sys.platform == "darwin":
        found += ["-undefined", "dynamic_lookup"]
    paths = cpp_extension.library_paths()
    return [*found, *(f"-L{path}" for path in paths), *(f"-l{name}" for name in libraries)]


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def machine() -> tuple[str, ...]:
    """What else the machine code depends on: PyTorch, Python, the CPU's instructions."""
    cpu = platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), cpu)
    except OSError:
        pass
    return torch.__version__, sys.version, platform.machine(), cpu
