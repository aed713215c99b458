"""vLLM's middlewares against an application that records what reaches it, message by message."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from mope.serving_hooks import asgi
from mope.serving_hooks import vllm as hooks
from mope.serving_hooks.asgi import may_hold, without_forged
from mope.serving_hooks.carried import ANSWERING, CLIENT, HIGH, RAW, TOKENS
from mope.serving_hooks.vllm import Middleware, PriorityMiddleware
from mope.serving_hooks.vllm import middleware as module
from mope.serving_hooks.vllm.settings import hook_options, llm_names, num_api_servers

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 50}
FIELDS = (
    *("prompt", "messages", "input", "instructions", "system", "max_tokens", "max_completion_tokens", "n", "tools"),
    *("temperature", "response_format", "text", "chat_template_kwargs", "reasoning", "thinking", "model", "user"),
    *("vllm_xargs", "sampling_params", "priority", "structured_outputs"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FORGED = {"mope_client": "eve", "mope_tokens": 1, "mope_new": "x"}
ALICE = [(b"x-client-id", b"acme/alice")]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """A server's own, for each test another."""
    own = CollectorRegistry(auto_describe=True)
    monkeypatch.setattr("prometheus_client.REGISTRY", own)
    return own


class Engine:
    """The application behind: reads the body as Starlette does, records it, answers, waits for a disconnect."""

    def __init__(self, **options: Any) -> None:
        """As vLLM starts with `--additional-config '{"mope": options}'`."""
        settings = {"identity": "header", "deadline_ms": 60_000, **options.pop("mope", {})}
        self.state = SimpleNamespace(
            args=SimpleNamespace(api_key=options.pop("api_key", None), api_server_count=options.pop("servers", 1)),
            vllm_config=SimpleNamespace(
                additional_config={"mope": settings},
                scheduler_config=SimpleNamespace(policy=options.pop("policy", "priority")),
                model_config=SimpleNamespace(model="/models/tiny", served_model_name="tiny"),
            ),
        )
        self.status, self.error = options.pop("status", 200), options.pop("error", None)
        self.received: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.lives: list[str] = []
        assert not options

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                message = await receive()
                self.lives.append(message["type"])
                await send({"type": f"{message['type']}.complete"})
            return
        if scope["type"] != "http":
            self.lives.append(scope["type"])
            return
        if self.error is not None:
            raise self.error
        body = b""
        while True:
            message = await receive()
            self.received.append(dict(message))
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for part in (b"data: 1\n\n", b"data: 2\n\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self.received.append(dict(await receive()))

    @property
    def json(self) -> Any:
        return json.loads(self.bodies[-1])


def scope_of(engine: Engine, path: str, headers: Any = (), method: str = "POST", root: str = "") -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root,
        "headers": [(b"content-type", b"application/json"), *headers],
        "app": engine,
    }


async def call(
    middleware: Any, scope: dict[str, Any], chunks: list[bytes] | None, broken_off: bool = False
) -> list[dict[str, Any]]:
    """Sends a request in chunks, then a disconnect; what is sent back."""
    messages = [
        {"type": "http.request", "body": chunk, "more_body": broken_off or number < len(chunks or []) - 1}
        for number, chunk in enumerate(chunks or [])
    ]
    coming = iter([*messages, {"type": "http.disconnect"}, {"type": "too many"}])
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    await middleware(scope, receive, send)
    return sent


