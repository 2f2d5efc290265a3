"""Native libraries: built once, whole or not at all, whatever happens to their builder or the disk."""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
import sys
import threading

import pytest

from sparsecc import _torch
from sparsecc.errors import BuildError
from sparsecc.runtime import native

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'
BUILD = "from sparsecc.runtime import native; print(native.library('answer', {source!r}))"


@pytest.fixture(autouse=True)
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "sparsecc"


def answer(path: pathlib.Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def test_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.library("answer", SOURCE)
    assert answer(first) == 42
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built again"))
    assert native.library("answer", SOURCE) == first
    assert first.with_suffix(".cpp").read_text() == SOURCE


@pytest.mark.parametrize("what", ["source", "flags", "CPU", "compiler"])
def test_what_decides_the_code_decides_the_name(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.library("answer", SOURCE)
    source, flags = SOURCE, ()
    if what == "source":
        source = SOURCE.replace("42", "43")
    elif what == "flags":
        flags = ("-O1",)
    elif what == "CPU":
        monkeypatch.setattr(native, "machine", lambda: ("another",))
    else:
        monkeypatch.setattr(native, "_version", lambda _: "another")
    second = native.library("answer", source, flags)
    assert second != first
    assert first.exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b[-8:]]
)
def test_a_damaged_file_is_built_anew(damage) -> None:
    path = native.library("answer", SOURCE)
    path.write_bytes(damage(path.read_bytes()))
    again = native.library("answer", SOURCE)
    assert answer(again) == 42
    assert native._digest(again) == again.stem.rsplit("-", 1)[1]


def test_what_a_killed_builder_left_is_swept(home: pathlib.Path) -> None:
    stem = native.library("answer", SOURCE).stem.rsplit("-", 1)[0]
    for path in home.glob("*.so"):
        path.unlink()
    left = home / f"{stem}.build"
    left.mkdir()
    (left / f"{stem}.so").write_bytes(b"half")
    assert answer(native.library("answer", SOURCE)) == 42
    assert not left.exists()


def test_builders_at_the_same_time_make_one(home: pathlib.Path) -> None:
    order = [sys.executable, "-c", BUILD.format(source=SOURCE)]
    builders = [subprocess.Popen(order, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {builder.communicate()[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert printed == {str(path) for path in home.glob("*.so")}
    assert len(printed) == 1


def test_a_compiler_that_fails_says_why(home: pathlib.Path) -> None:
    with pytest.raises(BuildError, match=r"error: .nothing."):
        native.library("answer", "int f() { return nothing; }")
    assert [p.suffix for p in home.iterdir()] == [".lock"]


def test_a_full_disk(home: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library does not fit: nothing of it stays, and the next build with space succeeds."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(native.os, "replace", full)
        with pytest.raises(BuildError, match="No space left"):
            native.library("answer", SOURCE)
    assert [p.suffix for p in home.iterdir()] == [".lock"]
    assert answer(native.library("answer", SOURCE)) == 42


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(_torch, "cpp_compiler", missing)
    with pytest.raises(BuildError, match="no working C\\+\\+ compiler"):
        native.library("answer", SOURCE)


def test_a_folder_that_cannot_be_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(native, "folder", lambda: tmp_path / "file" / "sparsecc")
    with pytest.raises(BuildError, match="Not a directory"):
        native.library("answer", SOURCE)


def test_another_builder_that_never_ends(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = native.library("answer", SOURCE).stem.rsplit("-", 1)[0]
    for path in home.glob("*.so"):
        path.unlink()
    monkeypatch.setattr(native, "SECONDS", 0.1)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with native.filelock.FileLock(home / f"{stem}.lock"):
            held.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with pytest.raises(BuildError, match="another process"):
        native.library("answer", SOURCE)
    free.set()
    thread.join()


def test_an_extension_that_is_none() -> None:
    with pytest.raises(BuildError, match="answer"):
        native.extension("answer", SOURCE)


def test_later(caplog: pytest.LogCaptureFixture) -> None:
    """None until it is made; made once; one line in the log where it cannot be."""
    go, made = threading.Event(), []

    def make() -> int:
        go.wait()
        made.append(1)
        return 42

    later = native.Later(make, "slow")
    assert later.get() is None
    go.set()
    assert later.wait() == 42
    assert later.get() == 42
    assert made == [1]

    def fail() -> int:
        raise BuildError("no compiler")

    with caplog.at_level("INFO", "sparsecc"):
        broken = native.Later(fail, "weights are checked in Python")
        assert broken.get() is None
        broken._thread.join()
        assert broken.get() is None
    assert [r.message for r in caplog.records] == ["weights are checked in Python: no compiler"]


def test_waiting_tries_again_what_failed() -> None:
    """A compiler that was missing when the process began (a path, a folder) may be there now."""
    there = []

    def make() -> int:
        if not there:
            raise BuildError("no compiler")
        return 42

    later = native.Later(make, "slow")
    assert later.wait() is None
    there.append(1)
    assert later.get() is None
    assert later.wait() == later.get() == 42
