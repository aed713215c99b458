"""What is expected of requests behind others is worked out in the learning thread; on vLLM's real scheduler."""

from __future__ import annotations

import threading
import time
from importlib.util import find_spec

import pytest

from mope.serving_hooks.carried import Carried
from tests.engines.test_vllm_bypass import Served
from tests.raw_predictions import carried

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
LATE = 16  # steps after which books are caught up with


def taught(monkeypatch: pytest.MonkeyPatch) -> tuple[Served, list[tuple[str, str]]]:
    """A server that corrects predictions, and where it does so: the client and the thread of each."""
    served = Served(slots=1, recalibrate=True, predictor="chat-small")
    lengths = served.scheduler.mope.lengths
    for _ in range(20):
        lengths.observe(carried("a", 200.0), "a", 40, censored=False)
    until(lambda: lengths.num_observed == 20)
    found: list[tuple[str, str]] = []
    original = lengths.expected

    def watched(said: Carried, client: str, max_tokens: int | None = None) -> object:
        found.append((client, threading.current_thread().name))
        return original(said, client, max_tokens)

    monkeypatch.setattr(lengths, "expected", watched)
    return served, found


def until(holds: object) -> None:
    ends = time.monotonic() + 60
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.01)


def send(served: Served, name: str, client: str) -> None:
    served.engine.add(name, 20, carried(client, 200.0), float(served.num_steps), None)


def test_the_learning_thread_works_out_what_is_expected_of_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    served, found = taught(monkeypatch)
    steward = served.scheduler.mope
    for number in range(12):
        send(served, f"{number}-300", "a")
    until(lambda: len(found) == 12)
    assert [thread for _, thread in found] == ["MainThread"] + 11 * ["mope-learning"]
    assert len(steward.policy) == 1  # the others are not told of yet
    served.step()  # one runs, and all behind it are told of
    assert len(steward.held) == len(found) == 12
    send(served, "12-300", "a")
    until(lambda: len(found) == 13)
    assert len(steward.held) == 12
    served.step(LATE)
    assert len(steward.held) == len(found) == 13
    right = steward.lengths.corrector.expected(*steward.lengths._read(carried("a", 200.0)), 1024)
    assert {held.predicted_tokens for held in steward.held.values()} == {right.mean}
    assert [held.request_id for held in sorted(steward.held.values(), key=lambda held: held.arrival)] == [
        f"{number}-300" for number in range(13)
    ]


def test_a_thread_that_gets_no_time_holds_nobody_back_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    served, found = taught(monkeypatch)
    steward = served.scheduler.mope
    monkeypatch.setattr(steward.lengths, "work_ahead", lambda work, on: None)
    for number in range(2):
        send(served, f"{number}-900", "a")
    served.step()  # one runs, and the other is told of, because it is next
    for number in range(2, 5):
        send(served, f"{number}-900", "a")
    served.step(4 * LATE)
    send(served, "5-900", "a")
    assert len(steward.held) == 2
    served.step(6 * LATE)
    assert len(steward.held) == 5
    served.step(4 * LATE)
    assert len(steward.held) == 6
    assert [held.request_id for held in steward.held.values()] == [f"{number}-900" for number in range(6)]
    assert {thread for _, thread in found} == {"MainThread"}


def test_who_is_next_is_told_of_at_once_and_aborted_ones_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.request import RequestStatus

    served, _ = taught(monkeypatch)
    steward = served.scheduler.mope
    monkeypatch.setattr(steward.lengths, "work_ahead", lambda work, on: None)
    for number in range(4):
        send(served, f"{number}-5", "a")
    served.scheduler.finish_requests("3-5", RequestStatus.FINISHED_ABORTED)
    served.finish(40)  # shorter than patience: each is told of when its turn comes
    tally = dict(steward.tallies.items())["a"]
    assert (tally.num_arrived, tally.num_finished, tally.num_aborted) == (4, 3, 1)
