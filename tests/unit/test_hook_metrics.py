"""What Prometheus is told: right, parseable whatever clients are called, and harmless to the scheduler."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from stewards import busy_steward, guard, make_steward, samples, scraped, serve, shown

from mope.fairness.charges import NOTHING, UNIT, Charge
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.front_metrics import FrontCollector, front_collector, spread
from mope.serving_hooks.metrics import COUNTERS, HISTOGRAMS, StewardCollector, buckets, client_label, start
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.steward import Steward
from mope.serving_hooks.tallies import OTHERS, Histogram

ALICE, BOB = (("client", "acme/alice"),), (("client", "bob"),)


def test_each_clients_figures_are_those_that_happened() -> None:
    found = shown(busy_steward())
    assert found["mope_client_arrived_total", ALICE] == 3
    assert found["mope_client_finished_total", ALICE] == 2
    assert found["mope_client_unpredicted_total", ALICE] == 1
    assert found["mope_client_response_tokens_total", ALICE] == 100
    assert found["mope_client_prompt_tokens_total", BOB] == 100
    assert found["mope_client_running", ALICE] == 1
    assert found["mope_client_waiting", ALICE] == 0
    assert found["mope_client_waiting", BOB] == 1
    assert found["mope_client_weight", BOB] == 1
    assert found["mope_client_service_weighted_tokens_total", ALICE] == 100 + 2 * 40 + 100 + 2 * 60
    assert found["mope_client_covered_total", BOB] == 1
    assert found["mope_client_within_total", BOB] == 0  # 200 tokens, with 120 as the 90 % quantile


def test_histograms_count_up_to_each_edge() -> None:
    found = shown(busy_steward())
    assert found["mope_client_ttft_seconds_count", ALICE] == 2
    assert found["mope_client_ttft_seconds_sum", ALICE] == 3.0
    by_edge = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "mope_client_ttft_seconds_bucket" and ALICE[0] in labels
    }
    assert by_edge["1.0"] == 0
    assert by_edge["2.5"] == by_edge["+Inf"] == 2
    assert list(by_edge.values()) == sorted(by_edge.values())


def test_every_figure_has_a_series_for_every_client() -> None:
    found = shown(busy_steward())
    for figure in COUNTERS:
        assert (f"{figure.name}_total", BOB) in found
    for figure in HISTOGRAMS:
        assert (f"{figure.name}_count", BOB) in found


@given(st.lists(st.text(max_size=300), max_size=8))
@settings(max_examples=25, deadline=None)
def test_any_name_of_a_client_can_be_scraped(clients: list[str]) -> None:
    steward = make_steward(policy="vtc-predicted")
    for number, client in enumerate(clients):
        serve(steward, str(number), client, 10)
    found = shown(steward)
    expected = {client_label(client or "(anonymous)") for client in clients}
    assert {dict(labels)["client"] for name, labels in found if name == "mope_client_arrived_total"} == expected
    assert sum(value for (name, _), value in found.items() if name == "mope_client_arrived_total") == len(clients)


def test_names_that_a_label_cannot_tell_apart_are_one_series() -> None:
    steward = make_steward()
    for number, client in enumerate(("a//b", "a/b", "a/b/", "\ud800", "\\ud800")):
        serve(steward, str(number), client, 10)
    found = shown(steward)
    assert found["mope_client_finished_total", (("client", "a/b"),)] == 3
    assert found["mope_client_finished_total", (("client", "\\ud800"),)] == 2
    assert found["mope_client_ttft_seconds_count", (("client", "a/b"),)] == 3


def test_clients_beyond_the_limit_are_counted_together() -> None:
    steward = make_steward(metrics_clients=3, policy="vtc-predicted")
    for number in range(50):
        serve(steward, str(number), f"client-{number}", 10)
    steward.arrive("waits", Carried("client-49"), 10)
    found = shown(steward)
    named = {dict(labels)["client"] for name, labels in found if name.startswith("mope_client_")}
    assert named == {"client-0", "client-1", "client-2", OTHERS}
    assert found["mope_client_finished_total", (("client", OTHERS),)] == 47
    assert found["mope_client_waiting", (("client", OTHERS),)] == 1


life = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "group/c", "group"]),
        st.sampled_from(["finish", "abort", "abort waiting", "stay", "preempt"]),
        st.integers(0, 400),
        st.floats(1, 400),
    ),
    max_size=25,
)


@given(life, st.sampled_from(["equinox", "vtc", "vtc-predicted", "deficit-round-robin", "fcfs"]))
@settings(max_examples=60, deadline=None)
def test_what_ended_was_charged_is_all_that_is_booked_but_for_open_requests(
    lives: list[tuple[str, str, int, float]], policy: str
) -> None:
    steward = make_steward(policy=policy, idle_clients=1)
    clock: Any = steward.clock
    before = NOTHING
    for number, (client, end, generated, predicted) in enumerate(lives):
        name = str(number)
        steward.arrive(name, Carried(client, predicted), 50)
        clock.now += 0.25
        if end == "abort waiting":
            steward.ended(name, 0, aborted=True, computed=0)
            continue
        steward.policy.admit(steward.policy.find(name))
        steward.admitted(name)
        steward.cached(name, 10)
        clock.now += 2.0
        steward.policy.progress(name, generated)
        if end == "preempt":
            steward.preempted(name, generated)
        elif end != "stay":
            steward.ended(name, generated, aborted=end == "abort")
        charged = total(steward)
        assert all(now >= was for now, was in zip(charged, before, strict=True))
        before = charged
    ledger = steward.policy.ledger
    open_charges = [ledger.charged(request_id) or NOTHING for request_id in ledger.open_requests]
    still_open = Charge(*map(sum, zip(NOTHING, *open_charges, strict=True)))
    assert total(steward) == Charge(*(a - b for a, b in zip(ledger.total, still_open, strict=True)))


def total(steward: Steward) -> Charge:
    """What is shown of all clients."""
    return Charge(*map(sum, zip(NOTHING, *(tally.charged for _, tally in steward.tallies.items()), strict=True)))


def test_a_failure_is_shown() -> None:
    a_guard = guard()
    assert shown(busy_steward(), a_guard)["mope_failed", ()] == 0
    a_guard.fail(ValueError('a "quoted"\nline'), "testing")
    found = shown(busy_steward(), a_guard)
    assert found["mope_failed", ()] == 1
    assert found["mope_exceptions_total", ()] == 1
    told = [labels for name, labels in found if name == "mope_failure_info"]
    assert told == [(("failure", 'ValueError while testing: a "quoted"\\nline'),)]


def test_what_cannot_be_read_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    steward = busy_steward()

    def changing() -> list[Any]:
        raise RuntimeError("OrderedDict mutated during iteration")

    monkeypatch.setattr(steward.tallies, "items", changing)
    found = shown(steward)
    assert found["mope_scrape_errors_total", ()] == 2
    assert found["mope_failed", ()] == 0
    assert found["mope_accounts", ()] > 0
    assert not [name for name, _ in found if name.startswith("mope_client_")]


def test_a_copy_that_fails_at_first_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steward = busy_steward()
    items, calls = steward.tallies.items, []

    def changing() -> list[Any]:
        calls.append(None)
        if len(calls) % 3:
            raise RuntimeError("OrderedDict mutated during iteration")
        return items()

    monkeypatch.setattr(steward.tallies, "items", changing)
    found = shown(steward)
    assert found["mope_scrape_errors_total", ()] == 0
    assert found["mope_client_arrived_total", BOB] == 2


@pytest.fixture
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
def test_scrapes_while_the_scheduler_works_raise_nothing_and_no_counter_falls() -> None:
    steward = make_steward(policy="vtc-predicted", metrics_clients=50)
    collector = StewardCollector(steward, guard())
    stop = threading.Event()

    def schedule() -> None:
        number = 0
        while not stop.is_set():
            for offset in range(20):
                steward.arrive(f"{number + offset}", Carried(f"client-{(number + offset) % 70}", 20.0), 10)
            for offset in range(20):
                name = f"{number + offset}"
                steward.policy.admit(steward.policy.find(name))
                steward.admitted(name)
                steward.ended(name, offset, aborted=False)
            number += 20

    worker = threading.Thread(target=schedule)
    worker.start()
    last: dict[Any, float] = {}
    try:
        for _ in range(6):
            found = samples(scraped(collector))
            for (name, labels), value in found.items():
                if name.endswith(("_total", "_count", "_bucket")):
                    assert value >= last.get((name, labels), 0.0), (name, labels)
            last = found
    finally:
        stop.set()
        worker.join()
    assert collector.num_errors == 0
    assert last["mope_client_finished_total", (("client", OTHERS),)] > 0


# -- the port


def fetched(url: str) -> dict[Any, float]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return samples(answer.read().decode())


def test_nothing_listens_unless_it_was_asked_for() -> None:
    assert start(busy_steward(), guard()) is None


def test_metrics_are_served_and_the_port_is_free_again_after_that(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with caplog.at_level(logging.INFO, "mope"):
        exporter = start(busy_steward(metrics_port=port), guard(), engine="vLLM 0.0")
    assert exporter is not None
    assert f"metrics at http://127.0.0.1:{port}/metrics" in caplog.text
    found = fetched(exporter.url)
    assert found["mope_client_arrived_total", BOB] == 2
    (about,) = [dict(labels) for name, labels in found if name == "mope_info"]
    assert (about["policy"], about["engine"]) == ("equinox", "vLLM 0.0")
    exporter.close()
    with pytest.raises(OSError, match="refused"):
        fetched(exporter.url)
    again = start(busy_steward(metrics_port=port), guard())
    assert again is not None
    assert again.port == port
    again.close()


def test_each_rank_has_a_port_of_its_own() -> None:
    port = free_port()
    exporter = start(busy_steward(metrics_port=port - 3), guard(), rank=3)
    assert exporter is not None
    assert exporter.port == port
    exporter.close()


def test_a_port_in_use_is_a_warning_and_another_port(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        exporter = start(busy_steward(metrics_port=port), guard())
    assert exporter is not None
    assert exporter.port != port
    assert f"metrics_port {port} cannot be had" in caplog.text
    assert fetched(exporter.url)
    exporter.close()


def test_a_rank_beyond_the_last_port_takes_a_free_one(caplog: pytest.LogCaptureFixture) -> None:
    exporter = start(busy_steward(metrics_port=65_535), guard(), rank=1)
    assert exporter is not None
    assert "65536 cannot be had" in caplog.text
    exporter.close()


def test_an_address_that_is_not_ours_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert start(busy_steward(metrics_port=0, metrics_host="192.0.2.1"), guard()) is None
    assert "serves no metrics" in caplog.text


def test_a_missing_package_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert start(busy_steward(metrics_port=0), guard()) is None
    assert "pip install 'mope-llm[vllm]'" in caplog.text


def test_a_silent_scraper_holds_up_nobody() -> None:
    exporter = start(busy_steward(metrics_port=0), guard())
    assert exporter is not None
    with socket.create_connection((exporter.host, exporter.port)):
        assert fetched(exporter.url)
    exporter.close()


# -- the front end


def snapshot() -> dict[str, Any]:
    return {
        "predicts": True,
        "requests": {"/v1/completions": 7},
        "predictions": {"made": 5, "late": 2},
        "latency": {"bounds_s": (0.001, 0.01, 0.1), "counts": (1, 3, 2, 1), "sum_s": 0.5},
    }


def test_the_front_ends_counters_are_added_to_those_of_the_server() -> None:
    registry = CollectorRegistry()
    options = HookOptions(identity="header", metrics_port=9477)
    assert isinstance(front_collector(snapshot, options, registry), FrontCollector)
    found = samples(generate_latest(registry).decode())
    assert found["mope_front_requests_total", (("kind", "/v1/completions"),)] == 7
    assert found["mope_front_predictions_total", (("outcome", "late"),)] == 2
    assert found["mope_front_predicts", ()] == 1
    assert found["mope_front_prediction_seconds_bucket", (("le", "0.01"),)] == 4
    assert found["mope_front_prediction_seconds_count", ()] == 7
    assert found["mope_front_prediction_seconds_sum", ()] == 0.5
    (on,) = [dict(labels) for name, labels in found if name == "mope_front_on"]
    assert (on["identity"], on["metrics_port"]) == ("header", "9477")


def test_a_front_end_that_raises_is_no_harm_to_the_servers_metrics() -> None:
    registry = CollectorRegistry()

    def broken() -> dict[str, Any]:
        raise KeyError("latency")

    assert front_collector(broken, HookOptions(), registry) is not None
    assert generate_latest(registry) == b""


def test_a_second_front_end_in_a_process_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry(auto_describe=True)
    assert front_collector(snapshot, HookOptions(), registry) is not None
    assert front_collector(snapshot, HookOptions(), registry) is None
    assert "not in the metrics of this server" in caplog.text


SERVER = """
from mope.serving_hooks.front_metrics import FrontWriter, front_collector
from mope.serving_hooks.options import HookOptions
import sys
first = {"predicts": sys.argv[1] == "1", "requests": {"/v1/completions": 3}, "predictions": {"made": 2, "late": 1},
         "latency": {"bounds_s": (0.001, 0.01, 0.1), "counts": (1, 1, 0, 0), "sum_s": 0.0055}}
