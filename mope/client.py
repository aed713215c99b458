"""`Predictions`: asks a `mope serve` that runs elsewhere, and never fails because of it.

A gateway awaits a prediction for each request. Where the service is down, late, or answers nonsense, there is still a
prediction: the fallback that the gateway chose, whose `source` says what happened. A budget that cannot be asked for
allows. Needs httpx2 (extra `client`) and nothing else of mope: no predictor and no ONNX Runtime is loaded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mope.errors import ConfigError
from mope.extras import require

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_BYTES = 4 * 2**20  # of a response that is read
LARGEST = 1e9  # tokens or seconds that a service is believed
SETTLE_ATTEMPTS = 3
SETTLED = ("settled", "already", "late")
FAILURES_IN_A_ROW = 5  # after which the service is not asked for `rest_s`

_logger = logging.getLogger("mope")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request takes on an idle engine, by the profile of the service.

    Attributes:
        prompt_tokens: tokens of the prompt, estimated.
        ttft_s: seconds to the first token.
        latency_s: seconds to the last token of an answer of mean length.
        gpu_s: seconds of the engine's binding resource.
    """

    prompt_tokens: int
    ttft_s: float
    latency_s: float
    gpu_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is predicted for one answer, in tokens.

    Attributes:
        median: the length that half of such answers stay under.
        mean: expected length.
        quantiles: lengths by level.
        source: `"model"`; `"fallback:..."` where the predictor did not answer: `deadline`, `queue full`, `error` or
            `no text` where the service says so, `timeout`, `unreachable`, `refused` or `nonsense` where it did not
            answer well.
        id: to observe with; None where the service did not answer.
        expert: index of the expert, -1 for a fallback.
        cost: only where the service has a profile.
        visible: expected tokens without thoughts, where the service knows thoughts of the LLM.
    """

    median: float
    mean: float
    quantiles: Mapping[float, float] = field(default_factory=dict)
    source: str = "model"
    id: str | None = None
    expert: int = -1
    cost: Cost | None = None
    visible: float | None = None

    @property
    def made(self) -> bool:
        """Whether a predictor answered, not a fallback."""
        return self.source == "model"

    def quantile(self, level: float) -> float:
        """The quantile of a level that the service gives; of the next higher one it gives, else of the highest.

        Args:
            level: between 0 and 1. With no quantiles at all, the answer is the mean.
        """
        above = [known for known in sorted(self.quantiles) if known >= level - 1e-9]
        if above:
            return self.quantiles[above[0]]
        return self.quantiles[max(self.quantiles)] if self.quantiles else self.mean


@dataclass(frozen=True, slots=True)
class Reservation:
    """What became of a reservation.

    Attributes:
        allowed: whether the request may run.
        wait_s: seconds until there is room; None if it is allowed, or larger than the whole budget.
        id: to settle with, also where the service did not answer in time: it may have reserved all the same; None where
            the request may not run.
        prediction: of the request.
        amount: what is held, in the budget's unit.
        limit: what the client may use in a window; None without a limit.
        source: `"books"`; `"fallback:..."` where the service did not decide, for the reasons that `Prediction` has.
    """

    allowed: bool
    wait_s: float | None
    id: str | None
    prediction: Prediction
    amount: float = 0.0
    limit: float | None = None
    source: str = "books"


# a round guess; a gateway that knows its own traffic gives something better
TYPICAL = Prediction(
    median=250.0, mean=350.0, quantiles={0.1: 20.0, 0.5: 250.0, 0.9: 800.0, 0.99: 2000.0}, source="fallback"
)


class _Nonsense(ValueError):
    """A response that is none."""


class Predictions:
    """Asks a service for predictions. One for a process; may be used by any number of tasks of one event loop.

    ```
    async with Predictions("http://127.0.0.1:8400") as predictions:
        prediction = await predictions.predict(body)  # of OpenAI's or Anthropic's API, as it came
        ...
        await predictions.observe(prediction, usage=response["usage"], finish_reason="stop")
    ```

    `reserve` and `settle` do the same with a budget. None of them raises anything for what a service or a network
    does, nor for a body that the service refuses. After five failures in a row the service is not asked for `rest_s`,
    and then by one request at a time until it answers, so that a dead one costs no time.

    Args:
        url: of the service, such as `http://127.0.0.1:8400`.
        api_key: sent as a bearer token, to this address alone.
        deadline_s: seconds that a prediction may take, network included.
        observe_timeout_s: seconds that an observation may take.
        fallback: given where there is no prediction.
        rest_s: seconds without questions after five failures in a row.
        allow_unbooked: whether `reserve` allows where the service does not answer.
        max_connections: connections at the same time.

    Raises:
        ConfigError: an address or a time that cannot be used.
        MissingExtraError: httpx2 is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 0.1,
        observe_timeout_s: float = 2.0,
        fallback: Prediction = TYPICAL,
        rest_s: float = 1.0,
        allow_unbooked: bool = True,
        max_connections: int = 100,
    ) -> None:
        httpx = require("httpx2", "mope.client", "client")
        if not isinstance(url, str) or not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
            raise ConfigError(f"url: got {url!r}; expected an address such as http://127.0.0.1:8400")
        for name, value in (("deadline_s", deadline_s), ("observe_timeout_s", observe_timeout_s), ("rest_s", rest_s)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value!r}; expected seconds above 0")
        self.deadline_s, self.observe_timeout_s, self.rest_s = deadline_s, observe_timeout_s, rest_s
        self.fallback, self.allow_unbooked = fallback, allow_unbooked
        self._failures, self._rests_until_s, self._key_refused = 0, 0.0, False
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ConfigError("api_key: expected printable ASCII characters")
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            self._http = httpx.AsyncClient(
                base_url=url.rstrip("/").removesuffix("/v1") + "/v1/",
                headers=headers,
                limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
                timeout=None,  # a deadline for the whole, below
                follow_redirects=False,  # a key is for the address that was given
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"url: got {url!r}; {error}") from error
        self._transport_errors = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError)

    async def predict(self, request: str | Mapping[str, Any], *, deadline_s: float | None = None) -> Prediction:
        """The prediction for one request; the fallback if there is none in time.

        Args:
            request: a prompt, or the body of a request to an LLM server as it is.
            deadline_s: seconds that it may take, in place of the one for all.
        """
        return (await self._predict([request], False, deadline_s))[0]

    async def predict_batch(
        self, requests: Sequence[str | Mapping[str, Any]], *, deadline_s: float | None = None
    ) -> list[Prediction]:
        """Predictions for several requests, in order. If the service refuses one of them, all get the fallback.

        Args:
            requests: each as `predict` takes it. The service limits how many (64 unless it was told otherwise).
            deadline_s: seconds that all of it may take.
        """
        return await self._predict(list(requests), True, deadline_s) if requests else []

    async def _predict(self, requests: Sequence[Any], batch: bool, deadline_s: float | None) -> list[Prediction]:
        if not isinstance(deadline_s, int | float) or not 0 < deadline_s < math.inf:
            deadline_s = self.deadline_s
        bodies = [{"prompt": request} if isinstance(request, str) else request for request in requests]
        try:
            content = json.dumps(bodies if batch else bodies[0], default=_plain).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, RecursionError):
            return self._fallbacks("refused", len(requests))
        # the service has its own deadline within ours, so that it answers with its better fallback
        path = f"predict?deadline_ms={min(max(800 * deadline_s, 0.001), 60_000.0):g}"
        answered, reason = await self._post(path, content, deadline_s)
        if reason:
            return self._fallbacks(reason, len(requests))
        found = answered if batch else [answered]
        try:
            if not isinstance(found, list) or len(found) != len(requests):
                raise _Nonsense
            return [_read(one) for one in found]
        except _Nonsense:
            self._failed("nonsense")
            return self._fallbacks("nonsense", len(requests))

    async def observe(
        self,
        prediction: Prediction | str,
        *,
        completion_tokens: int | None = None,
        usage: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bool:
        """Tells the service how long an answer was.

        Args:
            prediction: what `predict` gave, or its id. One without an id is passed over.
            completion_tokens: tokens that were generated.
            usage: the usage block of the response as it is, in place of `completion_tokens`.
            finish_reason: why the answer ended.

        Returns:
            Whether the service learned from it.
        """
        name = prediction if isinstance(prediction, str) else prediction.id
        if name is None:
            return False
        content = _outcome(name, completion_tokens, usage, finish_reason)
        if content is None:
            return False
        answered, reason = await self._post("observe", content, self.observe_timeout_s)
        return not reason and isinstance(answered, Mapping) and answered.get("learned") is True

    async def reserve(
        self,
        request: str | Mapping[str, Any],
        *,
        client: str | None = None,
        id: str | None = None,
        prompt_tokens: int | None = None,
        deadline_s: float | None = None,
    ) -> Reservation:
        """Takes what a request may need from a client's budget. Where the service does not answer, it is allowed.

        Args:
            request: as `predict` takes it.
            client: whose budget it is; the client of the API key if None.
            id: of the reservation, which no other one may have, so that one that is sent again is not made twice; made
                up if None.
            prompt_tokens: of the prompt, where they are known.
            deadline_s: seconds that it may take, in place of the one for all.
        """
        if not isinstance(deadline_s, int | float) or not 0 < deadline_s < math.inf:
            deadline_s = self.deadline_s
        body: dict[str, Any] = {"request": {"prompt": request} if isinstance(request, str) else request}
        name = id or secrets.token_urlsafe(12)
        for key, value in (("client", client), ("id", name), ("prompt_tokens", prompt_tokens)):
            if value is not None:
                body[key] = value
        reason = "refused"
        try:
            content = json.dumps(body, default=_plain).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, RecursionError):
            pass
        else:
            path = f"reserve?deadline_ms={min(max(800 * deadline_s, 0.001), 60_000.0):g}"
            answered, reason = await self._post(path, content, deadline_s)
            try:
                if not reason:
                    return _read_reservation(answered)
            except _Nonsense:
                reason = self._failed("nonsense")
        return Reservation(
            self.allow_unbooked,
            None if self.allow_unbooked else self.rest_s,
            name if self.allow_unbooked else None,
            self._fallbacks(reason, 1)[0],
            source=f"fallback:{reason}",
        )

    async def settle(
        self,
        reservation: Reservation | str,
        *,
        completion_tokens: int | None = None,
        usage: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bool:
        """Says what a reserved request took; the rest is given back. Tried three times: sent again, it changes nothing.

        Args:
            reservation: what `reserve` gave, or its id. One without an id is passed over.
            completion_tokens: tokens that were generated.
            usage: the usage block of the response as it is, in place of `completion_tokens`.
            finish_reason: why the answer ended.

        Returns:
            Whether the service counted it.
        """
        name = reservation if isinstance(reservation, str) else reservation.id
        if name is None:
            return False
        content = _outcome(name, completion_tokens, usage, finish_reason)
        for attempt in range(SETTLE_ATTEMPTS if content is not None else 0):
            await asyncio.sleep(attempt * self.rest_s)
            answered, reason = await self._post("settle", content or b"", self.observe_timeout_s)
            if not reason or reason == "refused":
                return not reason and isinstance(answered, Mapping) and answered.get("state") in SETTLED
        return False

    async def _post(self, path: str, content: bytes, timeout_s: float) -> tuple[Any, str]:
        """What the service answers, and an empty text; or None and what happened instead."""
        if (now_s := time.monotonic()) < self._rests_until_s:
            return None, "unreachable"
        if self._failures >= FAILURES_IN_A_ROW:  # one asks after a rest, and the others rest until it is answered
            self._rests_until_s = now_s + self.rest_s
        try:
            status, text = await asyncio.wait_for(self._read_response(path, content), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):  # one class only since Python 3.11
            return None, self._failed("timeout")
        except self._transport_errors:
            return None, self._failed("unreachable")
        except (_Nonsense, ValueError, RuntimeError) as error:  # a length that is none; a client that was closed
            return None, self._failed("unreachable" if isinstance(error, RuntimeError) else "nonsense")
        if status in (400, 401, 403, 404, 409, 413, 422):  # it lives, and this request is not for it
            self._well()
            if status in (401, 403) and not self._key_refused:
                self._key_refused = True
                _logger.error("%s refuses the API key: no predictions and no budgets", self._http.base_url)
            return None, "refused"
        if status not in (200, 429):  # which holds a decision
            return None, self._failed("unreachable")
        try:
            answered = json.loads(text)
        except (ValueError, RecursionError):
            return None, self._failed("nonsense")
        self._well()
        return answered, ""

    async def _read_response(self, path: str, content: bytes) -> tuple[int, bytes]:
        async with self._http.stream("POST", path, content=content) as response:
            parts, size = [], 0
            async for part in response.aiter_raw():
                size += len(part)
                if size > MAX_BYTES:
                    raise _Nonsense
                parts.append(part)
            return response.status_code, b"".join(parts)

    def _well(self) -> None:
        if self._failures >= FAILURES_IN_A_ROW:
            _logger.warning("predictions come from %s again", self._http.base_url)
        self._failures, self._rests_until_s = 0, 0.0

    def _failed(self, reason: str) -> str:
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            if self._failures == FAILURES_IN_A_ROW:
                _logger.warning(
                    "no predictions from %s (%s), and what is to be reserved is %s; asking again every %g s",
                    self._http.base_url,
                    reason,
                    "allowed" if self.allow_unbooked else "refused",
                    self.rest_s,
                )
            self._rests_until_s = time.monotonic() + self.rest_s
        return reason

    def _fallbacks(self, reason: str, number: int) -> list[Prediction]:
        known = self.fallback
        source = f"fallback:{reason}"
        return [Prediction(known.median, known.mean, known.quantiles, source, None, -1, known.cost)] * number

    async def close(self) -> None:
        """Closes connections. May be called again."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _outcome(
    name: str, completion_tokens: int | None, usage: Mapping[str, Any] | None, finish_reason: str | None
) -> bytes | None:
    """What was generated, as the service reads it; None if that is no JSON."""
    said = {"completion_tokens": completion_tokens, "usage": usage, "finish_reason": finish_reason}
    body = {"id": name, **{key: value for key, value in said.items() if value is not None}}
    try:
        return json.dumps(body, default=_plain).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    """Objects of clients' libraries as JSON: pydantic models, other mappings."""
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise _Nonsense
    return float(value)


def _read_reservation(answer: Any) -> Reservation:
    """A reservation from JSON of a service, which is not trusted.

    Raises:
        _Nonsense: it is none.
    """
    if not isinstance(answer, Mapping):
        raise _Nonsense
    decision, name, wait, limit = (answer.get(key) for key in ("decision", "id", "retry_after_s", "limit"))
    if decision not in ("allow", "wait", "deny") or not isinstance(name, str) or not 0 < len(name) <= 200:
        raise _Nonsense
    allowed = decision == "allow"
    booked = answer.get("books") is True
    return Reservation(
        allowed,
        None if allowed or wait is None else _amount(wait),
        name if allowed else None,
        _read(answer.get("prediction")),
        _amount(answer.get("amount")),
        None if limit is None else _amount(limit),
        "books" if booked else "fallback:books",
    )


def _read(answer: Any) -> Prediction:
    """A prediction from JSON of a service, which is not trusted.

    Raises:
        _Nonsense: it is none: a number that is no amount, quantiles that fall, a text that is none.
    """
    if not isinstance(answer, Mapping):
        raise _Nonsense
    said, name, source, expert = (answer.get(key) for key in ("quantiles", "id", "source", "expert"))
    if not isinstance(said, Mapping) or not isinstance(source, str) or len(source) > 100:
        raise _Nonsense
    if name is not None and (not isinstance(name, str) or len(name) > 200):
        raise _Nonsense
    if type(expert) is not int or not (source == "model" or source.startswith("fallback")):
        raise _Nonsense
    try:
        quantiles = {float(level): _amount(tokens) for level, tokens in said.items()}
    except (TypeError, ValueError):
        raise _Nonsense from None
    ordered = sorted(quantiles.items())
    if not all(0 < level < 1 for level in quantiles) or any(low > high for (_, low), (_, high) in pairwise(ordered)):
        raise _Nonsense
    cost = answer.get("cost")
    if cost is not None:
        if not isinstance(cost, Mapping):
            raise _Nonsense
        seconds = (_amount(cost.get(key)) for key in ("ttft_s", "latency_s", "gpu_s"))
        cost = Cost(int(_amount(cost.get("prompt_tokens"))), *seconds)
    visible = None
    if (thoughts := answer.get("thoughts")) is not None:
        if not isinstance(thoughts, Mapping):
            raise _Nonsense
        visible = _amount(thoughts.get("visible_tokens"))
    median, mean = _amount(answer.get("median")), _amount(answer.get("mean"))
    return Prediction(median, mean, dict(ordered), source, name, expert, cost, visible)
