"""Parts of `mope serve` in this process: memory of predictions, keys, deadlines, learning, metrics."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("prometheus_client")

from mope import LengthPrediction, LengthPredictor
from mope.corrector import Answering
from mope.errors import ConfigError, DataError
from mope.reader import is_forced
from mope.serving_hooks.identity import digest
from mope.serving_hooks.service import cli, traces
from mope.serving_hooks.service.config import ServeConfig
from mope.serving_hooks.service.desk import Desk, UnknownId
from mope.serving_hooks.service.keys import Keys
from mope.serving_hooks.service.memory import Memory, Remembered

SLACK_S = 1.0  # of a machine that is busy
NEVER = threading.Event()


def remembered(client: str | None = None) -> Remembered:
    return Remembered(b"", Answering(), None, 1.0, 1.0, True, 1.0, client)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.one_of(st.floats(0, 20), st.sampled_from(["add", "find", "forget"])), max_size=60),
    st.randoms(use_true_random=False),
)
def test_memory_is_a_dict_with_bounds(size: int, steps: list[Any], random: Any) -> None:
    clock = Clock()
    memory = Memory(size, 10.0, clock)
    model: dict[str, tuple[float, str]] = {}
    names = ["never"]
    for step in steps:
        if isinstance(step, float):
            clock.now += step
        model = {name: kept for name, kept in model.items() if kept[0] > clock.now}
        if step == "add":
            client = random.choice(["a", "b"])
            while len(model) >= size:
                del model[next(iter(model))]
            names.append(memory.add(remembered(client)))
            model[names[-1]] = clock.now + 10.0, client
        name = random.choice(names)
        if step == "forget":
            memory.forget(name)
            model.pop(name, None)
        if step == "find":
            for client in ("a", "b", None):
                found = memory.find(name, client)
                assert (found is not None) == (name in model and model[name][1] == client)
        memory.expire()
        assert len(memory) == len(model) <= size
    assert memory.num_expired + memory.num_crowded <= len(names)


def test_ids_are_long_and_differ() -> None:
    memory = Memory(10_000, 1.0)
    names = {memory.add(remembered()) for _ in range(10_000)}
    assert len(names) == 10_000
    assert min(map(len, names)) >= 16


def test_a_response_in_two_parts_does_not_wait_for_an_acknowledgement() -> None:
    with cli.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- keys


def test_without_keys_none_is_needed() -> None:
    assert not Keys(ServeConfig(), {}).required
    assert not Keys(ServeConfig(), {"MOPE_API_KEYS": " , "}).required


def test_keys_of_the_environment_are_clients_of_their_own() -> None:
    keys = Keys(ServeConfig(api_key_env="MINE"), {"MINE": "one, two ,", "MOPE_API_KEYS": "three"})
    assert keys.required
    assert len(keys) == 2
    clients = {keys.client(key) for key in ("one", "two")}
    assert len(clients) == 2
    assert None not in clients
    for key in ("three", "", None, " two", "one,two", "\ud800", "key", digest("one"), *clients):
        assert keys.client(key) is None


def test_a_file_of_keys_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"one": "a/b", f"sha256:{digest('two')}": "c"}), encoding="utf-8")
    clock.now = 10.0
    keys = Keys(ServeConfig(api_keys=file), {"MOPE_API_KEYS": "kept"})
    assert [keys.client(key) for key in ("one", "two", "kept", "new")] == ["a/b", "c", "key", None]
    for text, expected in (('{"new": "n"}', [None, "n"]), ("{", [None, "n"]), ('{"one": "x"}', ["x", None])):
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(int(clock.now * 1e9), int(clock.now * 1e9)))
        clock.now += 5.0
        keys.refresh()
        assert [keys.client(key) for key in ("one", "new")] == expected
        assert keys.client("kept") == "key"


# -- the desk


@pytest.fixture
def predictor() -> LengthPredictor:
    return LengthPredictor.from_pretrained("chat-micro")


@pytest.fixture
def closing() -> Iterator[list[Desk]]:
    desks: list[Desk] = []
    yield desks
    for desk in desks:
        desk.close()


def asked(desk: Desk, *bodies: Any, deadline_s: float = 30.0, client: str | None = None) -> list[dict[str, Any]]:
    return asyncio.run(desk.predict(bodies, client, deadline_s, time.monotonic()))


def test_thoughts_are_in_the_answer_where_they_are_known(
    predictor: LengthPredictor, closing: list[Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(predictor, ServeConfig(), "chat-micro")
    closing.append(desk)
    (plain,) = asked(desk, {"prompt": "a"})
    assert "thoughts" not in plain
    predict = predictor.predict_batch
    monkeypatch.setattr(
        predictor, "predict_batch", lambda requests: [replace(one, thought_share=0.75) for one in predict(requests)]
    )
    (found,) = asked(desk, {"prompt": "a"})
    assert found["thoughts"]["share"] == 0.75
    assert found["thoughts"]["tokens"] + found["thoughts"]["visible_tokens"] == pytest.approx(found["mean"], abs=0.01)


class Stuck:
    """Makes a predictor wait until it is let go."""

    def __init__(self, predictor: LengthPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.num_asked = 0
        predict = predictor.predict_batch

        def wait(requests: Any) -> list[LengthPrediction]:
            known = list(requests)
            if any(request.prompt != "warm up" for request in known):
                self.num_asked += len(known)
                self.go.wait(20)
            return predict(known)

        monkeypatch.setattr(predictor, "predict_batch", wait)


def test_a_slow_predictor_costs_the_deadline_and_no_more(
    predictor: LengthPredictor, closing: list[Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck(predictor, monkeypatch)
    desk = Desk(predictor, ServeConfig(max_waiting=10), "chat-micro")
    closing.append(desk)
    started = time.monotonic()
    found = asked(desk, *({"prompt": str(number)} for number in range(40)), deadline_s=0.3)
    taken_s = time.monotonic() - started
    sources = [one["source"] for one in found]
    assert 0.2 <= taken_s < 0.3 + SLACK_S
    assert set(sources) == {"fallback:deadline", "fallback:queue full"}
    assert sources.count("fallback:queue full") == 40 - 10 - 4  # what waits, and what is with the predictor
    assert stuck.num_asked <= 4
    stuck.go.set()
    assert asked(desk, {"prompt": "after"})[0]["source"] == "model"


def test_a_client_that_floods_leaves_the_next_place_to_others(
    predictor: LengthPredictor, closing: list[Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck(predictor, monkeypatch)
    desk = Desk(predictor, ServeConfig(num_workers=1), "chat-micro")
    closing.append(desk)
    order: list[str] = []

    async def run() -> None:
        async def ask(client: str, number: int) -> None:
            await desk.predict([{"prompt": f"{client} {number}"}], client, 30.0, time.monotonic())
            order.append(client)

        tasks = [asyncio.create_task(ask("flood", number)) for number in range(60)]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(ask("light", 0)))
        await asyncio.sleep(0.05)
        stuck.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert order.index("light") < 12


def test_one_wrong_request_of_a_list_is_named_and_nothing_is_predicted(
    predictor: LengthPredictor, closing: list[Desk]
) -> None:
    desk = Desk(predictor, ServeConfig(), "chat-micro")
    closing.append(desk)
    with pytest.raises(DataError, match=r"request 1 of the list \(the first is 0\): unknown request field 'promt'"):
        asked(desk, {"prompt": "a"}, {"promt": "b"})
    assert len(desk.memory) == 0


def test_the_llm_is_the_requests_own_or_the_one_of_the_service(predictor: LengthPredictor, closing: list[Desk]) -> None:
    desk = Desk(predictor, ServeConfig(target_llm="llama-3-8b"), "chat-micro")
    closing.append(desk)
    found = asked(desk, {"prompt": "a"}, {"prompt": "a", "model": "gpt-4o"}, {"prompt": "a", "model": ""})
    assert found[0]["llm"] == found[2]["llm"] == predictor.predict("a", target_llm="llama-3-8b").llm
    assert found[1]["llm"] == predictor.predict("a", target_llm="gpt-4o").llm


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 20_000), st.booleans())
def test_what_is_kept_of_a_minimum_never_lets_a_forced_length_teach(least: int, tokens: int, ignores: bool) -> None:
    body = {"prompt": "a", "sampling_params": {"min_tokens": least, "ignore_eos": ignores}}
    powers = (float(2**power) for power in range(32))
    free_from = next((number for number in powers if not is_forced(body, number)), math.inf)
    if tokens >= free_from:
        assert not is_forced(body, tokens)
    if not least and not ignores:
        assert free_from == 1.0


def test_a_cap_that_was_reached_counts_as_cut(
    predictor: LengthPredictor, closing: list[Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(predictor, ServeConfig(), "chat-micro")
    closing.append(desk)
    seen: list[bool] = []
    monkeypatch.setattr(predictor.corrector, "observe", lambda *_, censored, **__: seen.append(censored) is None)
    for said in ({}, {"finish_reason": "stop"}, {"finish_reason": "length"}, {"stop_reason": "max_tokens"}):
        (one,) = asked(desk, {"prompt": "a", "max_tokens": 100})
        assert desk.observe({"id": one["id"], "completion_tokens": 100, **said}, None)["learned"]
    (one,) = asked(desk, {"prompt": "a"})
    desk.observe({"id": one["id"], "completion_tokens": 100}, None)
    assert seen == [True, False, True, True, False]


def test_a_client_that_teaches_too_much_is_told(predictor: LengthPredictor, closing: list[Desk]) -> None:
    desk = Desk(predictor, ServeConfig(), "chat-micro")
    closing.append(desk)
    body = {"prompt": "a", "model": "an-llm"}

    def teach(client: str) -> bool:
        (one,) = asked(desk, body, client=client)
        return bool(desk.observe({"id": one["id"], "completion_tokens": 50}, client)["learned"])

    assert all(teach(f"client-{number}") for number in range(12) for _ in range(5))
    assert not all(teach("flood") for _ in range(60))


def test_an_observation_of_another_client_is_unknown(predictor: LengthPredictor, closing: list[Desk]) -> None:
    desk = Desk(predictor, ServeConfig(), "chat-micro")
    closing.append(desk)
    (one,) = asked(desk, {"prompt": "a"}, client="a")
    for client in ("b", None):
        with pytest.raises(UnknownId):
            desk.observe({"id": one["id"], "completion_tokens": 5}, client)
    assert desk.observe({"id": one["id"], "completion_tokens": 0}, "a") == {
        "id": one["id"],
        "learned": False,
        "reason": "no tokens were generated",
    }


def test_lessons_come_back_and_a_broken_file_stops_the_start(
    predictor: LengthPredictor, closing: list[Desk], tmp_path: Path
) -> None:
    file = tmp_path / "learned.json"
    desk = Desk(predictor, ServeConfig(learned=file), "chat-micro")
    closing.append(desk)
    desk.save()
    assert not file.exists()
    (one,) = asked(desk, {"prompt": "a", "model": "an-llm"})
    desk.observe({"id": one["id"], "completion_tokens": 900}, None)
    desk.save()
    fresh = LengthPredictor.from_pretrained("chat-micro")
    closing.append(Desk(fresh, ServeConfig(learned=file), "chat-micro"))
    assert fresh.recalibrator.to_json() == predictor.recalibrator.to_json()
    for text in ("{", "[]", '{"version": 99}', "[" * 100_000):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="remove the file to start without lessons"):
            Desk(LengthPredictor.from_pretrained("chat-micro"), ServeConfig(learned=file), "chat-micro")


def test_clients_beyond_the_limit_share_metrics(predictor: LengthPredictor, closing: list[Desk]) -> None:
    desk = Desk(predictor, ServeConfig(metrics_clients=2), "chat-micro")
    closing.append(desk)
    for client in ("a", "b", "c", "d", None):
        asked(desk, {"prompt": "a"}, client=client)
    text = desk.metrics.exposed().decode()
    assert 'mope_client_arrived_total{client="a"} 1.0' in text
    assert 'mope_client_arrived_total{client="(others)"} 3.0' in text
    assert 'client="c"' not in text


def test_spans_say_what_was_predicted_and_used(
    predictor: LengthPredictor, closing: list[Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Span:
        def __init__(self) -> None:
            self.attributes: dict[str, Any] = {}

        def is_recording(self) -> bool:
            return True

        def set_attributes(self, attributes: dict[str, Any]) -> None:
            self.attributes |= attributes

    span = Span()
    monkeypatch.setattr(traces, "trace", SimpleNamespace(get_current_span=lambda: span))
    desk = Desk(predictor, ServeConfig(deadline_ms=30_000), "x")
    closing.append(desk)
    body = {"prompt": "Hello.", "model": "llama-3-8b", "max_tokens": 40}
    (answer,) = asyncio.run(desk.predict([body], None, 30.0, time.monotonic()))
    assert span.attributes == {
        "gen_ai.request.model": answer["llm"], "gen_ai.request.max_tokens": 40, "mope.source": "model",
        "mope.output_tokens.expected": answer["mean"], "mope.output_tokens.q90": answer["quantiles"]["0.9"],
    }  # fmt: skip
    span.attributes.clear()
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    desk.observe({"id": answer["id"], "usage": usage, "finish_reason": "stop"}, None)
    assert span.attributes == {
        "gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 9, "gen_ai.response.finish_reasons": ["stop"],
    }  # fmt: skip
    monkeypatch.setattr(traces, "trace", None)
    asyncio.run(desk.predict([body], None, 30.0, time.monotonic()))
