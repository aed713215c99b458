"""Measures what the hook adds to a step of vLLM's scheduler: CPU time of all that a server calls of it.

    python tests/bench/vllm_overhead.py --output model_cards/results/DATE-vllm-overhead.json

where vLLM is installed. The real scheduler with a fake model, twice beside each other in one process: vLLM's own, and
ours over it. 256 requests run; as one ends, the next of those that wait is admitted, and a new one arrives. Counted are
add_request(), schedule() and update_from_output(). Both take turns, a stretch of steps each, so that whatever the
machine does beside hits both; the figure is the median over stretches of the ratio of the two.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from mope.console import console
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.engine_vllm import VllmEngine

RUNNING = 256
STRETCH, STRETCHES = 40, 25
SETTINGS = ((1_000, 100), (10_000, 1_000))  # requests that wait, of so many clients
OURS = "mope.serving_hooks.vllm.scheduler.make_scheduler"
QUANTILES = tuple(20.0 * (number + 1) for number in range(14))


class Loaded:
    """An engine with a full batch and a queue that is kept at its length."""

    def __init__(self, num_waiting: int, num_clients: int, policy: str | None, in_flight: int) -> None:
        settings = EngineSettings(max_num_seqs=RUNNING, max_num_batched_tokens=8192, batches_in_flight=in_flight)
        options = {"mope": {"policy": policy, "summary_s": 0}} if policy else None
        self.engine = VllmEngine(
            settings,
            kv_tokens=1_000_000,
            max_model_len=4096,
            scheduler=OURS if policy else None,
            options=options,
        )
        self.num_clients, self.num_sent, self.cpu_s = num_clients, 0, 0.0
        self.lengths: dict[str, int] = {}
        for method in ("add_request", "schedule", "update_from_output"):
            self.watch(method)
        for _ in range(RUNNING + num_waiting):
            self.send()
        for _ in range(3 * STRETCH):
            self.step()

    def send(self) -> None:
        """One more request; answers have 100 to 300 tokens."""
        name = str(self.num_sent)
        self.lengths[name] = 100 + self.num_sent * 7919 % 200
        client = f"client-{self.num_sent % self.num_clients}"
        carried = Carried(client, 180.0, QUANTILES, "llm||")
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
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.cpu_s += time.process_time() - start

        setattr(self.engine.scheduler, method, timed)


def measure(num_waiting: int, num_clients: int, policy: str) -> dict[str, float]:
    """Median CPU time of a step of both, and of their ratio."""
    pair = (Loaded(num_waiting, num_clients, None, 1), Loaded(num_waiting, num_clients, policy, 1))
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    for stretch in range(STRETCHES):
        for which in (0, 1) if stretch % 2 else (1, 0):
            pair[which].cpu_s = 0.0
            for _ in range(STRETCH):
                pair[which].step()
            times[which].append(pair[which].cpu_s / STRETCH)
    ratios = [ours / stock for stock, ours in zip(*times, strict=True)]
    low, high = sorted(ratios)[len(ratios) // 4], sorted(ratios)[3 * len(ratios) // 4]
    failure = pair[1].engine.scheduler.mope_guard.failure
    if failure is not None:
        raise RuntimeError(failure)
    return {
        "stock_us": round(1e6 * statistics.median(times[0]), 1),
        "ours_us": round(1e6 * statistics.median(times[1]), 1),
        "added_percent": round(100 * (statistics.median(ratios) - 1), 2),
        "quartiles_percent": (round(100 * (low - 1), 2), round(100 * (high - 1), 2)),
    }


def main() -> None:
    """Measures, prints a table, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--policies", default="fcfs,vtc-predicted,equinox", help="policies, with commas between")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    table = Table("policy", "waiting", "clients", "vLLM µs", "with mope µs", "added %", "quartiles %")
    for policy in chosen.policies.split(","):
        for num_waiting, num_clients in SETTINGS:
            found = measure(num_waiting, num_clients, policy)
            figures[f"{policy}, {num_waiting} waiting of {num_clients} clients"] = found
            table.add_row(policy, f"{num_waiting:,}", f"{num_clients:,}", *(str(figure) for figure in found.values()))
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
