"""Predictions inside a server: awaited, in time, and never an exception because the network could not be asked.

On a CPU each request is predicted by itself on a few threads: engines release the GIL, and padding would cost more than
a batch saves. On a GPU one thread collects what arrives within a millisecond or two into batches of like length. Knows
queues, threads and deadlines; not how a prediction comes about.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mope.errors import ConfigError
from mope.forking import after_fork, before_fork
from mope.inputs import as_request
from mope.request import Request

if TYPE_CHECKING:
    from mope.prediction import LengthPrediction
    from mope.predictor import LengthPredictor

EXIT_S = 2.0  # how long an interpreter that ends waits for a prediction under way
WARM_UP_S = 5.0  # how long a fork waits for the first prediction of each thread

_logger = logging.getLogger("mope")


@dataclass(frozen=True, slots=True)
class ServingStats:
    """How a serving predictor did so far in this process. The counters of a forked child begin at 0.

    Attributes:
        predicted: requests that the predictor answered.
        batches: times that the predictor was asked.
        deadline: requests that got the fallback because their deadline passed.
        queue_full: requests that got the fallback because too many were waiting.
        errors: requests that got the fallback because the predictor failed.
        waiting: requests in the queue now.
    """

    predicted: int
    batches: int
    deadline: int
    queue_full: int
    errors: int
    waiting: int


@dataclass(frozen=True, slots=True)
class _Job:
    request: Request
    answer: Future[LengthPrediction | None]  # None if the predictor failed


def _end(jobs: queue.Queue[_Job | None], threads: Sequence[threading.Thread]) -> None:
    """Before the interpreter ends, ends the threads: one inside ONNX Runtime would then abort the process.

    What waits is given up, since nobody is left to hear it.
    """
    with contextlib.suppress(queue.Empty):
        while True:
            job = jobs.get_nowait()
            if job is not None:
                job.answer.cancel()
    until = time.monotonic() + EXIT_S
    for _ in range(sum(thread.is_alive() for thread in threads)):
        with contextlib.suppress(queue.Full):  # no room, and nobody takes what is there
            jobs.put(None, timeout=max(until - time.monotonic(), 0.0))
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0.0))


class ServingPredictor:
    """Predicts for an event loop.

    ```
    async with ServingPredictor(predictor) as serving:
        prediction = await serving.predict("Explain TCP slow start.", deadline_s=0.005)
    ```

    Whatever happens to the network, there is a prediction: the length distribution of the training answers, whose
    `source` is `"fallback:deadline"`, `"fallback:queue full"` or `"fallback:error"`. Only a request that cannot be read
    raises. May be used from several event loops and threads.

    A child of a fork (gunicorn `--preload`) has threads, a queue and counters of its own. They start with its first
    request, which takes about 0.1 s longer. If it has a short deadline, predict once in gunicorn's hook `post_fork`.
    Requests that wait at the fork are answered in the parent. A GPU can't be used in the child.

    Args:
        predictor: answers.
        num_workers: threads that ask it; with batches, one collects and asks.
        max_waiting: requests that may wait; further ones get the fallback at once.
        max_batch: largest batch; None for 1 on the CPU and 32 on a GPU.
        window_s: how long a batch is collected after its first request came, in seconds.

    Raises:
        ConfigError: a number below its least value.
    """

    def __init__(
        self,
        predictor: LengthPredictor,
        *,
        num_workers: int = 2,
        max_waiting: int = 1024,
        max_batch: int | None = None,
        window_s: float = 0.0015,
    ) -> None:
        if max_batch is None:
            max_batch = 1 if predictor.device == "cpu" else 32
        for name, value in (("num_workers", num_workers), ("max_waiting", max_waiting), ("max_batch", max_batch)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}; expected at least 1")
        if not 0 <= window_s <= 1:
            raise ConfigError(f"window_s: got {window_s}; expected 0 to 1 second")
        self.predictor = predictor
        self._max_batch, self._window_s, self._max_waiting = max_batch, window_s, max_waiting
        self._num_threads = 1 if max_batch > 1 else num_workers
        self._closed = False
        self._reset()
        self._start()
        before_fork(self._finish_warm_up)
        after_fork(self._renew)

    def _reset(self) -> None:
        self._jobs: queue.Queue[_Job | None] = queue.Queue(self._max_waiting)
        self._counting, self._submitting = threading.Lock(), threading.Lock()
        self._counts = dict.fromkeys(("predicted", "batches", "deadline", "queue_full", "errors"), 0)
        self._failed_before = False
        self._threads: list[threading.Thread] = []
        self._warm: list[threading.Event] = []

    def _start(self) -> None:
        self._warm = [threading.Event() for _ in range(self._num_threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(warm,), name=f"mope-{number}", daemon=True)
            for number, warm in enumerate(self._warm)
        ]
        for thread in self._threads:
            thread.start()
        self._at_exit = weakref.finalize(self, _end, self._jobs, self._threads)

    def _finish_warm_up(self) -> None:
        """Before a fork: let first predictions end, since modules that are half imported hang the child."""
        if threading.current_thread() not in self._threads:
            until = time.monotonic() + WARM_UP_S
            for warm in self._warm:
                warm.wait(max(until - time.monotonic(), 0.0))
            self._warm = []  # later forks need not wait

    def _renew(self) -> None:
        """In the child of a fork: forget what belongs to the parent. The first request starts threads."""
        self._at_exit.detach()
        self._reset()

    async def predict(
        self, request: Request | str | Mapping[str, Any], *, deadline_s: float | None = None
    ) -> LengthPrediction:
        """Predict one request without blocking the event loop.

        Cancelling it is safe: if its turn has not come, it is passed over.

        Args:
            request: a `Request`, a prompt, or a mapping as `LengthPredictor.predict_batch` takes it.
            deadline_s: seconds from now after which the fallback is given instead; None to wait as long as it takes.

        Raises:
            DataError: a request that can't be read.
            ConfigError: a deadline that is no number, or a predictor that was closed.
        """
        known = as_request(request)
        if deadline_s is not None and not (isinstance(deadline_s, int | float) and deadline_s == deadline_s):
            raise ConfigError(f"deadline_s: got {deadline_s!r}; expected seconds")
        answer: Future[LengthPrediction | None] = Future()
        with self._submitting:
            if self._closed:
                raise ConfigError("this ServingPredictor was closed; make another")
            if not self._threads:  # in the child of a fork
                self._start()
            try:
                self._jobs.put_nowait(_Job(known, answer))
            except queue.Full:
                return self._fall_back("queue full", known)
        try:
            prediction = await asyncio.wait_for(asyncio.wrap_future(answer), deadline_s)
        except (asyncio.TimeoutError, TimeoutError):  # one class only since Python 3.11
            return self._fall_back("deadline", known)
        return self._fall_back("error", known) if prediction is None else prediction

    def _fall_back(self, reason: str, request: Request) -> LengthPrediction:
        self._count({"queue full": "queue_full", "deadline": "deadline", "error": "errors"}[reason])
        return self.predictor.fallback(reason, request)

    def _count(self, name: str, number: int = 1) -> None:
        with self._counting:
            self._counts[name] += number

    def _work(self, warm: threading.Event) -> None:
        try:
            self.predictor.predict_batch([Request(prompt="warm up")])  # builds what later requests share
        except BaseException:  # see `_answer`
            self._log_failure()
        finally:
            warm.set()
        while (job := self._jobs.get()) is not None:
            batch = [job]
            try:
                self._collect(batch)
                # cancelled requests are passed over; from here on the other requests can't be cancelled
                self._answer([one for one in batch if one.answer.set_running_or_notify_cancel()])
            except BaseException:  # the thread goes on
                self._log_failure()
            finally:
                for one in batch:
                    if not one.answer.done():
                        with contextlib.suppress(InvalidStateError):  # cancelled just now
                            one.answer.set_result(None)

    def _collect(self, batch: list[_Job]) -> None:
        """Add to a batch what else arrives within the window."""
        end = time.monotonic() + self._window_s
        while len(batch) < self._max_batch:
            try:
                job = self._jobs.get(timeout=max(end - time.monotonic(), 0.0))
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)  # for the loop that ends
                break
            batch.append(job)

    def _answer(self, jobs: list[_Job]) -> None:
        """Predict. If a batch fails, each of its requests is predicted alone, and only those that fail again fail."""
        if not jobs:
            return
        try:
            jobs.sort(key=lambda job: len(job.request.prompt))  # neighbours of like length, for networks run in parts
            predictions = self.predictor.predict_batch([job.request for job in jobs])
            answers = list(zip(jobs, predictions, strict=True))
        except BaseException:  # a panic in a tokenizer is no Exception, and must not end the thread either
            self._log_failure()
            for job in jobs if len(jobs) > 1 else ():
                self._answer([job])
            return
        self._count("predicted", len(jobs))
        self._count("batches")
        for job, prediction in answers:
            job.answer.set_result(prediction)

    def _log_failure(self) -> None:
        if not self._failed_before:
            self._failed_before = True
            with contextlib.suppress(Exception):  # a log handler that raises
                _logger.exception("a prediction failed; a request that fails gets the fallback (logged once)")

    @property
    def stats(self) -> ServingStats:
        """Counters so far."""
        with self._counting:
            return ServingStats(**self._counts, waiting=self._jobs.qsize())

    def close(self) -> None:
        """Answer what waits, then end the threads. May be called again."""
        with self._submitting:
            if self._closed:
                return
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    async def __aenter__(self) -> ServingPredictor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)
