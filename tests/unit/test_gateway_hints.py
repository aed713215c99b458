"""The filter in front of llm-d, Dynamo and AIBrix, with requests in the forms that their pages show.

A real `mope serve` predicts; an application behind the filter records what reaches it, message by message.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ports import free_port
from pydantic import BaseModel, ConfigDict, Field, ValidationError

pytest.importorskip("httpx2")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

import httpx2 as httpx
import uvicorn
from vllm_app import Engine, call, scope_of

from mope import LengthPredictor
from mope.client import Prediction, Predictions
from mope.serving_hooks import asgi, identity
from mope.serving_hooks.gateways import hints
from mope.serving_hooks.gateways.hints import (
    OSL,
    VARIABLES,
    HintsConfig,
    HintsMiddleware,
    around_member,
    latency_request,
    predicted_tokens,
)
from mope.serving_hooks.service.app import create_app
from mope.serving_hooks.service.config import ServeConfig
from mope.serving_hooks.service.desk import Desk
from mope.serving_hooks.service.keys import Keys

HOW_TO = (Path(__file__).resolve().parents[2] / "serving_hooks" / "gateways" / "README.md").read_text(encoding="utf-8")
FAIRNESS, OLD_FAIRNESS = "x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"
SECRET = "0123456789abcdef"
SLACK_S = 1.0  # of a machine that is busy
CHAT = {"model": "my-model", "messages": [{"role": "user", "content": "Continue the report."}]}
Headers = list[tuple[bytes, bytes]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AgentHints(Strict):
    """What Dynamo's frontend takes: unknown names and other types are an error."""

    priority: int | None = None
    strict_priority: int | None = Field(None, ge=0, lt=2**32)
    osl: int | None = Field(None, ge=0, lt=2**32)
    speculative_prefill: bool | None = None


class NvExt(Strict):
    greed_sampling: bool | None = None
    annotations: list[str] | None = None
    extra_fields: list[str] | None = None
    agent_hints: AgentHints | None = None


# (path, body) as the projects' pages and tests have them
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llm-d flow control": ("/v1/completions", {"model": "default-model", "prompt": "Say hello"}),
    "llm-d critic": (
        "/v1/completions",
        {"model": "food-review", "prompt": "Write as if you were a critic: San Francisco", "max_tokens": 100},
    ),
    "llm-d thinking": (
        "/v1/chat/completions",
        {**CHAT, "chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 2048, "stream": True},
    ),
    "dynamo plain": ("/v1/chat/completions", CHAT),
    "dynamo hints": (
        "/v1/chat/completions",
        {**CHAT, "nvext": {"agent_hints": {"priority": 5, "strict_priority": 1, "speculative_prefill": True}}},
    ),
    "dynamo extensions": (
        "/v1/completions",
        {
            "model": "my-model",
            "prompt": "Hello",
            "nvext": {"greed_sampling": True, "extra_fields": ["worker_id", "timing"], "annotations": ["llm_metrics"]},
        },
    ),
    "dynamo null": ("/v1/chat/completions", {**CHAT, "nvext": {"agent_hints": None}}),
    "dynamo streams": (
        "/v1/chat/completions",
        {**CHAT, "nvext": None, "stream": True, "stream_options": {"include_usage": True}, "seed": 2**70},
    ),
    "dynamo responses": ("/v1/responses", {"model": "my-model", "input": "Hello", "max_output_tokens": 64}),
    "dynamo messages": (
        "/v1/messages",
        {"model": "m", "max_tokens": 1024, "system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}]},
    ),
    "aibrix": (
        "/v1/chat/completions",
        {
            "model": "your-model-name",
            "messages": [{"role": "user", "content": "Say this is a test!"}],
            "temperature": 0.7,
        },
    ),
    "an image": (
        "/v1/chat/completions",
        {
            "model": "m",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is in it? \U0001f4f7"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0KGgo" * 500}},
                    ],
                }
            ],
        },
    ),
}


