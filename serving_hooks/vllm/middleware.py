"""vLLM's front end: two ASGI middlewares that say who sent a request, and how long its answer is predicted to be.

`Middleware` tells mope's scheduler, by `vllm_xargs`; `PriorityMiddleware` tells vLLM's own, by `priority`. Each removes
what a caller wrote there. vLLM adds a `--middleware` as the outermost one, so it sees requests whose key is refused
behind it. Knows vLLM's paths and fields; imports no engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from importlib import import_module
from typing import Any

from mope.errors import ConfigError
from mope.fairness.charges import MAX_TOKENS, Service, weighted_tokens
from mope.serving_hooks.asgi import (
    App,
    BodyMiddleware,
    Message,
    Post,
    Refused,
    Scope,
    Send,
    header,
    may_hold,
    parsed,
    path_of,
    strip,
    with_headers,
    without_forged,
    written,
)
from mope.serving_hooks.bodies import Asked, Kind, kind_of
from mope.serving_hooks.carried import PREFIX, Carried
from mope.serving_hooks.front import Front, Predicted
from mope.serving_hooks.front_metrics import FrontCollector, FrontWriter, front_collector
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.identity import Identity
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.start_time import StartTimeTags
from mope.serving_hooks.steward import ANYBODY
from mope.serving_hooks.vllm.settings import (
    hook_options,
    keys_checked,
    llm_names,
    num_api_servers,
    orders_by_priority,
)

PATHS: dict[str, Kind | None] = {  # of what generates text; None where the body has to tell its kind
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/invocations": None,
    "/inference/v1/generate": "other",
    "/v1/chat/completions/batch": "other",
    "/generative_scoring": "other",
    "/v1/systemone": "other",
    "/cohere/v2/chat": "other",
}
FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations")  # the only ones that carry `vllm_xargs` in a form
TOKENS_IN = "/inference/v1/generate"  # its `sampling_params` are vLLM's own
MAX_PREDICTED = 32 * 2**20  # bytes of a body; a larger one is images, and gets no prediction
PRIORITY_HEADER = b"x-vllm-priority"  # of vLLM 0.28 and later: wins over the body's `priority`

_logger = logging.getLogger("vllm.mope")  # below vLLM's own logger, whose handlers show it
_MAY_NAME_XARGS = re.compile(rb"xargs|name\s*\*", re.IGNORECASE)


class _VllmMiddleware(BodyMiddleware):
    """What both have in common."""

    def __init__(self, app: App) -> None:
        super().__init__(app, Guard(_logger))
        self.front: Front | None = None
        self._shown: FrontCollector | FrontWriter | None = None

    async def begin(self, scope: Scope) -> None:
        """Reads the options and loads the predictor.

        Raises:
            UserError: options, a file of keys or a predictor that cannot be used.
        """
        state = getattr(scope.get("app"), "state", None)
        config, arguments = getattr(state, "vllm_config", None), getattr(state, "args", None)
        options = hook_options(config, arguments)
        identity = Identity(options, keys_checked=keys_checked(arguments), logger=_logger)
        names = llm_names(config, arguments)
        self.front = await asyncio.get_running_loop().run_in_executor(None, Front.load, options, identity, names)
        _logger.info("mope %s: %s", type(self).__name__, self.front)
        self._shown = front_collector(self.front.snapshot, options)  # beside vLLM's own, at its /metrics

    def end(self) -> None:
        """Ends the predictor's threads."""
        if self._shown is not None:
            self._shown.close()
        if self.front is not None:
            self.front.close()

    def wants(self, scope: Scope) -> bool:
        """Bodies of JSON on any path, for any may carry what is forged; forms where vLLM takes them."""
        path = path_of(scope)
        if path in PATHS or path in FORMS:
            return True
        kind = header(scope, b"content-type")
        return not kind or "json" in kind

    async def change(self, post: Post, body: bytes) -> Post:
        """Reads what is known, and removes what is forged from the rest.

        Raises:
            Refused: a form holds what is forged.
        """
        path = path_of(post.scope)
        if path in FORMS:
            if await _forged_form(post.scope, body):
                raise Refused(f"vllm_xargs: keys that begin with {PREFIX} are not for callers")
            return post
        if path not in PATHS:
            return post._replace(body=without_forged(body))
        if self.front is not None:
            self.front.count(path)
        return await self.generate(post, path, body)

    async def generate(self, post: Post, path: str, body: bytes) -> Post:
        """A request that generates text, as it is passed on."""
        raise NotImplementedError

    def snapshot(self) -> dict[str, Any]:
        """Counters so far, see `Front.snapshot`; empty before the start."""
        return {} if self.front is None else self.front.snapshot()


