"""Who sent a request: derived from what the operator trusts, never from what a caller may choose.

An API key counts if it is one of the server's own or in the operator's file, on any path, since engines leave some
paths unguarded. With `identity="header"` and `client_header="authorization"` a gateway checks keys. Callers could make
up any other key anew for each request: all of those share one client with the requests that have no key. Knows HTTP
headers and JSON bodies; no engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

from mope.errors import ConfigError
from mope.fairness.clients import client_path
from mope.serving_hooks.options import HookOptions

Headers = Iterable[tuple[bytes, bytes]]  # as ASGI has them: names in lower case, values as they came

CHECK_S = 1.0  # seconds between two looks at whether the file of keys has changed
_AUTHORIZATION = b"authorization"
_API_KEY = b"x-api-key"  # Anthropic's clients send it; no engine checks it, so it counts only if the file knows it
_SECRET = re.compile(rb"auth(orization)?$|api-?key|(auth|access)-?key|cookie|token|secret|password|credential|jwt")
_SHA256 = re.compile(r"sha256:[0-9A-Fa-f]{64}")


class ApiKeys:
    """A file that maps API keys to clients. Keeps hashes alone; no message of it ever holds a key.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Args:
            path: JSON, `{"KEY or sha256:HEX": "client", ...}`.

        Raises:
            ConfigError: it cannot be read, or an entry cannot be used.
        """
        self.path = path
        self._seen = self._stamp()
        self._clients = _read(path)

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def clients(self) -> Mapping[str, str]:
        """Clients by the SHA-256 of their keys; another object once the file was read anew."""
        return self._clients

    def client(self, digest: str) -> str | None:
        """The client of the key with this SHA-256, in hexadecimal digits; None if it is not in the file."""
        return self._clients.get(digest)

    def refresh(self, logger: logging.Logger) -> None:
        """Reads the file anew if it has changed. One that cannot be used changes nothing, and is told of once."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._clients = _read(self.path)
        except ConfigError as error:
            logger.error("%s; the keys read before stay in force", error)
        else:
            logger.info("read %d API keys anew from %s", len(self._clients), self.path)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def digest(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Identity:
    """Says who sent a request.

    Attributes:
        keys: the file of API keys, if there is one.
    """

    def __init__(
        self, options: HookOptions, *, secret: bytes, logger: logging.Logger, server_keys: Iterable[str] = ()
    ) -> None:
        """Reads the file of API keys, if there is one.

        Args:
            options: `identity`, `client_header` and `api_keys` of them.
            secret: of the server, at most 64 bytes. Keys are named by it, so that names do not help to guess keys.
            logger: for news of the file.
            server_keys: the API keys that the server itself accepts; without any it accepts all requests.

        Raises:
            ConfigError: a file of API keys that cannot be used.
        """
        self._source, self._header = options.identity, options.client_header.lower().encode("ascii")
        self._by_gateway = self._source == "header" and self._header == _AUTHORIZATION
        self._by_key = self._source == "api-key" or self._by_gateway
        self._hides = _SECRET.search(self._header) is not None
        self._server_keys = frozenset(digest(key) for key in server_keys if key)
        self._secret = secret
        self.keys = ApiKeys(options.api_keys) if options.api_keys is not None and self._by_key else None
        self._logger, self._checking, self._next_check_s = logger, Lock(), 0.0

    def admits(self, headers: Headers) -> bool:
        """Whether a request is one to work for: it has a known key, or the server asks for none.

        The server may still refuse it, or accept others on paths that it leaves unguarded.
        """
        if not self._server_keys:
            return True
        key = _bearer(headers)
        if key is not None and (found := digest(key)) and (found in self._server_keys or self._in_file(found)):
            return True
        return self._of_file(_only(headers, _API_KEY)) is not None

    @property
    def reads_body(self) -> bool:
        """Whether the client stands in the body."""
        return self._source == "user"

    def client(self, headers: Headers, body: Mapping[str, Any]) -> str | None:
        """The client's path, parts joined by `/`; None for anybody.

        Args:
            headers: of the request.
            body: its JSON; read if the operator declares that a gateway sets `user`.
        """
        if self._by_key:
            return self._of_key(_bearer(headers)) or self._of_file(_only(headers, _API_KEY))
        if self._source == "header":
            name = _only(headers, self._header)
            return self._name_of(name) if name and self._hides else _named(name)
        if self._source == "user":
            user = body.get("user")
            return _named(user if isinstance(user, str) else None)
        return None

    def _of_key(self, key: str | None) -> str | None:
        if not key:
            return None
        found = digest(key)
        client = self._in_file(found)
        if client is None and (self._by_gateway or found in self._server_keys):
            client = self._name_of(key)
        return client

    def _of_file(self, key: str | None) -> str | None:
        return self._in_file(digest(key)) if key and self.keys is not None else None

    def _in_file(self, found: str) -> str | None:
        return self.keys.client(found) if self.keys is not None else None

    def _name_of(self, key: str) -> str:
        """A name that tells nothing of a key: 64 bits, which nobody can compute without the server's secret."""
        name = blake2b(key.encode("utf-8", "surrogatepass"), key=self._secret, digest_size=8, person=b"mope client")
        return f"key-{name.hexdigest()}"

    def due(self) -> bool:
        """Whether `refresh` should be called, away from the event loop. At most once in `CHECK_S`."""
        if self.keys is None or time.monotonic() < self._next_check_s:
            return False
        self._next_check_s = time.monotonic() + CHECK_S
        return True

    def refresh(self) -> None:
        """Looks whether the file of API keys has changed. Touches the disk."""
        if self.keys is not None:
            with self._checking:
                self.keys.refresh(self._logger)

    def __str__(self) -> str:
        if not self._by_key:
            name = f" {self._header.decode()}" if self._source == "header" else ""
            return f"{self._source}{name}{', named by a hash' if name and self._hides else ''}"
        known = f"{len(self.keys)} keys of {self.keys.path}" if self.keys is not None else "no file of keys"
        if self._by_gateway:
            return f"API key, {known}, others by a hash of theirs, which a gateway checks"
        return f"API key, {known}, {len(self._server_keys)} of the server, all others anonymous"


def _bearer(headers: Headers) -> str | None:
    """The key of the first `Authorization: Bearer`, read as vLLM's own check reads it."""
    for name, value in headers:
        if name.lower() == _AUTHORIZATION:
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key if scheme.lower() == "bearer" else None
    return None


def _only(headers: Headers, wanted: bytes) -> str | None:
    """The value of a header; None if it is there with two values, one of which a caller must have sent."""
    values = {value for name, value in headers if name.lower() == wanted}
    return values.pop().decode("utf-8", "replace") if len(values) == 1 else None


def _named(name: str | None) -> str | None:
    """A name as a path; None for an empty one."""
    name = (name or "").strip().encode("utf-8", "replace").decode()
    return "/".join(client_path(name)) if name.strip("/") else None


def _read(path: Path) -> dict[str, str]:
    """Clients by the SHA-256 of their keys."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except OSError as error:
        raise ConfigError(f"api_keys {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        # of a decoding error the message alone: the error holds the document
        said = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"api_keys {path}: no JSON, {said}{where}") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ConfigError(f'api_keys {path}: expected one object, {{"key or sha256:HEX": "tenant/user", ...}}')
    clients: dict[str, str] = {}
    for number, (key, client) in enumerate(pairs, start=1):
        where = f"api_keys {path}: entry {number}"
        if key.startswith("sha256:"):
            if not _SHA256.fullmatch(key):
                raise ConfigError(f"{where}: expected 64 hexadecimal digits after `sha256:`; got {len(key) - 7} signs")
            found = key.removeprefix("sha256:").lower()
        elif not key.strip():
            raise ConfigError(f"{where}: the key is empty")
        else:
            found = digest(key)
        if not isinstance(client, str) or not client.strip("/ "):
            raise ConfigError(f'{where}: its client is {type(client).__name__}; expected a name such as "acme/alice"')
        if found in clients:
            raise ConfigError(f"{where}: this key stands there twice")
        clients[found] = "/".join(client_path(client.strip()))
    return clients
