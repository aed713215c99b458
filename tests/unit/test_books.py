"""The books of budgets: exact sums, no room beyond the limit, one reservation and one settlement for an id."""

from __future__ import annotations

import asyncio
import sqlite3
from math import inf
from pathlib import Path

import pytest
from book_model import CLIENTS, LIMIT, START_S, WINDOW_S, Model, hold, steps
from hypothesis import given
from hypothesis import strategies as st

from mope.budgets.books import KEPT_S, Totals, open_books, wait_of
from mope.budgets.risk import HIGHEST, LOWEST, STEP, following, level_of, log_odds
from mope.budgets.sqlite_books import SqliteBooks
from mope.errors import StoreError


class Clock:
    def __init__(self) -> None:
        self.now = START_S

    def __call__(self) -> float:
        return self.now


@given(st.lists(steps, max_size=60))
def test_they_are_those_of_a_list_of_reservations(taken: list[tuple[str, str, int, str]]) -> None:
    async def run() -> None:
        clock, model = Clock(), Model()
        books = SqliteBooks(None, clock)
        for action, name, number, client in taken:
            if action == "pass":
                if clock.now - START_S + number < KEPT_S:  # before anything is forgotten
                    clock.now += number
                    model.now = clock.now
            elif action == "reserve":
                decision = await books.reserve(hold(name, number, client))
                assert decision[:3] == model.reserve(name, number, client)
                assert 0 < decision.window_s <= WINDOW_S
                if decision.state != "full":
                    assert decision.wait_s == 0.0
                    assert decision.state in ("known", "used") or decision.used + decision.held <= LIMIT
                else:
                    assert (decision.wait_s == inf) == (number > LIMIT)
            else:
                settlement = await books.settle(name, number)
                assert settlement[:3] == model.settle(name, number)
        found = await books.totals()
        for client in CLIENTS:
            total = found.get(client, Totals())
            assert total._replace(windows=0, windows_over=0) == model.totals(client)
            assert total.windows_over <= total.windows
        await books.close()

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 160)), max_size=40), st.sampled_from([0.5, 0.1, 0.01]))
def test_the_level_follows_what_windows_did(asked: list[tuple[int, int]], risk: float) -> None:
    async def run() -> None:
        clock, books = Clock(), SqliteBooks(None, Clock())
        books._clock = clock
        odds, over, windows = log_odds(1.0 - risk), 0, 0
        for turn, (amount, used) in enumerate(asked):
            decision = await books.reserve(hold(f"{turn}", amount, risk=risk))
            assert decision.odds == (None if turn == 0 else odds)
            if decision.state == "held":
                await books.settle(f"{turn}", used)
            gone_over = decision.state == "held" and used > LIMIT
            odds, over, windows = following(odds, risk, over=gone_over), over + gone_over, windows + 1
            clock.now += WINDOW_S
        total = (await books.totals()).get("a", Totals())
        assert (total.windows, total.windows_over) == (windows, over)
        await books.close()

    asyncio.run(run())


@given(
    st.lists(st.floats(-6.0, 12.0), min_size=1, max_size=400), st.floats(0.005, 0.5), st.floats(LOWEST + 2, HIGHEST - 2)
)
def test_the_share_of_windows_that_go_over_comes_to_the_wanted_one(
    enough: list[float], risk: float, begins: float
) -> None:
    """Whatever level each window would have needed: it went over where the level was lower."""
    odds, num_over, clipped = begins, 0, False
    for needed in enough:
        over = odds < needed
        num_over += over
        odds = following(odds, risk, over=over)
        clipped |= odds in (LOWEST, HIGHEST)
    bound = (HIGHEST - LOWEST) / (STEP * len(enough))
    if not clipped:
        assert abs(num_over / len(enough) - risk) <= bound
    assert LOWEST <= odds <= HIGHEST
    assert level_of(log_odds(0.9)) == pytest.approx(0.9)


def test_a_window_that_is_over_is_counted_and_nothing_is_kept_for_ever() -> None:
    async def run() -> None:
        clock = Clock()
        books = SqliteBooks(None, clock)
        for number in range(50):
            await books.reserve(hold(f"r{number}", 80))
            await books.settle(f"r{number}", 120 if number % 5 == 0 else 60)
            clock.now += WINDOW_S
        for number in range(300):
            await books.reserve(hold(f"s{number}", 0))
        total = (await books.totals())["a"]
        assert (total.windows, total.windows_over) == (50, 10)
        assert total.used == 10 * 120 + 40 * 60
        for turn in range(3):  # in which they expire, and are forgotten
            clock.now += 2 * KEPT_S
            for number in range(300):
                await books.reserve(hold(f"t{turn} {number}", 0, "b"))
        for table, most in (("windows", 2), ("holds", 600)):
            assert books._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] <= most
        assert (await books.totals())["a"].num_expired == 300
        await books.close()

    asyncio.run(run())


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=8), st.integers(1, 100), st.floats(0.1, 90))
def test_the_wait_ends_with_enough_refunds_or_with_the_window(
    refunds: list[tuple[float, int]], lack: int, window_s: float
) -> None:
    refunds.sort()
    wait_s = wait_of(lack, refunds, window_s, fits=True)
    assert wait_s <= window_s
    back = sum(refund for due_s, refund in refunds if due_s <= wait_s)
    assert wait_s == window_s or back >= lack
    assert sum(refund for due_s, refund in refunds if due_s < wait_s) < lack
    assert wait_of(lack, refunds, window_s, fits=False) == inf


def test_a_file_outlives_its_process_and_serves_several(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "books.db"
        one, two = SqliteBooks(path), SqliteBooks(path)
        assert (await one.reserve(hold("x", 70, note="of x"))).state == "held"
        assert (await two.note("x"), await two.note("y")) == ("of x", None)
        assert (await two.reserve(hold("y", 70))).state == "full"
        await one.close()
        three = SqliteBooks(path)
        assert (await three.reserve(hold("x", 70))).state == "known"
        assert (await two.settle("x", 20)).state == "settled"
        assert (await three.settle("x", 99)) == ("already", 70, 20, "a")
        assert (await three.totals())["a"].used == 20
        for books in (two, three):
            await books.close()

    asyncio.run(run())


def test_files_that_hold_no_books_are_told(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database at all, just a long text" * 40)
    with pytest.raises(StoreError, match=r"text\.db: file is not a database"):
        open_books(str(tmp_path / "text.db"))
    with pytest.raises(StoreError, match="unable to open"):
        open_books(str(tmp_path / "no" / "folder.db"))
    later = sqlite3.connect(tmp_path / "later.db")
    later.execute("PRAGMA user_version = 9")
    later.close()
    with pytest.raises(StoreError, match="version 9; this mope reads 1"):
        open_books(str(tmp_path / "later.db"))
