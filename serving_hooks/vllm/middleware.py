"""vLLM's front end: two ASGI middlewares that say who sent a request, and how long its answer is predicted to be.

`Middleware` tells mope's scheduler, by `vllm_xargs`, under a seal that callers cannot make; `PriorityMiddleware` tells
vLLM's own, by `priority`, in place of what a caller wrote there. vLLM adds a `--middleware` as the outermost one, so it
sees requests whose key is refused behind it: for those nothing is read or predicted. Knows vLLM's paths and fields;
imports no engine.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from mope.errors import ConfigError
from mope.fairness.charges import MAX_TOKENS, Service, weighted_tokens
from mope.serving_hooks import secret
from mope.serving_hooks.asgi import (
    MAX_READ,
    App,
    BodyMiddleware,
    Message,
    Post,
    Refused,
    Scope,
    Send,
    header,
    parsed,
    path_of,
    with_headers,
    written,
)
from mope.serving_hooks.bodies import CHARS_PER_TOKEN, Asked, Kind, kind_of, readable, size_tokens
from mope.serving_hooks.carried import seals, without_ours
from mope.serving_hooks.front import Front, FrontPrediction
from mope.serving_hooks.front_metrics import FrontCollector, FrontWriter, front_collector
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.start_time import StartTimeTags
from mope.serving_hooks.steward import ANYBODY
from mope.serving_hooks.vllm.settings import (
    hook_options,
    llm_names,
    num_api_servers,
    orders_by_priority,
    server_keys,
)

PATHS: dict[str, Kind | None] = {  # of what generates text; None where the body has to tell its kind
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/invocations": None,
    "/inference/v1/generate": "other",
    "/v1/chat/completions/batch": "batch",
    "/generative_scoring": "other",
    "/v1/systemone": "other",
    "/cohere/v2/chat": "other",
}
UNCARRIED = ("/generative_scoring", "/v1/systemone", "/cohere/v2/chat")  # vLLM drops `vllm_xargs` there
FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations")  # the only ones that carry `vllm_xargs` in a form
TOKENS_IN = "/inference/v1/generate"  # its `sampling_params` are vLLM's own
MAX_REWRITTEN = 2**20  # bytes of a body that is written anew; to a larger one, more is added
PRIORITY_HEADER = b"x-vllm-priority"  # of vLLM 0.28 and later: wins over the body's `priority`

_logger = logging.getLogger("vllm.mope")  # below vLLM's own logger, whose handlers show it
_CHARSET = re.compile(r"charset[^=]*=\s*[\"']?([^\s;\"']*)")
_UTF_8 = ("utf-8", "utf8", "us-ascii", "ascii")


class _VllmMiddleware(BodyMiddleware):
    """What both have in common."""

    def __init__(self, app: App) -> None:
        super().__init__(app, Guard(_logger))
        self.front: Front | None = None
        self._shown: FrontCollector | FrontWriter | None = None

    async def begin(self, scope: Scope) -> None:
        """Reads the options and loads the predictor.

        Raises:
            UserError: options, a secret or a file of keys that cannot be used.
        """
        state = getattr(scope.get("app"), "state", None)
        config, arguments = getattr(state, "vllm_config", None), getattr(state, "args", None)
        options = hook_options(config, arguments)
        shared = secret.load(options)
        seals.use(shared)
        identity = Identity(options, secret=shared, logger=_logger, server_keys=server_keys(arguments))
        names = llm_names(config, arguments)
        loop = asyncio.get_running_loop()
        self.front = await loop.run_in_executor(None, lambda: Front.load(options, identity, names, logger=_logger))
        _logger.info("mope %s: %s", type(self).__name__, self.front)
        self._shown = front_collector(self.front.snapshot, options)  # beside vLLM's own, at its /metrics

    def end(self) -> None:
        """Ends the predictor's threads."""
        if self._shown is not None:
            self._shown.close()
        if self.front is not None:
            self.front.close()

    def wants(self, scope: Scope) -> bool:
        """What generates text, unless it comes without a known key where keys are asked for."""
        path = path_of(scope)
        return path in FORMS or (path in PATHS and self.admits(scope))

    def admits(self, scope: Scope) -> bool:
        """Whether it is a request to work for."""
        return self.front is not None and self.front.admits(scope["headers"])

    def reads(self, scope: Scope) -> bool:
        """Forms are passed on as they come: what they say of us has no seal."""
        return path_of(scope) not in FORMS

    async def change(self, post: Post, body: bytes) -> Post:
        """Reads what is known."""
        path = path_of(post.scope)
        if path in FORMS:
            return self.form(post)
        if self.front is None:
            return post
        self.front.count(path)
        return await self.generate(post, self.front, path, body)

    async def change_unread(self, post: Post) -> Post:
        """As `change`, for what is too large to be read."""
        path = path_of(post.scope)
        if path in FORMS:
            return self.form(post)
        if self.front is None:
            return post
        self.front.count(path)
        return await self.generate(post, self.front, path, None)

    def form(self, post: Post) -> Post:
        """A form, as it is passed on.

        Raises:
            Refused: it is written so that servers and those in front of them may read it in different ways.
        """
        said = _CHARSET.findall(header(post.scope, b"content-type"))
        if any(charset not in _UTF_8 for charset in said):
            raise Refused(f"a form's charset is {said[0][:40]}; expected utf-8")
        return post

    async def generate(self, post: Post, front: Front, path: str, body: bytes | None) -> Post:
        """A request that generates text, as it is passed on; without a body where that is too large."""
        raise NotImplementedError

    @staticmethod
    def readable(body: bytes | None, *, always: bool) -> bytes | None:
        """What of a body is parsed; None if it costs too much.

        Args:
            body: the body; None if it is too large to be kept.
            always: whether it says who sent it, so that no size may hide that.

        Raises:
            Refused: it says who sent it and is too large.
        """
        if always and body is None:
            raise Refused("the body is too large to find out who sent it")
        if body is None or always:
            return body
        short = readable(body)
        return body if short is not None and len(body) <= MAX_REWRITTEN else short

    def snapshot(self) -> dict[str, Any]:
        """Counters so far, see `Front.snapshot`; empty before the start."""
        return {} if self.front is None else self.front.snapshot()


