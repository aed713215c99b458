"""Policies follow requests from arrival to end: whom they pick, what they charge, that nothing but order decides."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.errors import ConfigError
from mope.fairness import FairnessConfig, Ledger, Load, Policy
from mope.fairness.charges import MAX_TOKENS, NOTHING, UNIT
from tests.engine_model import Engine, leaf, policy, workload
from tests.vtc_reference import ReferenceVtc

POLICIES = ("fcfs", "vtc", "vtc-predicted", "equinox", "holistic", "shortest-predicted", "deficit-round-robin")
NAMES = ["a", "b", "c", "t/x", "t/y", "u/v/w", None]


# -- who is picked


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["vtc", "vtc-predicted", "equinox"]),
    slots=st.integers(1, 6),
    num_clients=st.integers(1, 6),
)
def test_vtc_is_what_was_published_pick_by_pick(seed, name, slots, num_clients):
    """Ours and a plain re-telling of the paper's algorithm run the same requests, token by token."""
    rng = random.Random(seed)
    as_vtc = {"alpha": 1, "beta": 0, "delta": 0} if name == "equinox" else {}
    ours, reference = policy(name, lift="charged", **as_vtc), ReferenceVtc(predicts=name != "vtc")
    running: dict[str, int] = {}
    arrived = 0
    while arrived < 120 or running or len(ours):
        if arrived < 120 and rng.random() < 0.5:
            client, prompt = f"c{rng.randrange(num_clients)}", rng.randint(1, 30)
            predicted = float(rng.randint(1, 40))
            ours.enqueue(str(arrived), client, prompt, predicted)
            reference.arrive(str(arrived), client, prompt, predicted)
            arrived += 1
        while len(running) < slots and len(ours):
            picked = ours.admit().request_id
            assert picked == reference.admit()
            running[picked] = rng.randint(1, 40)
        for request in list(running):
            reference.token(request)
            ours.progress(request, reference.generated[request])
            if reference.generated[request] == running[request]:
                reference.end(request)
                ours.finish(request, running.pop(request))
    for account in ours.ledger.clients():
        assert account.counter == reference.counters[account.name] * UNIT


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 6), lift=st.sampled_from(["settled", "charged"]))
def test_equinox_without_latency_and_resources_is_vtc_with_prediction(seed, slots, lift):
    arrivals = workload(seed, ["a", "b", "c", "t/x", "t/y"], 120, error=1.0)
    blind = Engine(policy("equinox", alpha=1, beta=0, delta=0, lift=lift), slots)
    vtc = Engine(policy("vtc-predicted", lift=lift), slots)
    assert blind.run(arrivals) == vtc.run(arrivals)
    assert blind.policy.ledger.snapshot() == vtc.policy.ledger.snapshot()


@pytest.mark.parametrize(("lift", "light_first"), [("settled", True), ("charged", False)])
def test_who_comes_back_does_not_pay_for_predictions_of_others(lift, light_first):
    """A flood is predicted far too long, a light client joins, then the flood's answers turn out short."""
    queue = policy("vtc-predicted", lift=lift)
    for number in range(40):
        queue.enqueue(f"f{number}", "flood", 10, 5000)
    running = [queue.admit().request_id for _ in range(8)]
    queue.enqueue("light", "light", 10, 10)
    for request in running:
        queue.finish(request, 10)
    assert (queue.peek().request_id == "light") == light_first


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(POLICIES), limit=st.integers(0, 60))
def test_simulation_is_what_then_happens(data, name, limit):
    queue = policy(name, weights={"a": 2, "t/x": 0.5}, quantum=200)
    for number in range(data.draw(st.integers(0, 50))):
        client = data.draw(st.sampled_from(NAMES))
        queue.enqueue(str(number), client, data.draw(st.integers(0, 300)), data.draw(st.floats(1, 500)))
        if data.draw(st.integers(0, 3)) == 0:
            ticket = queue.admit()
            if data.draw(st.booleans()):
                queue.preempt(ticket.request_id, data.draw(st.integers(0, 20)))
    before = [ticket.request_id for ticket in queue]
    foreseen = [ticket.request_id for ticket in queue.simulate(limit)]
    assert [ticket.request_id for ticket in queue] == before
    assert foreseen == [ticket.request_id for ticket in queue.simulate()][:limit]
    assert foreseen == [queue.admit().request_id for _ in range(min(limit, len(before)))]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), clients=st.sampled_from(["abcd", ["a", "t/x", "u/x"], ["a", "t", "t/x", "t/y/z"]]))