then = {**first, "requests": {"/v1/completions": 7, "/v1/chat/completions": 1}, "predictions": {"made": 6, "late": 1},
        "latency": {"bounds_s": (0.001, 0.01, 0.1), "counts": (1, 3, 2, 1), "sum_s": 0.5}}
shown = [first]
writer = front_collector(lambda: shown[0], HookOptions())
assert isinstance(writer, FrontWriter)
writer._pass_on(first)
shown[0] = then
writer.close()
"""


def test_several_api_servers_are_summed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for predicts in "10":
        done = subprocess.run([sys.executable, "-c", SERVER, predicts], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    found = samples(generate_latest(registry).decode())
    assert found["mope_front_requests_total", (("kind", "/v1/completions"),)] == 14
    assert found["mope_front_requests_total", (("kind", "/v1/chat/completions"),)] == 2
    assert found["mope_front_predictions_total", (("outcome", "made"),)] == 12
    by_edge = {dict(labels).get("le"): value for (name, labels), value in found.items() if name.endswith("_bucket")}
    assert by_edge == {"0.001": 2, "0.01": 8, "0.1": 12, "+Inf": 14}
    assert found["mope_front_prediction_seconds_sum", ()] == pytest.approx(1.0)
    assert [value for (name, _), value in found.items() if name == "mope_front_on"] == [1.0]
    assert found["mope_front_predicts", ()] == 0  # one of the two has no predictor


@given(st.lists(st.floats(1e-5, 3.0), min_size=1, max_size=60))
def test_spread_values_have_the_counts_and_the_sum(values: list[float]) -> None:
    bounds = (0.0005, 0.01, 0.1, 1.0)
    kept, again = Histogram(bounds), Histogram(bounds)
    for value in values:
        kept.add(value)
    for value, num in spread(bounds, kept.counts, kept.total):
        for _ in range(num):
            again.add(value)
    assert again.counts == kept.counts
    assert again.total == pytest.approx(kept.total, rel=1e-4)


def test_nothing_is_spread_to_nothing() -> None:
    assert spread((1.0, 2.0), (0, 0, 0), 0.0) == []


def test_histograms_of_one_client_are_added_up() -> None:
    first, second = Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    for value in (0.5, 1.5, 9.0):
        first.add(value)
    second.add(1.0)
    assert buckets([first, second]) == ([("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)], 12.0)


def test_charges_are_shown_in_whole_units() -> None:
    steward = make_steward(policy="vtc")
    serve(steward, "1", "bob", 10)
    (tally,) = [tally for _, tally in steward.tallies.items()]
    assert tally.charged.service == 120 * UNIT
    assert shown(steward)["mope_client_service_weighted_tokens_total", BOB] == 120
