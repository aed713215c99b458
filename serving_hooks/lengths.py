"""How long an answer is taken to be, where the scheduler is: what the front end predicted, corrected by what was seen.

Learns from finished requests of this process: predictions by `mope.recalibration`, in a thread of its own, and for
requests without a prediction a running mean of each client's answers, as in VTC's artifact (p becomes (4 p + n) / 5).
Knows no engine.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from math import inf, log2
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from mope.epochs import Target
from mope.errors import UserError
from mope.grid import Array
from mope.recalibration import Recalibrator
from mope.serving_hooks.carried import LEVELS, Carried

_MAX_CLIENTS = 10_000  # with a running mean of their own
_MAX_WAITING = 10_000  # finished requests that wait to be learned from; more are dropped
_SCORES = np.array([NormalDist().inv_cdf(level) for level in LEVELS])
_FINE_SCORES = np.linspace(-4.0, 4.5, 69)  # of the grid on which predictions are corrected
_CUMULATIVE = np.array([0.0, *(NormalDist().cdf(score) for score in _FINE_SCORES), 1.0])
_LOOK_EVERY_S = 0.1  # between looks for finished requests
_SHARE = 0.2  # of the newest answer in a running mean
_ALL_OF, _ONE_IN = 1_000, 8  # corrections learn from so many finished requests, then from one in eight
_PER_OCTAVE, _MAX_FACTORS = 8, 10_000
_AS_IS = (1.0, 1.0)
_NINE_TENTHS = LEVELS.index(0.9)

logger = logging.getLogger("mope")


class Expected(NamedTuple):
    """What is expected of an answer.

    Attributes:
        tokens: expected response tokens; None where nothing is known.
        nine_tenths: what nine of ten such answers do not exceed; None without a prediction.
    """

    tokens: float | None
    nine_tenths: float | None = None


class Lengths:
    """Expected response tokens of requests, learning as they finish.

    Attributes:
        recalibrator: corrections by LLM; None where predictions are taken as they come.
        num_observed: finished requests that corrections were learned from, those of an earlier run included.
        num_dropped: those that were not, because learning was behind.
    """

    def __init__(self, *, recalibrate: bool = True) -> None:
        self.recalibrator = Recalibrator() if recalibrate else None
        self.num_observed = self.num_dropped = 0
        self._means: OrderedDict[str, float] = OrderedDict()
        self._finished: deque[tuple[tuple[float, ...], str | None, int, bool]] = deque()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._factors: dict[tuple[str | None, int], tuple[float, float, int]] = {}
        self._num_offered = 0

    def expected(self, carried: Carried, client: str) -> Expected:
        """How long an answer is taken to be. Takes a microsecond or two, and some 70 where a correction is new.

        Args:
            carried: what the front end said.
            client: who asks, for the mean of its answers.
        """
        tokens = carried.tokens
        if tokens is None:
            return Expected(self._means.get(client))
        if not carried.quantiles:
            return Expected(tokens)
        factors = self._factors_of(carried, tokens) if self.recalibrator is not None and self.num_observed else _AS_IS
        return Expected(tokens * factors[0], carried.quantiles[_NINE_TENTHS] * factors[1])

    def _factors_of(self, carried: Carried, tokens: float) -> tuple[float, float]:
        """By how much mean and 90 % quantile are corrected: worked out for an eighth of an octave, and kept a while."""
        key = carried.target, int(_PER_OCTAVE * log2(tokens)) if 1 < tokens < inf else 0
        kept = self._factors.get(key)
        if kept is not None and self.num_observed < kept[2]:
            return kept[0], kept[1]
        recalibrator = self.recalibrator
        if recalibrator is None:
            return _AS_IS
        edges = _edges(carried.quantiles)
        corrected, cumulative = recalibrator.correct(edges, _CUMULATIVE, _target(carried.target))
        mean, mean_before = _mean(corrected, cumulative), _mean(edges, _CUMULATIVE)
        high = float(np.interp(0.9, cumulative, corrected))
        factors = mean / mean_before, high / max(float(np.interp(0.9, _CUMULATIVE, edges)), 0.5)
        if len(self._factors) >= _MAX_FACTORS:
            self._factors.clear()
        self._factors[key] = (*factors, self.num_observed + self.num_observed // 4 + 4)
        return factors

    def corrected(self, carried: Carried) -> Carried:
        """What is predicted, as finished requests correct it: for schedulers that take predictions as they come."""
        if self.recalibrator is None or not carried.quantiles:
            return carried
        edges, cumulative = self.recalibrator.correct(_edges(carried.quantiles), _CUMULATIVE, _target(carried.target))
        quantiles = tuple(np.interp(LEVELS, cumulative, edges).tolist())
        return carried._replace(tokens=_mean(edges, cumulative), quantiles=quantiles)

    def observe(self, carried: Carried, client: str, tokens: int, *, censored: bool) -> None:
        """Learns from a finished request; returns at once.

        Args:
            carried: what the front end had said.
            client: who asked.
            tokens: that were generated; an answer without any teaches nothing.
            censored: it was cut: aborted, or its cap was hit.
        """
        if tokens < 1:
            return
        if not censored:
            mean = self._means.pop(client, None)
            self._means[client] = float(tokens) if mean is None else mean + _SHARE * (tokens - mean)
            if len(self._means) > _MAX_CLIENTS:
                self._means.popitem(last=False)
        if self.recalibrator is None or not carried.quantiles:
            return
        self._num_offered += 1
        if self._num_offered > _ALL_OF and self._num_offered % _ONE_IN:
            return
        if len(self._finished) >= _MAX_WAITING:
            self.num_dropped += 1
            return
        self._finished.append((carried.quantiles, carried.target, tokens, censored))
        if self._thread is None:
            self._thread = threading.Thread(target=self._learn, name="mope-learning", daemon=True)
            self._thread.start()

    def _learn(self) -> None:
        """Looks now and then, so that the scheduling thread has nobody to wake."""
        while not (self._closed.wait(_LOOK_EVERY_S) and not self._finished):
            while self._finished and self.recalibrator is not None:
                quantiles, target, tokens, censored = self._finished.popleft()
                try:
                    self.recalibrator.observe(_edges(quantiles), _CUMULATIVE, _target(target), tokens, censored)
                    self.num_observed += 1
                except Exception:
                    logger.exception("mope stops learning from finished requests; predictions are used as they come")
                    self.recalibrator = None
                    return

    def close(self, timeout_s: float = 2.0) -> None:
        """Learns what is left to learn, and stops."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def to_json(self) -> dict[str, Any]:
        """What was learned, as plain JSON values."""
        return {
            "recalibration": self.recalibrator.to_json() if self.recalibrator is not None else None,
            "means": dict(self._means),
        }

    def restore(self, kept: Any) -> None:
        """Takes over what `to_json` gave.

        Raises:
            UserError: it is damaged, or of another version.
        """
        if not isinstance(kept, dict) or not isinstance(kept.get("means"), dict):
            raise UserError("what was learned before cannot be read: start without it")
        if self.recalibrator is not None and kept.get("recalibration") is not None:
            self.recalibrator = Recalibrator.from_json(kept["recalibration"])
        self._factors.clear()
        self.num_observed = len(self.recalibrator) if self.recalibrator is not None else 0
        self._means = OrderedDict((str(client), float(mean)) for client, mean in kept["means"].items())


