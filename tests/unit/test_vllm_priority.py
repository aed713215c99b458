"""vLLM's `PriorityMiddleware`: fair order by the priority of requests, for vLLM's own scheduler."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from vllm_app import (
    CHAT,
    Engine,
    bearer,
    call,
    lives,
    post,
    scope_of,
    with_keys,
    without_predictor,
)
from vllm_app import own_registry as own_registry

from mope.serving_hooks.vllm import PriorityMiddleware
from mope.serving_hooks.vllm import middleware as module


def priorities(middleware: Any, engine: Engine, client: str, count: int, tokens: int = 100) -> list[int]:
    found = []
    for _ in range(count):
        post(
            middleware,
            engine,
            {**CHAT, "max_tokens": tokens, "priority": -9},
            headers=[(b"x-client-id", client.encode()), (b"X-Vllm-Priority", b"-5")],
        )
        found.append(engine.json["priority"])
        assert engine.headers[-1]["x-vllm-priority"] == str(found[-1])
        assert "X-Vllm-Priority" not in engine.headers[-1]
    return found


def test_tags_grow_with_what_a_client_asks_for() -> None:
    engine, middleware = without_predictor(PriorityMiddleware, mope={"weights": {"b": 2}})
    a, b = priorities(middleware, engine, "a", 3), priorities(middleware, engine, "b", 3)
    assert a[0] == 0
    assert a[1] > 200_000  # 100 response tokens at price 2, in thousandths, and the prompt
    assert a[2] == 2 * a[1]
    assert b[0] == a[2]  # virtual time: the largest tag that began
    assert (b[2] - b[0]) * 2 == pytest.approx(a[2], abs=10)
    assert priorities(middleware, engine, "c", 1) == [b[2]]
    assert "vllm_xargs" not in engine.json


def test_a_refused_request_costs_nothing() -> None:
    engine, middleware = without_predictor(PriorityMiddleware, status=401)
    assert priorities(middleware, engine, "a", 3) == [0, 0, 0]


def test_predictions_set_the_price(tiny: Path) -> None:
    found = []
    for predictor in (str(tiny), "none"):
        engine = Engine(mope={"predictor": predictor, "default_tokens": 7})
        middleware = PriorityMiddleware(engine)
        found.append(priorities(middleware, engine, "a", 2, tokens=10_000)[1])
        middleware.end()
    assert found[1] < 30_000 < found[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"policy": "fcfs"}, "--scheduling-policy priority"), ({"servers": 2}, "--api-server-count 1")],
)
def test_where_it_cannot_work_it_says_so(options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    engine, middleware = without_predictor(PriorityMiddleware, **options)
    lives(middleware, engine)
    (record,) = [record for record in caplog.records if record.name == "vllm.mope"]
    assert record.levelname == "ERROR"
    assert said in record.getMessage()
    post(middleware, engine, {**CHAT, "priority": -9})
    assert engine.json["priority"] == (-9 if options == {"policy": "fcfs"} else 0)  # vLLM refuses the former itself
    engine, middleware = without_predictor(PriorityMiddleware, mope={"on_mismatch": "refuse"}, **options)
    (sent,) = lives(middleware, engine)
    assert said in sent["message"]


def test_after_a_failure_the_order_is_that_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, middleware = without_predictor(PriorityMiddleware)
    last = priorities(middleware, engine, "a", 4)[-1]
    monkeypatch.setattr(middleware._tags, "arrive", lambda *_: 1 / 0)
    assert priorities(middleware, engine, "b", 2) + priorities(middleware, engine, "a", 2) == [last] * 4


def price(body: dict[str, Any], path: str = "/v1/chat/completions") -> float:
    """Weighted tokens that a request is charged."""
    engine, middleware = without_predictor(PriorityMiddleware, mope={"default_tokens": 1})
    tags = []
    for _ in range(2):
        post(middleware, engine, body, path)
        tags.append(engine.json["priority"])
    return (tags[1] - tags[0]) / 1000


WORDS = "word " * 20_000
HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORDS}]}),
        ("/v1/chat/completions", {"messages": [*HI, {"role": "tool", "content": WORDS}]}),
        ("/v1/chat/completions", {"messages": HI, "tools": [{"function": {"description": WORDS}}]}),
        ("/v1/chat/completions", {"messages": HI, "documents": [{"text": WORDS}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "x", "thinking": WORDS}]}]}),
        ("/v1/completions", {"prompt_embeds": WORDS}),
        ("/v1/completions", {"prompt": [7] * 20_000}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": WORDS[:1000]}]] * 100}),
    ],
)
def test_what_is_long_costs_much_wherever_it_stands(path: str, body: dict[str, Any]) -> None:
    assert price(body, path) > 19_000


@pytest.mark.parametrize(
    "further",
    [{"n": 100}, {"n": "100"}, {"best_of": 100}, {"n": 100.0}],
)
def test_each_answer_costs(further: dict[str, Any]) -> None:
    body = {"messages": HI, "max_tokens": "50"}
    one = price(body)
    assert price({**body, **further}) >= one + 99 * 2 * 1


def test_without_a_known_key_a_request_is_tagged_as_anybodys_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, middleware = with_keys(PriorityMiddleware)
    monkeypatch.setattr(module, "parsed", lambda body: pytest.fail("it was read"))
    for path in ("/invocations", "/v1/chat/completions"):
        for _ in range(2):
            data = json.dumps({**CHAT, "priority": -9}).encode()
            headers = [*bearer("made-up"), (b"X-Vllm-Priority", b"-5"), (b"content-length", str(len(data)).encode())]
            asyncio.run(call(middleware, scope_of(engine, path, headers), [data[:9], data[9:40], data[40:]]))
            assert len(engine.received) == 4
            engine.received.clear()
            assert engine.headers[-1]["x-vllm-priority"] == str(engine.json["priority"])
    tags = [json.loads(body)["priority"] for body in engine.bodies]
    assert tags[0] == 0
    assert tags == sorted({*tags})  # one client, that pays
