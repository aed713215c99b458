"""An ASGI middleware that may change what a request says before a server reads it, and nothing else.

Bodies are read whole, as the servers do that lie behind; each message of the client comes to them as it would have
without us, disconnects included. What cannot be read passes on byte by byte. Knows ASGI and JSON; no engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

from mope.errors import UserError
from mope.serving_hooks.carried import PREFIX, without_ours
from mope.serving_hooks.guard import Guard

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CARRIERS = ("vllm_xargs", "extra_args", "custom_params")  # where engines take what is carried with a request


class Post(NamedTuple):
    """A request that is passed on.

    Attributes:
        scope: with its headers.
        body: in place of the one that came; None for that one.
        send: takes the response.
    """

    scope: Scope
    body: bytes | None
    send: Send


class Refused(Exception):
    """A request that is answered with status 400 and goes no further; its message is told to the caller."""


class BodyMiddleware:
    """Reads what is posted and lets a subclass change it.

    Attributes:
        app: what lies behind.
        guard: runs our own code; the engine's exceptions pass as they are.
    """

    def __init__(self, app: App, guard: Guard) -> None:
        self.app, self.guard = app, guard
        self._begun = False
        self._beginning = asyncio.Lock()

    async def begin(self, scope: Scope) -> None:
        """Makes ready, before the first request.

        Raises:
            UserError: what the operator asked for cannot be done; the server does not start.
        """

    def end(self) -> None:
        """Lets go of what `begin` made."""

    def wants(self, scope: Scope) -> bool:
        """Whether the body of a POST has to be read."""
        raise NotImplementedError

    async def change(self, post: Post, body: bytes) -> Post:
        """The request as it is passed on.

        Raises:
            Refused: it is not passed on.
        """
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls an application."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and scope.get("method") == "POST" and self.wants(scope):
            await self._post(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._begin(scope)
        except UserError as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"mope: {error}"})
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.guard.run(self.end, None, "ending")

    async def _begin(self, scope: Scope) -> None:
        async with self._beginning:
            if self._begun:
                return
            try:
                await self.begin(scope)
            except UserError:
                raise
            except Exception as error:
                self.guard.fail(error, "starting")
            finally:
                self._begun = True

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._begun:  # a server that does not tell of its start
            try:
                await self._begin(scope)
            except UserError as error:
                self.guard.fail(error, "starting")
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        post = Post(scope, None, send)
        if messages[-1]["type"] == "http.request":
            try:
                post = await self.change(post, b"".join(message.get("body", b"") for message in messages))
            except Refused as refusal:
                await _refuse(str(refusal), send)
                return
            except Exception as error:
                self.guard.fail(error, "reading a request")
        scope = post.scope
        if post.body is not None:
            messages = [{"type": "http.request", "body": post.body, "more_body": False}]
            scope = _with_length(scope, len(post.body))
        coming = iter(messages)

        async def replay() -> Message:
            message = next(coming, None)
            return message if message is not None else await receive()

        await self.app(scope, replay, post.send)


async def _refuse(message: str, send: Send) -> None:
    body = written({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def with_headers(scope: Scope, drop: bytes, add: bytes | None = None) -> Scope:
    """A scope without a header, or with one value of it."""
    kept = [(name, value) for name, value in scope["headers"] if name.lower() != drop]
    return {**scope, "headers": kept if add is None else [*kept, (drop, add)]}


def _with_length(scope: Scope, length: int) -> Scope:
    """A scope with the length of a changed body, where the client had said one."""
    said = str(length).encode()
    headers = [(name, said if name.lower() == b"content-length" else value) for name, value in scope["headers"]]
    return {**scope, "headers": headers}


def path_of(scope: Scope) -> str:
    """The path below the server's root path, as routes have it."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "").rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def header(scope: Scope, wanted: bytes) -> str:
    """The first value of a header, in lower case; empty without it."""
    for name, value in scope["headers"]:
        if name.lower() == wanted:
            return bytes(value).decode("latin-1").lower()
    return ""


def parsed(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body; None where there is none, which is for the server to say."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def written(body: Mapping[str, Any]) -> bytes:
    """JSON, as servers read it.

    Raises:
        Refused: it is nested as deep as can just be read, and cannot be written any more.
    """
    try:
        return json.dumps(body, separators=(",", ":")).encode("ascii")
    except RecursionError:
        raise Refused("the JSON is nested too deeply") from None


def may_hold(body: bytes, name: str) -> bool:
    """Whether a name could stand in a body of JSON, which may be escaped or in UTF-16. A few ms for 32 MB."""
    return name.encode() in body or b"\\u" in body or b"\0" in body[:4] or body[:2] in (b"\xff\xfe", b"\xfe\xff")


def strip(found: dict[str, Any]) -> bool:
    """Removes what only the front end may say, wherever engines look for it; whether there was any."""
    forged = False
    inside: list[Any] = [found]
    while inside:
        part = inside.pop()
        if isinstance(part, list):
            inside.extend(item for item in part if isinstance(item, dict | list))
            continue
        for key, value in part.items():
            if key in CARRIERS and isinstance(value, dict) and any(name.startswith(PREFIX) for name in value):
                part[key], forged = without_ours(value), True
            elif isinstance(value, dict | list):
                inside.append(value)
    return forged


def without_forged(body: bytes) -> bytes | None:
    """A body without what only the front end may say; None if there is nothing of it, or no JSON."""
    if not may_hold(body, PREFIX) or (found := parsed(body)) is None:
        return None
    return written(found) if strip(found) else None
