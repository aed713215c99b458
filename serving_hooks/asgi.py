"""An ASGI middleware that may change what a request says before a server reads it, and nothing else.

A body is read whole up to a limit; of a larger one, what is added goes before its last brace while it streams through.
Each message of the client comes to the server as it would have without us, disconnects included. What cannot be read
passes on byte by byte. Knows ASGI and JSON; no engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

from mope.errors import UserError
from mope.serving_hooks.guard import Guard

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_READ = 32 * 2**20  # bytes of a body that are kept; more are let through
_TOO_DEEP = "the JSON is nested too deeply"
_BLANKS = b" \t\r\n"  # of JSON


class Post(NamedTuple):
    """A request that is passed on.

    Attributes:
        scope: with its headers.
        send: takes the response.
        body: in place of the one that came; None for that one.
        more: JSON that is put before the last brace of the body that came, beginning with a comma. Where a name stands
            twice in an object, the last one counts.
    """

    scope: Scope
    send: Send
    body: bytes | None = None
    more: bytes = b""


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
        """Whether the body of a POST has to be read. Others pass untouched."""
        raise NotImplementedError

    async def change(self, post: Post, body: bytes) -> Post:
        """The request as it is passed on.

        Raises:
            Refused: it is not passed on.
        """
        raise NotImplementedError

    async def change_unread(self, post: Post) -> Post:
        """A request whose body is larger than `MAX_READ`, as it is passed on: with more, but with no other body.

        Raises:
            Refused: it is not passed on.
        """
        raise NotImplementedError

    def reads(self, scope: Scope) -> bool:
        """Whether bodies are kept and read up to `MAX_READ`; else each counts as larger."""
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls an application."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] == "http" and scope.get("method") == "POST":
            if not self._begun:  # a server that does not tell of its start
                try:
                    await self._begin(scope)
                except UserError as error:
                    self.guard.fail(error, "starting")
            if self.wants(scope):
                await self._post(scope, receive, send)
                return
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
        limit = MAX_READ if self.reads(scope) else 3  # the encoding shows in four bytes
        messages, size = [await receive()], 0
        while messages[-1]["type"] == "http.request":
            size += len(messages[-1].get("body", b""))
            if not messages[-1].get("more_body") or size > limit:
                break
            messages.append(await receive())
        post = Post(scope, send)
        if messages[-1]["type"] == "http.request":
            try:
                post = await self._changed(post, messages, whole=size <= limit)
            except Refused as refusal:
                await _refuse(str(refusal), send)
                return
            except Exception as error:
                self.guard.spoil(error, "reading a request")
        scope = post.scope
        if post.body is not None:
            messages = [{"type": "http.request", "body": post.body, "more_body": False}]
            scope = _with_length(scope, lambda _: len(post.body or b""))
        elif post.more:
            scope = _with_length(scope, lambda said: said + len(post.more))
            await self.app(scope, _Adding(messages, receive, post.more), post.send)
            return
        coming = iter(messages)

        async def replay() -> Message:
            message = next(coming, None)
            return message if message is not None else await receive()

        await self.app(scope, replay, post.send)

    async def _changed(self, post: Post, messages: list[Message], *, whole: bool) -> Post:
        body = b"".join(message.get("body", b"") for message in messages)
        post = await self.change(post, body) if whole else await self.change_unread(post)
        if post.more and body and json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
            raise Refused("JSON of this size has to be in UTF-8")
        return post


class _Adding:
    """Passes a body on chunk by chunk, with more before its last brace."""

    def __init__(self, messages: Iterable[Message], receive: Receive, more: bytes) -> None:
        self._coming, self._receive, self._more = iter(messages), receive, more
        self._held: list[bytes] = []  # a brace that may be the last one, and blanks behind it

    async def __call__(self) -> Message:
        """The next message."""
        message = next(self._coming, None)
        if message is None:
            message = await self._receive()
        if message["type"] != "http.request" or not self._more:
            return message
        body = message.get("body", b"")
        if kept := body.rstrip(_BLANKS):  # the brace before it was not the last one
            body = b"".join((*self._held, body))
            kept = b"".join((*self._held, kept))
            self._held.clear()
            if kept.endswith(b"}"):
                self._held.append(body[len(kept) - 1 :])
                body = kept[:-1]
        elif self._held:
            self._held.append(body)
            body = b""
        if not message.get("more_body"):
            body = b"".join((body, self._more if self._held else b"", *self._held))
            self._more = b""
        return {**message, "body": body}


async def _refuse(message: str, send: Send) -> None:
    body = written({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def with_headers(scope: Scope, drop: bytes, add: bytes | None = None) -> Scope:
    """A scope without a header, or with one value of it."""
    kept = [(name, value) for name, value in scope["headers"] if name.lower() != drop]
    return {**scope, "headers": kept if add is None else [*kept, (drop, add)]}


def _with_length(scope: Scope, length: Callable[[int], int]) -> Scope:
    """A scope with the length of a changed body, where the client had said one."""
    headers = [
        (name, str(length(int(value))).encode() if name.lower() == b"content-length" and value.isdigit() else value)
        for name, value in scope["headers"]
    ]
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
    """The JSON object in a body; None where there is none, which is for the server to say.

    Raises:
        Refused: it is nested so deep that it cannot be read here, while it perhaps can behind.
    """
    try:
        found = json.loads(body)
    except ValueError:
        return None
    except RecursionError:
        raise Refused(_TOO_DEEP) from None
    return found if isinstance(found, dict) else None


def written(body: Mapping[str, Any]) -> bytes:
    """JSON, as servers read it.

    Raises:
        Refused: it is nested as deep as can just be read, and cannot be written any more.
    """
    try:
        return json.dumps(body, separators=(",", ":")).encode("ascii")
    except RecursionError:
        raise Refused(_TOO_DEEP) from None
