"""A real `mope serve` in a thread of this process, at a loopback port: for tests of what asks it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from ports import free_port

from mope import LengthPredictor
from mope.serving_hooks.service.app import create_app
from mope.serving_hooks.service.cli import listen
from mope.serving_hooks.service.config import ServeConfig
from mope.serving_hooks.service.desk import Desk
from mope.serving_hooks.service.keys import Keys


class Service:
    """One that may be started, stopped and started again at the same port.

    Attributes:
        url: of it.
        desk: of the last start.
    """

    desk: Desk

    def __init__(self, keys: str = "", **options: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.predictor = LengthPredictor.from_pretrained("chat-micro")
        self._config = ServeConfig(**{"deadline_ms": 30_000, "log_requests": False, **options})
        self._keys = Keys(self._config, {"MOPE_API_KEYS": keys})
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread()

    @property
    def num_learned(self) -> int:
        """Observations that it learned from since its last start."""
        return int(self.desk.metrics.learned._value.get())

    def start(self) -> None:
        listening = listen("127.0.0.1", self.port)
        self._thread = threading.Thread(target=self._run, args=(listening,))
        self._thread.start()
        while self._server is None or not self._server.started:
            if not self._thread.is_alive():
                raise AssertionError("the service did not start")
            time.sleep(0.005)

    def _run(self, listening: socket.socket) -> None:
        self.desk = Desk(self.predictor, self._config, "chat-micro")  # its books belong to this thread
        config = uvicorn.Config(create_app(self.desk, self._keys), log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._server.run(sockets=[listening])

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join()
            self._server = None


@contextmanager
def serving(keys: str = "", **options: Any) -> Iterator[Service]:
    """A service that is ready."""
    service = Service(keys, **options)
    service.start()
    try:
        yield service
    finally:
        service.stop()
