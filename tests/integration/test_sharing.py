"""The protocol between replicas and a real Redis server, when commands, replies and the server's memory get lost.

Replicas are driven by hand here, without threads, so that each history can be repeated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_redis import RealRedis, needs_redis

from mope.fairness.redis_scripts import TELL, Script
from mope.fairness.sharing import BATCH, FORGOTTEN_FIELD, LIMIT, Sharing

pytestmark = needs_redis
_namespaces = itertools.count()


class Lost(ConnectionError):
    """A command or its reply did not come through."""


class Wire:
    """A connection that loses, repeats and delays what it is told to."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.faults: list[str] = []
        self.late: list[tuple[Script, tuple[str, ...], tuple[str | int, ...]]] = []
        self.num_calls = 0

    def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        self.num_calls += 1
        fault = self.faults.pop(0) if self.faults else "none"
        if fault == "command lost":
            raise Lost
        if fault == "command late":
            self.late.append((script, tuple(keys), tuple(arguments)))
            raise Lost
        if fault == "late ones first":
            self.deliver()
        reply = self.client.eval(script.text, len(keys), *keys, *arguments)
        if fault == "reply lost":
            raise Lost
        if fault == "repeated":
            reply = self.client.eval(script.text, len(keys), *keys, *arguments)
        return reply

    def deliver(self) -> None:
        """What was delayed arrives now, after all that was sent since."""
        late, self.late = self.late, []
        for script, keys, arguments in late:
            self.client.eval(script.text, len(keys), *keys, *arguments)

    def fields(self, key: str) -> Iterable[tuple[bytes, bytes]]:
        found: Iterable[tuple[bytes, bytes]] = self.client.hgetall(key).items()
        return found


class World:
    """Some replicas of one namespace, what they charged, and what they counted of others."""

    def __init__(self, client: Any, num_replicas: int, max_clients: int = 1000) -> None:
        self.client = client
        self.namespace = f"world-{next(_namespaces)}"
        self.wires = [Wire(client) for _ in range(num_replicas)]
        self.replicas = [
            Sharing(self.namespace, f"r{number}", max_clients=max_clients) for number in range(num_replicas)
        ]
        self.charged: list[Counter[str]] = [Counter() for _ in self.replicas]
        self.counted: list[Counter[str]] = [Counter() for _ in self.replicas]
        self.image: dict[bytes, bytes] = {}

    def charge(self, number: int, field: str, amount: int) -> None:
        self.replicas[number].charge(field, amount)
        self.charged[number][field] += amount

    def exchange(self, number: int, faults: Sequence[str] = ()) -> bool:
        replica, wire = self.replicas[number], self.wires[number]
        wire.faults = list(faults)
        try:
            replica.exchange(wire, 0.0, 1e9)  # older than any namespace: everything counts
        except Lost:
            replica.disconnected()
            return False
        finally:
            for field, amount in replica.received.items():
                self.counted[number][field] += amount
            replica.received.clear()
        return True

    def settle(self) -> None:
        for wire in self.wires:
            wire.deliver()
        for number in [*range(len(self.replicas))] * 2:
            self.replicas[number].disconnected()
            assert self.exchange(number)

    def stored(self) -> list[bytes]:
        found: list[bytes] = list(self.client.scan_iter(f"mope:{{{self.namespace}}}:*"))
        return found

    def keep(self) -> None:
        self.image = {key: self.client.dump(key) for key in self.stored()}

    def go_back(self) -> None:
        """The server is started again with the state that it had when `keep` was called."""
        for key in self.stored():
            self.client.delete(key)
        for key, value in self.image.items():
            self.client.restore(key, 0, value)

    def totals(self) -> dict[str, int]:
        return {field: total for field, total in self.replicas[0].totals(self.wires[0]).items() if total}

    def all_charged(self) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for charged in self.charged:
            for field, amount in charged.items():
                sums[field] += amount
        return {field: total for field, total in sums.items() if total}

    def charged_by_others(self, number: int) -> dict[str, int]:
        mine, everything = self.charged[number], self.all_charged()
        fields = {*mine, *everything}
        return {field: rest for field in fields if (rest := everything.get(field, 0) - mine[field])}


def nonzero(counter: Counter[str]) -> dict[str, int]:
    return {field: amount for field, amount in counter.items() if amount}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import redis

    server = RealRedis(tmp_path_factory.mktemp("redis")).start()
    connection = redis.Redis.from_url(server.url, protocol=2)
    yield connection
    connection.close()
    server.kill()


