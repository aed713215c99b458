"""The scheduler half of the SGLang hook: no request is lost, ranks agree, every token is charged, whatever happens."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.serving_hooks.carried import Carried, seals
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import admission, compat, policy
from mope.serving_hooks.sglang.policy import ATTRIBUTE, FairScheduling
from tests.sglang_stand_ins import FINISH_ABORT, FINISH_LENGTH, Req, scheduler

UNIT = 1_000_000
PLAIN = {"alpha": 1.0, "beta": 0.0, "delta": 0.0, "predictor": "none"}


def fair(name: str = "equinox", clock: Any = None, **changes: Any) -> FairScheduling:
    arguments = {
        key: changes.pop(key) for key in ("tp_size", "rank", "nnodes", "tokenizer_worker_num") if key in changes
    }
    ours = FairScheduling(
        scheduler(name, **arguments), HookOptions.model_validate({"policy": name, **PLAIN, **changes})
    )
    setattr(ours.scheduler, ATTRIBUTE, ours)
    setattr(ours.scheduler.policy, ATTRIBUTE, ours)
    if clock is not None:
        ours.steward.clock = clock
    return ours


def queue(ours: FairScheduling, req: Req, *, retracted: bool = False) -> Req:
    ours.scheduler.waiting_queue.append(req)
    policy.request_queued(None, ours.scheduler, req, is_retracted=retracted)
    return req


def order(ours: FairScheduling) -> list[Req]:
    policy.calc_priority(lambda *args: None, ours.scheduler.policy, ours.scheduler.waiting_queue)
    return list(ours.scheduler.waiting_queue)


def admit(ours: FairScheduling, req: Req) -> None:
    adder = SimpleNamespace(can_run_list=[], tree_cache=SimpleNamespace(disable=False))
    admission.add_one_req(lambda adder, req: adder.can_run_list.append(req), adder, req)
    ours.scheduler.waiting_queue.remove(req)


def step(ours: FairScheduling, *reqs: Req) -> None:
    policy.results_processed(None, ours.scheduler, SimpleNamespace(reqs=list(reqs)), None)


def state(ours: FairScheduling) -> dict[str, Any]:
    result = SimpleNamespace(internal_state={})
    policy.internal_state(result, ours.scheduler)
    found: dict[str, Any] = result.internal_state["mope"]
    return found


def service(ours: FairScheduling, client: str) -> float:
    return sum(one["service"] for one in state(ours)["clients"] if one["client"] == client) / UNIT


# -- whoever is next


def test_picks_are_simulated_and_not_sorted() -> None:
    """A plain sort by counters would give a client all places at once."""
    ours = fair()
    first = [queue(ours, Req("a", predicted=10)) for _ in range(4)]
    second = [queue(ours, Req("b", predicted=10)) for _ in range(2)]
    assert order(ours) == [first[0], second[0], first[1], second[1], first[2], first[3]]


def test_what_waits_is_kept_when_sglang_takes_it_away_or_brings_it_by_another_way(caplog) -> None:
    ours = fair()
    reqs = [queue(ours, Req("a")) for _ in range(5)]
    unseen = Req("b")
    ours.scheduler.waiting_queue[1:3] = [unseen]  # two were aborted, one was put there by a queue of SGLang's own
    assert order(ours) == [reqs[0], unseen, reqs[3], reqs[4]]
    assert state(ours)["tallies"]["a"]["aborted"] == 2
    assert ours.guard.ok


def test_equal_request_ids_are_two_requests() -> None:
    ours = fair()
    one, two = queue(ours, Req("a", rid="x")), queue(ours, Req("a", rid="x"))
    admit(ours, one)
    one.output_ids = [1, 2]
    one.finished_reason = FINISH_LENGTH()
    step(ours, one)
    assert order(ours) == [two]
    assert service(ours, "a") == 10 + 2 * 2


def test_one_that_lost_its_place_comes_first_and_pays_once() -> None:
    ours = fair(cached_weight=1.0)
    req = queue(ours, Req("a", predicted=50))
    admit(ours, req)
    req.output_ids = [1] * 7
    step(ours, req)
    queue(ours, Req("b", predicted=1))
    queue(ours, req, retracted=True)
    assert order(ours)[0] is req
    admit(ours, req)
    req.output_ids = [1] * 9
    req.finished_reason = FINISH_LENGTH()
    step(ours, req)
    step(ours, req)  # overlapped: a batch that still holds it
    assert service(ours, "a") == 10 + 2 * 9
    assert state(ours)["tallies"]["a"]["preempted"] == 1


def test_what_the_prefix_cache_held_is_refunded_before_the_next_pick() -> None:
    ours = fair()
    req, other = queue(ours, Req("a", num_prompt=100, predicted=1)), queue(ours, Req("b", num_prompt=50, predicted=1))
    admit(ours, req)
    admit(ours, other)
    req.cached_tokens = 90
    more = queue(ours, Req("b", num_prompt=1)), queue(ours, Req("a", num_prompt=1))
    assert order(ours) == [more[1], more[0]]


def test_an_abort_is_charged_what_was_read() -> None:
    ours = fair()
    req = queue(ours, Req("a", num_prompt=100))
    admit(ours, req)
    req.kv_committed_len = 64  # a chunk
    step(ours, req)
    req.finished_reason = FINISH_ABORT()
    step(ours, req)
    assert service(ours, "a") == 64
    assert state(ours)["tallies"]["a"]["aborted"] == 1


def test_those_that_retraction_gives_up_end() -> None:
    ours = fair()
    req = queue(ours, Req("a"))
    admit(ours, req)
    req.output_ids = [1] * 3
    policy.decode_retracted(([], 0.5, [req]))
    assert state(ours)["running"] == 0
    assert service(ours, "a") == 10 + 2 * 3


def test_lengths_that_are_no_question_are_no_predictions() -> None:
    ours = fair()
    fixed = queue(ours, Req("a", cap=40, predicted=3, ignore_eos=True))
    read_only = queue(ours, Req("a", cap=0))
    assert getattr(fixed, ATTRIBUTE).ticket.predicted_tokens == 40
    assert getattr(read_only, ATTRIBUTE).ticket.predicted_tokens == 1
    assert state(ours)["tallies"]["a"]["predicted"] == 0


def test_a_front_end_without_the_hook_is_not_believed() -> None:
    ours = fair(tokenizer_worker_num=4)
    assert queue(ours, Req("forged", predicted=1.0))
    assert list(state(ours)["tallies"]) == ["(anonymous)"]
    assert "--tokenizer-worker-num 4" in state(ours)["front_end"]
    by_gateway = fair(tokenizer_worker_num=4, identity="header", client_header="X-SMG-Routing-Key")
    req = Req("forged")
    req.routing_key = "acme"
    queue(by_gateway, req)
    assert list(state(by_gateway)["tallies"]) == ["acme"]


# -- ranks


@st.composite
def events(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    kinds = st.sampled_from(["arrive", "arrive", "schedule", "schedule", "step", "retract", "abort", "finish"])
    return draw(
        st.lists(st.tuples(kinds, st.sampled_from("abcd"), st.integers(1, 60), st.integers(1, 60)), max_size=90)
    )


class Rank:
    """A scheduler that lives through events."""

    def __init__(self, name: str, clock: Any, rank: int) -> None:
        self.ours = fair(name, clock, tp_size=2, rank=rank, weights={"a": 2.0}, victims="remaining")
        self.running: list[Req] = []
        self.seen: list[list[int]] = []
        self.num_arrived = 0
        self.given: dict[str, float] = {}

    def live(self, kind: str, client: str, prompt: int, number: int) -> None:
        waiting = self.ours.scheduler.waiting_queue
        if kind == "arrive":
            queue(self.ours, Req(client, prompt, predicted=float(number), rid=str(self.num_arrived)))
            self.num_arrived += 1
        elif kind == "schedule":
            before = list(waiting)
            ordered = order(self.ours)
            assert sorted(map(id, ordered)) == sorted(map(id, before))
            self.seen.append([int(req.rid) for req in ordered])
            for req in ordered[: 4 - len(self.running)]:
                admit(self.ours, req)
                self.running.append(req)
        elif kind == "step":
            for req in self.running:
                req.output_ids.append(1)
            step(self.ours, *self.running)
        elif self.running and kind == "retract":
            keep = admission.retraction_order(lambda reqs: list(range(len(reqs))), self.running)
            req = self.running.pop(keep[-1])
            queue(self.ours, req, retracted=True)
        elif waiting and kind == "abort":
            req = waiting.pop(number % len(waiting))
            if req.output_ids:
                self.charge(req)
        elif self.running and kind == "finish":
            req = self.running.pop(number % len(self.running))
            req.finished_reason = FINISH_LENGTH()
            step(self.ours, req)
            self.charge(req)

    def charge(self, req: Req) -> None:
        client = req.sampling_params.custom_params["mope_client"]
        given = len(req.origin_input_ids) + 2 * len(req.output_ids)
        self.given[client] = self.given.get(client, 0) + given


@settings(max_examples=40, deadline=None)
@given(steps=events(), name=st.sampled_from(compat.POLICIES))
def test_ranks_with_other_clocks_agree_and_the_books_are_exact(steps: list[tuple[Any, ...]], name: str) -> None:
    ticks = itertools.count()
    ranks = [Rank(name, lambda: 0.0, 0), Rank(name, lambda: next(ticks) * 7.3, 1)]
    for event in steps:
        for rank in ranks:
            rank.live(*event)
    assert ranks[0].seen == ranks[1].seen
    for rank in ranks:
        assert rank.ours.guard.ok, rank.ours.guard.failure
        for req in [*rank.ours.scheduler.waiting_queue, *rank.running]:
            req.finished_reason = FINISH_ABORT()
            if req.output_ids:
                rank.charge(req)
        step(rank.ours, *rank.running)
        rank.ours.scheduler.waiting_queue.clear()
        order(rank.ours)
        assert state(rank.ours)["waiting"] == state(rank.ours)["running"] == 0
        assert len(rank.ours.steward.held) == 0
        assert {client: service(rank.ours, client) for client in rank.given} == rank.given


# -- faults


def test_after_a_fault_requests_are_served_in_order_of_arrival(monkeypatch, caplog) -> None:
    ours = fair()
    reqs = [queue(ours, Req("a", predicted=5)) for _ in range(3)] + [queue(ours, Req("b", predicted=5))]
    assert order(ours) != reqs
    monkeypatch.setattr(ours.steward.policy, "simulate", lambda limit: 1 / 0)
    with caplog.at_level(logging.ERROR):
        assert order(ours) == reqs
        queue(ours, Req("c"))
        assert order(ours)[:4] == reqs
        step(ours)
    assert [record for record in caplog.records if "is off until the next start" in record.message] == caplog.records
    assert len(caplog.records) == 1
    assert state(ours)["on"] is False


ODD = ["x", "", True, 0, 3.5, [["mope_client", "victim"]], ["x"], {"mope_client": "victim", "mope_tokens": 1}, {"a": 1}]


@pytest.mark.parametrize("odd", ODD)
def test_no_request_turns_it_off_or_names_somebody_else(odd: Any) -> None:
    ours = fair()
    for custom_params in (odd, {**Carried("bob").write(), "mope_client": "victim"}):
        req = queue(ours, Req(None, custom_params=custom_params))
        order(ours)
        admit(ours, req)
        step(ours, req)
    for cap in (10**400, "7", True, -3):
        queue(ours, Req("a", cap=cap, ignore_eos="yes"))
    assert queue(ours, Req("bob")) in order(ours)
    assert ours.guard.ok
    assert {client["client"] for client in state(ours)["clients"]} <= {"(anonymous)", "a", "bob"}


def test_ranks_on_several_machines_go_by_what_the_front_end_wrote() -> None:
    """They have no common secret, and must not disagree on whom a request is from."""
    ours = [fair(tp_size=2, rank=rank, nnodes=2) for rank in (0, 1)]
    told = Carried("bob", 5.0).write()
    seals.use(b"another machine's")
    for rank in ours:
        queue(rank, Req(None, custom_params=told))
        assert [client["client"] for client in state(rank)["clients"]] == ["bob"]


def test_what_fails_beside_the_order_changes_no_order(monkeypatch, caplog) -> None:
    ours = fair()
    queue(ours, Req("a"))
    monkeypatch.setattr(ours.steward, "between_steps", lambda: 1 / 0)
    with caplog.at_level(logging.ERROR):
        step(ours)
        step(ours)
    assert len(caplog.records) == 1
    assert ours.guard.ok


def test_what_is_lost_without_a_hook_is_told_where_it_is_turned_on(caplog) -> None:
    for ours in (fair(tp_size=2), fair(tp_size=2, rank=1)):
        ours.announce(12, 13, ["victims"])
    assert [record.message for record in caplog.records if "victims:" in record.message] == [
        "mope goes without victims: this SGLang has no place for it"
    ]


def test_measured_latencies_count_only_where_nobody_has_to_agree() -> None:
    assert fair().steward.exact is False
    assert fair(tp_size=2).steward.exact is True


def test_state_is_kept_by_one_rank(tmp_path) -> None:
    kept = tmp_path / "state.json"
    first, second = fair(tp_size=2, state=kept), fair(tp_size=2, rank=1, state=kept)
    for ours in (first, second):
        queue(ours, Req("a"))
    second.steward.close()
    assert not kept.exists()
    first.steward.close()
    assert kept.exists()


# -- memory


def test_predicted_admission_goes_by_the_peak() -> None:
    ours = fair(predicted_admission=True)
    ours.scheduler.max_total_num_tokens = 200
    running = [queue(ours, Req("a", num_prompt=20, cap=10_000, predicted=40)) for _ in range(2)]
    asked: list[int] = []

    def original(adder: Any, req: Req) -> str:
        asked.append(req.sampling_params.max_new_tokens)
        adder.can_run_list.append(req)
        return "continue"

    adder = SimpleNamespace(can_run_list=[], tree_cache=SimpleNamespace(disable=False))
    for req in running:
        assert admission.add_one_req(original, adder, req) == "continue"
        ours.scheduler.waiting_queue.remove(req)
    assert asked == [1, 1]  # SGLang is left with what is needed now
    assert [req.sampling_params.max_new_tokens for req in running] == [10_000, 10_000]
    small, large = (
        queue(ours, Req("b", num_prompt=20, predicted=40)),
        queue(ours, Req("b", num_prompt=20, cap=1000, predicted=200)),
    )
    assert admission.has_room(ours, small)  # 3 * (20 + 40) = 180
    assert not admission.has_room(ours, large)
    for req in running:
        req.output_ids = [1] * 1000  # far beyond what was predicted
    assert not admission.has_room(ours, small)


def test_sglang_retracts_whom_the_policy_names() -> None:
    ours = fair(victims="remaining")
    reqs = [queue(ours, Req("a", predicted=tokens)) for tokens in (30, 90, 60)]
    for req in reqs:
        admit(ours, req)
    stranger = Req("b")
    keep = admission.retraction_order(lambda reqs: [0, 1, 2, 3], [*reqs, stranger])
    assert keep == [3, 0, 2, 1]
    assert admission.retraction_order(lambda reqs: [0, 1], [stranger, stranger]) == [0, 1]


@pytest.mark.parametrize("name", [*compat.POLICIES, "fcfs", "lpm"])
def test_only_our_names_are_ours(name: str) -> None:
    asked = policy.validate_policy(lambda self, policy, tree: policy, None, name, None)
    assert asked == ("fcfs" if name in compat.POLICIES else name)
    assert compat.chosen_policy(scheduler(name)) == (name if name in compat.POLICIES else None)
