"""The middlewares in a real vLLM server: what reaches its scheduler, and that all else is as it was."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_vllm
from tiny_vllm import NAME, Server, serve

from mope.serving_hooks.carried import ANSWERING, CLIENT, HIGH, RAW, SEAL, TOKENS
from mope.serving_hooks.identity import digest

pytestmark = pytest.mark.skipif(tiny_vllm.MISSING is not None, reason=str(tiny_vllm.MISSING))

ALICE, BOB, EVE = "sk-alice-000111222", "sk-bob-333444555", "sk-eve-666777888"
FORGED = {"mope_client": "mallory", "mope_tokens": 1, "mine": 7}
MESSAGES = [{"role": "user", "content": "explain in a few words how a queue is served"}]
HOOK = "mope.serving_hooks.vllm"


@dataclass(frozen=True)
class Recorded:
    """A server and what has reached its scheduler."""

    server: Server
    diary: Path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.diary.read_text(encoding="utf-8").splitlines()]

    def arriving(self, path: str, body: dict[str, Any], key: str | None = ALICE) -> list[dict[str, Any]]:
        """What reaches the scheduler of one HTTP request that is answered."""
        before = len(self.lines())
        status, answer = self.server.post(path, body, bearer(key))
        assert status == 200, answer
        return self.lines()[before:]


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def recorded(folder: Path, options: list[str], mope: dict[str, Any]) -> Iterator[Recorded]:
    diary = folder / "diary.jsonl"
    diary.touch()
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"MOPE_TEST_RECORD": str(diary), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    scheduler = ["--scheduler-cls", "recording_scheduler.RecordingScheduler"]
    additional = ["--additional-config", json.dumps({"mope": mope})]
    with serve(folder, [*scheduler, *additional, *options], environment) as server:
        yield Recorded(server, diary)


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("fair")
    keys = folder / "keys.json"
    keys.write_text(json.dumps({ALICE: "acme/alice", f"sha256:{digest(BOB)}": "bob"}), encoding="utf-8")
    options = ["--middleware", f"{HOOK}.Middleware", "--enable-scale-out", "--api-key", ALICE, BOB, EVE]
    mope = {"predictor": "chat-micro", "api_keys": str(keys), "deadline_ms": 20_000, "target_llm": "llama-3-8b"}
    yield from recorded(folder, options, mope)


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/v1/completions", {"prompt": "the quick brown fox", "max_tokens": 3}, 1),
        ("/v1/completions", {"prompt": ["the quick", "brown fox"], "max_tokens": 3, "n": 2}, 4),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3}, 1),
        ("/v1/responses", {"input": "the quick brown fox", "max_output_tokens": 3}, 1),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}, 1),
        ("/invocations", {"messages": MESSAGES, "max_tokens": 3}, 1),
    ],
)
def test_client_and_prediction_reach_the_scheduler(fair: Recorded, path: str, body: dict[str, Any], count: int) -> None:
    lines = fair.arriving(path, {"model": NAME, "user": "mallory", "vllm_xargs": FORGED, **body})
    assert len(lines) == count
    for line in lines:
        extra = line["extra"]
        assert extra.keys() == {"mine", CLIENT, TOKENS, HIGH, RAW, ANSWERING, SEAL}
        assert (extra["mine"], extra[CLIENT], extra[ANSWERING]) == (7, "acme/alice", "llama-3-8b|llama|small||1||0")
        assert 1 <= extra[TOKENS] <= 3
        assert extra[TOKENS] <= extra[HIGH] <= 3


def test_each_key_is_a_client(fair: Recorded) -> None:
    body = {"model": NAME, "prompt": [5, 6, 7], "max_tokens": 2}
    for key, client in ((ALICE, "acme/alice"), (BOB, "bob"), (EVE, "key-[0-9a-f]{16}")):
        (line,) = fair.arriving("/v1/completions", body, key)
        assert line["extra"].keys() == {CLIENT, SEAL}  # token ids have no text to predict from
        assert re.fullmatch(client, line["extra"][CLIENT])
    for key in (None, "sk-nobody"):
        assert fair.server.post("/v1/completions", body, bearer(key))[0] == 401


def test_token_ids_in_carry_the_client(fair: Recorded) -> None:
    body = {"model": NAME, "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2, "extra_args": FORGED}}
    (line,) = fair.arriving("/inference/v1/generate", body)
    assert line["extra"].keys() == {"mine", CLIENT, SEAL}
    assert (line["extra"]["mine"], line["extra"][CLIENT]) == (7, "acme/alice")


def test_what_vllm_refuses_it_still_refuses(fair: Recorded) -> None:
    before = len(fair.lines())
    for body in (b"{", b"[]", {"model": NAME}, {"model": NAME, "messages": MESSAGES, "vllm_xargs": {"a": {"b": 1}}}):
        assert fair.server.post("/v1/chat/completions", body, bearer(ALICE))[0] in (400, 422)
    assert fair.server.post("/v1/nowhere", {"vllm_xargs": FORGED}, bearer(ALICE))[0] == 404
    form = b'--x\r\nContent-Disposition: form-data; name="vllm_+AHg-args"\r\n\r\n{"mope_client": "a"}\r\n--x--\r\n'
    headers = {**bearer(ALICE), "content-type": "multipart/form-data; boundary=x; charset=utf-7"}
    status, answer = fair.server.post("/v1/audio/transcriptions", form, headers)
    assert (status, "expected utf-8" in json.dumps(answer)) == (400, True)
    headers = {**bearer(ALICE), "content-type": "multipart/form-data; boundary=x"}
    assert fair.server.post("/v1/audio/transcriptions", form, headers)[0] == 404
    assert len(fair.lines()) == before
    with urllib.request.urlopen(fair.server.url + "/health") as answer:
        assert answer.status == 200


def running(server: Server) -> float:
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        found = [line for line in answer.read().decode().splitlines() if line.startswith("vllm:num_requests_running{")]
    return float(found[0].rpartition(" ")[2])


def test_streams_and_disconnects_are_as_without_us(fair: Recorded) -> None:
    body = json.dumps(
        {"model": NAME, "prompt": "the quick", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    ).encode()
    host, port = fair.server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {ALICE}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body[:20])
        time.sleep(0.05)
        connection.sendall(body[20:])
        received = b""
        while received.count(b"data:") < 3:
            received += connection.recv(4096)
        assert running(fair.server) == 1
        assert b"[DONE]" not in received
    end = time.monotonic() + 20
    while running(fair.server) and time.monotonic() < end:
        time.sleep(0.1)
    assert running(fair.server) == 0
    assert fair.lines()[-1]["extra"][CLIENT] == "acme/alice"


def test_the_log_says_what_is_on_and_holds_no_key(fair: Recorded) -> None:
    printed = fair.server.printed()
    lines = [line for line in printed.splitlines() if "mope Middleware:" in line]
    assert len(lines) == 1
    for part in (
        "2 keys of",
        "3 of the server, all others anonymous",
        "lengths by chat-micro",
        "within 20000 ms, for llama-3-8b",
    ):
        assert part in lines[0]
    assert "mope has failed" not in printed
    for key in (BOB, EVE):
        told = [line for line in printed.splitlines() if key in line and "non-default args" not in line]
        assert told == []


@pytest.fixture(scope="module")
def by_priority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    options = ["--middleware", f"{HOOK}.PriorityMiddleware", "--scheduling-policy", "priority", "--max-num-seqs", "2"]
    mope = {"predictor": "none", "identity": "header", "weights": {"heavy": 2}}
    yield from recorded(tmp_path_factory.mktemp("priority"), options, mope)


def test_a_flood_does_not_hold_back_others(by_priority: Recorded) -> None:
    done: list[str] = []

    def ask(client: str, max_tokens: int) -> None:
        status, answer = by_priority.server.post(
            "/v1/completions",
            {"model": NAME, "prompt": "the quick", "max_tokens": max_tokens, "ignore_eos": True, "priority": -1000},
            {"x-client-id": client, "x-vllm-priority": "-1000"},
            timeout_s=300,
        )
        assert status == 200, answer
        done.append(client)

    # long enough to be there still when the light ones come, on a busy machine too
    flood = [threading.Thread(target=ask, args=("flood", 400)) for _ in range(40)]
    for thread in flood:
        thread.start()
    end = time.monotonic() + 120
    while len(by_priority.lines()) < 40 and time.monotonic() < end:
        time.sleep(0.05)
    light = [threading.Thread(target=ask, args=("light", 40)) for _ in range(3)]
    for thread in light:
        thread.start()
    for thread in [*flood, *light]:
        thread.join()
    assert len(done) == 43
    last_light = max(place for place, client in enumerate(done) if client == "light")
    assert done[last_light:].count("flood") >= 20, done
    tags = [line["priority"] for line in by_priority.lines()]
    assert min(tags) == 0  # none of the callers' own
    assert len(set(tags)) >= 40
    assert "mope has failed" not in by_priority.server.printed()


def test_options_that_cannot_be_used_keep_it_from_starting(tmp_path: Path) -> None:
    additional = ["--additional-config", json.dumps({"mope": {"identiti": "none"}})]
    with (
        pytest.raises(RuntimeError, match=r"mope: .*no option 'identiti'; did you mean 'identity'"),
        serve(tmp_path, ["--middleware", f"{HOOK}.Middleware", *additional]),
    ):
        pass
