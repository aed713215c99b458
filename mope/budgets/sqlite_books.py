"""Books in a file, or in the memory of one process. A file survives the process, killed or not."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import override

from mope.budgets.books import DUE_LOOKED_AT, KEPT_S, Books, Decision, Hold, Settlement, Totals, wait_of
from mope.budgets.risk import following, log_odds
from mope.errors import StoreError

VERSION = 1
BUSY_S = 5.0  # that another process may keep the file
TIDY_EVERY = 256  # reservations between two looks at what is too old
OPEN, SETTLED, EXPIRED = 0, 1, 2
_TABLES = f"""
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS clients (
    client TEXT PRIMARY KEY, reserved INTEGER, held INTEGER, settled INTEGER, expired INTEGER, used INTEGER,
    num_reserved INTEGER, num_settled INTEGER, num_expired INTEGER, num_full INTEGER, windows INTEGER,
    windows_over INTEGER, odds REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS windows (
    client TEXT, starts_s REAL, ends_s REAL, allowed INTEGER, used INTEGER, held INTEGER,
    risk REAL, counted INTEGER, PRIMARY KEY (client, starts_s)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holds (
    id TEXT PRIMARY KEY, client TEXT, starts_s REAL, amount INTEGER, refund INTEGER, due_s REAL, expires_s REAL,
    state INTEGER, used INTEGER, closed_s REAL, note TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS open_holds ON holds (expires_s) WHERE state = {OPEN};
CREATE INDEX IF NOT EXISTS due_holds ON holds (client, due_s) WHERE state = {OPEN};
CREATE INDEX IF NOT EXISTS ended_windows ON windows (ends_s) WHERE counted = 0;
CREATE INDEX IF NOT EXISTS closed_holds ON holds (closed_s) WHERE state <> {OPEN};
PRAGMA user_version = {VERSION};
"""


class SqliteBooks(Books):
    """See the module. Calls take some ten microseconds and wait for no disk.

    Several processes may use one file. A crash of the machine, not of the process, may lose the last second.

    Args:
        path: of the file, which is made if it is not there; None for memory.
        clock: seconds since 1970.

    Raises:
        StoreError: the file holds no books, or cannot be opened.
    """

    def __init__(self, path: str | Path | None, clock: Callable[[], float] = time.time) -> None:
        self._shown, self._clock = str(path or "memory"), clock
        self._until_tidy = 0
        with self._told():
            self._db = sqlite3.connect(path or ":memory:", timeout=BUSY_S, isolation_level=None)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise StoreError(f"{self._shown} holds books of version {version}; this mope reads {VERSION}")
            self._db.executescript(_TABLES)

    @override
    async def reserve(self, hold: Hold) -> Decision:
        now = self._clock()
        starts_s = now // hold.window_s * hold.window_s
        left_s = starts_s + hold.window_s - now
        with self._transaction():
            self._expire(now)
            self._end_windows(now)
            self._tidy(now)
            odds = self._odds(hold.client)
            self._open_window(hold, starts_s)
            used, held = self._window(hold.client, starts_s)
            if (before := self._one("SELECT client, state FROM holds WHERE id = ?", hold.id)) is not None:
                open_still = before == (hold.client, OPEN)
                return Decision("known" if open_still else "used", used, held, 0.0, left_s, odds)
            if used + held + hold.amount > hold.limit:
                self._count(hold.client, num_full=1)
                refunds = self._db.execute(
                    f"SELECT max(due_s - ?, 0), refund FROM holds WHERE client = ? AND state = {OPEN} AND starts_s = ? "
                    f"ORDER BY due_s LIMIT {DUE_LOOKED_AT}",
                    (now, hold.client, starts_s),
                ).fetchall()
                lack, fits = used + held + hold.amount - hold.limit, hold.amount <= hold.limit
                return Decision("full", used, held, wait_of(lack, refunds, left_s, fits=fits), left_s, odds)
            self._db.execute(
                f"INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, {OPEN}, 0, NULL, ?)",
                (
                    hold.id,
                    hold.client,
                    starts_s,
                    hold.amount,
                    hold.refund,
                    now + hold.due_s,
                    now + hold.hold_s,
                    hold.note,
                ),
            )
            self._move(hold.client, starts_s, held=hold.amount)
            self._count(hold.client, reserved=hold.amount, held=hold.amount, num_reserved=1)
            return Decision("held", used, held + hold.amount, 0.0, left_s, odds)

    @override
    async def note(self, name: str) -> str | None:
        with self._told():
            found = self._one("SELECT note FROM holds WHERE id = ?", name)
        return None if found is None else str(found[0])

    @override
    async def settle(self, name: str, used: int) -> Settlement:
        now = self._clock()
        with self._transaction():
            found = self._one("SELECT client, starts_s, amount, state, used FROM holds WHERE id = ?", name)
            if found is None:
                return Settlement("unknown", 0, used, "")
            client, starts_s, amount, state, before = found
            if state == SETTLED:
                return Settlement("already", amount, before, client)
            late = state == EXPIRED
            self._move(client, starts_s, held=0 if late else -amount, used=used)
            from_open = {"expired": -amount, "num_expired": -1} if late else {"held": -amount}
            self._count(client, settled=amount, used=used, num_settled=1, **from_open)
            self._db.execute(
                f"UPDATE holds SET state = {SETTLED}, used = ?, closed_s = ? WHERE id = ?", (used, now, name)
            )
            return Settlement("late" if late else "settled", amount, used, client)

    @override
    async def totals(self) -> dict[str, Totals]:
        now = self._clock()
        with self._transaction():
            self._expire(now)
            self._end_windows(now)
            rows = self._db.execute(f"SELECT client, {', '.join(Totals._fields)} FROM clients ORDER BY client")
            return {client: Totals(*row) for client, *row in rows}

    @override
    async def close(self) -> None:
        self._db.close()

    # -- all of these within a transaction

    def _tidy(self, now: float) -> None:
        """Forgets closed reservations and ended windows that nobody will ask for."""
        self._until_tidy -= 1
        if self._until_tidy > 0:
            return
        self._until_tidy = TIDY_EVERY
        self._db.execute(f"DELETE FROM holds WHERE state <> {OPEN} AND closed_s < ?", (now - KEPT_S,))
        self._db.execute("DELETE FROM windows WHERE counted = 1 AND ends_s < ?", (now - KEPT_S,))

    def _end_windows(self, now: float) -> None:
        """Counts windows that have ended, and lets each client's level follow."""
        ended = self._db.execute(
            "UPDATE windows SET counted = 1 WHERE counted = 0 AND held = 0 AND ends_s <= ? "
            "RETURNING client, ends_s, used > allowed, risk",
            (now,),
        ).fetchall()
        for client, _, over, risk in sorted(ended, key=lambda window: window[1]):
            odds = self._odds(client)
            odds = following(log_odds(1.0 - risk) if odds is None else odds, risk, over=bool(over))
            self._count(client, windows=1, windows_over=over)
            self._db.execute("UPDATE clients SET odds = ? WHERE client = ?", (odds, client))

    def _odds(self, client: str) -> float | None:
        found = self._one("SELECT odds FROM clients WHERE client = ?", client)
        return None if found is None else found[0]

    def _expire(self, now: float) -> None:
        """Gives back what reservations hold that were not settled in time."""
        expired = self._db.execute(
            f"UPDATE holds SET state = {EXPIRED}, closed_s = ? WHERE state = {OPEN} AND expires_s <= ? "
            "RETURNING client, starts_s, amount",
            (now, now),
        ).fetchall()
        for client, starts_s, amount in expired:
            self._move(client, starts_s, held=-amount)
            self._count(client, held=-amount, expired=amount, num_expired=1)

    def _open_window(self, hold: Hold, starts_s: float) -> None:
        self._db.execute(
            "INSERT INTO windows VALUES (?, ?, ?, ?, 0, 0, ?, 0) ON CONFLICT DO UPDATE SET "
            "allowed = excluded.allowed, ends_s = excluded.ends_s, risk = excluded.risk",
            (hold.client, starts_s, starts_s + hold.window_s, hold.limit, hold.risk),
        )

    def _window(self, client: str, starts_s: float) -> tuple[int, int]:
        found = self._one("SELECT used, held FROM windows WHERE client = ? AND starts_s = ?", client, starts_s)
        return (0, 0) if found is None else (found[0], found[1])

    def _move(self, client: str, starts_s: float, *, held: int = 0, used: int = 0) -> None:
        self._db.execute(
            "UPDATE windows SET held = held + ?, used = used + ? WHERE client = ? AND starts_s = ?",
            (held, used, client, starts_s),
        )

    def _count(self, client: str, **changes: int) -> None:
        self._db.execute(f"INSERT OR IGNORE INTO clients VALUES (?{', 0' * len(Totals._fields)}, NULL)", (client,))
        sums = ", ".join(f"{name} = {name} + ?" for name in changes)
        self._db.execute(f"UPDATE clients SET {sums} WHERE client = ?", (*changes.values(), client))

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
        return found

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"books {self._shown}: {error}") from error
