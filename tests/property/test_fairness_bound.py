"""What the ledger's docstring claims, on random workloads: the bound, no credit for absence, no starvation."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.fairness.charges import UNIT
from tests.engine_model import Arrival, Engine, leaf, policy, workload

COUNTERS = ("vtc-predicted", "equinox")


class BoundWatch:
    """Checks counter(f) - counter(g) <= H + 2 E for all f and g, as long as g waits since f was admitted.

    H and E are those seen until then: the claim holds with the largest admission and error so far.
    """

    def __init__(self) -> None:
        self.together: set[tuple[str, str]] = set()
        self.largest_charge = 0
        self.largest_error = 0
        self.num_checked = 0
        self.closest = Fraction(0)
        self.num_admitted = 0

    def __call__(self, engine: Engine) -> None:
        books = engine.policy.ledger
        waiting = {account.name: account for account in books.clients() if account.since is not None}
        self.together = {pair for pair in self.together if pair[1] in waiting}
        if len(engine.admitted) > self.num_admitted:
            self.num_admitted = len(engine.admitted)
            ticket = engine.policy.find(engine.admitted[-1])
            self.together |= {(ticket.account.name, other) for other in waiting if other != ticket.account.name}
            self.largest_charge = max(self.largest_charge, ticket.account.share(ticket.charge.hf) + 1)
        errors: dict[str, int] = {}
        for name in engine.running:
            ticket, arrival = engine.policy.find(name), engine.arrivals[name]
            true = engine.policy.estimator.price(arrival.prompt_tokens, float(arrival.length))
            wrong = ticket.account.share(abs(true.hf - ticket.charge.hf)) + 1
            errors[ticket.account.name] = errors.get(ticket.account.name, 0) + wrong
        self.largest_error = max([self.largest_error, *errors.values()])
        bound = self.largest_charge + 2 * self.largest_error
        for one, other in self.together:
            apart = books.find((one,)).counter - waiting[other].counter
            assert apart <= bound, (one, other, apart / UNIT, bound / UNIT)
            self.num_checked += 1
            self.closest = max(self.closest, Fraction(apart, bound))


@pytest.mark.parametrize("name", COUNTERS)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_clients=st.integers(2, 6),
    slots=st.integers(1, 12),
    error=st.sampled_from([0.0, 0.5, 3.0]),
    heavy=st.sampled_from([0.25, 1, 3.5]),
)
def test_counters_of_those_who_wait_together_stay_within_the_bound(name, seed, num_clients, slots, error, heavy):
    watch = BoundWatch()
    clients = [f"c{number}" for number in range(num_clients)]
    engine = Engine(policy(name, weights={"c0": heavy}), slots, watch=watch)
    engine.run(workload(seed, clients, 120, error=error))
    assert watch.num_checked > 0


def test_the_bound_is_no_idle_talk():
    """Somebody comes near it, so a bound of half the size would be wrong."""
    closest = Fraction(0)
    for seed in range(20):
        watch = BoundWatch()
        Engine(policy("vtc-predicted"), 2, watch=watch).run(workload(seed, ["a", "b", "c"], 120, error=0.0))
        closest = max(closest, watch.closest)
    assert closest > Fraction(1, 2)


def test_arrival_order_breaks_the_bound():
    watch = BoundWatch()
    flood = [Arrival(0, "flood", 10, 20, 20)] * 40 + [Arrival(1, "light", 10, 20, 20)] * 20
    with pytest.raises(AssertionError):
        Engine(policy("fcfs"), 2, watch=watch).run(flood)


@pytest.mark.parametrize("name", ["vtc", *COUNTERS])
@settings(max_examples=30)
@given(alone=st.integers(1, 200), share=st.integers(1, 4))
def test_time_away_is_no_credit(name, alone, share):
    """Whoever comes back after `alone` requests of another gets every second turn, not all of them."""
    queue = policy(name)
    queue.enqueue("first", "absent", 10, 10)
    queue.admit()
    queue.finish("first", 10)
    for number in range(alone + 40):
        queue.enqueue(f"b{number}", "busy", 10, 10)
    for _ in range(alone):
        queue.finish(queue.admit().request_id, 10)
    for number in range(40):
        queue.enqueue(f"a{number}", "absent", 10, 10)
    turns = []
    for _ in range(20 * share):
        ticket = queue.admit()
        turns.append(leaf(ticket.account))
        queue.finish(ticket.request_id, 10)
    assert abs(turns.count("absent") - turns.count("busy")) <= 1


@pytest.mark.parametrize("name", ["fcfs", "vtc", *COUNTERS, "holistic", "shortest-predicted", "deficit-round-robin"])
@settings(max_examples=30)
@given(long=st.integers(1, 3000), others=st.integers(1, 8))
def test_nobody_starves(name, long, others):
    """A long request is admitted though others never cease to send short ones."""
    queue = policy(name, ageing=2.0, quantum=512)
    for number in range(others):
        queue.enqueue(f"before-{number}", f"c{number}", 5, 5)
    queue.enqueue("victim", "victim", 5, long)
    limit = long + 20 * others + 20  # ageing: 2 tokens for each; the others: a few rounds
    for number in range(limit):
        queue.enqueue(f"new-{number}", f"c{number % others}", 5, 5)
        ticket = queue.admit()
        if ticket.request_id == "victim":
            return
        queue.finish(ticket.request_id, 5)
    pytest.fail(f"not admitted within {limit} admissions")


def test_without_ageing_a_long_request_starves():
    queue = policy("shortest-predicted", ageing=0)
    queue.enqueue("victim", "victim", 5, 500)
    for number in range(2000):
        queue.enqueue(f"new-{number}", "c", 5, 5)
        assert queue.admit().request_id != "victim"


@settings(max_examples=30)
@given(num_users=st.integers(2, 60), name=st.sampled_from(["vtc", *COUNTERS, "deficit-round-robin"]))
def test_inventing_users_gains_a_tenant_nothing(num_users, name):
    queue = policy(name, quantum=30)
    for number in range(600):
        queue.enqueue(f"many-{number}", f"many/user{number % num_users}", 10, 10)
        queue.enqueue(f"one-{number}", "one/user", 10, 10)
    turns = []
    for _ in range(300):
        ticket = queue.admit()
        turns.append(ticket.account.path[0])
        queue.finish(ticket.request_id, 10)
    assert abs(turns.count("many") - turns.count("one")) <= 3  # so many requests are a turn


@pytest.mark.parametrize("name", ["vtc", "vtc-predicted", "equinox", "holistic", "deficit-round-robin"])
def test_who_comes_to_a_crowd_of_one_tenant_does_not_wait_for_each_of_it(name):
    queue = policy(name, quantum=30)
    for number in range(2000):
        queue.enqueue(f"many-{number}", f"many/user{number % 1000}", 10, 10)
    for _ in range(50):
        queue.finish(queue.admit().request_id, 10)
    queue.enqueue("new", "one/user", 10, 10)
    assert "new" in [queue.admit().request_id for _ in range(4)]


@pytest.mark.parametrize("name", ["vtc", "vtc-predicted", "equinox", "holistic", "deficit-round-robin"])
def test_a_client_that_turns_out_to_be_a_group_shares_what_it_had(name):
    queue = policy(name, quantum=30)
    for number in range(300):
        for client in ("team", "one"):
            queue.enqueue(f"{client}-{number}", client, 10, 10)
    queue.finish(queue.admit().request_id, 10)
    for number in range(300):
        queue.enqueue(f"user-{number}", "team/user", 10, 10)
    turns = []
    for _ in range(240):
        ticket = queue.admit()
        turns.append(ticket.account.path)
        queue.finish(ticket.request_id, 10)
    shares = [turns.count(path) for path in (("one",), ("team", ""), ("team", "user"))]
    assert shares == pytest.approx([120, 60, 60], abs=4)


@pytest.mark.parametrize("name", ["vtc", "vtc-predicted", "equinox", "holistic", "deficit-round-robin"])
def test_shares_follow_weights(name):
    queue = policy(name, weights={"gold": 3, "lead/miner": 0.5}, quantum=40)
    for number in range(3000):
        for client in ("gold", "plain", "lead/miner", "lead/smith"):
            queue.enqueue(f"{client}-{number}", client, 10, 10)
    turns = []
    for _ in range(1000):
        ticket = queue.admit()
        turns.append(leaf(ticket.account))
        queue.finish(ticket.request_id, 10)
    got = {client: turns.count(client) / 1000 for client in set(turns)}
    assert got["gold"] == pytest.approx(0.6, abs=0.02)
    assert got["plain"] == pytest.approx(0.2, abs=0.02)
    assert got["lead/miner"] + got["lead/smith"] == pytest.approx(0.2, abs=0.03)
    assert got["lead/miner"] / got["lead/smith"] == pytest.approx(0.5, abs=0.06)
