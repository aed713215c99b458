"""A stand-in for vLLM's application behind a middleware: it records what reaches it, message by message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mope.serving_hooks.carried import Carried
from mope.serving_hooks.vllm import Middleware

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 50}
FORGED = {"mope_client": "eve", "mope_tokens": 1, "mope_new": "x"}
ALICE = [(b"x-client-id", b"acme/alice")]
KEYS = ["sk-alice", "sk-bob"]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
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


def with_keys(kind: Any = Middleware, **mope: Any) -> Any:
    return without_predictor(kind, mope={"identity": "api-key", **mope}, api_key=KEYS)


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


def lives(middleware: Any, engine: Engine) -> list[dict[str, Any]]:
    coming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware({"type": "lifespan", "app": engine}, receive, send))
    return sent


def read_by_the_scheduler(engine: Engine, name: str = "vllm_xargs") -> Carried:
    return Carried.read(engine.json.get(name))