def _mean(edges: Array, cumulative: Array) -> float:
    return float(np.diff(cumulative) @ (edges[1:] + edges[:-1])) / 2


def _target(text: str | None) -> Target:
    llm, family, mode = [*(text or "").split("|", 2), "", "", ""][:3]
    return Target(llm, mode, family)


def _edges(quantiles: tuple[float, ...]) -> Array:
    """A grid with `_CUMULATIVE`: between quantiles and beyond them straight on, log tokens over the normal's scores."""
    logs = np.log(np.maximum(quantiles, 0.5))
    fine = np.interp(_FINE_SCORES, _SCORES, logs)
    low, high = _SCORES[0] > _FINE_SCORES, _SCORES[-1] < _FINE_SCORES
    fine[low] = logs[0] + (logs[2] - logs[0]) / (_SCORES[2] - _SCORES[0]) * (_FINE_SCORES[low] - _SCORES[0])
    fine[high] = logs[-1] + (logs[-1] - logs[-3]) / (_SCORES[-1] - _SCORES[-3]) * (_FINE_SCORES[high] - _SCORES[-1])
    edges: Array = np.exp(np.concatenate([[min(fine[0], 0.0) - 0.1], fine, [fine[-1] + 0.1]]))
    edges += np.arange(len(edges)) * 1e-6  # quantiles of a narrow prediction may be equal
    return edges
