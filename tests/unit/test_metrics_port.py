"""The port for metrics under scrapers that are many, slow or strange."""

from __future__ import annotations

import gzip
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from stewards import busy_steward, guard, samples

from mope.serving_hooks import metrics_port
from mope.serving_hooks.metrics import StewardCollector
from mope.serving_hooks.metrics_port import MAX_CONNECTIONS, Exporter


class Counting:
    """A collector that takes its time and counts how often it is asked, and how often at once."""

    def __init__(self) -> None:
        self.num_asked = self.num_at_once = self.most_at_once = 0

    def collect(self) -> Iterator[Any]:
        self.num_asked += 1
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        time.sleep(0.05)
        self.num_at_once -= 1
        yield GaugeMetricFamily("mope_test", "For a test.", value=self.num_asked)


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def exporter(counting: Counting) -> Iterator[Exporter]:
    exporter = Exporter(counting, "127.0.0.1", 0)
    counting.num_asked = 0  # a registry asks once for names
    yield exporter
    exporter.close()


def asked(exporter: Exporter, method: str = "GET", path: str = "/metrics", **headers: str) -> tuple[Any, bytes]:
    connection = http.client.HTTPConnection(exporter.host, exporter.port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def num_threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def wait_for(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    end_s = time.monotonic() + seconds
    while not (met := true()) and time.monotonic() < end_s:
        time.sleep(0.01)
    return met


def test_many_scrapers_cost_one_reading_a_second(exporter: Exporter, counting: Counting) -> None:
    started_s, bodies = time.monotonic(), []

    def scrape() -> None:
        for _ in range(10):
            bodies.append(asked(exporter)[1])

    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bodies) == 80
    assert counting.most_at_once == 1
    assert counting.num_asked <= 1 + (time.monotonic() - started_s) / metrics_port.KEEP_S


def test_figures_are_new_after_a_second(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    first = asked(exporter)[1]
    assert asked(exporter)[1] == first
    monkeypatch.setattr(metrics_port, "KEEP_S", 0.0)
    assert asked(exporter)[1] != first


def test_whoever_sends_a_byte_now_and_then_is_broken_off(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_port, "DEADLINE_S", 0.5)
    with socket.create_connection((exporter.host, exporter.port)) as slow:
        slow.settimeout(0.1)
        ended, started_s = False, time.monotonic()
        slow.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        while not ended and time.monotonic() - started_s < 8:
            try:
                slow.sendall(b"x")
                ended = slow.recv(100) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended
    assert wait_for(lambda: num_threads() == 0)


def test_whoever_does_not_read_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long:
        def collect(self) -> Iterator[Any]:
            yield GaugeMetricFamily("mope_test", "x" * 20_000_000, value=1)

    monkeypatch.setattr(metrics_port, "DEADLINE_S", 0.5)
    exporter = Exporter(Long(), "127.0.0.1", 0)
    with socket.create_connection((exporter.host, exporter.port)) as deaf:
        deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert wait_for(lambda: num_threads() == 1)
        assert wait_for(lambda: num_threads() == 0)
    exporter.close()


def test_silent_connections_take_few_threads_and_lock_nobody_out(exporter: Exporter) -> None:
    silent = [socket.create_connection((exporter.host, exporter.port)) for _ in range(5 * MAX_CONNECTIONS)]
    assert b"mope_test" in asked(exporter)[1]
    assert num_threads() <= MAX_CONNECTIONS + 1  # one may be about to end
    for connection in silent:
        connection.close()


def test_a_scraper_too_many_is_turned_away_while_all_others_are_answered(
    exporter: Exporter, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(counting, "collect", lambda: (goes_on.wait(10), iter(()))[1])
    waiting = []
    for _ in range(MAX_CONNECTIONS):
        connection = socket.create_connection((exporter.host, exporter.port))
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        waiting.append(connection)
    assert wait_for(lambda: len(exporter._server._begun_s) == MAX_CONNECTIONS and not exporter._server._asking)
    with pytest.raises((OSError, http.client.HTTPException)):
        asked(exporter)
    goes_on.set()
    for connection in waiting:
        connection.settimeout(5)
        assert connection.recv(15) == b"HTTP/1.0 200 OK"
        connection.close()


def test_forms_of_the_text() -> None:
    exporter = Exporter(StewardCollector(busy_steward(), guard()), "127.0.0.1", 0)
    answer, plain = asked(exporter)
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert samples(plain.decode())
    answer, zipped = asked(exporter, Accept_Encoding="gzip")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped) == plain
    answer, text = asked(exporter, Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert list(openmetrics(text.decode()))
    assert asked(exporter, "HEAD")[1] == b""
    exporter.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("GET", "/metrics?name[]=x", 200), ("GET", "/../etc/passwd", 404), ("GET", "/x", 404),
     ("POST", "/metrics", 501), ("DELETE", "/metrics", 501), ("GET", "/" + "a" * 70_000, 414)],
)  # fmt: skip
def test_what_is_asked(exporter: Exporter, method: str, path: str, status: int) -> None:
    assert asked(exporter, method, path)[0].status == status
