"""An ASGI filter in front of llm-d, Dynamo or AIBrix: tells them who sent a request, and how long its answer will be.

    app = HintsMiddleware(app)

The client goes into a header and the predicted length into `nvext.agent_hints.osl`. A `mope serve` predicts; where it
does not answer in time, a request passes without a length. Knows names of headers and fields, with their sources in
README.md here; not what the stacks do with them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from asyncio import get_running_loop
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from mope.client import Prediction, Predictions
from mope.config import Frozen
from mope.errors import ConfigError, UserError
from mope.fairness.clients import ANONYMOUS, client_path
from mope.serving_hooks import secret
from mope.serving_hooks.asgi import App, BodyMiddleware, Post, Receive, Scope, Send, path_of, with_headers
from mope.serving_hooks.bodies import readable
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.options import HookOptions

FAIRNESS_ID = (b"x-llm-d-inference-fairness-id", b"x-gateway-inference-fairness-id")  # and its name before llm-d 0.9
AIBRIX_USER = b"user"
OSL = ("nvext", "agent_hints", "osl")
MAX_CHANGED = 8 * 2**20  # bytes of a body that is changed, some 20 ms; a larger one passes
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")  # ends of paths
VARIABLES = {
    "stacks": "MOPE_HINTS",
    "client_header": "MOPE_CLIENT_HEADER",
    "client_keys": "MOPE_CLIENT_KEYS",
    "secret": "MOPE_SECRET",
    "length": "MOPE_OSL",
    "url": "MOPE_URL",
    "api_key": "MOPE_API_KEY",
    "deadline_ms": "MOPE_DEADLINE_MS",
}
_VISIBLE = "".join(map(chr, range(33, 127))).replace("%", "")  # what a header may hold; the rest is percent-encoded
_BLANKS = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

Stack = Literal["llm-d", "dynamo", "aibrix"]
Length = Literal["mean", "median"] | Annotated[float, Field(gt=0, lt=1)]

logger = logging.getLogger("mope")


class HintsConfig(Frozen):
    """What is added, for which stacks. One field is one environment variable, see `VARIABLES`."""

    stacks: tuple[Stack, ...] = Field(
        min_length=1, description="what stands behind, separated by commas: `llm-d`, `dynamo`, `aibrix`"
    )
    client_header: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="header that names the client, which a gateway in front sets and callers cannot; `authorization` "
        "where a gateway checks API keys: clients are then named by a hash of their key",
    )
    client_keys: Path | None = Field(
        None,
        description='JSON file of clients by API key, `{"KEY or sha256:HEX": "client"}`; read again when it changes',
    )
    secret: str | None = Field(
        None,
        pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$",
        description="16 characters or more that hashes of keys are made with; the same on all replicas",
    )
    length: Length = Field("mean", description="which length is told: `mean`, `median`, or a level such as `0.9`")
    url: str = Field("http://127.0.0.1:8400", description="address of the service")
    api_key: str | None = Field(None, repr=False, description="API key of the service")
    deadline_ms: float = Field(100, gt=0, le=60_000, description="milliseconds that a request may wait for the service")

    @model_validator(mode="after")
    def _names_clients(self) -> Self:
        of_keys = self.client_header is None or self.client_header.lower() == "authorization"
        if self.client_keys is not None and not of_keys:
            raise ValueError(
                f"MOPE_CLIENT_KEYS names clients by their API keys, MOPE_CLIENT_HEADER={self.client_header} by that "
                "header; leave out one of them"
            )
        if self.names_clients and self.client_header is None and self.client_keys is None:
            raise ValueError(
                f"{' and '.join(self.stacks)}: nothing says who a client is; give MOPE_CLIENT_KEYS=FILE, or "
                "MOPE_CLIENT_HEADER=NAME of a header that a gateway in front sets"
            )
        return self

    @property
    def names_clients(self) -> bool:
        """Whether a stack is told the client."""
        return "llm-d" in self.stacks or "aibrix" in self.stacks

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> HintsConfig:
        """Of the variables in `VARIABLES`.

        Raises:
            ConfigError: one of them is missing or cannot be used.
        """
        given: dict[str, Any] = {name: environment[key] for name, key in VARIABLES.items() if environment.get(key)}
        given["stacks"] = tuple(name.strip() for name in given.get("stacks", "").split(",") if name.strip())
        if "secret" in given:
            given["secret"] = f"env:{VARIABLES['secret']}"  # read where it is used
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            if not first["loc"]:
                raise ConfigError(said) from None
            name = str(first["loc"][0])
            if name == "stacks":
                said = "expected one or more of llm-d, dynamo, aibrix, separated by commas"
            elif name == "length":
                said = "expected mean, median, or a level between 0 and 1 such as 0.9"
            key = VARIABLES[name]
            raise ConfigError(f"{key}: got {environment.get(key, '')[:80]!r}; {said}") from None

    def identity(self) -> Identity:
        """Says who sent a request.

        Raises:
            ConfigError: a file of keys or a secret that cannot be used.
        """
        options = HookOptions(
            identity="api-key" if self.client_header is None else "header",
            client_header=self.client_header or "authorization",
            api_keys=self.client_keys,
            secret=self.secret,
        )
        return Identity(options, secret=secret.load(options), logger=logger)


class HintsMiddleware(BodyMiddleware):
    """See the module. Never answers a request, and never lets one wait longer than the deadline of the service.

    What callers write into the headers that name clients is replaced, on all paths. An `osl` of their own stays. All
    other bytes of a body stay as they came.

    Args:
        app: what lies behind: a reverse proxy, or a server itself.
        config: what is added; from the environment if None.
    """

    def __init__(self, app: App, config: HintsConfig | None = None) -> None:
        super().__init__(app, Guard(logger))
        self._config = config
        self._identity: Identity | None = None
        self._asked: Predictions | None = None

    async def begin(self, scope: Scope) -> None:
        """Reads the settings.

        Raises:
            UserError: settings that cannot be used, or httpx2 is not installed.
        """
        config = self._config or HintsConfig.from_environment()
        if config.names_clients:
            self._identity = config.identity()
        if "dynamo" in config.stacks:
            self._asked = _predictions(config)
        self._config = config
        who = f"clients by {self._identity}" if self._identity is not None else "no clients"
        lengths = f"lengths by {config.url}" if self._asked is not None else "no lengths"
        logger.info("mope: hints for %s: %s, %s", ", ".join(config.stacks), who, lengths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls an application."""
        if scope["type"] in ("http", "websocket"):
            if not self._begun:  # a server that does not tell of its start
                try:
                    await self._begin(scope)
                except UserError as error:
                    self.guard.fail(error, "starting")
            if self._identity is not None and self._config is not None:
                scope = self._with_client(scope, self._identity, self._config.stacks)
        try:
            await super().__call__(scope, receive, send)
        finally:
            if scope["type"] == "lifespan" and self._asked is not None:
                await self._asked.close()
                self._asked = None  # made anew, should a server go on without a lifespan

    def _with_client(self, scope: Scope, identity: Identity, stacks: Sequence[Stack]) -> Scope:
        """A request under the name of its client, whatever it came under."""
        name = None
        try:
            if identity.due():
                get_running_loop().run_in_executor(None, identity.refresh)
            if client := identity.client(scope["headers"], {}):
                name = "/".join(client_path(quote(client, safe=_VISIBLE, errors="replace"))).encode("ascii")
        except Exception as error:
            self.guard.spoil(error, "finding a client")
        if "llm-d" in stacks:
            # without a name llm-d may take one from headers that callers choose, such as `session-id`
            for header in FAIRNESS_ID:
                scope = with_headers(scope, header, name or ANONYMOUS[0].encode("ascii"))
        if "aibrix" in stacks:  # which refuses names that it does not know
            scope = with_headers(scope, AIBRIX_USER, name)
        return scope

    def wants(self, scope: Scope) -> bool:
        """What generates text, where its length is told."""
        return (
            self.guard.ok
            and self._config is not None
            and "dynamo" in self._config.stacks
            and path_of(scope).endswith(GENERATING)
        )

    async def change(self, post: Post, body: bytes) -> Post:
        """With the predicted length, where there is one."""
        short = readable(body) if len(body) <= MAX_CHANGED else None
        if short is None or self._config is None:
            return post
        try:
            found, text = json.loads(short), body.decode()
            around = around_member(text, OSL) if isinstance(found, dict) else None
        except (ValueError, RecursionError):  # which is for the server to say
            return post
        if around is None:
            return post
        if self._asked is None:
            self._asked = _predictions(self._config)
        prediction = await self._asked.predict(found)
        self.guard.good()
        if not prediction.made:
            return post
        return post._replace(body=f"{around[0]}{predicted_tokens(prediction, self._config.length)}{around[1]}".encode())

    async def change_unread(self, post: Post) -> Post:
        """A body that is too large to be read passes as it is."""
        return post


