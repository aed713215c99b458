"""The front-end half of the SGLang hook: who sent a request, how long its answer is predicted to be, what came of it.

Every way into SGLang's Python server (OpenAI's, Anthropic's and its own paths, and `sgl.Engine`) ends in
`TokenizerManager.generate_request`. There we remove what a caller may not say, ask the engine-neutral `Front` for the
client and the prediction, and put both into `custom_params`, which reach the scheduler. The same place sees the
answers, so here is what learns from them: schedulers of several ranks could not do so and still agree.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope.errors import UserError
from mope.reader import is_forced
from mope.serving_hooks import secret
from mope.serving_hooks.bodies import Kind
from mope.serving_hooks.carried import Carried, seals, without_ours
from mope.serving_hooks.guard import Guard
from mope.serving_hooks.lengths import Lengths
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.remote import teacher
from mope.serving_hooks.sglang import compat
from mope.serving_hooks.sglang.policy import ATTRIBUTE
from mope.serving_hooks.sglang.settings import VARIABLE, read_options
from mope.serving_hooks.state import Keeper, in_pieces, take_up

if TYPE_CHECKING:
    from mope.serving_hooks.front import FrontPrediction
    from mope.serving_hooks.identity import Headers

CONVERSATIONS: dict[str, Kind] = {  # paths whose JSON says more than the text that SGLang makes of it
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
NATIVE_TOKENS = 128  # cap of a request of SGLang's own that names none
_HEALTH = ("/health", "/health_generate")
SERVER = "(server)"  # the client of the server's own requests

logger = logging.getLogger("mope")


class FrontEnd:
    """Serves one `TokenizerManager`.

    Attributes:
        options: what the operator chose.
        guard: of all that is ours here; what goes wrong with one request costs that one its client and prediction.
        front: finds clients and predicts.
        lengths: corrects predictions by finished requests.
        num_stripped: requests that came with what only we may write.
    """

    def __init__(self, server_args: Any, options: HookOptions) -> None:
        """Reads the secret and the file of keys, and loads the predictor.

        Args:
            server_args: SGLang's.
            options: what the operator chose.

        Raises:
            ConfigError: a secret or a file of keys that cannot be used. A predictor that cannot be loaded is logged,
                and requests go without predictions.
        """
        from mope.serving_hooks.front import Front
        from mope.serving_hooks.identity import Identity

        self.options = options
        self.guard = Guard(logger)
        self.num_stripped = 0
        shared = secret.load(options)
        seals.use(shared)
        keys = [key for name in ("api_key", "admin_api_key") if (key := getattr(server_args, name, None))]
        identity = Identity(options, secret=shared, logger=logger, server_keys=keys)
        # what was loaded first: an alias such as `gpt-4` does not say which LLM answers
        names = [str(name) for name in (server_args.model_path, server_args.served_model_name) if name]
        self.front = Front.load(options, identity, names, logger=logger)
        # the front end predicts with the corrector that learns here: its predictions come corrected
        self.lengths = Lengths(
            self.front.corrector if options.recalibrate else None,
            teacher(options.predictor, recalibrate=options.recalibrate),
        )
        self._keeper: Keeper | None = None
        if options.state is not None:
            path = _kept_beside(options.state)
            take_up(path, "lessons", self._restore)
            self._keeper = Keeper(
                path,
                lambda: in_pieces({"lengths": self.lengths.to_json()}),
                lambda: (self.lengths.num_seen, self.lengths.num_observed),
            )
        if self._keeper is not None or self.lengths.teacher is not None:
            atexit.register(self._close)
        if server_args.enable_metrics:
            from mope.serving_hooks.front_metrics import front_collector

            front_collector(self.front.snapshot, options)  # beside SGLang's own, at its /metrics
        logger.info("mope in SGLang's front end: %s", self.front)

    async def prepare(self, obj: Any, request: Any) -> list[Carried]:
        """Puts the client and predictions into a request.

        Args:
            obj: SGLang's `GenerateReqInput`.
            request: the HTTP request; None from `sgl.Engine`.

        Returns:
            What was predicted for each of its prompts, or for all of them together.
        """
        path, headers, body = await _http(request)
        texts = obj.text if isinstance(obj.text, list) else [obj.text] if isinstance(obj.text, str) else []
        client = SERVER if path in _HEALTH else self._client(headers, body)
        self.front.count(path)
        try:
            predicted = await self._predicted(obj, path, body, texts, client)
        except Exception as error:
            self.guard.spoil(error, "predicting")
            predicted = []
        carried = [
            Carried(client, *one) if one is not None and isfinite(one.tokens) else Carried(client) for one in predicted
        ]
        carried = carried or [Carried(client)]
        _write(obj, [one._replace(raw=None, answering=None) for one in carried])
        return carried

    def _client(self, headers: Headers, body: Mapping[str, Any]) -> str | None:
        return self.guard.attempt(lambda: self.front.client(headers, body), None, "finding a client")

    async def _predicted(
        self, obj: Any, path: str, body: Mapping[str, Any], texts: Sequence[str], client: str | None
    ) -> list[FrontPrediction | None]:
        if path in CONVERSATIONS:
            asked = [self.front.read(CONVERSATIONS[path], body)]
        elif path in _HEALTH:
            asked = []
        else:
            asked = [
                self.front.read("chat", self._as_body(obj, place, text))  # without the cap of /v1/completions
                for place, text in enumerate(texts)
            ]
        if len(asked) == 1:
            return [await self.front.predict(asked[0], client)]
        return list(await asyncio.gather(*(self.front.predict(one, client) for one in asked)))

    @staticmethod
    def _as_body(obj: Any, place: int, text: str) -> dict[str, Any]:
        parameters = obj.sampling_params
        if isinstance(parameters, list):
            parameters = parameters[place] if place < len(parameters) else {}
        found = parameters if isinstance(parameters, Mapping) else {}
        return {"prompt": text, "sampling_params": {"max_new_tokens": NATIVE_TOKENS, **found}, "n": found.get("n")}

    def saw(self, carried: Sequence[Carried], output: Any, parameters: Any = None) -> None:
        """Learns from what came of a request, once it has ended; `parameters` are its sampling parameters."""
        outputs = output if isinstance(output, list) else [output]
        for place, one in enumerate(outputs):
            meta = one.get("meta_info") if isinstance(one, dict) else None
            reason = meta.get("finish_reason") if isinstance(meta, dict) else None
            if not isinstance(reason, dict) or meta is None:
                continue
            place = one.get("index", place)
            said = carried[0] if len(carried) == 1 else carried[place] if place < len(carried) else None
            if said is not None:
                ended, tokens = reason.get("type"), int(meta.get("completion_tokens", 0))
                given = parameters[place] if isinstance(parameters, list) and place < len(parameters) else parameters
                self.lengths.observe(
                    said,
                    said.client or "",
                    tokens,
                    censored=ended in ("length", "abort"),
                    forced=isinstance(given, Mapping) and is_forced(given, tokens),
                )
        if self._keeper is not None:
            self._keeper.start()

    def tell(self, states: Any) -> None:
        """Adds what became of predictions to what `/server_info` says of each replica's hook."""
        told = self.front.snapshot()
        for state in states:
            ours = state.get("mope")
            if isinstance(ours, dict):
                ours.update(
                    predictor=self.options.predictor, predicts=told["predicts"], predictions=told["predictions"]
                )

    def _restore(self, kept: Any) -> None:
        if not isinstance(kept, dict):
            raise UserError("it holds no lessons")
        self.lengths.restore(kept.get("lengths"))

    def _close(self) -> None:
        self.lengths.close()
        if self._keeper is not None:
            self._keeper.close()

    def strip(self, obj: Any) -> None:
        """Removes what only we may write, and what would hide it.

        Raises:
            ValueError: `custom_params` are no object; SGLang answers 400.
        """
        given = obj.sampling_params
        for parameters in given if isinstance(given, list) else [given]:
            if not isinstance(parameters, dict):
                continue
            params = parameters.get("custom_params")
            if not params:  # SGLang takes 0, "" and [] for none
                if params is not None:
                    parameters["custom_params"] = None
            elif not isinstance(params, Mapping):
                raise ValueError(f"custom_params: expected an object, got {type(params).__name__}")
            elif len(kept := without_ours(params)) < len(params):
                parameters["custom_params"] = kept or None
                self.num_stripped += 1


