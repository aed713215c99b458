"""A predictor that runs elsewhere: `"predictor": "http://HOST:PORT"`, the address of a `mope serve`.

The front end asks it for predictions, and the process that sees requests finish tells it how long they were. Nothing
here raises or waits for long because of a service or a network. Knows HTTP and requests; no engine.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import re
import ssl
import threading
from contextlib import suppress
from urllib.parse import urlsplit

from mope.client import Prediction, Predictions
from mope.errors import ConfigError, ServerError
from mope.request import AS_READ, Request
from mope.serving_hooks.fetch import fetch, readable

API_KEY = "MOPE_API_KEY"  # environment variable that holds the key for the service
ADDRESS = "http://HOST:PORT or https://HOST of a `mope serve`, such as http://127.0.0.1:8400"
OBSERVE_S = 1.0  # that each step of an observation may take
REST_S = 1.0  # after an observation that nobody took
LEAST_S = 0.001  # that a prediction may take at least
MAX_BYTES = 65_536  # of a response to an observation
MAX_CLIENT = 200  # characters of a client's name that a service takes
_MARK = "remote|"  # before the id of a prediction, where the front end says what its answer is observed with
_BARE = re.compile(r"[A-Za-z0-9.-]+:\d{1,5}(/.*)?")  # an address without http://

logger = logging.getLogger("mope")


def is_address(predictor: str) -> bool:
    """Whether a predictor is named by the address of a service."""
    return predictor.startswith(("http://", "https://"))


def mistake(predictor: str) -> str | None:
    """What is wrong with an address; None if nothing is, or it is no address but a name or a folder."""
    if not is_address(predictor):
        if "://" in predictor or _BARE.fullmatch(predictor):
            return f"got {predictor.rpartition('@')[2][:80]!r}; expected {ADDRESS}"
        return None
    try:
        parts = urlsplit(predictor)
        if "@" in parts.netloc:
            return f"the address holds a user or a password, which logs show; put an API key into {API_KEY} instead"
        usable = parts.hostname and parts.port != 0 and predictor.isascii() and predictor.isprintable()
        if not usable or parts.query or parts.fragment or " " in predictor:
            raise ValueError
    except ValueError:  # a port or brackets that are none
        return f"got {predictor.rpartition('@')[2][:80]!r}; expected {ADDRESS}"
    return None


def api_key() -> str | None:
    """The key for the service, if the environment holds one."""
    return os.environ.get(API_KEY, "").strip() or None


def base_of(address: str) -> str:
    """An address without `/v1` at its end."""
    return address.rstrip("/").removesuffix("/v1")


def look(address: str, log: logging.Logger) -> None:
    """Logs whether a service answers, from a thread of its own: a start does not wait for it."""

    def ask() -> None:
        try:
            fetch(f"{base_of(address)}/ready")
        except ServerError as error:
            log.warning(
                "mope: %s gives no predictions yet (%s). Requests go on without; it is asked again", address, error
            )
        else:
            log.info("mope: %s is ready", address)

    threading.Thread(target=ask, name="mope-remote-look", daemon=True).start()


def answering_of(name: str) -> str:
    """What is carried in place of `Answering`: with which id an answer is observed."""
    return _MARK + name


def name_of(answering: str | None) -> str | None:
    """The id that `answering_of` was given; None if it is anything else."""
    return answering.removeprefix(_MARK) if answering is not None and answering.startswith(_MARK) else None


class RemotePredictor:
    """Asks a service for predictions. For one event loop.

    Attributes:
        url: of the service.
    """

    def __init__(self, url: str, *, deadline_s: float, places: int) -> None:
        """Connects to nobody yet.

        Args:
            url: of the service.
            deadline_s: seconds that a prediction may take, network included.
            places: connections at the same time.

        Raises:
            ConfigError: an address or a key that cannot be used.
            MissingExtraError: httpx2 is not installed.
        """
        self.url = url
        self._asked = Predictions(url, api_key=api_key(), deadline_s=deadline_s, rest_s=REST_S, max_connections=places)
        self._closing: asyncio.Task[None] | None = None

    async def predict(self, request: Request, *, deadline_s: float) -> Prediction:
        """The prediction for one request, or a fallback whose `source` says what happened. Raises nothing.

        Args:
            request: what is sent: its texts, and what was read of the rest.
            deadline_s: seconds that it may take.
        """
        return await self._asked.predict({AS_READ: request.to_json()}, deadline_s=max(deadline_s, LEAST_S))

    def close(self) -> None:
        """Closes connections soon, if an event loop runs."""
        with suppress(RuntimeError):
            self._closing = asyncio.get_running_loop().create_task(self.aclose())

    async def aclose(self) -> None:
        """Closes connections."""
        await self._asked.close()


class Teacher:
    """Tells a service how long answers were. For one thread, which waits."""

    def __init__(self, url: str) -> None:
        """Connects to nobody yet.

        Args:
            url: of the service.

        Raises:
            ConfigError: a key that cannot be sent.
        """
        parts = urlsplit(base_of(url))
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._url, self._path = url, f"{parts.path}/v1/observe"
        self._headers = {"Content-Type": "application/json"}
        if (key := api_key()) is not None:
            if not key.isascii() or not key.isprintable():
                raise ConfigError(f"{API_KEY}: expected printable ASCII characters")
            self._headers["Authorization"] = f"Bearer {key}"
        self._connection: http.client.HTTPConnection | None = None
        self._key_refused = False

    def observe(self, name: str, tokens: int, *, censored: bool, client: str) -> bool:
        """Tells of one answer.

        Args:
            name: id of the prediction.
            tokens: that were generated.
            censored: the answer was cut.
            client: whose request it was.

        Returns:
            Whether the service learned from it.

        Raises:
            ServerError: nobody took it. `status` is what the service answered: 404 for an id that is forgotten.
        """
        body = {"id": name, "completion_tokens": tokens, "finish_reason": "length" if censored else "stop"}
        body["client"] = readable(client, MAX_CLIENT)
        status, text = self._post(json.dumps(body).encode())
        if status != 200:
            if status in (401, 403) and not self._key_refused:
                self._key_refused = True
                logger.error("mope: %s refuses the API key: it learns nothing from here. Set %s", self._url, API_KEY)
            error = ServerError(f"HTTP {status}")
            error.status = status
            raise error
        try:
            return bool(json.loads(text)["learned"] is True)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ServerError("its answer is no observation") from error

    def _post(self, body: bytes) -> tuple[int, bytes]:
        kept = self._connection is not None
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._connection.request("POST", self._path, body, self._headers)
            answer = self._connection.getresponse()
            text = answer.read(MAX_BYTES)
            if not answer.isclosed():  # more than that
                self.close()
            return answer.status, text
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            if kept and not isinstance(error, TimeoutError):  # a service closes connections that were idle
                return self._post(body)
            raise ServerError(readable(error) or type(error).__name__) from error

    def _connect(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=OBSERVE_S)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(self._host, self._port, timeout=OBSERVE_S, context=context)

    def close(self) -> None:
        """Closes the connection; the next observation opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def teacher(predictor: str, *, recalibrate: bool) -> Teacher | None:
    """What finished requests are told to; None where the predictor is no service, or is not to learn from here.

    Raises:
        ConfigError: a key that cannot be sent.
    """
    return Teacher(predictor) if recalibrate and is_address(predictor) else None
