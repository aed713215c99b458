"""What code costs on a machine that does other things: noise only adds time, so the least of some tries is nearest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Action = Callable[[], Any]
MIN_TRIES = 5  # of a ratio: noise in the reference alone would make it small


def cpu_seconds(action: Action) -> float:
    """CPU time that this process spends on an action, in seconds."""
    started = time.process_time()
    action()
    return time.process_time() - started


def least_seconds(action: Action, limit_s: float, tries: int = 20) -> float:
    """The least CPU time of an action, tried until it is below a limit and at most so often."""
    least_s = float("inf")
    for _ in range(tries):
        least_s = min(least_s, cpu_seconds(action))
        if least_s < limit_s:
            break
    return least_s


def least_ratio(action: Action, reference: Action, limit: float, tries: int = 20) -> float:
    """An action's least CPU time by a reference's, tried in turn until that is below a limit and at most so often."""
    least_s = reference_s = float("inf")
    for number in range(tries):
        least_s, reference_s = min(least_s, cpu_seconds(action)), min(reference_s, cpu_seconds(reference))
        if number + 1 >= MIN_TRIES and least_s < limit * reference_s:
            break
    return least_s / max(reference_s, 1e-9)
