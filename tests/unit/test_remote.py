"""A hook that asks a `mope serve`: the same predictions, lessons that arrive, no harm from a service that is gone."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ports import free_port

pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

from services import Service, serving
from vllm_app import ALICE, CHAT, FORGED, Engine, call, scope_of
from vllm_app import own_registry as own_registry

from mope import LengthPredictor
from mope.errors import ConfigError, DataError, MissingExtraError
from mope.request import AS_READ, Request
from mope.serving_hooks import checks, lengths, remote
from mope.serving_hooks.bodies import read
from mope.serving_hooks.carried import ANSWERING, CLIENT, HIGH, SEAL, TOKENS, Carried
from mope.serving_hooks.front import Front
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.lengths import Lengths
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.remote import REST_S, Teacher, answering_of
from mope.serving_hooks.service.desk import Desk
from mope.serving_hooks.sglang.front import FrontEnd
from mope.serving_hooks.steward import Steward
from mope.serving_hooks.vllm import Middleware

LOGGER = logging.getLogger("test.remote")
CHAT_MICRO = LengthPredictor.from_pretrained("chat-micro")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": JSON})
)
FIELDS = (
    *("prompt", "messages", "input", "instructions", "system", "max_tokens", "max_completion_tokens", "n", "tools"),
    *("temperature", "response_format", "chat_template_kwargs", "reasoning_effort", "reasoning", "thinking"),
)
SLACK_S = 5.0  # of a machine that is busy
KEY = "sk-right-0123456789"
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a hash table?"},
        {"role": "assistant", "content": "A table of keys." * 20},
        {"role": "user", "content": "And a trie?"},
    ],
    "max_tokens": 300,
    "tools": [{"type": "function", "function": {"name": "find"}}],
    "temperature": 0.2,
}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOPE_API_KEY", raising=False)


def options(url: str, **changes: Any) -> HookOptions:
    return HookOptions.read({"predictor": url, "deadline_ms": 60_000, "identity": "header", **changes}, "here")


def front(url: str, names: tuple[str, ...] = ("tiny",), **changes: Any) -> Front:
    chosen = options(url, **changes)
    return Front.load(chosen, Identity(chosen, secret=b"", logger=LOGGER), names, logger=LOGGER)


async def ask(made: Front, body: Any = CHAT, kind: Any = "chat", client: str = "acme/alice") -> Carried:
    return await made.carried(kind, [(b"x-client-id", client.encode())], body, Guard(LOGGER))


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def all_of_it() -> Any:
        return await work()

    return asyncio.run(all_of_it())


def until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + 4 * SLACK_S
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.005)


# -- predictions


@pytest.mark.parametrize("body", [CHAT, CONVERSATION])
def test_the_scheduler_is_told_what_the_service_predicts(body: dict[str, Any]) -> None:
    with serving() as service:
        engine = Engine(mope={"predictor": service.url})
        middleware = Middleware(engine)
        data = json.dumps({**body, "vllm_xargs": {"mine": 3, **FORGED}}).encode()
        asyncio.run(call(middleware, scope_of(engine, "/v1/chat/completions", ALICE), [data]))
        told = engine.json["vllm_xargs"]
        middleware.end()
        asked = {**body, "target_llm": "tiny"}
        if service.predictor.encoder.knows("counts_own"):
            asked["token_unit"] = "own"
        alone = service.predictor.predict_batch([asked])[0]
        assert told.keys() == {"mine", CLIENT, TOKENS, HIGH, ANSWERING, SEAL}
        assert (told[TOKENS], told[HIGH]) == (round(alone.mean, 2), round(alone.quantile(0.9), 2))
        assert Carried.read(told).client == "acme/alice"
        assert service.desk.memory.find(remote.name_of(told[ANSWERING]) or "", None) is not None
        assert middleware.snapshot()["predictions"]["made"] == 1


def test_nothing_is_loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LengthPredictor, "from_pretrained", None)
    url = f"http://127.0.0.1:{free_port()}"
    made = front(url)
    assert made.corrector is None
    assert "a service" in str(made)
    assert Steward(options(url)).lengths.corrector is None


@pytest.mark.parametrize(
    ("names", "taken"),
    [(("/models/snapshot", "qwen3-8b"), "qwen3-8b"), (("Qwen/Qwen3-8B", "gpt-4"), "Qwen/Qwen3-8B"), (("a", "b"), "b")],
)
def test_the_llm_is_the_first_name_that_tells_its_family(names: tuple[str, ...], taken: str) -> None:
    assert front("http://127.0.0.1:9", names).target_llm == taken


def test_of_several_answers_the_mean_is_told_and_none_is_observed() -> None:
    with serving() as service:
        made = front(service.url)

        async def work() -> list[Carried]:
            prompts = {"prompt": ["yes or no?", "list forty long stories"], "max_tokens": 900}
            alone = [await ask(made, {**prompts, "prompt": one}, "completions") for one in prompts["prompt"]]  # type: ignore[attr-defined]
            return [*alone, await ask(made, prompts, "completions"), await ask(made, {**CHAT, "n": 2})]

        first, second, both, twice = run(work)
    assert None not in (first.answering, second.answering, first.tokens, second.tokens, twice.tokens, twice.high)
    assert both.tokens == pytest.approx((first.tokens + second.tokens) / 2)
    assert both.high is both.answering is twice.answering is None


@pytest.mark.parametrize(
    "url",
    [
        *("htp://host", "http://", "http:///x", "http://host:99999", "http://host:0", "http://host/?a=b", "host:8400"),
        *("http://ho st", "http://host#x", "http://[1", "redis://host:6379/0", "http://h\u00f6st", "localhost:8400/v1"),
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(url)
    assert str(caught.value).startswith(f"here: predictor: got {url[:80]!r}; expected http://HOST:PORT or https://HOST")
    assert "\n" not in str(caught.value)


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    for url in ("http://user:hunter2@host:8400", "http://hunter2@host", "https://:hunter2@host:x"):
        with pytest.raises(ConfigError, match="MOPE_API_KEY") as caught:
            options(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host:8400", "https://host", "https://host/mope/v1/", "http://[::1]:8400"])
def test_an_address(url: str) -> None:
    assert options(url).predictor == url


def test_a_missing_package_and_a_wrong_key_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MOPE_API_KEY", "sk-\u00f6")
    for start in (lambda: front(url), lambda: Steward(options(url))):
        with pytest.raises(ConfigError, match="printable ASCII"):
            start()
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mope-llm\[client\]'"):
        front(url)


# -- a service that is gone, slow or does not know us


def test_a_service_that_comes_goes_and_comes_again(caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    caplog.set_level(logging.INFO)
    started = time.monotonic()
    made = front(service.url)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(8):
            assert await ask(made) == Carried("acme/alice")
        asked_s = time.monotonic()
        for _ in range(50):  # it is not asked any more
            assert await ask(made) == Carried("acme/alice")
        assert time.monotonic() - asked_s < min(SLACK_S, 50 * REST_S)
        for _ in range(2):
            await loop.run_in_executor(None, service.start)
            ends = time.monotonic() + REST_S + SLACK_S
            while (await ask(made)).tokens is None:
                assert time.monotonic() < ends
                await asyncio.sleep(0.05)
            await loop.run_in_executor(None, service.stop)
            assert await ask(made) == Carried("acme/alice")

    try:
        assert time.monotonic() - started < SLACK_S
        run(work)
    finally:
        service.stop()
    counted = made.snapshot()["predictions"]
    assert counted["made"] == 2
    assert counted["failed"] >= 60
    assert f"{service.url} gives no predictions yet" in caplog.text
    assert "predictions come from" in caplog.text


@contextmanager
def silent() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_service_that_does_not_answer_costs_the_deadline_and_then_nothing() -> None:
    with silent() as url:
        made = front(url, deadline_ms=40)

        async def work() -> None:
            started = time.monotonic()
            for _ in range(5):
                assert await ask(made) == Carried("acme/alice")
            assert 0.2 <= time.monotonic() - started < 0.2 + SLACK_S
            started = time.monotonic()
            assert all(one.tokens is None for one in await asyncio.gather(*(ask(made) for _ in range(300))))
            assert time.monotonic() - started < SLACK_S

        run(work)
        counted = made.snapshot()["predictions"]
    assert counted["late"] >= 5
    assert counted["failed"] > 0
    assert counted["late"] + counted["failed"] + counted["overload"] == 305


def test_a_key_that_the_service_does_not_know(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(keys=KEY) as service:
        monkeypatch.setenv("MOPE_API_KEY", "sk-wrong")
        made, taught = front(service.url), Lengths(teacher=Teacher(service.url))

        async def work() -> tuple[Carried, Carried]:
            return await ask(made), await ask(made)

        assert run(work) == (Carried("acme/alice"), Carried("acme/alice"))
        assert made.snapshot()["predictions"]["failed"] == 2
        for _ in range(3):
            taught.observe(Carried(answering=answering_of("x")), "a", 9, censored=False)
        taught.close()
        assert (taught.num_lost, taught.num_observed) == (3, 0)
        assert caplog.text.count("it learns nothing from here") == 1
        monkeypatch.setenv("MOPE_API_KEY", KEY)
        made = front(service.url)

        async def again() -> Carried:
            return await ask(made)

        told = run(again)
        assert told.tokens is not None
        taught = Lengths(teacher=Teacher(service.url))
        taught.observe(told, "a", 9, censored=False)
        taught.close()
        assert service.num_learned == taught.num_observed == 1


# -- lessons


def test_finished_requests_teach_the_service_and_its_predictions_follow() -> None:
    with serving() as service:
        made, steward = front(service.url), Steward(options(service.url))
        body = {**CHAT, "max_tokens": 100_000}

        async def predicted() -> list[Carried]:
            return await asyncio.gather(*(ask(made, body, client=f"c{number % 10}") for number in range(60)))

        before = run(predicted)
        for number, told in enumerate(before):
            read = Carried.read(json.loads(json.dumps(told.write())))
            held = steward.arrive(str(number), read, 10, max_tokens=100_000)
            assert held.nine_tenths == told.high
            steward.policy.admit(steward.policy.find(str(number)))
            steward.admitted(str(number))
            steward.ended(str(number), 4000, aborted=False)
        until(lambda: steward.lengths.num_observed == 60)
        steward.close()
        assert service.num_learned == 60
        assert len(service.desk.memory) == 0
        made = front(service.url)
        after = run(predicted)
        assert after[0].tokens > 2 * (before[0].tokens or 0)
        assert sum("c7" in str(label) for label in service.desk.metrics._labels) == 1  # whose lessons they are is told


def waiting(service: Service, num: int = 1) -> list[str]:
    """Ids of predictions that wait for their observation."""
    bodies = [{"prompt": f"hello {number}"} for number in range(num)]
    return [one["id"] for one in run(lambda: service.desk.predict(bodies, None, 30.0, time.monotonic()))]


def test_what_is_cut_forced_empty_or_unpredicted(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as service:
        seen: list[tuple[int, bool]] = []
        corrector = service.predictor.corrector
        monkeypatch.setattr(
            corrector, "observe", lambda raw, who, tokens, *, censored, client: not seen.append((tokens, censored))
        )
        cut, whole, forced, empty = map(answering_of, waiting(service, 4))
        taught = Lengths(teacher=Teacher(service.url))
        taught.observe(Carried(tokens=5.0, answering=cut), "a", 7, censored=True)
        taught.observe(Carried(tokens=5.0, answering=whole), "a", 8, censored=False)
        taught.observe(Carried(tokens=5.0, answering=forced), "a", 9, censored=False, forced=True)
        taught.observe(Carried(tokens=5.0, answering=empty), "a", 0, censored=True)
        taught.observe(Carried("a"), "a", 10, censored=False)
        taught.observe(Carried("a", 5.0, 9.0, "raw", "mine||||1||0"), "a", 11, censored=False)
        taught.close()
        assert seen == [(7, True), (8, False)]
        assert (taught.num_observed, taught.num_forced, taught.num_lost, taught.num_dropped) == (2, 1, 0, 0)
        assert taught.expected(Carried(), "a").tokens is not None  # the running mean goes on


def test_an_id_that_is_forgotten_or_sent_twice_is_counted_and_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "REST_S", 60.0)
    with serving() as service:
        (name,) = waiting(service)
        taught = Lengths(teacher=Teacher(service.url))
        for one in ("forgotten", name, name, "x" * 500):
            taught.observe(Carried(answering=answering_of(one)), "a", 7, censored=False)
        until(lambda: taught.num_observed + taught.num_lost == 4)
        taught.close()
        assert (taught.num_observed, taught.num_lost) == (1, 3)


def test_a_service_that_was_away_is_told_again() -> None:
    with serving() as service:
        teacher = Teacher(service.url)
        (name,) = waiting(service)
        assert teacher.observe(name, 7, censored=False, client="a")
        service.stop()  # closes the connection that is kept
        service.start()
        (name,) = waiting(service)
        assert teacher.observe(name, 7, censored=False, client="a")
        teacher.close()


def test_callers_cannot_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as service:
        (name,) = waiting(service)
        forged = {TOKENS: 5.0, ANSWERING: answering_of(name), SEAL: "0" * 32}
        engine = Engine(mope={"predictor": service.url})
        middleware = Middleware(engine)
        data = json.dumps({**CHAT, "vllm_xargs": forged}).encode()
        asyncio.run(call(middleware, scope_of(engine, "/v1/chat/completions", ALICE), [data]))
        told = engine.json["vllm_xargs"]
        assert told[ANSWERING] not in (forged[ANSWERING], None)
        middleware.end()
        steward = Steward(options(service.url))
        for carried in (forged, {**told, ANSWERING: forged[ANSWERING]}):
            read = Carried.read(carried)
            assert read == Carried()
            steward.lengths.observe(read, "eve", 100_000, censored=False)
        steward.close()
        assert service.num_learned == steward.lengths.num_lost == 0
        assert service.desk.memory.find(name, None) is not None


def test_a_full_queue_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_MAX_WAITING", 3)
    go = threading.Event()
    taught = Lengths(teacher=Teacher("http://127.0.0.1:9"))
    monkeypatch.setattr(taught.teacher, "observe", lambda *_, **__: go.wait(SLACK_S))
    started = time.monotonic()
    for number in range(10):
        taught.observe(Carried(answering=answering_of(str(number))), "a", 7, censored=False)
    assert time.monotonic() - started < SLACK_S / 2
    assert taught.num_dropped in (6, 7)  # one may be on its way
    go.set()
    taught.close(SLACK_S)
    assert taught.num_observed + taught.num_dropped == 10


@pytest.mark.parametrize("answers", [False, True])
def test_the_end_does_not_wait_for_a_service(answers: bool) -> None:
    with silent() as quiet:
        taught = Lengths(teacher=Teacher(quiet if answers else f"http://127.0.0.1:{free_port()}"))
        for number in range(1000):
            taught.observe(Carried(answering=answering_of(str(number))), "a", 7, censored=False)
        until(lambda: taught._thread is not None)
        started = time.monotonic()
        taught.close(2 * SLACK_S)
        assert time.monotonic() - started < SLACK_S
        assert taught._thread is not None
        assert not taught._thread.is_alive()
        assert (taught.num_lost, taught.num_observed) == (1000, 0)


def test_without_recalibration_nothing_is_observed() -> None:
    with serving() as service:
        made, steward = front(service.url, recalibrate=False), Steward(options(service.url, recalibrate=False))

        async def work() -> Carried:
            return await ask(made)

        told = run(work)
        assert told.tokens is not None
        assert told.answering is None
        assert steward.lengths.teacher is None
        assert not steward.lengths.learns
        steward.close()


def test_in_sglang_the_front_end_teaches_and_the_scheduler_is_told_no_id() -> None:
    with serving() as service:
        arguments = SimpleNamespace(api_key=None, served_model_name="tiny", model_path="m", enable_metrics=False)
        end = FrontEnd(arguments, options(service.url, identity="none"))
        asked = SimpleNamespace(text="hello there", sampling_params={"max_new_tokens": 900}, stream=False)

        async def work() -> list[Carried]:
            return await end.prepare(asked, None)

        carried = run(work)
        told = Carried.read(asked.sampling_params["custom_params"])
        assert told == Carried(None, carried[0].tokens, carried[0].high)
        meta = {"finish_reason": {"type": "stop"}, "completion_tokens": 70}
        end.saw(carried, {"meta_info": meta}, asked.sampling_params)
        end.lengths.close(SLACK_S)
        assert service.num_learned == end.lengths.num_observed == 1


# -- the service's side


@given(
    kind=st.sampled_from(["completions", "chat", "responses", "messages"]),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON | MESSAGES, max_size=6),
)
def test_a_request_arrives_as_it_was_read(kind: Any, body: dict[str, Any]) -> None:
    for request in (*read(kind, body, "llm").requests, *read("chat", CONVERSATION, "llm").requests):
        assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


@given(st.dictionaries(st.sampled_from([*Request.__dataclass_fields__, "promt"]), JSON | st.just("own"), max_size=6))
def test_whatever_is_sent_in_place_of_a_request_is_read_or_refused(given: dict[str, Any]) -> None:
    desk = SimpleNamespace(_unit=None, config=SimpleNamespace(target_llm=None))
    with suppress(DataError):
        request = Desk.read(desk, {AS_READ: json.loads(json.dumps(given))})  # type: ignore[arg-type]
        assert isinstance(CHAT_MICRO.predict_batch([request])[0].mean, float)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"promt": "a"}, "a request as it was read has 'promt'; known are prompt, system"),
        ({"system": "a"}, "has 'no prompt'"),
        ({"prompt": "a", "num_earlier_turns": -1}, "num_earlier_turns is a whole number, 0 or more; got -1"),
    ],
)
def test_a_request_that_was_not_read_so_is_named(given: dict[str, Any], told: str) -> None:
    with serving() as service, pytest.raises(DataError, match=re.escape(told)):
        service.desk.read({AS_READ: given})


def observed(service: Service, sender: str | None, by: str | None) -> list[str | None]:
    """Whom the service takes for the teacher when `by` observes an answer of `sender`."""
    taught: list[str | None] = []
    service.predictor.corrector.observe = lambda *_, client, **__: not taught.append(client)  # type: ignore[method-assign]
    (found,) = run(lambda: service.desk.predict([{"prompt": "hello"}], by, 30.0, time.monotonic()))
    service.desk.observe({"id": found["id"], "completion_tokens": 5, "client": sender}, by)
    return taught


def test_who_may_say_whose_request_it_was() -> None:
    with serving() as service:
        assert observed(service, "acme/alice", "key") == ["acme/alice"]
        assert observed(service, None, "key") == observed(service, "", "key") == ["key"]
    with serving(gateways=("gate",)) as service:
        assert observed(service, "acme/alice", "gate") == ["acme/alice"]
        assert observed(service, "acme/alice", "key") == ["key"]


# -- the doctor


def test_the_doctor_asks_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(keys=KEY) as service:
        found = checks.predictor(service.url, 60_000)
        assert found.status == "failed"
        assert "into the variable MOPE_API_KEY" in found.text
        monkeypatch.setenv("MOPE_API_KEY", KEY)
        found = checks.predictor(f"{service.url}/v1/", 60_000)
        assert found.status == "ok"
        assert "predictions by chat-micro" in found.text
        found = checks.predictor(service.url, 0.0001)
        assert found.status == "warning"
        assert "raise deadline_ms" in found.text
    found = checks.predictor(service.url, 60_000)
    assert found.status == "failed"
    assert "mope serve chat-small" in found.text
    assert "\n" not in found.text


def test_the_doctor_warns_of_texts_without_tls() -> None:
    texts = [found.text for found in checks.options(options("http://elsewhere:8400"))]
    assert any("travel to elsewhere without TLS" in text for text in texts)
    assert not checks.options(options("https://elsewhere"))[1:]
