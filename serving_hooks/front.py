"""What the front end does with a request: find its client, predict its answer, and say so in what is carried along.

A prediction has a deadline; late, failed or refused ones are counted, and the request goes on without. Knows requests
and predictors; no engine and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mope.client import Prediction
from mope.corrector import HIGH, as_carried
from mope.errors import UserError
from mope.llm_names import KNOWN_FAMILIES
from mope.request import Request
from mope.serving import ServingPredictor
from mope.serving_hooks.bodies import Asked, Kind, read
from mope.serving_hooks.carried import Carried, pack
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.identity import Headers, Identity
from mope.serving_hooks.options import NO_PREDICTOR, HookOptions
from mope.serving_hooks.remote import RemotePredictor, answering_of, is_address, look
from mope.serving_hooks.turns import Turns
from mope.target_llm import describe

if TYPE_CHECKING:
    from mope.prediction import LengthPrediction
    from mope.predictor import LengthPredictor

BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the latency's histogram
# what became of predictions, by the source that `LengthPrediction` and `mope.client` name
OUTCOMES = {
    "model": "made",
    "fallback:deadline": "late",
    "fallback:timeout": "late",
    "fallback:queue full": "overload",
    "fallback:error": "failed",
    "fallback:no text": "no_text",
}


PLACES_ON_CPU, PLACES_ON_GPU = 4, 64  # predictions at the same time: what keeps threads busy and fills batches
PLACES_REMOTE = 64  # the same of a service, which is asked over as many connections
MOST_WAITING, MOST_IN_ALL = 64, 1024  # predictions that wait for one client, and for all


class FrontPrediction(NamedTuple):
    """What is predicted for the answers of one HTTP request: of a batch, for an answer drawn from it.

    Attributes:
        tokens: expected tokens of an answer.
        high: its 90 % quantile in tokens; None where a service does not say it.
        raw: before any correction and the request's cap, see `mope.serving_hooks.carried.pack`; None from a service.
        answering: the LLM and how it is asked, see `mope.corrector.Answering.write`. From a service: what the answer is
            observed with, see `mope.serving_hooks.remote.answering_of`.
    """

    tokens: float
    high: float | None
    raw: str | None
    answering: str | None


class Front:
    """Reads requests and predicts for them. One for a process; its counters are the process's.

    Attributes:
        options: how.
        target_llm: the LLM that answers, as the predictor is told; None if nobody names it.
        corrector: of the predictor; None without one, and where a service predicts.
    """

    def __init__(
        self,
        options: HookOptions,
        identity: Identity,
        predictor: LengthPredictor | None,
        names: Sequence[str] = (),
        remote: RemotePredictor | None = None,
    ) -> None:
        """Starts the predictor's threads.

        Args:
            options: how.
            identity: says who sent a request.
            predictor: answers; None for no predictions.
            names: what the server calls its LLM. The first that the predictor knows something about is taken, else the
                last; unless `options.target_llm` names another.
            remote: answers in place of a predictor.
        """
        self.options, self._identity = options, identity
        self.target_llm = options.target_llm or _telling(names, predictor, remote)
        facts = {name: getattr(options, name) for name in ("llm_family", "llm_size", "llm_reasoning", "llm_year")}
        self._facts = {name: fact for name, fact in facts.items() if fact is not None}
        if predictor is not None and predictor.encoder.knows("counts_own"):
            self._facts["token_unit"] = "own"  # an engine counts the tokens of its LLM
        self._predictor, self._remote = predictor, remote
        self.corrector = predictor.corrector if predictor is not None else None
        self._serving = ServingPredictor(predictor) if predictor is not None else remote
        on_cpu = predictor is None or predictor.device == "cpu"
        places = PLACES_REMOTE if remote is not None else PLACES_ON_CPU if on_cpu else PLACES_ON_GPU
        self._turns = Turns(places, MOST_WAITING, MOST_IN_ALL)
        self._requests: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._latencies = [0] * (len(BOUNDS_S) + 1)
        self._latency_s = 0.0

    @classmethod
    def load(
        cls, options: HookOptions, identity: Identity, names: Sequence[str] = (), *, logger: logging.Logger
    ) -> Front:
        """With the predictor that the options name. Reads from the disk. One that cannot be loaded is logged.

        Raises:
            UserError: the predictor is a service, and a package that asks it or a usable key is missing. Whether the
                service answers is logged.
        """
        if is_address(options.predictor):
            remote = RemotePredictor(options.predictor, deadline_s=options.deadline_ms / 1000, places=PLACES_REMOTE)
            look(options.predictor, logger)
            return cls(options, identity, None, names, remote)
        predictor: LengthPredictor | None = None
        if options.predictor != NO_PREDICTOR:
            from mope.predictor import LengthPredictor

            try:
                predictor = LengthPredictor.from_pretrained(options.predictor)
            except (KeyboardInterrupt, SystemExit):
                raise
            except (
                BaseException
            ) as error:  # whatever a damaged folder brings about; a panic in a tokenizer is no Exception
                said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                logger.error("mope predicts nothing, clients are told apart as before: %s", said)
        return cls(options, identity, predictor, names)

    def count(self, name: str) -> None:
        """Notes a request, by its path or what was done with it."""
        self._requests[name] += 1

    def client(self, headers: Headers, body: Mapping[str, Any]) -> str | None:
        """Who sent a request, see `Identity.client`; has the file of keys looked at in the background."""
        if self._identity.due():
            asyncio.get_running_loop().run_in_executor(None, self._identity.refresh)
        return self._identity.client(headers, body)

    @property
    def client_in_body(self) -> bool:
        """Whether `client` needs the body."""
        return self._identity.reads_body

    def admits(self, headers: Headers) -> bool:
        """Whether a request is one to work for, see `Identity.admits`."""
        return self._identity.admits(headers)

    async def carried(self, kind: Kind, headers: Headers, body: Mapping[str, Any], guard: Guard) -> Carried:
        """What is carried with a request. Without a prediction it still has its client.

        Args:
            kind: whose JSON it is.
            headers: of the request.
            body: its JSON.
            guard: notes what goes wrong.
        """
        client = guard.attempt(lambda: self.client(headers, body), None, "finding a client")
        if self._serving is None or kind == "other":
            return Carried(client)
        try:
            predicted = await self.predict(self.read(kind, body), client)
        except Exception as error:
            guard.spoil(error, "predicting")
            return Carried(client)
        return Carried(client, *predicted) if predicted is not None else Carried(client)

    def read(self, kind: Kind, body: Mapping[str, Any]) -> Asked:
        """What a request asks for."""
        return read(kind, body, self.target_llm, **self._facts)

    async def predict(self, asked: Asked, client: str | None = None) -> FrontPrediction | None:
        """What is predicted for a request, within the deadline; None if nothing is.

        Args:
            asked: see `read`.
            client: who sent it. Clients take turns at the predictor.
        """
        if self._serving is None or not asked.requests:
            return None
        started = time.perf_counter()
        if len(asked.requests) == 1:
            answers = [await self._answer(self._serving, asked.requests[0], client)]
        else:
            tasks = (self._answer(self._serving, request, client) for request in asked.requests)
            answers = list(await asyncio.gather(*tasks))
        found = [answer for answer in answers if answer is not None and answer.source == "model"]
        predicted = self._joined(found, asked.num_answers) if found else None
        seconds = time.perf_counter() - started
        self._latencies[bisect_left(BOUNDS_S, seconds)] += 1
        self._latency_s += seconds
        return predicted

    async def _answer(
        self, serving: ServingPredictor | RemotePredictor, request: Request, client: str | None
    ) -> LengthPrediction | Prediction | None:
        deadline_s = self.options.deadline_ms / 1000
        came_s = time.monotonic()
        try:
            if not self._turns.at_once() and not await asyncio.wait_for(self._turns.take(client), deadline_s):
                self._outcomes["overload"] += 1
                return None
        except (asyncio.TimeoutError, TimeoutError):  # one class only since Python 3.11
            self._outcomes["late"] += 1
            return None
        try:
            answer = await serving.predict(request, deadline_s=deadline_s - (time.monotonic() - came_s))
        except UserError:  # a request that no predictor reads, or a server that is ending
            self._outcomes["failed"] += 1
            return None
        finally:
            self._turns.leave()
        self._outcomes[OUTCOMES.get(answer.source, "failed")] += 1
        return answer

    def _joined(self, found: Sequence[LengthPrediction | Prediction], num_answers: int) -> FrontPrediction | None:
        if said := [answer for answer in found if isinstance(answer, Prediction)]:
            return self._said(said, num_answers)
        answers = [answer for answer in found if not isinstance(answer, Prediction)]
        raw = [answer.raw_cumulative for answer in answers if answer.raw_cumulative is not None]
        answering, cap = answers[0].answering, answers[0].max_tokens
        if self.corrector is None or not raw or answering is None:
            return None
        raw_E = raw[0] if len(raw) == 1 else as_carried(np.mean(raw, axis=0))
        tokens, high = self.corrector.expected(raw_E, answering, cap)
        return FrontPrediction(tokens, high, pack(raw_E), answering.write())

    def _said(self, answers: Sequence[Prediction], num_answers: int) -> FrontPrediction:
        """What a service predicts. It takes one observation for a prediction.

        Of several answers to one request the shortest ends first. It alone would be learned, so none is.
        """
        first = answers[0]
        name = first.id if num_answers == 1 and self.options.recalibrate else None
        return FrontPrediction(
            fmean(answer.mean for answer in answers),
            first.quantiles.get(HIGH) if len(answers) == 1 else None,
            None,
            answering_of(name) if name is not None else None,
        )

    def snapshot(self) -> dict[str, Any]:
        """Counters so far.

        Returns:
            `predicts`: whether a predictor runs; `requests` by path or by what was done with them; `predictions` by
            outcome: `made`, `late` (past the deadline), `overload` (too many were waiting), `failed`, `no_text`,
            counted by prompts; and `latency` of HTTP requests that asked for predictions: `bounds_s`, `counts` (of each
            bound, and above all of them), `sum_s`.
        """
        predictions = {name: self._outcomes[name] for name in dict.fromkeys(OUTCOMES.values())}
        latency = {"bounds_s": BOUNDS_S, "counts": tuple(self._latencies), "sum_s": self._latency_s}
        return {
            "predicts": self._serving is not None,
            "requests": dict(self._requests),
            "predictions": predictions,
            "latency": latency,
        }

    def close(self) -> None:
        """Ends the predictor's threads. May be called again."""
        if self._serving is not None:
            self._serving.close()

    def __str__(self) -> str:
        who = f"clients by {self._identity}"
        if self._serving is None:
            return f"{who}; no predictions"
        llm = self.target_llm or "an LLM that nobody names"
        deadline = f"within {self.options.deadline_ms:g} ms"
        where = "a service" if self._predictor is None else self._predictor.backend_reason
        return f"{who}; lengths by {self.options.predictor} ({where}) {deadline}, for {llm}"


def _telling(
    names: Sequence[str], predictor: LengthPredictor | None, remote: RemotePredictor | None = None
) -> str | None:
    """The first name that says something about the LLM; else the last."""
    usable = [name for name in names if name and not any("\ud800" <= letter <= "\udfff" for letter in name)]
    for name in usable:
        if predictor is not None and predictor.encoder.llms.find(name):
            return name
        if remote is not None and describe(name).family in KNOWN_FAMILIES:
            return name
    return usable[-1] if usable else None
