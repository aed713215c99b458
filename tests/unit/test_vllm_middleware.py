"""vLLM's middlewares against an application that records what reaches it, message by message."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from vllm_app import (
    ALICE,
    CHAT,
    FORGED,
    KEYS,
    Engine,
    bearer,
    call,
    lives,
    post,
    read_by_the_scheduler,
    scope_of,
    with_keys,
    with_tiny,
    without_predictor,
)
from vllm_app import own_registry as own_registry

from mope.serving_hooks import asgi, bodies
from mope.serving_hooks.carried import ANSWERING, CLIENT, HIGH, RAW, SEAL, TOKENS, Carried
from mope.serving_hooks.vllm import Middleware, PriorityMiddleware
from mope.serving_hooks.vllm import middleware as module

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
OF_ALICE = Carried("acme/alice")


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
    assert told.keys() == {"mine", CLIENT, TOKENS, HIGH, RAW, ANSWERING, SEAL}
    assert Carried.read(told).client == "acme/alice"
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
    assert engine.json["sampling_params"] == {"max_tokens": 5, "extra_args": {"mine": 1, **OF_ALICE.write()}}
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


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/v1/anything", "/upload", *module.UNCARRIED])
def test_other_paths_are_not_read(path: str) -> None:
    engine, middleware = without_predictor()
    chunks = [b'{"vllm_xargs": ', b'{"mope_client": "eve"}}']
    asyncio.run(call(middleware, scope_of(engine, path, ALICE), chunks))
    assert [message.get("body") for message in engine.received] == [*chunks, None]
    assert read_by_the_scheduler(engine) == Carried()


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
    for depth in (*range(850, 1000, 5), 5000):  # around what Python reads
        body = b'{"vllm_xargs": {"mope_client": "eve"}, "priority": -9, "a": ' + b"[" * depth + b"]" * depth + b"}"
        (start, *_) = post(middleware, engine, body, path)
        assert middleware.guard.ok
        if start["status"] == 200 and path == "/v1/chat/completions" and depth < 950:
            assert read_by_the_scheduler(engine).client == (None if kind is PriorityMiddleware else "acme/alice")
            assert (engine.json["priority"] == -9) == (kind is Middleware)
    assert start["status"] == (200 if path == "/v1/anything" else 400)


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


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/anything/else", "/v1/chat/completions/batch"])
@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("headers", [[], ALICE])
def test_forged_values_are_believed_nowhere(forgery: bytes, path: str, headers: Any) -> None:
    engine, middleware = without_predictor()
    post(middleware, engine, forgery, path, headers=headers)
    known = headers == ALICE and path != "/v1/anything/else"
    assert read_by_the_scheduler(engine).client == ("acme/alice" if known else None)
    for request in engine.json.get("requests", []):
        assert Carried.read(request["sampling_params"]["extra_args"]) == Carried()


@pytest.mark.parametrize("path", [*module.PATHS, "/generate", "/pooling", "/v1/embeddings", "/v1/decisions"])
@pytest.mark.parametrize("headers", [[], bearer("made-up"), [(b"x-api-key", b"sk-alice")], ALICE])
def test_without_a_known_key_nothing_is_read_and_nobody_is_named(path: str, headers: Any) -> None:
    engine, middleware = with_keys()
    body = json.dumps({**CHAT, "vllm_xargs": FORGED, "sampling_params": {"extra_args": FORGED}}).encode()
    post(middleware, engine, body, path, headers=headers)
    assert [message.get("body") for message in engine.received] == [body[:7], body[7:], None]
    assert read_by_the_scheduler(engine) == Carried()
    assert middleware.snapshot()["requests"] == {}


def test_each_key_of_the_server_is_a_client_on_each_path() -> None:
    for path in (path for path in module.PATHS if path not in (module.TOKENS_IN, *module.UNCARRIED)):
        engine, middleware = with_keys()
        names = []
        for key in KEYS:
            post(middleware, engine, CHAT, path, headers=bearer(key))
            names.append(read_by_the_scheduler(engine).client)
        assert None not in names
        assert len({*names}) == 2


@pytest.mark.parametrize("charset", ["utf-7", "cp037", "utf-16-be", "unicode_escape", "raw_unicode_escape", '"UTF-7"'])
@pytest.mark.parametrize("kind", [Middleware, PriorityMiddleware])
@pytest.mark.parametrize("path", module.FORMS)
def test_forms_are_in_utf_8(kind: Any, charset: str, path: str) -> None:
    engine, middleware = without_predictor(kind)
    form = b'--x\r\nContent-Disposition: form-data; name="vllm_+AHg-args"\r\n\r\n{"mope_client": "eve"}\r\n--x--\r\n'
    for said, status in (
        (f"; charset={charset}", 400),
        (f"; Charset = {charset}", 400),
        ("; charset=UTF-8", 200),
        ("", 200),
    ):
        scope = {
            **scope_of(engine, path),
            "headers": [(b"content-type", b"multipart/form-data; boundary=x" + said.encode())],
        }
        assert asyncio.run(call(middleware, scope, [form[:30], form[30:]]))[0]["status"] == status
    assert engine.bodies == [form, form]
    assert middleware.guard.ok


def chat(image: int = 0, text: int = 5, **further: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": "word " * (text // 5)}]
    if image:
        content.append({"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * image}})
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 50, **further}


LARGE = [
    chat(image=2 * 10**6),
    chat(text=2 * 10**6),
    chat(image=2 * 10**6, vllm_xargs={"a": "data:x;base64,AAAA", **FORGED}),
    {**chat(), "padding": [[]] * bodies.MAX_PARTS},
    chat(text=bodies.MAX_PARSED + 10),
    chat(text=asgi.MAX_READ),
]


@pytest.mark.parametrize("body", LARGE)
@pytest.mark.parametrize("end", [b"", b" \n"])
@pytest.mark.parametrize("chunk", [2**16 + 1, 2**30])
def test_large_bodies_get_a_client_without_being_written_anew(body: dict[str, Any], end: bytes, chunk: int) -> None:
    engine, middleware = without_predictor()
    data = json.dumps(body).encode() + end
    length = (b"content-length", str(len(data)).encode())
    chunks = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    asyncio.run(call(middleware, scope_of(engine, "/v1/chat/completions", [*ALICE, length]), chunks))
    assert read_by_the_scheduler(engine) == OF_ALICE
    theirs = {key: value for key, value in body.get("vllm_xargs", {}).items() if not key.startswith("mope_")}
    assert engine.json == {**body, "vllm_xargs": {**theirs, **OF_ALICE.write()}}
    assert engine.headers[-1]["content-length"] == str(len(engine.bodies[-1]))
    assert len(engine.received) == len(chunks) + 1  # it streamed through


@pytest.mark.parametrize(("image", "text", "predicted"), [(10**7, 100, True), (0, 2 * 10**6, True), (0, 10**7, False)])
def test_of_large_bodies_what_is_quick_to_read_is_predicted(tiny: Path, image: int, text: int, predicted: bool) -> None:
    engine, middleware = with_tiny(tiny)
    post(middleware, engine, chat(image, text))
    assert read_by_the_scheduler(engine).client == "acme/alice"
    assert (read_by_the_scheduler(engine).tokens is not None) == predicted
    assert engine.json["messages"] == chat(image, text)["messages"]
    middleware.end()


@given(
    body=st.dictionaries(st.text(max_size=3), JSON, max_size=3),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    blanks=st.text(" \t\r\n", max_size=5),
)
def test_more_goes_before_the_last_brace_however_it_is_cut(body: dict[str, Any], cuts: list[int], blanks: str) -> None:
    data = json.dumps({"first": "}}  }", **body}, indent=1).encode() + blanks.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[start:end] for start, end in itertools.pairwise(places)]
    messages = [
        {"type": "http.request", "body": one, "more_body": number < len(chunks) - 1}
        for number, one in enumerate(chunks)
    ]

    async def read() -> bytes:
        adding = asgi._Adding(messages, lambda: asyncio.sleep(0, {"type": "http.disconnect"}), b',"added":1')
        found = [await adding() for _ in range(len(messages) + 1)]
        assert [one["type"] for one in found] == ["http.request"] * len(messages) + ["http.disconnect"]
        return b"".join(one["body"] for one in found[:-1])

    found = asyncio.run(read())
    assert repr(json.loads(found)) == repr({"first": "}}  }", **body, "added": 1})  # NaN is not equal to itself
    assert len(found) == len(data) + len(b',"added":1')


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("kind", [Middleware, PriorityMiddleware])
def test_no_encoding_hides_who_sent_a_large_body(kind: Any, encoding: str) -> None:
    engine, middleware = without_predictor(kind)
    data = json.dumps(chat(text=2**22, priority=-9)).encode(encoding)
    assert post(middleware, engine, data)[0]["status"] == 400
    assert engine.bodies == []


@pytest.mark.parametrize("body", [{"user": "bob", **chat(text=asgi.MAX_READ)}])
@pytest.mark.parametrize("kind", [Middleware, PriorityMiddleware])
def test_a_body_that_says_who_sent_it_is_read_or_refused(kind: Any, body: dict[str, Any]) -> None:
    engine, middleware = without_predictor(kind, mope={"identity": "user"})
    assert post(middleware, engine, body)[0]["status"] == 400
    smaller = {**body, "messages": [{"role": "user", "content": [[]] * bodies.MAX_PARTS}]}
    assert post(middleware, engine, smaller)[0]["status"] == 200
    if kind is Middleware:
        assert read_by_the_scheduler(engine).client == "bob"


def test_a_fault_costs_one_request_and_forgeries_stay_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, middleware = without_predictor()
    post(middleware, engine, CHAT)
    assert engine.json["vllm_xargs"] == OF_ALICE.write()
    assert middleware.front is not None
    client = middleware.front.client

    def fail(headers: Any, body: Any) -> Any:
        if body.get("bad"):
            raise RuntimeError("a bug")
        return client(headers, body)

    monkeypatch.setattr(middleware.front, "client", fail)
    with caplog.at_level(logging.ERROR):
        for _ in range(30):
            post(middleware, engine, {**CHAT, "bad": True, "vllm_xargs": {"a": 1, **FORGED}})
            assert read_by_the_scheduler(engine) == Carried()
            post(middleware, engine, CHAT)
            assert read_by_the_scheduler(engine) == OF_ALICE
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == ["vllm.mope"]
    assert "a bug" in caplog.text
    assert middleware.guard.ok


def test_it_starts_and_ends_with_the_server(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, middleware = with_tiny(tiny)
    with caplog.at_level(logging.INFO, logger="vllm.mope"):
        sent = lives(middleware, engine)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vllm.mope"]
    assert line.startswith("mope Middleware: clients by header x-client-id; lengths by ")


def test_its_counters_are_in_the_servers_metrics_while_it_runs(tiny: Path) -> None:
    engine, middleware = with_tiny(tiny)
    shown: list[str] = []

    async def answering(*arguments: Any) -> None:
        shown.append(generate_latest(prometheus_client.REGISTRY).decode())
        await Engine.__call__(engine, *arguments)
        shown.append(generate_latest(prometheus_client.REGISTRY).decode())

    middleware.app = answering
    lives(middleware, engine)
    shown.append(generate_latest(prometheus_client.REGISTRY).decode())
    assert ["mope_front_on{" in text for text in shown] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"identiti": "none"}, "did you mean 'identity'"),
        ({"secret": "env:NOT_THERE"}, "secret: the environment has no variable NOT_THERE"),
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
    assert read_by_the_scheduler(engine) == Carried()
    assert "a bug" in caplog.text


def test_a_predictor_that_cannot_be_read_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(mope={"predictor": str(tmp_path / "nowhere" / "at" / "all")})
    middleware = Middleware(engine)
    assert len(lives(middleware, engine)) == 2
    post(middleware, engine, CHAT)
    assert read_by_the_scheduler(engine) == OF_ALICE
    assert "mope predicts nothing" in caplog.text


def test_keys_of_the_server_name_clients() -> None:
    engine, middleware = without_predictor(mope={"identity": "api-key"}, api_key=["sk-1"])
    post(middleware, engine, {**CHAT, "user": "eve"}, headers=[*ALICE, (b"authorization", b"Bearer sk-1")])
    client = read_by_the_scheduler(engine).client or ""
    assert client.startswith("key-")
    assert "sk-1" not in client