def post(
    middleware: Any, engine: Engine, body: Any, path: str = "/v1/chat/completions", headers: Any = ALICE, root: str = ""
) -> list[dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = (b"content-length", str(len(data)).encode())
    return asyncio.run(call(middleware, scope_of(engine, path, [*headers, length], root=root), [data[:7], data[7:]]))


def with_tiny(tiny: Path, **options: Any) -> tuple[Engine, Middleware]:
    engine = Engine(mope={"predictor": str(tiny), **options})
    return engine, Middleware(engine)


def without_predictor(kind: Any = Middleware, mope: Mapping[str, Any] | None = None, **options: Any) -> Any:
    engine = Engine(mope={"predictor": "none", **(mope or {})}, **options)
    return engine, kind(engine)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello there", "max_tokens": 50}),
        ("/v1/completions", {"prompt": ["hello there", "and again"], "max_tokens": 50}),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "hello there", "max_output_tokens": 50}),
        ("/v1/messages", CHAT),
        ("/invocations", CHAT),
        ("/invocations", {"prompt": "hello there", "max_tokens": 50}),
    ],
)
@pytest.mark.parametrize("root", ["", "/llm", "/llm/"])
def test_client_and_prediction_are_told(tiny: Path, path: str, body: dict[str, Any], root: str) -> None:
    engine, middleware = with_tiny(tiny)
    full = {**body, "vllm_xargs": {"mine": 3, **FORGED}, "seed": 2**70, "temperature": 0.25}
    sent = post(middleware, engine, full, root.rstrip("/") + path, root=root)
    told = engine.json.pop("vllm_xargs")
    assert {key: value for key, value in engine.json.items() if key != "vllm_xargs"} == {
        key: value for key, value in full.items() if key != "vllm_xargs"
    }
    assert told.keys() == {"mine", CLIENT, TOKENS, HIGH, RAW, ANSWERING}
    assert (told["mine"], told[CLIENT]) == (3, "acme/alice")
    assert 0 < told[TOKENS] <= 50
    assert told[ANSWERING].startswith("tiny|")
    assert engine.headers[-1]["content-length"] == str(len(engine.bodies[-1]))
    assert [message["type"] for message in engine.received] == ["http.request", "http.disconnect"]
    assert [message.get("body") for message in sent] == [None, b"data: 1\n\n", b"data: 2\n\n", b""]
    assert middleware.snapshot()["requests"] == {path: 1}
    assert middleware.snapshot()["predictions"]["made"] == (2 if isinstance(body.get("prompt"), list) else 1)
    middleware.end()


def test_tokens_in_carry_the_client_in_their_own_place(tiny: Path) -> None:
    engine, middleware = with_tiny(tiny)
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 5, "extra_args": {"mine": 1, **FORGED}}}
    post(middleware, engine, body, "/inference/v1/generate")
    assert engine.json["sampling_params"] == {"max_tokens": 5, "extra_args": {"mine": 1, CLIENT: "acme/alice"}}
    middleware.end()


def test_anybody_is_told_nothing_and_nothing_changes() -> None:
    engine, middleware = without_predictor()
    data = json.dumps(CHAT, indent=3).encode()
    post(middleware, engine, data, headers=[])
    assert engine.bodies[-1] == data
    assert [message.get("body") for message in engine.received] == [data[:7], data[7:], None]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\x1f\x8b\x08\x00 compressed",
        b"\xff\xfe\x00",
        b"[" * 5000,
        b'{"messages": 3, "vllm_xargs": 4}',
        b'{"messages": 3, "vllm_xargs": [["mope_client", "eve"]]}',
    ],
)
@pytest.mark.parametrize("kind", [Middleware, PriorityMiddleware])
def test_what_cannot_be_read_passes_unchanged(kind: Any, body: bytes) -> None:
    engine, middleware = without_predictor(kind)
    post(middleware, engine, body)
    if kind is Middleware or not body.startswith(b"{"):
        assert engine.bodies == [body]
        assert engine.headers[-1]["content-length"] == str(len(body))
    assert middleware.guard.ok


@pytest.mark.parametrize(
    ("method", "path", "type_"),
    [
        ("GET", "/v1/chat/completions", b"application/json"),
        ("PUT", "/v1/completions", b"application/json"),
        ("POST", "/upload", b"application/octet-stream"),
        ("POST", "/upload", b"multipart/form-data; boundary=x"),
    ],
)
def test_other_methods_and_bodies_are_not_touched(method: str, path: str, type_: bytes) -> None:
    engine, middleware = without_predictor()
    scope = {**scope_of(engine, path, method=method), "headers": [(b"content-type", type_)]}
    chunks = [b'{"vllm_xargs": ', b'{"mope_client": "eve"}}']
    sent = asyncio.run(call(middleware, scope, chunks))
    assert [message.get("body") for message in engine.received] == [*chunks, None]
    assert len(sent) == 4


def test_other_scopes_are_not_touched() -> None:
    engine, middleware = without_predictor()
    asyncio.run(call(middleware, {"type": "websocket", "path": "/v1/realtime"}, None))
    assert engine.lives == ["websocket"]


def test_a_client_that_leaves_while_it_sends() -> None:
    engine, middleware = without_predictor()
    assert asyncio.run(call(middleware, scope_of(engine, "/v1/completions"), [b'{"a":'], broken_off=True)) == []
    assert [message["type"] for message in engine.received] == ["http.request", "http.disconnect"]
    engine.received.clear()
    assert asyncio.run(call(middleware, scope_of(engine, "/v1/completions"), None)) == []
    assert [message["type"] for message in engine.received] == ["http.disconnect"]


def test_errors_of_the_engine_are_its_own() -> None:
    engine, middleware = without_predictor(error=ZeroDivisionError("of the engine"))
    with pytest.raises(ZeroDivisionError, match="of the engine"):
        post(middleware, engine, CHAT)
    assert middleware.guard.ok


