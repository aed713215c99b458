"""The replay on vLLM's real scheduler, of whichever release is installed; `releases.py` runs this file on many."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from toy_engine import ToyEngine

from mope.errors import ConfigError
from mope.fairness import load_profile
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.replay.clock import StepClock
from mope.serving_hooks.replay.compare import QUIET, compare
from mope.serving_hooks.replay.config import HOOK, ReplayConfig
from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.engine_vllm import VllmEngine
from mope.serving_hooks.replay.metrics import measure
from mope.serving_hooks.replay.predictions import predict
from mope.serving_hooks.replay.run import Outcome, replay
from mope.serving_hooks.replay.workloads import WORKLOADS, Arrival

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed; tests/engines/releases.py fetches it and runs this file"
)
PROFILE = "a100-80gb/llama-2-7b"
CLOCK = StepClock(load_profile(PROFILE))
DEPTHS = pytest.mark.parametrize("batches_in_flight", [1, 2])


def build(*, kv_tokens: int = 100_000, max_model_len: int = 4096, **more: Any) -> VllmEngine:
    places = {name: more.pop(name) for name in ("adapters", "scheduler", "options") if name in more}
    return VllmEngine(EngineSettings(**more), kv_tokens=kv_tokens, max_model_len=max_model_len, **places)


def run(engine: Any, arrivals: list[Arrival], batches_in_flight: int) -> Outcome:
    return replay(engine, arrivals, [None] * len(arrivals), CLOCK, batches_in_flight=batches_in_flight)


def chats(number: int, rate: float = 40.0, seed: int = 0) -> list[Arrival]:
    return WORKLOADS["two-clients"].requests(seed, num_requests=number, rate=rate)


def prefer_light(**arguments: Any) -> Any:
    """A factory like the one that vLLM would be given: its own scheduler, but `light` goes first."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler

    class LightFirst(FCFSRequestQueue):
        def add_request(self, request: Any) -> None:
            if Carried.read(request.sampling_params.extra_args).client == "light":
                self.prepend_request(request)
            else:
                super().add_request(request)

    is_async = arguments["vllm_config"].scheduler_config.async_scheduling
    scheduler: Any = (AsyncScheduler if is_async else Scheduler)(**arguments)
    assert scheduler.vllm_config.additional_config in ({}, {"mope": {"policy": "vtc"}})
    scheduler.waiting = LightFirst()
    return scheduler


def test_the_release_is_the_one_that_was_asked_for() -> None:
    expected = os.environ.get("MOPE_EXPECT_VLLM")
    version = build().version.removeprefix("vllm ")
    assert expected is None or version.startswith(expected)


@DEPTHS
def test_without_scarcity_vllm_does_what_can_be_reckoned_by_hand(batches_in_flight: int) -> None:
    """In order of arrival, with short prompts and memory for all, nothing is left to choose: times are the toy's."""
    generator = np.random.default_rng(0)
    times = np.cumsum(generator.exponential(0.02, size=80))
    arrivals = [
        Arrival(float(time), "a", int(prompt), int(response))
        for time, prompt, response in zip(
            times, generator.integers(2, 60, 80), generator.integers(1, 60, 80), strict=True
        )
    ]
    real = run(build(max_num_seqs=16), arrivals, batches_in_flight)
    toy = run(
        ToyEngine(EngineSettings(max_num_seqs=16), kv_tokens=0, max_model_len=0), arrivals, batches_in_flight
    )  # fmt: skip
    assert real.num_batches == toy.num_batches
    for one, other in zip(real.records, toy.records, strict=True):
        assert one.response_tokens == one.arrival.response_tokens
        assert (one.admitted_s, one.first_token_s, one.finish_s) == pytest.approx(
            (other.admitted_s, other.first_token_s, other.finish_s)
        )


