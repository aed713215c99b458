"""How long an answer is taken to be, where the scheduler is: what the front end predicted, corrected by what was seen.

Learns from finished requests of this process: predictions by `mope.recalibration`, in a thread of its own, and for
requests without a prediction a running mean of each client's answers, as in VTC's artifact (p becomes (4 p + n) / 5).
Knows no engine.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from mope.epochs import Target
from mope.errors import UserError
from mope.grid import Array
from mope.recalibration import Recalibrator
from mope.serving_hooks.carried import LEVELS, Carried

_MAX_CLIENTS = 10_000  # with a running mean of their own
_MAX_WAITING = 10_000  # finished requests that wait to be learned from; more are dropped
_CUMULATIVE = np.array([0.0, *LEVELS, 1.0])
_TAIL = 4.0  # the last edge is so many times the highest quantile
_SHARE = 0.2  # of the newest answer in a running mean

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
        num_observed: finished requests that were learned from.
        num_dropped: those that were not, because learning was behind.
    """

    def __init__(self, *, recalibrate: bool = True) -> None:
        self.recalibrator = Recalibrator() if recalibrate else None
        self.num_observed = self.num_dropped = 0
        self._means: OrderedDict[str, float] = OrderedDict()
        self._finished: queue.Queue[tuple[tuple[float, ...], Target, int, bool] | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None

    def expected(self, carried: Carried, client: str) -> Expected:
        """How long an answer is taken to be. Takes some 50 µs.

        Args:
            carried: what the front end said.
            client: who asks, for the mean of its answers.
        """
        if self.recalibrator is not None and carried.quantiles:
            corrected, cumulative = self._corrected(self.recalibrator, carried)
            mean = float(np.diff(cumulative) @ (corrected[1:] + corrected[:-1])) / 2
            return Expected(mean, float(np.interp(0.9, cumulative, corrected)))
        tokens = carried.tokens if carried.tokens is not None else self._means.get(client)
        return Expected(tokens, carried.quantiles[LEVELS.index(0.9)] if carried.quantiles else None)

    def corrected(self, carried: Carried) -> Carried:
        """What is predicted, as finished requests correct it: for schedulers that take predictions as they come."""
        if self.recalibrator is None or not carried.quantiles:
            return carried
        edges, cumulative = self._corrected(self.recalibrator, carried)
        mean = float(np.diff(cumulative) @ (edges[1:] + edges[:-1])) / 2
        return carried._replace(tokens=mean, quantiles=tuple(np.interp(LEVELS, cumulative, edges).tolist()))

    @staticmethod
    def _corrected(recalibrator: Recalibrator, carried: Carried) -> tuple[Array, Array]:
        return recalibrator.correct(_edges(carried.quantiles), _CUMULATIVE, _target(carried.target))

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
        if self._thread is None:
            self._thread = threading.Thread(target=self._learn, name="mope-learning", daemon=True)
            self._thread.start()
        try:
            self._finished.put_nowait((carried.quantiles, _target(carried.target), tokens, censored))
        except queue.Full:
            self.num_dropped += 1

    def _learn(self) -> None:
        while (item := self._finished.get()) is not None:
            quantiles, target, tokens, censored = item
            try:
                if self.recalibrator is not None:
                    self.recalibrator.observe(_edges(quantiles), _CUMULATIVE, target, tokens, censored)
                self.num_observed += 1
            except Exception:
                logger.exception("mope stops learning from finished requests; predictions are used as they come")
                self.recalibrator = None
                return

    def close(self, timeout_s: float = 2.0) -> None:
        """Learns what is left to learn, and stops."""
        if self._thread is not None and self._thread.is_alive():
            self._finished.put(None)
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
        self._means = OrderedDict((str(client), float(mean)) for client, mean in kept["means"].items())


def _target(text: str | None) -> Target:
    llm, family, mode = [*(text or "").split("|", 2), "", "", ""][:3]
    return Target(llm, mode, family)


def _edges(quantiles: tuple[float, ...]) -> Array:
    """Edges that rise: quantiles of a narrow prediction may be equal."""
    edges = np.array([0.5, *quantiles, _TAIL * max(quantiles[-1], 1.0)])
    rising: Array = np.maximum.accumulate(np.maximum(edges, 0.5)) + np.arange(len(edges)) * 1e-6
    return rising