def predicted_tokens(prediction: Prediction, length: Length = "mean") -> int:
    """The length that is told, in response tokens, at least 1.

    Args:
        prediction: of a request.
        length: `mean`, `median` or a level between 0 and 1.
    """
    if length == "mean":
        tokens = prediction.mean
    else:
        tokens = prediction.median if length == "median" else prediction.quantile(length)
    return max(1, round(tokens))


def latency_request(
    prediction: Prediction,
    *,
    prompt_tokens: int,
    kv_cache: float,
    waiting: int,
    running: int,
    prefix_cache: float = 0.0,
    length: Length = "mean",
) -> dict[str, float]:
    """What llm-d's latency predictor is asked with, at `/predict`: a pod's state, and the predicted length.

    It answers `ttft_ms` and `tpot_ms`, the latter for a token after `num_tokens_generated` of them. An answer of that
    many tokens then takes about `ttft_ms + tpot_ms * (num_tokens_generated - 1)` milliseconds. Source:
    `PredictionRequest` in llm-d/llm-d-latency-predictor@147d369:src/llm_d_latency_predictor/prediction_server.py.

    Args:
        prediction: of the request.
        prompt_tokens: tokens of its prompt.
        kv_cache: share of the pod's KV cache that is in use, 0 to 1.
        waiting: requests that wait at the pod.
        running: requests that run at the pod.
        prefix_cache: share of the prompt that the pod's prefix cache holds, 0 to 1.
        length: see `predicted_tokens`.
    """
    return {
        "kv_cache_percentage": kv_cache,
        "input_token_length": prompt_tokens,
        "num_request_waiting": waiting,
        "num_request_running": running,
        "num_tokens_generated": predicted_tokens(prediction, length),
        "prefix_cache_score": prefix_cache,
    }


