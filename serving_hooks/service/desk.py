"""What the service does with a body: read it, predict within its deadline, say what it will cost, and learn.

The reading is that of `LengthPredictor.predict_batch`. Knows JSON and predictors; no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mope.budgets.config import MICRO
from mope.errors import ArtifactError, ConfigError, DataError, UserError
from mope.fairness.mapper import MetricsMapper
from mope.files import write_text
from mope.inputs import as_request
from mope.log_answers import CUT, answers_of, at, finish_of, usage_of
from mope.prediction_batch import PredictionBatch
from mope.reader import MAX_TOKENS, is_forced, shown
from mope.request import AS_READ, Request
from mope.serving import ServingPredictor
from mope.serving_hooks.front import PLACES_ON_CPU, PLACES_ON_GPU
from mope.serving_hooks.service import traces
from mope.serving_hooks.service.config import ServeConfig
from mope.serving_hooks.service.limiter import Asked, Limiter
from mope.serving_hooks.service.memory import Memory, Remembered
from mope.serving_hooks.service.metrics import ServiceMetrics
from mope.serving_hooks.turns import Turns
from mope.token_estimate import estimate_tokens

if TYPE_CHECKING:
    from mope.prediction import LengthPrediction
    from mope.predictor import LengthPredictor

MARGIN_S, MARGIN_SHARE = 0.002, 0.2  # of a deadline, for writing the response
CHARS_PER_TOKEN = 4  # of further messages and tools, whose characters alone are counted
LEARNED_EVERY_S = 30.0
AMOUNTS = ("reserved", "held", "settled", "expired", "used")  # of `Totals`, in parts
MAX_CLIENT, MAX_ID = 200, 200  # characters of a name

logger = logging.getLogger("mope")


class UnknownId(DataError):
    """No prediction of this client has the id, or no longer."""


class Payer(NamedTuple):
    """Whose reservation a prediction is for.

    Attributes:
        id: of the reservation.
        client: who is counted and taught for it; None if nobody is named.
        kept: it was made, so the prediction waits for its observation.
    """

    id: str
    client: str | None
    kept: bool


class Desk:
    """Predicts and learns for one event loop. Starts the predictor's threads.

    Args:
        predictor: answers.
        config: how.
        name: what the predictor is called.

    Raises:
        ConfigError: a profile or a file of lessons that cannot be used.
    """

    def __init__(self, predictor: LengthPredictor, config: ServeConfig, name: str) -> None:
        self.predictor, self.config = predictor, config
        self._mapper = MetricsMapper(config.profile) if config.profile is not None else None
        self._names = tuple(f"{level:g}" for level in config.levels)
        self._levels = [*config.levels, 0.5, 0.9]
        knows_units = predictor.encoder.knows("counts_own")
        self._unit = config.token_unit if knows_units and config.token_unit != "trained" else None
        self.limiter = Limiter(config, self._mapper)
        self._saved = 0
        self._restore()
        self.memory = Memory(config.remember, config.remember_s)
        self.metrics = ServiceMetrics(name, self.memory, config.metrics_clients)
        places = PLACES_ON_CPU if predictor.device == "cpu" else PLACES_ON_GPU
        self._turns = Turns(max(places, config.num_workers), config.max_waiting, config.max_waiting)
        self._serving = ServingPredictor(
            predictor, num_workers=config.num_workers, max_waiting=max(places, config.num_workers)
        )

    def read(self, body: Any) -> Request:
        """One request, as `LengthPredictor.predict_batch` reads it, or as a hook of an engine has read it already.

        Raises:
            DataError: it cannot be read; the message says what was expected.
        """
        if not isinstance(body, Mapping):
            raise DataError(
                'a request is an object such as {"prompt": "..."} or {"messages": [...]}, as OpenAI and Anthropic have '
                f"it; got {shown(body)}"
            )
        as_read = isinstance(body.get(AS_READ), Mapping)
        if as_read:
            body = body[AS_READ]
        if self._unit is not None and body.get("token_unit") is None:
            body = {**body, "token_unit": self._unit}
        if self.config.target_llm is not None and not any(body.get(name) for name in ("target_llm", "model")):
            body = {**body, "target_llm": self.config.target_llm}
        return as_request(Request.from_json(body) if as_read else body)

    async def predict(
        self, bodies: Sequence[Any], client: str | None, deadline_s: float, came_s: float
    ) -> list[dict[str, Any]]:
        """What is predicted for each body, in order, within the deadline.

        Args:
            bodies: JSON of requests.
            client: who asks. Clients take turns at the predictor.
            deadline_s: seconds from `came_s` on.
            came_s: when the request came, by `time.monotonic`.

        Raises:
            DataError: a body that cannot be read. Nothing is predicted then.
        """
        requests = []
        for number, body in enumerate(bodies):
            try:
                requests.append(self.read(body))
            except DataError as error:
                if len(bodies) == 1:
                    raise
                raise DataError(f"request {number} of the list (the first is 0): {error}") from error
        end_s = came_s + deadline_s - min(MARGIN_S, MARGIN_SHARE * deadline_s)
        if len(requests) == 1:
            predictions = [await self._predict(requests[0], client, end_s)]
        else:
            predictions = list(await asyncio.gather(*(self._predict(one, client, end_s) for one in requests)))
        answers = [
            self._answer(body, request, prediction, client)
            for body, request, prediction in zip(bodies, requests, predictions, strict=True)
        ]
        self.metrics.seconds.observe(time.monotonic() - came_s)
        return answers

    async def _predict(self, request: Request, client: str | None, end_s: float) -> LengthPrediction:
        if not self._turns.at_once():
            try:
                if not await asyncio.wait_for(self._turns.take(client), end_s - time.monotonic()):
                    return self.predictor.fallback("queue full", request)
            except (asyncio.TimeoutError, TimeoutError):  # one class only since Python 3.11
                return self.predictor.fallback("deadline", request)
        try:
            return await self._serving.predict(request, deadline_s=end_s - time.monotonic())
        except ConfigError:  # the service is ending
            return self.predictor.fallback("error", request)
        finally:
            self._turns.leave()

    def _answer(
        self,
        body: Mapping[str, Any],
        request: Request,
        prediction: LengthPrediction,
        client: str | None,
        payer: Payer | None = None,
    ) -> dict[str, Any]:
        row = PredictionBatch.of([prediction])
        *quantiles, median, high = row.quantiles(self._levels)[0].tolist()
        mean = float(row.mean[0])
        if payer is None or payer.kept:
            self.metrics.predicted(client if payer is None else payer.client, prediction.source)
        answer: dict[str, Any] = {
            "id": self._remember(body, prediction, mean, high, client, payer),
            "median": round(median, 2),
            "mean": round(mean, 2),
            "quantiles": dict(zip(self._names, (round(one, 2) for one in quantiles), strict=True)),
            "expert": prediction.expert,
            "source": prediction.source,
            "llm": prediction.llm,
            "llm_known": prediction.llm_known,
            "max_tokens": prediction.max_tokens,
        }
        if (thoughts := prediction.thoughts) is not None:
            answer["thoughts"] = {name: round(value, 4) for name, value in thoughts._asdict().items()}
        traces.predicted(answer, high)
        if self._mapper is not None:
            prompt_tokens = prompt_tokens_of(request)
            cost = self._mapper.estimate(prompt_tokens, mean)
            answer["cost"] = {
                "prompt_tokens": prompt_tokens,
                "ttft_s": round(cost.ttft_s, 6),
                "latency_s": round(cost.latency_s, 6),
                "gpu_s": round(cost.latency_s * cost.gpu_utilization, 6),
            }
        return answer

    def _remember(
        self,
        body: Mapping[str, Any],
        prediction: LengthPrediction,
        mean: float,
        high: float,
        client: str | None,
        payer: Payer | None,
    ) -> str | None:
        name = None if payer is None else payer.id
        if prediction.raw_cumulative is None or prediction.answering is None or not (payer is None or payer.kept):
            return name
        powers = (float(2**power) for power in range(32))
        return self.memory.add(
            Remembered(
                prediction.raw_cumulative.astype(np.float32).tobytes(),
                prediction.answering,
                prediction.max_tokens,
                mean,
                high,
                prediction.source == "model",
                next((tokens for tokens in powers if not is_forced(body, tokens)), math.inf),
                client,
                client if payer is None else payer.client,
            ),
            name,
        )

    async def reserve(self, body: Any, client: str | None, deadline_s: float, came_s: float) -> dict[str, Any]:
        """Predict a request and reserve what it may need.

        Args:
            body: `request`, and if wanted `client`, `id` and `prompt_tokens`.
            client: who asks; the budget's client where `client` names none.
            deadline_s: seconds from `came_s` on.
            came_s: when the request came, by `time.monotonic`.

        Raises:
            DataError: a body that cannot be read.
        """
        if not isinstance(body, Mapping) or "request" not in body:
            raise DataError(f"a reservation is an object such as {_RESERVE_EXAMPLE}; got {shown(body)}")
        payer, name, given = (body.get(key) for key in ("client", "id", "prompt_tokens"))
        payer = _name("client", client or "" if payer is None else payer, MAX_CLIENT)
        _name("id", "" if name is None else name, MAX_ID)
        if name == "":
            raise DataError("id is empty; leave it out, or send one that no other request has")
        if given is not None and (type(given) is not int or not 0 <= given <= MAX_TOKENS):
            raise DataError(f"prompt_tokens is a whole number from 0 to {MAX_TOKENS:,}; got {shown(given)}")
        if payer != (client or "") and not self._speaks_for_others(client):
            raise DataError(f"client: this key reserves for {shown(client)} alone (--gateways); got {shown(payer)}")
        request = self.read(body["request"])
        end_s = came_s + deadline_s - min(MARGIN_S, MARGIN_SHARE * deadline_s)
        prediction = await self._predict(request, client, end_s)
        row = PredictionBatch.of([prediction])
        asked = Asked(
            name or secrets.token_urlsafe(12),
            client,
            payer,
            prompt_tokens_of(request) if given is None else given,
            float(row.mean[0]),
            lambda level: float(row.quantiles([level])[0, 0]),
        )
        found = await self.limiter.reserve(asked)
        # of what may not run, or was reserved before, nothing new is remembered
        kept = found["decision"] == "allow" and not found["again"]
        answer = self._answer(body["request"], request, prediction, client, Payer(asked.id, payer or None, kept))
        self.metrics.reserved(payer, found)
        self.metrics.seconds.observe(time.monotonic() - came_s)
        return {**found, "prediction": answer}

    async def settle(self, body: Any, client: str | None) -> dict[str, Any]:
        """Close a reservation with what it took, and learn from it.

        Args:
            body: `id`, and what was generated as `observe` takes it.
            client: who says so.

        Raises:
            UnknownId: no reservation has the id, or no longer.
            DataError: the body cannot be read.
            StoreError: the books cannot be reached.
        """
        if not isinstance(body, Mapping):
            raise DataError(f"a settlement is an object such as {_EXAMPLE}; got {shown(body)}")
        name = body.get("id")
        if not isinstance(name, str) or len(name) > MAX_ID:
            raise DataError(f"id is the id of a reservation, a text; got {shown(name)}; expected {_EXAMPLE}")
        tokens, _ = _generated(body)
        found = await self.limiter.settle(name, client, _prompt_tokens(body), tokens)
        if found is None:
            raise UnknownId(f"no reservation has the id {shown(name)}: it was forgotten or never made")
        self.metrics.settled(found)
        first = found["state"] != "already" and self.memory.find(name, client) is not None
        taught = {key: value for key, value in body.items() if key != "client"}  # the reservation says whose it is
        learned = self.observe(taught, client)["learned"] if first else False
        return {**found, "learned": learned}

    def observe(self, body: Any, client: str | None) -> dict[str, Any]:
        """Learn from a finished request.

        Args:
            body: `id` or `prediction`, and what was generated: `completion_tokens`, a `usage` block, or the whole
                `response`. `client` may name whose request it was: it counts as that client's and teaches as that
                client's, if the one who says so may speak for others (`gateways`).
            client: who says so. It may observe its own predictions alone.

        Returns:
            Whether it was learned, and if not, why.

        Raises:
            UnknownId: no prediction of this client has the id, or no longer.
            DataError: the body cannot be read.
        """
        if not isinstance(body, Mapping):
            raise DataError(f"an observation is an object such as {_EXAMPLE}; got {shown(body)}")
        name = body.get("id")
        if name is None and isinstance(said := body.get("prediction"), Mapping):
            name = said.get("id")
        if not isinstance(name, str):
            raise DataError(f"id is the id of a prediction, a text; got {shown(name)}; expected {_EXAMPLE}")
        tokens, cut = _generated(body)
        sender = _name("client", body.get("client") or "", MAX_CLIENT)
        found = self.memory.find(name, client)
        if found is None:
            self.metrics.not_learned.labels("unknown").inc()
            raise UnknownId(f"no prediction waits under the id {shown(name)}: it was observed, forgotten or never made")
        self.memory.forget(name)
        if tokens == 0:
            return {"id": name, "learned": False, "reason": "no tokens were generated"}
        more = self._used(body, tokens)
        taught = sender if sender and self._speaks_for_others(client) else found.payer
        self.metrics.observed(taught, tokens, found.mean, found.high, made=found.made, more=more)
        traces.finished(tokens, more, finish_of(body))
        if tokens < found.free_from:
            self.metrics.not_learned.labels("forced").inc()
            return {"id": name, "learned": False, "reason": "the request forced the length"}
        if cut is None:
            cut = found.max_tokens is not None and tokens >= found.max_tokens
        raw_E = np.frombuffer(found.raw, dtype=np.float32).astype(np.float64)
        if self.predictor.corrector.observe(raw_E, found.answering, tokens, censored=cut, client=taught):
            self.metrics.learned.inc()
            return {"id": name, "learned": True, "reason": ""}
        self.metrics.not_learned.labels("share").inc()
        return {"id": name, "learned": False, "reason": "this client has taught its share"}

    def _speaks_for_others(self, client: str | None) -> bool:
        """Whether a client may name others for whom it reserves or observes."""
        return not self.config.gateways or client in self.config.gateways

    def _used(self, body: Mapping[str, Any], tokens: int) -> dict[str, float]:
        """What else an observation says was used."""
        prompt = _prompt_tokens(body)
        cached = _cached_tokens(body)
        known: dict[str, float | None] = {
            "prompt_tokens": prompt,
            "cached_tokens": None if cached is None else min(cached, prompt or 0),
            "thought_tokens": usage_of(body).thoughts,
            "gpu_seconds": None,
        }
        if self._mapper is not None and prompt is not None:
            cost = self._mapper.estimate(prompt, tokens, cached_tokens=int(known["cached_tokens"] or 0))
            known["gpu_seconds"] = cost.latency_s * cost.gpu_utilization
        return {name: float(amount) for name, amount in known.items() if amount is not None}

    async def accounts(self) -> dict[str, dict[str, float | int]]:
        """All that each client ever reserved and used, by client, see `mope.budgets.Totals`; amounts in its unit."""
        return {
            client: {name: value / MICRO if name in AMOUNTS else value for name, value in total._asdict().items()}
            for client, total in (await self.limiter.books.totals()).items()
        }

    # -- what was learned, over restarts

    def _restore(self) -> None:
        path = self.config.learned
        if path is None or not path.exists():
            return
        try:
            self.predictor.recalibrator.restore(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, ArtifactError) as error:
            said = getattr(error, "strerror", None) or (error if isinstance(error, UserError) else "it is no JSON")
            raise ConfigError(f"--learned {path}: {said}; remove the file to start without lessons") from error
        logger.info("read lessons from %s", path)

    def save(self) -> None:
        """Write what was learned since the last time, if there is a file for it. Touches the disk."""
        path, learned = self.config.learned, int(self.metrics.learned._value.get())
        if path is None or learned == self._saved:
            return
        try:
            write_text(path, json.dumps(self.predictor.recalibrator.to_json()))
            self._saved = learned
        except OSError as error:
            logger.error("lessons were not written to %s: %s", path, error.strerror or error)

    async def keep_saving(self) -> None:
        """Writes lessons every half minute, in a thread, until it is cancelled."""
        while True:
            await asyncio.sleep(LEARNED_EVERY_S)
            await asyncio.get_running_loop().run_in_executor(None, self.save)

    def close(self) -> None:
        """Ends the predictor's threads and writes what was learned."""
        self._serving.close()
        self.save()


