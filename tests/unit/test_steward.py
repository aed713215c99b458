"""What every hook shares: options, what is carried, the guard, lengths that learn, tallies, and the steward."""

from __future__ import annotations

import json
import logging
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_predictions import EDGES, KNOWN, carried, corrector, lognormal

from mope.corrector import Answering
from mope.errors import ConfigError, UserError
from mope.serving_hooks.carried import Carried, pack, unpack, without_ours
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.lengths import Lengths
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.steward import Steward
from mope.serving_hooks.tallies import IDLE_S, OTHERS, Histogram, Tallies

PREDICTED = carried("acme/alice", 150.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "vtc"}, "here: no option 'polcy'; did you mean 'policy'?"),
        ({"xyzzy": 1}, "no option 'xyzzy'; `mope doctor options`"),
        ({"policy": "fair"}, "policy is 'fair'"),
        ({"deadline_ms": -1}, "deadline_ms is -1"),
        ({"weights": {"a": 0}}, "weight of 'a' is 0"),
        ([], "here"),
        ({"identity": "magic"}, "identity is 'magic'"),
        ({"client_header": "a b"}, "client_header"),
        ({"predictor": "chat-smal"}, "did you mean"),
        ({"profile": "h100/llama"}, "profile: "),
        ({"state": "/nowhere/at-all/state.json"}, "no folder /nowhere for it"),
        ({"state": "/"}, "state: / is a folder; name a file in it, such as /mope.json"),
        ({"state": ""}, "state: . is a folder; name a file in it, such as mope.json"),
    ],
)
def test_a_mistake_in_the_options_is_one_clear_line(options, message):
    with pytest.raises(ConfigError, match="here") as caught:
        HookOptions.read(options, "here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_says_what_it_is_for():
    for name, field in HookOptions.model_fields.items():
        assert field.description, name
    assert HookOptions.read(None, "here") == HookOptions()
    read = HookOptions.read({"policy": "vtc", "weights": {"a": 2}, "state": "x.json"}, "here")
    assert HookOptions.read(json.loads(read.model_dump_json()), "here") == read


# -- carried


texts = st.one_of(st.none(), st.text(max_size=20))
figures = st.one_of(st.none(), st.floats(0, 1e6))


@given(texts, figures, figures, texts, texts)
def test_what_is_carried_arrives(client, tokens, high, raw, answering):
    sent = Carried(client, tokens, high, raw, answering)
    written = json.loads(json.dumps(sent.write()))
    assert all(isinstance(value, (str, int, float)) for value in written.values())  # engines carry no more
    assert Carried.read(written) == sent


@given(st.dictionaries(st.text(max_size=8).map(lambda name: f"mope_{name}"), st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5)), lambda inner: st.lists(inner, max_size=3)
)))  # fmt: skip
def test_anything_may_be_carried_and_nothing_raises(rubbish):
    Carried.read({**rubbish, "mope_raw": rubbish.get("mope_raw", "1,2,x")})
    assert without_ours({**rubbish, "own": 1}) == {"own": 1}


@given(st.floats(1, 1e5), st.floats(0.1, 2))
def test_a_raw_prediction_is_carried_exactly(median, deviation):
    raw = lognormal(median, deviation)
    assert np.array_equal(unpack(pack(raw), len(raw)), raw)


@pytest.mark.parametrize(
    "text", ["", "AAAA", "not base64 at all", "é" * 576, "A" * 576, "A" * 10_000_000, pack(lognormal(9)[::-1])]
)
def test_a_raw_prediction_that_cannot_be_read_is_none(text):
    assert unpack(text, len(EDGES)) is None
    lengths = Lengths(corrector())
    said = Carried("a", 5.0, 9.0, text, KNOWN.write())
    lengths.observe(said, "a", 10, censored=False)
    lengths.observe(PREDICTED, "a", 10, censored=False)
    lengths.close(60)
    assert (lengths.num_observed, lengths.num_dropped) == (1, 1)
    assert lengths.expected(said, "a") == (5.0, 9.0)


