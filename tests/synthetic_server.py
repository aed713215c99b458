"""A small OpenAI-compatible server over real HTTP whose steps take exactly as long as it is told.

It batches continuously like an engine: one prompt is taken up per step, beside the decodes of all that run. A word is a
token. It can be told to want a key, to refuse options, not to stream, and to die.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Behaviour:
    """What the server is like; times in seconds."""

    step_fixed_s: float = 3e-3
    step_request_s: float = 0.4e-3
    step_context_s: float = 1e-6
    prefill_fixed_s: float = 5e-3
    prefill_token_s: float = 20e-6
    prefill_square_s: float = 10e-9
    models: tuple[str, ...] = ("toy",)
    api_key: str | None = None
    max_model_len: int | None = 4096
    max_running: int = 64
    refused: tuple[str, ...] = ()  # options that are answered with 400
    streams: bool = True
    usage: bool = True
    stops_at: int | None = None  # tokens of an answer where `ignore_eos` was not asked for
    dies_after: int | None = None  # completions
    metrics: str | None = None
    hiccup_s: float = 0.0  # up to so long, each step takes longer


@dataclass
class _Request:
    prompt_tokens: int
    max_tokens: int
    tokens: asyncio.Queue[int]
    num_out: int = 0
    gone: bool = False

    def hang_up(self) -> None:
        """Nobody waits for its answer any more."""
        self.gone = True
        self.tokens.put_nowait(0)

    async def token(self) -> None:
        """Await its next token."""
        if not await self.tokens.get():
            raise ConnectionResetError


@dataclass
class _Engine:
    """The steps, in a thread of its own; each ends when the sum of all before says so, so that delays don't add up."""

    behaviour: Behaviour
    loop: asyncio.AbstractEventLoop
    waiting: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    work: threading.Event = field(default_factory=threading.Event)
    stopped: bool = False
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def run(self) -> None:
        given = self.behaviour
        now_s = time.perf_counter()
        while not self.stopped:
            self.running = [one for one in self.running if not one.gone and one.num_out < one.max_tokens]
            self.waiting = [one for one in self.waiting if not one.gone]
            if not self.waiting and not self.running:
                self.work.clear()
                if not self.waiting and not self.stopped:
                    self.work.wait()
                now_s = time.perf_counter()
                continue
            context = sum(one.prompt_tokens + one.num_out for one in self.running)
            now_s += given.step_request_s * len(self.running) + given.step_context_s * context
            if self.waiting and len(self.running) < given.max_running:
                new = self.waiting.pop(0)
                now_s += given.prefill_fixed_s + given.prefill_token_s * new.prompt_tokens
                now_s += given.prefill_square_s * new.prompt_tokens**2
                self.running.append(new)
            else:
                now_s += given.step_fixed_s
            now_s += given.hiccup_s * self.random.random()
            time.sleep(max(now_s - time.perf_counter(), 0.0))
            for one in self.running:
                one.num_out += 1
                self.loop.call_soon_threadsafe(one.tokens.put_nowait, one.num_out)


class _Http:
    """Just enough HTTP/1.1: one request per connection."""

    def __init__(self, behaviour: Behaviour, engine: _Engine) -> None:
        self.behaviour = behaviour
        self.engine = engine
        self.num_completions = 0
        self.bodies: list[dict[str, Any]] = []
        self.writers: set[asyncio.StreamWriter] = set()
        self.dead = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split("\r\n")[0].split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n"))}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if self.behaviour.api_key and headers.get("authorization") != f"Bearer {self.behaviour.api_key}":
                await self._json(writer, 401, {"error": "Unauthorized"})
            elif (method, path) == ("GET", "/v1/models"):
                listed = [
                    {"id": name, "owned_by": "synthetic", "max_model_len": self.behaviour.max_model_len}
                    for name in self.behaviour.models
                ]
                await self._json(writer, 200, {"object": "list", "data": listed})
            elif (method, path) == ("GET", "/version"):
                await self._json(writer, 200, {"version": "1.2.3"})
            elif (method, path) == ("GET", "/metrics") and self.behaviour.metrics:
                await self._send(writer, 200, "text/plain", self.behaviour.metrics.encode())
            elif (method, path) == ("POST", "/v1/completions"):
                await self._complete(reader, writer, json.loads(body))
            else:
                await self._json(writer, 404, {"detail": "Not Found"})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _complete(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        given = self.behaviour
        self.bodies.append(body)
        self.num_completions += 1
        if given.dies_after is not None and self.num_completions > given.dies_after:
            self.dead.set()
            raise ConnectionResetError
        for option in given.refused:
            if option in body:
                return await self._json(writer, 400, {"error": {"message": f"unknown option {option}"}})
        prompt_tokens, num_tokens = len(body["prompt"].split()), body["max_tokens"]
        if given.max_model_len and prompt_tokens + num_tokens > given.max_model_len:
            return await self._json(writer, 400, {"error": {"message": "maximum context length"}})
        if given.stops_at and not body.get("ignore_eos"):
            num_tokens = min(num_tokens, given.stops_at)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
        request = _Request(prompt_tokens, num_tokens, asyncio.Queue())
        self.engine.waiting.append(request)
        self.engine.work.set()
        hung_up = asyncio.ensure_future(reader.read())
        hung_up.add_done_callback(lambda _: request.hang_up())
        try:
            if not (given.streams and body.get("stream")):
                for _ in range(num_tokens):
                    await request.token()
                answer = {"choices": [{"text": " 7" * num_tokens}], **({"usage": usage} if given.usage else {})}
                return await self._json(writer, 200, answer)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            for _ in range(num_tokens):
                await request.token()
                writer.write(b'data: {"choices": [{"text": " 7"}]}\n\n')
                await writer.drain()
            if given.usage and body.get("stream_options", {}).get("include_usage"):
                writer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
        finally:
            request.gone = True
            hung_up.cancel()

    async def _json(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        await self._send(writer, status, "application/json", json.dumps(content).encode())

    async def _send(self, writer: asyncio.StreamWriter, status: int, kind: str, content: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close"
        writer.write(head.encode() + b"\r\n\r\n" + content)
        await writer.drain()


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: its address.
        bodies: completions that were asked for, in order.
    """

    url: str
    bodies: list[dict[str, Any]]


@contextmanager
def serving(behaviour: Behaviour | None = None) -> Iterator[Running]:
    """A server on a free port of this machine, for as long as the block lasts."""
    ready: threading.Event = threading.Event()
    made: dict[str, Any] = {}

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        engine = _Engine(behaviour or Behaviour(), loop)
        http = _Http(behaviour or Behaviour(), engine)
        thread = threading.Thread(target=engine.run, daemon=True)
        thread.start()
        server = await asyncio.start_server(http, "127.0.0.1", 0)
        made.update(port=server.sockets[0].getsockname()[1], bodies=http.bodies, loop=loop, dead=http.dead)
        ready.set()
        await http.dead.wait()
        server.close()
        for writer in list(http.writers):
            writer.transport.abort()
        engine.stopped = True
        engine.work.set()
        thread.join()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield Running(f"http://127.0.0.1:{made['port']}", made["bodies"])
    finally:
        if thread.is_alive():
            made["loop"].call_soon_threadsafe(made["dead"].set)
        thread.join()
