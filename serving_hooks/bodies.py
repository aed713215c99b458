"""What an HTTP request to an LLM server asks for: prompts, history and flags, out of OpenAI's and Anthropic's JSON.

Whatever cannot be read is passed over: to refuse a request is the engine's business. Knows JSON; no engine, no network,
no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mope.errors import DataError
from mope.inputs import MAX_TEMPERATURE, MAX_TOKENS, has_text
from mope.request import Request, message_text
from mope.token_estimate import estimate_tokens

Kind = Literal["completions", "chat", "responses", "messages", "other"]

COMPLETION_TOKENS = 16  # cap of a text completion that names none, as OpenAI and engines have it
MAX_PROMPTS = 32  # prompts of one request that are predicted; of more, evenly spaced ones stand for all
MAX_ANSWERS = 10_000  # answers that one request is taken to ask for
MAX_NAME_CHARS = 64
_ROLES = ("user", "assistant", "system", "developer")


class Asked(NamedTuple):
    """What one HTTP request asks for.

    Attributes:
        requests: one for each prompt with text, at most `MAX_PROMPTS`; they stand for all prompts of the request.
        prompt_tokens: tokens of all its prompts together, estimated where they are text.
        num_answers: answers that it asks for: prompts times `n`.
        max_tokens: cap on each answer; None if it names none.
    """

    requests: tuple[Request, ...] = ()
    prompt_tokens: int = 0
    num_answers: int = 1
    max_tokens: int | None = None


def kind_of(body: Mapping[str, Any]) -> Kind:
    """The kind of a body whose path does not tell."""
    return "chat" if "messages" in body else "completions" if "prompt" in body else "other"


def read(kind: Kind, body: Mapping[str, Any], target_llm: str | None, llm_family: str | None = None) -> Asked:
    """What a body asks for. Never raises for what a caller wrote. Some ten microseconds.

    Args:
        kind: whose JSON it is.
        body: the JSON.
        target_llm: the LLM that will answer.
        llm_family: its family, where its name does not tell.
    """
    flags: dict[str, Any] = {
        "target_llm": target_llm,
        "llm_family": llm_family,
        "max_tokens": _cap(body, kind),
        "temperature": _number(body.get("temperature"), MAX_TEMPERATURE),
        "tools": bool(body.get("tools")) and body.get("tool_choice") != "none",
        "response_format": _format(body),
        "thinking": _thinking(body),
        "thinking_budget": _budget(body),
    }
    cap = flags["max_tokens"]
    count = _whole(body.get("n")) or 1
    try:
        if kind == "completions":
            return _completions(body.get("prompt"), flags, count)
        messages = _messages(kind, body)
    except DataError:
        return Asked(num_answers=min(count, MAX_ANSWERS), max_tokens=cap)
    tokens = estimate_tokens("\n".join(message["content"] for message in messages))
    try:
        request = Request.from_messages(messages, **flags)
    except DataError:  # no message of a user
        return Asked((), tokens, min(count, MAX_ANSWERS), cap)
    return Asked((request,) if has_text(request) else (), tokens, min(count, MAX_ANSWERS), cap)


def _completions(prompt: Any, flags: dict[str, Any], count: int) -> Asked:
    """Of a prompt: a text, token ids, or a list of either."""
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    step = max(1, -(-len(prompts) // MAX_PROMPTS))
    texts = [one for one in prompts[::step] if isinstance(one, str)]
    tokens = estimate_tokens("\n".join(one for one in prompts if isinstance(one, str)))
    tokens += sum(len(one) for one in prompts if isinstance(one, list))
    requests = tuple(Request(prompt=text, **flags) for text in texts)
    return Asked(
        tuple(request for request in requests if has_text(request)),
        tokens,
        min(count * len(prompts), MAX_ANSWERS),
        flags["max_tokens"],
    )


def _messages(kind: Kind, body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation as role and text.

    Raises:
        DataError: content that is none.
    """
    written = body.get("input" if kind == "responses" else "messages")
    before = body.get({"responses": "instructions", "messages": "system"}.get(kind, ""))
    found = [{"role": "system", "content": message_text(before)}] if before else []
    if isinstance(written, str) and kind == "responses":
        return [*found, {"role": "user", "content": written}]
    for message in written if isinstance(written, list) else ():
        if isinstance(message, Mapping) and message.get("role") in _ROLES:
            found.append({"role": str(message["role"]), "content": message_text(message.get("content"))})
    return found


def _cap(body: Mapping[str, Any], kind: Kind) -> int | None:
    for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
        if (found := _whole(body.get(name))) is not None:
            return found
    return COMPLETION_TOKENS if kind == "completions" else None


def _format(body: Mapping[str, Any]) -> str:
    asked = body.get("response_format")
    if asked is None and isinstance(body.get("text"), Mapping):
        asked = body["text"].get("format")
    name = asked.get("type") if isinstance(asked, Mapping) else None
    if isinstance(name, str) and name != "text":
        return name[:MAX_NAME_CHARS]
    constrained = body.get("structured_outputs")
    by_vllm = isinstance(constrained, Mapping) and (constrained.get("json") or constrained.get("json_object"))
    return "json_schema" if by_vllm or body.get("guided_json") else ""


def _thinking(body: Mapping[str, Any]) -> bool | None:
    """Whether the LLM is asked to think; None if the request does not say."""
    template = body.get("chat_template_kwargs")
    for name in ("enable_thinking", "thinking"):
        if isinstance(template, Mapping) and isinstance(template.get(name), bool):
            return bool(template[name])
    if isinstance(body.get("thinking"), Mapping):
        return bool(body["thinking"].get("type") != "disabled")
    effort = body.get("reasoning_effort")
    if effort is None and isinstance(body.get("reasoning"), Mapping):
        effort = body["reasoning"].get("effort")
    return effort != "none" if isinstance(effort, str) else None


def _budget(body: Mapping[str, Any]) -> int | None:
    thinking = body.get("thinking")
    named = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return _whole(body.get("thinking_token_budget")) or _whole(named)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 1 <= value <= MAX_TOKENS else None


def _number(value: Any, most: float) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value <= most else None