def _kept_beside(state: Path) -> Path:
    return state.with_name(f"{state.stem}-lengths{state.suffix}")


def _write(obj: Any, carried: Sequence[Carried]) -> None:
    """Puts what is carried into a request's `custom_params`, beside what its caller put there."""
    given = obj.sampling_params if obj.sampling_params is not None else {}
    if isinstance(given, list):
        said = carried if len(carried) == len(given) else [carried[0]] * len(given)
        obj.sampling_params = [_with(one, told) for one, told in zip(given, said, strict=True)]
    elif len(carried) == 1:
        obj.sampling_params = _with(given, carried[0])
    else:
        obj.sampling_params = [_with(given, told) for told in carried]


def _with(parameters: Any, carried: Carried) -> Any:
    written = carried.write()
    if not written or not isinstance(parameters, Mapping):
        return parameters
    return {**parameters, "custom_params": {**(parameters.get("custom_params") or {}), **written}}


async def _http(request: Any) -> tuple[str, Headers, Mapping[str, Any]]:
    """The path, the headers and the JSON of a request; SGLang has read the body, and Starlette keeps it."""
    scope = getattr(request, "scope", None)
    if not isinstance(scope, dict) or scope.get("type") != "http":
        return "", (), {}
    path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
    body = await request.json() if getattr(request, "_json", None) is not None else {}
    return path, scope.get("headers", ()), body if isinstance(body, dict) else {}