FAULTS = st.lists(
    st.sampled_from(["none", "none", "command lost", "command late", "late ones first", "reply lost", "repeated"]),
    max_size=4,
)
FIELDS = st.sampled_from([f'["c{number}"]' for number in range(6)])
REPLICAS = st.integers(0, 2)
AMOUNTS = st.integers(-(10**12), 10**15) | st.integers(-5, 5) | st.just(2**53 + 1)
CHARGES = st.tuples(st.just("charge"), REPLICAS, FIELDS, AMOUNTS)
EXCHANGES = st.tuples(st.just("exchange"), REPLICAS, FAULTS)
LATE = st.tuples(st.just("deliver"), REPLICAS)
LOSSES = st.tuples(st.sampled_from(["keep", "go back", "go back", "lose all", "lose totals"]))


def play(world: World, history: list[tuple[Any, ...]]) -> None:
    for step in history:
        match step:
            case ("charge", number, field, amount):
                world.charge(number, field, amount)
            case ("exchange", number, faults):
                world.exchange(number, faults)
            case ("deliver", number):
                world.wires[number].deliver()
            case ("keep",):
                world.keep()
            case ("go back",):
                world.go_back()
            case ("lose all",):
                world.image = {}
                world.go_back()
            case ("lose totals",):
                world.client.delete(f"mope:{{{world.namespace}}}:totals")
            case ("expire", number):
                world.client.delete(f"mope:{{{world.namespace}}}:told:{world.replicas[number].replica}")
    world.settle()


@settings(max_examples=100)
@given(history=st.lists(CHARGES | EXCHANGES | LATE, min_size=20, max_size=60))
def test_each_charge_counts_once_whatever_is_lost_repeated_or_late(client: Any, history: list[tuple[Any, ...]]) -> None:
    world = World(client, 3)
    play(world, history)
    assert world.totals() == world.all_charged()
    for number in range(3):
        assert nonzero(world.counted[number]) == world.charged_by_others(number)


@settings(max_examples=60)
@given(history=st.lists(CHARGES | EXCHANGES | LATE | LOSSES, min_size=20, max_size=60))
def test_totals_are_exact_again_after_the_server_lost_some_or_all(client: Any, history: list[tuple[Any, ...]]) -> None:
    world = World(client, 3)
    play(world, history)
    assert world.totals() == world.all_charged()
    for number in range(3):
        assert nonzero(world.counted[number]) == world.charged_by_others(number)


@settings(max_examples=50)
@given(history=st.lists(CHARGES | EXCHANGES | LATE, min_size=20, max_size=60))
def test_whom_the_server_does_not_list_any_more_stays_in_the_sum(client: Any, history: list[tuple[Any, ...]]) -> None:
    world = World(client, 3, max_clients=2)
    play(world, history)
    assert sum(world.totals().values()) == sum(world.all_charged().values())
    assert len([field for field in world.totals() if field != FORGOTTEN_FIELD]) <= 2
    for replica in world.replicas:
        assert replica.num_clients <= 4


@settings(max_examples=25)
@given(history=st.lists(CHARGES | EXCHANGES | LATE | LOSSES, min_size=20, max_size=80))
def test_the_sum_survives_a_loss_when_clients_were_forgotten(client: Any, history: list[tuple[Any, ...]]) -> None:
    world = World(client, 3, max_clients=2)
    play(world, history)
    assert sum(world.totals().values()) == sum(world.all_charged().values())


@settings(max_examples=100)
@given(history=st.lists(CHARGES | EXCHANGES | st.tuples(st.just("expire"), REPLICAS), min_size=20, max_size=60))
def test_a_replica_whose_part_has_expired_tells_nothing_twice(client: Any, history: list[tuple[Any, ...]]) -> None:
    world = World(client, 3)
    play(world, history)
    assert world.totals() == world.all_charged()
    for number in range(3):
        assert nonzero(world.counted[number]) == world.charged_by_others(number)


@settings(max_examples=50)
@given(
    charges=st.lists(st.tuples(REPLICAS, FIELDS, st.integers(1, 10**15)), max_size=40),
    readers=st.lists(st.sets(REPLICAS), min_size=40, max_size=40),
)
def test_clients_that_come_and_go_are_counted_once(
    client: Any, charges: list[tuple[int, str, int]], readers: list[set[int]]
) -> None:
    prompt, patchy = World(client, 3, max_clients=2), World(client, 3, max_clients=2)
    for step, (number, field, amount) in enumerate(charges):
        for world in (prompt, patchy):
            world.charge(number, field, amount)
        for other in (number, 0, 1, 2):
            prompt.exchange(other)
        for other in sorted(readers[step]):
            patchy.exchange(other)
    for world in (prompt, patchy):
        world.settle()
    for number in range(3):
        assert nonzero(prompt.counted[number]) == prompt.charged_by_others(number)
        # one who reads too late what is not listed any more misses it, and never counts too much
        others = patchy.charged_by_others(number)
        assert all(0 <= amount <= others.get(field, 0) for field, amount in patchy.counted[number].items())