@DEPTHS
def test_scarce_memory_preempts_and_every_answer_is_still_whole(batches_in_flight: int) -> None:
    arrivals = chats(120)
    scarce = run(build(kv_tokens=8192, max_num_seqs=64), arrivals, batches_in_flight)
    ample = run(build(kv_tokens=200_000, max_num_seqs=64), arrivals, batches_in_flight)
    for outcome in (scarce, ample):
        assert [one.response_tokens for one in outcome.records] == [
            min(one.arrival.response_tokens, 2048) for one in outcome.records
        ]
    assert sum(one.num_preemptions for one in ample.records) == 0
    preempted = [one for one in scarce.records if one.num_preemptions]
    assert len(preempted) > 5
    assert all(one.recomputed_tokens > 0 for one in preempted)
    assert scarce.end_s > ample.end_s


@DEPTHS
def test_the_same_replay_twice_is_the_same(batches_in_flight: int) -> None:
    arrivals = chats(60)
    found = [
        measure(run(build(kv_tokens=16_384), arrivals, batches_in_flight), ["flood", "light"], {}, 2.0, CLOCK)
        for _ in range(2)
    ]
    for one in found:
        one.pop("cpu_s")
    assert found[0] == found[1]


@DEPTHS
def test_long_prompts_are_taken_up_in_pieces_beside_decodes(batches_in_flight: int) -> None:
    engine = build(max_num_batched_tokens=512)
    engine.add("short", 10, Carried(), 0.0, None)
    pieces = []
    for _ in range(3):
        batch = engine.schedule()
        engine.deliver(batch, lambda *_: False)
    engine.add("long", 1500, Carried(), 0.0, None)
    for _ in range(4):
        batch = engine.schedule()
        pieces += [(one.computed, one.tokens, one.samples) for one in batch.work if one.request_id == "long"]
        assert any(one.request_id == "short" and one.tokens == 1 and one.samples for one in batch.work)
        engine.deliver(batch, lambda *_: False)
    assert pieces == [(0, 511, False), (511, 511, False), (1022, 478, True), (1500, 1, True)]


