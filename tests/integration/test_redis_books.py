"""Budgets on a real Redis server: the same books as in a file, shared by replicas, exact over kills of both."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from book_model import CLIENTS, LIMIT, Model, hold, steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_redis import RealRedis, needs_redis

from mope.budgets.books import Totals, open_books
from mope.budgets.redis_books import RedisBooks
from mope.budgets.risk import following, log_odds
from mope.errors import StoreError
from mope.fairness.stores import StoreConfig

pytestmark = needs_redis
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
DAY_S = 86_400.0


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    server = RealRedis(tmp_path_factory.mktemp("redis"), *DURABLE).start()
    yield server
    server.kill()


def books_on(redis: RealRedis, namespace: str, **options: float) -> RedisBooks:
    return RedisBooks(redis.url, StoreConfig(url=redis.url, namespace=namespace), **options)  # type: ignore[arg-type]


_runs = iter(range(10**9))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(steps, max_size=40))
def test_they_are_those_of_a_list_of_reservations(redis: RealRedis, taken: list[tuple[str, str, int, str]]) -> None:
    """All within one window: the clock is the server's."""

    async def run() -> None:
        model, books = Model(), books_on(redis, f"model{next(_runs)}")
        for action, name, number, client in taken:
            if action == "reserve":
                decision = await books.reserve(hold(name, number, client, window_s=30 * DAY_S, hold_s=DAY_S))
                assert decision[:3] == model.reserve(name, number, client)
            elif action == "settle":
                assert (await books.settle(name, number))[:3] == model.settle(name, number)
        found = await books.totals()
        for client in CLIENTS:
            assert found.get(client, Totals()) == model.totals(client)
        await books.close()

    asyncio.run(run())


def test_what_is_not_settled_expires_and_may_be_settled_late(redis: RealRedis) -> None:
    async def run() -> None:
        books = books_on(redis, "late")
        await books.reserve(hold("x", 80, window_s=DAY_S, hold_s=0.05))
        full = await books.reserve(hold("y", 80, window_s=DAY_S, refund=30, due_s=7.0))
        assert (full.state, full.held) == ("full", 80)
        time.sleep(0.1)
        assert (await books.reserve(hold("y", 80, window_s=DAY_S, refund=30, due_s=7.0))).state == "held"
        assert (await books.settle("x", 10)).state == "late"
        full = await books.reserve(hold("z", 40, window_s=DAY_S))
        assert (full.used, full.held) == (10, 80)
        assert full.wait_s == pytest.approx(7.0, abs=0.5)  # 30 are needed, and expected back then
        assert (await books.totals())["a"] == Totals(160, 80, 80, 0, 10, 2, 1, 0, 2)
        await books.close()

    asyncio.run(run())


def test_windows_end_and_nothing_is_kept_for_ever(redis: RealRedis) -> None:
    async def run() -> None:
        books, odds = books_on(redis, "windows", kept_s=0.3), log_odds(0.9)
        for number in range(6):
            decision = await books.reserve(hold(f"r{number}", 60, window_s=0.2))
            assert decision.odds == (None if number == 0 else pytest.approx(odds, abs=1e-6))
            await books.settle(f"r{number}", 150 if number % 3 == 0 else 50)
            odds = following(odds, 0.1, over=number % 3 == 0)
            time.sleep(0.2)
        time.sleep(0.8)
        assert await books.settle("r1", 5) == ("unknown", 0, 5, "")  # forgotten
        total = (await books.totals())["a"]
        assert (total.windows, total.windows_over, total.used) == (6, 2, 500)
        kept = [key async for key in books._client.scan_iter("mope:{windows}:*")]
        assert len(kept) <= 3, kept  # totals and the list of clients
        await books.close()

    asyncio.run(run())


def test_replicas_together_never_hold_more_than_the_limit(redis: RealRedis) -> None:
    async def replica(number: int) -> int:
        books, held = books_on(redis, "shared"), 0
        for turn in range(40):
            decision = await books.reserve(hold(f"{number}-{turn}", 3, window_s=30 * DAY_S))
            assert decision.used + decision.held <= LIMIT
            held += decision.state == "held"
        await books.close()
        return held

    async def run() -> None:
        made = await asyncio.gather(*map(replica, range(5)))
        assert sum(made) == LIMIT // 3
        assert min(made) >= 1

    asyncio.run(run())