class Middleware(_VllmMiddleware):
    """Tells mope's scheduler the client and the prediction of each request.

    `vllm serve ... --middleware mope.serving_hooks.vllm.Middleware`, beside `--scheduler-cls` of the same package. In a
    batch of prompts each one gets the same values: the expected tokens are the mean over its prompts.
    """

    async def generate(self, post: Post, path: str, body: bytes) -> Post:
        """Puts what is carried into `vllm_xargs`."""
        if len(body) > MAX_PREDICTED and (large := self._large(post, path, body)) is not None:
            return post._replace(body=large)
        found = parsed(body)
        if found is None:
            return post
        changed = may_hold(body, PREFIX) and strip(found)
        key = "extra_args" if path == TOKENS_IN else "vllm_xargs"
        holder = found.get("sampling_params") if path == TOKENS_IN else found
        if isinstance(holder, dict) and isinstance(holder.get(key), dict | None):  # else vLLM refuses it
            carried = await self._carried(PATHS[path] or kind_of(found), post, found, len(body))
            if told := carried.write():
                holder[key], changed = {**(holder.get(key) or {}), **told}, True
        return post._replace(body=written(found)) if changed else post

    async def _carried(self, kind: Kind, post: Post, body: dict[str, Any], size: int) -> Carried:
        if self.front is None or not self.guard.ok:
            return Carried()
        try:
            return await self.front.carried(kind if size <= MAX_PREDICTED else "other", post.scope["headers"], body)
        except Exception as error:
            self.guard.fail(error, "reading a request")
            return Carried()

    def _large(self, post: Post, path: str, body: bytes) -> bytes | None:
        """A large body with its client, without reading it; None if it has to be read."""
        front = self.front
        if may_hold(body, "vllm_xargs") or path == TOKENS_IN or front is None or front.client_in_body:
            return None
        client = self.guard.run(lambda: front.client(post.scope["headers"], {}), None, "finding a client")
        end = body.rstrip()
        if client is None or not end.endswith(b"}"):
            return body
        return end[:-1] + b',"vllm_xargs":' + written(Carried(client).write()) + b"}"


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

    async def generate(self, post: Post, path: str, body: bytes) -> Post:
        """Puts the tag in place of the caller's `priority`, in the body and in its header."""
        if not self._by_priority:
            return post._replace(body=without_forged(body))
        found = parsed(body)
        if found is None:
            return post._replace(scope=with_headers(post.scope, PRIORITY_HEADER))
        if may_hold(body, PREFIX):
            strip(found)
        tag, send = self._last, post.send
        if self._tags is not None and self.front is not None and self.guard.ok:
            kind = PATHS[path] or kind_of(found)
            try:
                tag, send = await self._tagged(
                    self._tags, self.front, post, found, kind if len(body) <= MAX_PREDICTED else "other"
                )
            except Exception as error:
                self.guard.fail(error, "tagging a request")
        found["priority"] = tag
        scope = with_headers(post.scope, PRIORITY_HEADER, str(tag).encode())
        return Post(scope, written(found), send)

    async def _tagged(
        self, tags: StartTimeTags, front: Front, post: Post, body: dict[str, Any], kind: Kind
    ) -> tuple[int, Send]:
        """The tag of a request, and what watches its response."""
        asked = front.read(kind, body) if kind != "other" else Asked()
        cost = _cost(asked, await front.predict(asked), front.options)
        client = front.client(post.scope["headers"], body) or ANYBODY
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


def _cost(asked: Asked, predicted: Predicted | None, options: HookOptions) -> float:
    """What a request is taken to cost, in weighted tokens."""
    tokens = options.default_tokens if predicted is None else predicted.tokens
    if asked.max_tokens is not None:
        tokens = min(tokens, asked.max_tokens)
    return weighted_tokens(Service(min(asked.prompt_tokens, MAX_TOKENS), 0, tokens * asked.num_answers), options)


async def _forged_form(scope: Scope, body: bytes) -> bool:
    """Whether a form says what only the front end may say; read as vLLM reads it."""
    if _MAY_NAME_XARGS.search(body) is None:
        return False
    Request = import_module("starlette.requests").Request  # vLLM brings it

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(scope, receive).form() as form:
            said = [value for name, value in form.multi_items() if name == "vllm_xargs" and isinstance(value, str)]
    except Exception:  # no form: vLLM refuses it for the same reason, whatever kind of exception tells of that
        return False
    for value in said:
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and any(name.startswith(PREFIX) for name in found):
            return True
    return False