@given(texts, texts, texts, texts, st.booleans(), st.one_of(st.none(), st.integers(1, 2**31)), st.booleans())
def test_who_answers_is_carried(llm, family, kind, mode, known, budget, fallback):
    said = [(text or "").replace("|", "") for text in (llm, family, kind, mode)]
    answering = Answering(*said, known, budget, fallback)
    assert Answering.read(answering.write()) == answering
    for rubbish in ("", "|", "a|b|c|d|e|f|g", "a|b|c|d|1|x|0", "a|b|c|d|1||2", "|" * 6, "|" * 9):
        assert Answering.read(rubbish) is None


# -- the guard


def test_after_the_first_failure_nothing_of_ours_runs(caplog):
    tidied = []
    guard = Guard(logging.getLogger("mope"), lambda: tidied.append(1))
    assert guard.run(lambda: 5, 0, "counting") == 5
    with caplog.at_level(logging.ERROR):
        assert guard.run(lambda: 1 // 0, 7, "dividing") == 7
        assert guard.run(lambda: 5, 0, "counting") == 0
    assert tidied == [1]
    assert guard.failure == "ZeroDivisionError while dividing: integer division or modulo by zero"
    assert len(caplog.records) == 1
    assert "test_steward" in caplog.text  # the traceback


def test_a_guard_survives_its_own_tidying(caplog):
    guard = Guard(logging.getLogger("mope"), lambda: 1 // 0)
    with caplog.at_level(logging.ERROR):
        assert guard.run(lambda: [][1], None, "indexing") is None
    assert not guard.ok


# -- lengths


def test_predictions_are_corrected_by_what_was_seen():
    lengths = Lengths(corrector())
    before = lengths.expected(PREDICTED, "a")
    assert before == (PREDICTED.tokens, PREDICTED.high)
    for _ in range(100):
        lengths.observe(PREDICTED, "a", 420, censored=False)
    lengths.close(60)
    assert lengths.num_observed == 100
    after = lengths.expected(PREDICTED, "b")
    assert after.tokens == pytest.approx(420, rel=0.15)
    other = lengths.expected(PREDICTED._replace(answering=KNOWN._replace(llm="claude-2", family="claude").write()), "b")
    assert abs(other.tokens - before.tokens) < abs(after.tokens - before.tokens)


@pytest.mark.parametrize("tokens", [float("nan"), float("inf"), -1.0, 0.0, 1e300])
def test_impossible_predictions_pass_to_the_policy_which_replaces_them(tokens):
    lengths = Lengths(corrector())
    for _ in range(5):
        lengths.observe(PREDICTED._replace(tokens=tokens), "a", 10, censored=False)
    lengths.close(60)
    lengths.expected(PREDICTED._replace(tokens=tokens), "a")
    steward = Steward(HookOptions(), Clock())
    assert steward.arrive("r", PREDICTED._replace(tokens=tokens), 5).predicted_tokens >= 1


def test_once_much_is_known_one_in_eight_is_learned_from(monkeypatch):
    monkeypatch.setattr("mope.serving_hooks.lengths._ALL_OF", 40)
    lengths = Lengths(corrector())
    for _ in range(40 + 80):
        lengths.observe(PREDICTED, "a", 100, censored=False)
    lengths.close(60)
    assert lengths.num_observed == 50


def test_a_forced_length_teaches_nothing():
    lengths = Lengths(corrector())
    for _ in range(10):
        lengths.observe(PREDICTED, "a", 4096, censored=True, forced=True)
        lengths.observe(Carried(), "a", 4096, censored=False, forced=True)
    lengths.close(60)
    assert (lengths.num_forced, lengths.num_observed) == (20, 0)
    assert lengths.expected(Carried(), "a").tokens is None
    assert lengths.expected(PREDICTED, "a") == (PREDICTED.tokens, PREDICTED.high)


def test_one_client_moves_what_is_expected_of_others_little():
    lengths = Lengths(corrector())
    for number in range(400):  # as predicted, and 20 times as far from one client before
        if number % 4:
            lengths.observe(PREDICTED, f"c{number % 11}", (60, 150, 330)[number % 3], censored=False)
        else:
            lengths.observe(PREDICTED, "hostile", 32_000, censored=False)
    lengths.close(60)
    assert lengths.num_refused > 10
    assert lengths.num_observed + lengths.num_refused == 400
    assert lengths.expected(PREDICTED, "c1").tokens < 2 * PREDICTED.tokens


def test_without_prediction_a_client_is_expected_to_go_on_as_before():
    lengths = Lengths()
    assert lengths.expected(Carried(), "a").tokens is None
    for tokens in (100, 200):
        lengths.observe(Carried(), "a", tokens, censored=False)
    assert lengths.expected(Carried(), "a").tokens == (4 * 100 + 200) / 5
    lengths.observe(Carried(), "a", 5, censored=True)  # cut: says nothing
    lengths.observe(Carried(), "a", 0, censored=False)
    assert lengths.expected(Carried(), "a").tokens == 120
    assert lengths.expected(Carried(tokens=7.0), "a").tokens == 7
    assert lengths.expected(Carried(), "b").tokens is None


def test_means_of_clients_are_bounded(monkeypatch):
    monkeypatch.setattr("mope.serving_hooks.lengths._MAX_CLIENTS", 5)
    lengths = Lengths()
    for number in range(20):
        lengths.observe(Carried(), f"c{number}", 10, censored=False)
    assert lengths.to_json()["means"].keys() == {f"c{number}" for number in range(15, 20)}


def test_lessons_are_restored_exactly():
    lengths = Lengths(corrector())
    for number in range(50):
        lengths.observe(PREDICTED, "a", 300 + number, censored=number % 7 == 0)
    lengths.close(60)
    again = Lengths(corrector())
    again.restore(json.loads(json.dumps(lengths.to_json())))
    assert again.to_json() == lengths.to_json()
    for rubbish in (None, [], {"means": 5}, {}):
        with pytest.raises(UserError):
            Lengths().restore(rubbish)


def test_work_is_done_ahead_and_what_it_raises_ends_nothing(monkeypatch):
    monkeypatch.setattr("mope.serving_hooks.lengths._LOOK_EVERY_S", 0.001)
    lengths = Lengths(corrector())
    assert not lengths.corrects
    done: list[object] = []

    def work(on: object) -> None:
        done.append((on, threading.current_thread().name))
        raise ValueError("no such thing")

    for number in range(3):
        lengths.work_ahead(work, number)
    lengths.observe(PREDICTED, "a", 10, censored=False)
    ends = time.monotonic() + 60
    while not (lengths.corrects and len(done) == 3) and time.monotonic() < ends:
        time.sleep(0.001)
    lengths.close(60)
    assert done == [(number, "mope-learning") for number in range(3)]
    assert lengths.num_observed == 1


def test_learning_that_fails_stops_and_predictions_go_on(monkeypatch, caplog):
    lengths = Lengths(corrector())
    monkeypatch.setattr(lengths.corrector, "observe", lambda *_, **__: 1 // 0)
    with caplog.at_level(logging.ERROR, logger="mope"):
        lengths.observe(PREDICTED, "a", 10, censored=False)
        end = time.monotonic() + 60
        while lengths.corrector is not None and time.monotonic() < end:
            time.sleep(0.01)
    assert "stops learning" in caplog.text
    assert lengths.expected(PREDICTED, "a").tokens == 150


@pytest.mark.parametrize(("median", "deviation"), [(1, 0.01), (5, 0.01), (60_000, 2.0)])
def test_narrow_and_wide_predictions_can_be_corrected(median, deviation):
    lengths = Lengths(corrector())
    said = PREDICTED._replace(raw=pack(lognormal(median, deviation)))
    for _ in range(30):
        lengths.observe(said, "a", 9, censored=False)
    lengths.close(60)
    assert lengths.num_observed == 30
    assert lengths.expected(said, "a").tokens > 0


# -- tallies


def test_histogram():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1]
    assert (histogram.num, histogram.mean) == (5, 2.8)
    assert Histogram((1.0,)).mean == 0


def test_clients_beyond_the_limit_are_others():
    tallies = Tallies(2)
    for client in ("a", "b", "c", "d", "a"):
        tallies.of(client, 0.0).num_arrived += 1
    assert {client: tally.num_arrived for client, tally in tallies.items()} == {"a": 2, "b": 1, OTHERS: 2}


def test_clients_that_came_once_do_not_keep_those_that_stay_from_a_tally():
    tallies = Tallies(3)
    for number in range(200):  # a flood of names
        tally = tallies.of(f"once-{number}", float(number))
        tally.num_arrived += 1
        tally.num_finished += 1
    tallies.of("busy", 10.0).num_arrived += 1
    for client in ("alice", "bob"):
        tallies.of(client, 2 * IDLE_S).num_arrived += 1
    kept = dict(tallies.items())
    assert {"alice", "bob"} < kept.keys()
    assert "busy" not in kept  # it came while all places were taken: it is among the others, with what it began
    assert tallies.total("num_arrived") == 203
    assert tallies.total("num_finished") == 200
    running = tallies.of("alice", 2 * IDLE_S)
    tallies.of("carol", 9 * IDLE_S)
    tallies.of("dave", 9 * IDLE_S)
    assert dict(tallies.items())["alice"] is running  # with a request in flight


# -- the steward


def test_a_request_from_arrival_to_end():
    clock = Clock()
    steward = Steward(HookOptions(policy="vtc-predicted", recalibrate=False), clock)
    ticket = steward.arrive("r", PREDICTED, 100, max_tokens=500)
    assert ticket.account.path == ("acme", "alice")
    assert ticket.predicted_tokens == 150
    clock.now += 2
    steward.policy.admit(ticket)
    steward.admitted("r")
    steward.cached("r", 40)
    clock.now += 1
    steward.first_token("r")
    clock.now += 7
    steward.ended("r", 120, aborted=False)
    steward.ended("r", 120, aborted=False)
    tally = dict(steward.tallies.items())["acme/alice"]
    assert (tally.num_arrived, tally.num_finished, tally.num_aborted, tally.num_predicted) == (1, 1, 0, 1)
    assert (tally.prompt_tokens, tally.cached_tokens, tally.response_tokens) == (100, 40, 120)
    assert (tally.queue_s.total, tally.ttft_s.total, tally.e2e_s.total) == (2, 3, 10)
    assert (tally.num_within, tally.num_covered) == (1, 1)
    assert steward.policy.ledger.find(("acme", "alice")).charged.service == (60 + 240) * 10**6
    assert not steward.held
    assert "1 finished" in steward.summary()
    assert "100 % of these answers within" in steward.summary()


def test_what_ends_before_it_began_costs_nothing():
    steward = Steward(HookOptions(), Clock())
    steward.arrive("r", Carried(), 100, fallback_client="lora/french")
    steward.ended("r", 0, aborted=True)
    steward.ended("stranger", 5, aborted=True)
    assert steward.policy.ledger.total.service == 0
    assert dict(steward.tallies.items())["lora/french"].num_aborted == 1


def test_measured_latency_changes_charges_only_where_no_other_rank_must_agree():
    charged = {}
    for exact in (False, True):
        for waited in (1.0, 50.0):
            clock = Clock()
            steward = Steward(HookOptions(recalibrate=False), clock)
            steward.exact = exact
            steward.policy.admit(steward.arrive("r", PREDICTED, 100))
            steward.admitted("r")
            clock.now += waited
            steward.ended("r", 100, aborted=False)
            charged[exact, waited] = steward.policy.ledger.total
    assert charged[True, 1.0] == charged[True, 50.0]
    assert charged[False, 1.0].ufc > charged[False, 50.0].ufc


def test_a_state_that_cannot_be_written_is_told(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    steward = Steward(HookOptions(state=blocked / "state.json"), Clock())
    with caplog.at_level(logging.WARNING, logger="mope"):
        steward.close()
    assert "cannot keep its state" in caplog.text


def test_the_log_has_a_line_now_and_then(caplog):
    clock = Clock()
    steward = Steward(HookOptions(summary_s=10), clock)
    with caplog.at_level(logging.INFO, logger="mope"):
        for _ in range(25):
            clock.now += 1
            steward.between_steps()
    assert caplog.text.count("equinox: 0 running") == 2


def test_a_clients_name_cannot_write_a_line_of_the_log():
    steward = Steward(HookOptions(predictor="none"))
    steward.arrive("r", Carried("eve\n2026 mope is off\x1b[2J"), 10)
    steward.admitted("r")
    steward.ended("r", 5, aborted=False)
    assert steward.summary().isprintable()
    assert "eve?2026 mope is off?[2J 5" in steward.summary()
