"""The engine comes first: whatever goes wrong in a hook is told once, and the engine goes on in its own order.

There are two kinds of faults. One while the books are changed leaves them in an unknown state: the hook goes off for
good. One while the data of a single request is read costs that request its client and prediction: the hook stays on,
so that no caller can turn it off. Knows no engine.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

MOST_KINDS = 8  # kinds of faults in requests, with not one good request in between, after which the hook is broken


class Guard:
    """Runs a hook's code, and never runs it again once it is broken.

    Attributes:
        failure: what went wrong; None while the hook is on.
        num_failures: exceptions that were caught.
        num_spoiled: those of them that cost one request its client or prediction, and no more.
    """

    def __init__(self, logger: logging.Logger, on_failure: Callable[[], None] | None = None) -> None:
        """A guard that has seen nothing yet.

        Args:
            logger: for the one line, and its traceback.
            on_failure: called once; an exception of its own is swallowed.
        """
        self._logger, self._on_failure = logger, on_failure
        self.failure: str | None = None
        self.num_failures = self.num_spoiled = 0
        self._kinds: set[tuple[str, str, int]] = set()  # of faults in requests, since the last good one
        self._told = False

    @property
    def ok(self) -> bool:
        """Whether the hook is on."""
        return self.failure is None

    def run(self, action: Callable[[], T], otherwise: T, doing: str) -> T:
        """What `action` returns; `otherwise` if it raises, or the hook is off. An exception turns the hook off.

        Args:
            action: the hook's code.
            otherwise: what stands in for its answer.
            doing: for the log: "while ...".
        """
        if self.failure is not None:
            return otherwise
        try:
            return action()
        except Exception as error:
            self.fail(error, doing)
            return otherwise

    def attempt(self, action: Callable[[], T], otherwise: T, doing: str) -> T:
        """As `run`, for code that only reads what one request brought: an exception leaves the hook on."""
        if self.failure is not None:
            return otherwise
        try:
            result = action()
        except Exception as error:
            self.spoil(error, doing)
            return otherwise
        self.good()
        return result

    def good(self) -> None:
        """Notes that a request was read."""
        if self._kinds:
            self._kinds.clear()

    def spoil(self, error: Exception, doing: str) -> None:
        """Notes an exception while one request was read; tells of the first one.

        `MOST_KINDS` kinds of them without a good request in between are no caller's work: the hook goes off.
        """
        last = traceback.extract_tb(error.__traceback__)[-1:]
        self._kinds.add((type(error).__name__, last[0].filename if last else "", (last[0].lineno or 0) if last else 0))
        if len(self._kinds) >= MOST_KINDS:
            self.fail(error, doing)
            return
        self.num_failures += 1
        self.num_spoiled += 1
        if self.failure is None and not self._told:
            self._told = True
            self._logger.error(
                "mope could not read a request, which goes on without client and prediction; others are not affected. "
                "Told once; please report this: %s while %s: %s\n%s",
                type(error).__name__,
                doing,
                error,
                "".join(traceback.format_exception(error)),
            )

    def fail(self, error: Exception, doing: str) -> None:
        """Notes an exception that leaves the hook broken; tells of the first one."""
        self.num_failures += 1
        if self.failure is not None:
            return
        self.failure = f"{type(error).__name__} while {doing}: {error}"
        self._logger.error(
            "mope has failed and is off until the next start; requests are now served in the engine's own order. "
            "Please report this: %s\n%s",
            self.failure,
            "".join(traceback.format_exception(error)),
        )
        if self._on_failure is not None:
            try:
                self._on_failure()
            except Exception:
                self._logger.exception("mope could not tidy up after its failure")
