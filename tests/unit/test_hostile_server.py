"""`mope profile` against servers that answer with anything, without end, or lead elsewhere."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.cli import main
from mope.errors import ServerError
from mope.profiling import client
from mope.profiling.client import Stream, capacity_tokens

MODELS = json.dumps({"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 2048}]}).encode()
EVENT = b'data: {"choices":[{}]}\n\n'
COUNTED = json.dumps({"choices": [{}], "usage": {"prompt_tokens": 30, "completion_tokens": 8}}).encode()
ENDLESS = b""  # an answer that stands for one without end


class Hostile:
    """What a server answers, and what it was asked.

    Attributes:
        models: the answer of /v1/models.
        event: what each piece of a stream is.
        metrics: of /metrics.
        headers: that come with /v1/models.
        status: of /v1/models.
        num_bytes: that it could send.
        keys: that it was sent.
    """

    def __init__(self, **answers: object) -> None:
        self.models: bytes = MODELS
        self.event: bytes = EVENT
        self.metrics = b"\n"
        self.headers: dict[str, str] = {}
        self.status = 200
        self.pause_s = 0.0
        self.num_events = 3
        self.__dict__.update(answers)
        self.num_bytes = 0
        self.keys: list[str | None] = []


@contextmanager
def serving(hostile: Hostile) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hostile.keys.append(self.headers.get("Authorization"))
            if self.path == "/v1/models":
                self.send(hostile.models, hostile.status, hostile.headers)
            elif self.path == "/metrics":
                self.send(hostile.metrics)
            else:
                self.send(b"{}", 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not body.get("stream"):
                self.send(COUNTED)
                return
            self.send(
                b"".join([hostile.event] * hostile.num_events) or ENDLESS, headers={"Content-Type": "text/event-stream"}
            )

        def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            try:
                while not body:
                    piece = b"x" if hostile.pause_s else b"x" * 65_536
                    self.wfile.write(piece)
                    hostile.num_bytes += len(piece)
                    time.sleep(hostile.pause_s)
                self.wfile.write(body)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def profile(url: str, folder: Path, *more: str) -> int:
    flags = ["--timeout-s", "5", "--max-seconds", "20", "--rounds", "1", "--num-checks", "0", *more]
    return main(["profile", "--url", url, "--output", str(folder / "p.json"), "--prompt-tokens", "8,16,32,64", *flags])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert len(lines[0]) < 1500
    return lines[0]


def data(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"models": b"[" * 200_000}, "no JSON object"),
        ({"models": b"5"}, "no JSON object"),
        ({"models": b'{"data": 5}'}, "lists no LLM"),
        ({"models": b'{"data": {"a": 1}}'}, "lists no LLM"),
        ({"models": b'{"data": [5, null, "x"]}'}, "lists no LLM"),
        ({"models": b'{"data":[{"id":"m","max_model_len":' + b"9" * 5000 + b"}]}"}, ""),
        ({"models": json.dumps({"data": [{"id": "\x1b[31mm"}]}).encode()}, "lists no LLM"),
        ({"models": json.dumps({"data": [{"id": "m" * 9999}]}).encode()}, "lists no LLM"),
        ({"models": gzip.compress(b" " * 10_000_000), "headers": {"Content-Encoding": "gzip"}}, "encoding gzip"),
        ({"models": ENDLESS}, "more than"),
        ({"event": data("5")}, "no JSON object"),
        ({"event": data("null")}, "no JSON object"),
        ({"event": data('{"choices":[{}],"usage":"x"}')}, "a usage that is no object"),
        ({"event": data('{"choices":[{}],"usage":{"prompt_tokens":"x"}}')}, '"usage.prompt_tokens'.strip('"')),
        ({"event": data('{"choices":[{}],"usage":{"completion_tokens":-9}}')}, "-9 as usage.completion_tokens"),
        ({"event": data('{"choices":[{}],"usage":{"completion_tokens":1e400}}')}, "usage.completion_tokens"),
        ({"event": data('{"choices":[{}],"usage":{"completion_tokens":true}}')}, "usage.completion_tokens"),
        ({"event": data("[" * 50_000)}, "no JSON object"),
        ({"event": data('{"error":' + "[" * 900 + "]" * 900 + "}")}, "broke off"),
        ({"event": data('{"error":"\\u001b[31m' + "x" * 9999 + '"}')}, "broke off"),
        ({"event": b"data: " + b"x" * 100_000 + b"\n\n"}, "65,536 bytes"),
        ({"event": b"x" * 100_000}, "65,536 bytes"),
        ({"event": ENDLESS, "num_events": 0}, "though 8 tokens were asked for"),
    ],
)
def test_whatever_a_server_answers_is_one_line(
    answers: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = Hostile(**answers)
    with serving(hostile) as url:
        assert profile(url, tmp_path) == 2
    assert said in complaint(capsys)
    assert hostile.num_bytes < client.MAX_REPLY + 20_000_000  # and what the system holds for two sockets


@pytest.mark.parametrize(
    "answers",
    [
        {"models": b'{"data":[{"id":"m","max_model_len":Infinity}]}'},
        {"models": b'{"data":[{"id":"m","max_model_len":"x"}]}'},
        {"metrics": b"sglang:max_total_num_tokens 1e999\n"},
        {"metrics": b"sglang:max_total_num_tokens e+e.\n"},
        {"metrics": b"vllm:cache_config_info{" + b"a" * 1_000_000 + b"} 1\n"},
    ],
)
def test_what_a_server_says_of_itself_is_passed_over_where_it_is_no_number(
    answers: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Hostile(**answers, event=data("null"))) as url:
        assert profile(url, tmp_path) == 2
    assert "an event that is no JSON object" in complaint(capsys)  # so it was asked


@pytest.mark.parametrize("answers", [{"models": ENDLESS}, {"event": ENDLESS, "num_events": 0}])
def test_a_byte_now_and_then_does_not_go_on_for_ever(
    answers: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started_s = time.monotonic()
    with serving(Hostile(**answers, pause_s=0.05)) as url:
        assert profile(url, tmp_path, "--timeout-s", "1", "--max-seconds", "2") == 2
    assert "took longer than --" in complaint(capsys)
    assert time.monotonic() - started_s < 15


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_key_is_sent_to_no_other_address(status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = Hostile()
    with serving(there) as other:
        here = Hostile(status=status, headers={"Location": f"{other}/v1/models"}, models=b"x")
        with serving(here) as url:
            assert profile(url, tmp_path, "--api-key", "SECRETKEY") == 2
    assert here.keys == ["Bearer SECRETKEY"]
    assert there.keys == []
    assert "is not followed" in (said := complaint(capsys))
    assert "SECRETKEY" not in said


@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["choices", "usage", "error", "prompt_tokens"]), inner),
    ),
))  # fmt: skip
def test_any_event_is_understood_or_a_server_error(event: object) -> None:
    stream = Stream(0.0, [(1.0, data(json.dumps(event)))])
    try:
        arrivals, usage = stream.events()
    except ServerError:
        return
    assert all(arrived == 1.0 for arrived in arrivals)
    assert usage is None or isinstance(usage, dict)


@given(st.text(alphabet="0123456789.e+-infa \n", max_size=30))
def test_any_capacity_is_a_number_or_none(text: str) -> None:
    found = capacity_tokens(f"sglang:max_total_num_tokens {text}")
    assert found is None or found > 0