def test_turns_are_foreseen_at_any_time(seed, clients):
    """Rounds that are reckoned are those that are then lived through; `t` may turn out to be a group at any time."""
    rng = random.Random(seed)
    queue = policy("deficit-round-robin", weights={"a": 2, "t": 0.3, "t/x": 0.5}, quantum=rng.choice((20, 200, 2000)))
    running = []
    for number in range(120):
        kind = rng.choice(("arrive", "arrive", "admit", "end", "give back", "abort"))
        if kind == "arrive":
            queue.enqueue(str(number), rng.choice(clients), rng.randint(0, 300), rng.uniform(1, 500))
        elif kind == "admit" and len(queue):
            foreseen = queue.simulate(1)[0]
            assert queue.admit() is foreseen
            running.append(foreseen.request_id)
        elif kind == "end" and running:
            queue.finish(running.pop(rng.randrange(len(running))), rng.randint(0, 700))
        elif kind == "give back" and running:
            queue.give_back(running.pop())
        elif kind == "abort" and len(queue):
            queue.abort(rng.choice([ticket.request_id for ticket in queue]))
        queue.ledger.add_elsewhere(("a", "b") if rng.random() < 0.01 else ("t", "w"), rng.randint(0, 100))
    foreseen = queue.simulate()
    assert [queue.admit() for _ in range(len(queue))] == foreseen
    assert queue.simulate() == []


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(POLICIES))
def test_who_is_set_aside_is_not_offered_and_keeps_its_place(data, name):
    """Once all are back, a client's requests come in their order, and nothing is left in the books."""
    queue = policy(name, quantum=200)
    num = data.draw(st.integers(1, 40))
    for number in range(num):
        queue.enqueue(str(number), data.draw(st.sampled_from(NAMES)), 10, data.draw(st.floats(1, 500)))
    undisturbed = [ticket.request_id for ticket in queue.simulate()]
    aside = data.draw(st.sets(st.integers(0, num - 1)))
    for number in aside:
        queue.set_aside(queue.find(str(number)))
    assert len(queue) == num
    assert queue.num_aside == len(aside)
    assert sorted(int(ticket.request_id) for ticket in queue) == list(range(num))
    assert {int(ticket.request_id) for ticket in queue.simulate()} == set(range(num)) - aside
    assert queue.ledger.total == NOTHING
    for number in data.draw(st.permutations(sorted(aside))):
        queue.bring_back(queue.find(str(number)))
    assert queue.num_aside == 0
    order = [queue.admit() for _ in range(num)]
    if name in ("fcfs", "shortest-predicted"):
        assert [ticket.request_id for ticket in order] == undisturbed
    else:  # of clients with the same counter, another may be first
        for client in {ticket.account for ticket in order}:
            places = [ticket.place for ticket in order if ticket.account is client]
            assert places == sorted(places)
    for ticket in order:
        queue.finish(ticket.request_id, 10)
    assert queue.ledger.open_requests == ()
    assert all(account.num_open == account.num_waiting == 0 for account in queue.ledger.clients())


@pytest.mark.parametrize("begun", [False, True])
def test_who_is_set_aside_can_be_given_up_and_its_account_is_kept_until_then(begun):
    queue = policy("equinox", idle_clients=0)
    ticket = queue.enqueue("r", "t/a", 10, 20.0)
    if begun:
        queue.preempt(queue.admit().request_id, 5)
    queue.set_aside(ticket)
    for number in range(5):  # passing clients have idle accounts forgotten
        queue.enqueue(f"o{number}", f"o{number}", 1, 1.0)
        queue.finish(queue.admit().request_id, 1)
    assert queue.ledger.find(("t", "a")) is ticket.account
    assert queue.peek() is None
    assert queue.abort("r", 5 * begun).service == (2 * 5 + 10) * UNIT * begun
    assert (len(queue), queue.num_aside, queue.ledger.open_requests) == (0, 0, ())
    assert ticket.account.num_open == 0


