"""An OpenAI-compatible server, asked for streamed completions whose pieces are timed as they arrive.

Knows the protocol: /v1/models, /v1/completions as server-sent events, usage, and options that some servers refuse. Does
not know what is measured with it. Pieces are read now and understood later, so that reading costs no time.

Servers are not trusted: no more is read than the limits below, no redirect is followed, and what is no answer is a
`ServerError`.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from mope.errors import ServerError
from mope.extras import require

UNENDING = "Count upwards without end: 1 2 3 4 5 6"  # for servers that can't be told to ignore the end
WISHES: tuple[dict[str, Any], ...] = (  # what a server may refuse, most wanted first
    {"stream_options": {"include_usage": True}, "ignore_eos": True, "min_tokens": None},
    {"stream_options": {"include_usage": True}, "ignore_eos": True},
    {"ignore_eos": True},
    {"stream_options": {"include_usage": True}},
    {},
)
KEEP_ALIVE_S = 2.0  # common servers close a connection that was idle for 5 s
REFUSED = (400, 422)
MAX_REPLY = 16_000_000  # bytes of an answer in one piece
MAX_LINE = 65_536  # bytes of an event
MAX_STREAM = (2**20, 4096)  # bytes of a stream: so many, and for each token that was asked for
MAX_PIECES = (1000, 16)  # pieces of a stream, likewise
MAX_COUNT = 10**12  # that a number of tokens may be
_SHOWN = 20  # LLMs that an error lists


@dataclass
class Stream:
    """One answer while it arrives, and after.

    Attributes:
        sent_s: when the request was sent, by `time.perf_counter`.
        pieces: bytes with the time of their arrival.
    """

    sent_s: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def events(self) -> tuple[list[float], dict[str, Any] | None]:
        """Arrival of each event that brought tokens, and the usage if it was sent.

        Raises:
            ServerError: the server sent an error, or what are no server-sent events of completions.
        """
        arrivals: list[float] = []
        usage = None
        rest = b""
        for arrived_s, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                if len(line) > MAX_LINE:
                    raise ServerError(f"the server sent an event of more than {MAX_LINE:,} bytes")
                event = _object(line[5:].decode(errors="replace"))
                if event is None:
                    raise ServerError(f"the server sent an event that is no JSON object: {_short(repr(line[:80]))}")
                if "error" in event:
                    raise ServerError(f"the server broke off: {_short(event['error'])}")
                if event.get("choices"):
                    arrivals.append(arrived_s)
                told = event.get("usage")
                if told is not None and not isinstance(told, dict):
                    raise ServerError(f"the server sent a usage that is no object: {_short(told)}")
                usage = told or usage
            if len(rest) > MAX_LINE:
                raise ServerError(f"the server sent a line of more than {MAX_LINE:,} bytes")
        return arrivals, usage


@dataclass(frozen=True)
class StreamedAnswer:
    """One answer that has arrived.

    Attributes:
        prompt_tokens: as the server counted them, or estimated where it does not.
        response_tokens: likewise.
        sent_s: when the request was sent, in seconds of `time.perf_counter`.
        arrivals_s: when each piece of the answer arrived, in order.
    """

    prompt_tokens: int
    response_tokens: int
    sent_s: float
    arrivals_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def latency_s(self) -> float:
        """Seconds to the last token."""
        return self.arrivals_s[-1] - self.sent_s


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself.

    Attributes:
        llm: name of the LLM that is asked.
        software: engine and version, as far as known.
        max_model_len: tokens of prompt and answer together at most; None if not said.
        capacity_tokens: tokens that the KV cache holds; None if not said.
    """

    llm: str
    software: str
    max_model_len: int | None
    capacity_tokens: int | None