@pytest.mark.parametrize("kind", [Middleware, PriorityMiddleware])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/anything"])
def test_no_depth_of_nesting_turns_it_off(kind: Any, path: str) -> None:
    engine, middleware = without_predictor(kind)
    statuses = set()
    for depth in (*range(850, 1000, 5), 5000):  # around what Python reads
        body = b'{"vllm_xargs": {"mope_client": "eve"}, "a": ' + b"[" * depth + b"]" * depth + b"}"
        statuses.add(post(middleware, engine, body, path, headers=[])[0]["status"])
        assert middleware.guard.ok
    assert statuses >= {200}
    assert b"mope_" not in engine.bodies[0]


@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), path=st.sampled_from(sorted(module.PATHS)))
@pytest.mark.parametrize("kind", [Middleware, PriorityMiddleware])
def test_whatever_a_caller_writes_it_stays_on(kind: Any, body: dict[str, Any], path: str) -> None:
    engine, middleware = without_predictor(kind, mope={"identity": "user"})
    post(middleware, engine, body, path)
    assert middleware.guard.ok
    assert len(engine.bodies) == 1


FORGERIES = [
    json.dumps({"vllm_xargs": FORGED}).encode(),
    json.dumps({"vllm_xargs": FORGED}).replace("mope", "\\u006dope").encode(),
    json.dumps({"vllm_xargs": FORGED}).replace("vllm_xargs", "vllm\\u005fxargs").encode(),
    json.dumps({"vllm_xargs": FORGED}).encode("utf-16"),
    json.dumps({"vllm_xargs": FORGED}).encode("utf-16-be"),
    json.dumps({"vllm_xargs": FORGED}).encode("utf-32"),
    json.dumps({"vllm_xargs": FORGED}).encode("utf-8-sig"),
    b'{"vllm_xargs": {"a": 1}, "vllm_xargs": {"mope_client": "eve"}}',
    json.dumps({"requests": [{"sampling_params": {"extra_args": FORGED}}]}).encode(),
]


def holds_ours(found: Any) -> bool:
    if isinstance(found, dict):
        return any(str(key).startswith("mope_") or holds_ours(value) for key, value in found.items())
    return isinstance(found, list) and any(map(holds_ours, found))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/anything/else", "/v1/chat/completions/batch"])
@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("kind", [Middleware, PriorityMiddleware])
def test_forged_values_are_removed_everywhere(kind: Any, forgery: bytes, path: str) -> None:
    engine, middleware = without_predictor(kind)
    post(middleware, engine, forgery, path, headers=[])
    assert not holds_ours(engine.json)


@given(
    st.recursive(
        st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["vllm_xargs", "extra_args", "mope_client", "a"]), inner, max_size=4)
        ),
    )
)
def test_nothing_but_what_is_forged_is_removed(inner: Any) -> None:
    body = {"a": inner}
    left = without_forged(json.dumps(body).encode())
    found = body if left is None else json.loads(left)
    assert may_hold(json.dumps(body).encode(), "mope_") or left is None

    def same(before: Any, after: Any, carrier: bool = False) -> None:
        if isinstance(before, dict):
            for key, value in before.items():
                if carrier and key.startswith("mope_"):
                    assert key not in after
                else:
                    same(value, after[key], key in asgi.CARRIERS and isinstance(value, dict))
        elif isinstance(before, list):
            assert len(before) == len(after)
            for one, other in zip(before, after, strict=True):
                same(one, other)
        else:
            assert before == after

    same(body, found)


def test_large_bodies_get_a_client_without_being_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PREDICTED", 100)
    engine, middleware = with_tiny(tiny)
    long = {**CHAT, "padding": "x" * 200}
    monkeypatch.setattr(module, "parsed", lambda body: pytest.fail("it was read"))
    post(middleware, engine, json.dumps(long).encode() + b" \n")
    assert engine.json == {**long, "vllm_xargs": {CLIENT: "acme/alice"}}
    post(middleware, engine, long, headers=[])
    assert engine.json == long
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_PREDICTED", 100)
    post(middleware, engine, {**long, "vllm_xargs": {"a": 1, **FORGED}})
    assert engine.json["vllm_xargs"] == {"a": 1, CLIENT: "acme/alice"}
    assert middleware.snapshot()["predictions"]["made"] == 0
    middleware.end()


def test_after_a_failure_requests_pass_and_forgeries_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, middleware = without_predictor()
    post(middleware, engine, CHAT)
    assert engine.json["vllm_xargs"] == {CLIENT: "acme/alice"}
    assert middleware.front is not None

    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(middleware.front, "client", fail)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            post(middleware, engine, {**CHAT, "vllm_xargs": {"a": 1, **FORGED}})
            assert engine.json == {**CHAT, "vllm_xargs": {"a": 1}}
    assert [record.name for record in caplog.records] == ["vllm.mope"]
    assert "a bug" in caplog.text