def exchange_all(world: World) -> None:
    for number in [*range(len(world.replicas))] * 2:
        assert world.exchange(number)


def test_thousands_of_clients_go_in_batches_and_pages(client: Any) -> None:
    world = World(client, 2, max_clients=10_000)
    for number in range(3 * BATCH + 7):
        world.charge(0, f'["c{number}"]', number + 1)
    exchange_all(world)
    assert world.totals() == world.all_charged()
    assert nonzero(world.counted[1]) == world.charged_by_others(1)
    assert world.wires[0].num_calls <= 12
    world.image = {}
    world.go_back()
    exchange_all(world)
    assert world.totals() == world.all_charged()
    assert world.replicas[0].num_restored == 1


def test_a_quiet_replica_sends_one_command(client: Any) -> None:
    world = World(client, 1)
    world.exchange(0)
    before = world.wires[0].num_calls
    world.exchange(0)
    assert world.wires[0].num_calls == before + 1


def test_totals_are_exact_beyond_what_a_double_holds(client: Any) -> None:
    world = World(client, 2)
    for number in range(2):
        world.charge(number, '["big"]', 2**61 + 1)
        world.charge(number, '["big"]', 2)
    exchange_all(world)
    assert world.totals() == {'["big"]': 2**62 + 6}
    assert world.counted[0]['["big"]'] == 2**61 + 3


def test_what_does_not_fit_into_64_bits_is_refused_and_counted(client: Any) -> None:
    world = World(client, 3)
    world.charge(0, '["x"]', LIMIT)
    world.replicas[0].charge('["x"]', 1)
    assert world.replicas[0].num_refused == 1
    for number in (1, 2):
        world.charge(number, '["x"]', LIMIT)
        world.charge(number, '["y"]', 5)
    exchange_all(world)
    assert world.totals() == {'["x"]': 2 * LIMIT, '["y"]': 10}
    assert sum(replica.num_refused for replica in world.replicas) == 2


def test_a_replica_that_starts_counts_from_then_on(client: Any) -> None:
    world = World(client, 1)
    world.charge(0, '["a"]', 100)
    world.exchange(0)
    late = Sharing(world.namespace, "late", max_clients=1000)
    late.charge('["a"]', 7)
    wire = Wire(client)
    late.exchange(wire, 0.0, -1.0)  # younger than the namespace
    assert late.received == {}
    world.charge(0, '["a"]', 20)
    world.exchange(0)
    late.exchange(wire, 0.0, 0.0)
    assert late.received == {'["a"]': 20}
    assert world.totals() == {'["a"]': 127}
    assert world.counted[0] == {'["a"]': 7}


def test_totals_that_fell_are_believed_once_others_had_time_to_tell_again(client: Any) -> None:
    world = World(client, 1)
    reader = Sharing(world.namespace, "reader", max_clients=1000, settle_s=10)
    wire = Wire(client)
    world.keep()
    reader.exchange(wire, 0.0, 1e9)
    world.charge(0, '["a"]', 100)
    world.charge(0, '["b"]', 50)
    world.exchange(0)
    reader.exchange(wire, 0.0, 1e9)
    assert reader.received == {'["a"]': 100, '["b"]': 50}
    world.go_back()
    reader.disconnected()
    world.charge(0, '["a"]', -1)
    reader.charge('["a"]', 3)
    reader.exchange(wire, 20.0, 1e9)  # lists itself only: the other replica has not told again
    assert reader.received == {'["a"]': 100, '["b"]': 50}
    world.exchange(0)
    reader.exchange(wire, 21.0, 1e9)
    assert reader.received == {'["a"]': 100, '["b"]': 50}
    reader.exchange(wire, 31.0, 1e9)
    assert reader.received == {'["a"]': 99, '["b"]': 50}


def test_while_the_server_is_gone_memory_is_bounded_and_the_sum_exact(client: Any) -> None:
    world = World(client, 1, max_clients=10)
    world.charge(0, '["first"]', 1)
    world.exchange(0)
    for number in range(1000):
        world.charge(0, f'["c{number}"]', 1)
    assert world.replicas[0].num_clients == 20
    world.exchange(0)
    assert sum(world.totals().values()) == 1001
    assert world.replicas[0].num_clients <= 10
    assert client.hlen(f"mope:{{{world.namespace}}}:told:{world.replicas[0].replica}") <= 10 + len(("epoch", "sum"))


def test_the_server_keeps_nothing_of_a_replica_that_said_farewell_but_its_share(client: Any) -> None:
    world = World(client, 2)
    world.charge(0, '["a"]', 5)
    world.exchange(0)
    kept = {*world.stored()}
    world.exchange(1)
    world.charge(1, '["a"]', 6)
    world.exchange(1)
    world.replicas[1].farewell(world.wires[1])
    assert {*world.stored()} == kept
    assert world.totals() == {'["a"]': 11}


