"""Policy `holistic`: short requests go first within a client, no request is passed by more than its bound."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.errors import ConfigError
from mope.fairness import FairnessConfig, Ticket
from tests.engine_model import policy

LENGTHS = st.one_of(st.integers(1, 20), st.integers(1, 2000))
STEPS = st.lists(st.tuples(st.sampled_from("aab"), LENGTHS, st.integers(0, 2)), min_size=1, max_size=80)
PHIS = st.sampled_from([0.001, 0.03, 0.1, 0.5, 1.0])


def served(steps, phi) -> list[Ticket]:
    """Requests in the order of their admission: after each arrival up to two are admitted, then all that are left."""
    queue, order = policy("holistic", phi=phi), []
    for number, (client, tokens, admissions) in enumerate(steps):
        queue.enqueue(str(number), client, 5, tokens)
        order += [queue.admit() for _ in range(min(admissions, len(queue)))]
    return order + [queue.admit() for _ in range(len(queue))]


@settings(max_examples=200)
@given(STEPS, PHIS)
def test_later_requests_that_pass_one_cost_less_than_its_bound(steps, phi):
    order = served(steps, phi)
    for ticket in order:
        before = takewhile(lambda other: other is not ticket, order)  # noqa: B023, used at once
        passed = [one for one in before if one.account is ticket.account and one.arrival > ticket.arrival]
        assert sum(one.charge.hf for one in passed) * phi < ticket.charge.hf or not passed


@settings(max_examples=100)
@given(STEPS, PHIS)
def test_a_later_request_passes_only_while_it_is_cheaper_by_phi_times_what_was_asked_in_between(steps, phi):
    waiting = policy("holistic", phi=phi)
    tickets = [waiting.enqueue(str(number), "a", 5, tokens) for number, (_, tokens, _) in enumerate(steps)]
    order = {ticket: place for place, ticket in enumerate(waiting.admit() for _ in range(len(tickets)))}
    for early, one in enumerate(tickets):
        between = 0
        for later in range(early + 1, len(tickets)):
            between += tickets[later - 1].charge.hf
            lead = one.charge.hf - tickets[later].charge.hf - phi * between
            if abs(lead) > len(tickets):  # sums are rounded up, by less than a millionth a request
                assert (order[tickets[later]] < order[one]) == (lead > 0)


@pytest.mark.parametrize("phi", [0.03, 0.3])
def test_a_long_request_does_not_starve_behind_its_own_clients_short_ones(phi):
    queue = policy("holistic", phi=phi)
    victim = queue.enqueue("victim", "a", 5, 1000)
    short = queue.enqueue("0", "a", 5, 5)
    for number in range(1, int(victim.charge.hf / phi / short.charge.hf) + 2):
        if queue.admit() is victim:
            break
        queue.enqueue(str(number), "a", 5, 5)
    assert victim.state == "running"
    assert number > 50  # but it does let short ones pass


def test_phi_of_1_keeps_the_order_of_arrival():
    assert [one.arrival for one in served([("a", 100 - one, 0) for one in range(60)], 1)] == list(range(60))


def test_a_preempted_request_waits_first_in_its_own_clients_queue():
    queue = policy("holistic")
    for name, client, tokens in [("long", "a", 900), ("light", "b", 20), ("short", "a", 5)]:
        queue.enqueue(name, client, 10, tokens)
    queue.admit()  # of a: short
    queue.admit()  # of b
    queue.admit()  # of a: long
    queue.preempt("long", 50)
    queue.enqueue("tiny", "a", 1, 1)
    queue.enqueue("next", "b", 10, 20)
    assert queue.num_front == 0
    assert [one.request_id for one in queue.simulate()] == ["next", "long", "tiny"]
    assert [queue.admit().request_id for _ in range(3)] == ["next", "long", "tiny"]


@settings(max_examples=100)
@given(STEPS, st.data())
def test_preemption_keeps_the_books(steps, data):
    """Requests are preempted, set aside, given back or given up at any time: all that is left is what was served."""
    queue, running, expected = policy("holistic"), [], 0
    for number, (client, tokens, admissions) in enumerate(steps):
        queue.enqueue(str(number), client, 5, tokens)
        for _ in range(min(admissions, len(queue) - queue.num_aside)):
            running.append(queue.admit())
        if running:
            one = running.pop(data.draw(st.integers(0, len(running) - 1)))
            match data.draw(st.sampled_from(["preempt", "aside", "give back", "end", "abort"])):
                case "end":
                    expected += queue.finish(one.request_id, tokens).hf
                case "give back":
                    queue.give_back(one.request_id)
                case action:
                    queue.preempt(one.request_id, data.draw(st.integers(0, 30)))
                    if action == "aside":
                        queue.set_aside(one)
                    if action == "abort":
                        expected += queue.abort(one.request_id, 30).hf
        assert queue.ledger.root.num_waiting == len(queue) - queue.num_aside
    for one in [ticket for ticket in queue if ticket.state == "aside"]:
        queue.bring_back(one)
    foreseen = queue.simulate()
    rest = [queue.admit() for _ in range(len(queue))]
    assert rest == foreseen
    for one in [*running, *rest]:
        expected += queue.finish(one.request_id, 7).hf
    assert queue.ledger.total.hf == expected
    assert queue.ledger.open_requests == ()
    assert all(one.num_open == one.num_waiting == 0 for one in queue.ledger.clients())


@pytest.mark.parametrize("phi", [0, -1, 1.5, float("nan")])
def test_a_phi_that_bounds_nothing_is_refused(phi):
    with pytest.raises((ValueError, ConfigError)):
        FairnessConfig(phi=phi)
