"""Requests that SGLang passes over do not hide the order of those that can run; its walk is played by a stand-in.

`Walk` admits as SGLang's `_get_new_batch_prefill_raw` does: from the front, passing over what cannot run.
"""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import admission, compat, policy
from mope.serving_hooks.sglang.policy import ATTRIBUTE, FairScheduling
from tests.sglang_stand_ins import FINISH_LENGTH, Req, scheduler

STEP_S = 0.02


class Walk:
    """A scheduler with the hook, stepped by hand; answers end at their cap."""

    def __init__(
        self, name: str = "equinox", *, slots: int = 16, max_loras: int | None = None, clock: Any = None, **options: Any
    ) -> None:
        arguments = {key: options.pop(key) for key in ("tp_size", "rank") if key in options}
        if max_loras is not None:
            arguments |= {"enable_lora": True, "max_loras_per_batch": max_loras}
        self.scheduler = scheduler(name, **arguments)
        self.scheduler.max_running_requests, self.max_loras = slots, max_loras
        options = {"predictor": "none", "alpha": 1.0, "beta": 0.0, "delta": 0.0, **options}
        self.ours = FairScheduling(self.scheduler, HookOptions.model_validate({"policy": name, **options}))
        self.num_steps = 0
        self.ours.steward.clock = clock if clock is not None else lambda: self.num_steps * STEP_S
        setattr(self.scheduler, ATTRIBUTE, self.ours)
        setattr(self.scheduler.policy, ATTRIBUTE, self.ours)
        self.running: list[Req] = []
        self.blocked: set[Req] = set()  # as if their KV cache were fetched
        self.first: dict[Req, int] = {}
        self.ended: dict[Req, int] = {}
        self.admitted: list[Req] = []

    def send(self, client: str, tokens: int = 5, adapter: str | None = None, *, blocked: bool = False) -> Req:
        req = Req(client, 20, tokens, float(tokens))
        req.lora_id = adapter
        if blocked:
            self.blocked.add(req)
        self.scheduler.waiting_queue.append(req)
        policy.request_queued(None, self.scheduler, req)
        return req

    def step(self, number: int = 1) -> None:
        for _ in range(number):
            if self.scheduler.waiting_queue and len(self.running) < self.scheduler.max_running_requests:
                self._admit()
            for req in self.running:
                req.output_ids.append(1)
                self.first.setdefault(req, self.num_steps)
                if len(req.output_ids) >= req.sampling_params.max_new_tokens:
                    req.finished_reason = FINISH_LENGTH()
                    self.ended[req] = self.num_steps
            batch = SimpleNamespace(reqs=list(self.running))
            policy.results_processed(None, self.scheduler, batch, None)
            self.running = [req for req in self.running if not req.finished()]
            self.num_steps += 1

    def _admit(self) -> None:
        queue = self.scheduler.waiting_queue
        policy.calc_priority(lambda *args: None, self.scheduler.policy, queue)
        loras = {req.lora_id for req in self.running}
        adder = SimpleNamespace(can_run_list=[], tree_cache=SimpleNamespace(disable=False))

        def fits(scheduler: Any, req: Req, running: set[str | None]) -> bool:
            return self.max_loras is None or len(running | {req.lora_id}) <= self.max_loras

        for req in queue:
            if self.max_loras and not policy.can_schedule_lora_req(fits, self.scheduler, req, loras):
                continue
            if len(self.running) + len(adder.can_run_list) >= self.scheduler.max_running_requests:
                break
            if req in self.blocked:
                continue
            admission.add_one_req(lambda adder, req: adder.can_run_list.append(req), adder, req)
            loras.add(req.lora_id)
        done = set(adder.can_run_list)
        self.scheduler.waiting_queue = [req for req in queue if req not in done]
        self.running += adder.can_run_list
        self.admitted += adder.can_run_list

    def retract(self) -> None:
        """The latest loses its place, and its KV cache may be fetched again."""
        if self.running:
            req = self.running.pop()
            self.blocked.add(req)
            self.scheduler.waiting_queue.append(req)
            policy.request_queued(None, self.scheduler, req, is_retracted=True)

    def give_up(self) -> None:
        """The first of the queue is aborted, which the hook is not told of."""
        del self.scheduler.waiting_queue[:1]

    def finish(self, within: int) -> None:
        """All that was sent ends, and nothing is left in the books."""
        for _ in range(within):
            if not self.running and not self.scheduler.waiting_queue:
                break
            self.step()
        self.step()
        ours = self.ours
        assert not self.running
        assert not self.scheduler.waiting_queue
        assert ours.guard.ok, ours.guard.failure
        assert ours.steward.policy.ledger.open_requests == ()
        assert not any((ours.steward.held, ours.queued, ours.running))
        assert len(ours.skips.aside) == 0


