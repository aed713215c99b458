"""Calibration: stretching cumulative probabilities so that stated quantiles cover what they say.

If the stated 90 % quantile was passed by 14 % of validation answers, the cumulative probability 0.90 really
means 0.86. `Calibration` is that map, monotone, from 0 to 1, fitted per kind of turn. Knows probabilities
alone; lengths and networks are elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mope.grid import Array

# stated probabilities at which the map is known, closest together at the ends, where extreme quantiles lie
KNOTS = np.sin(np.linspace(0.0, np.pi / 2, 65)) ** 2


def cumulative_map(levels: Array, censored: Array, knots: Array, prior: Array, prior_count: float) -> Array:
    """How often the true length lay below each stated probability, shape of `knots`.

    Kaplan and Meier's estimator (1958), so that a censored answer counts only up to where it was cut.

    Args:
        levels: stated cumulative probability of each true length, in [0, 1].
        censored: True where the length is only a lower bound.
        knots: stated probabilities to evaluate the map at, increasing.
        prior: values of the map that are assumed with the weight of `prior_count` answers.
        prior_count: see `prior`.
    """
    order = np.argsort(levels, kind="stable")
    ordered, ended = levels[order], ~censored[order]
    at_risk = np.arange(len(levels), 0, -1)
    survival = np.cumprod(np.where(ended, 1.0 - 1.0 / at_risk, 1.0))
    position = np.searchsorted(ordered, knots, side="right")
    observed = 1.0 - np.concatenate([[1.0], survival])[position]
    return np.asarray((len(levels) * observed + prior_count * prior) / (len(levels) + prior_count))


@dataclass(frozen=True, slots=True)
class Calibration:
    """A monotone map of cumulative probabilities per kind of turn.

    Attributes:
        knots: stated probabilities, from 0 to 1, shape (P,).
        first_turn: what they mean on the first turn of a conversation, shape (P,).
        later_turn: what they mean on later turns, shape (P,).
    """

    knots: Array
    first_turn: Array
    later_turn: Array

    @classmethod
    def identity(cls) -> Calibration:
        """A calibration that changes nothing."""
        return cls(KNOTS, KNOTS, KNOTS)

    @classmethod
    def fit(
        cls, levels: Array, censored: Array, has_history: Array, *, prior_count: float = 50.0, turn_count: float = 100.0
    ) -> Calibration:
        """Fit on validation rows.

        Args:
            levels: stated cumulative probability of each true length.
            censored: True where the length is only a lower bound.
            has_history: False on first turns.
            prior_count: answers that the identity is worth.
            turn_count: answers that the map over all turns is worth in the map of each kind of turn.
        """
        overall = cumulative_map(levels, censored, KNOTS, KNOTS, prior_count)
        maps = [
            _pinned(cumulative_map(levels[kind], censored[kind], KNOTS, overall, turn_count))
            for kind in (~has_history, has_history)
        ]
        return cls(KNOTS, maps[0], maps[1])

    def __call__(self, cdf_BE: Array, has_history_B: Array) -> Array:
        """The corrected cumulative probabilities, shape (B, E); still monotone, 0 and 1 stay."""
        if len(cdf_BE) == 1:
            return np.interp(cdf_BE, self.knots, self.later_turn if has_history_B[0] else self.first_turn)
        first = np.interp(cdf_BE, self.knots, self.first_turn)
        later = np.interp(cdf_BE, self.knots, self.later_turn)
        return np.where(has_history_B[:, None], later, first)


def _pinned(values: Array) -> Array:
    """A map made monotone, with its ends at 0 and 1."""
    pinned = np.maximum.accumulate(np.clip(values, 0.0, 1.0))
    pinned[0], pinned[-1] = 0.0, 1.0
    return pinned