def test_the_scheduler_is_told_the_cap_and_what_is_carried_and_no_true_length(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = build(max_tokens=700), []
    add = engine.scheduler.add_request
    monkeypatch.setattr(engine.scheduler, "add_request", lambda request: (seen.append(request), add(request)))
    arrivals = [Arrival(0.0, "a", 10, 3), Arrival(0.0, "a", 10, 300)]
    replay(engine, arrivals, [None, 41.5], CLOCK)
    first, second = (request.sampling_params for request in seen)
    assert (first.max_tokens, second.max_tokens, first.min_tokens, second.min_tokens) == (700, 700, 0, 0)
    assert first.extra_args == Carried("a").write()
    assert second.extra_args == Carried("a", 41.5).write()
    assert seen[0].max_tokens == seen[1].max_tokens == 700
    assert seen[0].num_tokens - seen[1].num_tokens == 3 - 300  # only what was generated differs, and only at the end


def test_an_answer_ends_at_the_cap() -> None:
    outcome = run(build(max_tokens=20), [Arrival(0.0, "a", 10, 300)], 1)
    assert outcome.records[0].response_tokens == 20


@DEPTHS
def test_another_scheduler_is_built_as_vllm_builds_it_and_changes_who_waits(batches_in_flight: int) -> None:
    arrivals = chats(250, rate=60.0)
    waits = []
    for scheduler in (None, prefer_light):
        more = {"scheduler": scheduler, "options": {"mope": {"policy": "vtc"}}} if scheduler else {}
        outcome = run(build(max_num_seqs=16, batches_in_flight=batches_in_flight, **more), arrivals, batches_in_flight)
        waits.append(mean_wait(outcome, "light"))
    assert waits[1] < 0.2 * waits[0]


def mean_wait(outcome: Outcome, client: str) -> float:
    waits: Iterable[float] = (
        one.first_token_s - one.arrival.arrival_s for one in outcome.records if one.arrival.client == client
    )
    return float(np.mean(list(waits)))


def test_a_batch_holds_no_more_adapters_than_fit() -> None:
    arrivals = WORKLOADS["27-adapters"].requests(0, num_requests=80, rate=40.0)
    adapters = tuple(sorted({str(arrival.adapter) for arrival in arrivals}))
    engine = build(adapters=adapters, max_loras=3)
    most, schedule = 0, engine.schedule

    def watched() -> Any:
        nonlocal most
        batch = schedule()
        found = {arrivals[int(one.request_id)].adapter for one in batch.work}
        most = max(most, len(found))
        return batch

    engine.schedule = watched  # type: ignore[method-assign]
    outcome = run(engine, arrivals, 1)
    assert most == 3
    assert all(one.response_tokens == min(one.arrival.response_tokens, 2048) for one in outcome.records)


def test_a_cache_smaller_than_one_request_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--kv-tokens"):
        build(kv_tokens=2048)


def test_the_stated_capacity_is_what_vllm_reaches() -> None:
    """A queue that never empties is served at the estimated rate, up to the beginning and the end of the run."""
    (found,) = compare(
        ReplayConfig(workload=("vtc-overload",), requests=400, seeds=1, load=3.0, policies=("engine",)),
        EngineSettings(max_num_seqs=32),
        {"profile": PROFILE},
        VllmEngine,
    )
    (run_,) = found.runs["engine"]
    assert run_["requests_per_s"] == pytest.approx(found.rate / found.load, rel=0.15)


def hooked(policy: str, batches_in_flight: int, *, bypass: int = 8, **more: Any) -> VllmEngine:
    """The scheduler that a server with mope would have."""
    chosen = {"policy": policy, "profile": PROFILE, "bypass": bypass, "on_mismatch": "refuse"}
    options = {"mope": {**QUIET, **chosen}}
    return build(batches_in_flight=batches_in_flight, scheduler=HOOK, options=options, **more)


def times(outcome: Outcome) -> list[tuple[float, float, float]]:
    return [(one.admitted_s, one.first_token_s, one.finish_s) for one in outcome.records]


@DEPTHS
@pytest.mark.parametrize("kv_tokens", [8192, 100_000])
def test_fcfs_through_our_class_is_vllm_to_the_last_token(batches_in_flight: int, kv_tokens: int) -> None:
    """As long as nobody may pass a head that finds no memory, which vLLM never lets happen."""
    arrivals = chats(100)
    own = run(build(kv_tokens=kv_tokens, batches_in_flight=batches_in_flight), arrivals, batches_in_flight)
    ours = run(hooked("fcfs", batches_in_flight, bypass=0, kv_tokens=kv_tokens), arrivals, batches_in_flight)
    assert times(ours) == times(own)


@DEPTHS
@pytest.mark.parametrize("policy", ["vtc", "vtc-predicted", "equinox", "deficit-round-robin"])
def test_a_fair_policy_serves_the_light_client_and_keeps_nothing(policy: str, batches_in_flight: int) -> None:
    arrivals = chats(250, rate=60.0)
    truth = predict(arrivals, "oracle", seed=0, cap=2048)
    engine = hooked(policy, batches_in_flight, max_num_seqs=16, kv_tokens=8192)
    fair = replay(engine, arrivals, truth, CLOCK, batches_in_flight=batches_in_flight)
    own = run(
        build(max_num_seqs=16, kv_tokens=8192, batches_in_flight=batches_in_flight), arrivals, batches_in_flight
    )  # fmt: skip
    assert mean_wait(fair, "light") < 0.35 * mean_wait(own, "light")
    assert [one.response_tokens for one in fair.records] == [one.response_tokens for one in own.records]
    assert engine.scheduler.mope_guard.failure is None
    engine.schedule()  # tells the scheduler what ended last
    assert len(engine.scheduler.mope.policy) == 0
    assert not engine.scheduler.mope.held
