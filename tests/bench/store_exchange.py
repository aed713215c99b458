"""What a store costs the scheduler: seconds of `exchange` per step, by clients charged in it.

    python tests/bench/store_exchange.py [--redis redis://localhost:6379/0]

Interleaved rounds of both stores on one thread; the Redis store's own thread works meanwhile, as in a server.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

from mope.fairness.charges import Charge
from mope.fairness.ledger import Ledger
from mope.fairness.stores import MemoryHub, MemoryStore, Store, StoreConfig, open_store

NUM_TOUCHED = (0, 10, 1000)


def durations_us(
    store: Store, ledger: Ledger, num_touched: int, num_steps: int, amounts: itertools.count[int]
) -> list[float]:
    """Microseconds of each of some steps, five milliseconds apart, as quick decode steps are."""
    accounts = [ledger.account((f"tenant{number % 50}", f"user{number}")) for number in range(num_touched)]
    for number, account in enumerate(accounts):
        if ledger.charged(f"r{number}") is None:
            ledger.open(f"r{number}", account, Charge(0, 0, 0, 0))
    store.exchange(ledger)
    measured = []
    for _ in range(num_steps):
        amount = next(amounts)
        for number in range(num_touched):
            ledger.adjust(f"r{number}", Charge(amount, amount, amount, amount))
        started_s = time.perf_counter()
        store.exchange(ledger)
        measured.append(1e6 * (time.perf_counter() - started_s))
        time.sleep(0.005)
    return measured


def main() -> None:
    """Prints one row for each store and number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", help="URL of a Redis server that may be written to")
    parser.add_argument("--steps", type=int, default=200, help="measured steps in each round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, the stores taking turns")
    options = parser.parse_args()
    hub = MemoryHub()
    stores: dict[str, list[Store]] = {"memory": [MemoryStore(hub), MemoryStore(hub)]}
    if options.redis:
        config = StoreConfig(url=options.redis, namespace=f"bench-{time.time_ns()}", required=True)
        stores["redis"] = [open_store(config), open_store(config)]
    ledgers = {name: [Ledger() for _ in pair] for name, pair in stores.items()}
    amounts = itertools.count(1)
    rows: dict[tuple[str, int], list[float]] = {(name, number): [] for name in stores for number in NUM_TOUCHED}
    for _ in range(options.rounds):
        for name, number in rows:
            rows[name, number] += durations_us(stores[name][0], ledgers[name][0], number, options.steps, amounts)
            stores[name][1].exchange(ledgers[name][1])
    print("store    clients     p50 us     p99 us     max us")
    for (name, number), measured in rows.items():
        centiles = statistics.quantiles(measured, n=100)
        print(f"{name:8} {number:7} {centiles[49]:10.1f} {centiles[98]:10.1f} {max(measured):10.1f}")
    for pair in stores.values():
        for store in pair:
            store.close()


if __name__ == "__main__":
    main()
