"""Clocks: one call, many callers, batches; and the order in which subjects take turns.

The standard library alone. Knows callables; does not know predictors.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

ItemT = TypeVar("ItemT")


class Times(NamedTuple):
    """What one call took.

    Attributes:
        wall_ms: by the clock on the wall.
        cpu_ms: processor time of the whole process, all its threads.
    """

    wall_ms: float
    cpu_ms: float


class Rate(NamedTuple):
    """How fast requests were answered.

    Attributes:
        requests_per_s: by the clock on the wall.
        cpu_ms_per_request: processor time of the whole process.
        num_requests: how many were answered.
    """

    requests_per_s: float
    cpu_ms_per_request: float
    num_requests: int


def timed(call: Callable[[], object]) -> Times:
    """Time one call."""
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    call()
    wall_after, cpu_after = time.perf_counter_ns(), time.process_time_ns()
    return Times((wall_after - wall) / 1e6, (cpu_after - cpu) / 1e6)


def turns(num_subjects: int, turn: int) -> list[int]:
    """Who comes first, second, ... at a turn: each subject has each place equally often."""
    return [(place + turn) % num_subjects for place in range(num_subjects)]


def visits(
    num_rounds: int, num_requests: int, num_subjects: int, turn_requests: int = 1
) -> Iterator[tuple[int, range, int]]:
    """Round, requests and subject of every turn: all subjects answer some requests before the next ones come.

    What disturbs the machine for a while so disturbs all subjects alike. Within a turn a subject is warm, as it is in a
    server that is busy with requests.
    """
    for round_ in range(num_rounds):
        for turn, first in enumerate(range(0, num_requests, turn_requests)):
            requests = range(first, min(first + turn_requests, num_requests))
            for subject in turns(num_subjects, round_ + turn):
                yield round_, requests, subject


class Endless(Iterator[ItemT]):
    """Items over and over, for any number of threads; a later taker goes on where an earlier one stopped."""

    def __init__(self, items: Sequence[ItemT]) -> None:
        self._items, self._lock = itertools.cycle(items), threading.Lock()

    def __next__(self) -> ItemT:
        with self._lock:
            return next(self._items)


def rate(answer: Callable[[Sequence[ItemT]], object], batches: Iterator[Sequence[ItemT]], seconds: float,
         num_callers: int = 1) -> Rate:  # fmt: skip
    """Answer batches as fast as possible.

    Each caller finishes the batch that it has when time is up, and that batch and its time count: a slow subject
    is neither given nor robbed of a fraction of a batch.

    Args:
        answer: answers a batch; called by several threads at once.
        batches: an endless iterator that is safe to share between threads.
        seconds: until when a caller takes a new batch; each takes one at least.
        num_callers: threads.
    """
    barrier = threading.Barrier(num_callers)

    def caller() -> tuple[int, float]:
        barrier.wait()
        num_requests, started = 0, time.perf_counter()
        while (taken := time.perf_counter() - started) < seconds or not num_requests:
            batch = next(batches)
            answer(batch)
            num_requests += len(batch)
        return num_requests, taken

    cpu = time.process_time()
    with ThreadPoolExecutor(num_callers) as pool:
        done = [future.result() for future in [pool.submit(caller) for _ in range(num_callers)]]
    cpu = time.process_time() - cpu
    num_requests = sum(count for count, _ in done)
    return Rate(sum(count / taken for count, taken in done), 1000 * cpu / num_requests, num_requests)
