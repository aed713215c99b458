"""What a server says at one address: asked once, within a time and a size, and followed nowhere.

Whoever answers is not trusted. A key goes to the address that was given and to no other: redirects are an error that
names them. Proxies of the environment are not asked.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from mope.errors import ServerError

DEADLINE_S = 10.0  # from the first byte that is sent to the last one that is read
MAX_BYTES = 50_000_000
_PIECE = 65_536


def fetch(address: str, api_key: str | None = None) -> str:
    """The text at an address.

    Args:
        address: with http:// or https://.
        api_key: sent as a bearer token.

    Raises:
        ServerError: nobody answers, or not with 200, or too slowly, or too much. `status` has what it answered with.
    """
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://127.0.0.1:8000")
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=DEADLINE_S, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=DEADLINE_S)
    except ValueError as error:
        raise ServerError(f"{readable(address)}: {error}") from error
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    end_s = time.monotonic() + DEADLINE_S
    over: threading.Timer | None = None
    try:
        connection.connect()
        over = threading.Timer(DEADLINE_S, _break_off, [connection.sock])
        over.daemon = True
        over.start()
        connection.request("GET", path, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
        answer = connection.getresponse()
        if answer.status != 200:
            raise _refusal(answer)
        text = _read(answer)
        if time.monotonic() >= end_s:  # what was broken off reads like one that has ended
            raise TimeoutError
        return text
    except ServerError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = time.monotonic() >= end_s or isinstance(error, TimeoutError)
        said = f"not within {DEADLINE_S:g} s" if late else readable(str(error)) or type(error).__name__
        raise ServerError(said) from error
    finally:
        if over is not None:
            over.cancel()
        connection.close()


def fetch_json(address: str, api_key: str | None = None) -> Any:
    """The JSON at an address.

    Raises:
        ServerError: as `fetch`, or what is there is no JSON.
    """
    text = fetch(address, api_key)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServerError("its answer is no JSON") from error


def readable(text: object, most: int = 200) -> str:
    """What a server says, as a terminal may show it."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(text)[:most])


def _refusal(answer: http.client.HTTPResponse) -> ServerError:
    text = f"HTTP {answer.status} {readable(answer.reason)}".strip()
    if 300 <= answer.status < 400:
        text += f": it leads to {readable(answer.getheader('Location', 'nowhere'))}, which was not asked"
    error = ServerError(text)
    error.status = answer.status
    return error


def _read(answer: http.client.HTTPResponse) -> str:
    pieces, num_bytes = [], 0
    while piece := answer.read1(_PIECE):
        pieces.append(piece)
        num_bytes += len(piece)
        if num_bytes > MAX_BYTES:
            raise ServerError(f"its answer is longer than {MAX_BYTES:,} bytes")
    return b"".join(pieces).decode("utf-8", "replace")


def _break_off(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
