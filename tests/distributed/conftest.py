"""One pair of ranks for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pair = Ranks()
    yield pair
    pair.stop()
