"""What turns a hook off, and what does not: one request never does."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from mope.serving_hooks.guard import MOST_KINDS, Guard


def guard(tidied: list[int] | None = None) -> Guard:
    return Guard(logging.getLogger("mope"), None if tidied is None else lambda: tidied.append(1))


def of_kind(number: int) -> Callable[[], None]:
    """A fault of another place for each number."""
    where: dict[str, Callable[[], None]] = {}
    exec(compile("\n" * number + "def fault():\n    raise RuntimeError('bad')", "made up", "exec"), where)
    return where["fault"]


def test_a_request_that_cannot_be_read_costs_itself_alone(caplog: pytest.LogCaptureFixture) -> None:
    tidied: list[int] = []
    ours = guard(tidied)
    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            assert ours.attempt(lambda: [][1], 7, "reading a request") == 7  # type: ignore[misc]
    assert ours.attempt(lambda: 5, 0, "reading a request") == 5
    assert (ours.ok, ours.failure, ours.num_failures, ours.num_spoiled, tidied) == (True, None, 1000, 1000, [])
    assert len(caplog.records) == 1
    assert "test_guard" in caplog.text


def test_callers_cannot_turn_it_off_where_others_are_read() -> None:
    ours = guard()
    for number in range(10 * MOST_KINDS):
        ours.attempt(of_kind(number), None, "reading a request")
        if number % (MOST_KINDS - 1) == 0:
            ours.attempt(lambda: 5, 0, "reading a request")
    assert ours.ok


def test_what_fails_in_many_ways_and_reads_nothing_is_broken() -> None:
    ours = guard(tidied := [])
    for number in range(MOST_KINDS):
        assert ours.ok
        ours.attempt(of_kind(number), None, "reading a request")
    assert (ours.ok, tidied) == (False, [1])
    assert ours.attempt(lambda: 5, 0, "reading a request") == 0


def test_books_that_were_left_half_written_turn_it_off() -> None:
    ours = guard(tidied := [])
    ours.attempt(lambda: [][1], None, "reading a request")  # type: ignore[misc]
    assert ours.run(lambda: [][1], 7, "booking") == 7  # type: ignore[misc]
    assert (ours.ok, tidied) == (False, [1])