# -- hooks


def begin(result: Any, manager: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """After `TokenizerManager.__init__`: takes up its work if the operator chose a policy of ours.

    Raises:
        ConfigError: options that cannot be used; the server does not start.
    """
    policy = server_args.schedule_policy
    if policy not in compat.POLICIES:
        if os.environ.get(VARIABLE):
            known = ", ".join(compat.POLICIES)
            logger.warning("mope is off, though it was given options: --schedule-policy is %s, not %s", policy, known)
    elif compat.bypassed_front(server_args) is None:
        setattr(manager, ATTRIBUTE, FrontEnd(server_args, read_options(policy)))


async def generate_request(
    original: Any, manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """Around `TokenizerManager.generate_request`: a request goes in with client and prediction."""
    end: FrontEnd | None = getattr(manager, ATTRIBUTE, None)
    carried: list[Carried] = []
    if end is not None and hasattr(obj, "sampling_params"):
        end.strip(obj)
        if end.guard.ok and hasattr(obj, "stream"):  # an embedding answers nothing
            try:
                carried = await end.prepare(obj, request)
            except Exception as error:
                end.guard.spoil(error, "reading a request")
    async with aclosing(original(manager, obj, request, *args, **kwargs)) as outputs:
        async for output in outputs:
            if end is not None and carried:
                end.guard.attempt(
                    partial(end.saw, carried, output, obj.sampling_params), None, "learning from an answer"
                )
            yield output


async def internal_states(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `TokenizerManager.get_internal_state`, which `/server_info` shows: the front end's part is added."""
    states = await original(manager, *args, **kwargs)
    end: FrontEnd | None = getattr(manager, ATTRIBUTE, None)
    if end is not None:
        end.guard.attempt(partial(end.tell, states), None, "telling what became of predictions")
    return states
