"""What the hook's own threads cost the scheduling thread: writing its state, and answering scrapes of its metrics.

A loop stands for the scheduler: a step of plain Python, then a short sleep as for the GPU. Its steps are timed alone,
while states of 1,000, 20,000 and 100,000 accounts are written one after the other, and beside scrapers that never
pause. Times are of one machine and its load: compare within a run.

    python tests/bench/hook_background.py
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mope.serving_hooks import state
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.metrics import start
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.steward import Steward

SCRAPER = """
import sys, threading, urllib.request
def scrape():
    while True:
        urllib.request.urlopen(sys.argv[1]).read()
threads = [threading.Thread(target=scrape) for _ in range(int(sys.argv[2]))]
[thread.start() for thread in threads]
"""


def loop(seconds: float, between: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Times of a loop's steps in ms."""
    taken, end_s = [], time.monotonic() + seconds
    while time.monotonic() < end_s:
        started_s = time.perf_counter()
        total = 0
        for number in range(12_000):
            total += number
        between()
        taken.append(time.perf_counter() - started_s)
        time.sleep(0.0005)
    taken.sort()
    at = {"p50": len(taken) // 2, "p99": int(0.99 * len(taken)), "max": len(taken) - 1}
    return {name: round(1000 * taken[place], 2) for name, place in at.items()}


def beside_writes(num_accounts: int, seconds: float) -> dict[str, float]:
    """The loop while the state is written without a pause between two writes."""
    with tempfile.TemporaryDirectory() as folder:
        steward = Steward(HookOptions(state=Path(folder) / "state.json", predictor="none", summary_s=0))
        for number in range(num_accounts):
            steward.policy.ledger.account((f"client-{number}",))

        def step() -> None:
            steward.policy.ledger.num_bookings += 1
            steward.between_steps()

        found = loop(seconds, step)
        assert steward._keeper is not None
        found["seconds_of_a_write"] = round(steward._keeper._took_s, 2)
        steward.close()
    return found


def beside_scrapers(num_scrapers: int, seconds: float) -> dict[str, float]:
    """The loop while scrapers ask for the metrics of 200 clients."""
    steward = Steward(HookOptions(metrics_port=0, predictor="none", summary_s=0))
    for number in range(200):
        steward.policy.admit(steward.arrive(str(number), Carried(f"client-{number}"), 100))
        steward.ended(str(number), 10, aborted=False)
    exporter = start(steward, Guard(logging.getLogger("mope")))
    assert exporter is not None
    scrapers = subprocess.Popen([sys.executable, "-c", SCRAPER, exporter.url, str(num_scrapers)])
    try:
        time.sleep(1)
        return loop(seconds)
    finally:
        scrapers.kill()
        scrapers.wait()
        exporter.close()


def main() -> None:
    """Prints one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    seconds = parser.parse_args().seconds
    state.EVERY_S, state.SHARE = 0.1, 1.0
    for _ in range(2):
        print(json.dumps({"alone": loop(seconds)}), flush=True)
        for num_accounts in (1_000, 20_000, 100_000):
            print(json.dumps({f"{num_accounts} accounts": beside_writes(num_accounts, seconds)}), flush=True)
        for num_scrapers in (1, 8):
            print(json.dumps({f"{num_scrapers} scrapers": beside_scrapers(num_scrapers, seconds)}), flush=True)


if __name__ == "__main__":
    main()
