"""Start-time fair queueing: shares by weight, no credit for idling, bounded memory."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.serving_hooks.start_time import MAX_TAG, UNIT, StartTimeTags


def tags(weights: dict[str, float] | None = None, max_clients: int = 1000) -> StartTimeTags:
    return StartTimeTags(weights or {}, max_clients)


def served(made: StartTimeTags, arrivals: list[tuple[str, float]], budget: float) -> Counter[str]:
    """Work of each client, when a server takes the smallest tags first until its budget is spent."""
    waiting = [(*made.arrive(client, cost)[:1], number, client, cost) for number, (client, cost) in enumerate(arrivals)]
    heapq.heapify(waiting)
    work: Counter[str] = Counter()
    while waiting and sum(work.values()) < budget:
        start, _, client, cost = heapq.heappop(waiting)
        made.began(start)
        work[client] += int(cost)
    return work


def test_the_recurrence() -> None:
    made = tags({"b": 2})
    assert made.arrive("a", 10) == (0, 10 * UNIT + 1)
    assert made.arrive("a", 10)[0] == 10 * UNIT + 1
    assert made.arrive("b", 10) == (0, 5 * UNIT + 1)
    assert made.arrive("b", 10)[0] == 5 * UNIT + 1
    made.began(7 * UNIT)
    made.began(3 * UNIT)  # virtual time never goes back
    assert made.virtual_time == 7 * UNIT
    assert made.arrive("c", 1)[0] == 7 * UNIT
    assert made.arrive("b", 1)[0] == 10 * UNIT + 2


def test_a_flood_does_not_hold_back_who_comes_later() -> None:
    work = served(tags(), [("flood", 100)] * 200 + [("light", 100)] * 10, budget=2100)
    assert work["light"] == 1000


@given(
    weight=st.floats(0.1, 10),
    costs=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), min_size=400, max_size=600),
)
def test_shares_follow_weights_while_both_wait(weight: float, costs: list[tuple[str, int]]) -> None:
    """Work over weight of two clients that both wait differs by no more than a largest request of each (theorem 1)."""
    made = tags({"b": weight})
    work: Counter[str] = Counter()
    waiting = [(made.arrive(client, cost)[0], number, client, cost) for number, (client, cost) in enumerate(costs)]
    left = Counter(client for client, _ in costs)
    heapq.heapify(waiting)
    while min(left["a"], left["b"]) > 0:
        start, _, client, cost = heapq.heappop(waiting)
        made.began(start)
        left[client] -= 1
        work[client] += cost
        rounding = 2 * len(costs) / UNIT
        assert abs(work["a"] - work["b"] / weight) <= 50 + 50 / weight + rounding


def test_idling_gains_nothing() -> None:
    made = tags()
    made.arrive("busy", 1000)
    made.began(made.arrive("busy", 1000)[0])
    late = made.arrive("idle", 10)[0]
    assert late == made.virtual_time > 0


def test_what_was_refused_is_given_back() -> None:
    made = tags()
    first, length = made.arrive("a", 100)
    made.refused("a", length)
    made.refused("nobody", 5)
    assert made.arrive("a", 100)[0] == first
    made.began(10**9)
    made.refused("a", length)
    assert made.arrive("a", 1)[0] == 10**9


def test_groups_multiply_the_weights_of_their_users() -> None:
    made = tags({"acme": 2, "acme/alice": 5})
    assert made.arrive("acme/alice", 100)[1] == 10 * UNIT + 1
    assert made.arrive("acme/bob", 100)[1] == 50 * UNIT + 1


@given(st.lists(st.tuples(st.integers(0, 300), st.floats(0, 1e30), st.booleans()), max_size=300), st.integers(1, 40))
def test_memory_is_bounded_and_tags_fit_into_64_bits(arrivals: list[tuple[int, float, bool]], most: int) -> None:
    made = tags(max_clients=most)
    for client, cost, begins in arrivals:
        start, length = made.arrive(str(client), cost)
        assert 0 <= start <= MAX_TAG < 2**63
        assert length > 0
        if begins:
            made.began(start)
        assert len(made) <= most + 1


def test_forgetting_changes_no_tag_of_who_has_been_passed() -> None:
    few, many = tags(max_clients=10), tags(max_clients=100_000)
    for number in range(5000):
        client = f"client {number % 50 if number % 3 else number}"
        one, other = few.arrive(client, 1)[0], many.arrive(client, 1)[0]
        assert one == other
        few.began(one + 2 * UNIT)  # everybody is passed at once
        many.began(one + 2 * UNIT)
    assert len(few) <= 11
    assert len(many) <= 2048


@pytest.mark.parametrize("cost", [0.0, 1e-9])
def test_what_costs_nothing_still_moves_on(cost: float) -> None:
    made = tags()
    assert made.arrive("a", cost)[0] < made.arrive("a", cost)[0]
