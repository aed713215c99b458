"""Workloads and predictions: the same for a seed, as often and as long as they say, and no truth where none belongs."""

from __future__ import annotations

import json
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope.errors import ConfigError, DataError
from mope.metrics import ranking
from mope.serving_hooks.replay.predictions import PACKAGED_TAU, predict, residual_sigma
from mope.serving_hooks.replay.workloads import (
    CHAT_RESPONSE,
    WORKLOADS,
    Arrival,
    Client,
    Phase,
    Size,
    find,
    read_trace,
)

NAMES = list(WORKLOADS)


def client(*phases: Phase) -> Client:
    return Client(name="c", phases=phases, prompt=Size(10), response=Size(10))


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_is_the_same_for_its_seed_and_another_for_another(name: str) -> None:
    workload = WORKLOADS[name]
    assert workload.requests(3) == workload.requests(3)
    assert workload.requests(3) != workload.requests(4)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_requests_come_as_the_rate_says(name: str) -> None:
    workload = WORKLOADS[name]
    expected = workload.rate * workload.duration
    found = [len(workload.requests(seed)) for seed in range(4)]
    spread = 4 * np.sqrt(expected / 4) if workload.poisson else len(workload.clients)
    assert abs(np.mean(found) - expected) <= spread


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_requests", "rate"), [(None, None), (300, None), (None, 7.0), (300, 7.0)])
def test_requests_come_in_order_within_the_stated_time(name: str, num_requests: int | None, rate: float | None) -> None:
    workload = WORKLOADS[name]
    arrivals = workload.requests(0, num_requests=num_requests, rate=rate)
    times = [arrival.arrival_s for arrival in arrivals]
    assert times == sorted(times)
    duration_s = workload.duration_s(num_requests=num_requests, rate=rate)
    assert times[0] >= 0
    assert times[-1] <= duration_s
    if num_requests is not None:
        assert len(arrivals) == pytest.approx(num_requests, rel=0.25, abs=30)
    if rate is not None:
        assert len(arrivals) / duration_s == pytest.approx(rate, rel=0.25)


def test_a_rate_stretches_times_and_leaves_the_rest_alone() -> None:
    workload = WORKLOADS["vtc-increase"]
    plain, stretched = workload.requests(1), workload.requests(1, rate=workload.rate / 2)
    assert [2 * arrival.arrival_s for arrival in plain] == pytest.approx([arrival.arrival_s for arrival in stretched])
    assert [arrival[1:] for arrival in plain] == [arrival[1:] for arrival in stretched]


def test_evenly_spaced_requests_are_one_over_the_rate_apart() -> None:
    times = client(Phase.steady(4.0)).times(10.0, np.random.default_rng(0), poisson=False)
    assert len(times) == 40
    assert np.diff(times) == pytest.approx(0.25)


def test_a_client_that_is_off_sends_nothing() -> None:
    toggling = client(Phase.steady(20.0), Phase.steady(0.0), Phase.steady(20.0))
    for poisson in (False, True):
        times = toggling.times(30.0, np.random.default_rng(1), poisson=poisson)
        assert not any(10 < time < 20 for time in times)
        assert sum(time <= 10 for time in times) > 100
        assert sum(time >= 20 for time in times) > 100


def test_a_rising_rate_rises_evenly() -> None:
    times = client(Phase(1.0, 0.0, 100.0)).times(20.0, np.random.default_rng(0), poisson=False)
    assert len(times) == pytest.approx(1000, abs=1)
    assert sum(time < 10 for time in times) == pytest.approx(250, abs=2)  # a quarter of the area under the ramp


def test_poisson_arrivals_have_the_spacing_of_a_poisson_process() -> None:
    gaps = np.diff(client(Phase.steady(50.0)).times(200.0, np.random.default_rng(2), poisson=True))
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.05)  # as large as the mean; 0 if they were evenly spaced


@given(
    st.floats(1, 500), st.floats(0, 2), st.integers(1, 50), st.integers(60, 4000), st.integers(0, 2**32 - 1)
)  # fmt: skip
@settings(max_examples=50)
def test_lengths_stay_within_their_limits(median: float, spread: float, least: int, most: int, seed: int) -> None:
    drawn = Size(median, spread, least, most).draw(np.random.default_rng(seed), 50)
    assert all(least <= length <= most for length in drawn)


def test_vtc_suites_are_those_of_the_artifact() -> None:
    rates = {name: [c.mean_rate for c in WORKLOADS[f"vtc-{name}"].clients] for name in ("overload", "on-off-less")}
    assert rates == {"overload": [1.5, 3], "on-off-less": [0.25, 2]}  # on half of the time
    assert WORKLOADS["vtc-increase"].clients[1].mean_rate == pytest.approx(1.1)
    shifting = WORKLOADS["vtc-dist-shift"].clients
    assert [c.mean_rate for c in shifting] == pytest.approx([(0.3 + 1 + 0.5) / 3, 1.5])
    long_prompts, long_answers = WORKLOADS["vtc-poisson-short-long-2"].clients
    assert (long_prompts.prompt.median, long_prompts.response.median) == (512, 32)
    assert (long_answers.prompt.median, long_answers.response.median) == (32, 512)
    assert WORKLOADS["vtc-overload-weighted"].weights == {"client-1": 2.0, "client-2": 3.0, "client-3": 4.0}


def test_the_twenty_seven_have_heavy_tails_and_adapters_of_their_own() -> None:
    counts: dict[str, int] = {}
    for arrival in WORKLOADS["27-adapters"].requests(0):
        counts[arrival.client] = counts.get(arrival.client, 0) + 1
        assert arrival.adapter == arrival.client.replace("client", "adapter")
    assert len(counts) == 27
    assert counts["client-01"] > 15 * counts["client-27"]


