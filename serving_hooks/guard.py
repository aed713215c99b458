"""The engine comes first: whatever goes wrong in a hook is told once, and the engine goes on in its own order.

Knows no engine.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Guard:
    """Runs a hook's code; after the first exception it never runs any again.

    Attributes:
        failure: what went wrong; None while nothing has.
        num_failures: exceptions that were caught.
    """

    def __init__(self, logger: logging.Logger, on_failure: Callable[[], None] | None = None) -> None:
        """A guard that has seen nothing yet.

        Args:
            logger: for the one line, and its traceback.
            on_failure: called once; an exception of its own is swallowed.
        """
        self._logger, self._on_failure = logger, on_failure
        self.failure: str | None = None
        self.num_failures = 0

    @property
    def ok(self) -> bool:
        """Whether nothing has gone wrong yet."""
        return self.failure is None

    def run(self, action: Callable[[], T], otherwise: T, doing: str) -> T:
        """What `action` returns; `otherwise` if it raises, or something raised before.

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

    def fail(self, error: Exception, doing: str) -> None:
        """Notes an exception; tells of the first one."""
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
