"""A command as a user types it, run in the process of a test: the fixture `run` of `conftest`, and what it returns."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]  # status, stdout, stderr


def mistake(result: tuple[int, str, str]) -> str:
    """The one line that a user's mistake ends in, behind lines that say what is being done."""
    status, out, err = result
    assert (status, out) == (2, "")
    *begun, line = err.splitlines()
    assert all(one.endswith(" ...") for one in begun)
    assert line.startswith("error: ")
    return line
