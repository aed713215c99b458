"""The file that keeps books and lessons: whole, private, in time, and never a reason for the hook to be off."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_predictions import carried, corrector

from mope.errors import DataError, UserError
from mope.fairness import Charge, Ledger
from mope.serving_hooks import state
from mope.serving_hooks.lengths import Lengths
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import front
from mope.serving_hooks.state import Keeper, read, take_up, write
from mope.serving_hooks.steward import Steward

OLD = {"version": 0}


def steward_at(path: Path | None, num_requests: int = 0) -> Steward:
    steward = Steward(HookOptions(state=path, summary_s=0))
    for number in range(num_requests):
        request_id = f"{path}{number}"
        steward.policy.admit(steward.arrive(request_id, carried(f"group{number % 3}/user{number % 20}", 50.0), 100))
        steward.admitted(request_id)
        steward.ended(request_id, 20 + number % 50, aborted=False)
    steward.lengths.close(60)
    return steward


def wait_for(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    end_s = time.monotonic() + seconds
    while not (met := true()) and time.monotonic() < end_s:
        time.sleep(0.01)
    return met


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "EVERY_S", 0.05)
    monkeypatch.setattr(state, "IDLE_S", 0.05)
    monkeypatch.setattr(state, "_LOOK_S", 0.01)


# -- when it is written


def test_what_has_changed_is_written_in_seconds_and_restored(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "deep" / "state.json"
    steward = steward_at(path, 30)
    steward.policy.admit(steward.arrive("still running", carried("a", 50.0), 100))
    steward.between_steps()
    assert wait_for(path.exists)
    again = steward_at(path)
    assert again.policy.ledger.open_requests == ()  # the engine that ran it is gone
    assert again.policy.ledger.total == steward.policy.ledger.total
    assert again.lengths.to_json() == steward.lengths.to_json()
    written = path.stat().st_mtime_ns
    time.sleep(0.3)
    assert path.stat().st_mtime_ns == written  # nothing has happened since
    steward.ended("still running", 60, aborted=False)
    assert wait_for(lambda: path.stat().st_mtime_ns != written)
    steward.close()


def test_an_engine_that_turns_idle_has_its_state_written_before_the_next_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(state, "EVERY_S", 3600.0)
    path = tmp_path / "state.json"
    steward = steward_at(path)
    ticket = steward.arrive("r", carried("a", 50.0), 100)
    steward.policy.admit(ticket)
    steward.between_steps()
    time.sleep(0.3)
    assert not path.exists()
    steward.ended("r", 10, aborted=False)
    assert wait_for(path.exists)
    steward.close()


def test_closing_writes_what_came_last(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    steward = steward_at(path, 5)
    steward.close()
    assert steward_at(path).policy.ledger.total == steward.policy.ledger.total


def test_a_rank_that_is_told_not_to_keep_a_state_writes_none(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "state.json"
    steward = steward_at(path, 5)
    steward.options = steward.options.model_copy(update={"state": None})
    steward.between_steps()
    time.sleep(0.2)
    steward.close()
    assert not path.exists()


def test_the_front_end_of_sglang_keeps_its_lessons_in_the_same_way(tmp_path: Path, quick: None) -> None:
    options = HookOptions(predictor="none", identity="none", state=tmp_path / "state.json")
    path = tmp_path / "state-lengths.json"
    server = SimpleNamespace(api_key=None, served_model_name="tiny", model_path="models/tiny", enable_metrics=False)
    end = front.FrontEnd(server, options)
    told = {"meta_info": {"finish_reason": {"type": "stop"}, "completion_tokens": 5}}
    end.saw([carried("a", None)], told)
    assert wait_for(path.exists)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert front.FrontEnd(server, options).lengths.to_json() == end.lengths.to_json()
    path.write_text("[" * 100_000)
    assert front.FrontEnd(server, options).lengths.to_json()["means"] == {}
    end._close()


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, quick: None) -> None:
    changes, begun = iter(range(10**9)), []

    def slow() -> Any:
        begun.append(time.monotonic())
        time.sleep(0.1)
        yield "{}"

    keeper = Keeper(tmp_path / "state.json", slow, lambda: next(changes))
    keeper.start()
    time.sleep(1.5)
    keeper._ended.set()
    assert len(begun) == 1  # the next would come two seconds after the first


# -- how it is written


def test_a_file_is_its_owners_alone_and_follows_no_link(tmp_path: Path) -> None:
    path, victim = tmp_path / "state.json", tmp_path / "victim"
    victim.write_text("precious")
    for name in (f"state.json.{os.getpid()}.tmp", ".state.json.tmp"):
        (tmp_path / name).symlink_to(victim)
    write(path, iter(["{}"]))
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.is_symlink()
    assert read(path) == {}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write(path, iter([json.dumps(OLD)]))

    def broken() -> Any:
        yield "{"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(path, broken())
    assert read(path) == OLD
    assert [found.name for found in tmp_path.iterdir()] == ["state.json"]


def test_a_file_that_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write(path, iter([json.dumps(OLD)]))
    monkeypatch.setattr(state, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="1,000 bytes"):
        write(path, iter(["x" * 600, "x" * 600]))
    assert read(path) == OLD


def test_two_processes_of_one_number_never_write_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two containers on one volume."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path, found, until = tmp_path / "state.json", [], time.monotonic() + 2.0
    texts = ['{"a": "' + "x" * 2_000_000 + '"}', '{"a": 1}']

    def work(text: str) -> None:
        while time.monotonic() < until:
            write(path, iter([text]))

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        if path.exists():
            found.append(path.read_text())
    for thread in threads:
        thread.join()
    assert len(found) > 2
    assert set(found) <= set(texts)


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new, others = (tmp_path / name for name in (".state.json.1.tmp", ".state.json.2.tmp", ".other.json.1.tmp"))
    for left in (old, new, others):
        left.write_text("")
    for left in (old, others):
        os.utime(left, (0, 0))
    write(tmp_path / "state.json", iter(["{}"]))
    assert not old.exists()
    assert new.exists()
    assert others.exists()


def test_failures_are_told_once_and_tried_again(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state, "MAX_BYTES", 10)
    steward = steward_at(tmp_path / "state.json", 5)
    with caplog.at_level(logging.INFO, logger="mope"):
        for _ in range(3):
            steward.policy.ledger.num_bookings += 1
            steward.between_steps()
            num_failures = steward._keeper.num_failures
            assert wait_for(lambda before=num_failures: steward._keeper.num_failures > before)
        monkeypatch.setattr(state, "MAX_BYTES", 10**9)
        steward.policy.ledger.num_bookings += 1
        assert wait_for((tmp_path / "state.json").exists)
        steward.close()
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "cannot keep its state" in line and "10 bytes" in line]) == 1
    assert len([line for line in told if line.endswith("again")]) == 1


def test_closing_does_not_wait_for_a_slow_write_which_then_changes_nothing(tmp_path: Path, quick: None) -> None:
    path, goes_on = tmp_path / "state.json", threading.Event()
    first = threading.Event()

    def pieces() -> Any:
        yield '{"late": '
        if not first.is_set():
            first.set()
            goes_on.wait(10)
            yield "true}"
        else:
            yield "false}"

    news = iter(range(10**9))
    keeper = Keeper(path, pieces, lambda: next(news))
    keeper.start()
    assert first.wait(5)
    keeper.close(timeout_s=0.1)
    assert read(path) == {"late": False}
    goes_on.set()
    keeper._thread.join(5)
    assert read(path) == {"late": False}
    assert [found.name for found in tmp_path.iterdir()] == ["state.json"]


def test_books_that_change_while_they_are_written_can_be_restored(tmp_path: Path) -> None:
    """Another thread opens, groups, charges and forgets accounts between any two pieces."""
    ledger = Ledger(idle_clients=50, max_clients=200)
    rng, number = random.Random(0), 0

    def churn() -> None:
        nonlocal number
        for _ in range(40):
            number += 1
            path = (f"g{rng.randrange(30)}", f"u{rng.randrange(30)}")[: rng.choice((1, 2))]
            account = ledger.account(path)
            ledger.join(account, number)
            ledger.leave(account)
            ledger.open(str(number), account, Charge(1, 1, 1, rng.randrange(1, 1000)))
            if rng.random() < 0.9:
                ledger.close(str(number))

    for _ in range(50):
        churn()
    for _ in range(50):
        pieces = []
        for piece in state.books_and_lessons(ledger, dict):
            pieces.append(piece)
            churn()
        kept = json.loads("".join(pieces))["ledger"]
        restored = Ledger(idle_clients=50, max_clients=200)
        restored.restore(kept)
        assert restored.num_accounts == len(kept["accounts"]) - 1
        assert restored.num_accounts > 10
        for request_id in restored.open_requests:
            restored.close(request_id)
        assert all(account.ahead == 0 for account in restored.clients())


@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
))  # fmt: skip
def test_pieces_are_the_json_of_a_value(value: Any) -> None:
    assert json.loads("".join(state.in_pieces(value))) == value


def test_no_piece_of_large_books_takes_long() -> None:
    """The scheduling thread waits for one piece at most: a few parts in a thousand of the whole here, each a try."""
    ledger = Ledger()
    for number in range(20_000):
        ledger.account((f"c{number}",))
    shares = []
    for _ in range(5):
        taken = [time.thread_time()]
        for _ in state.books_and_lessons(ledger, dict):
            taken.append(time.thread_time())
        shares.append(max(after - before for before, after in pairwise(taken)) / (taken[-1] - taken[0]))
    assert min(shares) < 0.1


def test_books_in_pieces_are_the_snapshot() -> None:
    steward = steward_at(None, 700)
    text = "".join(state.books_and_lessons(steward.policy.ledger, steward.lengths.to_json))
    assert json.loads(text) == json.loads(json.dumps(steward.snapshot()))


# -- what is read


DAMAGED = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "null": b"null",
    "a number": b"5",
    "a list": b"[]",
    "an empty object": b"{}",
    "no UTF-8": b"\xff\xfe\xff",
    "a byte order mark": "\ufeff{}".encode(),
    "deep": b"[" * 200_000,
    "deep below": b'{"ledger":' + b"[" * 100_000 + b"]" * 100_000 + b',"lengths":{}}',
    "a huge number": b'{"ledger":{"version":' + b"9" * 5000 + b'},"lengths":{}}',
    "Infinity": b'{"ledger":{"version":Infinity},"lengths":{}}',
    "NaN": b'{"ledger":{"version":1},"lengths":{"means":{"a":NaN}}}',
    "1e999": b'{"ledger":{"version":1},"lengths":{"means":{"a":1e999}}}',
    "another version": b'{"ledger":{"version":99},"lengths":{"means":{}}}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_state_is_one_line_and_empty_books(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(DAMAGED[name])
    with caplog.at_level(logging.WARNING, logger="mope"):
        steward = steward_at(path)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"mope starts with empty books: {path} cannot be read (")
    assert "\n" not in lines[0]
    assert steward.policy.ledger.total.service == 0
    assert steward.lengths.to_json()["means"] == {}


def test_what_is_no_file_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fifo, folder, large = tmp_path / "fifo", tmp_path / "folder", tmp_path / "large"
    os.mkfifo(fifo)
    folder.mkdir()
    with large.open("wb") as file:
        file.truncate(state.MAX_BYTES + 1)  # takes no room
    for path in (fifo, folder, large, Path("/dev/zero")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mope"):
            assert not take_up(path, "books", lambda kept: None)
        assert len(caplog.records) == 1


def test_lessons_of_a_state_whose_books_are_damaged_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    kept = json.loads(json.dumps(steward_at(None, 30).snapshot()))
    kept["ledger"]["accounts"][1]["counter"] = "x"
    path.write_text(json.dumps(kept))
    assert steward_at(path).lengths.to_json() == steward_at(None).lengths.to_json()


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**39, -(10**39), 10**60, 0.5, 1e308, -1e308, float("nan"),
    float("inf"), "", "x", "\ud800", [], {}, [0], [[1]], {"a": 1},
]  # fmt: skip


def _places(kept: Any, rng: random.Random) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    keys = list(kept) if isinstance(kept, dict) else []
    if isinstance(kept, list):
        keys = rng.sample(range(len(kept)), min(len(kept), 5))
    for key in keys:
        found += [(kept, key), *_places(kept[key], rng)]
    return found


def _damaged(kept: dict[str, Any], rng: random.Random) -> bytes:
    kept = copy.deepcopy(kept)
    for _ in range(rng.choice((1, 1, 2, 4))):
        into, key = rng.choice(_places(kept, rng))
        if isinstance(into, dict) and rng.random() < 0.2:
            into.pop(key, None)
        else:
            into[key] = rng.choice(VALUES)
        if not kept:
            break
    raw = bytearray(json.dumps(kept).encode())
    kind = rng.random()
    if kind < 0.1:
        return bytes(raw[: rng.randrange(len(raw))])
    if kind < 0.2:
        for _ in range(3):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def _goes_on(steward: Steward) -> None:
    """Requests come and end, figures are shown, and the next state can be written and read."""
    for number in range(12):
        steward.arrive(f"q{number}", carried(f"group{number % 3}/user{number}", 50.0), 100)
    for number in range(12):
        ticket = steward.policy.admit()
        steward.admitted(ticket.request_id)
        steward.ended(ticket.request_id, 20, aborted=number % 3 == 0)
    assert [steward.tallies.total(name) for name in ("num_arrived", "num_finished", "num_predicted")] == [12, 8, 12]
    expected = steward.lengths.expected(carried("group1/user1", 50.0), "group1/user1", 100)
    assert expected.tokens is not None
    assert 0 < expected.tokens <= 100
    steward.lengths.close(60)
    assert "0 running, 0 waiting" in steward.summary()
    assert steward.policy.ledger.open_requests == ()
    assert all(isfinite(account.counter) for account in steward.policy.ledger.clients())
    again, kept = steward_at(None), json.loads(json.dumps(steward.snapshot(), allow_nan=False))
    again._restore(kept)
    assert again.policy.ledger.total == steward.policy.ledger.total


def test_no_damage_turns_the_hook_off(tmp_path: Path) -> None:
    """Some hundred damaged states, each from a seed of its own."""
    path = tmp_path / "state.json"
    kept = json.loads(json.dumps(steward_at(None, 60).snapshot()))
    num_taken = 0
    for seed in range(300):
        path.write_bytes(_damaged(kept, random.Random(seed)))
        try:
            with suppress(UserError):  # and nothing else
                found = read(path)
                if isinstance(found, dict):
                    Lengths(corrector()).restore(found.get("lengths"))
                    Ledger().restore(found.get("ledger"))
                    num_taken += 1
            _goes_on(steward_at(path))
        except Exception as error:
            raise AssertionError(f"the state of seed {seed} does harm: {error!r}") from error
    assert 10 < num_taken < 290  # damage of both kinds was met: that which is noticed, and that which is lived with
