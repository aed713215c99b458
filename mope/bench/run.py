"""One benchmark: every subject in a process of its own, all of them taking turns.

Knows workers and the order of the work; what a table or a picture shows is in `report` and `plot`.

Shape suffixes: T rounds (turns), R requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mope import packaged
from mope.bench.config import BenchConfig
from mope.bench.prompts import length_summary
from mope.bench.subjects import Peer, Subject
from mope.bench.timing import Rate, turns, visits
from mope.bench.worker import Worker
from mope.console import progress
from mope.grid import Array

TIMED = (
    "One call of predict_batch([request]) on a prepared Request: text window, tokenising, numbers and rules, network, "
    "router, mixture and calibration. Not timed: reading JSON. A peer's call: cutting and tokenising the prompt alone, "
    "network, reading the one number. wall_ms is the clock on the wall; cpu_ms is the processor time of the process, "
    "all threads, which for one thread is what an idle core would take. Each subject runs in a process of its own; "
    "all subjects answer some requests, one after the other, before the next ones come, and who is first changes every "
    "time. A turn begins with a request that does not count."
)
LATENCY_LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(slots=True)
class Measured:
    """What was measured of one subject.

    Attributes:
        subject: which one.
        start: seconds and memory of the start.
        wall_TR: milliseconds of each call by the clock on the wall.
        cpu_TR: milliseconds of processor time of each call.
        throughput: one rate per round.
        batches: one rate per round; none for a peer.
        memory: in MB, after the latency calls and at its highest.
        input_tokens: that the network reads of each request.
    """

    subject: Subject
    start: Mapping[str, float | None]
    wall_TR: Array
    cpu_TR: Array
    throughput: list[Rate] = field(default_factory=list)
    batches: list[Rate] = field(default_factory=list)
    memory: dict[str, float | None] = field(default_factory=dict)
    input_tokens: list[int] = field(default_factory=list)

    def to_json(self, config: BenchConfig) -> dict[str, Any]:
        """Figures of this subject, as `bench.json` holds them."""
        subject, is_peer = self.subject, isinstance(self.subject, Peer)
        return {
            "name": subject.name,
            "artifact": None if is_peer else packaged.shown(subject.artifact),
            "backend": "torch" if isinstance(subject, Peer) else subject.backend,
            "precision": "fp32" if isinstance(subject, Peer) else subject.precision,
            "num_threads": subject.num_threads,
            "device": subject.device,
            "random_weights": is_peer,
            "input_tokens": length_summary(self.input_tokens),
            "latency": {"wall_ms": summarise(self.wall_TR), "cpu_ms": summarise(self.cpu_TR)},
            "throughput": _rates(self.throughput, num_callers=config.concurrency),
            "batch_throughput": _rates(self.batches, batch_size=config.batch_size),
            "start": {
                "import_s": None if is_peer else self.start["import_s"],
                "load_s": None if is_peer else self.start["load_s"],  # random weights are not read from a disk
                "first_ms": self.start["first_ms"],
            },
            "memory_mb": {
                "python": self.start["python_rss_mb"],
                "loaded": self.start["loaded_rss_mb"],
                "one_caller": self.memory["rss_mb"],
                "peak": self.memory["peak_rss_mb"],
            },
        }


def summarise(times_TR: Array) -> dict[str, Any]:
    """Quantiles and mean of latencies.

    Args:
        times_TR: milliseconds of each call.

    Returns:
        `p50`, `p90`, `p99` and `mean` of all calls, which hold what the machine did beside; `p99_of_medians`, the
        0.99 quantile over requests of each request's median over rounds, which is what long prompts cost; and
        `p50_by_round`, which shows how far the rounds agree.
    """
    return {
        **{name: float(np.quantile(times_TR, level)) for name, level in LATENCY_LEVELS.items()},
        "mean": float(times_TR.mean()),
        "p99_of_medians": float(np.quantile(np.median(times_TR, axis=0), 0.99)),
        "p50_by_round": np.median(times_TR, axis=1).tolist(),
    }


def _rates(rates: Sequence[Rate], **options: int) -> dict[str, Any] | None:
    if not rates:
        return None
    return {
        **options,
        "requests_per_s": float(np.median([rate.requests_per_s for rate in rates])),
        "cpu_ms_per_request": float(np.median([rate.cpu_ms_per_request for rate in rates])),
        "requests_per_s_by_round": [rate.requests_per_s for rate in rates],
        "num_requests": sum(rate.num_requests for rate in rates),
    }


def measure(subjects: Sequence[Subject], requests: Sequence[Any], config: BenchConfig) -> list[Measured]:
    """Measure subjects side by side.

    Args:
        subjects: in the order of the table.
        requests: `Request` objects, in a random order.
        config: how much is measured.

    Raises:
        UserError: a subject can't be loaded.
        MopeError: a subject's process ended.
    """
    with ExitStack() as stack:
        workers, found = [], []
        with progress("loading", len(subjects)) as advance:
            for subject in subjects:
                with Worker(subject) as first:  # not counted: it brings the files into the system's cache
                    first.call("start", subject, requests[:1], 1, config.seed)
                worker = stack.enter_context(Worker(subject))
                start = worker.call("start", subject, requests, config.batch_size, config.seed)
                worker.call("warm_up", config.warm_up)
                shape = config.rounds, len(requests)
                workers.append(worker)
                found.append(Measured(subject, start, np.zeros(shape), np.zeros(shape)))
                advance(1)
        _latency(workers, found, config.turn_requests)
        for one, worker in zip(found, workers, strict=True):
            one.memory = worker.call("memory")
        if config.seconds:
            _throughput(workers, found, config)
        for one, worker in zip(found, workers, strict=True):
            one.memory["peak_rss_mb"] = worker.call("memory")["peak_rss_mb"]
            one.input_tokens = worker.call("count_tokens")
    return found


def _latency(workers: Sequence[Worker], found: Sequence[Measured], turn_requests: int) -> None:
    num_rounds, num_requests = found[0].wall_TR.shape
    with progress("latency", num_rounds * num_requests * len(workers)) as advance:
        for round_, requests, subject in visits(num_rounds, num_requests, len(workers), turn_requests):
            for request, times in zip(requests, workers[subject].call("latencies", requests), strict=True):
                found[subject].wall_TR[round_, request], found[subject].cpu_TR[round_, request] = times
            advance(len(requests))


def _throughput(workers: Sequence[Worker], found: Sequence[Measured], config: BenchConfig) -> None:
    with progress("throughput", config.rounds * len(workers)) as advance:
        for round_ in range(config.rounds):
            for subject in turns(len(workers), round_):
                one, worker = found[subject], workers[subject]
                one.throughput.append(worker.call("throughput", config.concurrency, config.seconds))
                if not isinstance(one.subject, Peer):  # peers are run one request at a time
                    one.batches.append(worker.call("batch_throughput", config.seconds))
                advance(1)