def test_all_keys_lie_in_one_slot_and_what_is_kept_for_telling_again_expires(client: Any) -> None:
    world = World(client, 1)
    world.charge(0, '["a"]', 5)
    world.exchange(0)
    assert len(world.stored()) == 3
    for key in world.stored():
        assert key.partition(b"{")[2].partition(b"}")[0].decode() == world.namespace
        assert (client.ttl(key) > 0) == (b":told:" in key)


def test_a_part_is_kept_alive_by_a_replica_that_only_reads(client: Any) -> None:
    world = World(client, 1)
    world.exchange(0)
    (told,) = (key for key in world.stored() if b":told:" in key)
    client.expire(told, 1000)
    world.replicas[0].exchange(world.wires[0], 3600.0, 1e9)
    assert client.ttl(told) <= 1000
    world.replicas[0].exchange(world.wires[0], 24 * 3600.0, 1e9)
    assert client.ttl(told) > 1000


def test_a_replica_whose_part_has_expired_is_restored_as_far_as_it_began_anew(client: Any) -> None:
    world = World(client, 1)
    play_one = [(5, "expire"), (7, "none"), (1, "keep"), (2, "go back")]
    for amount, event in play_one:
        world.charge(0, '["a"]', amount)
        world.exchange(0)
        if event == "expire":
            client.delete(f"mope:{{{world.namespace}}}:told:{world.replicas[0].replica}")
        elif event == "keep":
            world.keep()
        elif event == "go back":
            world.go_back()
    world.settle()
    assert world.totals() == {'["a"]': 15}


def test_a_late_command_that_a_restored_server_takes_is_not_mistaken_for_a_later_one(client: Any) -> None:
    world = World(client, 1)
    world.charge(0, '["a"]', 5)
    assert not world.exchange(0, ["none", "command late"])
    world.keep()
    world.charge(0, '["a"]', 7)
    assert world.exchange(0)
    world.go_back()
    world.settle()
    assert world.totals() == {'["a"]': 12}


def test_a_reader_misses_nothing_that_was_told_again_under_versions_that_it_has_passed(client: Any) -> None:
    world = World(client, 3)
    world.charge(1, '["a"]', 1)
    world.exchange(1)
    world.keep()
    for _ in range(20):
        world.charge(2, '["b"]', 1)
        world.exchange(2)
    world.exchange(0)
    world.go_back()
    for replica in world.replicas:
        replica.disconnected()
    world.charge(1, '["a"]', 1)
    world.exchange(1)
    world.exchange(0)
    assert world.counted[0]['["a"]'] == 2


def test_after_a_loss_clients_of_replicas_that_are_gone_make_room(client: Any) -> None:
    world = World(client, 2, max_clients=5)
    for step in range(200):
        world.charge(1, f'["old{step % 5}"]', 1)
        world.exchange(1)
    world.exchange(0)
    world.image = {}
    world.go_back()  # and the other replica is gone, too
    for step in range(40):
        world.charge(0, f'["new{step}"]', 1)
        world.exchange(0)
    assert world.totals() == {**{f'["new{step}"]': 1 for step in range(35, 40)}, FORGOTTEN_FIELD: 35}
    assert world.replicas[0].num_clients <= 6


def test_what_was_forgotten_since_the_state_that_the_server_is_back_with_is_not_told_twice(client: Any) -> None:
    world = World(client, 1, max_clients=2)
    for names in ("ab", "cd"):
        for name in names:
            world.charge(0, f'["{name}"]', 100)
        exchange_all(world)
        if names == "ab":
            world.keep()
    assert world.totals() == {'["c"]': 100, '["d"]': 100, FORGOTTEN_FIELD: 200}
    world.go_back()
    world.settle()
    assert sum(world.totals().values()) == 400
    assert world.replicas[0].num_restored == 1


def test_a_part_that_was_refunded_takes_no_room(client: Any) -> None:
    world = World(client, 1)
    told = f"mope:{{{world.namespace}}}:told:{world.replicas[0].replica}"
    for amount, fields in ((5, 2), (-5, 1)):
        world.charge(0, '["a"]', amount)
        world.exchange(0)
        assert client.hlen(told) == fields


def test_a_server_that_keeps_nothing_is_an_error(client: Any) -> None:
    from mope.errors import StoreError

    class Forgetful(Wire):
        def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
            if script is TELL:
                client.delete(*keys)
            return super().run(script, keys, arguments)

    sharing = Sharing(f"world-{next(_namespaces)}", "r", max_clients=10)
    with pytest.raises(StoreError, match="noeviction"):
        sharing.exchange(Forgetful(client), 0.0, 0.0)
