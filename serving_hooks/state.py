"""The file that keeps books and lessons over restarts: written in a thread, read without trust.

A file is written next to the old one and renamed, so that there is always a whole one. It is readable by its owner
alone, because it holds names of clients. Whatever a file holds, reading it raises nothing that a hook would fail on.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from mope.errors import DataError
from mope.fairness import Ledger

MAX_BYTES = 2**28  # of a file; a million clients take about half of it
EVERY_S = 5.0  # between two writes at least, while requests run
IDLE_S = 1.0  # the same once none run
SHARE = 0.05  # of the time that writing may take; the time between two writes grows with a file
_LOOK_S = 0.5  # between two looks for changes
_PAUSE_S = 0.001  # after each piece, in which the scheduling thread has the interpreter for itself
_TOKENS = 500  # of JSON in one piece
_MAX_DIGITS = 40  # of a number; none of ours has more
_STALE_S = 3600.0  # age from which what a killed process left half written is removed
_ENCODER = json.JSONEncoder(allow_nan=False)

logger = logging.getLogger("mope")


class _GivenUp(Exception):
    """The thread is to end, and what it was writing is written by another."""


class Keeper:
    """Writes a state whenever it has changed, in a thread of its own.

    Attributes:
        path: of the file.
        num_failures: writes that failed.
    """

    def __init__(
        self,
        path: Path,
        pieces: Callable[[], Iterator[str]],
        changes: Callable[[], object],
        busy: Callable[[], bool] = lambda: True,
    ) -> None:
        """Writes nothing yet.

        Args:
            path: of the file.
            pieces: its text, each piece made in a millisecond or so; called in the thread, while others change things.
            changes: something that is another once there is anything new.
            busy: whether requests run. Once none do, what is new is written after `IDLE_S`.
        """
        self.path, self.num_failures = path, 0
        self._pieces, self._changes, self._busy = pieces, changes, busy
        self._kept = changes()
        self._kept_s = time.monotonic()
        self._took_s = 0.0
        self._failing = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread, unless it runs. Takes next to no time, and is to be called now and then."""
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._run, name="mope-state", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread and writes the state a last time."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._keep(hurried=True)

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            least_s = max(EVERY_S if self._busy() else IDLE_S, self._took_s / SHARE)
            if time.monotonic() - self._kept_s >= least_s and self._changes() != self._kept:
                self._keep()

    def _keep(self, *, hurried: bool = False) -> None:
        changes, started_s = self._changes(), time.monotonic()
        try:
            write(
                self.path,
                self._pieces() if hurried else self._with_pauses(),
                (lambda: False) if hurried else self._over,
            )
        except _GivenUp:
            return
        except Exception as error:  # whatever it is: the engine goes on, and the next write may succeed
            self.num_failures += 1
            if not self._failing:
                logger.warning("mope cannot keep its state in %s: %s. It tries again.", self.path, _told(error))
            self._failing = True
        else:
            if self._failing:
                logger.info("mope keeps its state in %s again", self.path)
            self._failing, self._kept = False, changes
        self._kept_s = time.monotonic()
        self._took_s = self._kept_s - started_s

    def _with_pauses(self) -> Iterator[str]:
        for piece in self._pieces():
            yield piece
            time.sleep(_PAUSE_S)

    def _over(self) -> bool:
        return self._ended.is_set()


def write(path: Path, pieces: Iterator[str], given_up: Callable[[], bool] = lambda: False) -> None:
    """Writes a file as a whole or not at all.

    Args:
        path: of the file; its folder is made.
        pieces: its text.
        given_up: asked after each piece, and before the file takes the place of the old one.

    Raises:
        OSError: it cannot be written; the old file is as it was.
        DataError: it has more than `MAX_BYTES`, and would not be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # 0600, and never a link
    try:
        with os.fdopen(handle, "wb") as file:
            num_bytes = 0
            for piece in pieces:
                num_bytes += file.write(piece.encode("ascii"))
                if num_bytes > MAX_BYTES:
                    raise DataError(f"it has more than {MAX_BYTES:,} bytes; lower idle_clients and max_clients")
                if given_up():
                    raise _GivenUp
            file.flush()
            os.fsync(file.fileno())
        if given_up():
            raise _GivenUp
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    _sync_folder(path.parent)


def _remove_stale(path: Path) -> None:
    """Removes what processes that were killed left half written."""
    oldest = time.time() - _STALE_S
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if left.lstat().st_mtime < oldest:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the new name last through a power failure, on systems that can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path) -> Any:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        DataError: it is no regular file, too large, or not JSON as `write` writes it.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DataError("it is no regular file")
        if found.st_size > MAX_BYTES:
            raise DataError(f"it has {found.st_size:,} bytes; expected {MAX_BYTES:,} at most")
        raw = file.read(MAX_BYTES)
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refused, parse_int=_whole, parse_float=_finite)
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"it is no JSON of ours: {_told(error)}") from error


def take_up(path: Path, what: str, take: Callable[[Any], None]) -> bool:
    """Goes on with what a file holds, and says in one line whether that was possible. Raises nothing.

    Args:
        path: of the file.
        what: it keeps, for the line.
        take: takes over what was read; raises if it cannot.

    Returns:
        Whether all of it was taken, or there was none.
    """
    try:
        take(read(path))
    except FileNotFoundError:
        logger.info("mope: no state in %s yet", path)
    except Exception as error:  # the file may hold anything, and a start without it is better than none
        logger.warning("mope starts with empty %s: %s cannot be read (%s)", what, path, _told(error))
        return False
    else:
        logger.info("mope: went on with the state in %s", path)
    return True


def books_and_lessons(ledger: Ledger, lessons: Callable[[], Any]) -> Iterator[str]:
    """The text of a scheduler's state, in pieces of a millisecond or so; the books may change meanwhile."""
    yield '{"version": 1, "ledger": {'
    section, any_yet = "", False
    for name, rows in ledger.pieces():
        if name != section:
            yield f'{"], " if section else ""}"{name}": ['
            section, any_yet = name, False
        yield (", " if rows and any_yet else "") + _ENCODER.encode(rows)[1:-1]
        any_yet |= bool(rows)
    yield f'], {_ENCODER.encode(ledger.sums())[1:-1]}}}, "lengths": '
    yield from in_pieces(lessons())
    yield "}"


def in_pieces(value: Any) -> Iterator[str]:
    """JSON of a value, some hundred tokens at a time."""
    tokens = _ENCODER.iterencode(value)
    while piece := "".join(islice(tokens, _TOKENS)):
        yield piece


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"the number {text[:20]}")
    return number


def _refused(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


def _told(error: Exception) -> str:
    """An error as a line of a log may hold it."""
    text = str(error) or type(error).__name__
    return "".join(sign if sign.isprintable() else "?" for sign in text[:200])