def test_a_preempted_request_that_was_set_aside_comes_back_in_front():
    queue = policy("equinox")
    ticket = queue.enqueue("r", "a", 10, 20.0)
    queue.admit()
    queue.preempt("r", 5)
    queue.enqueue("other", "b", 10, 20.0)
    queue.set_aside(ticket)
    assert queue.peek().request_id == "other"
    queue.bring_back(ticket)
    assert queue.peek() is ticket
    assert queue.num_front == 1


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(POLICIES), data=st.data())
def test_names_and_orders_of_dictionaries_decide_nothing(seed, name, data):
    clients = ["a", "b", "c", "t/x", "t/y"]
    renamed = dict(zip(clients, data.draw(st.permutations(["z", "k", "0", "g/2", "g/1"])), strict=True))
    groups = {client: renamed[client] for client in clients if ("/" in client) == ("/" in renamed[client])}
    if len(groups) < len(clients):  # a group has to stay a group
        renamed = dict(zip(clients, [*data.draw(st.permutations(["z", "k", "0"])), "g/2", "g/1"], strict=True))
    arrivals = workload(seed, clients, 80, error=1.0)
    others = [
        type(one)(one.step, renamed[one.client], one.prompt_tokens, one.predicted, one.length) for one in arrivals
    ]
    plain, other = policy(name), policy(name)
    for client in data.draw(st.permutations(list(renamed.values()))):  # opened in another order
        parts = client.split("/")
        if len(parts) > 1:
            other.ledger.account(tuple(parts))
    assert Engine(plain).run(arrivals) == Engine(other).run(others)


@given(seed=st.integers(0, 10**6), name=st.sampled_from(POLICIES))
@settings(max_examples=20)
def test_fcfs_keeps_arrival_order_and_all_serve_everybody_once(seed, name):
    arrivals = workload(seed, ["a", "b", "t/x"], 60, error=1.0)
    admitted = Engine(policy(name)).run(arrivals)
    assert sorted(admitted, key=int) == [str(number) for number in range(60)]
    if name == "fcfs":
        steps = [arrivals[int(number)].step for number in admitted]
        assert steps == sorted(steps)


def test_shortest_predicted_goes_first_and_ages():
    queue = policy("shortest-predicted", ageing=10)
    for name, predicted in [("long", 100), ("short", 20), ("late", 95)]:
        queue.enqueue(name, name, 10, predicted)
    assert [ticket.request_id for ticket in queue.simulate()] == ["short", "long", "late"]  # 20+10, 100, 95+20


# -- what is charged


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(POLICIES))
def test_when_all_is_over_everybody_was_charged_what_was_served(data, name):
    """Through corrections, preemptions, give-backs, cache hits and aborts."""
    queue = policy(name, weights={"a": 2})
    running: list[str] = []
    served: dict[str, int] = {}
    clients: dict[str, str | None] = {}

    def book(request, prompt, cached, tokens):
        cost = queue.estimator.measured(prompt, tokens, cached_tokens=cached)
        served[request] = cost.charge.hf

    for number in range(data.draw(st.integers(5, 40))):
        match data.draw(st.integers(0, 7)):
            case 0 | 1 | 2:
                clients[str(number)] = data.draw(st.sampled_from(NAMES))
                queue.enqueue(
                    str(number), clients[str(number)], data.draw(st.integers(0, 99)), data.draw(st.floats(1, 200))
                )
            case 3 | 4 if len(queue):
                running.append(queue.admit().request_id)
            case 5 if running:
                queue.progress(data.draw(st.sampled_from(running)), data.draw(st.integers(1, 300)))
            case 6 if running:
                name_of = running.pop(data.draw(st.integers(0, len(running) - 1)))
                if data.draw(st.booleans()):
                    queue.preempt(name_of, data.draw(st.integers(0, 50)))
                else:
                    queue.give_back(name_of)
            case 7 if running:
                queue.cached(data.draw(st.sampled_from(running)), data.draw(st.integers(0, 120)))
    for ticket in [queue.find(name) for name in clients]:
        if data.draw(st.booleans()):
            tokens = data.draw(st.integers(0, 300))
            begun = ticket.state != "waiting"
            queue.abort(ticket.request_id, tokens, computed_tokens=(read := data.draw(st.integers(0, 99))))
            if begun:
                book(ticket.request_id, min(read, ticket.prompt_tokens), ticket.cached_tokens, tokens)
    while len(queue):
        queue.admit()
    for ticket in [queue.find(name) for name in clients]:
        if ticket is not None:
            tokens = data.draw(st.integers(0, 300))
            queue.finish(ticket.request_id, tokens)
            queue.finish(ticket.request_id, 10**6)  # told twice: charged once
            book(ticket.request_id, ticket.prompt_tokens, ticket.cached_tokens, tokens)
    assert queue.ledger.open_requests == ()
    assert queue.ledger.total.hf == sum(served.values())
    assert all(account.num_waiting == 0 and account.num_open == 0 for account in queue.ledger.clients())