@contextmanager
def in_a_thread(make: Callable[[], Any]) -> Iterator[str]:
    """The address of a server for an application that is made in its thread."""
    port, servers = free_port(), list[Any]()

    def serve() -> None:
        servers.append(uvicorn.Server(uvicorn.Config(make(), port=port, log_level="error")))
        servers[0].run()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not servers or not servers[0].started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        servers[0].should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The address of a `mope serve`."""
    config = ServeConfig(log_requests=False, deadline_ms=30_000)

    def make() -> Any:
        desk = Desk(LengthPredictor.from_pretrained("chat-micro"), config, "chat-micro")
        return create_app(desk, Keys(config, {}))

    with in_a_thread(make) as url:
        yield url


@pytest.fixture
def dynamo(service: str) -> HintsConfig:
    return HintsConfig(stacks=("dynamo",), url=service, deadline_ms=20_000)


def by_header(*stacks: Any, name: str = "x-tenant", **options: Any) -> HintsConfig:
    return HintsConfig(stacks=stacks, client_header=name, secret="env:HINTS_SECRET", **options)


@pytest.fixture(autouse=True)
def a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HINTS_SECRET", SECRET)


def passed(
    config: HintsConfig | HintsMiddleware,
    body: Any = b"{}",
    path: str = "/v1/chat/completions",
    headers: Headers | None = None,
    *,
    method: str = "POST",
    root: str = "",
    broken_off: bool = False,
) -> tuple[bytes, dict[str, str], Engine]:
    """The body and the headers that reach the application behind, and that application."""
    engine = Engine()
    middleware = config if isinstance(config, HintsMiddleware) else HintsMiddleware(engine, config)
    middleware.app = engine
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = [(b"content-length", str(len(data)).encode()), *(headers or [])]
    third = max(1, len(data) // 3)
    chunks = [data[:third], data[third : 2 * third], data[2 * third :]]

    async def run() -> None:
        answered = await call(middleware, scope_of(engine, path, sent, method, root), chunks, broken_off)
        if not broken_off:
            assert [message.get("body") for message in answered] == [None, b"data: 1\n\n", b"data: 2\n\n", b""]
        if middleware._asked is not None:
            await middleware._asked.close()
            middleware._asked = None

    asyncio.run(run())
    if not engine.bodies:
        return b"".join(message.get("body", b"") for message in engine.received), {}, engine
    assert engine.headers[-1]["content-length"] == str(len(engine.bodies[-1]))
    return engine.bodies[-1], engine.headers[-1], engine


def osl_of(body: bytes) -> int:
    found = json.loads(body)["nvext"]["agent_hints"]["osl"]
    assert type(found) is int
    return found


# -- lengths


@pytest.mark.parametrize("name", SHAPES)
def test_a_length_is_added_and_nothing_else_changes(dynamo: HintsConfig, name: str) -> None:
    path, body = SHAPES[name]
    changed = json.loads(passed(dynamo, body, path)[0])
    NvExt.model_validate(changed["nvext"])
    osl = changed["nvext"]["agent_hints"].pop("osl")
    assert 1 <= osl <= min(body.get(cap, 10**6) for cap in ("max_tokens", "max_output_tokens"))
    theirs = body.get("nvext") or {}
    assert changed.pop("nvext") == {**theirs, "agent_hints": theirs.get("agent_hints") or {}}
    assert list(changed.items()) == [member for member in body.items() if member[0] != "nvext"]


def test_the_strict_form_is_strict() -> None:
    for wrong in (
        {"agent_hints": {"osl": 1.0}},
        {"agent_hints": {"osl": -1}},
        {"agent_hints": {"length": 1}},
        {"x": 1},
    ):
        with pytest.raises(ValidationError):
            NvExt.model_validate(wrong)


def test_bytes_stay_as_they_came(dynamo: HintsConfig) -> None:
    body = ' {"model": "m",\n\t"prompt" : "Gr\u00fc\u00dfe \\ud83d\\ude00 \\/", "a": 1e400, "b": 1.50, "a": -0 \n} \n'
    changed = passed(dynamo, body.encode(), "/v1/completions")[0]
    added = f',"nvext":{{"agent_hints":{{"osl":{osl_of(changed)}}}}}'
    assert changed.decode().replace(added, "", 1) == body
    with_theirs = b'{"nvext" :{ "agent_hints":{"priority" : 5 }, "x": 1.0},"prompt":"Hi"}'
    changed = passed(dynamo, with_theirs, "/v1/completions")[0]
    assert changed.replace(f',"osl":{osl_of(changed)}'.encode(), b"", 1) == with_theirs


@pytest.mark.parametrize(("length", "key"), [("mean", "mean"), ("median", "median"), (0.9, "0.9"), (0.7, "0.9")])
def test_which_length_is_told(dynamo: HintsConfig, length: Any, key: str) -> None:
    body = {"model": "m", "prompt": "Write a long story about a lighthouse."}
    predicted = httpx.post(f"{dynamo.url}/v1/predict", json=body, timeout=30, trust_env=False).json()
    expected = {**predicted["quantiles"], **predicted}[key]
    config = dynamo.model_copy(update={"length": length})
    assert osl_of(passed(config, body, "/v1/completions")[0]) == round(expected)


def test_a_length_is_a_whole_number_above_0() -> None:
    prediction = Prediction(median=0.2, mean=1e9, quantiles={0.5: 0.0, 0.9: 7.6})
    assert predicted_tokens(prediction) == 10**9
    assert predicted_tokens(prediction, "median") == predicted_tokens(prediction, 0.1) == 1
    assert predicted_tokens(prediction, 0.9) == 8


UNTOUCHED = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b'"nvext"',
    b'{"prompt": "Hi",}',
    b'{"prompt": "Hi"} {}',
    b"\xff\xfe\x00",
    b'\xef\xbb\xbf{"prompt": "Hi"}',
    '{"prompt": "Hi"}'.encode("utf-16"),
    gzip.compress(b'{"prompt": "Hi"}'),
    b'{"prompt": "Hi", "nvext": 3}',
    b'{"prompt": "Hi", "nvext": []}',
    b'{"prompt": "Hi", "nvext": {"agent_hints": "x"}}',
    b'{"prompt": "Hi", "nvext": {"agent_hints": {"osl": 12}}}',
    b'{"prompt": "Hi", "nvext": {"agent_hints": {"osl": 0}}}',
    b'{"prompt": "Hi", "nvext": {"agent_hints": {"osl": "long"}}}',
    b'{"prompt": "Hi", "nvext": {"agent_hints": {"osl": {}}}}',
    b'{"prompt": "Hi", "nvext": {"agent_hints": {}}, "nvext": {}}',
    b'{"prompt": "Hi", "\\u006evext": {"agent_hints": {"osl": 12}}}',
    b'{"prompt": "Hi", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


@pytest.mark.parametrize("body", UNTOUCHED, ids=range(len(UNTOUCHED)))
def test_what_has_no_place_for_a_length_passes_and_the_service_is_not_asked(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Predictions, "predict", lambda *given: asked.append(given))
    middleware = HintsMiddleware(Engine(), HintsConfig(stacks=("dynamo",)))
    assert passed(middleware, body)[0] == body
    assert asked == []
    assert middleware.guard.num_failures == 0


@pytest.mark.parametrize(
    "body", [{"a": 1}, {"model": "m", "prompt": ["one", "two"]}, {"messages": 3}, {"prompt": "  "}]
)
def test_what_the_service_does_not_predict_passes(dynamo: HintsConfig, body: Any) -> None:
    data = json.dumps(body, indent=1).encode()
    assert passed(dynamo, data, "/v1/completions")[0] == data


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/models", "/", "/v1/messages/count_tokens", "/v1/audio/speech"])
def test_other_paths_are_not_read(dynamo: HintsConfig, path: str) -> None:
    data = json.dumps(CHAT).encode()
    body, _, engine = passed(dynamo, data, path)
    assert body == data
    assert len(engine.received) == 4  # three chunks as they came, and the disconnect


def test_a_path_below_a_root_or_a_prefix_counts(dynamo: HintsConfig) -> None:
    assert osl_of(passed(dynamo, CHAT, "/llm/v1/chat/completions", root="/llm")[0])
    assert osl_of(passed(dynamo, CHAT, "/openai/v1/chat/completions")[0])


def test_large_bodies_pass_as_they_come(dynamo: HintsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps({"prompt": "Hi", "user": "x" * 3000}).encode()
    assert passed(dynamo, data)[0] != data
    monkeypatch.setattr(hints, "MAX_CHANGED", 3000)
    assert passed(dynamo, data)[0] == data
    monkeypatch.setattr(asgi, "MAX_READ", 1500)
    body, _, engine = passed(dynamo, data)
    assert body == data
    third = len(data) // 3
    assert [len(message.get("body", b"")) for message in engine.received] == [third, third, len(data) - 2 * third, 0]


def test_a_body_with_much_text_passes(dynamo: HintsConfig) -> None:
    data = json.dumps({"prompt": "word " * 1_000_000}).encode()
    assert passed(dynamo, data)[0] == data


def test_a_client_that_goes_away_is_told_behind(dynamo: HintsConfig) -> None:
    data = json.dumps(CHAT).encode()
    body, _, engine = passed(dynamo, data, broken_off=True)
    assert body == data
    assert [message["type"] for message in engine.received] == ["http.request"] * 3 + ["http.disconnect"]


# -- nothing of ours costs a request more than its deadline


def test_a_dead_service_leaves_requests_byte_for_byte() -> None:
    config = HintsConfig(stacks=("dynamo",), url=f"http://127.0.0.1:{free_port()}")
    data = json.dumps(CHAT, indent=2).encode()
    middleware = HintsMiddleware(Engine(), config)
    for _ in range(8):  # also once it is not asked any more
        body, headers, engine = passed(middleware, data)
        assert (body, headers["content-length"]) == (data, str(len(data)))
        assert [len(message.get("body", b"")) for message in engine.received[:-1]] == [len(data) // 3] * 3
    assert middleware.guard.ok


def with_answers(handle: Callable[[asyncio.StreamWriter], Awaitable[None]], deadline_ms: float) -> tuple[bytes, float]:
    """What becomes of a request, and how long it takes, where a service answers so."""
    data = json.dumps(CHAT).encode()

    async def run() -> tuple[bytes, float]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await handle(writer)
            writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        engine = Engine()
        middleware = HintsMiddleware(engine, HintsConfig(stacks=("dynamo",), url=url, deadline_ms=deadline_ms))
        started = time.monotonic()
        await call(middleware, scope_of(engine, "/v1/chat/completions"), [data])
        taken_s = time.monotonic() - started
        assert middleware._asked is not None
        await middleware._asked.close()
        server.close()
        return engine.bodies[-1], taken_s

    body, taken_s = asyncio.run(run())
    assert body == data or osl_of(body)
    return body, taken_s


def test_a_service_that_never_answers_costs_the_deadline() -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    body, taken_s = with_answers(never, 200)
    assert body == json.dumps(CHAT).encode()
    assert 0.15 < taken_s < 0.2 + SLACK_S


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"median": 3.4, "mean": 8.6, "quantiles": {"0.5": 3.4}, "expert": 0, "source": "model"}, 9),
        ({"median": 3.4, "mean": 8.6, "quantiles": {"0.5": 3.4}, "expert": -1, "source": "fallback:deadline"}, None),
        ({"median": 3.4, "mean": 1e99, "quantiles": {}, "expert": 0, "source": "model"}, None),
        ({"median": 3.4, "mean": -1, "quantiles": {}, "expert": 0, "source": "model"}, None),
        ([], None),
        ("\x00", None),
    ],
)
def test_only_a_prediction_is_told(answer: Any, expected: int | None) -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        text = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        await writer.drain()

    body, _ = with_answers(say, 20_000)
    assert body == json.dumps(CHAT).encode() if expected is None else osl_of(body) == expected


def test_a_fault_of_ours_costs_a_hint_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr(Predictions, "predict", fail)
    monkeypatch.setattr(identity.Identity, "client", lambda *_: 1 / 0)
    middleware = HintsMiddleware(Engine(), by_header("llm-d", "dynamo", "aibrix"))
    data = json.dumps(CHAT, indent=2).encode()
    with caplog.at_level(logging.ERROR, "mope"):
        for _ in range(3):
            body, headers, _ = passed(middleware, data, headers=[(b"user", b"eve"), (FAIRNESS.encode(), b"eve")])
            assert body == data
            assert headers[FAIRNESS] == "(anonymous)"
            assert "user" not in headers
    assert middleware.guard.ok
    assert middleware.guard.num_spoiled == 6
    assert len(caplog.records) == 1


def test_once_it_is_broken_bodies_pass_unread_and_clients_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictions, "predict", lambda *_: pytest.fail("asked"))
    middleware = HintsMiddleware(Engine(), by_header("llm-d", "dynamo"))
    data = json.dumps(CHAT).encode()
    passed(middleware, b"[]")
    middleware.guard.fail(RuntimeError("ours"), "testing")
    body, headers, engine = passed(
        middleware, data, headers=[(b"x-tenant", b"acme/alice"), (FAIRNESS.encode(), b"eve")]
    )
    assert (body, headers[FAIRNESS]) == (data, "acme/alice")
    assert len(engine.received) == 4  # chunks as they came, and the disconnect


def test_a_fault_behind_is_not_ours(dynamo: HintsConfig) -> None:
    engine = Engine(error=KeyError("theirs"))
    middleware = HintsMiddleware(engine, dynamo)

    async def run() -> None:
        try:
            await call(middleware, scope_of(engine, "/v1/chat/completions"), [json.dumps(CHAT).encode()])
        finally:
            assert middleware._asked is not None
            await middleware._asked.close()

    with pytest.raises(KeyError, match="theirs"):
        asyncio.run(run())
    assert middleware.guard.num_failures == 0


# -- clients

FORGED: Headers = [
    (FAIRNESS.encode(), b"tenant-a"),
    (b"X-LLM-D-Inference-Fairness-ID", b"tenant-b"),
    (OLD_FAIRNESS.encode(), b"tenant-c"),
    (b"user", b"tenant-d"),
]
OTHERS: Headers = [(b"x-llm-d-inference-objective", b"premium-traffic"), (b"routing-strategy", b"vtc-basic")]


def names_of(config: HintsConfig | HintsMiddleware, headers: Headers, **sent: Any) -> list[str]:
    """All values of the headers that name a client, and nothing else of the headers has changed."""
    engine = Engine()
    middleware = config if isinstance(config, HintsMiddleware) else HintsMiddleware(engine, config)
    reached: list[Any] = []

    async def record(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    middleware.app = record
    scope = {**scope_of(engine, sent.get("path", "/v1/completions"), headers, sent.get("method", "POST"))}
    scope["type"] = sent.get("type", "http")
    asyncio.run(call(middleware, scope, [b"{}"]))
    kinds = (FAIRNESS.encode(), OLD_FAIRNESS.encode(), b"user")
    found = [(name.lower(), value) for name, value in reached[0]["headers"]]
    assert [pair for pair in found if pair[0] not in kinds] == [
        (name.lower(), value) for name, value in scope["headers"] if name.lower() not in kinds
    ]
    assert all(value.isascii() for name, value in found if name in kinds)
    return [value.decode() for kind in kinds for name, value in found if name == kind]


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"method": "GET", "path": "/v1/models"},
        {"path": "/v1/embeddings"},
        {"method": "PUT", "path": "/anything"},
        {"type": "websocket", "path": "/v1/realtime"},
    ],
)
def test_forged_names_are_replaced_on_every_path(sent: dict[str, str]) -> None:
    headers = [*FORGED, *OTHERS, (b"x-tenant", b"acme/alice")]
    alice = "acme/alice"
    assert names_of(by_header("llm-d"), headers, **sent) == [alice, alice, "tenant-d"]
    assert names_of(by_header("aibrix"), headers, **sent) == ["tenant-a", "tenant-b", "tenant-c", alice]
    assert names_of(by_header("llm-d", "aibrix"), headers, **sent) == [alice, alice, alice]


def test_names_that_fit_into_a_header_are_told_as_they_are() -> None:
    name = "a.b-c_d/e@example.com:8(1)"
    assert names_of(by_header("aibrix"), [(b"x-tenant", name.encode())]) == [name]


def test_those_without_a_name_share_one_and_aibrix_hears_none() -> None:
    for headers in ([], [(b"x-tenant", b"")], [(b"x-tenant", b"a"), (b"x-tenant", b"b")]):
        assert names_of(by_header("llm-d", "aibrix"), [*FORGED, *headers]) == ["(anonymous)"] * 2


def test_keys_are_named_by_a_hash_that_is_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(key: str) -> str:
        found = names_of(by_header("llm-d", name="Authorization"), [(b"authorization", f"Bearer {key}".encode())])
        assert found[0] == found[1]
        return found[0]

    names = {key: name(key) for key in ("sk-alice", "sk-bob")}
    assert len(set(names.values())) == 2
    assert all(re.fullmatch(r"key-[0-9a-f]{16}", one) for one in names.values())
    assert name("sk-alice") == names["sk-alice"]
    monkeypatch.setenv("HINTS_SECRET", SECRET[::-1])
    assert name("sk-alice") != names["sk-alice"]


def test_a_file_of_keys_names_clients_and_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "CHECK_S", 0.0)
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"sk-1": "acme/J\u00fcrgen & \u0141ukasz %41", "sk-2": "b" * 2000}), encoding="utf-8")
    middleware = HintsMiddleware(Engine(), HintsConfig(stacks=("llm-d",), client_keys=file, secret="env:HINTS_SECRET"))

    def name(*headers: tuple[bytes, bytes]) -> str:
        return names_of(middleware, list(headers))[0]

    assert unquote(name((b"authorization", b"Bearer sk-1"))) == "acme/J\u00fcrgen & \u0141ukasz %41"
    assert unquote(name((b"x-api-key", b"sk-1"))) == "acme/J\u00fcrgen & \u0141ukasz %41"
    assert len(name((b"authorization", b"Bearer sk-2"))) == 256
    assert name((b"authorization", b"Bearer sk-made-up")) == "(anonymous)"
    file.write_text(json.dumps({"sk-1": "new"}), encoding="utf-8")
    until = time.monotonic() + 20
    while name((b"authorization", b"Bearer sk-1")) != "new":
        assert time.monotonic() < until
        time.sleep(0.01)


@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=2, unique=True))
def test_names_stay_apart_and_fit_into_a_header(names: list[str]) -> None:
    config = by_header("llm-d")
    seen = {}
    for name in names:
        value = name.encode("utf-8", "replace")
        clean = "/".join(part for part in value.decode().strip().split("/", 3) if part)
        seen[clean or "(anonymous)"] = names_of(config, [(b"x-tenant", value)])[0]
    assert all(re.fullmatch(r"[!-~]+", value) for value in seen.values())
    assert all(unquote(value) == name for name, value in seen.items())
    assert len(set(seen.values())) == len(seen)


# -- settings


def test_the_environment_says_what_is_added(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    given = {
        "MOPE_HINTS": "llm-d, dynamo,",
        "MOPE_CLIENT_HEADER": "authorization",
        "MOPE_CLIENT_KEYS": str(keys),
        "MOPE_SECRET": SECRET,
        "MOPE_OSL": "0.9",
        "MOPE_URL": "http://mope:8400",
        "MOPE_API_KEY": "sk-mope",
        "MOPE_DEADLINE_MS": "50",
    }
    assert set(given) == set(VARIABLES.values())
    config = HintsConfig.from_environment(given)
    assert config == HintsConfig(
        stacks=("llm-d", "dynamo"),
        client_header="authorization",
        client_keys=keys,
        secret="env:MOPE_SECRET",
        length=0.9,
        url="http://mope:8400",
        api_key="sk-mope",
        deadline_ms=50,
    )
    assert "sk-mope" not in repr(config)
    assert HintsConfig.from_environment({"MOPE_HINTS": "dynamo", "MOPE_OSL": "median"}).length == "median"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "MOPE_HINTS: got ''; expected one or more of llm-d, dynamo, aibrix"),
        ({"MOPE_HINTS": "dynamo,nginx"}, "MOPE_HINTS: got 'dynamo,nginx'; expected one or more of llm-d"),
        ({"MOPE_HINTS": "llm-d"}, "llm-d: nothing says who a client is; give MOPE_CLIENT_KEYS=FILE, or MOPE_CLIENT_HE"),
        ({"MOPE_HINTS": "dynamo", "MOPE_OSL": "long"}, "MOPE_OSL: got 'long'; expected mean, median, or a level"),
        ({"MOPE_HINTS": "dynamo", "MOPE_OSL": "1"}, "MOPE_OSL: got '1'; expected mean, median, or a level"),
        ({"MOPE_HINTS": "dynamo", "MOPE_DEADLINE_MS": "0"}, "MOPE_DEADLINE_MS: got '0'; expected greater than 0"),
        ({"MOPE_HINTS": "dynamo", "MOPE_DEADLINE_MS": "soon"}, "MOPE_DEADLINE_MS: got 'soon'; expected a valid number"),
        ({"MOPE_HINTS": "llm-d", "MOPE_CLIENT_HEADER": "x:y"}, "MOPE_CLIENT_HEADER: got 'x:y'; String should match"),
        (
            {"MOPE_HINTS": "llm-d", "MOPE_CLIENT_HEADER": "x-tenant", "MOPE_CLIENT_KEYS": "k"},
            "leave out one of them",
        ),
        ({"MOPE_HINTS": "dynamo", "MOPE_URL": "mope:8400"}, "url: got 'mope:8400'"),
        ({"MOPE_HINTS": "llm-d", "MOPE_CLIENT_KEYS": "/no/such.json"}, "api_keys /no/such.json: No such file"),
        (
            {"MOPE_HINTS": "llm-d", "MOPE_CLIENT_HEADER": "authorization", "MOPE_SECRET": "short"},
            "secret: env:MOPE_SECRET holds 5 characters",
        ),
    ],
)
def test_settings_that_cannot_be_used_stop_the_start(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    sent = asyncio.run(call(HintsMiddleware(Engine()), {"type": "lifespan"}, []))
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert said in sent[0]["message"]
    assert "\n" not in sent[0]["message"]
    engine = Engine()  # behind a server that does not tell of its start
    middleware = HintsMiddleware(engine)
    assert passed(middleware, CHAT, headers=FORGED)[0] == json.dumps(CHAT).encode()
    assert not middleware.guard.ok


def test_it_begins_and_ends_with_the_server(dynamo: HintsConfig) -> None:
    engine = Engine()
    middleware = HintsMiddleware(engine, dynamo)

    async def run() -> None:
        coming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            if (message := next(coming))["type"] == "lifespan.shutdown":
                assert middleware._asked is not None
            return message

        async def send(message: Any) -> None: ...

        await middleware({"type": "lifespan", "app": engine}, receive, send)

    asyncio.run(run())
    assert engine.lives == ["lifespan.startup", "lifespan.shutdown"]
    assert middleware._asked is None


def test_an_application_without_a_lifespan_gets_hints(dynamo: HintsConfig) -> None:
    reached: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with in_a_thread(lambda: HintsMiddleware(app, dynamo)) as url:
        httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30, trust_env=False).raise_for_status()
    assert osl_of(reached[0])


# -- places in JSON

NAMES = st.sampled_from([*OSL, "model", 'a\u00e9\\"', ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def exact(text: str) -> Any:
    """JSON with the order of members and the spelling of numbers."""
    return json.loads(
        text, parse_float=lambda said: f"#{said}", parse_int=lambda said: f"#{said}", object_pairs_hook=list
    )


@given(
    st.dictionaries(NAMES, JSON, max_size=5), st.sampled_from([None, 0, 2]), st.booleans(), st.text(" \n\t", max_size=3)
)
def test_a_member_is_put_in_and_all_else_stays(
    body: dict[str, Any], indent: int | None, ascii_: bool, blank: str
) -> None:
    text = f"{blank}{json.dumps(body, indent=indent, ensure_ascii=ascii_)}{blank}"
    around = around_member(text, OSL)
    nvext = body.get("nvext")
    place = nvext.get("agent_hints") if isinstance(nvext, dict) else nvext
    if place is not None and (not isinstance(place, dict) or place.get("osl") is not None):
        assert around is None
        return
    if nvext is not None and not isinstance(nvext, dict):
        assert around is None
        return
    assert around is not None
    found = exact("#7".join(around).replace("#7", "7", 1) if "#7" not in text else "7".join(around))
    before = exact(text)
    for name in OSL:
        found_value = [value for key, value in found if key == name]
        assert len(found_value) == 1
        assert [(key, value) for key, value in found if key != name] == [
            (key, value) for key, value in before if key != name
        ]
        found = found_value[0]
        before = next((value for key, value in before if key == name), None) or []
    assert found == "#7"


@given(st.text(alphabet='{}[]":,\\ nul019.aosl', max_size=30))
def test_what_is_no_object_is_an_error_and_no_other(text: str) -> None:
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError:
        is_object = False
    try:
        around = around_member(text, OSL)
    except ValueError:
        assert not is_object
        return
    if is_object and around is not None:
        assert osl_of("7".join(around).encode()) == 7


# -- the latency predictor of llm-d


class LatencyQuestion(BaseModel):
    """`PredictionRequest` of its prediction server."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kv_cache_percentage: float = Field(ge=0, le=1)
    input_token_length: int = Field(ge=0)
    num_request_waiting: int = Field(ge=0)
    num_request_running: int = Field(ge=0)
    num_tokens_generated: int = Field(ge=0)
    prefix_cache_score: float = Field(ge=0, le=1)
    pod_type: str | None = ""
    prefill_tokens_in_flight: int = Field(0, ge=0)
    decode_tokens_in_flight: int = Field(0, ge=0)


