"""How long an answer is taken to be, and what finished requests teach, for the hook of any engine.

Predictions are corrected by `mope.corrector`, the same as in Python, and learned from in a thread of its own. That
thread also corrects predictions that are needed some steps later, between two lessons and many in a row. Predictions of
a service come corrected, and the thread tells the service how long answers were. For requests without a prediction
there is a running mean of each client's answers, as in VTC's artifact (p becomes (4 p + n) / 5). Knows no engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple, TypeVar

from mope.corrector import Answering, Corrector
from mope.errors import DataError, ServerError, UserError
from mope.grid import Array
from mope.recalibration import Recalibrator
from mope.serving_hooks.carried import Carried, unpack
from mope.serving_hooks.remote import REST_S, Teacher, name_of

_MAX_CLIENTS = 10_000  # with a running mean of their own
_MAX_MEAN = 10_000_000  # response tokens of a running mean that is restored
_MAX_WAITING = 10_000  # finished requests that wait to be learned from; more are dropped
_LOOK_EVERY_S = 0.2  # between looks for finished requests and for work to do ahead
_SHARE = 0.2  # of the newest answer in a running mean
_ALL_OF, _ONE_IN = 1_000, 8  # corrections learn from so many finished requests, then from one in eight

T = TypeVar("T")

logger = logging.getLogger("mope")


_answering = lru_cache(maxsize=1024)(Answering.read)


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
        corrector: corrects predictions; None where they are taken as the front end says them.
        teacher: tells a service that predicts what finished requests teach; None where no service does.
        num_seen: complete answers that running means were learned from, in this run.
        num_observed: finished requests that corrections were learned from, those of an earlier run included.
        num_dropped: those that were not, because learning was behind or what was carried could not be read.
        num_refused: those that were not, because their client has more than its share of the newest lessons.
        num_forced: those that were not, because their client had forced the length.
        num_lost: those that were not, because the service did not take them: it is down, or their ids have expired.
    """

    def __init__(self, corrector: Corrector | None = None, teacher: Teacher | None = None) -> None:
        self.corrector, self.teacher = corrector, teacher
        self.num_observed = self.num_dropped = self.num_seen = self.num_refused = self.num_forced = self.num_lost = 0
        self._means: OrderedDict[str, float] = OrderedDict()
        self._finished: deque[tuple[Carried, int, bool, str]] = deque()
        self._ahead: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_offered = 0
        self._until_s = inf  # when what is left to tell a service is given up

    def expected(self, carried: Carried, client: str, max_tokens: int | None = None) -> Expected:
        """How long an answer is taken to be. Some ten microseconds, and a millisecond where an LLM is new.

        Args:
            carried: what the front end said.
            client: who asks, for the mean of its answers.
            max_tokens: the request's cap.
        """
        if carried.tokens is None:
            return Expected(self._means.get(client))
        # before the first lesson, the front end's figures are those that the corrector would give
        if self.corrector is not None and self.num_observed and (read := self._read(carried)) is not None:
            raw_E, answering = read
            return Expected(*self.corrector.expected(raw_E, answering, max_tokens))
        return Expected(carried.tokens, carried.high)

    def _read(self, carried: Carried) -> tuple[Array, Answering] | None:
        if self.corrector is None or carried.raw is None or carried.answering is None:
            return None
        raw_E, answering = unpack(carried.raw, len(self.corrector.edges)), _answering(carried.answering)
        return None if raw_E is None or answering is None else (raw_E, answering)

    def observe(self, carried: Carried, client: str, tokens: int, *, censored: bool, forced: bool = False) -> None:
        """Learns from a finished request; returns at once.

        Args:
            carried: what the front end had said.
            client: who asked.
            tokens: that were generated; an answer without any teaches nothing.
            censored: it was cut: aborted, or its cap was hit.
            forced: the client forced the length, see `mope.reader.is_forced`; such a length teaches nothing.
        """
        if tokens < 1:
            return
        if forced:
            self.num_forced += 1
            return
        if not censored:
            self.num_seen += 1
            mean = self._means.pop(client, None)
            self._means[client] = float(tokens) if mean is None else mean + _SHARE * (tokens - mean)
            if len(self._means) > _MAX_CLIENTS:
                self._means.popitem(last=False)
        if self.teacher is not None:
            if name_of(carried.answering) is None:
                return
        elif self.corrector is None or carried.raw is None or carried.answering is None:
            return
        self._num_offered += 1
        if self._num_offered > _ALL_OF and self._num_offered % _ONE_IN:
            return
        if len(self._finished) >= _MAX_WAITING:
            self.num_dropped += 1
            return
        self._finished.append((carried, tokens, censored, client))
        if self._thread is None:
            self._start()

    @property
    def learns(self) -> bool:
        """Whether finished requests teach a predictor, here or elsewhere."""
        return self.corrector is not None or self.teacher is not None

    @property
    def corrects(self) -> bool:
        """Whether `expected` takes tens of microseconds, because a prediction has to be corrected."""
        return self.corrector is not None and self.num_observed > 0

    def work_ahead(self, work: Callable[[T], object], on: T) -> None:
        """Has the learning thread call `work(on)` soon. What it raises is dropped.

        Whoever needs the result does the work again if it is not there in time: the thread may be busy or at its end.
        """
        if len(self._ahead) < _MAX_WAITING:
            self._ahead.append((work, on))
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._learn, name="mope-learning", daemon=True)
        self._thread.start()

    def _do_ahead(self) -> None:
        while self._ahead:
            work, on = self._ahead.popleft()
            with suppress(Exception):  # raised again where the result is needed, which has the means to deal with it
                work(on)

    def _learn(self) -> None:
        """Looks now and then, so that the scheduling thread has nobody to wake."""
        while not (self._closed.wait(_LOOK_EVERY_S) and not self._finished):
            self._do_ahead()
            while self._finished and self.learns:
                self._do_ahead()
                try:
                    if self._taught(*self._finished.popleft()):
                        self.num_observed += 1
                    else:
                        self.num_refused += 1
                except DataError:  # no distribution
                    self.num_dropped += 1
                except ServerError as error:
                    self.num_lost += 1
                    # a service that answers is asked on; one that does not gets a rest, during which lessons wait
                    if error.status is None and self._closed.wait(REST_S):
                        self._until_s = 0.0
                except Exception:
                    logger.exception("mope stops learning from finished requests; predictions are used as they come")
                    self.corrector = self.teacher = None
                    return
                if time.monotonic() > self._until_s:
                    self.num_lost += len(self._finished)
                    self._finished.clear()

    def _taught(self, carried: Carried, tokens: int, censored: bool, client: str) -> bool:
        """Whether a finished request was learned from.

        Raises:
            DataError: what was carried cannot be read.
            ServerError: the service did not take it.
        """
        name = name_of(carried.answering)
        if self.teacher is not None and name is not None:
            return self.teacher.observe(name, tokens, censored=censored, client=client)
        read = self._read(carried)
        if self.corrector is None or read is None:
            raise DataError("no distribution")
        return self.corrector.observe(*read, tokens, censored=censored, client=client)

    def close(self, timeout_s: float = 2.0) -> None:
        """Learns what is left to learn, and stops. What a service does not take in half the time is given up."""
        if self.teacher is not None:
            self._until_s = time.monotonic() + timeout_s / 2
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def to_json(self) -> dict[str, Any]:
        """What was learned, as plain JSON values."""
        return {
            "recalibration": self._copied().to_json() if self.corrector is not None else None,
            "means": dict(self._means),
        }

    def _copied(self) -> Recalibrator:
        """A copy, because to write the recalibrator itself down would make it work out its corrections anew."""
        own = self.corrector.recalibrator if self.corrector is not None else Recalibrator()
        copied = Recalibrator(own.unknown_llms)
        copied.merge(own)
        return copied

    def restore(self, kept: Any) -> None:
        """Takes over what `to_json` gave.

        Raises:
            UserError: it is damaged, or of another version.
        """
        if not isinstance(kept, dict) or not isinstance(kept.get("means"), dict):
            raise UserError("what was learned before cannot be read: start without it")
        means = OrderedDict(kept["means"])
        if len(means) > _MAX_CLIENTS or not all(
            type(mean) in (int, float) and 0 < mean <= _MAX_MEAN for mean in means.values()
        ):
            raise UserError("the means that were learned before are none: start without them")
        if self.corrector is not None and kept.get("recalibration") is not None:
            self.corrector.recalibrator.restore(kept["recalibration"])
            self.num_observed = len(self.corrector.recalibrator)
        self._means = means