def test_admission_charges_the_prediction_and_the_end_corrects_it():
    queue = policy("vtc-predicted")
    ticket = queue.enqueue("r", "a", 10, 100)
    assert queue.ledger.find(("a",)).counter == 0
    queue.admit()
    assert queue.ledger.find(("a",)).counter == (10 + 2 * 100) * UNIT
    queue.progress("r", 100)
    assert queue.ledger.find(("a",)).counter == 210 * UNIT
    queue.progress("r", 101)
    assert queue.ledger.find(("a",)).counter == 212 * UNIT
    queue.cached("r", 8)
    assert queue.ledger.find(("a",)).counter == (2 + 202) * UNIT
    queue.preempt("r", 101)
    assert queue.peek() is ticket
    queue.admit()
    assert queue.ledger.find(("a",)).counter == 204 * UNIT
    queue.finish("r", 120)
    assert queue.ledger.find(("a",)).counter == (2 + 240) * UNIT


def test_a_preempted_request_is_refunded_what_it_was_not_given_and_goes_in_front():
    queue = policy("vtc-predicted")
    for name, client in [("old", "a"), ("new", "a"), ("other", "b")]:
        queue.enqueue(name, client, 10, 100)
    assert [queue.admit().request_id for _ in range(2)] == ["old", "other"]
    queue.preempt("other", 7)
    assert queue.ledger.find(("b",)).counter == (10 + 14) * UNIT
    queue.preempt("old", 0)
    assert [ticket.request_id for ticket in queue] == ["old", "other", "new"]
    assert queue.num_front == 2
    assert [queue.admit().request_id for _ in range(3)] == ["old", "other", "new"]
    assert queue.ledger.find(("b",)).counter == 210 * UNIT


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_given_back_leaves_no_trace(name):
    queue = policy(name, quantum=100)
    for number in range(12):
        queue.enqueue(str(number), f"c{number % 3}", 10 + number, 50 + 10 * number)
    queue.finish(queue.admit().request_id, 20)
    foreseen = [ticket.request_id for ticket in queue.simulate()]
    books = [(leaf(account), account.counter, account.num_waiting) for account in queue.ledger.clients()]
    for count in (1, 3, 11):
        taken = [queue.admit().request_id for _ in range(count)]
        for request in reversed(taken):
            queue.give_back(request)
        assert [ticket.request_id for ticket in queue] == sorted(foreseen, key=int)
        assert [(leaf(one), one.counter, one.num_waiting) for one in queue.ledger.clients()] == books
        if name != "deficit-round-robin" or count == 1:
            assert [ticket.request_id for ticket in queue.simulate()] == foreseen


@given(tokens=st.lists(st.integers(1, 2000), min_size=2, max_size=20), prompt=st.integers(0, 10**6))
def test_while_it_runs_a_request_never_becomes_cheaper(tokens, prompt):
    queue = policy("equinox")
    queue.enqueue("r", "a", prompt, 50)
    queue.admit()
    counters = []
    for generated in sorted(tokens):
        queue.progress("r", generated)
        counters.append(queue.ledger.find(("a",)).counter)
    assert counters == sorted(counters)
    assert counters[0] > 0


# -- who does not fit


def test_a_blocked_request_lets_a_bounded_number_pass():
    queue = policy("vtc-predicted", bypass=3)
    huge = queue.enqueue("huge", "a", 100_000, 10)
    for number in range(10):
        queue.enqueue(f"a{number}", "a", 10, 10)
        queue.enqueue(f"b{number}", "b", 10, 10)
    passed = []
    for _ in range(6):  # steps of an engine
        while (ticket := queue.peek()) is not None:
            if ticket is huge:
                queue.block(ticket)
            elif len(passed) < 20:
                passed.append(queue.admit(ticket).request_id)
        queue.unblock()
    assert passed == ["b0", "b1", "b2"]  # none of its own client, and three of the other
    assert queue.admit().request_id == "huge"


def test_with_no_bypass_the_head_blocks_all():
    queue = policy("equinox", bypass=0)
    queue.block(queue.enqueue("huge", "a", 10, 10))
    queue.enqueue("small", "b", 10, 10)
    assert queue.peek() is None
    queue.unblock()
    assert queue.peek().request_id == "huge"