def test_the_latency_predictor_is_asked_in_its_form() -> None:
    prediction = Prediction(median=100.4, mean=250.5, quantiles={0.9: 800.0})
    pod = {"kv_cache": 0.35, "waiting": 2, "running": 8, "prefix_cache": 0.5}
    asked = latency_request(prediction, prompt_tokens=512, **pod)  # type: ignore[arg-type]
    LatencyQuestion.model_validate(asked)
    assert asked == {
        "kv_cache_percentage": 0.35,
        "input_token_length": 512,
        "num_request_waiting": 2,
        "num_request_running": 8,
        "num_tokens_generated": 250,
        "prefix_cache_score": 0.5,
    }
    short = latency_request(prediction, prompt_tokens=1, kv_cache=0.0, waiting=0, running=0, length="median")
    assert (short["num_tokens_generated"], short["prefix_cache_score"]) == (100, 0.0)


# -- the page


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", HOW_TO[HOW_TO.index("\n## Hints") :], flags=re.MULTILINE | re.DOTALL
    )


def test_the_pages_gateway_passes_requests_on(service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[Any] = []

    async def stack(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        reached.append((scope["path"], scope["query_string"], dict(scope["headers"]), body))
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-of", b"the stack")]})
        for part in (b"data: 1\n\n", b"data: 2\n\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    start = next(block for block in blocks("bash") if "MOPE_HINTS" in block)
    (keys,) = re.findall(r"^echo '(.*)' > keys.json$", start, flags=re.MULTILINE)
    (tmp_path / "keys.json").write_text(keys, encoding="utf-8")
    (settings,) = re.findall(r"^(MOPE_.*) uvicorn gateway:app", start, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for name, value in (setting.split("=", 1) for setting in settings.split()):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOPE_URL", service)
    monkeypatch.setenv("MOPE_SECRET", SECRET)
    monkeypatch.setenv("MOPE_DEADLINE_MS", "20000")
    (source,) = (block for block in blocks("python") if block.startswith("# gateway.py"))

    with in_a_thread(lambda: stack) as behind:

        def gateway() -> Any:
            names: dict[str, Any] = {}
            exec(compile(source.replace("http://127.0.0.1:8000", behind), "gateway.py", "exec"), names)
            return names["app"]

        with in_a_thread(gateway) as url:
            sent = {"authorization": "Bearer sk-bob", FAIRNESS: "acme/alice", "x-mine": "1"}
            answer = httpx.post(
                f"{url}/v1/chat/completions?a=b%20c", json=CHAT, headers=sent, timeout=60, trust_env=False
            )
            models = httpx.get(f"{url}/v1/models", timeout=60, trust_env=False)
    assert (answer.status_code, answer.text, answer.headers["x-of"]) == (201, "data: 1\n\ndata: 2\n\n", "the stack")
    path, query, headers, body = reached[0]
    assert (path, query) == ("/v1/chat/completions", b"a=b%20c")
    assert headers[FAIRNESS.encode()] == headers[OLD_FAIRNESS.encode()] == b"acme/bob"
    assert (headers[b"x-mine"], headers[b"authorization"]) == (b"1", b"Bearer sk-bob")
    assert headers[b"content-length"] == str(len(body)).encode()
    assert osl_of(body)
    assert models.status_code == 201
    assert reached[1][2][FAIRNESS.encode()] == b"(anonymous)"


def test_the_page_asks_the_latency_predictor_as_it_says() -> None:
    (source,) = (block for block in blocks("python") if "latency_request" in block)
    names: dict[str, Any] = {}
    exec(source, names)
    LatencyQuestion.model_validate(names["asked"])
    told = HOW_TO[HOW_TO.index("| field of `/predict`") : HOW_TO.index("A gateway of your own may ask")]
    assert set(re.findall(r"`(\w+_\w+)`", told)) == set(LatencyQuestion.model_fields)


def test_the_page_has_the_variables_and_the_names_of_the_code() -> None:
    part = HOW_TO[HOW_TO.index("\n## Hints") :]
    rows = dict(re.findall(r"^\| `(MOPE_\w+)` \|[ `]*([^|` ]*)[ `]*\|", part, flags=re.MULTILINE))
    fields = HintsConfig.model_fields
    assert rows == {key: str(fields[name].get_default() or "").strip() for name, key in VARIABLES.items()} | {
        "MOPE_HINTS": ""
    }
    for header in (*hints.FAIRNESS_ID, hints.AIBRIX_USER):
        assert f"header `{header.decode()}`" in part
    assert f"`{'.'.join(OSL)}`" in part
    for path in hints.GENERATING:
        assert f"`{path}`" in part
    sources = re.findall(r"@([0-9a-f]{7}):([\w./-]+)", part)
    assert len(sources) > 12
    assert all("/" in path for _, path in sources)
