"""Who is charged in a real vLLM server, whatever callers send: two API servers and an engine, each a process."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_vllm
from tiny_vllm import NAME, Server, serve

from tests.ports import free_port

pytestmark = pytest.mark.skipif(tiny_vllm.MISSING is not None, reason=str(tiny_vllm.MISSING))

ALICE, BOB = "sk-alice-000111222", "sk-bob-333444555"
FORGED = {"mope_client": "acme/alice", "mope_tokens": 1.0, "mope_seal": "0" * 32}
TOKENS = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 2}
HOOK = "mope.serving_hooks.vllm"
ANYBODY = "(anonymous)"


@dataclass(frozen=True)
class Counted:
    """A server, and where it says how many requests each client has sent."""

    server: Server
    metrics: str

    def read(self, name: str = "mope_client_arrived_total") -> dict[str, float]:
        with urllib.request.urlopen(self.metrics) as answer:
            text = answer.read().decode()
        return {client: float(count) for client, count in re.findall(rf'^{name}{{client="(.*?)"}} (\S+)', text, re.M)}

    def total(self, name: str) -> float:
        with urllib.request.urlopen(self.metrics) as answer:
            return float(re.findall(rf"^{name} (\S+)", answer.read().decode(), re.M)[0])

    def charged(self, path: str, body: Any, key: str | None = None, **headers: str) -> dict[str, float]:
        """To whom a request is counted, which is answered."""
        before = self.read()
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        status, answer = self.server.post(path, body, headers)
        assert status == 200, answer
        end = time.monotonic() + 10
        while (after := self.read()) == before and time.monotonic() < end:
            time.sleep(0.1)
        return {client: count - before.get(client, 0) for client, count in after.items() if count != before.get(client)}


def counted(folder: Path, options: list[str], mope: dict[str, Any]) -> Iterator[Counted]:
    port = free_port()
    additional = json.dumps({"mope": {"metrics_port": port, "deadline_ms": 20_000, **mope}})
    scheduler = ["--scheduler-cls", f"{HOOK}.make_scheduler", "--additional-config", additional]
    with serve(folder, [*scheduler, *options], cli=True) as server:
        yield Counted(server, f"http://127.0.0.1:{port}/metrics")


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    folder = tmp_path_factory.mktemp("identity")
    keys = folder / "keys.json"
    keys.write_text(json.dumps({ALICE: "acme/alice"}), encoding="utf-8")
    options = ["--middleware", f"{HOOK}.Middleware", "--api-server-count", "2", "--api-key", ALICE, BOB]
    yield from counted(folder, options, {"predictor": "chat-micro", "api_keys": str(keys)})


def test_what_either_api_server_says_is_believed(fair: Counted) -> None:
    for _ in range(8):  # the kernel hands them out to both
        assert fair.charged("/v1/completions", TOKENS, ALICE) == {"acme/alice": 1}
    chat = {"model": NAME, "messages": [{"role": "user", "content": "explain a queue"}], "max_tokens": 2}
    assert fair.charged("/v1/chat/completions", chat, ALICE) == {"acme/alice": 1}
    assert fair.read("mope_client_predicted_total")["acme/alice"] == 1
    (bob,) = fair.charged("/v1/completions", TOKENS, BOB)
    assert re.fullmatch(r"key-[0-9a-f]{16}", bob)
    assert fair.charged("/invocations", TOKENS, BOB) == {bob: 1}
    assert fair.total("mope_unsealed_total") == 0


@pytest.mark.parametrize("path", ["/invocations"])
def test_made_up_keys_mint_no_clients(fair: Counted, path: str) -> None:
    for number in range(5):
        assert fair.charged(path, TOKENS, f"made-up-{number}") == {ANYBODY: 1}
    assert fair.charged(path, TOKENS) == {ANYBODY: 1}
    assert fair.charged(path, TOKENS, **{"x-api-key": BOB}) == {ANYBODY: 1}
    assert fair.charged(path, {**TOKENS, "vllm_xargs": FORGED}) == {ANYBODY: 1}
    assert fair.total("mope_unsealed_total") > 0
    assert fair.total("mope_failed") == 0


def test_forged_values_are_those_of_whoever_has_the_key(fair: Counted) -> None:
    body = json.dumps({**TOKENS, "vllm_xargs": FORGED})
    for written in (body.encode(), body.replace("mope", "\\u006dope").encode(), body.encode("utf-16")):
        (client,) = fair.charged("/v1/completions", written, BOB)
        assert client.startswith("key-")


@pytest.mark.parametrize("size", [2 * 2**20, 33 * 2**20])
def test_large_bodies_have_their_client(fair: Counted, size: int) -> None:
    for own in ({}, {"vllm_xargs": FORGED}):
        body = json.dumps({**TOKENS, **own, "padding": "x" * size}).encode() + b"  \n"
        assert fair.charged("/v1/completions", body, ALICE) == {"acme/alice": 1}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
    status, answer = fair.server.post(
        "/v1/chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": [image]}]},
        {"authorization": f"Bearer {ALICE}"},
    )
    assert (status, "multimodal" in json.dumps(answer) or "image" in json.dumps(answer)) == (400, True), answer


def test_without_a_key_nothing_is_read_before_the_refusal(fair: Counted) -> None:
    """The answer comes while the body is still being sent, and as much of it as is sent is not kept."""
    host, port = fair.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
            + b"5\r\n[1,2,\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counted]:
    """Without the middleware, and with a predictor that cannot be read."""
    yield from counted(tmp_path_factory.mktemp("alone"), [], {"predictor": "/nowhere/at/all"})


def test_without_the_middleware_all_requests_are_one_clients(alone: Counted) -> None:
    for xargs in (FORGED, {"mope_client": "victim"}, {"mope_client": "victim/alice", "mope_tokens": 1}):
        assert alone.charged("/v1/completions", {**TOKENS, "vllm_xargs": xargs}, ALICE) == {ANYBODY: 1}
    printed = alone.server.printed()
    assert printed.count("did not seal") == 1
    assert printed.count("mope corrects no predictions") == 1
