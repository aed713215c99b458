"""The replay's clock, its loop and what is made of it, reckoned by hand on a toy scheduler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from mope import cli
from mope.errors import ConfigError, MissingExtraError
from mope.fairness import load_profile
from mope.fairness.profiles import Errors, FittedProfile, Measured
from mope.serving_hooks.replay import engine_vllm, metrics
from mope.serving_hooks.replay.clock import StepClock
from mope.serving_hooks.replay.compare import compare, offered, variants
from mope.serving_hooks.replay.config import ReplayConfig
from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.run import Outcome, Record, replay
from mope.serving_hooks.replay.workloads import WORKLOADS, Arrival

PROFILE = "a100-80gb/llama-2-7b"
ROOFLINE = StepClock(load_profile(PROFILE))


@pytest.fixture
def clock() -> StepClock:
    return ROOFLINE


def toy(**given_settings: int) -> ToyEngine:
    return ToyEngine(EngineSettings(**given_settings), kv_tokens=0, max_model_len=0)


def run(arrivals: Sequence[Arrival], clock: StepClock, batches_in_flight: int = 1, **given_settings: int) -> Outcome:
    engine = toy(**given_settings)
    return replay(engine, arrivals, [None] * len(arrivals), clock, batches_in_flight=batches_in_flight)


# -- the clock


def test_a_step_of_the_roofline_is_memory_or_arithmetic_and_overhead(clock: StepClock) -> None:
    bandwidth, flops = 2.039e12 * 0.8, 312e12 * 0.55
    parameters = load_profile(PROFILE).llm.parameters  # type: ignore[union-attr]
    weights_s, context_s = 2 * parameters / bandwidth, 2 * 32 * 32 * 128 * 2 / bandwidth
    assert clock.step_s(4, 1000, 0, 0) == pytest.approx(weights_s + 1000 * context_s + 1.5e-3)
    attention = 4 * 32 * 32 * 128 * 2048 / flops
    assert clock.step_s(0, 0, 2048, 2048) == pytest.approx(2 * parameters * 2048 / flops + attention + 1.5e-3)
    assert clock.step_s(0, 0, 0, 0) == 0


@given(st.integers(1, 256), st.integers(0, 100_000), st.integers(1, 2048), st.integers(0, 10_000))
@settings(max_examples=100)
def test_a_prompt_beside_decodes_costs_no_more_than_both_alone(
    decodes: int, context: int, prompt: int, before: int
) -> None:
    together = ROOFLINE.step_s(decodes, context, prompt, before + prompt)
    apart = ROOFLINE.step_s(decodes, context, 0, 0), ROOFLINE.step_s(0, 0, prompt, before + prompt)
    assert max(apart) <= together * (1 + 1e-12)
    assert together <= sum(apart) * (1 + 1e-12)


def fitted() -> FittedProfile:
    errors = Errors(num_measurements=1, median=0, p90=0)
    measured = Measured(
        url="http://localhost", server="", llm="x", date="2026-11-26", command="", machine="", complete=True,
        num_prefills=9, num_steps=9, prompt_tokens=(1, 9), num_running=(1, 9), context_tokens=(1, 9),
        prefill_errors=errors, step_errors=errors,
    )  # fmt: skip
    return FittedProfile(
        name="x", step_fixed_s=1.0, step_request_s=0.1, step_context_s=0.01, prefill_fixed_s=2.0, prefill_token_s=0.5,
        prefill_square_s=0.0, saturated_requests=8, saturated_tokens_per_s=100.0, measured=measured,
    )  # fmt: skip


def test_a_fitted_profile_adds_what_it_measured() -> None:
    measured = StepClock(fitted())
    per_prompt_token = fitted().costs().prompt_token_s
    assert measured.step_s(2, 10, 0, 0) == pytest.approx(1.0 + 0.2 + 0.1)
    assert measured.step_s(2, 10, 4, 4) == pytest.approx(1.3 + 4 * per_prompt_token)
    assert measured.step_s(0, 0, 4, 4) == pytest.approx(fitted().costs().prefill_s(4))


def test_capacity_is_where_a_queue_neither_grows_nor_drains(clock: StepClock) -> None:
    """At 0.7 of the stated capacity requests hardly wait, at 1.4 most of them do."""
    capacity = clock.capacity(200, 40, max_num_seqs=16, kv_tokens=10**6)
    waits = []
    for load in (0.7, 1.4):
        generator = np.random.default_rng(0)
        times = np.cumsum(generator.exponential(1 / (load * capacity), size=600))
        outcome = run([Arrival(float(time), "a", 200, 40) for time in times], clock, max_num_seqs=16)
        waits.append(np.mean([one.admitted_s - one.arrival.arrival_s for one in outcome.records]))
    idle_s = clock.idle_latency_s(200, 40)
    assert waits[0] < 0.5 * idle_s
    assert waits[1] > 4 * idle_s


# -- the loop


def test_one_request_takes_its_prefill_and_a_step_for_each_further_token(clock: StepClock) -> None:
    outcome = run([Arrival(5.0, "a", 100, 4)], clock)
    (record,) = outcome.records
    first = 5.0 + clock.step_s(0, 0, 100, 100)
    assert record.admitted_s == 5.0
    assert record.first_token_s == pytest.approx(first)
    assert record.finish_s == pytest.approx(first + sum(clock.step_s(1, 100 + token, 0, 0) for token in (1, 2, 3)))
    assert (record.response_tokens, outcome.num_batches) == (4, 4)
    assert outcome.busy_s == pytest.approx(record.finish_s - 5.0)


def test_with_two_batches_in_flight_the_end_is_seen_a_batch_late(clock: StepClock) -> None:
    arrivals = [Arrival(0.0, "a", 100, 3), Arrival(0.001, "b", 50, 3)]
    one, two = run(arrivals, clock, 1, max_num_seqs=1), run(arrivals, clock, 2, max_num_seqs=1)
    assert [record.response_tokens for record in two.records] == [3, 3]
    assert two.num_batches == one.num_batches + 2  # one more for each request: its place is held until its end is seen
    assert two.records[0].finish_s == pytest.approx(one.records[0].finish_s)
    assert two.records[1].first_token_s > one.records[1].first_token_s


def test_an_arrival_during_a_batch_waits_until_it_is_done(clock: StepClock) -> None:
    step_s = clock.step_s(0, 0, 100, 100)
    outcome = run([Arrival(0.0, "a", 100, 5), Arrival(step_s / 2, "b", 10, 5)], clock)
    assert outcome.records[1].admitted_s == pytest.approx(step_s)


def test_the_scheduler_is_told_nothing_of_true_lengths(clock: StepClock) -> None:
    """Two runs that differ in true lengths alone tell the engine the same, until the first answer ends."""
    told = []
    for length in (50, 400):
        engine = toy(max_num_seqs=2)
        arrivals = [Arrival(0.01 * number, f"client-{number % 2}", 64, length) for number in range(6)]
        replay(engine, arrivals, [None, 7.0, None, 9.5, None, None], clock)
        told.append(engine.told)
    assert told[0] == told[1]
    assert [carried.tokens for _, _, carried, _, _ in told[0]] == [None, 7.0, None, 9.5, None, None]


def test_an_answer_is_cut_at_the_cap(clock: StepClock) -> None:
    outcome = run([Arrival(0.0, "a", 10, 50)], clock, max_tokens=8)
    assert outcome.records[0].response_tokens == 8


def test_a_request_that_lost_its_place_counts_what_is_computed_again(clock: StepClock) -> None:
    from mope.serving_hooks.replay.engine import Batch, Work
    from mope.serving_hooks.replay.run import _book

    record = Record(Arrival(0.0, "a", 100, 50), None)
    for computed, tokens in ((0, 60), (60, 40), (100, 1), (101, 1), (0, 102), (102, 1)):
        _book(Batch([Work("0", computed, tokens, True)], None), {"0": record}, 1.0, clock)
    assert (record.num_preemptions, record.recomputed_tokens, record.computed) == (1, 102, 103)


def test_a_scheduler_that_stands_still_is_a_bug_that_is_told(clock: StepClock) -> None:
    engine = toy()
    engine.schedule = lambda: type(ToyEngine.schedule(toy()))([], None)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="toy 1 has requests and schedules none"):
        replay(engine, [Arrival(0.0, "a", 10, 5)], [None], clock)


# -- the figures


def record(client: str, arrival: float, first: float, finish: float, prompt: int = 10, response: int = 10) -> Record:
    return Record(Arrival(arrival, client, prompt, response), None, first, first, finish, response)


def test_service_is_spread_evenly_from_first_to_last_token() -> None:
    found = metrics.served([record("a", 0, 2, 6), record("b", 0, 5, 5, 3, 1)], ["a", "b"], {"b": 2.0})
    assert found.service_N.tolist() == [30, 2.5]  # 10 + 2 * 10, and (3 + 2 * 1) / 2
    service_CT = metrics.delivered(found, [0, 2, 3, 5, 6, 9])
    assert service_CT[0].tolist() == [0, 0, 7.5, 22.5, 30, 30]
    assert service_CT[1][[0, 2, 4]].tolist() == [0, 0, 2.5]


def test_differences_of_service_by_hand() -> None:
    """Client a has 20 weighted tokens a second all along, b asks for 2 a second and has 4 until 50, then none."""
    a = record("a", 0, 0, 100, 0, 1000)
    slow = [record("b", second + 0.5, 0, 50, 0, 1) for second in range(100)]
    found = metrics.served([a, *slow], ["a", "b"], {})
    accumulated = metrics.accumulated_difference(found, 100)
    assert accumulated[-1] == pytest.approx(2000 - 200)
    assert accumulated[99] == pytest.approx(1000 - 200)  # at 50
    window = metrics.windowed_difference(found, 100)
    assert len(window) == 19
    assert window[0] == pytest.approx(0.0)  # b had all that it asked for and more: 4 a second against 2
    assert window[-1] == pytest.approx(2.0)  # what it asked for, not what a had


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_jain_is_between_one_over_n_and_one(amounts: list[float]) -> None:
    found = metrics.jain(amounts)
    assert 1 / len(amounts) - 1e-9 <= found <= 1 + 1e-9


def test_jain_by_hand() -> None:
    assert metrics.jain([3, 3, 3]) == pytest.approx(1)
    assert metrics.jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert metrics.jain([1, 3]) == pytest.approx(16 / 20)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(0, 1))
def test_max_min_gives_all_away_and_nobody_less_than_another_who_asked_as_much(
    demands: list[float], share: float
) -> None:
    total = share * sum(demands)
    shares = metrics.max_min_shares(demands, total)
    assert shares.sum() == pytest.approx(total, abs=1e-6)
    assert np.all(shares <= np.array(demands) + 1e-6)
    hungry = [given for given, wanted in zip(shares, demands, strict=True) if given < wanted - 1e-6]
    assert not hungry or min(hungry) >= max(shares) - 1e-6 * max(1.0, total)


def test_figures_of_a_replay_are_those_of_its_records(clock: StepClock) -> None:
    arrivals = sorted(Arrival(0.02 * number, "ab"[number % 2], 100, 5 + number) for number in range(40))
    outcome = run(arrivals, clock, max_num_seqs=4)
    found = metrics.measure(outcome, ["b", "a", "absent"], {}, 0.8, clock)
    assert list(found["clients"]) == ["b", "a"]
    waits = [one.first_token_s - one.arrival.arrival_s for one in outcome.records]
    assert found["ttft_mean_s"] == pytest.approx(np.mean(waits))
    assert found["ttft_p99_s"] == pytest.approx(np.quantile(waits, 0.99))
    assert found["clients"]["a"]["ttft_mean_s"] == pytest.approx(np.mean(waits[::2]))
    assert found["response_tokens_per_s"] == pytest.approx(sum(range(5, 45)) / outcome.end_s)
    assert found["queue_mean_s"] < found["ttft_mean_s"] < found["e2e_mean_s"]
    assert found["slowdown_mean"] >= 1
    assert found["num_preemptions"] == found["recomputed_share"] == 0
    assert json.dumps(found, allow_nan=False)


def test_a_client_alone_is_served_fairly_and_without_slowdown(clock: StepClock) -> None:
    outcome = run([Arrival(float(number), "a", 100, 20) for number in range(5)], clock)
    found = metrics.measure(outcome, ["a"], {}, 5.0, clock)
    assert (found["jain_entitled"], found["jain_slowdown"], found["window_difference_max"]) == (1, 1, 0)
    assert found["slowdown_mean"] == pytest.approx(1.0, rel=0.1)


def test_intervals_over_seeds_are_students() -> None:
    found = metrics.over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["half_width"] == pytest.approx(4.303 / np.sqrt(3))
    assert metrics.over_seeds([5.0]) == {"mean": 5.0, "half_width": 0.0}
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        interval = metrics.over_seeds(list(generator.standard_normal(5)))
        covered += abs(interval["mean"]) <= interval["half_width"]
    assert 930 <= covered <= 970  # 95 %, give or take three standard deviations


# -- all of it


def test_policies_that_ask_for_no_prediction_run_once() -> None:
    config = ReplayConfig(policies=("fcfs", "vtc", "equinox", "fcfs"), predictions=("none", "oracle"))
    assert [row.name for row in variants(config)] == ["fcfs", "vtc", "equinox, none", "equinox, oracle"]


def compared(**choices: Any) -> Any:
    config = ReplayConfig(**{"workload": ("two-clients",), "policies": ("fcfs", "vtc"), "seeds": 2, **choices})
    (found,) = compare(config, EngineSettings(max_num_seqs=32), {"profile": PROFILE}, ToyEngine)
    return found


def test_a_scheduler_that_puts_the_light_client_first_is_seen_to_do_so() -> None:
    """The toy takes any scheduler but the engine's own as a sign to serve `light` first."""
    found = compared(requests=300, policies=("engine", "vtc"))
    summary = found.summary()
    assert list(summary) == ["engine", "vtc"]
    fair, unfair = (summary[name]["clients"]["light"]["ttft_mean_s"]["mean"] for name in ("vtc", "engine"))
    assert fair < 0.2 * unfair
    assert summary["vtc"]["jain_entitled"]["mean"] > summary["engine"]["jain_entitled"]["mean"]
    assert found.differences()["vtc"]["window_difference_mean"]["mean"] < 0
    assert found.load == 2.0


