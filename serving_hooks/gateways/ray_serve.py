"""A request router for Ray Serve: each request goes to the replica with the least predicted response tokens left.

    RequestRouterConfig(request_router_class="mope.serving_hooks.gateways.ray_serve.LeastTokensRouter")

A `mope serve` predicts. A request never waits for its prediction: it is routed at once, counts as a typical request,
and is corrected when the prediction arrives. If there are no predictions, Ray's power of two choices routes. The router
sees the requests of its own process; other requests count by the queue lengths that Ray reports.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

from mope.client import TYPICAL, Predictions
from mope.errors import ConfigError

MAX_OPEN, LASTS_S = 100_000, 3600.0  # requests that are remembered, and for how long
MAX_ASKED = 256  # predictions under way; more requests than that count as typical ones
LEAST_SHARE = 0.1  # of a prediction that a request counts as when it runs longer than predicted
GIVEN = ("messages", "prompt", "input")  # one of them is in every body of OpenAI's API

logger = logging.getLogger("mope")


@dataclass
class Open:
    """A request that a replica runs.

    Attributes:
        replica: that runs it.
        tokens: its response tokens, predicted or typical.
        predicted: whether they are predicted.
        since_s: when it was routed.
    """

    replica: Any
    tokens: float
    predicted: bool
    since_s: float = field(default_factory=time.monotonic)

    def remaining(self, now_s: float, tokens_per_s: float) -> float:
        """Response tokens that are left.

        Args:
            now_s: by the monotonic clock.
            tokens_per_s: decode speed of one request.
        """
        return max(self.tokens - tokens_per_s * (now_s - self.since_s), LEAST_SHARE * self.tokens)


class Books:
    """Requests under way, by replica. Threads may share it; its memory is bounded.

    Args:
        typical: response tokens of a request without a prediction.
        tokens_per_s: decode speed of one request; with 0 a request counts in full until it ends.
    """

    def __init__(self, typical: float, tokens_per_s: float = 0.0) -> None:
        self._typical, self._tokens_per_s = typical, tokens_per_s
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Open] = OrderedDict()
        self._by_replica: dict[Any, dict[str, Open]] = {}
        self._early: OrderedDict[str, float] = OrderedDict()  # predictions of requests that are not routed yet
        self._num_predicted = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def predicted(self) -> bool:
        """Whether any request under way has a prediction."""
        return self._num_predicted > 0

    def begin(self, name: str, replica: Any) -> None:
        """A replica runs a request from now on."""
        with self._lock:
            self._end(name)
            limit_s = time.monotonic() - LASTS_S
            while self._open:
                oldest, request = next(iter(self._open.items()))
                if request.since_s > limit_s and len(self._open) < MAX_OPEN:
                    break
                self._end(oldest)
            tokens = self._early.pop(name, None)
            begun = Open(replica, self._typical if tokens is None else tokens, tokens is not None)
            self._num_predicted += begun.predicted
            self._open[name] = self._by_replica.setdefault(replica, {})[name] = begun

    def correct(self, name: str, tokens: float) -> None:
        """A prediction has arrived."""
        with self._lock:
            request = self._open.get(name)
            if request is None:
                self._early[name] = tokens
                if len(self._early) > MAX_ASKED:
                    self._early.popitem(last=False)
                return
            self._num_predicted += not request.predicted
            request.tokens, request.predicted = tokens, True

    def end(self, name: str, replica: Any) -> None:
        """A request has ended. Ends of attempts that another replica refused change nothing."""
        with self._lock:
            self._early.pop(name, None)
            request = self._open.get(name)
            if request is not None and request.replica == replica:
                self._end(name)

    def _end(self, name: str) -> None:
        request = self._open.pop(name, None)
        if request is None:
            return
        self._num_predicted -= request.predicted
        here = self._by_replica[request.replica]
        del here[name]
        if not here:
            del self._by_replica[request.replica]

    def load(self, replica: Any, queue_length: int | None) -> float:
        """Response tokens that a replica has left to generate.

        Args:
            replica: its id.
            queue_length: requests there as Ray knows it; those that this router did not send count as typical.
        """
        now_s = time.monotonic()
        with self._lock:
            here = self._by_replica.get(replica, {})
            known = sum(request.remaining(now_s, self._tokens_per_s) for request in here.values())
            return known + self._typical * max((queue_length or 0) - len(here), 0)


class Background:
    """Predicts in a thread with an event loop of its own, so that Ray's loop neither waits nor serialises bodies.

    Args:
        connect: makes the client, in that thread.
        told: is called there with a request's name and predicted tokens, or None where there is no prediction.
    """

    def __init__(self, connect: Callable[[], Predictions], told: Callable[[str, float | None], None]) -> None:
        self._connect, self._told = connect, told
        self._asked: Predictions | None = None
        self._under_way: dict[str, None] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="mope-predictions", daemon=True).start()

    def ask(self, name: str, values: Iterable[Any]) -> bool:
        """Asks for a prediction; returns at once.

        Args:
            name: of the request.
            values: its arguments, one of which is a body of OpenAI's API.

        Returns:
            False where too many predictions are under way.
        """
        if name in self._under_way:
            return True
        if len(self._under_way) >= MAX_ASKED:
            return False
        self._under_way[name] = None
        asyncio.run_coroutine_threadsafe(self._predict(name, tuple(values)), self._loop)
        return True

    async def _predict(self, name: str, values: tuple[Any, ...]) -> None:
        tokens = None
        try:
            if self._asked is None:
                self._asked = self._connect()
            body = body_of(values)
            prediction = None if body is None else await self._asked.predict(body)
            if prediction is not None and prediction.made:
                tokens = prediction.mean
        except Exception:  # no request may fail because of its prediction
            logger.debug("a prediction failed", exc_info=True)
        finally:
            self._under_way.pop(name, None)
            self._told(name, tokens)


class LeastTokensRouter(PowerOfTwoChoicesRequestRouter):
    """Sends each request to the replica with the fewest predicted response tokens left.

    Keeps Ray's order of arrival, locality and multiplexing. Replicas that are full are passed over. An error of ours
    leaves the choice to Ray's power of two choices; it is counted in `failures` and logged once.
    """

    failures = 0
    unpredicted = 0

    def initialize_state(  # type: ignore[override, unused-ignore]
        self,
        url: str = "http://127.0.0.1:8400",
        deadline_ms: float = 100.0,
        choices: int = 8,
        tokens_per_s: float = 0.0,
    ) -> None:
        """Reads `request_router_kwargs`. An API key comes from MOPE_API_KEY.

        Args:
            url: of the service.
            deadline_ms: milliseconds after which a prediction is given up.
            choices: replicas that are compared, drawn at random, 2 or more.
            tokens_per_s: decode speed of one request, to count down what is left; 0 counts it in full until it ends.

        Raises:
            ConfigError: a value that cannot be used.
        """
        if isinstance(choices, bool) or not isinstance(choices, int) or choices < 2:
            raise ConfigError(f'choices: got {choices!r}; expected a whole number from 2, such as {{"choices": 8}}')
        for name, value, least in (("deadline_ms", deadline_ms, 0.001), ("tokens_per_s", tokens_per_s, 0.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise ConfigError(f'{name}: got {value!r}; expected a number from {least:g}, such as {{"{name}": 100}}')
        self._choices, self._url, self._deadline_s = choices, url, deadline_ms / 1000
        self._books = Books(TYPICAL.mean, tokens_per_s)
        self._background = Background(self.connect, self._predicted)

    def connect(self) -> Predictions:
        """Makes the client of the service."""
        return Predictions(self._url, api_key=os.environ.get("MOPE_API_KEY"), deadline_s=self._deadline_s)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        """The replica with the least load, then the others compared; Ray's own choice where nothing is predicted."""
        try:
            chosen = self._by_tokens(pending_request)
        except Exception as error:
            self._failed(error)
            chosen = []
        return chosen or await super().choose_replicas(candidate_replicas, pending_request)

    def _by_tokens(self, pending: Any | None) -> list[list[Any]]:
        if pending is None:
            return []
        name = pending.metadata.internal_request_id
        if not self._background.ask(name, (*pending.args, *pending.kwargs.values())):
            self.unpredicted += 1
        # requests of a multiplexed model are for Ray to place
        if not self._books.predicted or pending.metadata.multiplexed_model_id:
            return []
        near = list(self.apply_locality_routing(pending_request=pending))
        compared = random.sample(near, min(self._choices, len(near)))  # in random order, so that ties are fair
        lengths = self.replica_queue_len_cache
        compared.sort(key=lambda replica: self._books.load(replica, lengths.get(replica)))
        ranked = [self.curr_replicas[replica] for replica in compared]
        return [rank for rank in (ranked[:1], ranked[1:]) if rank]  # of the second rank Ray takes the shortest queue

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """A replica has accepted a request."""
        try:
            self._books.begin(pending_request.metadata.internal_request_id, replica_id)
        except Exception as error:
            self._failed(error)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """A request has ended, failed or was cancelled."""
        try:
            self._books.end(internal_request_id, replica_id)
        except Exception as error:
            self._failed(error)

    def _predicted(self, name: str, tokens: float | None) -> None:
        if tokens is not None:
            self._books.correct(name, tokens)
            return
        self.unpredicted += 1
        if self.unpredicted == 1:
            logger.warning("mope: a request got no prediction from %s; such requests count as typical ones", self._url)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            logger.error("mope: Ray's power of two choices routes, because of an error of ours", exc_info=error)


def body_of(values: Iterable[Any]) -> Mapping[str, Any] | None:
    """The body of OpenAI's API among a request's arguments; None if there is none.

    Args:
        values: mappings, pydantic models as Ray Serve LLM passes them, JSON, or objects that hold one of these as
            `body`.
    """
    for value in values:
        for found in (value, getattr(value, "body", None)):
            if callable(dump := getattr(found, "model_dump", None)):
                found = dump(mode="json", exclude_none=True)
            elif isinstance(found, str | bytes) and found.lstrip()[:1] in ("{", b"{"):
                try:
                    found = json.loads(found)
                except (ValueError, RecursionError):
                    continue
            if isinstance(found, Mapping) and any(name in found for name in GIVEN):
                return found
    return None
