"""The port that metrics are served at: few threads, each for a short time, and one scrape at a time.

Whoever reaches the port may ask as often as they like: figures are read once a second at most. Knows HTTP and
`prometheus_client`; not what is shown.
"""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple, cast

from mope.extras import require

KEEP_S = 1.0  # how long a scrape is answered with the figures of the one before
DEADLINE_S = 10.0  # of a connection, from its beginning to its end
MAX_CONNECTIONS = 16  # at once, each with a thread
PATHS = ("/", "/metrics")
_FORMS = 4  # of the text that are kept

logger = logging.getLogger("mope")


class Page(NamedTuple):
    """What a scraper is told.

    Attributes:
        content_type: of the text.
        body: the text.
        zipped: the same by gzip.
    """

    content_type: str
    body: bytes
    zipped: bytes


class Pages:
    """Texts of a registry, made one at a time and kept for `KEEP_S`."""

    def __init__(self, registry: Any) -> None:
        """Reads nothing yet.

        Args:
            registry: of `prometheus_client`.
        """
        self._registry = registry
        self._one_at_a_time = threading.Lock()
        self._kept: dict[str, tuple[float, Page]] = {}

    def read(self, accept: str) -> Page:
        """The text in the form that a scraper accepts."""
        from prometheus_client.exposition import choose_encoder

        encoder, content_type = choose_encoder(accept)
        with self._one_at_a_time:
            made_s, page = self._kept.get(content_type, (float("-inf"), None))
            if page is None or time.monotonic() - made_s >= KEEP_S:
                body = encoder(self._registry)
                page = Page(content_type, body, gzip.compress(body, 1))
                if len(self._kept) >= _FORMS:
                    self._kept.clear()
                self._kept[content_type] = time.monotonic(), page
            return page


class Exporter:
    """Answers scrapes.

    Attributes:
        host: address that it listens at.
        port: where.
    """

    def __init__(self, collector: Any, host: str, port: int) -> None:
        """Begins to listen.

        Args:
            collector: what is asked at each scrape.
            host: address to listen at.
            port: where; 0 for a free one.

        Raises:
            MissingExtraError: prometheus-client is not installed.
            OSError: the address cannot be had.
        """
        prometheus = require("prometheus_client", "metrics_port", "vllm")
        registry = prometheus.CollectorRegistry()
        registry.register(collector)
        self._server = _Server(host, port, Pages(registry))
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="mope-metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """What to tell Prometheus."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/metrics"

    def close(self) -> None:
        """Listens no longer."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 8 * MAX_CONNECTIONS

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self.pages = pages
        self._begun_s: dict[Any, float] = {}  # connections and when they began, the oldest first
        self._asking: set[Any] = set()  # those whose request has not arrived yet
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives a connection a thread; where all are taken, the oldest that has not asked yet makes room."""
        if len(self._begun_s) >= MAX_CONNECTIONS:
            silent = next((one for one in list(self._begun_s) if one in self._asking), None)
            if silent is None:
                self.shutdown_request(request)
                return
            self._break_off(silent)
        self._begun_s[request] = time.monotonic()
        self._asking.add(request)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Breaks off what takes too long; called twice a second at least."""
        latest_s = time.monotonic() - DEADLINE_S
        for request, begun_s in list(self._begun_s.items()):
            if begun_s < latest_s:
                self._break_off(request)

    def asked(self, request: Any) -> None:
        """The request of a connection has arrived."""
        self._asking.discard(request)

    def _break_off(self, request: Any) -> None:
        """Whatever its thread waits for comes to an end."""
        self._forget(request)
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: Any) -> None:
        self._begun_s.pop(request, None)
        self._asking.discard(request)

    def shutdown_request(self, request: Any) -> None:
        """A connection is over."""
        self._forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away is no news."""
        logger.debug("a scrape of mope's metrics broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = DEADLINE_S
    server_version, sys_version = "mope", ""

    def do_GET(self) -> None:
        server = cast(_Server, self.server)
        server.asked(self.connection)
        if self.path.partition("?")[0] not in PATHS:
            self.send_error(404)
            return
        page = server.pages.read(self.headers.get("Accept", ""))
        zipped = "gzip" in self.headers.get("Accept-Encoding", "")
        body = page.zipped if zipped else page.body
        self.send_response(200)
        self.send_header("Content-Type", page.content_type)
        if zipped:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""
