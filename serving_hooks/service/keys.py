"""API keys of the service: from a file, the environment, or none.

A key is looked up by a keyed hash that is new in each process. Nobody can choose keys whose hashes are alike, so the
time of a look-up tells nothing about accepted keys.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping
from hashlib import blake2b

from mope.serving_hooks.identity import CHECK_S, ApiKeys, digest
from mope.serving_hooks.service.config import ServeConfig

logger = logging.getLogger("mope")


class Keys:
    """The accepted keys and their clients. Keeps hashes alone.

    Raises:
        ConfigError: the file of keys cannot be read, or an entry of it cannot be used.
    """

    def __init__(self, config: ServeConfig, environment: Mapping[str, str] = os.environ) -> None:
        self._secret = secrets.token_bytes(32)
        given = [key.strip() for key in environment.get(config.api_key_env, "").split(",") if key.strip()]
        self._of_environment = {digest(key): f"key-{self._hash(digest(key)).hex()[:8]}" for key in given}
        if len(given) == 1:
            self._of_environment = {digest(given[0]): "key"}
        self._file = ApiKeys(config.api_keys) if config.api_keys is not None else None
        self._next_check_s = 0.0
        self._known: dict[bytes, str] = {}
        self._source: Mapping[str, str] | None = None
        self._build()

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._file is not None or bool(self._of_environment)

    def __len__(self) -> int:
        return len(self._known)

    def client(self, key: str | None) -> str | None:
        """The client of a key; None if the key is not accepted."""
        if not key:
            return None
        return self._known.get(self._hash(digest(key)))

    def refresh(self) -> None:
        """Reads the file again if it has changed. Looks at most once a second, a few microseconds."""
        if self._file is None or time.monotonic() < self._next_check_s:
            return
        self._next_check_s = time.monotonic() + CHECK_S
        self._file.refresh(logger)
        self._build()

    def _build(self) -> None:
        source = self._file.clients if self._file is not None else {}
        if source is not self._source:
            self._source = source
            named = {**self._of_environment, **source}
            self._known = {self._hash(found): client for found, client in named.items()}

    def _hash(self, found: str) -> bytes:
        return blake2b(found.encode("ascii"), key=self._secret, digest_size=16).digest()