_EXAMPLE = '{"id": "...", "completion_tokens": 231} or {"id": "...", "usage": {...}, "finish_reason": "stop"}'


_RESERVE_EXAMPLE = '{"client": "team-a", "request": {"model": "...", "messages": [...]}}'


def _name(key: str, value: Any, most: int) -> str:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise DataError(f"{key} is a text of at most {most} printable characters; got {shown(value)}")
    return value


def _prompt_tokens(body: Mapping[str, Any]) -> int | None:
    """Tokens of the prompt, as the server's usage block counts them, or as `prompt_tokens` says."""
    for usage in _usages(body):
        if (whole := _count(usage.get("prompt_tokens"))) is not None:
            return whole
        if (fresh := _count(usage.get("input_tokens"))) is not None:  # Anthropic counts what was cached apart
            return fresh + (_count(usage.get("cache_creation_input_tokens")) or 0) + _cached_apart(usage)
    return _count(body.get("prompt_tokens"))


def _cached_tokens(body: Mapping[str, Any]) -> int | None:
    """Those of them that came from a cache."""
    for usage in _usages(body):
        for name in ("prompt_tokens_details.cached_tokens", "input_tokens_details.cached_tokens"):
            if (cached := _count(at(usage, name))) is not None:
                return cached
        if "cache_read_input_tokens" in usage:
            return _cached_apart(usage)
    return None


