"""The bar: on stderr, where it is wanted, and never in the way of what is counted."""

from __future__ import annotations

import pytest

from sparsecc.progress import tracked


@pytest.mark.parametrize("wanted", [None, True, False])
def test_items_pass_through(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([1, 2, 3], "counting", wanted)) == [1, 2, 3]
    assert list(tracked(iter("ab"), "counting", wanted)) == ["a", "b"]  # of unknown length
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("counting" in captured.err) is (wanted is True)  # stderr is no terminal here


def test_a_broken_stream_breaks_here() -> None:
    def stream():
        yield 1
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        list(tracked(stream(), "counting", True))