def lives(middleware: Any, engine: Engine) -> list[dict[str, Any]]:
    coming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware({"type": "lifespan", "app": engine}, receive, send))
    return sent


def test_it_starts_and_ends_with_the_server(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, middleware = with_tiny(tiny)
    with caplog.at_level(logging.INFO, logger="vllm.mope"):
        sent = lives(middleware, engine)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vllm.mope"]
    assert line.startswith("mope Middleware: clients by header x-client-id; lengths by ")


def test_its_counters_are_in_the_servers_metrics_while_it_runs(tiny: Path, registry: CollectorRegistry) -> None:
    engine, middleware = with_tiny(tiny)
    shown: list[str] = []

    async def answering(*arguments: Any) -> None:
        shown.append(generate_latest(registry).decode())
        await Engine.__call__(engine, *arguments)
        shown.append(generate_latest(registry).decode())

    middleware.app = answering
    lives(middleware, engine)
    shown.append(generate_latest(registry).decode())
    assert ["mope_front_on{" in text for text in shown] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"identiti": "none"}, "did you mean 'identity'"),
        ({"predictor": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"identity": "api-key", "api_keys": "/nowhere.json"}, r"api_keys /nowhere\.json: No such file"),
    ],
)
def test_what_the_operator_got_wrong_keeps_it_from_starting(options: dict[str, Any], said: str) -> None:
    engine = Engine(mope=options)
    (sent,) = lives(Middleware(engine), engine)
    assert sent["type"] == "lifespan.startup.failed"
    assert said.replace("\\", "") in sent["message"]
    assert engine.lives == []


def test_a_bug_at_the_start_does_not(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "llm_names", fail)
    engine, middleware = without_predictor()
    assert len(lives(middleware, engine)) == 2
    post(middleware, engine, {**CHAT, "vllm_xargs": FORGED})
    assert engine.json == {**CHAT, "vllm_xargs": {}}
    assert "a bug" in caplog.text


def test_keys_of_the_server_name_clients() -> None:
    engine, middleware = without_predictor(mope={"identity": "api-key"}, api_key=["sk-1"])
    post(middleware, engine, {**CHAT, "user": "eve"}, headers=[*ALICE, (b"authorization", b"Bearer sk-1")])
    client = engine.json["vllm_xargs"][CLIENT]
    assert client.startswith("key-")
    assert "sk-1" not in client


# -- by priority -------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(module, "_cost", lambda *_: 1 / 0)
    assert priorities(middleware, engine, "b", 2) + priorities(middleware, engine, "a", 2) == [last] * 4


# -- what vLLM says of itself ------------------------------------------------------------------------------------------


def test_options_are_found_where_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = {"mope": {"identity": "none"}, "other": 1}
    config = SimpleNamespace(additional_config=given_)
    assert hook_options(config).identity == "none"
    assert hook_options(None, config).identity == "none"
    assert hook_options(None, SimpleNamespace(additional_config=json.dumps(given_))).identity == "none"
    monkeypatch.setenv("MOPE_OPTIONS", '{"identity": "user"}')
    assert hook_options(SimpleNamespace(additional_config={}), None).identity == "user"
    assert hook_options(config).identity == "none"
    monkeypatch.setenv("MOPE_OPTIONS", "{")
    with pytest.raises(ValueError, match="MOPE_OPTIONS is no JSON"):
        hook_options(None)
    monkeypatch.delenv("MOPE_OPTIONS")
    assert hook_options(None).identity == "api-key"


def test_names_and_processes() -> None:
    arguments = SimpleNamespace(model="org/llama", served_model_name=["a", "b"], api_server_count=None)
    assert llm_names(None, arguments) == ("org/llama", "a")
    assert num_api_servers(None, arguments) == 1
    assert num_api_servers(SimpleNamespace(parallel_config=SimpleNamespace(_api_process_count=4)), arguments) == 4


def test_importing_the_package_imports_no_engine() -> None:
    code = (
        "import sys, mope.serving_hooks.vllm as hooks; names = dir(hooks); "
        "heavy = {'vllm', 'torch', 'fastapi', 'starlette', 'numpy'} & set(sys.modules); "
        "assert 'Middleware' in names, names; assert not heavy, heavy; hooks.Middleware; "
        "assert not {'vllm', 'torch', 'fastapi', 'starlette'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        hooks.Other  # noqa: B018