def test_all_policies_see_the_same_requests_and_predictions() -> None:
    found = compared(policies=("equinox", "shortest-predicted"), requests=50, seeds=1)
    one, other = (
        [(record.arrival, record.predicted) for record in outcome.records] for outcome in found.outcomes.values()
    )
    assert one == other
    assert len({predicted for _, predicted in one}) > 30


def test_vtcs_suites_are_as_loaded_as_on_vtcs_engine(clock: StepClock) -> None:
    """4.5 requests/s of 256 + 256 tokens are about twice what S-LoRA serves on an A10G with 10,000 tokens."""
    config, engine = ReplayConfig(), EngineSettings()
    rate, load = offered(WORKLOADS["vtc-overload"], config, engine, clock, 100_000)
    assert 1.5 < load < 2.5
    assert rate == pytest.approx(load * clock.capacity(256, 256, max_num_seqs=256, kv_tokens=100_000))
    assert offered(WORKLOADS["vtc-overload"], ReplayConfig(load=1.0), engine, clock, 100_000)[1] == 1.0


def test_the_command_prints_a_table_and_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_vllm, "VllmEngine", ToyEngine)
    monkeypatch.setattr(engine_vllm, "load_vllm", lambda: None)
    command = ["replay", "--requests", "60", "--seeds", "2", "--policies", "fcfs,vtc"]
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "two-clients: one floods" in printed
    assert "light TTFT" in printed
    files = sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file())
    pictures = ["two-clients-service.png", "two-clients-ttft.png"]
    assert files == ["replay.json", "replay.md", "requests.csv", *pictures]
    text = (tmp_path / "out" / "replay.json").read_text()
    assert str(tmp_path) not in text
    (shown,) = json.loads(text)["workloads"]
    assert [len(runs) for runs in shown["runs"].values()] == [2, 2]
    lines = (tmp_path / "out" / "requests.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * shown["runs"]["fcfs"][0]["num_requests"]
    assert "two-clients, by client" in (tmp_path / "out" / "replay.md").read_text()


def test_the_command_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine_vllm, "VllmEngine", ToyEngine)
    monkeypatch.setattr(engine_vllm, "load_vllm", lambda: None)
    command = ["replay", "--requests", "40", "--seeds", "1", "--policies", "fcfs", "--json"]
    assert cli.main([*command, "--workload", "two-clients,27-adapters"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [shown["name"] for shown in found["workloads"]] == ["two-clients", "27-adapters"]
    assert len(found["workloads"][1]["variants"]["fcfs"]["clients"]) > 4


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--workload", "two-client"], "did you mean 'two-clients'"),
        (["--policies", "fifo"], "--policies"),
        (["--predictions", "psychic"], "--predictions"),
        (["--profile", "abacus/llama-2-7b"], "no hardware 'abacus'"),
        (["--batches-in-flight", "3"], "--batches-in-flight"),
        (["--workload", "trace"], "--trace FILE"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    flags: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_vllm, "load_vllm", lambda: None)
    assert cli.main(["replay", *flags]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_vllm, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install vllm"):
        engine_vllm.load_vllm()


@pytest.mark.parametrize("name", ["nonsense", "no_such_module.Thing", "json.no_such_thing", "json.__name__"])
def test_a_scheduler_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="--scheduler"):
        engine_vllm._callable(name)
