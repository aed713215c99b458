"""Learning while serving: correcting scale and coverage per target LLM from finished requests.

Two corrections, both shrunk towards what all LLMs together show, and from there towards none: a factor on
the length (a clipped mean of log ratios) and a histogram of where true lengths fell within the stated
distributions. Old observations fade. O(1) per observation, bounded memory, plain numbers to save. Knows
distributions and outcomes; not requests or networks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from math import inf
from threading import Lock
from typing import Any

import numpy as np

from mope.errors import ArtifactError, DataError
from mope.grid import Array, cdf_at, quantiles_at

NUM_LEVELS = 20  # bins of the histogram of stated probabilities
FADE = 0.995  # weight of an observation after one more: the last 200 count
PRIOR_COUNT = 20.0  # observations that the wider group's correction is worth
MAX_LOG_RATIO = 4.0  # one observation moves the scale by no more than this, before shrinking
MAX_LLMS = 1024

EVERY_LLM = ""
_LEVELS = np.linspace(0.0, 1.0, NUM_LEVELS + 1)


@dataclass(frozen=True, slots=True)
class _State:
    """Faded sums of one LLM's observations; never changed, so that readers need no lock."""

    count: float = 0.0
    log_ratio: float = 0.0
    levels: Array = field(default_factory=lambda: np.zeros(NUM_LEVELS))

    def after(self, log_ratio: float, levels: Array) -> _State:
        """The sums after one more observation."""
        return _State(self.count * FADE + 1.0, self.log_ratio * FADE + log_ratio, self.levels * FADE + levels)


class Recalibrator:
    """Corrections learned from pairs of a prediction and a true length. Safe to use from many threads."""

    def __init__(self) -> None:
        self._writing = Lock()
        self._states: OrderedDict[str, _State] = OrderedDict({EVERY_LLM: _State()})

    def __len__(self) -> int:
        """How many observations still count, over all LLMs, rounded down."""
        return int(self._states[EVERY_LLM].count)

    def observe(self, edges: Array, raw_cumulative: Array, llm: str | None, actual_tokens: int, censored: bool) -> None:
        """Learn from one finished request.

        Args:
            edges: edges of the prediction's grid in tokens.
            raw_cumulative: the predicted distribution before any correction from here.
            llm: the LLM that answered, if known.
            actual_tokens: tokens that were generated.
            censored: the answer was cut (aborted, or its cap was hit): its true length is at least that.

        Raises:
            DataError: fewer than 1 token.
        """
        if not 1 <= actual_tokens < inf:
            raise DataError(f"an observed answer has at least 1 token; got {actual_tokens!r}")
        median = float(quantiles_at(edges, raw_cumulative[None], np.array([[0.5]]))[0, 0])
        log_ratio = float(np.clip(np.log(actual_tokens / median), -MAX_LOG_RATIO, MAX_LOG_RATIO))
        if censored and log_ratio < 0:
            return  # says only that the answer would have been longer than something short
        with self._writing:
            self._learn(edges, raw_cumulative, llm, actual_tokens, censored, log_ratio)

    def _learn(
        self, edges: Array, raw_cumulative: Array, llm: str | None, actual_tokens: int, censored: bool, log_ratio: float
    ) -> None:
        everyone, own = self._known(llm)
        shifted = self._shift(edges, raw_cumulative, _log_factor(everyone, own))
        level = float(cdf_at(edges, shifted[None], np.array([actual_tokens]))[0])
        position = min(int(level * NUM_LEVELS), NUM_LEVELS - 1)
        levels = np.zeros(NUM_LEVELS)
        if censored:
            levels[position:] = 1.0 / (NUM_LEVELS - position)
        else:
            levels[position] = 1.0
        for key in (EVERY_LLM, llm) if llm else (EVERY_LLM,):
            self._states[key] = self._states.get(key, _State()).after(log_ratio, levels)
            self._states.move_to_end(key)
        if len(self._states) > MAX_LLMS + 1:
            oldest = next(key for key in self._states if key != EVERY_LLM)
            del self._states[oldest]

    def correct(self, edges: Array, raw_cumulative: Array, llm: str | None) -> Array:
        """The corrected cumulative probabilities at the edges, shape (E,); unchanged before any observation."""
        everyone, own = self._known(llm)
        if everyone.count == 0:
            return raw_cumulative
        shifted = self._shift(edges, raw_cumulative, _log_factor(everyone, own))
        return np.asarray(np.interp(shifted, _LEVELS, _level_map(everyone, own)))

    def _known(self, llm: str | None) -> tuple[_State, _State | None]:
        return self._states[EVERY_LLM], self._states.get(llm) if llm else None

    @staticmethod
    def _shift(edges: Array, cumulative: Array, log_factor: float) -> Array:
        """The distribution of exp(log_factor) times the length, on the same edges."""
        log_edges = np.log(edges)
        stretched = np.interp(log_edges - log_factor, log_edges, cumulative)
        stretched[0], stretched[-1] = 0.0, 1.0
        return np.asarray(stretched)

    def to_json(self) -> dict[str, Any]:
        """Everything needed to go on later, as plain numbers."""
        with self._writing:
            states = list(self._states.items())
        return {
            key: {"count": state.count, "log_ratio": state.log_ratio, "levels": state.levels.tolist()}
            for key, state in states
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Recalibrator:
        """Restore what `to_json` wrote, exactly.

        Raises:
            ArtifactError: it was not written by `to_json`.
        """
        restored = cls()
        try:
            for key, state in saved.items():
                levels = np.asarray(state["levels"], dtype=np.float64)
                if levels.shape != (NUM_LEVELS,):
                    raise ArtifactError(f"recalibration of {key!r} has {len(levels)} levels; expected {NUM_LEVELS}")
                restored._states[key] = _State(float(state["count"]), float(state["log_ratio"]), levels)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"recalibration.json can't be read: {error!r}; copy the whole folder again") from error
        return restored


def _log_factor(everyone: _State, own: _State | None) -> float:
    shared = everyone.log_ratio / (everyone.count + PRIOR_COUNT)
    return shared if own is None else (own.log_ratio + PRIOR_COUNT * shared) / (own.count + PRIOR_COUNT)


def _level_map(everyone: _State, own: _State | None) -> Array:
    shares = (everyone.levels + PRIOR_COUNT / NUM_LEVELS) / (everyone.count + PRIOR_COUNT)
    if own is not None:
        shares = (own.levels + PRIOR_COUNT * shares) / (own.count + PRIOR_COUNT)
    level_map = np.zeros(NUM_LEVELS + 1)
    np.cumsum(shares, out=level_map[1:])
    level_map[-1] = 1.0
    return level_map