def waiting_on(walk: Walk, kind: str, number: int, clients: int = 2) -> list[Req]:
    """Eight run on adapter a; so many requests of other clients cannot run."""
    for n in range(8):
        walk.send(f"run{n % 4}", 900, "a")
    walk.step(3)
    adapter = "b" if kind == "adapter" else "a"
    return [walk.send(f"wait{n % clients}", 3, adapter, blocked=kind == "fetched") for n in range(number)]


def light_beside_flood(walk: Walk, kind: str, number: int, steps: int) -> int:
    """Requests that a light client gets one after the other, beside a flood and so many requests that cannot run."""
    waiting_on(walk, kind, number)
    for _ in range(10 * steps):
        walk.send("flood", 4, "a")
    light: Req | None = None
    num_ended = 0
    for _ in range(steps):
        if light is None or light in walk.ended:
            num_ended += light is not None
            light = walk.send("light", 4, "a")
        walk.step()
    return num_ended


@pytest.mark.parametrize("kind", ["adapter", "fetched"])
def test_those_that_cannot_run_do_not_turn_the_order_of_others_into_that_of_arrival(kind: str) -> None:
    """The light client has had more than those who wait, and less than the flood."""
    walk = Walk(max_loras=1, lora_patience_s=86_400)
    assert light_beside_flood(walk, kind, 700, 500) >= 500 / 8  # four steps each, and four until a place is free
    assert walk.ours.guard.ok


@pytest.mark.parametrize("kind", ["adapter", "fetched"])
def test_those_that_cannot_run_cost_a_step_the_same_and_are_not_charged(kind: str, monkeypatch: Any) -> None:
    looked = {}
    for number in (100, 1000):
        walk = Walk(max_loras=1, lora_patience_s=86_400)
        waiting_on(walk, kind, number)
        walk.send("flood", 900, "a")
        walk.step(60)  # until each was met
        simulated = 0
        simulate = walk.ours.steward.policy.simulate

        def counted(limit: int | None = None, simulate: Any = simulate) -> Any:
            nonlocal simulated
            found = simulate(limit)
            simulated += len(found) + 1
            return found

        monkeypatch.setattr(walk.ours.steward.policy, "simulate", counted)
        walk.step(40)
        looked[number] = simulated / 40
        assert len(walk.ours.steward.policy.ledger.open_requests) == 9  # nobody is charged who does not run
        assert len(walk.ours.steward.policy) == number == len(walk.scheduler.waiting_queue)
    assert looked[1000] <= looked[100] + 1 <= 70, looked


def test_what_was_fetched_runs_and_what_is_given_up_is_forgotten() -> None:
    walk = Walk()
    waiting = waiting_on(walk, "fetched", 300, clients=20)
    free = walk.send("free")
    walk.step(60)
    assert free in walk.ended  # it does not wait for the others
    given_up = set(waiting[::3])
    walk.scheduler.waiting_queue = [req for req in walk.scheduler.waiting_queue if req not in given_up]
    walk.blocked.clear()
    walk.step(60)
    assert len(walk.ended) > 100  # all of eight free places
    walk.finish(1500)
    tallies = walk.ours.state()["tallies"]
    assert sum(tally["aborted"] for tally in tallies.values()) == len(given_up)