@pytest.mark.parametrize("name", POLICIES)
def test_all_blocked_is_nobody(name):
    queue = policy(name)
    for number in range(5):
        queue.enqueue(str(number), f"c{number}", 10, 10)
    seen = []
    while (ticket := queue.peek()) is not None:
        seen.append(ticket.request_id)
        queue.block(ticket)
    assert sorted(seen) == ["0", "1", "2", "3", "4"]
    queue.unblock()
    if name == "deficit-round-robin":  # where turns have gone on
        assert queue.peek() is not None
    else:
        assert queue.peek().request_id == seen[0]


def test_victims():
    def running(order):
        queue = policy("equinox", victims=order)
        for name, client, predicted in [
            ("r0", "poor", 100),
            ("r1", "rich", 500),
            ("r2", "rich", 50),
            ("r3", "poor", 700),
        ]:
            queue.enqueue(name, client, 10, predicted)
        for _ in range(4):
            queue.admit()
        queue.progress("r3", 650)
        return queue.victims(["r0", "stranger", "r1", "r2", "r3"])

    assert running("engine") == ["r3", "r2", "r1", "stranger", "r0"]
    assert running("remaining") == ["r1", "r0", "r3", "r2", "stranger"]
    by_counter = running("counter")
    assert by_counter in (["r3", "r0", "r2", "r1", "stranger"], ["r2", "r1", "r3", "r0", "stranger"])


# -- what comes from outside


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "prediction", [float("nan"), float("inf"), -float("inf"), -5, 0, 1e300, 10**400, "many", None, object(), [], 2e6]
)
def test_an_impossible_prediction_is_replaced_and_counted(name, prediction):
    queue = policy(name)
    queue.enqueue("good", "a", 10, 100)
    ticket = queue.enqueue("bad", "b", 10, prediction)
    assert 1 <= ticket.predicted_tokens <= MAX_TOKENS
    assert queue.estimator.num_clamped == (prediction is not None and prediction != 2e6)
    for _ in range(2):
        queue.finish(queue.admit().request_id, 5)
    assert all(account.counter >= 0 for account in queue.ledger.clients())
    assert queue.ledger.total.service == 2 * (10 + 2 * 5) * UNIT


@pytest.mark.parametrize("prompt", [-1, 10**12])
def test_an_impossible_prompt_is_replaced_and_counted(prompt):
    queue = policy("equinox")
    ticket = queue.enqueue("r", "a", prompt, 5)
    assert 0 <= ticket.prompt_tokens <= MAX_TOKENS
    assert queue.estimator.num_clamped == 1


def test_two_million_tokens_are_exact():
    queue = policy("vtc-predicted")
    for number in range(1000):
        queue.enqueue(str(number), "a", 2_000_000, 2_000_000)
        queue.admit()
        queue.finish(str(number), 2_000_000)
    assert queue.ledger.find(("a",)).counter == 1000 * 6_000_000 * UNIT


@pytest.mark.parametrize(
    ("client", "path"),
    [
        (None, ("(anonymous)",)),
        ("", ("(anonymous)",)),
        ("/", ("(anonymous)",)),
        ([], ("(anonymous)",)),
        ("a", ("a",)),
        ("a/b", ("a", "b")),
        ("a//b", ("a", "b")),
        ("a/b/c/d/e", ("a", "b", "c", "d/e")),
        (["a", "b/c"], ("a", "b/c")),
        ("\ud800é\n", ("\ud800é\n",)),
    ],
)
def test_a_client_is_a_path(client, path):
    assert policy("fcfs").enqueue("r", client, 1, 1).account.path == path


def test_a_long_name_is_shortened_and_stays_one_client():
    queue = policy("equinox")
    one, other = queue.enqueue("1", "x" * 10_000, 1, 1), queue.enqueue("2", "x" * 9_999 + "y", 1, 1)
    assert len(one.account.name) == len(other.account.name) == 256
    assert one.account is not other.account
    assert queue.enqueue("3", "x" * 10_000, 1, 1).account is one.account


@pytest.mark.parametrize("prompt_tokens", [None, "12"])
def test_what_is_no_number_is_refused_and_nothing_changes(prompt_tokens):
    queue = policy("equinox")
    with pytest.raises(ConfigError, match="expected a whole number"):
        queue.enqueue("r", "a", prompt_tokens, 1)
    assert len(queue) == queue.ledger.num_accounts == 0


