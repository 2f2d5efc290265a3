"""Tests of generated Triton that need a process of their own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys


def run_grid(name: str, **environment: str) -> str:
    """A file of ``tests/codegen`` that is not collected by itself; the last line of pytest's words."""
    path = pathlib.Path(__file__).parent / "codegen" / name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        cwd=path.parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]
