"""Replicas whose Redis server holds what no replica wrote, drops keys, hides its policy, or has another clock."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path as Folder
from typing import Any

import pytest
from real_redis import RealRedis, needs_redis
from test_redis_store import Replica, config, settle, wait_for

from mope.fairness.redis_store import RedisServer
from mope.fairness.sharing import BATCH, Sharing

pytestmark = needs_redis
_names = itertools.count()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    server = RealRedis(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture
def client(redis: RealRedis) -> Any:
    import redis as package

    return package.Redis(port=redis.port, protocol=2)


def plant(client: Any, namespace: str, field: bytes | str, total: bytes | str, version: float = 1e6) -> None:
    """A client's total as somebody else writes it."""
    prefix = f"mope:{{{namespace}}}"
    client.hset(f"{prefix}:totals", field, total)
    client.zadd(f"{prefix}:changes", {field: version})


HOSTILE: dict[str, tuple[bytes | str, bytes | str, float]] = {
    "deep JSON": ("[" * 100_000, "5", 1e6),
    "no JSON": ('["a"', "5", 1e6),
    "a path of numbers": ("[1, 2]", "5", 1e6),
    "an empty path": ("[]", "5", 1e6),
    "no path": ('{"a": 1}', "5", 1e6),
    "a deep path": ('["' + '","'.join("x" * 1300) + '"]', "5", 1e6),
    "no UTF-8": (b'["\xff"]', "5", 1e6),
    "a total of letters": ('["x"]', "many", 1e6),
    "a total of halves": ('["x"]', "0.5", 1e6),
    "a total beyond 64 bits": ('["x"]', "9" * 5000, 1e6),
    "a version without end": ('["x"]', "5", float("inf")),
    "a version of halves": ('["x"]', "5", 0.5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_somebody_else_writes_stops_no_replica(
    name: str, redis: RealRedis, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = config(redis.url)
    replicas = [Replica(options), Replica(options)]
    replicas[0].charge("a", 5)
    settle(*replicas)
    field, total, version = HOSTILE[name]
    plant(client, options.namespace, field, total, version)
    client.hset(f"mope:{{{options.namespace}}}:totals", "version", 2_000_000)
    for _ in range(3):
        replicas[0].charge("a", 5)
        replicas[1].charge("b", 7)
        settle(*replicas)
    assert all(replica.store._thread.is_alive() for replica in replicas)
    for replica in replicas:
        counters = replica.counters()
        assert (counters["a"], counters["b"]) == (20, 21)
    assert len([one for one in caplog.records if "told once" in one.getMessage()]) <= len(replicas)
    assert "Traceback" not in caplog.text
    for replica in replicas:
        assert replica.store.totals()["b",] == 21
        replica.store.close(0.5)


def test_a_page_of_versions_that_are_none_is_a_failure_and_no_endless_loop(redis: RealRedis, client: Any) -> None:
    options = config(redis.url)
    replica = Replica(options)
    for number in range(BATCH + 1):
        plant(client, options.namespace, f'["x{number}"]', "5", float("inf"))
    wait_for(lambda: replica.store.stats().num_failures >= 2)
    assert "no whole numbers" in replica.store.stats().last_error
    assert replica.store._thread.is_alive()
    client.delete(f"mope:{{{options.namespace}}}:changes")
    replica.charge("a", 5)
    replica.flush()
    assert replica.store.close(5)


@pytest.mark.parametrize("part", ["_take_charges", "_lay_out"])
def test_whatever_fails_in_the_thread_is_counted_told_once_and_tried_again(
    part: str, redis: RealRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = Replica(config(redis.url))
    whole: Callable[[], None] = getattr(replica.store, part)

    def broken() -> None:
        raise RecursionError("for a test")

    with caplog.at_level(logging.INFO, logger="mope"):
        monkeypatch.setattr(replica.store, part, broken)
        wait_for(lambda: replica.store.stats().num_failures >= 3)
        assert replica.store.stats().last_error == "RecursionError: for a test"
        monkeypatch.setattr(replica.store, part, whole)
        replica.charge("a", 5)
        wait_for(lambda: replica.store.flush(1))
    assert len([one for one in caplog.records if "can't be used" in one.getMessage()]) == 1
    assert replica.store.close(5)


# -- how the server is set up


@pytest.mark.parametrize(("policy", "warns"), [("allkeys-lru", True), ("volatile-lru", False), ("noeviction", False)])
def test_a_server_that_drops_counters_is_told_of_once(
    policy: str, warns: bool, tmp_path: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    import redis as package

    server = RealRedis(tmp_path, "--maxmemory", "50mb", "--maxmemory-policy", policy).start()
    try:
        replica = Replica(config(server.url))
        package.Redis(port=server.port).client_kill_filter(_type="normal")  # another connection, and no other warning
        replica.charge("a", 5)
        wait_for(lambda: replica.store.flush(1))
        found = [one.getMessage() for one in caplog.records if "maxmemory-policy" in one.getMessage()]
        assert len(found) == warns
        assert all(policy in line and "noeviction" in line for line in found)
        replica.store.close(5)
    finally:
        server.kill()


def test_a_user_who_may_not_ask_for_the_policy_may_share(redis: RealRedis, client: Any) -> None:
    client.acl_setuser("scripts", enabled=True, passwords=["+open-sesame"], keys=["*"], categories=["+@all"],
                       commands=["-info"])  # fmt: skip
    options = config(f"redis://scripts:open-sesame@127.0.0.1:{redis.port}/0")
    assert RedisServer(options).eviction_policy() == ""
    replica = Replica(options)
    replica.charge("a", 5)
    replica.flush()
    assert replica.store.close(5)


@pytest.mark.parametrize("set_back_s", [0.0, 60.0, 3600.0, 1e6])
def test_a_clock_that_was_set_back_makes_no_replica_count_the_past(client: Any, set_back_s: float) -> None:
    """What is left of it are times in the database that are yet to come."""

    class Wire:
        def run(self, script: Any, keys: Any, arguments: Any) -> Any:
            return client.eval(script.text, len(keys), *keys, *arguments)

        def fields(self, key: str) -> Any:
            return client.hgetall(key).items()

    namespace = f"clock-{next(_names)}"
    first = Sharing(namespace, "first", max_clients=1000)
    first.charge('["a"]', 100)
    first.exchange(Wire(), 0.0, 0.0)
    totals = f"mope:{{{namespace}}}:totals"
    for name in ("created", "seen"):
        if (at := client.hget(totals, name)) is not None:
            client.hset(totals, name, f"{float(at) - 30.0 + set_back_s:.6f}")  # half a minute has passed since
    late = Sharing(namespace, "late", max_clients=1000)
    late.exchange(Wire(), 0.0, 0.5)
    assert late.received == {}
    first.charge('["a"]', 20)
    first.exchange(Wire(), 0.0, 0.0)
    late.exchange(Wire(), 0.0, 0.5)
    assert late.received == {'["a"]': 20}


def test_a_clock_that_was_set_back_after_others_came_is_noticed(client: Any) -> None:
    class Wire:
        def run(self, script: Any, keys: Any, arguments: Any) -> Any:
            return client.eval(script.text, len(keys), *keys, *arguments)

        def fields(self, key: str) -> Any:
            return client.hgetall(key).items()

    namespace = f"clock-{next(_names)}"
    first = Sharing(namespace, "first", max_clients=1000)
    first.charge('["a"]', 100)
    first.exchange(Wire(), 0.0, 0.0)
    client.hset(f"mope:{{{namespace}}}:totals", "seen", f"{time.time() + 3600:.6f}")  # when the last one came
    late = Sharing(namespace, "late", max_clients=1000)
    late.exchange(Wire(), 0.0, 5.0)  # by the clock alone, older than the namespace
    assert late.received == {}