@pytest.mark.parametrize("client", [["a", 5], ["a"] * 5, [b"a"], 5, b"a"])
def test_what_is_no_name_is_refused_and_nothing_changes(client):
    queue = policy("equinox")
    with pytest.raises(ConfigError, match="a client is"):
        queue.enqueue("r", client, 1, 1)
    assert len(queue) == 0
    assert queue.find("r") is None
    assert queue.ledger.num_accounts == 0


def test_mistakes_of_the_caller_are_told():
    queue = policy("equinox")
    with pytest.raises(ConfigError, match="no request waits"):
        queue.admit()
    ticket = queue.enqueue("r", "a", 1, 1)
    with pytest.raises(ConfigError, match="here already"):
        queue.enqueue("r", "a", 1, 1)
    queue.admit(ticket)
    with pytest.raises(ConfigError, match="does not wait: it is running"):
        queue.admit(ticket)
    for strange in (queue.finish, queue.abort, queue.progress, queue.preempt, queue.cached):
        strange("stranger", 5)
    queue.give_back("stranger")
    assert queue.ledger.open_requests == ("r",)
    with pytest.raises(ConfigError, match="other weights"):
        Policy(FairnessConfig(weights={"a": 5}), ledger=Ledger())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fair"}, "policy"),
        ({"alpha": 0, "beta": 0}, "HF would be 0"),
        ({"alpha": -1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"weights": {"a": 0}}, "weight of 'a' is 0"),
        ({"weights": {"a": float("inf")}}, "weight of 'a'"),
        ({"weights": {"a": -2}}, "weight of 'a'"),
        ({"cached_weight": 2.0}, "cannot cost more"),
        ({"response_weight": 0}, "response_weight"),
        ({"wieghts": {}}, "wieghts"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ValueError, match=message):
        FairnessConfig.model_validate(options)


def test_weights_name_clients_as_requests_do():
    config = FairnessConfig(weights={"team/": 2.0, "/team//bob": 3.0})
    assert dict(config.weights) == {"team": 2.0, "team/bob": 3.0}
    for names in ({"": 1.0}, {"//": 1.0}, {"a": 1.0, "a/": 2.0}):
        with pytest.raises(ValueError, match="the weight of"):
            FairnessConfig(weights=names)


def test_options_survive_being_written():
    config = FairnessConfig(weights={"a": 2.0}, policy="vtc")
    assert FairnessConfig.model_validate(config.model_dump()) == config
    assert FairnessConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(TypeError):
        config.weights["a"] = 5


def test_books_go_on_after_a_restart():
    before = policy("equinox")
    for number in range(30):
        before.enqueue(str(number), f"c{number % 4}", 10 * (number % 4 + 1), 40)
    for _ in range(12):
        before.finish(before.admit().request_id, 30)
    books = Ledger()
    books.restore(before.ledger.snapshot())
    after = Policy(before.config, ledger=books)
    for number in range(30, 60):
        after.enqueue(str(number), f"c{number % 4}", 10, 40)
    assert {leaf(one): one.charged for one in after.ledger.clients()} == {
        leaf(one): one.charged for one in before.ledger.clients()
    }
    assert after.peek().account.counter == min(account.counter for account in after.ledger.clients())


def test_requests_of_an_engine_that_is_gone_are_in_nobodys_way():
    """Their names may come back: before the policy takes up the books, or when they are restored under it."""
    before = policy("equinox")
    before.enqueue("r", "a", 10, 40)
    before.admit()
    kept, charged = before.ledger.snapshot(), before.ledger.total
    books = Ledger()
    books.restore(kept)
    later = policy("equinox")
    later.ledger.restore(kept)
    for after in (Policy(before.config, ledger=books), later):
        after.enqueue("r", "a", 10, 40)
        after.enqueue("other", "b", 10, 40)
        assert {after.admit().request_id for _ in range(2)} == {"r", "other"}
        after.finish("r", 30)
        after.abort("other", 0, computed_tokens=0)
        assert after.ledger.open_requests == ()
        assert after.ledger.total.service > charged.service  # what was charged to the one that is gone stays charged


def test_load_changes_what_equinox_charges_and_not_what_vtc_charges():
    busy = Load(num_running=64, context_tokens=64 * 1000)
    for name, same in [("equinox", False), ("vtc-predicted", True)]:
        queue = policy(name)
        idle = queue.enqueue("idle", "a", 100, 100).charge
        loaded = queue.enqueue("busy", "b", 100, 100, load=busy).charge
        assert (idle == loaded) == same
        assert idle.service == loaded.service
        assert loaded != NOTHING
