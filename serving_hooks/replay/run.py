"""One replay: requests arrive, a real scheduler chooses batches, a virtual clock says how long they take.

Knows true lengths, which stand in for an LLM here, and keeps them from the scheduler: an answer ends because its last
token is the end of text. Does not know which engine it is, nor what is made of the outcome.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mope.serving_hooks.carried import Carried
from mope.serving_hooks.replay.clock import StepClock
from mope.serving_hooks.replay.engine import Batch, Engine
from mope.serving_hooks.replay.workloads import Arrival

MAX_EMPTY = 1000  # empty batches in a row, with requests waiting and nothing running, before it counts as a standstill


@dataclass(slots=True)
class Record:
    """What became of one request. Times in seconds from the start, -1 for what has not happened.

    Attributes:
        arrival: the request.
        predicted: response tokens that the scheduler was told, if any.
        admitted_s: when it was first in a batch.
        first_token_s: when its first token came.
        finish_s: when its last token came.
        response_tokens: tokens of its answer.
        num_preemptions: how often it lost its place.
        recomputed_tokens: tokens that were computed again because of that.
        computed: tokens of its context that are computed, as of its last batch.
    """

    arrival: Arrival
    predicted: float | None
    admitted_s: float = -1.0
    first_token_s: float = -1.0
    finish_s: float = -1.0
    response_tokens: int = 0
    num_preemptions: int = 0
    recomputed_tokens: int = 0
    computed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay was like.

    Attributes:
        records: for each request, in order of arrival.
        num_batches: that were not empty.
        busy_s: virtual seconds in which a batch ran.
        end_s: virtual seconds until the last token.
        mean_running: requests in a batch, weighted by its time.
        cpu_s: processor seconds of this process, all inclusive.
    """

    records: list[Record]
    num_batches: int
    busy_s: float
    end_s: float
    mean_running: float
    cpu_s: float


def replay(
    engine: Engine,
    arrivals: Sequence[Arrival],
    predictions: Sequence[float | None],
    clock: StepClock,
    *,
    batches_in_flight: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Runs until every request is complete.

    With one batch in flight, the engine schedules, waits, and delivers. With two, as in vLLM's `step_with_batch_queue`,
    it schedules the next batch while one runs, so that whoever ends in the first is still in the second. Requests that
    arrive during a batch are seen when it is done.

    Args:
        engine: with no requests in it.
        arrivals: in order of arrival.
        predictions: response tokens, for each of them.
        clock: how long batches take.
        batches_in_flight: 1 or 2.
        advance: called with the number of requests that have finished since the last call.

    Raises:
        RuntimeError: the scheduler has requests and no longer runs any.
    """
    records = [Record(arrival, predicted) for arrival, predicted in zip(arrivals, predictions, strict=True)]
    by_id = {f"{number}": record for number, record in enumerate(records)}
    names = list(by_id)
    lengths = {name: record.arrival.response_tokens for name, record in by_id.items()}

    def is_last(request_id: str, num_tokens: int) -> bool:
        return num_tokens >= lengths[request_id]

    in_flight: deque[tuple[Batch, float]] = deque()
    now = free_s = busy_s = running_s = 0.0
    num_arrived = num_batches = num_empty = 0
    started = time.process_time()
    while num_arrived < len(records) or in_flight or engine.has_requests():
        engine.now_s = now
        while num_arrived < len(records) and records[num_arrived].arrival.arrival_s <= now:
            record = records[num_arrived]
            engine.add(
                names[num_arrived],
                record.arrival.prompt_tokens,
                Carried(client=record.arrival.client, tokens=record.predicted),
                record.arrival.arrival_s,
                record.arrival.adapter,
            )
            num_arrived += 1
        if len(in_flight) < batches_in_flight and engine.has_requests():
            batch = engine.schedule()
            step_s = _book(batch, by_id, now, clock)
            free_s = max(free_s, now) + step_s  # the GPU runs one batch after the other
            busy_s += step_s
            running_s += step_s * len(batch.work)
            num_batches += bool(batch.work)
            in_flight.append((batch, free_s))
            if batch.work and len(in_flight) < batches_in_flight:
                continue
        if not in_flight:
            now = records[num_arrived].arrival.arrival_s
            continue
        batch, done_s = in_flight.popleft()
        engine.now_s = now = max(now, done_s)
        num_finished = 0
        for request_id, num_tokens, finished in engine.deliver(batch, is_last):
            record = by_id[request_id]
            record.response_tokens += num_tokens
            if num_tokens and record.first_token_s < 0:
                record.first_token_s = now
            if finished:
                record.finish_s = now
                num_finished += 1
        if num_finished:
            advance(num_finished)
        if batch.work or in_flight:
            num_empty = 0
        elif num_arrived < len(records) and engine.has_requests():
            now = max(now, records[num_arrived].arrival.arrival_s)
        else:
            num_empty += 1
            if num_empty > MAX_EMPTY:
                raise RuntimeError(f"{engine.version} has requests and schedules none of them at {now:.3f} s")
    return Outcome(
        records, num_batches, busy_s, now, running_s / busy_s if busy_s else 0.0, time.process_time() - started
    )


def _book(batch: Batch, by_id: dict[str, Record], now: float, clock: StepClock) -> float:
    """Notes who is in a batch, and returns its seconds."""
    num_decodes = decode_context = prompt_tokens = prompt_context = 0
    for request_id, computed, tokens, _ in batch.work:
        record = by_id[request_id]
        if computed < record.computed:
            record.num_preemptions += 1
            record.recomputed_tokens += record.computed - computed
        elif record.admitted_s < 0:
            record.admitted_s = now
        record.computed = computed + tokens
        if tokens == 1:
            num_decodes += 1
            decode_context += record.computed
        else:
            prompt_tokens += tokens
            prompt_context += record.computed
    return clock.step_s(num_decodes, decode_context, prompt_tokens, prompt_context)
