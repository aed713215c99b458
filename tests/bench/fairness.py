"""Measures what the fairness core costs: a pick with its charge, a simulated order, the memory of a million clients.

    python tests/bench/fairness.py --output model_cards/results/DATE-fairness-core.json

CPU time of this process, the best of some rounds, garbage collection on: a machine that does other things beside it
moves the figures little. Memory is that of a fresh process for each figure (Linux).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from mope.console import console
from mope.fairness import FairnessConfig, Policy

POLICIES = ("fcfs", "vtc", "vtc-predicted", "equinox", "holistic", "shortest-predicted", "deficit-round-robin")
SIZES = (1_000, 10_000, 100_000)
ROUNDS = 7


def filled(name: str, num_clients: int, num_requests: int) -> Policy:
    """A policy with requests of all its clients, in turn."""
    policy = Policy(FairnessConfig.model_validate({"policy": name}))
    for number in range(num_requests):
        policy.enqueue(str(number), f"client-{number % num_clients}", 100 + number % 77, 50 + number * 7919 % 500)
    return policy


def pick_us(name: str, num_clients: int) -> dict[str, float]:
    """Microseconds of CPU for each step of a request's life, at `num_clients` that wait."""
    rounds = 2_000
    policy = filled(name, num_clients, num_clients + 3 * ROUNDS * rounds)
    best = {"enqueue": math.inf, "pick and charge": math.inf, "finish": math.inf, "simulate 512": math.inf}
    for number in range(ROUNDS):
        start = time.process_time()
        admitted = [policy.admit().request_id for _ in range(rounds)]
        best["pick and charge"] = min(best["pick and charge"], (time.process_time() - start) / rounds)
        start = time.process_time()
        for request in admitted:
            policy.finish(request, 120)
        best["finish"] = min(best["finish"], (time.process_time() - start) / rounds)
        start = time.process_time()
        for position, request in enumerate(admitted):
            policy.enqueue(f"again-{number}-{request}", f"client-{position % num_clients}", 100, 90)
        best["enqueue"] = min(best["enqueue"], (time.process_time() - start) / rounds)
        start = time.process_time()
        policy.simulate(512)
        best["simulate 512"] = min(best["simulate 512"], time.process_time() - start)
    return {what: round(1e6 * seconds, 2) for what, seconds in best.items()}


def memory_mb(code: str) -> float:
    """MB that a fresh process holds once it has run `code`, beyond those of importing the core."""
    script = (
        "def held_kb():\n"
        "    with open('/proc/self/status') as lines:\n"
        "        return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS'))\n"
        "from mope.fairness import FairnessConfig, Policy\n"
        "policy = Policy(FairnessConfig())\n"
        "before = held_kb()\n"
        f"{code}\n"
        "print(held_kb() - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return round(int(found.stdout) / 1024, 1)


ALL_WAIT = """
for n in range(1_000_000):
    policy.enqueue(str(n), f"client-{n}", 100, 100)
"""
ALL_SERVED = """
for n in range(1_000_000):
    policy.enqueue(str(n), f"client-{n}", 100, 100)
    policy.admit()
    policy.finish(str(n), 80 + n % 50)
"""
ALL_REMEMBERED = f"policy = Policy(FairnessConfig(idle_clients=1_000_000))\n{ALL_SERVED}"


def main() -> None:
    """Measures, prints a table, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    chosen = parser.parse_args()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    table = Table("policy", "clients", "enqueue µs", "pick and charge µs", "finish µs", "simulate 512 µs")
    for name in POLICIES:
        figures[name] = {}
        for size in SIZES:
            gc.collect()
            found = figures[name][str(size)] = pick_us(name, size)
            table.add_row(name, f"{size:,}", *(f"{figure:.2f}" for figure in found.values()))
    console().print(table)
    memory = {
        "1,000,000 clients, each with a waiting request": memory_mb(ALL_WAIT),
        "1,000,000 clients served one after another": memory_mb(ALL_SERVED),
        "the same, all remembered": memory_mb(ALL_REMEMBERED),
    }
    for what, size_mb in memory.items():
        console().print(f"{what}: {size_mb:.0f} MB")
    if chosen.output is not None:
        report = {
            "command": "python " + " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "cpu_us": figures,
            "memory_mb": memory,
        }
        chosen.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