def test_chat_lengths_are_near_those_that_they_stand_for() -> None:
    lengths = np.array(CHAT_RESPONSE.draw(np.random.default_rng(0), 20_000))
    shares = [np.mean(lengths < edge) for edge in (121.5, 268.5, 570.5)]
    assert shares == pytest.approx([0.255, 0.557, 0.915], abs=0.08)
    assert np.abs(lengths - np.median(lengths)).mean() == pytest.approx(153.2, rel=0.03)


def test_an_unknown_workload_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'two-clients'"):
        find("two-client")
    with pytest.raises(ConfigError, match="--trace FILE"):
        find("trace")


def test_traces_are_read_as_lines_and_as_a_list(tmp_path: Path) -> None:
    rows = [
        {"arrival_s": 12.5, "client": "b", "prompt_tokens": 20, "response_tokens": 7, "adapter": "x"},
        {"arrival_s": 10, "client": "a", "prompt_tokens": 10, "response_tokens": 5},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    lines, whole = read_trace(tmp_path / "lines.jsonl"), find("trace", tmp_path / "list.json")
    assert lines.requests(0) == whole.requests(0) == [Arrival(0.0, "a", 10, 5), Arrival(2.5, "b", 20, 7, "x")]
    assert lines.names == ["a", "b"]
    assert lines.requests(0, num_requests=1) == [Arrival(0.0, "a", 10, 5)]
    assert lines.rate == pytest.approx(0.4)  # 2.5 s apart
    assert [arrival.arrival_s for arrival in lines.requests(0, rate=0.8)] == pytest.approx([0, 1.25])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"arrival_s": -1, "client": "a", "prompt_tokens": 1, "response_tokens": 1}, "arrival_s is -1"),
        ({"arrival_s": 0, "client": "a", "prompt_tokens": 0, "response_tokens": 1}, "prompt_tokens is 0"),
        ({"arrival_s": 0, "client": "a", "prompt_tokens": 1, "response_tokens": True}, "response_tokens is True"),
        ({"arrival_s": 0, "client": "a", "prompt_tokens": 1}, "response_tokens is None"),
        ({"arrival_s": float("nan"), "client": "a", "prompt_tokens": 1, "response_tokens": 1}, "arrival_s is nan"),
        ({"arrival_s": 0, "client": "", "prompt_tokens": 1, "response_tokens": 1}, "client is ''"),
        ({"arrival_s": 0, "client": "a", "prompt_tokens": 1, "response_tokens": 1, "adapter": 3}, "adapter is 3"),
        ([1], r"got '\[1\]'; expected an object"),
    ],
)
def test_a_row_that_is_no_request_is_named(tmp_path: Path, row: object, complaint: str) -> None:
    good = {"arrival_s": 0, "client": "a", "prompt_tokens": 1, "response_tokens": 1}
    (tmp_path / "trace.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=f"request 2: {complaint}"):
        read_trace(tmp_path / "trace.jsonl")


def test_a_trace_without_requests_or_without_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no request"):
        read_trace(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(DataError, match="neither JSON Lines nor"):
        read_trace(tmp_path / "broken.jsonl")


def chats(number: int) -> list[Arrival]:
    lengths = Size(CHAT_RESPONSE.median, CHAT_RESPONSE.spread, most=100_000).draw(np.random.default_rng(5), number)
    return [Arrival(0.0, "a", 10, length) for length in lengths]


@pytest.mark.parametrize(("tau", "mae"), [(PACKAGED_TAU, 95.5), (0.456, 120.3)])
def test_noisy_predictions_are_as_good_as_the_packaged_predictor(tau: float, mae: float) -> None:
    arrivals = chats(6000)
    actual = np.array([arrival.response_tokens for arrival in arrivals], dtype=float)
    means = np.array(predict(arrivals, "noisy", seed=1, cap=100_000, tau=tau), dtype=float)
    medians = means / exp(residual_sigma(tau) ** 2 / 2)
    assert ranking(actual, means) == pytest.approx(tau, abs=0.02)
    assert np.abs(actual - medians).mean() == pytest.approx(mae, rel=0.1)
    assert np.log(actual / medians).std() == pytest.approx(residual_sigma(tau), rel=0.05)
    assert means.mean() == pytest.approx(actual.mean(), rel=0.05)  # a mean, so right on average


def test_a_perfect_noisy_predictor_is_the_oracle_and_a_useless_one_says_the_same_to_all() -> None:
    arrivals = chats(200)
    truth = [float(arrival.response_tokens) for arrival in arrivals]
    assert predict(arrivals, "oracle", seed=0, cap=100_000) == truth
    assert predict(arrivals, "noisy", seed=0, cap=100_000, tau=1.0) == pytest.approx(truth)
    useless = predict(arrivals, "noisy", seed=0, cap=100_000, tau=0.0)
    assert len(set(useless)) == 1
    assert log(float(useless[0] or 0)) == pytest.approx(log(CHAT_RESPONSE.median) + CHAT_RESPONSE.spread**2 / 2)


def test_nobody_predicts_beyond_the_cap_and_none_says_nothing() -> None:
    arrivals = chats(200)
    for prediction in ("oracle", "noisy"):
        assert max(float(tokens or 0) for tokens in predict(arrivals, prediction, seed=0, cap=64)) <= 64
    assert predict(arrivals, "none", seed=0, cap=64) == [None] * 200
