"""Predictions that wait for their observation: bounded in number and in time."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from mope.corrector import Answering


class Remembered(NamedTuple):
    """What learning needs of a prediction.

    Attributes:
        raw: the raw prediction as float32, which is exact.
        answering: which LLM answers, and how it is asked.
        max_tokens: the request's cap.
        mean: expected response tokens.
        high: the 90 % quantile.
        made: whether the predictor answered, not the fallback.
        free_from: the least response tokens that the request did not force.
        client: who asked.
        payer: who is counted and taught for it: the one whose budget it took from, where there is one.
    """

    raw: bytes
    answering: Answering
    max_tokens: int | None
    mean: float
    high: float
    made: bool
    free_from: float
    client: str | None
    payer: str | None = None


class Memory:
    """Remembers predictions by an id that nobody can guess. For one event loop.

    Args:
        size: predictions at most; the oldest one makes room.
        lasts_s: seconds after which one is forgotten.
        clock: in seconds, never falling.

    Attributes:
        num_expired: predictions that were forgotten by age.
        num_crowded: predictions that made room for a newer one.
    """

    def __init__(self, size: int, lasts_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._lasts_s, self._clock = size, lasts_s, clock
        self._kept: OrderedDict[str, tuple[float, Remembered]] = OrderedDict()  # oldest first
        self.num_expired = self.num_crowded = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, found: Remembered, name: str | None = None) -> str:
        """Remembers a prediction, under a name if there is one; returns its id."""
        self.expire()
        if len(self._kept) >= self._size:
            self._kept.popitem(last=False)
            self.num_crowded += 1
        name = name or secrets.token_urlsafe(12)
        if (before := self._kept.get(name)) is not None:
            if before[1].client != found.client:
                return name  # of another client, who loses nothing by that
            del self._kept[name]  # so that the newest comes last
        self._kept[name] = self._clock() + self._lasts_s, found
        return name

    def find(self, name: str, client: str | None) -> Remembered | None:
        """A prediction of this client; None if there is none, or no longer."""
        self.expire()
        found = self._kept.get(name)
        return found[1] if found is not None and found[1].client == client else None

    def forget(self, name: str) -> None:
        """Forgets a prediction, so that it is observed once."""
        self._kept.pop(name, None)

    def expire(self) -> None:
        """Forgets what is too old."""
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._kept.popitem(last=False)
            self.num_expired += 1