def test_a_server_that_is_gone_is_told_and_found_again(tmp_path: Path) -> None:
    server = RealRedis(tmp_path, *DURABLE).start()

    async def run() -> None:
        books = open_books(server.url)
        await books.reserve(hold("x", 40, window_s=30 * DAY_S, note="of x"))
        assert (await books.note("x"), await books.note("y")) == ("of x", None)
        server.kill()
        with pytest.raises(StoreError):
            await books.note("x")
        with pytest.raises(StoreError, match=r"books redis://127\.0\.0\.1"):
            await books.reserve(hold("y", 40, window_s=30 * DAY_S))
        server.start()
        assert (await books.reserve(hold("x", 40, window_s=30 * DAY_S))).state == "known"
        assert (await books.settle("x", 12)).state == "settled"
        await books.close()

    try:
        asyncio.run(run())
    finally:
        server.kill()


WORKER = """
import asyncio, random, sys, time
from mope.budgets.books import Hold, open_books
from mope.errors import StoreError

async def persistently(call):
    while True:
        try:
            return await call()
        except StoreError:
            await asyncio.sleep(0.02)

async def run(url, name, first, last):
    books, rng = open_books(url), random.Random(name)
    amounts = [(rng.randint(1, 900), rng.randint(1, 900)) for _ in range(last)]
    for turn in range(first, last):
        amount, used = amounts[turn]
        await persistently(lambda: books.reserve(Hold(f"{name}-{turn}", f"client {turn % 3}", amount, 0, 1.0, 3600.0,
                                                      10**15, 2592000.0)))
        await persistently(lambda: books.settle(f"{name}-{turn}", used))
        print(turn + 1, flush=True)

asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


def test_books_are_exact_over_kills_of_replicas_and_of_the_server(tmp_path: Path) -> None:
    """A replica that was killed repeats its last request: nothing is lost and nothing counts twice."""
    import random

    server, num_workers, num_pairs = RealRedis(tmp_path, *DURABLE).start(), 4, 250
    logs = [tmp_path / f"worker-{number}" for number in range(num_workers)]

    def start(number: int) -> subprocess.Popen[bytes]:
        done = max((int(line) for line in logs[number].read_text().split()), default=0) if logs[number].exists() else 0
        command = [sys.executable, "-c", WORKER, server.url, f"w{number}", str(done), str(num_pairs)]
        with logs[number].open("ab") as log:
            return subprocess.Popen(command, stdout=log)

    rng, workers = random.Random(7), [start(number) for number in range(num_workers)]
    kills: Counter[str] = Counter()
    try:
        deadline = time.monotonic() + 120
        while any(worker.poll() != 0 for worker in workers) and time.monotonic() < deadline:
            time.sleep(rng.uniform(0.1, 0.5))
            if sum(kills.values()) < 12 and rng.random() < 0.4:
                server.kill()
                server.start()
                kills["server"] += 1
            number = rng.randrange(num_workers)
            if sum(kills.values()) < 12 and workers[number].poll() is None:
                workers[number].kill()
                workers[number].wait()
                kills["replica"] += 1
            for position, worker in enumerate(workers):
                if worker.poll() not in (None, 0):
                    workers[position] = start(position)
        assert all(worker.poll() == 0 for worker in workers)
        assert kills["server"] >= 2
        assert kills["replica"] >= 2
        found = asyncio.run(_totals(server.url))
    finally:
        for worker in workers:
            worker.kill()
        server.kill()
    expected = {f"client {client}": [0, 0, 0] for client in range(3)}
    for number in range(num_workers):
        own = random.Random(f"w{number}")
        for turn in range(num_pairs):
            sums, amount, used = expected[f"client {turn % 3}"], own.randint(1, 900), own.randint(1, 900)
            sums[0], sums[1], sums[2] = sums[0] + amount, sums[1] + used, sums[2] + 1
    assert {client: [total.reserved, total.used, total.num_reserved] for client, total in found.items()} == expected
    for total in found.values():
        assert total.held == total.expired == 0
        assert total.settled == total.reserved


async def _totals(url: str) -> dict[str, Totals]:
    books = open_books(url)
    found = await books.totals()
    await books.close()
    return found
