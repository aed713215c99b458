"""What every store promises, whether it shares within a process or through a real Redis server."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from real_redis import RealRedis, needs_redis

from mope.errors import ConfigError, MissingExtraError, StoreError
from mope.fairness.charges import NOTHING, Charge
from mope.fairness.clients import Path, client_path
from mope.fairness.ledger import Ledger
from mope.fairness.stores import (
    FORGOTTEN,
    MemoryHub,
    MemoryStore,
    Store,
    StoreConfig,
    charges_of,
    field_of,
    open_store,
    path_of,
)

_namespaces = itertools.count()
NAMES = st.text(max_size=5) | st.sampled_from(["", "a/b", "ä€🙂", "\ud800", '"', "[", "x" * 256, "(forgotten)"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(client_path)


class Replicas:
    """Some replicas, each with its ledger and its store."""

    def __init__(self, stores: list[Store], weights: dict[str, float] | None = None) -> None:
        self.stores = stores
        self.ledgers = [Ledger(weights=weights) for _ in stores]
        self.charged: list[Counter[Path]] = [Counter() for _ in stores]
        self._requests = itertools.count()
        for number, store in enumerate(stores):
            self.exchange(number)
            assert store.flush(20)  # what others charge counts from here on

    def exchange(self, number: int) -> None:
        self.stores[number].exchange(self.ledgers[number])

    def charge(self, number: int, path: Path, predicted: int, actual: int | None = None) -> None:
        """One request, charged as predicted and corrected; open with None."""
        ledger, name = self.ledgers[number], f"r{next(self._requests)}"
        ledger.open(name, ledger.account(path), Charge(0, 0, 0, predicted))
        if actual is not None:
            ledger.adjust(name, Charge(0, 0, 0, (predicted + actual) // 2))
            ledger.close(name, Charge(0, 0, 0, actual))
        self.charged[number][path] += predicted if actual is None else actual

    def settle(self) -> None:
        for _ in range(2):
            for number, store in enumerate(self.stores):
                self.exchange(number)
                assert store.flush(20)
        for number, store in enumerate(self.stores):
            self.exchange(number)
            while store.stats().num_unapplied:
                assert store.flush(20)
                self.exchange(number)

    def all_charged(self) -> dict[Path, int]:
        sums: Counter[Path] = Counter()
        for charged in self.charged:
            sums.update(charged)
        return nonzero(sums)

    def counters(self, number: int) -> dict[Path, int]:
        """Counters of clients, as far as charges go: nobody waits in these tests, so nobody is lifted."""
        return nonzero({account.path: account.counter for account in self.ledgers[number].clients()})

    def groups(self, number: int) -> dict[Path, int]:
        """Counters of the outermost groups, and of clients in none."""
        return nonzero(
            {(name,): account.counter for name, account in (self.ledgers[number].root.children or {}).items()}
        )

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self.stores:
            store.close()


def nonzero(amounts: dict[Path, int]) -> dict[Path, int]:
    return {path: amount for path, amount in amounts.items() if amount}


Maker = Callable[[int], list[Store]]


@pytest.fixture(scope="module")
def real_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    server = RealRedis(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)], scope="module")
def make(request: pytest.FixtureRequest) -> Maker:
    """Makes stores that share with each other and with no others."""
    if request.param == "memory":

        def in_memory(number: int) -> list[Store]:
            hub = MemoryHub()
            return [MemoryStore(hub) for _ in range(number)]

        return in_memory
    url = request.getfixturevalue("real_redis").url

    def in_redis(number: int) -> list[Store]:
        config = StoreConfig(url=url, namespace=f"n{next(_namespaces)}", interval_s=0.002)
        return [open_store(config) for _ in range(number)]

    return in_redis


@settings(max_examples=30)
@given(
    history=st.lists(
        st.tuples(
            st.just("charge"), st.integers(0, 2), PATHS, st.integers(0, 10**15), st.none() | st.integers(0, 10**15)
        )
        | st.tuples(st.just("exchange"), st.integers(0, 2)),
        max_size=40,
    )
)
def test_after_any_charges_and_exchanges_all_ledgers_agree(make: Maker, history: list[tuple[Any, ...]]) -> None:
    with Replicas(make(3)) as replicas:
        for step in history:
            match step:
                case ("charge", number, path, predicted, actual):
                    replicas.charge(number, path, predicted, actual)
                case ("exchange", number):
                    replicas.exchange(number)
        replicas.settle()
        expected = replicas.all_charged()
        outermost: Counter[Path] = Counter()
        for path, amount in expected.items():
            outermost[path[:1]] += amount
        for number in range(3):
            assert replicas.groups(number) == nonzero(outermost)
        assert nonzero(replicas.stores[0].totals()) == expected


@settings(max_examples=20)
@given(
    charges=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1000), st.integers(0, 1000)), max_size=30),
    weight=st.sampled_from([0.3, 1.0, 2.0, 7.0]),
)
def test_a_weighted_counter_is_right_to_a_millionth_per_exchange(
    make: Maker, charges: list[tuple[int, int, int]], weight: float
) -> None:
    with Replicas(make(2), weights={"acme": weight}) as replicas:
        for number, predicted, actual in charges:
            replicas.charge(number, ("acme",), predicted, actual)
            replicas.exchange(number)
        replicas.settle()
        total = replicas.all_charged().get(("acme",), 0)
        for ledger in replicas.ledgers:
            account = ledger.find(("acme",))
            if account is not None:
                assert abs(account.counter - total / weight) <= 2 * len(charges) + 1


def test_a_replica_counts_what_others_charge_once_and_books_only_its_own(make: Maker) -> None:
    with Replicas(make(2)) as replicas:
        replicas.charge(0, ("acme", "alice"), 700, 500)
        replicas.charge(1, ("acme", "alice"), 40)
        replicas.settle()
        replicas.settle()
        first, second = (ledger.find(("acme",)) for ledger in replicas.ledgers)
        assert first is not None
        assert second is not None
        assert (first.counter, second.counter) == (540, 540)
        assert (first.charged.hf, second.charged.hf) == (500, 40)
        assert replicas.ledgers[0].total.hf == 500


CLIENTS = st.tuples(st.sampled_from(["acme", "umbrella"]), st.sampled_from(["alice", "bob", "ä"]))


@settings(max_examples=30)
@given(charges=st.lists(st.tuples(st.integers(0, 1), CLIENTS, st.integers(0, 10**15)), max_size=40))
def test_users_within_groups_have_the_same_counters_everywhere(
    make: Maker, charges: list[tuple[int, Path, int]]
) -> None:
    with Replicas(make(2)) as replicas:
        for number, path, amount in charges:
            replicas.charge(number, path, amount)
            replicas.exchange(number)
        replicas.settle()
        for number in range(2):
            assert replicas.counters(number) == replicas.all_charged()


def test_a_client_that_is_a_group_elsewhere_is_the_same_client(make: Maker) -> None:
    with Replicas(make(2)) as replicas:
        replicas.charge(0, ("acme",), 10, 10)
        replicas.charge(1, ("acme", "alice"), 5, 5)
        replicas.charge(1, ("acme",), 1, 1)
        replicas.settle()
        replicas.charge(0, ("acme",), 100, 100)
        replicas.settle()
        for number in range(2):
            assert replicas.groups(number) == {("acme",): 116}
        assert replicas.stores[0].totals() == {("acme",): 111, ("acme", "alice"): 5}


def test_a_refund_takes_back_what_was_told(make: Maker) -> None:
    with Replicas(make(2)) as replicas:
        ledger = replicas.ledgers[0]
        ledger.open("r", ledger.account(("alice",)), Charge(1, 1, 1, 1000))
        replicas.settle()
        assert replicas.counters(1) == {("alice",): 1000}
        ledger.close("r", NOTHING)
        replicas.settle()
        assert replicas.counters(1) == {}
        assert nonzero(replicas.stores[1].totals()) == {}


def test_a_client_that_the_ledger_forgets_keeps_its_total(make: Maker) -> None:
    stores = make(2)
    with Replicas(stores) as replicas:
        replicas.ledgers[0] = Ledger(idle_clients=1, max_clients=3)
        replicas.exchange(0)
        for round_number in range(3):
            for name in "abcdefgh":
                replicas.charge(0, (name,), 10 + round_number, 5 + round_number)
        assert replicas.ledgers[0].num_forgotten > 10
        replicas.settle()
        assert nonzero(stores[1].totals()) == {(name,): 18 for name in "abcdefgh"}
        assert replicas.counters(1) == {(name,): 18 for name in "abcdefgh"}
        assert replicas.ledgers[0].num_accounts <= 4


def test_what_others_charge_does_not_fill_the_ledger_without_bound(make: Maker) -> None:
    with Replicas(make(2)) as replicas:
        replicas.ledgers[1] = Ledger(idle_clients=5, max_clients=20)
        for number in range(300):
            replicas.charge(0, (f"group{number % 40}", f"c{number}"), 1, 1)
            replicas.exchange(0)
        replicas.settle()
        assert replicas.ledgers[1].num_accounts <= 30


def test_what_was_charged_before_a_replica_came_is_not_counted_there(make: Maker) -> None:
    stores = make(1)
    with Replicas(stores) as replicas:
        replicas.charge(0, ("old",), 1000, 1000)
        replicas.settle()
        if isinstance(stores[0], MemoryStore):
            late: Store = MemoryStore(stores[0]._hub)
        else:
            late = open_store(stores[0].config)  # type: ignore[attr-defined]
        replicas.stores.append(late)
        replicas.ledgers.append(Ledger())
        replicas.charged.append(Counter())
        replicas.settle()
        replicas.charge(0, ("old",), 1, 1)
        replicas.charge(1, ("new",), 2, 2)
        replicas.settle()
        assert replicas.counters(1) == {("old",): 1, ("new",): 2}
        assert replicas.counters(0) == {("old",): 1001, ("new",): 2}


def test_a_closed_store_lets_the_scheduler_go_on(make: Maker) -> None:
    with Replicas(make(2)) as replicas:
        replicas.charge(0, ("a",), 5, 5)
        replicas.exchange(0)
        assert replicas.stores[0].close(20)
        assert replicas.stores[0].close()
        assert not replicas.stores[0].flush(0.1)
        replicas.charge(0, ("a",), 7, 7)
        replicas.exchange(0)
        replicas.stores[1].flush(20)
        replicas.stores[1].flush(20)
        replicas.exchange(1)
        assert replicas.counters(1) == {("a",): 5}


def test_a_store_is_closed_by_with(make: Maker) -> None:
    (store,) = make(1)
    with store as opened:
        assert opened.flush(20)
    assert not store.flush(0.1)


def test_a_path_that_cannot_be_counted_does_not_stop_the_scheduler(
    make: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Replicas(make(2)) as replicas:
        replicas.charge(0, ("a",), 5, 5)
        replicas.exchange(0)
        replicas.stores[0].flush(20)
        replicas.stores[1].flush(20)

        def refuse(path: Path, hf: int) -> None:
            raise ConfigError("the root is a group already")

        monkeypatch.setattr(replicas.ledgers[1], "add_elsewhere", refuse)
        replicas.exchange(1)
        assert replicas.stores[1].stats().num_refused == 1
        assert "can't be counted" in caplog.text


# -- within a process


def test_alone_is_the_default() -> None:
    store = open_store()
    assert isinstance(store, MemoryStore)
    ledger = Ledger()
    store.exchange(ledger)
    ledger.open("r", ledger.account(("a",)), Charge(1, 1, 1, 9))
    store.exchange(ledger)
    assert store.totals() == {("a",): 9}
    assert store.stats().kind == "memory"


def test_a_hub_lists_the_clients_that_were_charged_last_and_keeps_the_sum() -> None:
    hub = MemoryHub(max_clients=2)
    box = hub.join()
    hub.tell(box, {("a",): 1, ("b",): 2})
    hub.tell(box, {("a",): 10, ("c",): 4})
    assert hub.totals() == {("a",): 11, ("c",): 4, FORGOTTEN: 2}


# -- what stores and ledgers tell each other


def test_a_ledger_names_whom_it_charged_even_if_it_forgot_them() -> None:
    ledger = Ledger(idle_clients=0, max_clients=1)
    ledger.follow_touched = True
    for name in "abc":
        ledger.open(name, ledger.account((name,)), Charge(0, 0, 0, 10))
        ledger.close(name, Charge(0, 0, 0, 7))
    assert ledger.find(("a",)) is None
    assert charges_of(ledger.take_touched()) == {("a",): 7, ("b",): 7, ("c",): 7}
    assert ledger.take_touched() == {}


def test_a_ledger_that_is_restored_still_tells_what_it_charged_before() -> None:
    ledger = Ledger()
    ledger.follow_touched = True
    ledger.open("r", ledger.account(("a",)), Charge(0, 0, 0, 10))
    ledger.restore(Ledger().snapshot())
    assert charges_of(ledger.take_touched()) == {("a",): 10}


def test_charges_that_cancel_are_not_told() -> None:
    ledger = Ledger()
    ledger.follow_touched = True
    ledger.open("r", ledger.account(("a",)), Charge(0, 0, 0, 10))
    ledger.close("r", NOTHING)
    assert charges_of(ledger.take_touched()) == {}


@given(paths=st.lists(PATHS, min_size=2, max_size=2))
def test_a_field_stands_for_one_path(paths: list[Path]) -> None:
    fields = [field_of(path) for path in paths]
    assert (fields[0] == fields[1]) == (paths[0] == paths[1])
    assert [path_of(field) for field in fields] == paths
    assert all(field.isascii() and field.startswith("[") for field in fields)


@pytest.mark.parametrize("field", ["", "[", "[]", "[1]", '"a"', '{"a": 1}', "null"])
def test_what_is_no_path_is_an_error(field: str) -> None:
    with pytest.raises(ConfigError, match="client's path"):
        path_of(field)


# -- options


def test_a_store_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtraError, match=r"pip install 'mope-llm\[redis\]'"):
        open_store(StoreConfig(url="redis://localhost/0"))


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "", "Memory"])
def test_an_unknown_kind_of_url_is_an_error_that_names_the_known_ones(url: str) -> None:
    with pytest.raises(ValidationError, match="redis://HOST:PORT/DB"):
        StoreConfig(url=url)


@pytest.mark.parametrize(
    "options",
    [
        {"namespace": "a{b}"},
        {"namespace": ""},
        {"replica": "a b"},
        {"interval_s": 0},
        {"timeout_s": 0},
        {"max_clients": 0},
    ],
)
def test_unusable_options_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        StoreConfig(**options)


def test_a_config_keeps_its_password_to_itself_and_survives_a_dump() -> None:
    config = StoreConfig(url="redis://user:secret@localhost/0", interval_s=0.5)
    assert "secret" not in repr(config)
    assert StoreConfig.model_validate_json(config.model_dump_json()) == config


def test_every_option_has_a_help_text() -> None:
    assert [name for name, field in StoreConfig.model_fields.items() if not field.description] == []


def test_a_store_error_is_a_connection_error() -> None:
    assert issubclass(StoreError, ConnectionError)