@pytest.mark.parametrize("name", compat.POLICIES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_light_client_gets_its_adapters_turn_within_a_bound(name: str, tp_size: int) -> None:
    """Flood on one adapter, one place: without turns the light client waits for the whole flood."""
    for patience_s in (0.5, 2.0):
        walk, light, sent = flood_and_light(name, lora_patience_s=patience_s, tp_size=tp_size)
        if name == "shortest-predicted":
            assert light in walk.ended
            continue
        assert walk.first[light] - sent <= patience_s / STEP_S + 49 + 4  # those that ran end first
        assert max(walk.ended.values()) < 300 / 16 * 41 + 110  # one batch is drained
    walk, light, sent = flood_and_light(name, lora_patience_s=86_400, tp_size=tp_size)
    assert walk.first[light] - sent > 600


def flood_and_light(name: str, **options: Any) -> tuple[Walk, Req, int]:
    walk = Walk(name, max_loras=1, **options)
    for n in range(300):
        walk.send("flood", 30 + n % 20, "a")
    walk.step(10)
    light = walk.send("light", 5, "b")
    sent = walk.num_steps
    walk.finish(3000)
    return walk, light, sent


@pytest.mark.parametrize("max_loras", [1, 2])
def test_clients_on_three_adapters_share(max_loras: int) -> None:
    walk = Walk(max_loras=max_loras, lora_patience_s=0.5)
    for n in range(450):
        walk.send(f"client-{n % 3}", 20, "abc"[n % 3])
    walk.step(420)
    ended = Counter(req.lora_id for req in walk.ended)
    assert len(ended) == 3
    assert min(ended.values()) > 0.4 * max(ended.values()), ended
    walk.finish(3000)


def test_adapters_of_one_client_are_not_drained_for_each_other() -> None:
    steps = {}
    for patience_s in (0.1, 86_400):
        walk = Walk(max_loras=1, lora_patience_s=patience_s)
        for n in range(160):
            walk.send("one", 20, "ab"[n % 2])
        walk.finish(3000)
        steps[patience_s] = walk.num_steps
    assert steps[0.1] <= steps[86_400] + 21


def test_once_the_hook_is_off_no_adapter_is_drained() -> None:
    walk = Walk(max_loras=1, lora_patience_s=0.1)
    for n in range(40):
        walk.send("flood", 25 + n % 16, "a")
    walk.step(5)
    walk.send("light", 5, "b")
    walk.step(26)  # the first batch ends
    assert walk.ours.skips.turns.draining is not None
    walk.ours.guard.fail(RuntimeError("as if"), "ordering the queue")
    walk.step(60)
    assert len(walk.ended) > 30
    while walk.running or walk.scheduler.waiting_queue:
        walk.step()


sent = st.tuples(st.sampled_from("pqr"), st.integers(1, 30), st.sampled_from([None, "a", "b", "c"]), st.booleans())
events = st.lists(st.one_of(sent, st.integers(1, 12), st.sampled_from(["fetched", "retract", "give_up"])), max_size=60)


@settings(max_examples=60, deadline=None)
@given(steps=events, name=st.sampled_from(compat.POLICIES), max_loras=st.sampled_from([None, 1, 2]))
def test_ranks_with_other_clocks_agree_and_all_is_served(steps: list[Any], name: str, max_loras: int | None) -> None:
    ticks = itertools.count()
    seen = []
    for rank, clock in enumerate((lambda: 0.0, lambda: next(ticks) * 7.3)):
        walk = Walk(name, slots=3, max_loras=max_loras, clock=clock, lora_patience_s=0.1, tp_size=2, rank=rank)
        reqs, num_given_up = [], 0
        for event in steps:
            if isinstance(event, tuple):
                reqs.append(walk.send(*event[:3], blocked=event[3]))
            elif isinstance(event, int):
                walk.step(event)
            elif event == "fetched":
                walk.blocked.clear()
            elif event == "retract":
                walk.retract()
            else:
                num_given_up += bool(walk.scheduler.waiting_queue)
                walk.give_up()
        walk.blocked.clear()
        walk.finish(3000)
        assert len(walk.ended) == len(reqs) - num_given_up
        seen.append([reqs.index(req) for req in walk.admitted])
    assert seen[0] == seen[1]
