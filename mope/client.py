"""`Predictions`: asks a `mope serve` that runs elsewhere, and never fails because of it.

A gateway awaits a prediction for each request. Where the service is down, late, or answers nonsense, there is still a
prediction: the fallback that the gateway chose, whose `source` says what happened. Needs httpx2 (extra `client`) and
nothing else of mope: no predictor and no ONNX Runtime is loaded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
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

    `predict` and `observe` raise nothing for what a service or a network does, nor for a body that the service refuses.
    After five failures in a row the service is not asked for `rest_s`, so that a dead one costs no time.

    Args:
        url: of the service, such as `http://127.0.0.1:8400`.
        api_key: sent as a bearer token, to this address alone.
        deadline_s: seconds that a prediction may take, network included.
        observe_timeout_s: seconds that an observation may take.
        fallback: given where there is no prediction.
        rest_s: seconds without questions after five failures in a row.
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
        max_connections: int = 100,
    ) -> None:
        httpx = require("httpx2", "mope.client")
        if not isinstance(url, str) or not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
            raise ConfigError(f"url: got {url!r}; expected an address such as http://127.0.0.1:8400")
        for name, value in (("deadline_s", deadline_s), ("observe_timeout_s", observe_timeout_s), ("rest_s", rest_s)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value!r}; expected seconds above 0")
        self.deadline_s, self.observe_timeout_s, self.rest_s = deadline_s, observe_timeout_s, rest_s
        self.fallback = fallback
        self._failures, self._rests_until_s = 0, 0.0
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
        body: dict[str, Any] = {"id": name}
        for key, value in (
            ("completion_tokens", completion_tokens), ("usage", usage), ("finish_reason", finish_reason),
        ):  # fmt: skip
            if value is not None:
                body[key] = value
        try:
            content = json.dumps(body, default=_plain).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, RecursionError):
            return False
        answered, reason = await self._post("observe", content, self.observe_timeout_s)
        return not reason and isinstance(answered, Mapping) and answered.get("learned") is True

    async def _post(self, path: str, content: bytes, timeout_s: float) -> tuple[Any, str]:
        """What the service answers, and an empty text; or None and what happened instead."""
        if time.monotonic() < self._rests_until_s:
            return None, "unreachable"
        try:
            status, text = await asyncio.wait_for(self._read_response(path, content), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):  # one class only since Python 3.11
            return None, self._failed("timeout")
        except self._transport_errors:
            return None, self._failed("unreachable")
        except (_Nonsense, ValueError, RuntimeError) as error:  # a length that is none; a client that was closed
            return None, self._failed("unreachable" if isinstance(error, RuntimeError) else "nonsense")
        if status in (400, 401, 403, 404, 413, 422):  # it lives, and this request is not for it
            self._failures = 0
            return None, "refused"
        if status != 200:
            return None, self._failed("unreachable")
        try:
            answered = json.loads(text)
        except (ValueError, RecursionError):
            return None, self._failed("nonsense")
        self._failures = 0
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

    def _failed(self, reason: str) -> str:
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            if self._failures == FAILURES_IN_A_ROW:
                _logger.warning(
                    "no predictions from %s (%s); asking again every %g s", self._http.base_url, reason, self.rest_s
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
