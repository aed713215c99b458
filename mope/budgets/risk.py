"""How sure a reservation has to be, so that no more windows than wanted use more than their limit.

A reservation at the 90 % quantile is exceeded by one answer in ten. That does not make one window in ten go over: many
answers that are shorter make room for one that is longer, and a window that is nearly full is filled up by requests
that look small, any of which may turn out long. So the level of a client follows what its windows did, as adaptive
conformal inference does (Gibbs and Candès, 2021, arXiv 2106.00170): up by a step when one went over, down by a small
part of it when one did not. Over N windows the share that goes over is then within `(HIGHEST - LOWEST) / (STEP N)` of
the wanted one, whatever the traffic and however wrong the predictions, as long as a level within the range reaches it.
"""

from __future__ import annotations

from math import exp, log

STEP = 1.0  # in log odds, of a window that went over
LOWEST, HIGHEST = -3.0, 9.0  # log odds of a level: 4.7 % and 99.99 %


def log_odds(level: float) -> float:
    """The log odds of a level between 0 and 1, within the range."""
    return min(max(log(level / (1.0 - level)), LOWEST), HIGHEST)


def level_of(odds: float) -> float:
    """The level of some log odds."""
    return 1.0 / (1.0 + exp(-odds))


def following(odds: float, risk: float, *, over: bool) -> float:
    """Log odds of the level after a window.

    Args:
        odds: before it.
        risk: share of the windows that may go over, between 0 and 1.
        over: whether it did.
    """
    return min(max(odds + STEP * (over - risk), LOWEST), HIGHEST)
