"""LiteLLM's proxy: reserve before a call, settle after it, and send it to the deployment with the least predicted work.

    litellm_settings:
      callbacks: mope.serving_hooks.gateways.litellm.hook

Asks a `mope serve`, whose address is in MOPE_URL, and its API key in MOPE_API_KEY. A service that does not answer
allows: the gateway never fails because of it.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from fastapi import HTTPException
from litellm.integrations.custom_logger import CustomLogger

from mope.client import Predictions, Reservation

URL, KEY, DEADLINE, DOWN = "MOPE_URL", "MOPE_API_KEY", "MOPE_DEADLINE_MS", "MOPE_DOWN"
CALLS = frozenset({
    "completion", "acompletion", "text_completion", "atext_completion", "responses", "aresponses", "anthropic_messages",
})  # fmt: skip
MOST_OPEN, LASTS_S = 100_000, 3600.0  # calls that are remembered, and for how long

logger = logging.getLogger("mope")


@dataclass
class Open:
    """A call that was allowed and has not ended.

    Attributes:
        reservation: of it.
        since_s: when it came.
        work: tokens that it is expected to generate.
        deployment: where it runs; empty until one is chosen.
    """

    reservation: Reservation
    since_s: float = field(default_factory=time.monotonic)
    work: float = 0.0
    deployment: str = ""


class MopeHook(CustomLogger):
    """See the module. One for a proxy process.

    Args:
        url: of the service; from the environment if None.
        api_key: of the service; from the environment if None.
        deadline_s: seconds that a call may wait for the service.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, deadline_s: float | None = None) -> None:
        super().__init__()
        logger.info("mope: budgets and routing by %s", url or os.environ.get(URL, "http://127.0.0.1:8400"))
        self._url = url or os.environ.get(URL, "http://127.0.0.1:8400")
        self._api_key = api_key or os.environ.get(KEY)
        self._deadline_s = deadline_s or float(os.environ.get(DEADLINE, "1000")) / 1000
        self._allows = os.environ.get(DOWN, "allow") != "deny"
        self._asked: Predictions | None = None
        self._open: OrderedDict[str, Open] = OrderedDict()
        self._work: defaultdict[str, float] = defaultdict(float)  # tokens that each deployment is expected to generate

    @property
    def _predictions(self) -> Predictions:
        if self._asked is None:  # in the event loop of the proxy
            self._asked = Predictions(
                self._url, api_key=self._api_key, deadline_s=self._deadline_s, allow_unbooked=self._allows
            )
        return self._asked

    def client(self, key: Any) -> str:
        """Whose budget a call takes from: the team of its key, else the key's own name, else its user.

        Args:
            key: LiteLLM's `UserAPIKeyAuth`.
        """
        names = ("team_alias", "team_id", "key_alias", "user_id", "token")
        found = (getattr(key, name, None) for name in names)
        return next((str(name)[:200] for name in found if name), "(anonymous)")

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> None:
        """Reserves.

        Raises:
            HTTPException: 429 with `Retry-After`, where the budget has no room.
        """
        if call_type not in CALLS:
            return
        body = {name: value for name, value in data.items() if name in READ and value is not None}
        client = self.client(user_api_key_dict)
        reservation = await self._predictions.reserve(body, client=client)
        if not reservation.allowed:
            raise _refusal(reservation, client)
        call = data.get("litellm_call_id")
        if isinstance(call, str):
            self._forget_old()
            self._open[call] = Open(reservation, work=reservation.prediction.mean)

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        """The deployment with the least predicted work alone; all, where the call is not known."""
        call = self._open.get(str((request_kwargs or {}).get("litellm_call_id")))
        if call is None or len(healthy_deployments) < 2:
            return healthy_deployments
        self._leave(call)
        by_work = [(self._work.get(_name(one), 0.0), random.random(), one) for one in healthy_deployments]
        chosen = min(by_work, key=lambda found: found[:2])[2]
        call.deployment = _name(chosen)
        self._work[call.deployment] += call.work
        return [chosen]

    async def async_log_success_event(
        self, kwargs: dict[str, Any], response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        """Settles with what was used."""
        await self._settle(kwargs.get("litellm_call_id"), response_obj)

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        """Gives all back: of a call that failed after its last attempt, nothing is counted."""
        await self._settle(request_data.get("litellm_call_id"), None)

    async def _settle(self, name: Any, response: Any) -> None:
        call = self._open.pop(str(name), None)
        if call is None:
            return
        self._leave(call)
        usage = _usage(response)
        if response is not None and usage is None:
            logger.debug("no usage in the response: the reservation expires")
            return
        await self._predictions.settle(
            call.reservation,
            usage=usage or {"prompt_tokens": 0, "completion_tokens": 0},
            finish_reason=_finish(response),
        )

    def _leave(self, call: Open) -> None:
        if call.deployment:
            self._work[call.deployment] -= call.work
            if self._work[call.deployment] <= 1e-6:
                del self._work[call.deployment]
            call.deployment = ""

    def _forget_old(self) -> None:
        """Calls whose end nobody told, such as those of a client that went away."""
        limit = time.monotonic() - LASTS_S
        while self._open:
            oldest = next(iter(self._open))
            if self._open[oldest].since_s > limit and len(self._open) < MOST_OPEN:
                return
            self._leave(self._open.pop(oldest))


def _refusal(reservation: Reservation, client: str) -> HTTPException:
    needs = f"may need {reservation.amount:,.0f} of the {reservation.limit or 0:,.0f} that {client} has in its budget"
    if reservation.wait_s is None:
        # OpenAI's clients ask this header whether to try again
        return HTTPException(429, {"error": f"the request {needs}: it never fits"}, {"x-should-retry": "false"})
    wait_s = max(ceil(reservation.wait_s), 1)
    why = needs if reservation.source == "books" else "cannot be counted now, since the service of budgets is away"
    return HTTPException(429, {"error": f"the request {why}; try again in {wait_s} s"}, {"Retry-After": str(wait_s)})


READ = frozenset({
    "model", "messages", "prompt", "input", "instructions", "system", "max_tokens", "max_completion_tokens",
    "max_output_tokens", "tools", "tool_choice", "response_format", "reasoning_effort", "reasoning", "thinking",
    "temperature", "n", "stop", "min_tokens", "ignore_eos", "text",
})  # fmt: skip


def _name(deployment: Any) -> str:
    info = deployment.get("model_info") if isinstance(deployment, Mapping) else None
    return str(info.get("id", "")) if isinstance(info, Mapping) else ""


def _plain(value: Any) -> Mapping[str, Any]:
    found = value.model_dump() if hasattr(value, "model_dump") else value
    return found if isinstance(found, Mapping) else {}


def _usage(response: Any) -> dict[str, Any] | None:
    """The usage block of a response of any of LiteLLM's APIs; None without one."""
    usage = _plain(_plain(response).get("usage"))
    names = (("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens"))
    for prompt, completion in names:
        if isinstance(usage.get(completion), int):
            return {"prompt_tokens": int(usage.get(prompt) or 0), "completion_tokens": usage[completion]}
    return None


def _finish(response: Any) -> str | None:
    plain = _plain(response)
    choices = plain.get("choices")
    if isinstance(choices, list) and choices:
        found = _plain(choices[0]).get("finish_reason")
    else:
        found = plain.get("stop_reason")
    return found if isinstance(found, str) else None


hook = MopeHook()