def around_member(text: str, names: Sequence[str]) -> tuple[str, str] | None:
    """What stands before and after a value that is put into a JSON object; nothing else of the text changes.

    Args:
        text: a JSON object.
        names: of members, from the outermost inwards. Objects that are missing or null are made.

    Returns:
        The texts before and after the value; None if the member is there already, or its place is taken by something
        else or is there twice.

    Raises:
        ValueError: no JSON object.
    """
    start = _skip(text, 0)
    while True:
        members, end = _members(text, start)
        places = [(begin, stop) for name, begin, stop in members if name == names[0]]
        if not places:
            opened = "".join(f'"{name}":{{' for name in names[:-1]) + f'"{names[-1]}":'
            closed = "}" * (len(names) - 1)
            return f"{text[:end]}{',' if members else ''}{opened}", f"{closed}{text[end:]}"
        (start, stop), *others = places
        names = names[1:]
        if others:
            return None
        if text[start:stop] == "null":
            opened = "".join(f'{{"{name}":' for name in names)
            return f"{text[:start]}{opened}", f"{'}' * len(names)}{text[stop:]}"
        if not names or text[start] != "{":
            return None


def _members(text: str, start: int) -> tuple[list[tuple[str, int, int]], int]:
    """The members of an object: names, and where their values begin and end; and where its last brace is.

    Raises:
        ValueError: no JSON object begins at `start`.
    """
    members: list[tuple[str, int, int]] = []
    at = _behind(text, start, "{")
    while members or text[at : at + 1] != "}":
        name, at = _DECODER.raw_decode(text, at)
        if not isinstance(name, str):
            raise ValueError(f"expected a name; got {type(name).__name__}")
        begin = _behind(text, _skip(text, at), ":")
        stop = _DECODER.raw_decode(text, begin)[1]
        members.append((name, begin, stop))
        at = _skip(text, stop)
        if text[at : at + 1] == "}":
            break
        at = _behind(text, at, ",")
    return members, at


def _behind(text: str, at: int, sign: str) -> int:
    """Where the next thing begins behind a sign and blanks."""
    if text[at : at + 1] != sign:
        raise ValueError(f"expected {sign} at {at}")
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at


def _predictions(config: HintsConfig) -> Predictions:
    return Predictions(config.url, api_key=config.api_key, deadline_s=config.deadline_ms / 1000)
