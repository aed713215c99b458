"""Measures the hook in real SGLang servers on the CPU: a flood beside a light client, short memory, its own cost.

    python tests/bench/sglang_hook.py --output model_cards/results/DATE-sglang/figures.json

Two servers stand side by side, one as SGLang is and one with the hook, and get the same load in turn, so that whatever
else the machine does falls on both alike. Needs what `make engines-sglang` installs. Takes some 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import compat
from mope.serving_hooks.sglang.policy import FairScheduling
from tests.engines import test_sglang_admission as admission
from tests.engines.test_sglang_http import OPTIONS, SHORT_OF_MEMORY, UNIT, charged, flood, settled
from tests.engines.tiny_sglang import Outcome, Server, ask_all, serve
from tests.sglang_stand_ins import Req, scheduler

NUM_FLOOD = 160  # requests: the server is busy with them until long after the light client's last
QUIET = ("--sleep-on-idle", "--decode-log-interval", "1")  # who is not asked leaves the machine to the other
_BATCH = re.compile(r"(Prefill|Decode) batch.*?#running-req: (\d+)")


class Steps:
    """What a server has done since the last look, in measures that other programs hardly move."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._first = psutil.Process(server.process.pid)
        self._seen, self._cpu_s = len(server.printed()), self._spent_s()

    def _spent_s(self) -> float:
        """Processor seconds of all its processes."""
        times = [one.cpu_times() for one in (self._first, *self._first.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    def since(self) -> dict[str, float]:
        """Batches that its log tells of, the mean size of those that decoded, and processor seconds."""
        time.sleep(1.0)  # until the last one is told
        printed, cpu_s = self._server.printed(), self._spent_s()
        found, spent_s = _BATCH.findall(printed[self._seen :]), cpu_s - self._cpu_s
        self._seen, self._cpu_s = len(printed), cpu_s
        decoding = [int(running) for kind, running in found if kind == "Decode"]
        return {
            "steps": len(found),
            "decode_batch_mean": round(statistics.fmean(decoding), 2),
            "cpu_s": round(spent_s, 2),
        }


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What one load came to."""
    last = max(one.end_s for one in outcomes)
    ttft = {
        client: [one.ttft_s for one in outcomes if one.ask.client == client and one.ttft_s is not None]
        for client in ("flood", "light")
    }
    return {
        "light_ttft_mean_s": round(statistics.fmean(ttft["light"]), 3),
        "light_ttft_max_s": round(max(ttft["light"]), 3),
        "flood_ttft_mean_s": round(statistics.fmean(ttft["flood"]), 3),
        "tokens_per_s": round(sum(one.tokens for one in outcomes) / last, 1),
        "seconds": round(last, 2),
        "retractions": sum(one.retractions for one in outcomes),
        "cached_tokens": sum(one.cached_tokens for one in outcomes),
    }


def sharing(folder: Path, rounds: int) -> dict[str, Any]:
    """A flood beside a light client."""
    arguments = (*SHORT_OF_MEMORY, *QUIET)
    found: dict[str, list[dict[str, float]]] = {"fcfs": [], "equinox": []}
    equal, exact = [], []
    booked = {"flood": 0.0, "light": 0.0}
    with serve(folder, "fcfs", arguments=arguments) as stock, serve(folder, "equinox", OPTIONS, arguments) as ours:
        for server in (stock, ours):
            ask_all(server, flood(seed=99)[:8])  # warm
        before = _service(ours)
        steps = {"fcfs": Steps(stock), "equinox": Steps(ours)}
        for number in range(rounds):
            turn: list[tuple[str, Server]] = [("fcfs", stock), ("equinox", ours)]
            load = flood(NUM_FLOOD, seed=number, light_every_s=0.6)
            outcomes = {name: ask_all(server, load) for name, server in (turn, turn[::-1])[number % 2]}
            equal.append([one.output for one in outcomes["fcfs"]] == [one.output for one in outcomes["equinox"]])
            for name, some in outcomes.items():
                found[name].append({**figures_of(some), **steps[name].since()})
            for client in booked:
                booked[client] += charged(outcomes["equinox"], client)
            after = _service(ours)
            exact.append({client: after[client] - before.get(client, 0.0) for client in booked} == booked)
            print(number, found["fcfs"][-1], found["equinox"][-1], equal[-1], exact[-1], flush=True)
    pairs = list(zip(found["fcfs"], found["equinox"], strict=True))
    return {
        "rounds": found,
        "outputs_equal": equal,
        "charges_exact": exact,
        "light_ttft_lower_by": [round(one["light_ttft_mean_s"] / two["light_ttft_mean_s"], 1) for one, two in pairs],
        "steps_ratio": [round(two["steps"] / one["steps"], 3) for one, two in pairs],
        "cpu_ratio": [round(two["cpu_s"] / one["cpu_s"], 3) for one, two in pairs],
        "throughput_ratio": [round(two["tokens_per_s"] / one["tokens_per_s"], 3) for one, two in pairs],
        "throughput_ratio_median": round(
            statistics.median(two["tokens_per_s"] / one["tokens_per_s"] for one, two in pairs), 3
        ),
    }


def _service(server: Server) -> dict[str, float]:
    return {client["client"]: client["service"] / UNIT for client in settled(server)["clients"]}


def memory(folder: Path, rounds: int) -> dict[str, Any]:
    """Callers ask for far more tokens than they get."""
    arguments = (*admission.LITTLE_MEMORY, *QUIET)
    found: dict[str, list[dict[str, float]]] = {"fcfs": [], "equinox": []}
    with (
        serve(folder, "fcfs", arguments=arguments) as stock,
        serve(folder, "equinox", admission.OPTIONS, arguments) as ours,
    ):
        steps = {"fcfs": Steps(stock), "equinox": Steps(ours)}
        for number in range(rounds):
            for name, server in (("fcfs", stock), ("equinox", ours)):
                outcomes = ask_all(server, admission.load(number))
                found[name].append(
                    {
                        "running": round(admission.mean_running(outcomes), 2),
                        "seconds": round(max(one.end_s for one in outcomes), 2),
                        "retractions": sum(one.retractions for one in outcomes),
                        "requests": len(outcomes),
                        "tokens": sum(one.tokens for one in outcomes),
                        **steps[name].since(),
                    }
                )
                print(number, name, found[name][-1], flush=True)
    pairs = list(zip(found["fcfs"], found["equinox"], strict=True))
    return {
        "rounds": found,
        "running_ratio": [round(two["running"] / one["running"], 2) for one, two in pairs],
        "times_as_quick": [round(one["seconds"] / two["seconds"], 2) for one, two in pairs],
        "decode_batch_ratio": [round(two["decode_batch_mean"] / one["decode_batch_mean"], 2) for one, two in pairs],
        "steps_ratio": [round(two["steps"] / one["steps"], 3) for one, two in pairs],
    }


def best_ms(action: Callable[[], object], times: int = 15) -> float:
    """Milliseconds of CPU, the best of some."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return round(1e3 * min(taken), 2)


def order_ms() -> dict[str, dict[str, float]]:
    """Milliseconds of ordering a queue; 512 admissions are foreseen, the most there are.

    Beside it the sort that SGLang's own `lof` makes of the same queue, the longest `max_new_tokens` first.
    """
    found: dict[str, dict[str, float]] = {}
    for name in compat.POLICIES:
        for num_requests in (1_000, 10_000):
            for num_clients in (2, num_requests // 10, num_requests):
                stand_in = scheduler(name)
                stand_in.max_running_requests = 100_000
                fair = FairScheduling(stand_in, HookOptions.model_validate({"policy": name, "predictor": "none"}))
                for number in range(num_requests):
                    client = f"client-{number * 7919 % num_clients}"
                    req = Req(client, 20 + number % 50, 350 + number * 37 % 1000, float(50 + number * 31 % 300))
                    stand_in.waiting_queue.append(req)
                    fair.arrived(req)
                queue = stand_in.waiting_queue
                case = f"{num_requests} requests of {num_clients} clients"
                found.setdefault(name, {})[case] = best_ms(partial(fair.order, queue))
                if name == compat.POLICIES[-1]:
                    found.setdefault("SGLang's lof", {})[case] = best_ms(partial(sorted, queue, key=_longest_first))
    return found


def _longest_first(req: Req) -> int:
    return -int(req.sampling_params.max_new_tokens)


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="times that each server gets each load")
    chosen = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in ("sglang", "torch", "transformers")},
        "order_ms": order_ms(),
    }
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report["flood beside a light client"] = sharing(Path(folder), chosen.rounds)
        report["memory that is short"] = memory(Path(folder), chosen.rounds)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
