"""What code costs, on a machine that does other things: noise only adds time, so one try within the limit is proof."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Action = Callable[[], Any]


def cpu_seconds(action: Action) -> float:
    """CPU time that this process spends on an action, in seconds."""
    started = time.process_time()
    action()
    return time.process_time() - started


def least_seconds(action: Action, limit_s: float, tries: int = 20) -> float:
    """The least CPU time of an action, tried until it is below a limit and at most so often."""
    return _least(lambda: cpu_seconds(action), limit_s, tries)


def least_ratio(action: Action, reference: Action, limit: float, tries: int = 20) -> float:
    """The least ratio of an action's CPU time to a reference's, timed one right after the other in each try."""
    return _least(lambda: cpu_seconds(action) / max(cpu_seconds(reference), 1e-9), limit, tries)


def _least(measure: Callable[[], float], limit: float, tries: int) -> float:
    least = float("inf")
    for _ in range(tries):
        least = min(least, measure())
        if least < limit:
            break
    return least