class Middleware(_VllmMiddleware):
    """Tells mope's scheduler the client and the prediction of each request.

    `vllm serve ... --middleware mope.serving_hooks.vllm.Middleware`, beside `--scheduler-cls` of the same package. In a
    batch of prompts each one gets the same values: the expected tokens are the mean over its prompts.
    """

    def wants(self, scope: Scope) -> bool:
        """As there, where vLLM carries what is told."""
        return path_of(scope) not in UNCARRIED and super().wants(scope)

    async def generate(self, post: Post, front: Front, path: str, body: bytes | None) -> Post:
        """Puts what is carried into `vllm_xargs`."""
        always = path == TOKENS_IN or front.client_in_body
        short = self.readable(body, always=always)
        if short is None:
            told = (await front.carried("other", post.scope["headers"], {}, self.guard)).write()
            return post._replace(more=_more("vllm_xargs", told) if told else b"")
        found = parsed(short)
        key = "extra_args" if path == TOKENS_IN else "vllm_xargs"
        holder = found.get("sampling_params") if found is not None and path == TOKENS_IN else found
        if found is None or not isinstance(holder, dict) or not isinstance(holder.get(key), dict | None):
            return post  # vLLM refuses it
        kind = PATHS[path] or kind_of(found)
        told = (await front.carried(kind, post.scope["headers"], found, self.guard)).write()
        if not told:
            return post
        theirs = holder.get(key)
        if theirs and short is not body:
            theirs = (parsed(body or b"") or {}).get(key)
        holder[key] = {**without_ours(theirs), **told}
        if len(short) <= MAX_REWRITTEN and short is body:
            return post._replace(body=written(found))
        name = "sampling_params" if path == TOKENS_IN else key
        return post._replace(more=_more(name, found[name]))


