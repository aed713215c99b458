"""A port for a server that a test starts as a process of its own."""

from __future__ import annotations

import random
import socket

# Below the range from which systems hand out ports by themselves (32,768 and more, 49,152 and more): whoever asks for
# any port meanwhile gets another one. SGLang adds 10,000 to its own for further ones.
PORTS = range(10_000, 22_000)


def free_port() -> int:
    """One on which nothing listens, and which the system gives to nobody until a server has started on it."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
