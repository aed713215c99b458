"""What the doctor asks of a server that is not to be trusted: the key stays, and nothing takes long or much."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mope.cli import main
from mope.errors import ServerError
from mope.serving_hooks import doctor, fetch
from mope.serving_hooks.sglang import commands

KEY = "SECRETKEY"
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer, host: str = "127.0.0.1") -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers as it is told, and the keys that it was sent."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization"))
            try:
                answer(self)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer((host, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}", keys
    finally:
        server.shutdown()
        server.server_close()


def saying(body: bytes, status: int = 200) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def leading_to(url: str, status: int = 302) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Location", url + handler.path)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


STATES = json.dumps({"internal_states": [{"mope": {"on": True, "front_end": "hooked", "policy": "vtc"}}]}).encode()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_is_sent_to_no_other_address(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(saying(STATES)) as (there, seen), serving(leading_to(there, status)) as (here, asked):
        assert main(["doctor", "sglang", "--url", here, "--api-key", KEY, "--timeout", "0", "--json"]) == 1
        found = doctor.running(here)
    assert asked[0] == f"Bearer {KEY}"
    assert seen == []
    out = capsys.readouterr().out
    assert f"it leads to {there}/server_info, which was not asked" in out
    assert "which was not asked" in found[0].text
    assert KEY not in out


def test_a_key_is_sent_to_its_address() -> None:
    with serving(saying(STATES)) as (url, seen):
        (found,) = commands.running(url, KEY)
    assert found.status == "ok"
    assert seen == [f"Bearer {KEY}"]


def test_a_server_that_wants_a_key_is_told_of() -> None:
    with serving(saying(b"", 401)) as (url, _):
        assert "wants another key" in commands.running(url, KEY)[0].text
        assert "wants a key" in commands.running(url)[0].text


@pytest.mark.parametrize(
    "body",
    [b"", b"5", b"null", b"[]", b"{}", b"[" * 200_000, b'{"internal_states": 5}', b'{"internal_states": {"a": 1}}',
     b'{"internal_states":[' + b"9" * 5000 + b"]}", b"\xff\xfe"],
)  # fmt: skip
def test_whatever_a_server_says_is_a_finding(body: bytes) -> None:
    with serving(saying(body)) as (url, _):
        found = commands.running(url)
        assert [finding.status for finding in found] == ["failed"]
        assert doctor.running(url)


def test_what_a_server_says_cannot_write_to_the_terminal() -> None:
    evil = {"on": True, "policy": "\x1b[31m", "front_end": "\x1b]0;x\x07", "running": "\r", "waiting": "\n" * 9}
    states = [{"mope": evil}, {"mope": {"on": False, "failure": "\x1b[2J" + "x" * 10_000}}]
    with serving(saying(json.dumps({"internal_states": states}).encode())) as (url, _):
        for finding in commands.running(url):
            assert finding.text.isprintable()
            assert len(finding.text) < 1000


def test_an_answer_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 1_000_000)

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 65_536)

    with serving(endless) as (url, _), pytest.raises(ServerError, match="longer than 1,000,000 bytes"):
        fetch.fetch(url)


@pytest.mark.parametrize("part", ["head", "body"])
def test_an_answer_that_never_ends_is_an_error_in_time(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "DEADLINE_S", 0.6)

    def dripping(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: " if part == "head" else b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)

    with serving(dripping) as (url, _):
        started_s = time.monotonic()
        with pytest.raises(ServerError, match=r"not within 0\.6 s"):
            fetch.fetch(url)
        assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:x", "http://[::1", "file:///etc/passwd", "x"])
def test_what_is_no_address_is_an_error(url: str) -> None:
    with pytest.raises(ServerError):
        fetch.fetch(url)
