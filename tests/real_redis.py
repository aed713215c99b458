"""A real Redis server for a test: started on a port of its own, killed, and started again on what it left behind."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from ports import free_port

MISSING = (
    "no redis-server on this machine: apt-get install redis-server"
    if shutil.which("redis-server") is None
    else "the package redis is not installed: pip install 'mope-llm[redis]'"
    if importlib.util.find_spec("redis") is None
    else ""
)
needs_redis = pytest.mark.skipif(bool(MISSING), reason=MISSING)


class RealRedis:
    """A server without persistence, unless options say otherwise."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RealRedis:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*command, "--save", "", *self.options], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return self
            time.sleep(0.01)
        raise RuntimeError(f"redis-server does not answer: {(self.folder / 'log').read_text()[-2000:]}")

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def kill(self) -> None:
        """At once, as kill -9 does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