def _cached_apart(usage: Mapping[str, Any]) -> int:
    return _count(usage.get("cache_read_input_tokens")) or 0


def _usages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    places = (body, body.get("response"))
    found = [place.get("usage") for place in places if isinstance(place, Mapping)]
    return [usage for usage in found if isinstance(usage, Mapping)]


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


def _generated(body: Mapping[str, Any]) -> tuple[int, bool | None]:
    """Generated tokens, and whether the answer was cut; None where nothing says why it ended."""
    usage, finish = usage_of(body), finish_of(body)
    if usage.tokens is None and not usage.unreadable and body.get("response") is not None:
        answers = answers_of(body["response"])
        if len(answers) != 1:
            raise DataError(f"response holds {len(answers)} answers; expected one, or completion_tokens of each answer")
        usage, finish = answers[0].usage, finish or answers[0].finish
    if usage.unreadable or usage.tokens is None:
        got = f"; {usage.unreadable}" if usage.unreadable else ""
        raise DataError(
            f"expected generated tokens, a whole number from 0 to {MAX_TOKENS}, as completion_tokens or as the usage "
            f"block of a response{got}; such as {_EXAMPLE}"
        )
    return usage.tokens, None if finish is None else finish in CUT


def prompt_tokens_of(request: Request) -> int:
    """Tokens of a request's whole prompt, estimated."""
    texts = sum(map(estimate_tokens, (request.prompt, request.system, request.previous_prompt)))
    return texts + (request.other_chars + request.tool_chars) // CHARS_PER_TOKEN
