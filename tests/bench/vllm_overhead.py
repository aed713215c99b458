"""Measures what the hook adds to a step of vLLM's scheduler: CPU time of all that a server calls of it.

    python tests/bench/vllm_overhead.py --output model_cards/results/DATE-vllm-overhead.json

where vLLM is installed. The real scheduler with a fake model, several beside each other in one process: vLLM's own, the
same with arrivals shuffled, and ours over it. 256 requests run; as one ends, the next of those that wait is admitted,
and a new one arrives: what the hook does, it does for each request, so its share of a step depends on how long answers
are. Counted is the CPU time of the whole process, the thread that learns included, in add_request(), schedule() and
update_from_output(), after the first lessons (of each of the first 1,000 answers, then of one in eight). They take
turns, a stretch of steps each, so that whatever the machine does beside hits all; the ratio to vLLM's own is the median
over stretches. Where things come to lie in memory moves it by some percent from process to process, so each line is the
median over several fresh processes, with the least and the most of them. The second figure is the time in the hook's
own code alone, in the scheduling thread, over the rest of the same steps: it leaves out what the hook costs vLLM by
taking its place in the processor's caches, and is less disturbed. The third is the CPU time of other threads in these
methods, over the same: of the thread that learns and corrects. Under `chrt --fifo`, which keeps other work away, that
thread goes before the one that schedules: on a single core it would never run, and without lessons there is nothing to
correct. As a server does at its start, what lives by then is taken out of the garbage
collector's sight.

`stock-shuffled` in place of a policy is vLLM's scheduler as it is, but each arrival changes places with a random one of
those that wait: what it costs vLLM alone that requests run in another order than they came.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from rich.table import Table

from mope.console import console
from mope.corrector import Answering, Corrector, as_carried
from mope.serving_hooks.carried import Carried, pack
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.engine_vllm import VllmEngine

RUNNING = 256
STRETCH, STRETCHES = 20, 40
LEARNED = 1_100  # answers that are complete before it begins
SETTINGS = ((1_000, 100), (10_000, 1_000))  # requests that wait, of so many clients
OURS = "mope.serving_hooks.vllm.scheduler.make_scheduler"
SHUFFLED = "stock-shuffled"
ANSWERING = Answering("llm", "llm", "", "", True).write()


class Loaded:
    """An engine with a full batch and a queue that is kept at its length."""

    def __init__(self, num_waiting: int, num_clients: int, policy: str | None, mean_answer: int) -> None:
        settings = EngineSettings(max_num_seqs=RUNNING, max_num_batched_tokens=8192)
        ours = policy not in (None, SHUFFLED)
        options = {"mope": {"policy": policy, "summary_s": 0}} if ours else None
        self.engine = VllmEngine(
            settings,
            kv_tokens=1_000_000,
            max_model_len=4096,
            scheduler=OURS if ours else None,
            options=options,
        )
        self.num_clients, self.num_sent, self.mean_answer = num_clients, 0, mean_answer
        self.lets_learn = False
        self.cpu_s = self.own_s = self.main_s = 0.0
        self.lengths: dict[str, int] = {}
        self.random = random.Random(7)
        self.raw = raw_prediction(mean_answer)
        for method in ("add_request", "schedule", "update_from_output"):
            self.watch(method)
        if ours:
            self.watch_guard()
        elif policy == SHUFFLED:
            self.engine.scheduler.waiting = shuffled_queue()
        for _ in range(RUNNING + num_waiting):
            self.send()
        while self.num_sent < RUNNING + num_waiting + LEARNED:
            self.step()
            self.let_learn()
        time.sleep(1.0)  # the first lessons
        self.check()

    def let_learn(self) -> None:
        """Under a real-time policy the thread that learns goes first, as soon as there is one."""
        steward = getattr(self.engine.scheduler, "mope", None)
        thread = steward.lengths._thread if steward is not None else None
        policy = os.sched_getscheduler(0)
        if thread is not None and policy in (os.SCHED_FIFO, os.SCHED_RR) and not self.lets_learn:
            self.lets_learn = True
            os.sched_setscheduler(thread.native_id, policy, os.sched_param(os.sched_getparam(0).sched_priority + 1))

    def check(self) -> None:
        """Raises if the hook does not do all that it does in a server."""
        guard = getattr(self.engine.scheduler, "mope_guard", None)
        if guard is None:
            return
        if guard.failure is not None:
            raise RuntimeError(guard.failure)
        lengths = self.engine.scheduler.mope.lengths
        if not lengths.num_observed or len(lengths._finished) > LEARNED // 2:
            raise RuntimeError(
                f"{lengths.num_observed} lessons were learned and {len(lengths._finished)} wait: the learning thread "
                "gets no time"
            )

    def send(self) -> None:
        """One more request; answers have half to one and a half times the mean."""
        name = str(self.num_sent)
        mean = self.mean_answer
        self.lengths[name] = self.random.randint(mean // 2, 3 * mean // 2)
        client = f"client-{self.num_sent % self.num_clients}"
        carried = Carried(client, 0.9 * mean, 2.0 * mean, self.raw, ANSWERING)
        self.engine.add(name, 30 + self.num_sent % 40, carried, float(self.num_sent), None)
        self.num_sent += 1

    def step(self) -> None:
        """A step of the engine."""
        batch = self.engine.schedule()
        for delivery in self.engine.deliver(batch, lambda name, tokens: tokens >= self.lengths[name]):
            if delivery.finished:
                self.send()

    def watch(self, method: str) -> None:
        """Counts the CPU time of a method of the scheduler."""
        original = getattr(self.engine.scheduler, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, main_start = time.process_time(), time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.main_s += time.thread_time() - main_start
                self.cpu_s += time.process_time() - start

        setattr(self.engine.scheduler, method, timed)

    def watch_guard(self) -> None:
        """Counts the time in the hook's own code, all of which runs under its guard."""
        guard = self.engine.scheduler.mope_guard
        original = guard.run

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args)
            finally:
                self.own_s += time.perf_counter() - start

        guard.run = timed