class PriorityMiddleware(_VllmMiddleware):
    """Fair sharing by vLLM's public surface alone: start-time fair queueing tags as `priority`.

    `vllm serve ... --scheduling-policy priority --middleware mope.serving_hooks.vllm.PriorityMiddleware`, without a
    scheduler of ours. See `mope.serving_hooks.start_time` for the order. It holds within one API server process; with
    `--api-server-count` above 1 requests keep the order of arrival. A request costs its prompt and its predicted
    answers in weighted tokens. Virtual time moves when an answer's first bytes come: of one that is not streamed, at
    its end. Preemption takes the largest tag first.
    """

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self._tags: StartTimeTags | None = None
        self._by_priority = False
        self._last = 0  # the largest tag so far

    async def begin(self, scope: Scope) -> None:
        """Looks whether vLLM runs as this needs it, then as in all of them.

        Raises:
            UserError: as there; or vLLM runs otherwise and `on_mismatch` says to refuse.
        """
        state = getattr(scope.get("app"), "state", None)
        config, arguments = getattr(state, "vllm_config", None), getattr(state, "args", None)
        self._by_priority = orders_by_priority(config, arguments)
        options = hook_options(config, arguments)
        if (mismatch := self._mismatch(num_api_servers(config, arguments))) is not None:
            if options.on_mismatch == "refuse":
                raise ConfigError(mismatch)
            _logger.error("mope PriorityMiddleware is off, requests keep the order of arrival: %s", mismatch)
            return
        await super().begin(scope)
        self._tags = StartTimeTags(options.weights, options.max_clients)

    def _mismatch(self, num_servers: int) -> str | None:
        if not self._by_priority:
            return "vLLM orders by arrival; start it with --scheduling-policy priority"
        if num_servers > 1:
            return f"{num_servers} API server processes know nothing of each other; start it with --api-server-count 1"
        return None

    def wants(self, scope: Scope) -> bool:
        """All that generates text, for vLLM believes its `priority`; where vLLM orders by it."""
        return self._by_priority and (path_of(scope) in PATHS or path_of(scope) in FORMS)

    def reads(self, scope: Scope) -> bool:
        """What is to be worked for."""
        return super().reads(scope) and self.admits(scope)

    def form(self, post: Post) -> Post:
        """A form has no `priority`; its header must not have one either."""
        return super().form(post)._replace(scope=with_headers(post.scope, PRIORITY_HEADER))

    async def change_unread(self, post: Post) -> Post:
        """As there; also before and without a start."""
        if self.front is None and path_of(post.scope) in PATHS:
            return self._with(post, self._last)
        return await super().change_unread(post)

    async def generate(self, post: Post, front: Front, path: str, body: bytes | None) -> Post:
        """Puts the tag in place of the caller's `priority`, in the body and in its header."""
        always = front.client_in_body and front.admits(post.scope["headers"])
        short = self.readable(body, always=always)
        found = None if short is None else parsed(short)
        tag, send = self._last, post.send
        if self._tags is not None and self.guard.ok:
            client, cost = await self._priced(front, post.scope, path, found, body)
            try:
                tag, send = self._tagged(self._tags, post, client, cost)
            except Exception as error:
                self.guard.fail(error, "tagging a request")
        tagged = self._with(post, tag)._replace(send=send)
        if short is None:
            return tagged
        if found is None:  # vLLM refuses it
            return tagged._replace(more=b"")
        if len(short) <= MAX_REWRITTEN and short is body:
            return tagged._replace(more=b"", body=written({**found, "priority": tag}))
        return tagged

    @staticmethod
    def _with(post: Post, tag: int) -> Post:
        scope = with_headers(post.scope, PRIORITY_HEADER, str(tag).encode())
        return post._replace(scope=scope, more=_more("priority", tag))

    async def _priced(
        self, front: Front, scope: Scope, path: str, found: dict[str, Any] | None, body: bytes | None
    ) -> tuple[str, float]:
        """The client of a request, and what it is taken to cost."""
        client = ANYBODY
        try:
            headers = scope["headers"]
            client = (front.client(headers, found or {}) if front.admits(headers) else None) or ANYBODY
            kind: Kind = "other" if found is None else PATHS[path] or kind_of(found)
            asked = front.read(kind, found) if found is not None else Asked()
            size = size_tokens(found) if found is not None else _said_bytes(scope, body) // CHARS_PER_TOKEN
            predicted = await front.predict(asked, client) if kind != "other" else None
            cost = _cost(asked, size, predicted, front.options)
        except Exception as error:
            self.guard.spoil(error, "pricing a request")
            return client, weighted_tokens(Service(0, 0, front.options.default_tokens), front.options)
        self.guard.good()
        return client, cost

    def _tagged(self, tags: StartTimeTags, post: Post, client: str, cost: float) -> tuple[int, Send]:
        """The tag of a request, and what watches its response."""
        start, length = tags.arrive(client, cost)
        self._last = max(self._last, start)
        waiting = True

        async def sending(message: Message) -> None:
            nonlocal waiting
            if waiting and message["type"] == "http.response.start" and message["status"] >= 400:
                waiting = False
                self.guard.run(lambda: tags.refused(client, length), None, "booking a refusal")
            elif waiting and message["type"] == "http.response.body" and message.get("body"):
                waiting = False
                self.guard.run(lambda: tags.began(start), None, "booking an answer")
            await post.send(message)

        return start, sending


def _cost(asked: Asked, size: int, predicted: FrontPrediction | None, options: HookOptions) -> float:
    """What a request is taken to cost, in weighted tokens."""
    tokens = options.default_tokens if predicted is None else predicted.tokens
    if asked.max_tokens is not None:
        tokens = min(tokens, asked.max_tokens)
    prompt_tokens = min(max(asked.prompt_tokens, size), MAX_TOKENS)
    return weighted_tokens(Service(prompt_tokens, 0, tokens * asked.num_answers), options)


def _said_bytes(scope: Scope, body: bytes | None) -> int:
    """The size of a body, as far as it is known."""
    said = header(scope, b"content-length")
    return len(body) if body is not None else int(said) if said.isdecimal() and len(said) < 12 else MAX_READ


def _more(name: str, value: Any) -> bytes:
    """A member, as it is added to an object."""
    return b"," + written({name: value})[1:-1]
