"""Replicas that share through a real Redis server while it is slow, gone, killed, or back with an older state."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path as Folder
from typing import Any

import pytest
from ports import free_port
from real_redis import RealRedis, needs_redis

from mope.errors import StoreError
from mope.fairness.charges import Charge
from mope.fairness.clients import Path
from mope.fairness.ledger import Ledger
from mope.fairness.redis_store import RedisStore, shown
from mope.fairness.stores import StoreConfig, open_store

pytestmark = needs_redis
_namespaces = itertools.count()
LONG_S = 30.0  # for whatever ends at once unless it hangs


def config(url: str, **options: Any) -> StoreConfig:
    patience = {"interval_s": 0.01, "timeout_s": 0.5, "max_backoff_s": 0.1}
    return StoreConfig(url=url, namespace=f"n{next(_namespaces)}", **{**patience, **options})


@pytest.fixture
def redis(tmp_path: Folder) -> Iterator[RealRedis]:
    server = RealRedis(tmp_path).start()
    yield server
    server.kill()


class Replica:
    """A ledger and its store."""

    def __init__(self, options: StoreConfig, *, wait: bool = True) -> None:
        self.store = RedisStore(options)
        self.ledger = Ledger()
        self._requests = itertools.count()
        self.store.exchange(self.ledger)
        if wait:
            assert self.store.flush(LONG_S)

    def charge(self, name: str, amount: int) -> None:
        request = f"r{next(self._requests)}"
        self.ledger.open(request, self.ledger.account((name,)), Charge(0, 0, 0, 2 * amount))
        self.ledger.close(request, Charge(0, 0, 0, amount))
        self.store.exchange(self.ledger)

    def flush(self) -> None:
        assert self.store.flush(LONG_S)

    def counters(self) -> dict[str, int]:
        self.store.exchange(self.ledger)
        while self.store.stats().num_unapplied:
            self.flush()
            self.store.exchange(self.ledger)
        return {account.name: account.counter for account in self.ledger.clients() if account.counter}


def settle(*replicas: Replica) -> None:
    for replica in replicas * 2:
        replica.flush()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def named(totals: dict[Path, int]) -> dict[str, int]:
    return {path[0]: total for path, total in totals.items()}


# -- a server that is well


def test_a_charge_is_counted_elsewhere_within_the_interval_without_being_asked_for(redis: RealRedis) -> None:
    options = config(redis.url, interval_s=0.05)
    first, second = Replica(options), Replica(options)
    first.charge("a", 5)
    started_s = time.monotonic()
    wait_for(lambda: second.store.stats().num_unapplied == 1)
    assert time.monotonic() - started_s < 2.0  # 0.1 s and two round trips, on a machine that has nothing else to do
    assert second.counters() == {"a": 5}
    assert first.store.stats().staleness_s < 2.0
    for replica in (first, second):
        assert replica.store.close(LONG_S)


def test_many_clients_of_others_are_counted_in_several_steps(redis: RealRedis) -> None:
    options = config(redis.url)
    first, second = Replica(options), Replica(options)
    for number in range(1200):
        first.charge(f"c{number}", number + 1)
    settle(first, second)
    before = second.store.stats().num_unapplied
    assert before == 1200
    second.store.exchange(second.ledger)
    assert before - 500 <= second.store.stats().num_unapplied < before
    assert second.counters() == {f"c{number}": number + 1 for number in range(1200)}
    for replica in (first, second):
        replica.store.close()


def test_an_idle_engine_adds_up_what_others_charge(redis: RealRedis) -> None:
    options = config(redis.url, interval_s=0.001)
    busy, idle = Replica(options), Replica(options)
    for _ in range(200):
        busy.charge("a", 1)
        busy.flush()
    settle(busy, idle)
    assert len(idle.store._elsewhere) <= 8
    assert idle.counters() == {"a": 200}
    for replica in (busy, idle):
        replica.store.close()


def test_closing_tells_what_is_untold_and_leaves_nothing_but_the_share(redis: RealRedis) -> None:
    replica = Replica(config(redis.url, interval_s=60))
    for number in range(100):
        replica.charge(f"c{number % 7}", 1)
    assert replica.store.close(LONG_S)
    assert sum(replica.store.totals().values()) == 100
    assert not replica.store._thread.is_alive()  # type: ignore[union-attr]
    import redis as package

    client = package.Redis.from_url(redis.url, protocol=2)
    assert list(client.scan_iter("*:told:*")) == []
    client.close()


def test_namespaces_do_not_meet(redis: RealRedis) -> None:
    first, second = Replica(config(redis.url)), Replica(config(redis.url))
    first.charge("a", 5)
    settle(first, second)
    assert second.store.totals() == {}
    assert second.counters() == {}
    for replica in (first, second):
        replica.store.close()


def test_a_server_that_knows_no_scripts_any_more_is_told_them_again(redis: RealRedis) -> None:
    import redis as package

    replica = Replica(config(redis.url))
    client = package.Redis.from_url(redis.url, protocol=2)
    client.script_flush()
    replica.charge("a", 5)
    replica.flush()
    assert replica.store.stats().num_failures == 0
    assert named(replica.store.totals()) == {"a": 5}
    client.close()
    replica.store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_a_replica_of_its_own(redis: RealRedis) -> None:
    parent = Replica(config(redis.url, interval_s=0.2))
    parent.charge("a", 1)
    parent.flush()
    parent.charge("a", 10)  # handed over, and not told yet
    parent.ledger.open("r", parent.ledger.account(("a",)), Charge(0, 0, 0, 100))  # not even handed over
    child = os.fork()
    if child == 0:
        status = 1
        try:
            parent.store.exchange(parent.ledger)
            assert parent.store.flush(LONG_S)
            parent.charge("a", 1000)
            assert parent.store.close(LONG_S)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    parent.store.exchange(parent.ledger)
    parent.flush()
    assert named(parent.store.totals()) == {"a": 1111}
    assert parent.counters() == {"a": 1111}
    parent.store.close()


# -- a server that is slow


class SlowWire:
    """Stands between replicas and the server; answers come late, or not until it is let go."""

    def __init__(self, port: int, delay_s: float) -> None:
        self.target, self.delay_s = port, delay_s
        self.open = threading.Event()
        self.open.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self._pass, args=(near, far, 0.0), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, self.delay_s), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, delay_s: float) -> None:
        try:
            while data := source.recv(65536):
                time.sleep(delay_s)
                if delay_s:
                    self.open.wait()
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for side in (source, sink):
                side.close()

    def close(self) -> None:
        self.open.set()
        self.listener.close()


def test_a_slow_server_delays_others_and_not_the_scheduler(redis: RealRedis) -> None:
    wire = SlowWire(redis.port, 0.15)
    options = config(f"redis://127.0.0.1:{wire.port}/0", timeout_s=5)
    first, second = Replica(options), Replica(options)
    durations_s = []
    for _ in range(300):
        started_s = time.perf_counter()
        first.charge("a", 1)
        durations_s.append(time.perf_counter() - started_s)
        assert len(first.store._charged) <= 1  # what the thread has not taken is added up
        time.sleep(0.001)
    settle(first, second)
    assert sorted(durations_s)[150] < 0.01
    assert first.store.stats().round_trip_s > 0.15
    assert first.store.stats().num_failures == 0
    assert second.counters() == {"a": 300}
    for replica in (first, second):
        assert replica.store.close(LONG_S)
    wire.close()


def test_answers_that_never_come_are_failures_and_nothing_is_lost(redis: RealRedis) -> None:
    wire = SlowWire(redis.port, 0.001)
    options = config(f"redis://127.0.0.1:{wire.port}/0", timeout_s=0.1)
    first, second = Replica(options), Replica(config(redis.url).model_copy(update={"namespace": options.namespace}))
    wire.open.clear()
    for _ in range(50):
        first.charge("a", 1)
        second.charge("a", 100)
    wait_for(lambda: first.store.stats().num_failures >= 3)
    assert first.store.stats().num_failures_in_row >= 3
    assert first.store.stats().staleness_s > 0.1
    assert "Timeout" in first.store.stats().last_error
    wire.open.set()
    settle(first, second)
    assert first.store.stats().num_failures_in_row == 0
    assert named(first.store.totals()) == {"a": 5050}
    settle(first, second)
    assert first.counters() == second.counters() == {"a": 5050}
    for replica in (first, second):
        assert replica.store.close(LONG_S)
    wire.close()


# -- a server that is gone


def test_a_server_without_memory_is_a_failure_and_nothing_is_told_by_halves(redis: RealRedis) -> None:
    import redis as package

    options = config(redis.url)
    first, second = Replica(options), Replica(options)
    client = package.Redis.from_url(redis.url, protocol=2)
    client.config_set("maxmemory", 1)
    for number in range(700):
        first.charge(f"c{number}", 1)
    wait_for(lambda: first.store.stats().num_failures >= 3)
    assert "OutOfMemory" in first.store.stats().last_error
    client.config_set("maxmemory", 0)
    client.close()
    settle(first, second)
    assert named(first.store.totals()) == second.counters() == {f"c{number}": 1 for number in range(700)}
    assert first.store.stats().num_refused == 0
    for replica in (first, second):
        assert replica.store.close(LONG_S)


def test_a_server_that_comes_later_is_told_everything(tmp_path: Folder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mope")
    server = RealRedis(tmp_path)
    options = config(server.url)
    first, second = Replica(options, wait=False), Replica(options, wait=False)
    for number in range(100):
        first.charge(f"c{number % 3}", 1)
        second.charge("c0", 10)
    wait_for(lambda: min(replica.store.stats().num_failures for replica in (first, second)) >= 3)
    assert first.counters() == {"c0": 34, "c1": 33, "c2": 33}
    server.start()
    settle(first, second)
    expected = {"c0": 1034, "c1": 33, "c2": 33}
    assert named(first.store.totals()) == expected
    assert first.counters() == second.counters() == expected
    messages = [record.message for record in caplog.records if record.name == "mope"]
    assert len([message for message in messages if "told later" in message]) == 2  # once for each outage
    assert len([message for message in messages if "is back" in message]) == 2
    for replica in (first, second):
        assert replica.store.close(LONG_S)
    server.kill()


def test_closing_without_a_server_takes_no_longer_than_its_deadline() -> None:
    replica = Replica(config(f"redis://127.0.0.1:{free_port()}/0"), wait=False)
    replica.charge("a", 1)
    started_s = time.monotonic()
    assert not replica.store.close(0.3)
    assert time.monotonic() - started_s < 5.0


def test_while_it_is_gone_memory_is_bounded(tmp_path: Folder) -> None:
    server = RealRedis(tmp_path)
    replica = Replica(config(server.url, max_clients=50), wait=False)
    for number in range(2000):
        replica.charge(f"c{number}", 1)
    wait_for(lambda: not replica.store._charged)
    wait_for(lambda: replica.store.stats().num_clients == 100)
    server.start()
    replica.flush()
    totals = replica.store.totals()
    assert sum(totals.values()) == 2000
    assert len(totals) == 51
    assert replica.store.close(LONG_S)
    server.kill()


def test_a_server_that_lets_nobody_in_is_an_error_only_if_it_is_required(tmp_path: Folder) -> None:
    server = RealRedis(tmp_path, "--requirepass", "open-sesame").start()
    wrong = f"redis://:open-barley@127.0.0.1:{server.port}/0"
    with pytest.raises(StoreError, match="does not let us in") as caught:
        open_store(config(wrong, required=True))
    assert "barley" not in str(caught.value)
    with pytest.raises(StoreError, match="does not let us in"):
        open_store(config(server.url, required=True))
    replica = Replica(config(wrong), wait=False)
    replica.charge("a", 1)
    wait_for(lambda: replica.store.stats().num_failures >= 2)
    assert "barley" not in replica.store.stats().last_error
    replica.store.close(0.1)
    right = Replica(config(f"redis://:open-sesame@127.0.0.1:{server.port}/0", required=True))
    right.charge("a", 1)
    right.flush()
    assert named(right.store.totals()) == {"a": 1}
    assert right.store.close(LONG_S)
    server.kill()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://127.0.0.1:{port}/0", "required=False"),
        ("redis://user:pass/word#@host:12/0", "%2F"),
        ("redis://127.0.0.1:99999999/0", "."),
        ("unix:///no/such/socket", "/no/such/socket"),
        ("rediss://127.0.0.1:{port}/0", "required=False"),
    ],
)
def test_a_url_that_leads_nowhere_is_an_error_only_if_it_is_required(
    url: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = url.format(port=free_port())
    with pytest.raises(StoreError, match=message) as caught:
        open_store(config(url, required=True))
    assert "word" not in str(caught.value).replace("PASSWORD", "").replace("a password", "")
    replica = Replica(config(url), wait=False)
    replica.charge("a", 1)
    wait_for(lambda: replica.store.stats().num_failures >= 2)
    assert not replica.store.close(0.1)
    assert "pass/word" not in caplog.text


def test_what_is_shown_of_a_url_has_no_password() -> None:
    assert shown("rediss://user:se/cr@t@host:1/2?ssl_ca_certs=x&password=y") == "rediss://host:1/2"
    assert shown("unix:///tmp/redis.sock?password=y") == "unix:///tmp/redis.sock"


# -- a server that is killed


def test_a_server_that_comes_back_with_an_older_state_is_told_the_rest(redis: RealRedis) -> None:
    import redis as package

    options = config(redis.url)
    replicas = [Replica(options) for _ in range(3)]
    expected: Counter[str] = Counter()
    for part in range(3):
        for step in range(60):
            for number, replica in enumerate(replicas):
                name, amount = f"c{(step + part * 5) % 11}", 10**number
                replica.charge(name, amount)
                expected[name] += amount
        settle(*replicas)
        if part == 0:
            client = package.Redis.from_url(redis.url, protocol=2)
            client.save()
            client.close()
    redis.kill()
    for replica in replicas:
        replica.charge("c0", 7)
        expected["c0"] += 7
    redis.start()
    settle(*replicas)
    assert named(replicas[0].store.totals()) == expected
    settle(*replicas)
    for replica in replicas:
        assert replica.store.stats().num_restored == 1
        assert replica.counters() == expected
        assert replica.store.close(LONG_S)


def charge_many(
    options: str, seed: int, num_charges: int, start: Any, charged: Any, calm: Any, told: Any, results: Any
):
    """One of several processes: charges clients at random, corrects it, and goes on until the server stays."""
    replica = Replica(StoreConfig.model_validate_json(options))
    start.wait(60)
    chance, own = random.Random(seed), Counter[str]()
    for number in range(num_charges):
        name, predicted, actual = f"c{chance.randrange(200)}", chance.randrange(10**9), chance.randrange(10**9)
        replica.ledger.open(str(number), replica.ledger.account((name,)), Charge(0, 0, 0, predicted))
        if number % 10 == 9:
            replica.store.exchange(replica.ledger)
            time.sleep(0.0005)
        replica.ledger.close(str(number), Charge(0, 0, 0, actual))
        own[name] += actual
    replica.store.exchange(replica.ledger)
    charged.release()
    calm.wait(60)
    flushed = replica.store.flush(LONG_S)
    told.wait(60)
    flushed = replica.store.flush(LONG_S) and flushed
    time.sleep(2 * replica.store._sharing._settle_s)  # until totals that fell are believed
    flushed = replica.store.flush(LONG_S) and flushed
    stats = replica.store.stats()
    results.put(
        json.dumps(
            {
                "flushed": flushed,
                "own": own,
                "counters": replica.counters(),
                "failures": stats.num_failures,
                "restored": stats.num_restored,
            }
        )
    )
    told.wait(60)  # nobody leaves before all have read
    replica.store.close(LONG_S)


@pytest.mark.parametrize("options", [(), ("--appendonly", "yes")], ids=["without persistence", "with persistence"])
def test_the_server_is_killed_during_100_000_charges_from_four_processes(
    tmp_path: Folder, options: tuple[str, ...]
) -> None:
    server = RealRedis(tmp_path, *options).start()
    stores = config(server.url, max_backoff_s=0.1, timeout_s=0.3)
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(5), context.Barrier(4)
    charged, calm, results = context.Semaphore(0), context.Event(), context.Queue()
    arguments = (start, charged, calm, told, results)
    processes = [
        context.Process(target=charge_many, args=(stores.model_dump_json(), seed, 25_000, *arguments), daemon=True)
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    start.wait(60)
    num_kills, num_ready = 0, 0
    while num_ready < 4:
        time.sleep(0.3)
        if num_ready == 0 or num_kills < 3:
            server.kill()
            num_kills += 1
            time.sleep(0.1)
            server.start()
        while num_ready < 4 and charged.acquire(timeout=0.01):
            num_ready += 1
    calm.set()
    found = [json.loads(results.get(timeout=60)) for _ in processes]
    expected: Counter[str] = Counter()
    for result in found:
        expected.update(result["own"])
    import redis as package

    client = package.Redis.from_url(server.url, protocol=2)
    stored = client.hgetall(f"mope:{{{stores.namespace}}}:totals")
    client.close()
    totals = {json.loads(field)[0]: int(total) for field, total in stored.items() if field.startswith(b"[")}
    for process in processes:
        process.join(30)
    server.kill()
    assert num_kills >= 3
    assert all(result["flushed"] for result in found)
    assert all(result["failures"] for result in found)
    assert totals == expected
    for result in found:
        assert result["counters"] == expected
    if not options:
        assert all(result["restored"] for result in found)
