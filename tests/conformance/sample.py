"""The fixed sample and the failures that are known: both read from files beside this one."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = pathlib.Path(__file__).parent


def names(suite: str, lower: str) -> list[str]:
    """The sample of one suite at one depth."""
    return list(_read("sample.toml").get(lower, {}).get(suite, []))


def expected_failures(suite: str) -> dict[str, str]:
    """Names of a suite that fail today, with the reason."""
    return dict(_read("expected_failures.toml").get(suite, {}))


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))