def raw_prediction(median: float) -> str:
    """A lognormal distribution on the predictor's grid, as it is carried."""
    edges = Corrector.load(HookOptions().predictor).edges
    scores = (np.log(edges) - np.log(median)) / 0.75
    cumulative = np.array([NormalDist().cdf(score) for score in scores])
    cumulative[0], cumulative[-1] = 0.0, 1.0
    return pack(as_carried(cumulative))


def shuffled_queue() -> Any:
    """vLLM's queue, but each arrival changes places with a random one of those that wait."""
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue

    chosen = random.Random(3)

    class Shuffled(FCFSRequestQueue):
        def add_request(self, request: Any) -> None:
            super().add_request(request)
            place = chosen.randrange(len(self))
            self[-1], self[place] = self[place], self[-1]

    return Shuffled()


def measure(
    num_waiting: int, num_clients: int, policies: Sequence[str], mean_answer: int
) -> dict[str, dict[str, float]]:
    """Medians by policy: CPU time of a step, its ratio to vLLM's own, and the hook's own part, in this process."""
    engines = [Loaded(num_waiting, num_clients, policy, mean_answer) for policy in (None, *policies)]
    times: list[list[float]] = [[] for _ in engines]
    own: list[list[float]] = [[] for _ in engines]
    others: list[list[float]] = [[] for _ in engines]
    num_sent = [engine.num_sent for engine in engines]
    gc.collect()
    gc.freeze()
    for stretch in range(STRETCHES):
        for turn in range(len(engines)):
            which = (stretch + turn) % len(engines)
            engine = engines[which]
            engine.cpu_s = engine.own_s = engine.main_s = 0.0
            for _ in range(STRETCH):
                engine.step()
            times[which].append(engine.cpu_s / STRETCH)
            own[which].append(engine.own_s / (engine.main_s - engine.own_s))
            others[which].append((engine.cpu_s - engine.main_s) / (engine.main_s - engine.own_s))
    found = {}
    for which, policy in enumerate(policies, 1):
        engines[which].check()
        ratios = [ours / stock for stock, ours in zip(times[0], times[which], strict=True)]
        found[policy] = {
            "requests_per_step": (engines[which].num_sent - num_sent[which]) / (STRETCH * STRETCHES),
            "stock_us": 1e6 * statistics.median(times[0]),
            "ours_us": 1e6 * statistics.median(times[which]),
            "added_percent": 100 * (statistics.median(ratios) - 1),
            "own_code_percent": 100 * statistics.median(own[which]),
            "other_threads_percent": 100 * statistics.fmean(others[which]),  # it works now and then
        }
    return found


def over_processes(num_processes: int, *settings: Any) -> dict[str, dict[str, Any]]:
    """Medians of `measure` over fresh processes, one after another, and how far apart they are."""
    context = multiprocessing.get_context("spawn")
    found = []
    for _ in range(num_processes):
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            found.append(pool.submit(measure, *settings).result())
    medians: dict[str, dict[str, Any]] = {}
    for policy, figures in found[0].items():
        medians[policy] = {key: round(statistics.median(one[policy][key] for one in found), 2) for key in figures}
        for name in ("added", "own_code"):
            each = sorted(one[policy][f"{name}_percent"] for one in found)
            medians[policy][f"{name}_least_and_most"] = (round(each[0], 2), round(each[-1], 2))
    return medians


def main() -> None:
    """Measures, prints a table, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--policies", default=f"{SHUFFLED},fcfs,equinox", help="policies, with commas between")
    parser.add_argument("--answers", default="200,1000", help="mean tokens of an answer, with commas between")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes for each line")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    table = Table(
        *("policy", "answer", "waiting", "ends/step", "vLLM µs", "with mope µs"),
        *("added %", "own code %", "other threads %", "added, least and most", "own code, least and most"),
    )
    for mean_answer in map(int, chosen.answers.split(",")):
        for num_waiting, num_clients in SETTINGS:
            policies = tuple(chosen.policies.split(","))
            for policy, found in over_processes(
                chosen.processes, num_waiting, num_clients, policies, mean_answer
            ).items():
                name = f"{policy}, answers of {mean_answer}, {num_waiting} waiting of {num_clients} clients"
                figures[name] = found
                table.add_row(policy, str(mean_answer), f"{num_waiting:,}", *map(str, found.values()))
    console().print(table)
    if chosen.output is not None:
        import vllm

        report = {
            "command": "python " + " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, Python {platform.python_version()}, vLLM {vllm.__version__}",
            "running": RUNNING,
            "figures": figures,
        }
        chosen.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