class Server:
    """A server that is asked; made by `connected`, and ready once `get_ready` was awaited.

    Args:
        http: the HTTP client, its base address set.
        facts: what the server says of itself.
        seed: of the random numbers that prompts are made of.
    """

    def __init__(self, http: Any, facts: ServerFacts, seed: int) -> None:
        self.facts = facts
        self.notes: list[str] = []
        self._http = http
        self._random = random.Random(seed)
        self._wishes: dict[str, Any] = WISHES[-1]
        self._overhead_tokens = 0.0
        self._tokens_per_word = 1.0
        self.ends_early = False

    def prompt(self, num_tokens: int) -> str:
        """A prompt of about so many tokens that begins like no other, so that no prefix of it is cached."""
        num_words = max(1, round((num_tokens - self._overhead_tokens) / self._tokens_per_word))
        return " ".join([*(str(self._random.randrange(1000, 10_000)) for _ in range(num_words)), UNENDING])

    async def stream(self, prompt: str, max_tokens: int, stream: Stream) -> None:
        """Ask for a completion and note when its pieces arrive.

        Args:
            prompt: the prompt.
            max_tokens: tokens of the answer; fewer only where the server can't be told to ignore the end.
            stream: gets the pieces, also those that came before a cancellation.

        Raises:
            ServerError: the server can't be reached, refuses, or does not stream.
        """
        body = self._body(prompt, max_tokens, self._wishes) | {"stream": True}
        most_bytes, most_pieces = (few + each * max_tokens for few, each in (MAX_STREAM, MAX_PIECES))
        num_bytes = 0
        with _explained():
            stream.sent_s = time.perf_counter()
            async with self._http.stream("POST", "completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await _text(response))
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise ServerError(
                        'the server answers in one piece though "stream" was asked for, so that no token can be '
                        "timed; expected text/event-stream. Turn its streaming on, or ask it without a proxy that "
                        "collects answers"
                    )
                _check_plain(response)
                async for piece in response.aiter_raw():
                    stream.pieces.append((time.perf_counter(), piece))
                    num_bytes += len(piece)
                    if num_bytes > most_bytes or len(stream.pieces) > most_pieces:
                        raise ServerError(
                            f"the server sent more than {most_bytes:,} bytes or {most_pieces:,} pieces though "
                            f"{max_tokens} tokens were asked for"
                        )

    async def answer(self, prompt: str, max_tokens: int) -> StreamedAnswer:
        """Ask for a completion and await it.

        Raises:
            ServerError: as `stream`, or the answer is empty.
        """
        stream = Stream()
        await self.stream(prompt, max_tokens, stream)
        return self.understood(stream, prompt)

    def understood(self, stream: Stream, prompt: str) -> StreamedAnswer:
        """What arrived, understood; where the server sends no usage, a piece counts as a token.

        Raises:
            ServerError: nothing arrived, or not what was asked for.
        """
        arrivals, usage = stream.events()
        if not arrivals:
            raise ServerError("the server sent an empty answer; expected a token at least")
        usage = usage or {}
        num_words = prompt.count(" ") + 1 - UNENDING.count(" ") - 1
        return StreamedAnswer(
            _counted(usage, "prompt_tokens") or round(self._overhead_tokens + self._tokens_per_word * num_words),
            _counted(usage, "completion_tokens") or len(arrivals),
            stream.sent_s,
            tuple(arrivals),
        )

    async def get_ready(self) -> None:
        """Find out what the server takes, and how many tokens a number has.

        Raises:
            ServerError: it takes no completions, streams none or counts no tokens.
        """
        for wishes in WISHES:
            self._wishes = wishes
            try:
                first = await self.answer(self.prompt(20), 8)
                break
            except ServerError as error:
                if error.status not in REFUSED or not wishes:
                    raise
        self.ends_early = "ignore_eos" not in wishes or first.response_tokens < 8
        if self.ends_early:
            self.notes.append("the server can't be told to ignore the end, so that answers may be shorter than asked")
        if "stream_options" not in wishes:
            self.notes.append("the server sends no usage with streams: tokens of prompts are estimated")
        few, many = 10, max(11, min(210, (self.facts.max_model_len or 10**6) // 10))
        counted_few, counted_many = await self._counted(few), await self._counted(many)
        self._tokens_per_word = max((counted_many - counted_few) / (many - few), 0.1)
        self._overhead_tokens = max(counted_few - few * self._tokens_per_word, 0.0)

    async def _counted(self, num_words: int) -> int:
        """Prompt tokens that the server counts in a prompt of so many words."""
        self._tokens_per_word, self._overhead_tokens = 1.0, 0.0
        body = self._body(self.prompt(num_words), 1, {})
        status, text = await _asked(self._http, "POST", "completions", json=body)
        if status != 200:
            raise _refusal(status, text)
        usage = _answered(text, "/v1/completions").get("usage")
        counted = _counted(usage, "prompt_tokens") if isinstance(usage, dict) else 0
        if not counted:
            raise ServerError("the server's answers say no usage.prompt_tokens, and a profile needs to know them")
        return counted

    def _body(self, prompt: str, max_tokens: int, wishes: Mapping[str, Any]) -> dict[str, Any]:
        wanted = {name: max_tokens if value is None else value for name, value in wishes.items()}
        return {"model": self.facts.llm, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **wanted}


@asynccontextmanager
async def connected(
    url: str, *, model: str | None, api_key: str | None, timeout_s: float, seed: int
) -> AsyncIterator[Server]:
    """A server that was found to answer, and that serves the LLM; `Server.get_ready` comes next.

    Args:
        url: its address, with or without /v1.
        model: name of the LLM; the only one that it serves if None.
        api_key: what it wants as a bearer token, if anything.
        timeout_s: seconds without a byte after which it is given up.
        seed: of the random numbers that prompts are made of.

    Raises:
        ServerError: nobody answers, the key is wrong, or there is no such LLM.
    """
    httpx = require("httpx2", "mope profile")
    root = url.rstrip("/").removesuffix("/v1")
    if not re.match(r"https?://[^/]", root):
        raise ServerError(f"--url: got {url!r}; expected an address such as http://127.0.0.1:8000")
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S)
    async with httpx.AsyncClient(
        base_url=f"{root}/v1/",
        headers=headers,
        limits=limits,
        timeout=httpx.Timeout(timeout_s),
        follow_redirects=False,  # a key is for the address that was given
    ) as http:
        yield Server(http, await _facts(http, root, model), seed)


async def _facts(http: Any, root: str, model: str | None) -> ServerFacts:
    try:
        status, text = await _asked(http, "GET", "models")
    except ServerError as error:
        raise ServerError(f"no LLM server answers at {root} ({error}); start it, or check --url") from error
    if status != 200:
        raise _refusal(status, text, root)
    listed = _answered(text, "/v1/models").get("data")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    models = {name: entry for entry in entries if (name := str(entry.get("id"))) and name == _short(name)}
    if not models:
        raise ServerError(f"{root}/v1/models lists no LLM; expected an OpenAI-compatible server")
    names = list(models)[:_SHOWN]
    if model is None and len(models) > 1:
        raise ServerError(f"{root} serves {len(models)} LLMs; say which: --model {' | '.join(names)}")
    llm = model or next(iter(models))
    if llm not in models:
        near = difflib.get_close_matches(llm, models, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ServerError(f"--model: {root} serves no {llm!r}; {meant}it serves {', '.join(names)}")
    owner = _short(models[llm].get("owned_by") or "unknown software")
    version = await _optional(http, f"{root}/version")
    found = re.search(r'"version"\s*:\s*"([^"]{1,40})"', version or "")
    metrics = await _optional(http, f"{root}/metrics")
    return ServerFacts(
        llm=llm,
        software=f"{owner} {_short(found[1])}" if found else owner,
        max_model_len=_number(models[llm].get("max_model_len")),
        capacity_tokens=capacity_tokens(metrics or ""),
    )


def capacity_tokens(metrics: str) -> int | None:
    """Tokens that the KV cache holds, as vLLM's and SGLang's Prometheus metrics say; None if they do not."""
    config = re.search(r"^vllm:cache_config_info\{(.{0,10000})\}", metrics, flags=re.MULTILINE)
    if config:
        labels = dict(re.findall(r'\b(\w+)="([^"]*)"', config[1]))
        sizes = [_number(labels.get(name)) for name in ("block_size", "num_gpu_blocks")]
        if sizes[0] and sizes[1]:
            return sizes[0] * sizes[1]
    total = re.search(r"^sglang:max_total_num_tokens(?:\{.*\})? ([0-9.e+]{1,40})", metrics, flags=re.MULTILINE)
    return _number(total[1]) if total else None


async def _optional(http: Any, address: str) -> str | None:
    """What a server says at an address that not every server has."""
    try:
        status, text = await _asked(http, "GET", address)
    except ServerError:
        return None
    return text if status == 200 else None


async def _asked(http: Any, method: str, address: str, **options: Any) -> tuple[int, str]:
    """Status and text of an answer in one piece, which has to be here within the client's timeout as a whole."""

    async def whole() -> tuple[int, str]:
        with _explained():
            async with http.stream(method, address, **options) as response:
                return response.status_code, await _text(response)

    try:
        return await asyncio.wait_for(whole(), http.timeout.read)
    except asyncio.TimeoutError as error:
        raise ServerError("it took longer than --timeout-s to answer") from error


async def _text(response: Any) -> str:
    """The text of an answer.

    Raises:
        ServerError: it is longer than `MAX_REPLY`, or compressed.
    """
    _check_plain(response)
    pieces, num_bytes = [], 0
    async for piece in response.aiter_raw():
        pieces.append(piece)
        num_bytes += len(piece)
        if num_bytes > MAX_REPLY:
            raise ServerError(f"it answers with more than {MAX_REPLY:,} bytes")
    return b"".join(pieces).decode(errors="replace")


def _check_plain(response: Any) -> None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ServerError(f"it answers in the encoding {_short(encoding)} though none was asked for; ask it directly")


def _number(value: Any) -> int | None:
    """A positive whole number, or None where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if 1 <= number <= MAX_COUNT else None


def _counted(usage: Mapping[str, Any], name: str) -> int:
    """A count of a usage; 0 where there is none.

    Raises:
        ServerError: it is no count.
    """
    value = usage.get(name)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ServerError(f"the server counts {_short(value)} as usage.{name}; expected a whole number of tokens")
    return value


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _answered(text: str, path: str) -> dict[str, Any]:
    content = _object(text)
    if content is None:
        raise ServerError(f"{path} answers with what is no JSON object; expected an OpenAI-compatible server")
    return content


def _refusal(status: int, text: str, root: str = "") -> ServerError:
    """What an HTTP status other than 200 means, and what to type."""
    said = f" ({_short(text)})" if text.strip() else ""
    if status in (401, 403):
        error = ServerError(f"the server wants another key (HTTP {status}); give the right one with --api-key")
    elif status == 404:
        error = ServerError(
            f"the server has no {root + '/v1/models' if root else '/v1/completions for this LLM'} (HTTP 404){said}; "
            "expected an OpenAI-compatible server"
        )
    elif 300 <= status < 400:
        error = ServerError(
            f"the server leads elsewhere (HTTP {status}), and is not followed; give that address as --url"
        )
    else:
        error = ServerError(f"the server refuses with HTTP {status}{said}")
    error.status = status
    return error


def _short(content: Any) -> str:
    """The beginning of what a server says, in one line that a terminal may show."""
    try:
        text = content if isinstance(content, str) else json.dumps(content)
    except (ValueError, RecursionError):
        text = f"a {type(content).__name__} that cannot be shown"
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text[:2000].split()))[:200]


class _explained:
    """Turns what goes wrong on the way to a server into a `ServerError`."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, asyncio.CancelledError):
            return
        httpx = require("httpx2", "mope profile")
        if isinstance(error, httpx.TimeoutException):
            raise ServerError("it took longer than --timeout-s to say anything") from error
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            raise ServerError(f"{type(error).__name__}: {_short(str(error)) or 'the connection broke'}") from error
